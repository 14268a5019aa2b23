"""`bench`: what a model takes in memory and time, beside another one, and which of its layers got slower.

Speedup is always the seconds of the other model (or of a layer's dense form) over the seconds of this one: above 1,
this one is faster. Ideal is the same of floating point operations.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.errors import OutputError, SourceError, SurgeryError
from lrsurgery.factorise.checkpoint import versions
from lrsurgery.factorise.options import DTYPES, pick_device
from lrsurgery.files import replace_file
from lrsurgery.imports import imported
from lrsurgery.measure.memory import Request, peak_memory
from lrsurgery.measure.workloads import BY_TOKEN, Contender, count_flops, explained, make_pass
from lrsurgery.progress import Progress
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.layers import FactorisedLayer, build_dense, dense_weight
from lrsurgery.surgery.speed import processor
from lrsurgery.timing import CONFIDENCE, Timed, Timings, compare, percentile

FORMAT_VERSION = 1
FILE_NAME = "bench.json"
LENGTHS = (128, 512)  # tokens, where none are asked for
LAYER_SHARE = 4  # a layer gets this part of a setting's seconds
GPU_CALLS = 50  # of a layer that are timed together, else the start of each would be all of it


@dataclass(frozen=True)
class BenchOptions:
    """What `bench` can be asked for; the CLI's options of the same names say more."""

    batch: tuple[int, ...] = (1, 8)
    length: tuple[int, ...] | None = None  # tokens; None: LENGTHS, as far as the model has positions
    new_tokens: int = 32
    precision: float = 0.03
    seconds: float = 20.0
    layers: bool = False
    device: str = "auto"
    dtype: str = "keep"
    threads: int | None = None  # None: as torch has them
    compile: bool = False
    seed: int = 0
    task: str | None = None
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raises SurgeryError for a value that no model could make right."""
        for name, counts in (("batch", self.batch), ("length", self.length), ("threads", (self.threads or 1,))):
            if counts is not None and (not counts or min(counts) < 1):
                raise SurgeryError(f"{name} {','.join(map(str, counts)) or 'of nothing'}: write integers of at least 1")
        if self.threads is not None and self.threads < 1:
            raise SurgeryError(f"threads {self.threads}: write an integer of at least 1")
        if self.new_tokens < 0 or self.seed < 0:
            name, value = ("new tokens", self.new_tokens) if self.new_tokens < 0 else ("seed", self.seed)
            raise SurgeryError(f"{name} {value}: write an integer of at least 0")
        if not 0 < self.precision < 1:
            raise SurgeryError(f"precision {self.precision:g}: write a number between 0 and 1, such as 0.03")
        if not 0 < self.seconds < math.inf:
            raise SurgeryError(f"seconds {self.seconds:g}: write a number above 0")
        if self.dtype not in DTYPES:
            raise SurgeryError(f"unknown dtype '{self.dtype}'; known: {', '.join(DTYPES)}")
        pick_device(self.device)


def iter_bench(
    model: str, against: str | None, options: BenchOptions, *, command: str | None = None, save: bool = False
) -> Generator[Progress, None, dict[str, Any]]:
    """Measures a model, or two against each other: a step for each thing measured, then the JSON object.

    With `save` it is also written into the model's folder, whole or not at all.

    Raises SurgeryError: which model or option, what is wrong, what to do.
    """
    options.check()
    folder = _folder_to_save_in(model) if save else None
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    try:
        body = {
            "format_version": FORMAT_VERSION, "command": command, "versions": versions(),
            "machine": machine(pick_device(options.device)), "options": asdict(options),
            **(yield from _measure(model, against, options)),
        }  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    if folder is not None:
        replace_file(folder / FILE_NAME, json.dumps(body, indent=2) + "\n")
    return body


def _measure(model: str, against: str | None, options: BenchOptions) -> Generator[Progress, None, dict[str, Any]]:
    notes: list[str] = []
    pair = [
        Contender.of(reference, options.task, options.trust_remote_code)
        for reference in (model, against)
        if reference is not None
    ]
    if pair[-1].task != pair[0].task:
        raise SurgeryError(f"{against}: is for {pair[-1].task}, {model} for {pair[0].task}; name one with --task")
    lengths = _lengths(pair, options, notes)
    settings = [(work, b, n) for b in options.batch for n in lengths for work in pair[0].works]
    settings = [s for s in settings if s[0] != BY_TOKEN or (options.new_tokens and s[2] > 1)]
    device = pick_device(options.device)
    references = list(dict.fromkeys(contender.source.reference for contender in pair))
    total, done = len(references) + len(settings), 0
    # first, while this process holds no model of its own
    peaks = {}
    for reference in references:
        yield Progress(f"memory of {reference}", done, total)
        asked = (options.device, options.dtype, torch.get_num_threads(), max(options.batch), max(lengths), options.seed)
        request = Request(reference, pair[0].task, options.trust_remote_code, *asked, imports=tuple(imported))
        peaks[reference], note = peak_memory(request)
        notes += [note] if note else []
        done += 1
    models = [contender.load(device, DTYPES[options.dtype]) for contender in pair]
    groups: list[LayerGroup] = []
    if options.layers:
        _, batch, length = settings[0]
        with explained(model, f"{batch} x {length}"):
            groups = _groups(models[0], pair[0].random_input(models[0], batch, length, options.seed), notes)
        total += len(groups)
    runs = []
    for work, batch, length in settings:
        yield Progress(f"{work} {batch} x {length}", done, total)
        runs += _run(pair, models, work, batch, length, options, notes)
        done += 1
    layers = []
    for group in groups:
        yield Progress(group.names[0], done, total)
        layers.append(_layer_row(group, options, device))
        done += 1
    sizes = [
        {
            "name": contender.source.reference,
            "parameters": sum(parameter.numel() for parameter in made.parameters()),
            "bytes": sum(file.stat().st_size for file in contender.source.files) or None,
            "peak_memory": peaks[contender.source.reference],
        }
        for contender, made in zip(pair, models, strict=True)
    ]
    return {
        "task": pair[0].task, "model": sizes[0], "against": sizes[1] if against is not None else None, "runs": runs,
        "layers": layers, "notes": list(dict.fromkeys(notes)),
    }  # fmt: skip


def _lengths(pair: list[Contender], options: BenchOptions, notes: list[str]) -> list[int]:
    """Tokens of a text; pixels of an image's side."""
    if pair[0].size:
        if options.length is not None:
            raise SurgeryError(f"length: {pair[0].source.reference} takes images of its own size; leave --length out")
        if pair[-1].size != pair[0].size:
            notes.append(f"{pair[-1].source.reference} takes images of {pair[-1].size[-1]} pixels")
        return [pair[0].size[-1]]
    limit, reference = min((c.limit or math.inf, c.source.reference) for c in pair)
    for length in options.length or ():
        if length > limit:
            raise SurgeryError(f"length {length}: over the {limit} positions that {reference} has; lower --length")
    if options.length is None and limit < max(LENGTHS):
        notes.append(f"{reference} has {limit} positions, so no text is longer")
    return list(dict.fromkeys(options.length or (int(min(length, limit)) for length in LENGTHS)))


