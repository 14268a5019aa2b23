"""`bench`: time, throughput, peak memory and FLOPs of a model, beside another one, and which of its layers got slower.

A speedup is the seconds of the other model (or of a layer's dense form) over the seconds of this one: above 1, this one
is faster. The ideal speedup is the same ratio of FLOPs. bench.json keeps the options in their order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn

from lrsurgery.checkpoints.mapping import notes_of
from lrsurgery.checkpoints.quantised.dense import weight_bytes
from lrsurgery.data.options import LARGEST, TASKS, check_choice
from lrsurgery.errors import OutputError, SurgeryError
from lrsurgery.files.faults import disk_faults
from lrsurgery.files.json import json_text
from lrsurgery.files.locks import locked
from lrsurgery.files.marks import add_to_mark
from lrsurgery.files.writing import replace_file, with_name
from lrsurgery.measure.memory import MemoryRequest, peak_memory
from lrsurgery.measure.workloads import (
    DECODE,
    Contender,
    LayerGroup,
    Setting,
    compile_now,
    count_flops,
    layer_groups,
    make_workload,
    name_failures,
    prepare,
)
from lrsurgery.progress import SILENT, Listener
from lrsurgery.report.bench import (
    BENCH_FILE,
    BENCH_FORMAT,
    Bench,
    BenchCertainty,
    BenchFigures,
    BenchLayer,
    BenchModel,
    BenchRun,
)
from lrsurgery.runtime import MOST_JOBS, check_seed, imported, machine_of, pick_device, pick_dtype, versions
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.layers import count_parameters
from lrsurgery.text import expanded
from lrsurgery.timing import CONFIDENCE, Timings, Workload, compare, percentile

LENGTHS = (128, 512)  # tokens, by default
LAYER_SHARE = 4  # a layer gets this part of a setting's seconds
GPU_CALLS = 50  # of a layer that are timed together; the launch of a single one would be all of its time


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is run, how precisely, and on what machine. Raises SurgeryError for an impossible value."""

    batch: tuple[int, ...] = (1, 8)  # sequences or images
    length: tuple[int, ...] | None = None  # tokens; None: LENGTHS, as far as the model has positions
    new_tokens: int = 32  # decoded one by one
    precision: float = 0.03  # half width of a speedup's interval, relative to it
    seconds: float = 20.0  # at most, for each setting
    layers: bool = False  # each factorised layer too
    device: str = "auto"
    dtype: str = "keep"
    threads: int | None = None  # None: as torch has them
    compile: bool = False
    prepare: bool = False  # weights laid out by `prepare_for_inference_`, of both models
    seed: int = 0
    task: str | None = None
    trust_remote_code: bool = False
    architecture: str | None = None  # timm model name of weight files without a config

    def __post_init__(self) -> None:
        for name, counts in (("batch", self.batch), ("length", self.length)):
            if counts is not None and (not counts or not all(1 <= count <= LARGEST for count in counts)):
                shown = ",".join(str(count)[:20] for count in counts[:9]) or "of nothing"
                raise SurgeryError(f"{name} {shown}: write integers of at least 1, at most {LARGEST:,}")
        if self.threads is not None and not 1 <= self.threads <= MOST_JOBS:
            raise SurgeryError(f"threads {str(self.threads)[:20]}: write an integer from 1 to {MOST_JOBS:,}")
        if not 0 <= self.new_tokens <= LARGEST:
            raise SurgeryError(f"new tokens {str(self.new_tokens)[:20]}: write an integer from 0 to {LARGEST:,}")
        check_seed(self.seed)
        if not 0 < self.precision < 1:
            raise SurgeryError(f"precision {self.precision:g}: write a number between 0 and 1, such as 0.03")
        if not 0 < self.seconds < math.inf:
            raise SurgeryError(f"seconds {self.seconds:g}: write a number above 0")
        if self.task is not None:
            check_choice("task", self.task, TASKS)
        pick_dtype(self.dtype)
        pick_device(self.device)


def bench(
    model: str,
    against: str | None = None,
    options: BenchOptions | None = None,
    *,
    command: str | None = None,
    save: bool = False,
    listener: Listener = SILENT,
) -> Bench:
    """Measure a model, or two in turn, on random input.

    `save` writes the result into the model's folder as bench.json, whole or not at all.

    Raises SurgeryError: which model or option, what is wrong, what to do.
    """
    options = options or BenchOptions()
    folder = _folder_to_save_in(model) if save else None
    if folder is None:
        return _measure(model, against, options, command, listener)
    with disk_faults(folder), locked(folder):
        found = _measure(model, against, options, command, listener)
        add_to_mark(folder, BENCH_FILE)
        replace_file(folder / BENCH_FILE, json_text(found))
    return found


