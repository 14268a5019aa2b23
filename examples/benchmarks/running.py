"""How much faster, and in how much less memory, a factorised model trains and runs.

GPT-2-small-shaped (124 M) and ViT-base-shaped (86 M) models with random weights, at `params:0.5` and `params:0.25`
in both forms against dense, in turn within one process. Both forms have the same number of parameters, so the pivoted
one has the higher ranks; "of balanced" is its speed over that of the balanced form. The ideal speedup is the ratio of
operations that torch counts in both, so attention, embeddings and the head, which stay as they are, are in it. What has
no such operations (activations, norms, softmax) takes its time in both, so the replaced layers are timed by themselves
too, and "profile" says what takes the time of each model. "Prepared" is after `prepare_for_inference_`, of the dense
model too. Peak memory is that of a training step, each model in a process of its own: model, gradients, AdamW's moments
and activations, without what imports take.

On a CPU in fp32: 1 and 8 sequences of 256 tokens (images for ViT), and one sequence token by token with a cache. On a
GPU in bf16: batches of 1 to 256. "compiled" is inference through torch.compile.

    python examples/benchmarks/running.py [--models gpt2 vit] [--work layers inference ...] [--save]
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import harness
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lrsurgery

RANKS = ("dense", "params:0.5", "params:0.5 pivoted", "params:0.25", "params:0.25 pivoted")
TOKENS, NEW_TOKENS, TRAINED = 256, 32, 8  # of a sequence; generated; sequences or images of a training step
WORK = ("layers", "inference", "compiled", "generation", "training", "profile", "memory")
PARTS = {  # of a profile, by the operations of torch that do the work
    "products": ("aten::addmm", "aten::mm"),
    "reordering": ("aten::gather", "aten::scatter_", "aten::cat", "aten::index_select"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "activations": ("aten::gelu", "aten::tanh", "aten::pow", "aten::mul"),
    "norms": ("aten::native_layer_norm",),
    "additions": ("aten::add", "aten::add_"),
}


def build(model: Any, rank: str, device: str) -> Any:
    """A model of random weights, because only shapes decide speed; `model` is a name or a language model's config."""
    torch.manual_seed(0)
    with torch.device(device):  # a GPU draws the weights of a large model much faster
        if model == "vit":
            import timm

            made: Any = timm.create_model("vit_base_patch16_224")
        else:
            from transformers import AutoModelForCausalLM, GPT2Config

            # surgery writes into the config
            made = AutoModelForCausalLM.from_config(GPT2Config() if model == "gpt2" else deepcopy(model))
    if rank != "dense":
        spec, _, form = rank.partition(" ")
        lrsurgery.factorise_(made, rank=spec, init="he", form=form or "balanced")
    return made.to(device)


def batch(model: str, count: int, device: str, dtype: torch.dtype) -> Tensor:
    if model == "gpt2":
        return torch.randint(0, 50257, (count, TOKENS), device=device)
    return torch.randn(count, 3, 224, 224, device=device, dtype=dtype)


@torch.inference_mode()
def infer(model: Callable[[Tensor], Any], x: Tensor) -> None:
    model(x)


@torch.inference_mode()
def apply(layers: list[nn.Module], inputs: dict[int, Tensor]) -> None:
    """Each layer once, on the input of its width."""
    for layer in layers:
        layer(inputs[getattr(layer, "nx", None) or layer.in_features])  # type: ignore[index]


@torch.inference_mode()
def generate(model: Any, x: Tensor) -> None:
    """Greedy, one token at a time with a cache, begun with one token."""
    from transformers import DynamicCache

    cache, token = DynamicCache(config=model.config), x[:1, :1]
    for _ in range(NEW_TOKENS):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)


def training_step(model: nn.Module, x: Tensor, bf16: bool, *, frobenius: float = 0.0) -> Callable[[], None]:
    """Forward, backward and AdamW's step of `model` on the batch, with Frobenius decay of this strength, if any."""
    decay = 0.0 if frobenius else 0.01
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=decay, fused=True)
    if frobenius:
        lrsurgery.FrobeniusDecay(model, frobenius).attach(optimizer)
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            if x.is_floating_point():
                loss = nn.functional.cross_entropy(model(x), labels)
            else:
                loss = model(x, labels=x, use_cache=False).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def operations(run: Callable[[], Any]) -> int:
    """Floating point operations of the matrix products and convolutions in `run`."""
    # fused attention has no count on every device; its plain form is made of counted products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return int(counter.get_total_flops())


