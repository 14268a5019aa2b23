"""Statistics of a calibrated model: second moments of each layer's inputs and output gradients, kept as a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from torch import Tensor

from lrsurgery.errors import CalibrationError
from lrsurgery.files import Json, Piece, json_text, load_piece, piece_digest, read_json, replace_file, save_piece
from lrsurgery.linalg.weighted import Metric, damp
from lrsurgery.surgery.plan import Replacement

FORMAT = 1
FILE_NAME = "statistics.json"
# What is added to the diagonals at the least, as shares of their means. Inputs: directions that no sample showed keep a
# little weight. Gradients: rare ones are known badly. (Measured in examples/benchmarks/calibration.py.)
DAMPING = {"inputs": 1e-3, "gradients": 1e-2}
# With few samples a moment is known badly, and the worse the more directions it has (as in Ledoit & Wolf 2004).
SCARCE = {"inputs": 0.5, "gradients": 1.0}


def damping(of: str, size: int, positions: int) -> float:
    """The share of its mean diagonal entry to add to a moment (size, size) of so many positions.

    It goes with (size / positions)^2, which leaves alone what is known well, and is 1 at the most.
    """
    return min(1.0, max(DAMPING[of], (SCARCE[of] * size / max(1, positions)) ** 2))


@dataclass(frozen=True)
class LayerUse:
    """What one layer was seen doing."""

    kind: str
    rows: int
    columns: int
    positions: int  # inputs of its matrix: tokens, or places of a convolution (of v's if it is spatial); 0: not used
    outputs: int  # tokens, or positions of a convolution's output


@dataclass(frozen=True)
class Moments:
    """Second moments of one layer, of the matrix (rows, columns) that its kind stands for."""

    inputs: Tensor  # (columns, columns), the mean of x x^T over positions
    gradients: Tensor | None  # (rows, rows), the sum of g g^T over positions, for each token or image that was scored

    def metric(self, seen: LayerUse) -> Metric:
        """The metric to factorise in, of a layer that was seen so often."""
        inputs = damp(self.inputs, damping("inputs", seen.columns, seen.positions))
        if self.gradients is None or not bool(self.gradients.any()):
            return Metric(inputs)
        return Metric(inputs, damp(self.gradients, damping("gradients", seen.rows, seen.positions)))


class Statistics:
    """The moments of a model's layers, in memory or read from a folder one layer at a time."""

    def __init__(
        self,
        uses: Mapping[str, LayerUse],
        facts: Json,
        read: Callable[[str], Moments],
        digests: Mapping[str, str] | None = None,
    ) -> None:
        self.uses, self.facts, self._read = dict(uses), dict(facts), read
        self.digests = dict(digests or {})  # of what is in the files

    @property
    def has_gradients(self) -> bool:
        return bool(self.facts["metric"] == "fisher")

    def moments(self, name: str) -> Moments:
        """Those of one layer."""
        return self._read(name)

    def metric(self, name: str) -> Metric | None:
        """The metric of one layer; None for a layer that was given no input, of which nothing is known."""
        seen = self.uses[name]
        return self.moments(name).metric(seen) if seen.positions else None

    def without_gradients(self) -> Statistics:
        """The same with the inputs' moments alone, as the metric activations has them."""
        digests = {name: f"{digest}-inputs" for name, digest in self.digests.items()}
        facts = {**self.facts, "metric": "activations"}
        return Statistics(self.uses, facts, lambda name: replace(self._read(name), gradients=None), digests)

    def unseen(self) -> list[str]:
        """Layers that no sample went through, such as experts that were not chosen."""
        return [name for name, seen in self.uses.items() if not seen.positions]

    def check_for(self, rows: Iterable[Replacement], where: str = "the statistics") -> None:
        """Raises CalibrationError where they are of another model, or of another scheme of its convolutions."""
        for row in rows:
            seen = self.uses.get(row.name)
            if seen is None:
                raise CalibrationError(f"{where}: nothing of {row.name} is in them; take them anew, or --exclude it")
            if seen.kind != row.kind:
                raise CalibrationError(
                    f"{where}: {row.name} was seen as {seen.kind} and is to become {row.kind}; give the same --conv"
                )
            if (seen.rows, seen.columns) != (row.rows, row.columns):
                raise CalibrationError(
                    f"{where}: {row.name} was ({seen.rows}, {seen.columns}) and is ({row.rows}, {row.columns}) here:"
                    " they are of another model"
                )

    @staticmethod
    def read(folder: Path) -> Statistics:
        """What `StatisticsWriter` wrote. Raises CalibrationError where it is missing or damaged."""
        if not (folder / FILE_NAME).exists():
            raise CalibrationError(f"{folder}: no {FILE_NAME} in it; --save-statistics writes such a folder")
        try:
            body = read_json(folder / FILE_NAME, "statistics", CalibrationError)
            if body["format_version"] > FORMAT:
                raise CalibrationError(f"{folder}: format {body['format_version']} is newer than this lrsurgery reads")
            layers, facts = body["layers"], body["facts"]
            seen = {name: _seen_of(layer) for name, layer in layers.items()}
            digests = {name: layer["digest"] for name, layer in layers.items()}
            files = {name: str(layer["file"]) for name, layer in layers.items()}
        except (ValueError, KeyError, TypeError) as e:
            if isinstance(e, CalibrationError):
                raise
            raise CalibrationError(f"{folder / FILE_NAME}: not statistics ({e!r})") from e

        def read(name: str) -> Moments:
            return _moments_in(folder / files[name], digests[name])

        return Statistics(seen, facts, read, digests)


