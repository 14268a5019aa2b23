"""The rank report: one row a layer, one JSON that everything else is drawn from (design, section 7)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lrsurgery.errors import SourceError
from lrsurgery.linalg.spectrum import EffectiveRanks, Points, predicted_damage
from lrsurgery.linalg.subspaces import Angles, Overlap, Shared
from lrsurgery.surgery.kinds import KINDS
from lrsurgery.surgery.ranks import break_even_rank

# 2, which is read too, had nothing of calibration, budgets or balance; 1 no FLOPs, spectra, overlaps or ladders either
FORMAT_VERSION = 3
FILE_NAME = "rank_report.json"
HIGH_DAMAGE = 2.0  # times the median of the model's layers


@dataclass(frozen=True)
class Rung:
    """What one rank would keep, lose and save, of a layer or a whole model; from the spectrum alone, before surgery."""

    rank: str  # as --rank takes it
    to: int | None  # the layer's rank, None where it stays dense; of a model, the number of layers factorised
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
    reason: str | None  # why it stayed dense
    full_rank: int | None
    rank: int | None
    parameters_before: int
    parameters_after: int | None  # None in a plan whose rank waits for the singular values
    energy_kept: float | None = None  # share of the dense weight's squared norm in the factors' subspaces
    relative_error: float | None = None  # ||W - U V||_F / ||W||_F, from the factors as stored
    spectral_error: float | None = None  # largest singular value left out / largest of all
    before: EffectiveRanks | None = None
    after: EffectiveRanks | None = None
    flops_before: int | None = None  # of a token, or of a position of a conv's output: 2 a multiply-add
    flops_after: int | None = None
    spectrum_before: Points | None = None
    spectrum_after: Points | None = None
    overlap: Overlap | None = None  # of the dense and the factorised leading directions
    ladder: tuple[Rung, ...] | None = None
    weighted_error: float | None = None  # ||G^(1/2) (W - U V) C^(1/2)||_F, relative to W's, in calibration's metric
    predicted_loss: float | None = None  # what the layer adds to the loss, to second order: nats a token or image
    balance: float | None = None  # ||U^T U - V V^T||_F / ||U^T U||_F; 0 as surgery leaves it

    @property
    def break_even(self) -> int | None:
        """The largest rank that saves parameters; None for a layer that has no factorised form."""
        return (
            None if self.full_rank is None else break_even_rank(*KINDS[self.kind].matrix_shape(torch.Size(self.shape)))
        )

    @property
    def damage(self) -> float | None:
        """`predicted_damage` of what was done or is planned."""
        if self.status == "dense" or self.parameters_after is None or self.before is None:
            return None
        return predicted_damage(self.parameters_before, self.parameters_after, self.before.stable)

    def to_dict(self) -> dict[str, Any]:
        """The row's JSON object, with what follows from its fields."""
        body = asdict(self)
        if self.overlap is not None:  # named tuples would become bare lists
            sides = {"output": self.overlap.output._asdict(), "input": self.overlap.input._asdict()}
            body["overlap"] = {**sides, "leading": [share._asdict() for share in self.overlap.leading]}
        return {**body, "break_even": self.break_even, "damage": self.damage}

    @staticmethod
    def from_dict(body: Mapping[str, Any]) -> Row:
        """From its JSON object. Raises TypeError or KeyError where it is none."""
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