def _run(
    pair: list[Contender], models: list[nn.Module], work: str, batch: int, length: int, options: BenchOptions,
    notes: list[str],
) -> list[dict[str, Any]]:  # fmt: skip
    """The row of one setting; none where a model cannot do this work."""
    passes, flops, what = [], [], f"{work} of {batch} x {length}"
    if options.compile:
        torch._dynamo.reset()  # each setting has shapes of its own
    for contender, model in zip(pair, models, strict=True):
        reference = contender.source.reference
        x = contender.random_input(model, batch, length, options.seed)
        with explained(reference, what):
            timed = make_pass(model, x, work, new_tokens=options.new_tokens)
            if timed is None:
                notes.append(f"{reference} keeps no cache between tokens, so {work} was left out")
                return []
            flops.append(count_flops(timed))
        if options.compile:
            timed = make_pass(model, x, work, new_tokens=options.new_tokens, wrap=torch.compile)
            assert timed is not None
            _compile(timed, reference)
        passes.append(timed)
    with explained(pair[0].source.reference, what):
        found = compare(
            passes, precision=options.precision, seconds=options.seconds, device=pick_device(options.device)
        )
    figures = [
        {
            "flops": flops[i],
            "median_ms": 1e3 * median(seconds),
            "p95_ms": 1e3 * percentile(seconds, 0.95),
            "throughput": pair[i].units(work, batch, length) / median(seconds),
        }
        for i, seconds in enumerate(found.seconds)
    ]
    both = len(pair) == 2
    row = {"work": work, "batch": batch, "length": length, "unit": pair[0].unit, **figures[0]}
    ideal = flops[1] / flops[0] if both and flops[0] else None
    return [{**row, "against": figures[1] if both else None, **_certainty(found), "ideal": ideal}]


