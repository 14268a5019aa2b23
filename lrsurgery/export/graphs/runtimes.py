"""The runtimes that graphs are written for: how each is converted to, and how it runs what was written.

transformers' own exporters convert its models; timm's go through torch.export. All is in fp32, and nothing is
compressed. Heavy packages are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.export.graphs.feed import IMAGE, Feed

LOGITS = "logits"
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One runtime: its key in `--to`, and functions that convert and run."""

    name: str  # as `--to`, the extra of lrsurgery and transformers' exporters call it
    title: str
    packages: tuple[str, ...]  # that converting and the check of the result import
    file: str  # of the graph, in the output folder
    batches: bool  # whether the size of a batch may change; else it is 1
    convert: Callable[[nn.Module, Feed, Path], None]  # a timm model, into a folder
    run: Callable[[Path, Inputs], list[Tensor]]  # the graph in a folder, on inputs by name -> outputs in order
    usage: str  # Python that runs it, for the card; {folder}, {inputs}


def export_transformers(runtime: Runtime, model: nn.Module, feed: Feed, folder: Path) -> None:
    """Convert a model of transformers by its exporter, into a folder; its config is not written."""
    from transformers.exporters.auto import get_exporter_class

    exporter: Any = get_exporter_class(runtime.name)
    inputs: dict[str, Any] = dict(_trace_inputs(runtime, feed))
    if hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False  # a graph of one pass has no use for its keys and values
    settings = exporter.config_class(
        dynamic_shapes=feed.shapes(batch=runtime.batches), prefer_deferred_runtime_asserts_over_guards=True
    )
    exported = exporter().export(model, inputs, settings)
    exported.config = None
    for component in exported.components.values():
        _strip_onnx(component.program)
    exported.save_pretrained(folder)


def _trace_inputs(runtime: Runtime, feed: Feed) -> dict[str, Tensor]:
    return feed.random(2 if runtime.batches else 1, 7, 0)


def _strip_onnx(program: Any) -> None:
    """Drop the stack trace of each operation, which is most of a small file and names folders of this machine."""
    if not hasattr(program, "functions"):  # of another format
        return
    for graph in (program.graph, *program.functions.values()):
        for node in graph.all_nodes():
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
    program.graph.metadata_props.clear()


def _traced(model: nn.Module, feed: Feed, *, batches: bool) -> Any:
    shapes = (feed.shapes(batch=batches)[IMAGE],)
    inputs = (feed.random(2 if batches else 1, 1, 0)[IMAGE],)
    with torch.no_grad():
        return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)


def _timm_to_onnx(model: nn.Module, feed: Feed, folder: Path) -> None:
    import onnx_ir

    program: Any = torch.onnx.export(
        _traced(model, feed, batches=True), dynamo=True, input_names=[IMAGE], output_names=[LOGITS], verbose=False
    )
    _strip_onnx(program.model)
    onnx_ir.save(program.model, str(folder / ONNX.file), external_data=f"{ONNX.file}.data")


def _timm_to_openvino(model: nn.Module, feed: Feed, folder: Path) -> None:
    import openvino

    converted = openvino.convert_model(_traced(model, feed, batches=True))
    converted.inputs[0].tensor.set_names({IMAGE})
    converted.outputs[0].tensor.set_names({LOGITS})
    openvino.save_model(converted, str(folder / OPENVINO.file), compress_to_fp16=False)


def _timm_to_executorch(model: nn.Module, feed: Feed, folder: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    traced = _traced(model, feed, batches=False)
    program = to_edge_transform_and_lower(traced, partitioner=[XnnpackPartitioner()]).to_executorch()
    with (folder / EXECUTORCH.file).open("wb") as file:
        program.write_to_file(file)


def _run_onnx(folder: Path, inputs: Inputs) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / ONNX.file), providers=["CPUExecutionProvider"])
    wanted = {each.name: inputs[each.name].numpy() for each in session.get_inputs()}
    return [torch.from_numpy(array) for array in session.run(None, wanted)]


def _run_openvino(folder: Path, inputs: Inputs) -> list[Tensor]:
    import openvino

    # the default may be bf16, where the processor has it
    core, options = openvino.Core(), {"INFERENCE_PRECISION_HINT": "f32"}
    model = core.compile_model(str(folder / OPENVINO.file), "CPU", options)
    wanted = {port.any_name: inputs[port.any_name].numpy() for port in model.inputs}
    found = model(wanted)
    return [torch.from_numpy(found[port].copy()) for port in model.outputs]


def _run_executorch(folder: Path, inputs: Inputs) -> list[Tensor]:
    from executorch.runtime import Runtime as Interpreter

    method = Interpreter.get().load_program(folder / EXECUTORCH.file).load_method("forward")
    return [output.clone() for output in method.execute(list(inputs.values()))]


ONNX = Runtime(
    name="onnx",
    title="ONNX",
    packages=("onnx", "onnxscript", "onnxruntime"),
    file="model.onnx",
    batches=True,
    convert=_timm_to_onnx,
    run=_run_onnx,
    usage="""\
import onnxruntime

session = onnxruntime.InferenceSession({folder} + "/model.onnx")
outputs = session.run(None, {inputs})""",
)
OPENVINO = Runtime(
    name="openvino",
    title="OpenVINO",
    packages=("openvino",),
    file="openvino_model.xml",
    batches=True,
    convert=_timm_to_openvino,
    run=_run_openvino,
    usage="""\
import openvino

model = openvino.Core().compile_model({folder} + "/openvino_model.xml", "CPU")
outputs = model({inputs})""",
)
EXECUTORCH = Runtime(
    name="executorch",
    title="ExecuTorch",
    packages=("executorch",),
    file="model.pte",
    batches=False,
    convert=_timm_to_executorch,
    run=_run_executorch,
    usage="""\
from executorch.runtime import Runtime

method = Runtime.get().load_program({folder} + "/model.pte").load_method("forward")
outputs = method.execute(list({inputs}.values()))""",
)