@dataclass(frozen=True)
class Report:
    """Rows and what made them."""

    rows: tuple[Row, ...]
    parameters_before: int  # of the whole model, tied tensors once
    parameters_after: int | None
    bytes_before: int | None = None  # of the weights in the files
    bytes_after: int | None = None
    source: dict[str, Any] = field(default_factory=dict)  # reference, revision, digest of the tensors
    command: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    about: str = "factorised"  # or "plan": what would be done; "dense": nothing; "runs": only training is looked at
    name: str | None = None  # the model's, or its folder's
    ladder: tuple[Rung, ...] | None = None  # of the whole model
    training: tuple[dict[str, Any], ...] = ()  # runs, as `history.read_run` gives them
    bench: dict[str, Any] | None = None  # what `lrsurgery bench --save` wrote
    calibration: dict[str, Any] | None = None  # the metric, the data and how much of it

    @property
    def factorised(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == "factorised")

    @property
    def dense(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == "dense")

    def to_dict(self) -> dict[str, Any]:
        """The JSON object (design, section 7)."""
        body = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rows", "ladder", *TOTALS)}
        layers = [row.to_dict() for row in self.rows]
        usual = median([row["damage"] for row in layers if row["damage"] is not None] or [0.0])
        for row in layers:
            row["damage_high"] = None if row["damage"] is None else row["damage"] > HIGH_DAMAGE * usual
        ladder = None if self.ladder is None else [_model_rung(rung, self.parameters_before) for rung in self.ladder]
        return {
            "format_version": FORMAT_VERSION, "about": body.pop("about"), "name": body.pop("name"),
            "totals": self._totals(), "ladder": ladder, **body, "layers": layers,
        }  # fmt: skip

    def _totals(self) -> dict[str, Any] | None:
        if self.about == "runs":
            return None
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

    @property
    def predicted_loss(self) -> float | None:
        """What surgery adds to the loss, to second order and as if layers did not disturb each other."""
        known = [row.predicted_loss for row in self.factorised if row.predicted_loss is not None]
        return sum(known) if known else None

    def _flops(self) -> dict[str, int | None]:
        """Sums over the layers, for models that apply each of them to every token."""
        known = [row for row in self.rows if row.flops_before is not None]
        if not known or not all(row.kind in KINDS and KINDS[row.kind].takes_tokens for row in known):
            return {"flops_before": None, "flops_after": None}
        after = [row.flops_after for row in known]
        whole = sum(row.flops_before or 0 for row in known)
        return {"flops_before": whole, "flops_after": None if None in after else sum(n or 0 for n in after)}

    def to_json(self) -> str:
        return to_json(self.to_dict())

    @staticmethod
    def read(folder: Path) -> Report:
        """The report in a folder. Raises SourceError where there is none, or it is damaged or newer than this."""
        file = folder / FILE_NAME
        try:
            body = json.loads(file.read_text(encoding="utf-8"))
            if body["format_version"] > FORMAT_VERSION:
                raise SourceError(f"{file}: report format {body['format_version']} is newer than this lrsurgery reads")
            return Report.from_dict(body)
        except FileNotFoundError as e:
            raise SourceError(f"{folder}: no {FILE_NAME} in it") from e
        except (ValueError, KeyError, TypeError) as e:
            raise SourceError(f"{file}: not a rank report ({e!r})") from e

    @staticmethod
    def from_dict(body: Mapping[str, Any]) -> Report:
        """From its JSON object of this version or an older one. Raises TypeError or KeyError where it is none."""
        given = {f.name: body[f.name] for f in fields(Report) if f.name in body}
        given |= {name: (body["totals"] or {}).get(name) for name in TOTALS}
        if body.get("ladder") is not None:
            names = [f.name for f in fields(Rung)]
            given["ladder"] = tuple(
                Rung(**{n: rung["layers" if n == "to" else n] for n in names}) for rung in body["ladder"]
            )
        rows = tuple(Row.from_dict(row) for row in body["layers"])
        lists = {name: tuple(body.get(name, ())) for name in ("notes", "training")}
        return Report(**{**given, **lists, "rows": rows, "parameters_before": given["parameters_before"] or 0})


TOTALS = ("parameters_before", "parameters_after", "bytes_before", "bytes_after")  # fields of a report


def _model_rung(rung: Rung, before: int) -> dict[str, Any]:
    body = asdict(rung)
    return {"rank": body.pop("rank"), "layers": body.pop("to"), "share": rung.parameters / before, **body}


def to_json(body: Mapping[str, Any]) -> str:
    """Indented, with a list of numbers on one line. (A string of JSON holds no line break that could be taken out.)"""
    text = json.dumps(body, indent=2)
    return (
        re.sub(
            r"\[\n[-+.\deE,\s]+\]",
            lambda found: re.sub(r"\s+", " ", found[0]).replace("[ ", "[").replace(" ]", "]"),
            text,
        )
        + "\n"
    )
