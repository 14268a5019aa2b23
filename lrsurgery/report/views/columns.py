"""The columns of a report's layers and ladder, and the figures of evaluations, listed once; every view draws them.

To add a column: a row in `COLUMNS` or `LADDER` (those of bench stand in speed.py). Markdown, CSV and the page show
every column that a layer has a value for; the terminal and the model card name those that they have room for.

The file is long because it is one table, and each field of an entry has a line of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeAlias, TypeVar

from lrsurgery.files.json import Json
from lrsurgery.report.schema import Report, Row, Rung
from lrsurgery.units import shape_text

Value: TypeAlias = str | int | float | None
T = TypeVar("T")
PIPED_WIDTH = 160  # columns of a file or a pipe, whose lines need not fold at a terminal's 80
UNBALANCED = 0.01  # of factors; below, it is rounding

# figures of an evaluation: what people call them, how they are written
QualityName: TypeAlias = Literal[
    "loss",
    "perplexity",
    "top1",
    "top5",
    "f1",
    "exact_match",
    "mse",
    "pearson",
    "spearman",
    "kl",
    "cosine",
    "relative_mse",
    "pixel_accuracy",
    "mean_iou",
]
HEADINGS: dict[QualityName, str] = {
    "loss": "loss",
    "perplexity": "perplexity",
    "top1": "top-1",
    "top5": "top-5",
    "f1": "F1",
    "exact_match": "exact match",
    "mse": "MSE",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "kl": "KL",
    "cosine": "cosine",
    "relative_mse": "relative MSE",
    "pixel_accuracy": "pixel accuracy",
    "mean_iou": "mean IoU",
}
QUALITY: dict[QualityName, str] = {
    "loss": "{:.4f}",
    "perplexity": "{:.3f}",
    "top1": "{:.2%}",
    "top5": "{:.2%}",
    "f1": "{:.2%}",
    "exact_match": "{:.2%}",
    "mse": "{:.4f}",
    "pearson": "{:.4f}",
    "spearman": "{:.4f}",
    "kl": "{:.4f}",
    "cosine": "{:.4f}",
    "relative_mse": "{:.4f}",
    "pixel_accuracy": "{:.2%}",
    "mean_iou": "{:.2%}",
}

# further figures of `evaluate`: of generated text, and by lm_eval's protocol
HARNESS_HEADINGS = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "wer": "word errors",
    "word_perplexity": "ppl/word",
    "byte_perplexity": "ppl/byte",
    "bits_per_byte": "bits/byte",
}
HARNESS = {
    **dict.fromkeys(("rouge1", "rouge2", "rougeL", "wer"), "{:.2%}"),
    "word_perplexity": "{:.3f}",
    "byte_perplexity": "{:.4f}",
    "bits_per_byte": "{:.4f}",
}


@dataclass(frozen=True)
class Terse(Generic[T]):
    """A column as the terminal shows it."""

    title: str
    text: Callable[[T], str]
    wide: bool = False  # only where there is room for more than 80 columns
    always: bool = False  # even where every cell is empty


@dataclass(frozen=True, kw_only=True)
class Column(Generic[T]):
    """One column of a table."""

    key: str  # its path in the row's JSON object, where it has one; the heading in CSV
    title: str  # in Markdown and cards
    value: Callable[[T], Value]
    form: str = "number"  # text, count, size (a large count), share, times or number: how people read it
    label: str | None = None  # on the page, beneath `group` if there is one; the title by default
    group: str | None = None
    hint: str | None = None  # what the page says of it
    terse: Terse[T] | None = None  # None where the terminal has no room for it
    drawn: bool = True  # whether Markdown, CSV and the page show it; the terminal's own sketches they do not
    notable: Callable[[T], bool] = lambda _: True  # whether people should see a row's value; CSV holds every one

    def shown(self, row: T) -> Value:
        """The value for people to see."""
        return self.value(row) if self.notable(row) else None


def _layers_share(row: Row) -> float | None:
    known = row.parameters_after is not None and row.parameters_before
    return (row.parameters_after or 0) / row.parameters_before if known else None


def _effective(when: str, measure: str) -> Callable[[Row], Value]:
    def value(row: Row) -> Value:
        ranks = row.before if when == "before" else row.after
        return None if ranks is None else float(getattr(ranks, measure))

    return value


def _largest_angle(side: str) -> Callable[[Row], Value]:
    return lambda row: None if row.overlap is None else float(getattr(row.overlap, side).largest)


def _percent(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def _is_unbalanced(row: Row) -> bool:
    return (row.balance or 0.0) >= UNBALANCED


def _leader(row: Row) -> str:
    """The layer that stores its v, by what tells it from the row's own name."""
    if row.v_of is None or row.v_of == row.name:
        return ""
    parent = row.name.rpartition(".")[0]
    return row.v_of.removeprefix(f"{parent}.")


def _entropy_course(row: Row) -> str:
    return course([f"{ranks.entropy:.1f}" for ranks in (row.before, row.after) if ranks is not None])


