"""The rank report: one row a layer, one JSON that everything else is drawn from (design, section 7).

The file is long because all of the format stands in it: what is written, and what is read back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import ConfigDict
from typing_extensions import NotRequired, TypedDict

from lrsurgery.errors import SourceError
from lrsurgery.files.digests import REPORT, FileDigest
from lrsurgery.files.json import Json, check_version, checked, json_text, read_json
from lrsurgery.linalg.spectrum import EffectiveRanks, Points, predicted_damage
from lrsurgery.linalg.subspaces import Overlap
from lrsurgery.report.bench import Bench, Count, Size
from lrsurgery.report.runs import Run
from lrsurgery.report.targets.schema import Choice, Curve
from lrsurgery.surgery.kinds.table import KINDS
from lrsurgery.surgery.ranks import break_even_rank
from lrsurgery.units import shape_text

if TYPE_CHECKING:
    import pandas as pd

# Older versions are read too. Version 3 had no digests of files, version 2 nothing of calibration, budgets or balance
# either, version 1 nor FLOPs, spectra, overlaps and ladders.
FORMAT_VERSION = 4
FILE_NAME = REPORT
NOTEBOOK = "lrsurgery.report.notebook"  # by name: it draws the columns of the views, which import this file
HIGH_DAMAGE = 2.0  # times the median of the model's layers
NUMBERS = re.compile(r"\[\n[-+.\deE,\s]+\]")  # a list of numbers in indented JSON; no string holds a line break


@dataclass(frozen=True)
class Rung:
    """What one rank would keep, lose and save of a layer or a whole model, predicted from the spectrum."""

    rank: str  # as --rank takes it
    to: Count | None  # rank of the layer, None where it stays dense; of a model, the number of layers factorised
    parameters: Count
    energy_kept: float
    relative_error: float  # ||W - W_r||_F / ||W||_F
    damage: float  # see `predicted_damage`


@dataclass(frozen=True)
class Row:
    """One layer. Errors are relative to the dense weight's own norm; None where a value is not known."""

    name: str
    kind: str
    shape: tuple[Size, ...]
    status: Literal["factorised", "dense"]
    reason: str | None  # why it stays dense
    full_rank: Size | None
    rank: Size | None
    parameters_before: Count
    parameters_after: Count | None  # None in a plan whose rank waits for the singular values
    _: KW_ONLY
    energy_kept: float | None = None  # share of the dense weight's squared norm within the factors' subspaces
    relative_error: float | None = None  # ||W - U V||_F / ||W||_F, of the factors as stored
    spectral_error: float | None = None  # largest singular value left out / largest; measured: ||W - U V||_2 / ||W||_2
    before: EffectiveRanks | None = None
    after: EffectiveRanks | None = None
    # of a token, or of a position of a convolution's output (a transposed one's input): 2 a multiply-add
    flops_before: Count | None = None
    flops_after: Count | None = None
    spectrum_before: Points | None = None
    spectrum_after: Points | None = None
    overlap: Overlap | None = None  # of the dense and the factorised leading directions
    ladder: tuple[Rung, ...] | None = None
    # ||G^(1/2) (W - U V) C^(1/2)||_F / ||G^(1/2) W C^(1/2)||_F, G and C calibrated, or of a table by its tokens' order
    weighted_error: float | None = None
    predicted_loss: float | None = None  # predicted increase of the loss (nats); None without Fisher statistics
    balance: float | None = None  # ||U^T U - V V^T||_F / ||U^T U||_F; 0 right after surgery
    form: Literal["balanced", "pivoted"] | None = None  # of a factorised layer; None in reports of older versions
    # the layer that stores its v, where several share one (its own name for that layer, for which v counts); their rank
    # and full rank are those of all of them together
    v_of: str | None = None
    groups: int = 1  # of a grouped convolution: one matrix each, one rank and their singular values stacked

    @property
    def break_even(self) -> int | None:
        """The largest rank that saves parameters; None for a layer that has no factorised form."""
        if self.full_rank is None or self.v_of is not None:
            return None
        rows, columns = KINDS[self.kind].matrix_shape(torch.Size(self.shape))
        return break_even_rank(rows // self.groups, columns, pivoted=self.form == "pivoted")

    @property
    def damage(self) -> float | None:
        """`predicted_damage` of what was done or is planned."""
        if self.status == "dense" or self.parameters_after is None or self.before is None:
            return None
        return predicted_damage(self.parameters_before, self.parameters_after, self.before.stable)

    def to_dict(self) -> Json:
        """The row's JSON object, with what follows from its fields."""
        body = asdict(self)
        if self.overlap is not None:  # named tuples would become bare lists
            sides = {"output": self.overlap.output._asdict(), "input": self.overlap.input._asdict()}
            body["overlap"] = {**sides, "leading": [share._asdict() for share in self.overlap.leading]}
        return {**body, "break_even": self.break_even, "damage": self.damage}

    @staticmethod
    def from_dict(body: Json, where: str = "a row") -> Row:
        """The row of a JSON object. Raises SourceError, which `where` begins, where it holds anything else."""
        row = checked(Row, body, f"{where}: not a rank report's")
        row.check(where)
        return row

    def check(self, where: str) -> None:
        """Raise SourceError, which `where` begins, if the figures do not fit each other."""
        lead = f"{where}: layer {self.name[:60]!r}: "
        if self.full_rank is not None:
            kind = KINDS.get(self.kind)
            if kind is None or len(self.shape) != kind.weight_axes:
                raise SourceError(f"{lead}shape {shape_text(self.shape)} is of no '{self.kind[:60]}' layer")
            if self.v_of is None and self.full_rank > min(kind.matrix_shape(torch.Size(self.shape))):
                raise SourceError(f"{lead}full rank {self.full_rank} is above that of {shape_text(self.shape)}")
            if self.rank is not None and self.rank > self.full_rank:
                raise SourceError(f"{lead}rank {self.rank} is above full rank, {self.full_rank}")
        elif self.status == "factorised":
            raise SourceError(f"{lead}factorised, and without a full rank")
        for points in (self.spectrum_before, self.spectrum_after):
            ascends = points is None or all(0 < a < b for a, b in zip(points.index, points.index[1:], strict=False))
            if points is not None and not (ascends and len(points.index) == len(points.value) > 0):
                raise SourceError(f"{lead}a spectrum whose values do not stand at ascending places")
        if self.overlap is not None and not self.overlap.leading:
            raise SourceError(f"{lead}an overlap without directions")


@dataclass(frozen=True)
class Report:
    """What was done to a model, or would be: a row for each layer in the model's order, totals, and what made them.

    `rank_report(module)` makes one of a model in memory, `factorise_checkpoint` returns one, and `Report.read(folder)`
    reads the one beside a checkpoint. `to_json()` is the text of rank_report.json.
    """

    rows: tuple[Row, ...]
    parameters_before: int  # of the whole model, tied tensors once
    parameters_after: int | None
    bytes_before: int | None = None  # of the weights in the files
    bytes_after: int | None = None
    _: KW_ONLY
    source: Json = field(default_factory=dict)  # reference, revision, digest of the tensors
    command: str | None = None
    options: Json = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    about: str = "factorised"  # "plan": what would be done; "dense": a model as it is; "runs": training runs alone
    name: str | None = None  # of the model or its folder
    ladder: tuple[Rung, ...] | None = None  # of the whole model
    training: tuple[Run, ...] = ()
    bench: Bench | None = None
    calibration: Json | None = None  # the importance, the data and how much of it
    curve: Curve | None = None  # of a dense model: figures over size
    choice: Choice | None = None  # how a target chose the size
    loss_check: Json | None = None  # of the quick check after surgery; `text` is its line for people
    refinement: Json | None = None  # of blocks to those of the dense model; `text` is its line for people
    files: dict[str, FileDigest] = field(default_factory=dict)  # the folder's others, as they were written

    def __repr__(self) -> str:
        return f"<Report: {self.summary}>"

    @property
    def summary(self) -> str:
        """One line: the model, how many of its layers are or would be factorised, parameters before and after."""
        lead = f"{self.name}: " if self.name else ""
        if self.about == "runs":
            return f"{lead}{len(self.training)} training runs"
        if self.about == "dense":
            return f"{lead}{len(self.rows)} layers, dense, {self.parameters_before:,} parameters"
        planned = " planned" if self.about == "plan" else ""
        done = f"{lead}{len(self.factorised)} of {len(self.rows)} layers factorised{planned}"
        before, after = self.parameters_before, self.parameters_after
        if after is None or not before:
            return f"{done}, {before:,} parameters before"
        return f"{done}, {before:,} -> {after:,} parameters ({after / before:.1%})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the line of `repr` and a table of the layers."""
        found: str = import_module(NOTEBOOK).to_html(self)
        return found

    def to_pandas(self) -> pd.DataFrame:
        """A data frame of the layers, as in the CSV. Raises SurgeryError without pandas."""
        return import_module(NOTEBOOK).to_pandas(self)

    @property
    def factorised(self) -> tuple[Row, ...]:
        """The rows of factorised layers."""
        return tuple(row for row in self.rows if row.status == "factorised")

    @property
    def dense(self) -> tuple[Row, ...]:
        """The rows of layers that stay dense."""
        return tuple(row for row in self.rows if row.status == "dense")

    @property
    def saved_by_form(self) -> int:
        """Parameters that pivoted layers store less than balanced ones of the same ranks would: rank^2 each."""
        stored = (row for row in self.factorised if row.v_of in (None, row.name))  # a shared v is pivoted once
        return sum(row.rank**2 for row in stored if row.form == "pivoted" and row.rank is not None)

    @property
    def share_saved_by_form(self) -> float | None:
        """`saved_by_form` over the parameters of the model with balanced layers; None where nothing is saved."""
        saved, after = self.saved_by_form, self.parameters_after
        return saved / (after + saved) if saved and after is not None else None

    @property
    def predicted_loss(self) -> float | None:
        """Predicted increase of the loss (nats): the sum over the layers, as if they did not affect each other."""
        known = [row.predicted_loss for row in self.factorised if row.predicted_loss is not None]
        return sum(known) if known else None

    @property
    def dense_source(self) -> Json | None:
        """`reference` and `digest` of the dense model that the layers were factorised from, where they are known.

        None of a report without digests of files: its version made the digest of the source in another way.
        """
        found: Json | None = self.source.get("dense")
        if found is None and "digest" in self.source:
            found = {key: self.source.get(key) for key in ("reference", "digest")}
        return found if self.files else None

    @staticmethod
    def read(folder: Path) -> Report:
        """The report in a folder. Raises SourceError where it is missing, damaged or newer than this version reads."""
        file = folder / FILE_NAME
        if not file.is_file():
            raise SourceError(f"{folder}: no {FILE_NAME} in it; lrsurgery factorise writes one")
        return Report.from_dict(read_json(file, "a rank report"), str(file))

    def to_json(self) -> str:
        """Text of rank_report.json."""
        return to_json(self.to_dict())

    def to_dict(self) -> Json:
        """The JSON object (design, section 7)."""
        layers = [row.to_dict() for row in self.rows]
        usual = median([row["damage"] for row in layers if row["damage"] is not None] or [0.0])
        for row in layers:
            row["damage_high"] = None if row["damage"] is None else row["damage"] > HIGH_DAMAGE * usual
        return {
            "format_version": FORMAT_VERSION,
            "about": self.about,
            "name": self.name,
            "totals": None if self.about == "runs" else self._totals(),
            "ladder": None if self.ladder is None else [self._model_rung(rung) for rung in self.ladder],
            "source": self.source,
            "command": self.command,
            "options": self.options,
            "versions": self.versions,
            "notes": self.notes,
            "training": self.training,
            "bench": self.bench,
            "calibration": self.calibration,
            "curve": self.curve,
            "choice": self.choice,
            "loss_check": self.loss_check,
            "refinement": self.refinement,
            "files": self.files,
            "layers": layers,
        }

    @staticmethod
    def from_dict(body: Json, where: str = "report") -> Report:
        """The report of a JSON object, of this version or an older.

        Raises SourceError, which `where` begins, where it is none or is of a newer version.
        """
        check_version(body.get("format_version"), FORMAT_VERSION, where)
        read = checked(_File, body, f"{where}: not a rank report")
        for row in read["layers"]:
            row.check(where)
        totals = read.get("totals") or _Totals()
        given = {f.name: read[f.name] for f in fields(Report) if f.name in read}  # type: ignore[literal-required]
        given |= {name: totals.get(name) for name in TOTALS}
        given |= {"notes": tuple(read.get("notes") or ()), "training": tuple(read.get("training") or ())}
        if (ladder := read.get("ladder")) is not None:
            names = [f.name for f in fields(Rung)]
            given["ladder"] = tuple(
                Rung(**{name: rung["layers" if name == "to" else name] for name in names})  # type: ignore[literal-required]
                for rung in ladder
            )
        return Report(**{**given, "rows": tuple(read["layers"]), "parameters_before": given["parameters_before"] or 0})

    def _totals(self) -> Json:
        before, after = self.parameters_before, self.parameters_after
        return {
            "layers_factorised": len(self.factorised),
            "layers_dense": len(self.dense),
            "parameters_before": before,
            "parameters_after": after,
            "share": None if after is None or not before else after / before,
            "saved_by_form": self.saved_by_form,
            "share_saved_by_form": self.share_saved_by_form,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            **self._flops(),
            "predicted_loss": self.predicted_loss,
        }

    def _flops(self) -> dict[str, int | None]:
        """FLOPs a token, summed over the layers; None for models whose layers are not applied once a token."""
        known = [row for row in self.rows if row.flops_before is not None]
        kinds = [KINDS.get(row.kind) for row in known]
        if not known or not all(kind is not None and kind.takes_tokens for kind in kinds):
            return {"flops_before": None, "flops_after": None}
        after = [row.flops_after for row in known]
        whole = sum(row.flops_before or 0 for row in known)
        return {"flops_before": whole, "flops_after": None if None in after else sum(n or 0 for n in after)}

    def _model_rung(self, rung: Rung) -> Json:
        body = asdict(rung)
        share = rung.parameters / self.parameters_before if self.parameters_before else 0.0
        return {"rank": body.pop("rank"), "layers": body.pop("to"), "share": share, **body}


class _Totals(TypedDict, total=False):
    """Totals of a report that it does not compute from its rows."""

    parameters_before: Count | None
    parameters_after: Count | None
    bytes_before: Count | None
    bytes_after: Count | None


class _ModelRung(TypedDict):
    """A rung of a whole model's ladder."""

    rank: str
    layers: Count
    parameters: Count
    energy_kept: float
    relative_error: float
    damage: float


class _Open(TypedDict):
    """An object whose further keys are kept."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]


class _LossCheck(_Open):
    measured: bool
    text: str


class _Refinement(_Open):
    text: str


class _Calibration(_Open):
    samples: NotRequired[Count | None]
    tokens: NotRequired[Count | None]
    scored_in: NotRequired[str]


class _DenseSource(TypedDict):
    reference: str
    digest: str


class _Source(TypedDict):
    reference: NotRequired[str | None]
    hub_id: NotRequired[str | None]
    revision: NotRequired[str | None]
    digest: NotRequired[str]
    dense: NotRequired[_DenseSource]  # of a model that was trained further


class _File(TypedDict):
    """rank_report.json, of this version or an older."""

    layers: list[Row]
    totals: _Totals | None
    ladder: NotRequired[list[_ModelRung] | None]
    source: NotRequired[_Source]
    command: NotRequired[str | None]
    options: NotRequired[Json]
    versions: NotRequired[dict[str, str]]
    notes: NotRequired[list[str]]
    about: NotRequired[Literal["factorised", "plan", "dense", "runs"]]
    name: NotRequired[str | None]
    training: NotRequired[list[Run]]
    bench: NotRequired[Bench | None]
    calibration: NotRequired[_Calibration | None]
    curve: NotRequired[Curve | None]
    choice: NotRequired[Choice | None]
    loss_check: NotRequired[_LossCheck | None]
    refinement: NotRequired[_Refinement | None]
    files: NotRequired[dict[str, FileDigest]]


TOTALS = ("parameters_before", "parameters_after", "bytes_before", "bytes_after")  # fields of a report


def to_json(body: Mapping[str, object]) -> str:
    """Indented JSON text with each list of numbers on one line."""
    return NUMBERS.sub(_on_one_line, json_text(body))


def _on_one_line(found: re.Match[str]) -> str:
    return re.sub(r"\s+", " ", found[0]).replace("[ ", "[").replace(" ]", "]")