def _seen_of(layer: Json) -> LayerUse:
    return LayerUse(**{field.name: layer[field.name] for field in fields(LayerUse)})


def _moments_in(file: Path, digest: str) -> Moments:
    piece = load_piece(file)
    if piece is None or piece.facts != {"digest": digest}:
        raise CalibrationError(f"{file}: damaged, or of other statistics; take them anew")
    return Moments(piece.tensors["inputs"], piece.tensors.get("gradients"))


def added(one: tuple[LayerUse, Moments], other: tuple[LayerUse, Moments]) -> tuple[LayerUse, Moments]:
    """What a layer was seen doing on two occasions: means weighed by their positions, sums added."""
    (seen, moments), (more, others) = one, other
    positions = seen.positions + more.positions
    inputs = (moments.inputs * seen.positions + others.inputs * more.positions) / max(1, positions)
    gradients = None
    if moments.gradients is not None and others.gradients is not None:
        gradients = moments.gradients + others.gradients
    return replace(seen, positions=positions, outputs=seen.outputs + more.outputs), Moments(inputs, gradients)


class StatisticsWriter:
    """Puts layers into a folder as they become known; the folder can be read once `finish` has been called."""

    def __init__(self, folder: Path, named: Mapping[str, str] | None = None) -> None:
        """With `named`, names in files -> names that layers are added under."""
        self._folder, self._layers, self._files = folder, dict[str, Json](), 0
        self._original = {new: old for old, new in (named or {}).items()}

    def __contains__(self, name: str) -> bool:
        return self._original.get(name, name) in self._layers

    def add(self, name: str, seen: LayerUse, moments: Moments) -> None:
        """Keep what was seen of one layer, together with what was kept of it before."""
        name = self._original.get(name, name)
        if name in self._layers:
            former = self._layers.pop(name)
            kept = _moments_in(self._folder / former["file"], former["digest"])
            seen, moments = added((_seen_of(former), kept), (seen, moments))
        file = f"{self._files:05d}.safetensors"
        self._files += 1
        tensors = {"inputs": moments.inputs}
        if moments.gradients is not None:
            tensors["gradients"] = moments.gradients
        found = piece_digest(name, {key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
        save_piece(self._folder / file, Piece({"digest": found}, tensors))
        self._layers[name] = {**asdict(seen), "file": file, "digest": found}

    def finish(self, facts: Json) -> Statistics:
        body = {"format_version": FORMAT, "facts": dict(facts), "layers": self._layers}
        replace_file(self._folder / FILE_NAME, json_text(body))
        return Statistics.read(self._folder)
