"""Blocks that a refinement has finished, as pieces in a work folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from lrsurgery.files.pieces import Piece, load_piece, save_piece
from lrsurgery.refine.reconstruction import Fit
from lrsurgery.refine.streams import Pair
from lrsurgery.report.rows import refitted_row
from lrsurgery.report.schema import Report, Row
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.parameters.views import dense_layers


class BlockPieces:
    """Finished blocks in a folder: a block's tensors, and the rows of its layers."""

    def __init__(self, folder: Path, owner: str, report: Report, *, writes: bool = True) -> None:
        self._folder, self._owner, self._writes = folder, owner, writes
        self._known = {row.name: row for row in report.rows}
        self._last: tuple[str, dict[str, Tensor]] = "", {}
        self._blocks: list[str] = []
        self.outer = ""  # what names in the model that runs have in front
        self.rows: dict[str, Row] = {}

    def read(self, name: str) -> tuple[dict[str, Tensor], Fit] | None:
        piece = load_piece(self._folder / f"{name}.safetensors")
        if piece is None or piece.facts.get("owner") != self._owner:
            return None
        self.rows |= {row["name"]: Row.from_dict(row) for row in piece.facts["rows"]}
        self._blocks.append(name)
        return piece.tensors, Fit(**piece.facts["fit"])

    def write(self, pair: Pair, tensors: Mapping[str, Tensor], fit: Fit) -> None:
        others = dense_layers(pair.dense)
        rows: dict[str, Row] = {}
        for name, layer in factorised_layers(pair.compressed).items():
            full = f"{pair.name}.{name}".rstrip(".").removeprefix(self.outer)
            if full in self._known and name in others and fit.after < fit.before:
                rows[full] = refitted_row(self._known[full], others[name], layer)
        if not self._writes:
            return
        facts = {"owner": self._owner, "fit": asdict(fit), "rows": [row.to_dict() for row in rows.values()]}
        save_piece(self._folder / f"{pair.name}.safetensors", Piece(facts, dict(tensors)))
        self.rows |= rows
        self._blocks.append(pair.name)

    def value(self, key: str) -> Tensor | None:
        """The new value of a state-dict key of the checkpoint's model; None if it is in no block."""
        name = f"{self.outer}{key}"
        block = next((each for each in self._blocks if name.startswith(f"{each}.")), None)
        if block is None:
            return None
        if self._last[0] != block:
            piece = load_piece(self._folder / f"{block}.safetensors")
            assert piece is not None, block
            self._last = block, piece.tensors
        return self._last[1].get(name.removeprefix(f"{block}."))