def _measure(model: str, against: str | None, options: BenchOptions, command: str | None, listener: Listener) -> Bench:
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    try:
        return _Measurement(_contenders(model, against, options), options, listener).run(command)
    finally:
        torch.set_num_threads(threads)


def _folder_to_save_in(model: str) -> Path:
    folder = expanded(model)
    if not (folder / "config.json").is_file():
        raise OutputError(f"{model}: --save writes into a model's local folder, and this is none; leave --save out")
    return with_name(folder)


def _contenders(model: str, against: str | None, options: BenchOptions) -> list[Contender]:
    references = [model] if against is None else [model, against]
    how = (options.task, options.trust_remote_code, options.architecture)
    found = [Contender.of(reference, *how) for reference in references]
    if found[-1].task != found[0].task:
        raise SurgeryError(f"{against}: is for {found[-1].task}, {model} for {found[0].task}; name one with --task")
    return found


class _Measurement:
    """One bench: its models, how far it is, and its notes."""

    def __init__(self, contenders: Sequence[Contender], options: BenchOptions, listener: Listener) -> None:
        self.contenders, self.options, self.listener = contenders, options, listener
        self.device, self.dtype = pick_device(options.device), pick_dtype(options.dtype)
        self.references = [contender.source.reference for contender in contenders]
        self.notes: list[str] = []
        self.done = self.total = 0

    def run(self, command: str | None) -> Bench:
        lengths = self._lengths()
        settings = self._settings(lengths)
        distinct = list(dict.fromkeys(self.references))
        self.total = len(distinct) + len(settings)
        # peaks come first, while this process holds no model
        peaks = {reference: self._peak(reference, max(lengths)) for reference in distinct}
        models = [contender.load(self.device, self.dtype) for contender in self.contenders]
        self.notes += prepare(models) if self.options.prepare else []
        trust = self.options.trust_remote_code
        self.notes += [
            f"{contender.source.reference}: {note}"
            for contender in self.contenders
            for note in notes_of(contender.source, trust_remote_code=trust)
        ]
        groups = self._layer_groups(models[0], settings[0]) if self.options.layers else []
        self.total += len(groups)
        runs = [self._run(models, setting) for setting in settings]
        layers = [self._layer(group) for group in groups]
        sizes = [
            BenchModel(
                name=reference,
                parameters=count_parameters(model),
                bytes=weight_bytes(contender.source),
                peak_memory=peaks[reference],
            )
            for reference, contender, model in zip(self.references, self.contenders, models, strict=True)
        ]
        return Bench(
            format_version=BENCH_FORMAT,
            command=command,
            versions=versions(),
            machine=asdict(machine_of(self.device)),
            options=asdict(self.options),
            task=self.contenders[0].task,
            model=sizes[0],
            against=sizes[1] if len(sizes) > 1 else None,
            runs=[run for run in runs if run is not None],
            layers=layers,
            notes=list(dict.fromkeys(self.notes)),
        )

    def _begin(self, name: str) -> None:
        self.listener.progress(name, self.done, self.total)
        self.done += 1

    def _lengths(self) -> list[int]:
        """Tokens of a text; pixels of an image's side."""
        size, other = self.contenders[0].size, self.contenders[-1].size
        asked = self.options.length
        if size:
            if asked is not None:
                raise SurgeryError(f"length: {self.references[0]} takes inputs of its own size; leave --length out")
            if other != size:
                self.notes.append(f"{self.references[-1]} takes inputs of another size, {' x '.join(map(str, other))}")
            return [size[-1]]
        limit, reference = min((c.limit or math.inf, c.source.reference) for c in self.contenders)
        for length in asked or ():
            if length > limit:
                raise SurgeryError(f"length {length}: over the {limit} positions that {reference} has; lower --length")
        if asked is None and limit < max(LENGTHS):
            self.notes.append(f"{reference} has {limit} positions, so no text is longer")
        return list(dict.fromkeys(asked or (int(min(length, limit)) for length in LENGTHS)))

    def _settings(self, lengths: Sequence[int]) -> list[Setting]:
        works = self.contenders[0].works
        found = [Setting(work, batch, n) for batch in self.options.batch for n in lengths for work in works]
        return [s for s in found if s.work != DECODE or (self.options.new_tokens and s.length > 1)]

    def _peak(self, reference: str, length: int) -> int | None:
        """Peak memory in bytes of loading a model and one pass of the largest batch and length."""
        self._begin(f"memory of {reference}")
        request = MemoryRequest(
            reference=reference,
            task=self.contenders[0].task,
            trust_remote_code=self.options.trust_remote_code,
            architecture=self.options.architecture,
            device=self.options.device,
            dtype=self.options.dtype,
            threads=torch.get_num_threads(),
            batch=max(self.options.batch),
            length=length,
            seed=self.options.seed,
            prepare=self.options.prepare,
            imports=tuple(imported),
        )
        peak, note = peak_memory(request)
        self.notes += [note] if note else []
        return peak

    def _run(self, models: Sequence[nn.Module], setting: Setting) -> BenchRun | None:
        """The row of one setting; None where a model cannot do this work."""
        work, batch, length = setting
        self._begin(f"{setting.name} {batch} x {length}")
        workloads, flops, what = [], [], f"{setting.name} of {batch} x {length}"
        if self.options.compile:
            torch._dynamo.reset()  # each setting has shapes of its own
        for reference, contender, model in zip(self.references, self.contenders, models, strict=True):
            x = contender.random_input(model, batch, length, self.options.seed)
            with name_failures(reference, what):
                workload = make_workload(model, x, work, new_tokens=self.options.new_tokens)
                if workload is None:
                    self.notes.append(f"{reference} returns no KV cache, so {setting.name} was left out")
                    return None
                flops.append(count_flops(workload))
            if self.options.compile:
                workload = make_workload(model, x, work, new_tokens=self.options.new_tokens, wrap=torch.compile)
                assert workload is not None
                compile_now(workload, reference)
            workloads.append(workload)
        with name_failures(self.references[0], what):
            found = self._compare(workloads, self.options.seconds)
        figures = [
            BenchFigures(
                flops=flops[i],
                median_ms=1e3 * median(seconds),
                p95_ms=1e3 * percentile(seconds, 0.95),
                throughput=self.contenders[i].units(work, batch, length) / median(seconds),
            )
            for i, seconds in enumerate(found.seconds)
        ]
        both = len(figures) == 2
        return {
            "work": work,
            "batch": batch,
            "length": length,
            "unit": self.contenders[0].unit,
            **figures[0],
            "against": figures[1] if both else None,
            **_certainty(found),
            "ideal": flops[1] / flops[0] if both and flops[0] else None,
        }

    def _compare(self, workloads: Sequence[Workload], seconds: float) -> Timings:
        return compare(workloads, precision=self.options.precision, seconds=seconds, device=self.device)

    def _layer_groups(self, model: nn.Module, setting: Setting) -> list[LayerGroup]:
        """The factorised layers, grouped, of a forward pass of this setting."""
        x = self.contenders[0].random_input(model, setting.batch, setting.length, self.options.seed)
        with name_failures(self.references[0], f"{setting.batch} x {setting.length}"):
            groups = layer_groups(model, x)
        layers = factorised_layers(model).keys()
        left = sorted(layers - {name for group in groups for name in group.names})
        if not layers:
            self.notes.append("--layers: the model has no factorised layers")
        elif left:
            self.notes.append(f"{len(left)} factorised layers, such as {left[0]}, are not called as layers; not timed")
        return groups

    def _layer(self, group: LayerGroup) -> BenchLayer:
        """A layer against its dense form, on random input of the shape that it has in the model."""
        self._begin(group.names[0])
        layer, dense, x = group.layer, group.build_dense(), group.random_input(self.device, self.options.seed)
        if self.options.prepare:
            prepare([dense])
        calls = GPU_CALLS if self.device.type == "cuda" else 1
        workloads = []
        for module in (layer, dense):
            workload = Workload.calls(torch.compile(module) if self.options.compile else module, x, calls)
            if self.options.compile:
                compile_now(workload, group.names[0])
            workloads.append(workload)
        found = self._compare(workloads, self.options.seconds / LAYER_SHARE)
        assert found.interval is not None
        ours, theirs = (1e3 * median(seconds) for seconds in found.seconds)
        return {
            "names": list(group.names),
            "kind": layer.kind,
            "shape": list(layer.weight.shape),
            "rank": layer.rank,
            "input": list(group.shape),
            "dense_ms": theirs,
            "factorised_ms": ours,
            **_certainty(found),
            "slower": found.interval[1] < 1,
        }


def _certainty(found: Timings) -> BenchCertainty:
    return BenchCertainty(
        speedup=found.ratio,
        interval=None if found.interval is None else list(found.interval),
        confidence=CONFIDENCE,
        rounds=found.rounds,
        reached=found.reached,
    )
