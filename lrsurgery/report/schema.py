"""The rank report: one row a layer, one JSON that everything else is drawn from (design, section 7)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from pathlib import Path
from statistics import median

import torch
from typing_extensions import TypedDict

from lrsurgery.checkpoints.source import SourceOptions
from lrsurgery.errors import SourceError
from lrsurgery.files.digests import REPORT, FileDigest
from lrsurgery.files.json import Json, json_text, read_json
from lrsurgery.linalg.spectrum import EffectiveRanks, Points, predicted_damage
from lrsurgery.linalg.subspaces import Angles, Overlap, Shared
from lrsurgery.report.runs import Run
from lrsurgery.runtime import DTYPES
from lrsurgery.surgery.kinds import KINDS
from lrsurgery.surgery.plan import SurgeryOptions
from lrsurgery.surgery.ranks import break_even_rank

# Older versions are read too. Version 3 had no digests of files, version 2 nothing of calibration, budgets or balance
# either, version 1 nor FLOPs, spectra, overlaps and ladders.
FORMAT_VERSION = 4
FILE_NAME = REPORT
HIGH_DAMAGE = 2.0  # times the median of the model's layers
NUMBERS = re.compile(r"\[\n[-+.\deE,\s]+\]")  # a list of numbers in indented JSON; no string holds a line break


@dataclass(frozen=True)
class Rung:
    """What one rank would keep, lose and save of a layer or a whole model, predicted from the spectrum."""

    rank: str  # as --rank takes it
    to: int | None  # rank of the layer, None where it stays dense; of a model, the number of layers factorised
    parameters: int
    energy_kept: float
    relative_error: float  # ||W - W_r||_F / ||W||_F
    damage: float  # see `predicted_damage`


@dataclass(frozen=True)
class Row:
    """One layer. Errors are relative to the dense weight's own norm; None where a value is not known."""

    name: str
    kind: str
    shape: tuple[int, ...]
    status: str  # "factorised" or "dense"
    reason: str | None  # why it stays dense
    full_rank: int | None
    rank: int | None
    parameters_before: int
    parameters_after: int | None  # None in a plan whose rank waits for the singular values
    _: KW_ONLY
    energy_kept: float | None = None  # share of the dense weight's squared norm within the factors' subspaces
    relative_error: float | None = None  # ||W - U V||_F / ||W||_F, of the factors as stored
    spectral_error: float | None = None  # largest singular value left out / largest; measured: ||W - U V||_2 / ||W||_2
    before: EffectiveRanks | None = None
    after: EffectiveRanks | None = None
    flops_before: int | None = None  # of a token, or of a position of a convolution's output: 2 a multiply-add
    flops_after: int | None = None
    spectrum_before: Points | None = None
    spectrum_after: Points | None = None
    overlap: Overlap | None = None  # of the dense and the factorised leading directions
    ladder: tuple[Rung, ...] | None = None
    weighted_error: float | None = None  # ||G^(1/2) (W - U V) C^(1/2)||_F / ||G^(1/2) W C^(1/2)||_F, G and C calibrated
    predicted_loss: float | None = None  # predicted increase of the loss (nats); None without Fisher statistics
    balance: float | None = None  # ||U^T U - V V^T||_F / ||U^T U||_F; 0 right after surgery

    @property
    def break_even(self) -> int | None:
        """The largest rank that saves parameters; None for a layer that has no factorised form."""
        if self.full_rank is None:
            return None
        return break_even_rank(*KINDS[self.kind].matrix_shape(torch.Size(self.shape)))

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
    def from_dict(body: Json) -> Row:
        """The row of a JSON object. Raises TypeError or KeyError where it holds anything else."""
        given = {f.name: body[f.name] for f in fields(Row) if f.name in body}
        for key in ("before", "after"):
            given[key] = EffectiveRanks(**body[key]) if body.get(key) else None
        for key in ("spectrum_before", "spectrum_after"):
            given[key] = Points(tuple(body[key]["index"]), tuple(body[key]["value"])) if body.get(key) else None
        if body.get("ladder") is not None:
            given["ladder"] = tuple(Rung(**rung) for rung in body["ladder"])
        if body.get("overlap"):
            sides = {side: Angles(**body["overlap"][side]) for side in ("output", "input")}
            given["overlap"] = Overlap(**sides, leading=tuple(Shared(**s) for s in body["overlap"]["leading"]))
        return Row(**{**given, "shape": tuple(body["shape"])})


class BenchModel(TypedDict):
    """A model whose speed was measured."""

    name: str
    parameters: int
    bytes: int | None  # of its weight files
    peak_memory: int | None  # bytes; None where this system does not tell


class BenchFigures(TypedDict):
    """Times of one model at one setting."""

    flops: int
    median_ms: float
    p95_ms: float
    throughput: float  # units a second


class BenchCertainty(TypedDict):
    """How much faster, and how surely."""

    speedup: float | None
    interval: list[float] | None  # of the speedup, at `confidence`
    confidence: float
    rounds: int
    reached: bool  # whether the interval got as narrow as was asked for


