"""Factorised copies of one model at any budget, in memory, and what is measured of them.

Statistics and singular values are taken once. A copy computes what the folder would that `factorise` writes with the
same budget: its factors are rounded to the dtype that they are stored in.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from lrsurgery.calibration.allocate import Weights, allocate_ranks
from lrsurgery.calibration.statistics import Statistics
from lrsurgery.checkpoints.mapping import Checkpoint, Entry, list_entries, notes_of
from lrsurgery.checkpoints.source import Source
from lrsurgery.data.batches import Examples
from lrsurgery.data.datasets import EVAL_SPLITS
from lrsurgery.data.examples import evaluation_examples, open_rows, prepare_subject
from lrsurgery.data.options import DataOptions
from lrsurgery.data.tasks import Subject, task_of
from lrsurgery.errors import BudgetError, CalibrationError, DataError, SurgeryError
from lrsurgery.factorise.decide import calibrate_plan, open_plan, weights_of
from lrsurgery.factorise.opening import match_names
from lrsurgery.factorise.options import FactoriseOptions, choose_calibration
from lrsurgery.measure.bench import LENGTHS
from lrsurgery.measure.targets.goals import EvalData
from lrsurgery.measure.targets.heal import Healing
from lrsurgery.measure.workloads import Contender, Setting, make_workload, name_failures
from lrsurgery.modules import References, Unfilled
from lrsurgery.progress import SILENT, Listener
from lrsurgery.report.rows import plan_report
from lrsurgery.report.targets.schema import Point
from lrsurgery.runtime import Compute
from lrsurgery.surgery.apply import decompose, decomposition_bytes, factorised_layers
from lrsurgery.surgery.budget import APART, parse_budget
from lrsurgery.surgery.forms.fill import fill_
from lrsurgery.surgery.kinds.folds import plain_of, weight_of
from lrsurgery.surgery.layers import Stored, factor_weights
from lrsurgery.surgery.parameters.views import dense_layers, replace_layer_
from lrsurgery.surgery.plan import Plan
from lrsurgery.surgery.rows import Replacement
from lrsurgery.surgery.tables.ties import make_partner, tie_
from lrsurgery.timing import Timings, compare
from lrsurgery.training.loop.trainer import quality
from lrsurgery.training.recipe import Recipe

BATCH = 8  # examples that are measured at once, as `evaluate` has it; figures do not depend on it


@dataclass(frozen=True)
class Timing:
    """How precisely a speedup is measured: relative half width of its interval, and seconds at most."""

    precision: float
    seconds: float


@dataclass
class Trials:
    """A dense model that is about to be factorised at several budgets, with its data and statistics."""

    source: Source
    options: FactoriseOptions
    checkpoint: Checkpoint
    plan: Plan
    entries: list[Entry]
    data: EvalData | None
    healing: Healing | None = None
    note: str | None = None  # on how budgets are calibrated
    statistics: Statistics | None = None
    _values: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # singular values by layer and kind

    @staticmethod
    def open(
        reference: str, options: FactoriseOptions, data: EvalData | None, healing: Healing | None = None
    ) -> Trials:
        """Open a checkpoint without reading its weights. Raises SurgeryError, also for options that fit no trial."""
        if options.source.from_scratch_seed is not None:
            raise SurgeryError("--from-scratch leaves no pretrained weights to measure; remove it, or take --budget")
        if options.refinement is not None:
            raise CalibrationError(
                "--refine takes too long for each size that a target tries; leave it out, and run lrsurgery refine on"
                " the output"
            )
        source = options.source.resolve(reference)
        if source.is_factorised:
            raise SurgeryError(f"{reference}: is factorised already; targets and curves are for a dense model")
        options, note = choose_calibration(source, options)
        # a copy decomposes each layer alone, and what is written has to be what was measured
        options = replace(options, surgery=replace(options.surgery, share=APART))
        checkpoint, plan = open_plan(source, options)
        entries = list_entries(checkpoint, {row.name for row in plan.replacements})
        return Trials(source, options, checkpoint, plan, entries, data, healing, note)

    def collect(self, folder: Path, owner: str, listener: Listener = SILENT) -> None:
        """Collect the statistics of calibration into a folder, or read those that a job of this owner left there."""
        self.statistics = calibrate_plan(self.source, self.plan, self.options, folder, owner, listener)

    # the dense model and its data

    @property
    def how(self) -> DataOptions:
        """How data is read: as that which is measured on, else as that of calibration."""
        calibration = self.options.calibration
        return self.data.how if self.data is not None else DataOptions() if calibration is None else calibration.how

    @cached_property
    def _measured(self) -> tuple[Subject, Examples | None]:
        trust = self.options.source.trust_remote_code
        task = self.how.task or task_of(self.source)
        rows = None
        if self.data is not None:
            rows = open_rows(self.data.data, task, self.how, split=self.data.split, prefer=EVAL_SPLITS)
        subject = prepare_subject(self.source, self.how, rows, trust_remote_code=trust)
        examples = None
        if rows is not None:
            examples = evaluation_examples(subject, rows, self.how, trust_remote_code=trust)
        return subject, examples

    @property
    def subject(self) -> Subject:
        """The dense model, in fp32."""
        return self._measured[0]

    @cached_property
    def names(self) -> dict[str, str]:
        """Layer of the plan -> its name in the model that runs."""
        return match_names(self.subject, self.plan.replacements)

    def notes(self) -> list[str]:
        """How model and data are read."""
        subject, examples = self._measured
        read = notes_of(self.source, trust_remote_code=self.options.source.trust_remote_code)
        return [*read, *subject.notes, *(examples.notes if examples is not None else ())]

    def dense(self, listener: Listener = SILENT) -> dict[str, float]:
        """Measure the dense model, as `evaluate` does; no figures without data."""
        if self.data is None:
            return {}  # without loading it
        figures = self._figures(self.subject.model, listener)
        if "loss" not in figures:
            raise DataError(f"{self.data.data}: the dense model's loss on it is not finite, or nothing is scored")
        return figures

    def dense_point(self, figures: dict[str, float]) -> Point:
        """The point of the dense model itself."""
        size = self._weights.stored_bytes
        count = self.checkpoint.parameters
        return Point(budget=None, layers=0, parameters=count, share=1.0, bytes=size, values=figures)

    def _figures(self, model: nn.Module, listener: Listener) -> dict[str, float]:
        subject, examples = self._measured
        if examples is None:
            return {}
        recipe = Recipe(batch_size=BATCH, device=str(self.options.compute.device), precision="fp32")
        found = quality(replace(subject, model=model), recipe, examples, listener)
        return {name: value for name, value in found.items() if abs(value) < float("inf")}  # nor NaN

    # factorised copies

    @cached_property
    def _weights(self) -> Weights:
        return weights_of(self.checkpoint, self.entries, self.options)

    def plan_for(self, budget: str) -> Plan | None:
        """The plan of a budget; None for one below the smallest that can be met. Raises SurgeryError for any other."""
        target = parse_budget(budget, multiple_of=self.plan.target.multiple_of)
        asked = replace(self.plan, target=target)
        try:
            plan = allocate_ranks(asked, self._weights, self.options.compute, self.statistics, known=self._values)
        except BudgetError as e:
            if "out of reach" in str(e):
                return None
            raise
        return plan

    def build(self, plan: Plan) -> nn.Module:
        """A factorised copy of the dense model; it shares what stays dense, unless it is to be trained."""
        dense = self.subject.model
        shared = (
            {} if self.healing is not None else {id(each): each for each in [*dense.parameters(), *dense.buffers()]}
        )
        model: nn.Module = copy.deepcopy(dense, shared)
        modules, references = dense_layers(model), References(model)
        dtypes = {entry.target: entry.dtype for entry in self.entries}
        output, surgery = self.options.output, self.options.surgery

        def stored_dtype(key: str) -> torch.dtype:
            return output.stored(dtypes.get(key, torch.float32))

        def factors_of(row: Replacement) -> Stored:
            weight = weight_of(modules[self.names[row.name]])
            metric = self.statistics.metric_of(row) if self.statistics is not None else None
            found = decompose(
                row,
                weight.to(self.options.compute.device),
                init=surgery.init,
                seed=surgery.seed,
                metric=metric,
                svd=surgery.svd,
            )
            like = torch.empty(weight.shape, dtype=stored_dtype(row.layout.weight_key(row.name)), device="meta")
            return factor_weights(row.layout, like, found.factors, row.pivots)

        leaders: dict[str, str] = {}
        rows = plan.replacements
        needs = [decomposition_bytes(row, 4, weighted=self.statistics is not None) for row in rows]
        compute: Compute = self.options.compute
        for row, stored in zip(rows, compute.in_order(factors_of, rows, needs), strict=True):
            assert row.rank is not None
            held = modules[self.names[row.name]]
            layer = plain_of(held)
            with Unfilled():
                new = row.layout.make(layer, row.rank, row.pivots)
            device = next(held.parameters()).device
            factors = Stored(*(None if part is None else part.to(device) for part in stored))  # type: ignore[arg-type]
            own = getattr(layer, "bias", None)
            bias = None if own is None else own.detach().to(stored_dtype(f"{row.name}.bias"))
            fill_(new, factors, bias, layer.weight.requires_grad)
            replace_layer_(model, references, held, new.float())
            for name, kind in row.tied:
                partner = make_partner(modules[self.names[name]], kind, row.rank, row.pivots)
                references.replace_(modules[self.names[name]], partner)
                leaders[self.names[name]] = self.names[row.name]
        if output.dtype is not None:
            self._round_(model, output.dtype)
        tie_(factorised_layers(model), leaders)  # after the rounding, which makes new tensors
        return model.eval()

    def _round_(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Round what is written to the dtype that is asked for; new tensors, since the dense model keeps its own."""
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                rounded = parameter.detach().to(dtype).float()
                setattr(module, name, nn.Parameter(rounded, requires_grad=parameter.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                    setattr(module, name, buffer.to(dtype).float())

    # points

    def measure(self, budget: str, plan: Plan, timing: Timing | None = None, listener: Listener = SILENT) -> Point:
        """Measure a copy at a budget: figures of `evaluate` where there is data, a speedup with `timing`."""
        model = self.build(plan)
        point = self._describe(budget, plan)
        point["values"] = self._figures(model, listener)
        if timing is not None:
            found = self.time(model, timing)
            point |= {"speedup": found.ratio, "interval": list(found.interval or ())}
        if self.healing is not None:
            point["unhealed"] = point["values"]
            self.heal_(model)
            point["values"] = self._figures(model, listener)
        return point

    def heal_(self, model: nn.Module) -> None:
        """Train a copy as asked for."""
        assert self.healing is not None
        stored = self.options.output.dtype or self.subject.stored
        subject = replace(self.subject, model=model, stored=stored)
        self.healing.apply_(subject, trust_remote_code=self.options.source.trust_remote_code)

    def _describe(self, budget: str, plan: Plan) -> Point:
        """The point of a budget, before anything is measured."""
        report = plan_report(plan, self.checkpoint.parameters)
        size = self._weights.stored_bytes
        for row in plan.replacements:
            width = self._weights.stored_widths[row.name]
            size -= width * (row.parameters - (row.factorised_parameters or 0))
            size += {None: 0, "rows": 4 * row.rows, "columns": 4 * row.columns}[row.pivots]  # the order
        after = report.parameters_after or 0
        share = after / self.checkpoint.parameters
        return Point(budget=budget, layers=len(plan.replacements), parameters=after, share=share, bytes=size, values={})

    # time

    @cached_property
    def _contender(self) -> Contender:
        trust, architecture = self.options.source.trust_remote_code, self.options.source.architecture
        return Contender.of(self.source.reference, self.how.task, trust, architecture)

    @property
    def setting(self) -> Setting:
        """What is timed: the first setting of `bench`."""
        contender = self._contender
        length = contender.size[-1] if contender.size else int(min(LENGTHS[0], contender.limit or LENGTHS[0]))
        return Setting(contender.works[0], 1, length)

    @property
    def takes_images(self) -> bool:
        """Whether the timed input is an image, of the model's own size."""
        return bool(self._contender.size)

    def setting_text(self) -> str:
        """The setting in words."""
        work, batch, length = self.setting
        return f"{work} of {batch} x {length} on {self.options.compute.device}"

    @cached_property
    def _timed_dense(self) -> nn.Module:
        return self._as_timed(self.subject.body)

    def _as_timed(self, model: nn.Module) -> nn.Module:
        """A copy in the dtype that it is stored in, on the device."""
        timed = copy.deepcopy(model).requires_grad_(False)
        return timed.to(self.options.compute.device, self.options.output.stored(self.subject.stored)).eval()

    def time(self, model: nn.Module, timing: Timing) -> Timings:
        """Time a copy in turn with the dense model, as `bench` does."""
        body = replace(self.subject, model=model).body
        workloads = []
        with name_failures(self.source.reference, self.setting_text()):
            for each in (self._as_timed(body), self._timed_dense):
                x = self._contender.random_input(each, self.setting.batch, self.setting.length, 0)
                workload = make_workload(each, x, self.setting.work)
                assert workload is not None
                workloads.append(workload)
            device = self.options.compute.device
            return compare(workloads, precision=timing.precision, seconds=timing.seconds, device=device)
