"""`factorise` with a target: find the budget, write the model as with that budget, and measure what was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lrsurgery.checkpoints.output import ShardWriter, check_output
from lrsurgery.data.datasets import digest_of
from lrsurgery.errors import OutputError, SurgeryError
from lrsurgery.factorise.checkpoint import run_factorise
from lrsurgery.factorise.decide import describe_job
from lrsurgery.factorise.options import FactoriseOptions, choose_calibration
from lrsurgery.factorise.work.folder import POINTS, WorkFolder, keep_work
from lrsurgery.files.json import json_text, read_as
from lrsurgery.files.locks import locked
from lrsurgery.files.writing import replace_file, with_name
from lrsurgery.measure.bench import BenchOptions, bench
from lrsurgery.measure.evaluate import evaluate
from lrsurgery.measure.targets.goals import SPEEDUP, EvalData, Figures, Goal, SizeLimit, check_measured
from lrsurgery.measure.targets.heal import Healing
from lrsurgery.measure.targets.search import STEPS, Search, budget_at, check_dense, lowest_place, title_of
from lrsurgery.measure.targets.trials import BATCH, Timing, Trials
from lrsurgery.progress import SILENT, Listener
from lrsurgery.report.card import public_name
from lrsurgery.report.schema import Report
from lrsurgery.report.targets.schema import Choice, Point
from lrsurgery.runtime import Processes
from lrsurgery.surgery.budget import Budget, parse_budget
from lrsurgery.units import size_text

QUICK = Timing(precision=0.03, seconds=5.0)  # of a point on the way; the written model is timed as bench does


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks of the model, and the data that tells."""

    goal: Goal | SizeLimit
    data: EvalData | None = None
    test: EvalData | None = None
    healing: Healing | None = None

    def __post_init__(self) -> None:
        check_measured(self.goal, self.data)
        if self.test is not None and self.data is None:
            raise SurgeryError("--test-data measures afresh what --eval-data chose; add --eval-data DATA")
        if self.healing is not None and self.data is None:
            raise SurgeryError("--heal needs data to measure the healed models on; add --eval-data DATA")
        if self.healing is not None and (isinstance(self.goal, SizeLimit) or self.goal.option == SPEEDUP):
            raise SurgeryError(f"--heal changes neither size nor speed, so {self.goal} does not go by it; leave it out")


class _MissedError(SurgeryError):
    """The written model misses the goal that its copy in memory met."""


def factorise_to_goal(
    reference: str,
    output: Path,
    options: FactoriseOptions,
    request: Request,
    *,
    processes: Processes | None = None,
    listener: Listener = SILENT,
) -> Report:
    """Write the model that meets a goal, as `run_factorise` writes it with the budget found.

    `options` has any budget. Raises SurgeryError as `run_factorise` does, and with the nearest figure measured for a
    goal that no budget meets; Interrupted once statistics or points are kept, which `resume` goes on with.
    """
    if processes is not None and processes.size > 1:
        raise SurgeryError(f"{request.goal}: is measured in one process; leave torchrun out, or take --budget")
    output = with_name(output)
    # the job that looks for the budget has a folder of its own, since that of the output depends on the budget
    place = output.with_name(f"{output.name}.choice")
    with locked(place):
        return _Job(reference, output, options, request, WorkFolder(place), listener).run()


