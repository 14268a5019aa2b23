"""Options of targets and curves, and the values that they are parsed into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lrsurgery.cli.arguments import option

if TYPE_CHECKING:
    from lrsurgery.data.options import DataOptions
    from lrsurgery.factorise.options import Calibration, FactoriseOptions
    from lrsurgery.measure.targets.choose import Request
    from lrsurgery.measure.targets.goals import EvalData, Goal, SizeLimit
    from lrsurgery.measure.targets.heal import Healing
    from lrsurgery.progress import Listener
    from lrsurgery.report.schema import Report

TARGET = "Target, in place of ranks"  # a panel of help

MaxLossOption = Annotated[
    str | None,
    option(
        "--max-loss",
        panel=TARGET,
        metavar="2%|LOSS",
        text="The smallest model within 2% of the dense loss, or at most this loss, on --eval-data.",
        default=False,
    ),
]
MinAccuracyOption = Annotated[
    str | None,
    option(
        "--min-accuracy",
        panel=TARGET,
        metavar="SHARE|-1%",
        text="The smallest model with this top-1 on --eval-data; -1%: a point below dense.",
        default=False,
    ),
]
MaxSizeOption = Annotated[
    str | None,
    option(
        "--max-size",
        panel=TARGET,
        metavar="SIZE",
        text="The best model whose weight files take at most this, such as 200MB.",
        default=False,
    ),
]
SpeedupOption = Annotated[
    str | None,
    option(
        "--speedup",
        panel=TARGET,
        metavar="X",
        text="The largest model that is X times as fast as dense on --device, as bench measures it.",
        default=False,
    ),
]


def _option(name: str, text: str, metavar: str | None = "DATA") -> object:
    return option(name, panel=TARGET, metavar=metavar, text=text, default=False)


EvalDataOption = Annotated[
    str | None, _option("--eval-data", "Data to measure on, as evaluate --data takes it; not that of calibration.")
]
EvalSplitOption = Annotated[
    str | None, _option("--eval-split", "Split of --eval-data; validation or test by default.", None)
]
TestDataOption = Annotated[
    str | None, _option("--test-data", "Other data, that measures the written model and dense afresh.")
]
TestSplitOption = Annotated[
    str | None, _option("--test-split", "Split of --test-data; validation or test by default.", None)
]
LabelColumnOption = Annotated[str | None, _option("--label-column", "Column of the class in data to measure on.", None)]
LabelMapOption = Annotated[
    str | None, _option("--label-map", "JSON or CSV file: class of the data, class of the model.", "FILE")
]
HealOption = Annotated[
    int | None,
    option(
        "--heal",
        panel=TARGET,
        metavar="STEPS",
        text="Each model measured after this many finetune steps on the calibration data.",
        default=False,
    ),
]


def stand_in(goal: Goal | SizeLimit | None) -> str | None:
    """The budget that options have while the one that meets a goal is not known."""
    from lrsurgery.measure.targets.goals import SPEEDUP, SizeLimit

    if goal is None:
        return None
    if isinstance(goal, SizeLimit):
        return f"bytes:{goal.bytes}"
    return "time:1.0" if goal.option == SPEEDUP else "1.0"


def eval_data_of(data: str | None, split: str | None, how: DataOptions, option: str = "--eval-data") -> EvalData | None:
    """The data to measure on, if any. Raises SurgeryError for a split of none."""
    from lrsurgery.errors import SurgeryError
    from lrsurgery.measure.targets.goals import EvalData

    if data is None:
        if split is not None:
            raise SurgeryError(f"{option.replace('data', 'split')} {split}: of no data; add {option} DATA")
        return None
    how.check()
    return EvalData(data=data, split=split, how=how)


def healing_of(
    steps: int | None, calibration: Calibration | str | None, how: DataOptions, device: str
) -> Healing | None:
    """The healing of each point, if any. Raises RecipeError."""
    from lrsurgery.measure.targets.heal import Healing

    if steps is None:
        return None
    return Healing(steps, None if isinstance(calibration, str) else calibration, device, how)


def request_of(
    goal: Goal | SizeLimit | None,
    data: EvalData | None,
    test: EvalData | None,
    healing: Healing | None,
    *,
    budget_of: str,
    dry_run: bool,
) -> Request | None:
    """What is asked for in place of ranks; None without a target.

    Raises SurgeryError for options that need a target, or that do not go with one.
    """
    from lrsurgery.errors import SurgeryError
    from lrsurgery.measure.targets.choose import Request
    from lrsurgery.measure.targets.goals import READABLE

    if goal is None:
        given = {"--eval-data": data, "--test-data": test, "--heal": healing}
        if names := ", ".join(name for name, value in given.items() if value is not None):
            raise SurgeryError(f"{names}: for a target; add one of {', '.join(READABLE)}, or measure with evaluate")
        return None
    if budget_of != "layers":
        raise SurgeryError(f"--budget-of belongs to --budget, and {goal} chooses it; leave it out")
    if dry_run:
        raise SurgeryError(f"--dry-run measures nothing, and {goal} is found by measuring; leave one out")
    return Request(goal=goal, data=data, test=test, healing=healing)


@dataclass(frozen=True)
class CurveRequest:
    """A curve that a report of a dense model gets."""

    options: FactoriseOptions
    data: EvalData
    healing: Healing | None

    def check(self, model: str) -> None:
        """Raise SurgeryError for a model that has no curve."""
        from lrsurgery.measure.targets.trials import Trials

        Trials.open(model, self.options, self.data, self.healing)

    def added_to(self, report: Report, model: str, listener: Listener) -> Report:
        """The report with the curve, which is measured now."""
        from dataclasses import replace

        from lrsurgery.measure.targets.curve import measure_curve

        curve = measure_curve(model, self.options, self.data, self.healing, listener)
        return replace(report, curve=curve, notes=(*report.notes, *curve["notes"]))


def curve_request(
    *,
    eval_data: str | None,
    eval_split: str | None,
    heal: int | None,
    calibration: str | None,
    samples: int,
    statistics: Path | None,
    split: str | None,
    how: Mapping[str, Any],
    labels: Mapping[str, str | None],
    device: str,
    **options: Any,
) -> CurveRequest | None:
    """The curve that is asked for; None without data to measure on.

    Raises SurgeryError for options of a curve without that data.
    """
    from lrsurgery.data.options import DataOptions
    from lrsurgery.errors import SurgeryError
    from lrsurgery.factorise.options import parse_calibration, parse_options

    read = DataOptions(**how)
    usual = DataOptions()
    if eval_data is None:
        given = {"--calibration": calibration, "--statistics": statistics, "--heal": heal, "--eval-split": eval_split}
        given |= {"--split": split, "--label-column": labels["label_column"], "--label-map": labels["label_map"]}
        given |= {f"--{name.replace('_', '-')}": None if how[name] == vars(usual)[name] else how[name] for name in how}
        if names := ", ".join(name for name, value in given.items() if value is not None):
            raise SurgeryError(f"{names}: about a measured curve; add --eval-data DATA, which it is measured on")
        return None
    measured = DataOptions(**{**how, **labels})
    data = eval_data_of(eval_data, eval_split, measured)
    assert data is not None
    has_calibration = calibration is not None or statistics is not None
    calibrated = parse_calibration(
        calibration, samples=samples, statistics=statistics, split=split, how=read if has_calibration else usual
    )
    parsed = parse_options(budget="1.0", calibration=calibrated, device=device, loss_check=False, **options)
    return CurveRequest(parsed, data, healing_of(heal, calibrated, measured, device))