def course(texts: Sequence[str]) -> str:
    """The first and the last of some texts, once where they are the same."""
    return "" if not texts else texts[0] if texts[0] == texts[-1] else f"{texts[0]} → {texts[-1]}"


def _shared(row: Row) -> float | None:
    """How much of the dense weight's leading directions the factors still span, the mean of both sides."""
    if row.overlap is None:
        return None
    last = row.overlap.leading[-1]
    return (last.output + last.input) / 2


COLUMNS: tuple[Column[Row], ...] = (
    Column(key="name", title="layer", form="text", value=lambda row: row.name),
    Column(key="kind", title="kind", form="text", value=lambda row: row.kind),
    Column(
        key="shape",
        title="shape",
        form="text",
        value=lambda row: shape_text(row.shape),
        terse=Terse("shape", lambda row: shape_text(row.shape), wide=True, always=True),
    ),
    Column(
        key="status",
        title="status",
        form="text",
        value=lambda row: f"{row.status}: {row.reason}" if row.reason else row.status,
    ),
    Column(
        key="rank",
        title="rank",
        form="count",
        group="Rank",
        label="kept",
        value=lambda row: row.rank,
        terse=Terse("rank", lambda row: str(row.rank or "?"), always=True),
    ),
    Column(
        key="full_rank",
        title="full rank",
        form="count",
        group="Rank",
        label="full",
        value=lambda row: row.full_rank,
        terse=Terse("full", lambda row: str(row.full_rank), always=True),
    ),
    Column(
        key="break_even",
        title="break-even",
        form="count",
        group="Rank",
        hint="The largest rank at which the layer, in its form, has fewer parameters than the matrix",
        value=lambda row: row.break_even,
    ),
    Column(
        key="parameters_before",
        title="parameters",
        form="size",
        group="Parameters",
        label="before",
        value=lambda row: row.parameters_before,
        terse=Terse("before", lambda row: f"{row.parameters_before:,}", wide=True, always=True),
    ),
    Column(
        key="parameters_after",
        title="after",
        form="size",
        group="Parameters",
        value=lambda row: row.parameters_after,
        notable=lambda row: row.status == "factorised",
        terse=Terse(
            "after",
            lambda row: "?" if row.parameters_after is None else f"{row.parameters_after:,}",
            wide=True,
            always=True,
        ),
    ),
    Column(
        key="kept",
        title="share of parameters kept",
        form="share",
        group="Parameters",
        label="kept",
        value=_layers_share,
        terse=Terse("kept", lambda row: _percent(_layers_share(row), 1), always=True),
        drawn=False,
    ),
    Column(
        key="energy_kept",
        title="energy kept",
        form="share",
        value=lambda row: row.energy_kept,
        terse=Terse("energy", lambda row: _percent(row.energy_kept)),
    ),
    Column(
        key="relative_error",
        title="relative error",
        form="share",
        group="Error",
        label="relative",
        hint="Frobenius norm of the difference over the dense weight's",
        value=lambda row: row.relative_error,
        terse=Terse("error", lambda row: _percent(row.relative_error)),
    ),
    Column(
        key="entropy",
        title="entropy rank, before and after",
        form="text",
        value=lambda row: _entropy_course(row) or None,
        terse=Terse("entropy rank", _entropy_course, wide=True),
        drawn=False,
    ),
    Column(
        key="shared",
        title="leading directions shared with the dense weight, mean of both sides",
        form="share",
        value=_shared,
        terse=Terse("shared", lambda row: _percent(_shared(row))),
        drawn=False,
    ),
    Column(
        key="spectral_error",
        title="spectral error",
        form="share",
        group="Error",
        label="spectral",
        hint="The largest singular value left out over the largest of all",
        value=lambda row: row.spectral_error,
    ),
    *(
        Column(
            key=f"{when}.{measure}",
            title=f"{measure} rank{', after' if when == 'after' else ''}",
            group=f"Effective rank {when}",
            label=measure,
            value=_effective(when, measure),
        )
        for when in ("before", "after")
        for measure in ("nuclear", "entropy", "stable")
    ),
    *(
        Column(
            key=f"overlap.{side}.largest",
            title=f"largest angle, {side}",
            group="Largest angle",
            label=side,
            hint="Degrees between the dense and the factorised subspace",
            value=_largest_angle(side),
        )
        for side in ("output", "input")
    ),
    Column(
        key="weighted_error",
        title="error in the metric",
        form="share",
        hint="Relative error, weighed by the calibration data; of a table without data by the order of its tokens",
        value=lambda row: row.weighted_error,
    ),
    Column(
        key="predicted_loss",
        title="predicted loss",
        hint="Predicted increase of the loss of a token or image, to second order, by the calibration data",
        value=lambda row: row.predicted_loss,
        terse=Terse("loss", lambda row: "" if row.predicted_loss is None else f"+{row.predicted_loss:.2g}"),
    ),
    Column(
        key="form",
        title="form",
        hint="balanced: two factors; pivoted: rows or columns of the product, and the others in terms of them",
        value=lambda row: row.form,
    ),
    Column(
        key="groups",
        title="groups",
        form="count",
        hint="Of a grouped convolution: each group has a pair of factors",
        value=lambda row: row.groups,
        notable=lambda row: row.groups != 1,
    ),
    Column(
        key="v_of",
        title="v of",
        form="text",
        hint="The layer that stores the v of this one: layers with the same inputs may share it, at one rank",
        value=lambda row: row.v_of if row.v_of != row.name else None,
        terse=Terse("v of", _leader, wide=True),
    ),
    Column(
        key="balance",
        title="unbalanced",
        form="share",
        hint="How far training has carried the factors from an even split",
        value=lambda row: row.balance,
        notable=_is_unbalanced,
        terse=Terse("unbalanced", lambda row: _percent(row.balance) if _is_unbalanced(row) else "", wide=True),
    ),
    Column(
        key="damage",
        title="predicted damage",
        hint="Share of parameters removed times stable rank; a rough guide",
        value=lambda row: row.damage,
        terse=Terse("damage", lambda row: "" if row.damage is None else f"{row.damage:.1f}"),
    ),
)