class _Job:
    """One search, from its data to the output."""

    def __init__(
        self,
        reference: str,
        output: Path,
        options: FactoriseOptions,
        request: Request,
        work: WorkFolder,
        listener: Listener,
    ) -> None:
        self.reference, self.output, self.request = reference, output, request
        self.work, self.listener = work, listener
        self.goal, self.data = request.goal, request.data
        self.trials = Trials.open(reference, options, request.data, request.healing)
        self.options = self.trials.options  # with the calibration that was chosen
        self.points: dict[str, Point] = {}
        self.dense: dict[str, float] = {}

    def run(self) -> Report:
        output, options = self.output, self.options.output
        finished = options.resume and WorkFolder(output).is_published()
        check_output(output, self.trials.source, options.overwrite or finished)
        with keep_work(self.work, output, len(self.trials.plan.replacements)):
            self.work.open(self._describe(), resume=options.resume)
            self._warn()
            self._measure_dense()
            if self.trials.note is not None and choose_calibration(self.trials.source, self.options)[1] is None:
                self.listener.note(self.trials.note)  # else `run_factorise` says it
            return self._write()

    def _describe(self) -> dict[str, object]:
        """Everything that the points depend on."""
        job = describe_job(self.trials.source, self.options, 1)
        how = [None if data is None else [data.split, vars(data.how)] for data in (self.data,)]
        heal = None if self.request.healing is None else self.request.healing.settings
        return {**job, "target": str(self.goal), "data to measure on": [self._digest(self.data), *how], "healing": heal}

    @staticmethod
    def _digest(data: EvalData | None) -> str | None:
        return None if data is None else digest_of(data.data, data.split, data.how.subset)

    def _warn(self) -> None:
        """Name data that is used twice."""
        calibration, own = self.options.calibration, self._digest(self.data)
        trained = None
        if calibration is not None and calibration.data is not None:
            trained = digest_of(calibration.data, calibration.split, calibration.how.subset)
        if self.data is not None and own == trained:
            self.listener.note(
                f"{self.data.data}: both --calibration and --eval-data, so the figures are better than on other data"
            )
        if self.request.test is not None and self._digest(self.request.test) in (own, trained):
            self.listener.note(
                f"{self.request.test.data}: has been used already, so --test-data measures nothing afresh"
            )

    def _measure_dense(self) -> None:
        """The dense model's figures, and the goal held against them, before anything that takes long."""
        self.points = self._read_points()
        if "dense" in self.points:
            self.dense = self.points["dense"]["values"]
        else:
            for note in self.trials.notes() if self.data is not None else ():
                self.listener.note(note)
            self.dense = self.trials.dense(self.listener)
            self._keep("dense", self.trials.dense_point(self.dense))
        if self.dense:
            self.listener.evaluated("dense", 0, 0, self.dense)
        if isinstance(self.goal, Goal):
            check_dense(self.goal, self.dense)

    def _read_points(self) -> dict[str, Point]:
        file = self.work.path / POINTS
        return read_as(dict[str, Point], file, "points of a job", OutputError) if file.exists() else {}

    def _keep(self, name: str, point: Point) -> None:
        self.points[name] = point
        replace_file(self.work.path / POINTS, json_text(self.points))

    # the search

    def _write(self) -> Report:
        """Write the best model that was found; if the written one misses the goal by rounding, the next best."""
        calibration = self.options.calibration
        if isinstance(self.goal, SizeLimit):
            return self._factorise(self._size_budget(self.goal), None)
        self.trials.collect(self.work.path / "statistics", self.work.job, self.listener)
        if calibration is not None and calibration.statistics is None:
            calibration = replace(calibration, own_statistics=self.work.path / "statistics")
            self.options = replace(self.options, calibration=calibration)
        found = self._search(self.goal)
        for point in found[:-1]:
            try:
                return self._factorise(str(point["budget"]), point)
            except _MissedError as e:
                self.listener.note(f"{e}; the next best is written")
        return self._factorise(str(found[-1]["budget"]), found[-1])

    def _search(self, goal: Goal) -> list[Point]:
        timed = goal.option == SPEEDUP
        # every layer dense, which this budget allows, is no model of its own
        self.trials.plan_for(budget_at(STEPS, timed=timed))
        lowest = lowest_place(lambda place: self.trials.plan_for(budget_at(place, timed=timed)) is not None)
        total = 1 + max(1, STEPS - lowest).bit_length()  # about
        done = 0

        def measure(place: int) -> Point | None:
            nonlocal done
            done += 1
            budget = budget_at(place, timed=timed)
            self.listener.progress(f"budget {budget}", done - 1, max(total, done))
            if budget not in self.points:
                plan = self.trials.plan_for(budget)
                assert plan is not None, budget
                if not plan.replacements:
                    return None
                timing = QUICK if goal.option == SPEEDUP else None
                self._keep(budget, self.trials.measure(budget, plan, timing, self.listener))
            point = self.points[budget]
            self.listener.evaluated(title_of(point), done, max(total, done), point["values"])
            return point

        return Search(goal, self.dense, measure, lowest).run()

    def _size_budget(self, limit: SizeLimit) -> str:
        """The budget in bytes of tensors that leaves the files room for their headers."""
        rows = self.trials.plan.replacements
        orders = sum(4 * max(row.rows, row.columns) for row in rows if row.side is not None)
        # of a tensor: its dtype, shape and offsets, and of a layer up to four tensors with names a little longer
        header = sum(len(entry.key) + 120 for entry in self.trials.entries) + sum(4 * (len(r.name) + 130) for r in rows)
        shards = 1 + limit.bytes // self.options.output.shard_size
        room = shards * (max(ShardWriter.HEADER_BYTES, header) + 8192) + orders
        if limit.bytes <= room:
            raise SurgeryError(f"{self.goal}: the files' headers alone take {size_text(room)}; ask for more")
        return f"bytes:{limit.bytes - room}"

    # the output

    def _factorise(self, budget: str, point: Point | None) -> Report:
        target: Budget = parse_budget(budget, multiple_of=self.options.surgery.target.multiple_of)
        options = replace(self.options, surgery=replace(self.options.surgery, target=target))

        def complete(stage: Path, report: Report) -> Report:
            return replace(report, choice=self._choice(stage, budget, point, report))

        return run_factorise(self.reference, self.output, options, complete=complete, listener=self.listener)

    def _choice(self, stage: Path, budget: str, point: Point | None, report: Report) -> Choice:
        """Measure the written model. Raises _MissedError if it misses the goal."""
        values = self._evaluate(str(stage), self.data) if self.data is not None else {}
        if isinstance(self.goal, Goal) and self.goal.option == SPEEDUP:
            values |= self._time(stage)
        elif isinstance(self.goal, Goal) and self.request.healing is None and not self.goal.meets(values, self.dense):
            figure = self.goal.written(values.get(self.goal.figure, float("nan")))
            raise _MissedError(f"{self.goal}: the model written with --budget {budget} has {self.goal.figure} {figure}")
        test = None
        if self.request.test is not None:
            test = {
                "dense": self._evaluate(self.reference, self.request.test),
                "factorised": self._evaluate(str(stage), self.request.test),
            }
        size = sum(file.stat().st_size for file in stage.glob("*.safetensors"))
        if isinstance(self.goal, SizeLimit) and size > self.goal.bytes:
            raise SurgeryError(f"{self.goal}: the files take {size:,} bytes; ask for a little less")
        bound = self.goal.bytes if isinstance(self.goal, SizeLimit) else self.goal.bound(self.dense)
        healing = self.request.healing
        healed = point["values"] if healing is not None and point is not None else None
        return Choice(
            target=str(self.goal),
            lines=self._lines(budget, values, healed, size, test),
            budget=budget,
            bound=float(bound),
            dense=dict(self.dense),
            values=values,
            points=[each for name, each in self.points.items() if name != "dense"],
            data=None if self.data is None else self.data.data,
            test=test,
            heal=0 if healing is None else healing.steps,
            next=None if healing is None else healing.command(self.output),
        )

    def _evaluate(self, model: str, data: EvalData) -> dict[str, float]:
        trust, source = self.options.source.trust_remote_code, self.options.source
        own = model == self.reference
        found = evaluate(
            model,
            data.data,
            data.how,
            split=data.split,
            batch_size=BATCH,
            device=str(self.options.compute.device),
            revision=source.revision if own else None,
            architecture=source.architecture if own else None,
            trust_remote_code=trust,
        )
        return {name: value for name, value in found.values.items() if abs(value) < float("inf")}

    def _time(self, stage: Path) -> dict[str, float]:
        """The written model's speedup over the dense one, by `bench` with its own precision."""
        setting = self.trials.setting
        options = BenchOptions(
            batch=(setting.batch,),
            length=None if self.trials.takes_images else (setting.length,),
            new_tokens=0,
            device=str(self.options.compute.device),
            task=self.trials.how.task,
            trust_remote_code=self.options.source.trust_remote_code,
        )
        run = bench(str(stage), self.reference, options)["runs"][0]
        assert run["speedup"] is not None
        assert run["interval"] is not None
        return {"speedup": run["speedup"], "at least": run["interval"][0], "at most": run["interval"][1]}

    def _lines(
        self,
        budget: str,
        values: Figures,
        healed: Figures | None,
        size: int,
        test: Mapping[str, Figures] | None,
    ) -> list[str]:
        """What people are told: the goal as it was read, what was found, on which data."""
        goal, data = self.goal, self.data
        if isinstance(goal, SizeLimit):
            lines = [f"{goal}: weight files of {size:,} bytes, by --budget {budget}"]
            lines += [_sentence("measured", values, self.dense, public_name(data.data))] if data is not None else []
        else:
            lines = [f"{goal}: {goal.reading(self.dense)}; found by --budget {budget}"]
            if goal.option == SPEEDUP:
                low, high = values["at least"], values["at most"]
                told = f"{values['speedup']:.2f} times as fast ({low:.2f} to {high:.2f}), {self.trials.setting_text()}"
                short = "" if high >= goal.amount else ", below what was asked for: the machine does other work by now"
                lines.append(told + short)
            elif healed is not None:
                assert self.request.healing is not None
                steps = self.request.healing.steps
                lines.append(
                    _sentence(f"after {steps} finetune steps", healed, self.dense, public_name(str(data and data.data)))
                )
                lines.append(
                    f"as written, without them, {goal.figure} {goal.written(values[goal.figure])}; heal it:"
                    f" {self.request.healing.command(Path(self.output.name))}"
                )
            else:
                assert data is not None
                lines.append(_sentence("as written", values, self.dense, public_name(data.data)))
            if data is not None and goal.option != SPEEDUP and test is None:
                name = public_name(data.data)
                lines.append(f"chosen on {name}, so the figure is optimistic; --test-data measures afresh")
        if test is not None:
            assert self.request.test is not None
            lines.append(
                _sentence("measured afresh", test["factorised"], test["dense"], public_name(self.request.test.data))
            )
        return lines


def _sentence(what: str, values: Figures, dense: Figures, data: str) -> str:
    """Figures of a model and of the dense one, and the data that they are of."""
    told = [
        f"{title} {form.format(values[name])}, dense {form.format(dense[name])}"
        for name, title, form in (("loss", "loss", "{:.4f}"), ("top1", "top-1", "{:.2%}"))
        if name in values and name in dense
    ]
    return f"{what}: {'; '.join(told)} (on {data})"