def _certainty(found: Timings) -> dict[str, Any]:
    return {
        "speedup": found.ratio, "interval": None if found.interval is None else list(found.interval),
        "confidence": CONFIDENCE, "rounds": found.rounds, "reached": found.reached,
    }  # fmt: skip


def _compile(timed: Timed, reference: str) -> None:
    """Makes the first call, which compiles. Raises SurgeryError; that the model runs as it is, is known by now."""
    try:
        timed.once()
    except Exception as e:
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise SurgeryError(f"{reference}: torch.compile fails: {lines[0][:200]}; leave --compile out") from e


@dataclass(frozen=True)
class LayerGroup:
    """Factorised layers that are timed as one: of the same dense form, rank and input."""

    names: tuple[str, ...]
    layer: FactorisedLayer  # the first of them
    shape: tuple[int, ...]  # of the input


def _groups(model: nn.Module, x: Tensor, notes: list[str]) -> list[LayerGroup]:
    """By what each factorised layer is given in a forward pass on `x`."""
    layers = factorised_layers(model)
    seen: dict[str, tuple[int, ...]] = {}

    def watch(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            seen.setdefault(name, tuple([*args, *options.values()][0].shape))

        return note

    hooks = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not layers:
        notes.append("--layers: the model has no factorised layers")
    elif len(seen) < len(layers):
        left = min(layers.keys() - seen.keys())
        notes.append(
            f"{len(layers) - len(seen)} factorised layers, such as {left}, are not called as layers; not timed"
        )
    groups: dict[Any, list[str]] = {}
    for name, shape in seen.items():
        layer = layers[name]
        key = (layer.kind, str(build_dense(layer)), layer.u.weight.dtype, layer.rank, shape)
        groups.setdefault(key, []).append(name)
    return [LayerGroup(tuple(names), layers[names[0]], seen[names[0]]) for names in groups.values()]


def _layer_row(group: LayerGroup, options: BenchOptions, device: torch.device) -> dict[str, Any]:
    """A layer against its dense form on the input that it has in the model."""
    layer = group.layer
    dense: Any = build_dense(layer)
    dense.weight, dense.bias = nn.Parameter(dense_weight(layer), requires_grad=False), layer.bias
    generator = torch.Generator().manual_seed(options.seed)
    x = torch.randn(group.shape, generator=generator).to(device, dense.weight.dtype)
    calls = GPU_CALLS if device.type == "cuda" else 1
    passes = []
    for module in (layer, dense):
        timed = Timed.calls(torch.compile(module) if options.compile else module, x, calls)
        if options.compile:
            _compile(timed, group.names[0])
        passes.append(timed)
    found = compare(passes, precision=options.precision, seconds=options.seconds / LAYER_SHARE, device=device)
    assert found.interval is not None
    ours, whole = (1e3 * median(seconds) for seconds in found.seconds)
    return {
        "names": list(group.names), "kind": layer.kind, "shape": list(dense.weight.shape), "rank": layer.rank,
        "input": list(group.shape), "dense_ms": whole, "factorised_ms": ours, **_certainty(found),
        "slower": found.interval[1] < 1,
    }  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    """What decides the times, without a name that tells whose machine it is."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _folder_to_save_in(model: str) -> Path:
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise OutputError(f"{model}: --save writes into a model's local folder, and this is none; leave --save out")
    return folder


def read_bench(folder: Path) -> dict[str, Any] | None:
    """What `bench --save` wrote into a model's folder; None where it did not.

    Raises SourceError where the file is damaged or newer than this.
    """
    file = folder / FILE_NAME
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        if body["format_version"] > FORMAT_VERSION:
            raise SourceError(f"{file}: bench format {body['format_version']} is newer than this lrsurgery reads")
        for name, kind in (("machine", dict), ("model", dict), ("runs", list), ("layers", list)):
            if not isinstance(body[name], kind):
                raise TypeError(name)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise SourceError(f"{file}: not what bench --save writes ({e!r}); run bench --save again") from e
    return body  # type: ignore[no-any-return]