def form_words(report: Report) -> str:
    """What the pivoted form saves of a report's model, where it saves anything."""
    saved, share = report.saved_by_form, report.share_saved_by_form
    return (
        f"the pivoted form saves {saved:,} parameters ({share:.1%} of the model) against the balanced one at the same"
        " ranks"
    )


class Step(NamedTuple):
    """A rung of a whole model's ladder, and the share of the parameters that it would leave."""

    rung: Rung
    share: float


def steps_of(report: Report) -> list[Step]:
    """The ladder of a dense model; no steps where there is none."""
    return [Step(rung, rung.parameters / max(1, report.parameters_before)) for rung in report.ladder or ()]


LADDER: tuple[Column[Step], ...] = (
    Column(
        key="rank",
        title="`--rank`",
        label="rank asked",
        form="text",
        value=lambda step: step.rung.rank,
        terse=Terse("--rank", lambda step: step.rung.rank),
    ),
    Column(
        key="layers",
        title="layers",
        label="layers factorised",
        form="count",
        value=lambda step: step.rung.to,
        terse=Terse("layers", lambda step: str(step.rung.to)),
    ),
    Column(
        key="parameters",
        title="parameters",
        form="size",
        value=lambda step: step.rung.parameters,
        terse=Terse("parameters", lambda step: f"{step.rung.parameters:,}"),
    ),
    Column(
        key="share",
        title="share",
        form="share",
        value=lambda step: step.share,
        terse=Terse("share", lambda step: _percent(step.share, 1)),
    ),
    Column(
        key="energy_kept",
        title="energy kept",
        form="share",
        value=lambda step: step.rung.energy_kept,
        terse=Terse("energy", lambda step: _percent(step.rung.energy_kept)),
    ),
    Column(
        key="relative_error",
        title="relative error",
        form="share",
        value=lambda step: step.rung.relative_error,
        terse=Terse("error", lambda step: _percent(step.rung.relative_error)),
    ),
    Column(
        key="damage",
        title="predicted damage",
        value=lambda step: step.rung.damage,
        terse=Terse("damage", lambda step: f"{step.rung.damage:.1f}"),
    ),
)
BY_KEY: Mapping[str, Column[Row]] = {column.key: column for column in COLUMNS}


def columns_with_values(rows: Sequence[Row], *, without: Iterable[str] = ()) -> list[Column[Row]]:
    """The columns that some row has a value for, in order."""
    left_out = set(without)
    drawn = (column for column in COLUMNS if column.drawn and column.key not in left_out)
    return [column for column in drawn if any(column.shown(row) is not None for row in rows)]


def plain_text(value: Value, form: str) -> str:
    """A value as Markdown writes it: shares with two digits, other numbers with up to six."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.2%}" if form == "share" else f"{value:,}" if form in ("count", "size") else f"{value:.6g}"


# orders of layers; None is the model's own
SORTS: dict[str, Callable[[Row], str | float] | None] = {
    "model": None,
    "name": lambda row: row.name,
    "params": lambda row: -row.parameters_before,
    "error": lambda row: -(row.relative_error or 0.0),
}


def sorted_rows(rows: Iterable[Row], sort: str) -> list[Row]:
    """In one of the orders of `SORTS`; equal ones as the model has them."""
    key = SORTS[sort]
    return list(rows) if key is None else sorted(rows, key=key)


def page_columns(report: Report) -> list[Json]:
    """What the page's table of layers shows.

    Columns without any value are left out, except of a dense model, whose ladder fills them in.
    """
    shown = list(COLUMNS) if report.about == "dense" else columns_with_values(report.rows)
    return named([c for c in COLUMNS if (c.drawn and c in shown) or c.key == "kept"])


def named(columns: Iterable[Column[T]]) -> list[Json]:
    """Columns for the page's script: where each value stands in the JSON, how it is named and written."""
    return [
        {"key": c.key, "title": c.title, "label": c.label or c.title, "group": c.group, "form": c.form, "hint": c.hint}
        for c in columns
    ]