def cases(model: str, work: str, device: str) -> Iterator[tuple[str, dict[str, Callable[[], Any]]]]:
    """(name, what each model does), for every batch size and way of running."""
    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    models = {rank: build(model, rank, device) for rank in RANKS}
    if work == "training":
        x = batch(model, TRAINED, device, torch.float32)
        yield f"training, {TRAINED}", {r: training_step(m.train(), x, on_gpu) for r, m in models.items()}
        return
    for m in models.values():
        m.to(dtype).eval()
    if work == "generation":
        x = batch(model, 1, device, dtype)
        runs: dict[str, Callable[[], Any]] = {r: functools.partial(generate, m, x) for r, m in models.items()}
        yield "token by token", runs
        prepare(models)
        yield "token by token, prepared", runs
        return
    counts = (1, 8, 64, 256) if on_gpu else (1, 8)
    if work == "layers":
        for count in counts:
            factorised = lrsurgery.factorised_layers(models[RANKS[1]])
            names = [n for n, m in factorised.items() if isinstance(m, lrsurgery.layers.FactorisedLinear)]
            positions = TOKENS if model == "gpt2" else 197
            inputs = {
                width: torch.randn(count, positions, width, device=device, dtype=dtype) for width in (768, 4 * 768)
            }
            yield (
                f"its layers alone, {count}",
                {r: functools.partial(apply, [m.get_submodule(n) for n in names], inputs) for r, m in models.items()},
            )
        return
    calls = {rank: as_used(model, made) for rank, made in models.items()}
    for how in ("", ", prepared") if work == "inference" else (", compiled",):
        if how == ", prepared":
            prepare(models)
        for count in counts:
            x = batch(model, count, device, dtype)
            made = {r: torch.compile(m) if how == ", compiled" else m for r, m in calls.items()}
            yield f"inference, {count}{how}", {r: functools.partial(infer, m, x) for r, m in made.items()}
            torch._dynamo.reset()


def as_used(model: str, made: nn.Module) -> Callable[[Tensor], Any]:
    """Of GPT-2, what follows the last token: the usual use, and the logits of 256 sequences would fill any GPU."""
    return functools.partial(made, logits_to_keep=1) if model == "gpt2" else made


def prepare(models: Mapping[str, nn.Module]) -> None:
    for made in models.values():
        lrsurgery.prepare_for_inference_(made)


