"""Size and speed of exported graphs in their runtimes, dense and low rank: onnxruntime and OpenVINO, on the CPU.

A BERT-base-shaped classifier of random weights, because only shapes decide speed, on one sequence. The dense graph is
made by the same exporter. What is in `--folder` already is not made again, so that all can be prepared first.

    python examples/benchmarks/runtimes.py --folder FOLDER --prepare
    python examples/benchmarks/runtimes.py --folder FOLDER --save
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from harness import finish, in_turn, parser, ratio

import lrsurgery
from lrsurgery.checkpoints.source import resolve
from lrsurgery.export.graphs.feed import feed_of
from lrsurgery.export.graphs.runtimes import ONNX, OPENVINO, Runtime, export_transformers
from lrsurgery.export.targets import export_graph

RANK = "params:0.5"
VARIANTS = ("dense", "balanced", "pivoted")


def make_models(folder: Path, blocks: int) -> None:
    """A BERT-base-shaped classifier, and its layers at half of their parameters in both forms."""
    from transformers import BertConfig, BertForSequenceClassification

    if not (folder / "dense").exists():
        torch.manual_seed(0)
        BertForSequenceClassification(BertConfig(num_hidden_layers=blocks)).save_pretrained(folder / "dense")
    for form in VARIANTS[1:]:
        if not (folder / form).exists():
            lrsurgery.factorise_checkpoint(
                folder / "dense", folder / form, rank=RANK, form=form, include=["*.layer.*"], loss_check=False
            )


def write_graph(runtime: Runtime, folder: Path, variant: str) -> Path:
    """The graph of one variant; the dense one by the exporter alone."""
    target = folder / f"{variant}-{runtime.name}"
    if target.exists():
        return target
    if variant != "dense":
        export_graph(folder / variant, target, to=runtime.name)
        return target
    model = lrsurgery.load_model(folder / variant, dtype=torch.float32).requires_grad_(False)
    target.mkdir()
    export_transformers(runtime, model, feed_of(resolve(str(folder / variant)), model), target)
    return target


def opened(runtime: Runtime, folder: Path, length: int, threads: int) -> Callable[[], Any]:
    """A function that runs a graph on one sequence of random tokens."""
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(2, 1000, (1, length), generator=generator).numpy()}
    inputs |= {"attention_mask": inputs["input_ids"] * 0 + 1, "token_type_ids": inputs["input_ids"] * 0}
    if runtime is ONNX:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(folder / ONNX.file), options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, inputs)
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    model = openvino.Core().compile_model(str(folder / OPENVINO.file), "CPU", settings)
    return lambda: model(inputs)


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--folder", type=Path, required=True, help="where models and graphs are kept")
    options.add_argument("--prepare", action="store_true", help="make models and graphs, and measure nothing")
    options.add_argument("--blocks", type=int, default=12)
    options.add_argument("--length", type=int, default=128, help="tokens")
    options.add_argument("--threads", type=int, default=2)
    arguments = options.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    make_models(arguments.folder, arguments.blocks)
    graphs = {(r, v): write_graph(r, arguments.folder, v) for r in (ONNX, OPENVINO) for v in VARIANTS}
    if arguments.prepare:
        return
    rows: list[dict[str, Any]] = []
    for runtime, package in ((ONNX, "onnxruntime"), (OPENVINO, "openvino")):
        candidates = {v: opened(runtime, graphs[runtime, v], arguments.length, arguments.threads) for v in VARIANTS}
        seconds = in_turn(candidates, arguments.repeats, warm_up=3)
        sizes = {v: sum(file.stat().st_size for file in _graph_files(graphs[runtime, v])) for v in VARIANTS}
        for variant in VARIANTS:
            faster = ratio(seconds["dense"], seconds[variant])
            rows.append(
                {
                    "runtime": f"{package} {version(package)}",
                    "layers": variant if variant == "dense" else f"{RANK}, {variant}",
                    "MB": sizes[variant] / 1e6,
                    "of dense": sizes[variant] / sizes["dense"],
                    "ms": sorted(seconds[variant])[len(seconds[variant]) // 2] * 1e3,
                    "speedup": faster["median"],
                    "smallest": faster["min"],
                    "largest": faster["max"],
                }
            )
    finish("runtimes", rows, arguments)


def _graph_files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.name.startswith(("model.", "openvino_model."))]


if __name__ == "__main__":
    main()