class BenchRun(BenchFigures, BenchCertainty):
    """One kind of work at one batch size and length."""

    work: str
    batch: int
    length: int
    unit: str
    against: BenchFigures | None
    ideal: float | None  # speedup by FLOPs alone


class BenchLayer(BenchCertainty):
    """Factorised layers of one shape, rank and input against their dense form."""

    names: list[str]
    kind: str
    shape: list[int]
    rank: int
    input: list[int]
    dense_ms: float
    factorised_ms: float
    slower: bool


class Bench(TypedDict):
    """bench.json, as `lrsurgery bench --save` writes it."""

    format_version: int
    command: str | None
    versions: dict[str, str]
    machine: Json
    options: Json
    task: str
    model: BenchModel
    against: BenchModel | None
    runs: list[BenchRun]
    layers: list[BenchLayer]
    notes: list[str]


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
    loss_check: Json | None = None  # of the quick check after surgery; `text` is its line for people
    files: dict[str, FileDigest] = field(default_factory=dict)  # the folder's others, as they were written

    @property
    def factorised(self) -> tuple[Row, ...]:
        """The rows of factorised layers."""
        return tuple(row for row in self.rows if row.status == "factorised")

    @property
    def dense(self) -> tuple[Row, ...]:
        """The rows of layers that stay dense."""
        return tuple(row for row in self.rows if row.status == "dense")

    @property
    def predicted_loss(self) -> float | None:
        """Predicted increase of the loss (nats): the sum over the layers, as if they did not affect each other."""
        known = [row.predicted_loss for row in self.factorised if row.predicted_loss is not None]
        return sum(known) if known else None

    @staticmethod
    def read(folder: Path) -> Report:
        """The report in a folder. Raises SourceError where it is missing, damaged or newer than this version reads."""
        file = folder / FILE_NAME
        if not file.is_file():
            raise SourceError(f"{folder}: no {FILE_NAME} in it; lrsurgery factorise writes one")
        body = read_json(file, "a rank report")
        try:
            if body["format_version"] > FORMAT_VERSION:
                raise SourceError(f"{file}: report format {body['format_version']} is newer than this lrsurgery reads")
            return Report.from_dict(body)
        except (ValueError, KeyError, TypeError) as e:
            raise SourceError(f"{file}: not a rank report ({e!r})") from e

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
            "loss_check": self.loss_check,
            "files": self.files,
            "layers": layers,
        }

    @staticmethod
    def from_dict(body: Json) -> Report:
        """The report of a JSON object, of this version or an older. Raises TypeError or KeyError where it is none."""
        given = {f.name: body[f.name] for f in fields(Report) if f.name in body}
        given |= {name: (body["totals"] or {}).get(name) for name in TOTALS}
        if body.get("ladder") is not None:
            names = [f.name for f in fields(Rung)]
            given["ladder"] = tuple(
                Rung(**{name: rung["layers" if name == "to" else name] for name in names}) for rung in body["ladder"]
            )
        rows = tuple(Row.from_dict(row) for row in body["layers"])
        lists = {name: tuple(body.get(name, ())) for name in ("notes", "training")}
        return Report(**{**given, **lists, "rows": rows, "parameters_before": given["parameters_before"] or 0})

    def _totals(self) -> Json:
        before, after = self.parameters_before, self.parameters_after
        return {
            "layers_factorised": len(self.factorised),
            "layers_dense": len(self.dense),
            "parameters_before": before,
            "parameters_after": after,
            "share": None if after is None or not before else after / before,
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
        share = rung.parameters / self.parameters_before
        return {"rank": body.pop("rank"), "layers": body.pop("to"), "share": share, **body}


TOTALS = ("parameters_before", "parameters_after", "bytes_before", "bytes_after")  # fields of a report


def to_json(body: Mapping[str, object]) -> str:
    """Indented JSON text with each list of numbers on one line."""
    return NUMBERS.sub(_on_one_line, json_text(body))


def _on_one_line(found: re.Match[str]) -> str:
    return re.sub(r"\s+", " ", found[0]).replace("[ ", "[").replace(" ]", "]")


def recorded_options(
    surgery: SurgeryOptions,
    source: SourceOptions | None = None,
    dtype: torch.dtype | None = None,
    calibration: Json | None = None,
) -> Json:
    """The options that decide the result of surgery, as a report records them; `dtype` None keeps each tensor's own."""
    budget = surgery.budget
    return {
        "rank": None if budget is not None else str(surgery.target),
        "budget": None if budget is None else str(budget),
        "init": surgery.init,
        "conv": surgery.conv,
        "include": list(surgery.include),
        "exclude": list(surgery.exclude),
        "allow_larger": surgery.allow_larger,
        "multiple_of": surgery.target.multiple_of,
        "seed": surgery.seed,
        "from_scratch": source is not None and source.from_scratch_seed is not None,
        "dtype": next(name for name, known in DTYPES.items() if known == dtype),
        "min_speedup": surgery.min_speedup,
        "svd": surgery.svd,
        "calibration": calibration,
    }