def profile(model: str, device: str, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of each part of an inference of one sequence or image, prepared, and the speedup that is left.

    "bound" is the speedup over dense if the products took their share of operations, and all else what it takes in the
    dense model: the ideal of a model in which only products became cheaper.
    """
    x, runs = batch(model, 1, device, torch.float32), {}
    for rank in RANKS:
        made = build(model, rank, device).eval()
        lrsurgery.prepare_for_inference_(made)
        runs[rank] = functools.partial(infer, as_used(model, made), x)
        runs[rank]()
    rounds = [{rank: _parts(run) for rank, run in runs.items()} for _ in range(repeats)]
    found = {
        rank: ({part: 1e3 * median(each[rank][part] for each in rounds) for part in rounds[0][rank]}, operations(run))
        for rank, run in runs.items()
    }
    dense, counted = found["dense"]
    whole = sum(dense.values())
    rows = []
    for rank, (parts, operated) in found.items():
        left = dense["products"] * operated / counted
        bound = whole / (whole - dense["products"] + left)
        speed = whole / sum(parts.values())
        rows.append(
            {
                "model": model,
                "rank": rank,
                **{f"{part}, ms": seconds for part, seconds in parts.items()},
                "speedup": speed,
                "ideal": counted / operated,
                "bound": bound,
                "speedup / ideal": speed * operated / counted,
                "speedup / bound": speed / bound,
            }
        )
    return rows


def _parts(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the operations of each part in one run, and of all others."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        run()
    part_of = {name: part for part, names in PARTS.items() for name in names}
    seconds = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for event in seen.key_averages():
        seconds[part_of.get(event.key, "the rest")] += event.self_cpu_time_total / 1e6
    return seconds


def speedup(seconds: Mapping[str, Sequence[float]], counted: Mapping[str, int], rank: str) -> dict[str, float]:
    """Speedup of a rank over dense, round by round, beside the ideal one: the ratio of the counted operations."""
    found = harness.ratio(seconds["dense"], seconds[rank])
    ideal = counted["dense"] / counted[rank]
    return {
        "speedup": found["median"],
        "min": found["min"],
        "max": found["max"],
        # on a machine with other work, the fastest round of each was disturbed least
        "of the fastest": min(seconds["dense"]) / min(seconds[rank]),
        "ideal": ideal,
        "achieved / ideal": found["median"] / ideal,
    }


def throughput(model: str, work: str, device: str, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name, runs in cases(model, work, device):
        seconds = harness.in_turn(runs, repeats, warm_up=2 if device == "cuda" else 1)
        # a compiled graph hides its operations: they are those of the plain case before it
        if not name.endswith("compiled"):
            counted = {rank: operations(run) for rank, run in runs.items()}
        for rank in RANKS[1:]:
            spec, _, form = rank.partition(" ")
            gained = speedup(seconds, counted, rank)
            rows.append(
                {
                    "model": model,
                    "work": name,
                    "rank": rank,
                    "of balanced": harness.ratio(seconds[spec], seconds[rank])["median"] if form else None,
                    "dense, ms": 1e3 * median(seconds["dense"]),
                    "factorised, ms": 1e3 * median(seconds[rank]),
                    **gained,
                    "fastest / ideal": gained["of the fastest"] / gained["ideal"],
                }
            )
    return rows


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def training_peak(model: str, rank: str) -> dict[str, float]:
    """Parameters, and peak bytes of two training steps; to be run in a process of its own."""
    if torch.cuda.is_available():
        made = build(model, rank, "cuda").train()
        step = training_step(made, batch(model, TRAINED, "cuda", torch.float32), True)
        torch.cuda.reset_peak_memory_stats()
        step(), step()
        peak = float(torch.cuda.max_memory_allocated())
    else:
        import timm  # noqa: F401  # both belong to the imports that are subtracted
        import transformers.models.gpt2.modeling_gpt2  # noqa: F401

        torch.mm(torch.randn(64, 64), torch.randn(64, 64))  # the threads and their buffers too
        before = resident("VmRSS")
        made = build(model, rank, "cpu").train()
        step = training_step(made, batch(model, TRAINED, "cpu", torch.float32), False)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins anew: set-up is not counted
        step(), step()
        peak = float(resident("VmHWM") - before)
    return {"parameters": float(sum(p.numel() for p in made.parameters())), "peak_bytes": peak}


def memory(model: str) -> list[dict[str, Any]]:
    found = {}
    for rank in RANKS:
        command = [sys.executable, __file__, "--peak", model, rank]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[rank] = json.loads(done.stdout)
    dense = found["dense"]
    return [
        {
            "model": model,
            "rank": rank,
            "parameters, M": body["parameters"] / 1e6,
            "share": body["parameters"] / dense["parameters"],
            "peak of training, MB": body["peak_bytes"] / 1e6,
            "of dense": body["peak_bytes"] / dense["peak_bytes"],
        }
        for rank, body in found.items()
    ]


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--models", nargs="+", default=["gpt2", "vit"], choices=["gpt2", "vit"])
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=WORK)
    parser.add_argument("--name", default="running", help="name of the file of results")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "RANK"), help="used by itself, for one process of each")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # past_key_values has a new name in the newest version
    if given.peak:
        print(json.dumps(training_peak(*given.peak)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    peaks: list[dict[str, Any]] = []
    profiles: list[dict[str, Any]] = []
    for model in given.models:
        for work in given.work:
            if work == "memory":
                peaks += memory(model)
            elif work == "profile":
                profiles += profile(model, device, given.repeats)
            elif (model, work) != ("vit", "generation"):
                rows += throughput(model, work, device, given.repeats)
    if rows:
        harness.finish(given.name, rows, given)
    if profiles:
        harness.finish("running_profile", profiles, given)
    if peaks:
        harness.finish("training_memory", peaks, given)


if __name__ == "__main__":
    main()
