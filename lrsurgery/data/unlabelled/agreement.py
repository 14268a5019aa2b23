"""Agreement of a model with a teacher: which of their outputs are compared, and by which loss.

Training and `evaluate` both go by this file. To change what an output is compared by: `_how`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div, log_softmax, logsigmoid

from lrsurgery.data.batches import Batch
from lrsurgery.data.interfaces.wrapped import MULTI, REGRESSION
from lrsurgery.data.text.padding import without_padding
from lrsurgery.errors import SourceError
from lrsurgery.modules import for_model

KL, BINARY, MSE, COSINE = "kl", "binary", "mse", "cosine"
WORDS = {
    KL: "KL",
    BINARY: "KL of each class by itself",
    MSE: "relative squared error",
    COSINE: "cosine",
}
# outputs that are on the way to others, or made of others for the sake of a loss
ON_THE_WAY = ("attentions", "hidden_states", "past_key_values", "loss", "reference_points", "_coord_logits")
ON_THE_WAY_FIRST = ("intermediate_", "init_", "enc_outputs_", "mems", "denoising_")
# one row of these for each example and output: divergence (nats), hits, squared error, squared teacher, cosine, items
COLUMNS = 6
SLICES = 1 << 26  # numbers of an output at a time, when measuring


@dataclass(frozen=True)
class Output:
    """One output of a model that is compared with the teacher's."""

    name: str
    how: str  # a key of `WORDS`
    axis: int  # of the classes, or of the vectors' entries
    width: int  # along that axis
    mask: str  # the input that tells which positions count, where it has one for each


@dataclass(frozen=True)
class Agreement:
    """What is compared; the loss of a batch; the figures of a set."""

    outputs: tuple[Output, ...]
    left_out: tuple[str, ...] = ()  # outputs that are not compared

    @property
    def note(self) -> str:
        """What is compared and how, for the user."""
        said = ", ".join(f"{each.name} by {WORDS[each.how]}" for each in self.outputs)
        rest = f"; not compared: {', '.join(self.left_out)}" if self.left_out else ""
        return f"without labels: the model's outputs are compared with the teacher's, {said}{rest}"

    def loss(self, ours: Any, theirs: Any, batch: Batch, temperature: float) -> Tensor:
        """The mean over the outputs of each one's loss on the batch.

        KL: T^2 KL(teacher || ours) at temperature T, a mean over positions (Hinton et al. 2015, arXiv 1503.02531).
        Relative squared error: ||ours - teacher||^2 / ||teacher||^2, each a sum over the batch. Cosine: 1 - cos, a mean
        over vectors. Positions outside of the mask do not count.
        """
        ours, theirs = tensors_of(ours), tensors_of(theirs)
        losses = []
        for each in self.outputs:
            sums = _rows(each, ours[each.name], theirs[each.name], batch, temperature, measures=False).sum(0)
            losses.append(_loss(each, sums))
        return torch.stack(losses).mean()

    def measure(self, ours: Any, theirs: Any, batch: Batch) -> Tensor:
        """Measure each example, in fp64 (batch, outputs * COLUMNS), so that `summarise` can add up any batches."""
        ours, theirs = tensors_of(ours), tensors_of(theirs)
        found = []
        for each in self.outputs:
            s, t = ours[each.name], theirs[each.name]
            # in slices of examples, since a divergence takes several copies of its logits
            size = max(1, SLICES // max(1, s[0].numel()))
            parts = [
                _rows(each, s[i : i + size], t[i : i + size], {k: v[i : i + size] for k, v in batch.items()}, 1.0)
                for i in range(0, len(s), size)
            ]
            found.append(torch.cat(parts))
        return torch.cat(found, dim=-1)

    def measure_batch(
        self, model: nn.Module, answers: Callable[[Batch], Any], body: nn.Module, batch: Batch, *, whole: bool = False
    ) -> Tensor:
        """Measure each example of a batch, of which the teacher gives `answers`; `body` tells what the model takes.

        Without padding, unless the model has a decoder or `whole` says so.
        """
        whole = whole or any(name.startswith("decoder_") for name in batch)
        parts = [(torch.arange(len(next(iter(batch.values())))), batch)] if whole else without_padding(batch, body)
        places, found = [], []
        for place, part in parts:
            places.append(place)
            found.append(self.measure(run(model, body, part), answers(part), part))
        return torch.cat(found)[torch.cat(places).argsort()]

    def summarise(self, rows: Tensor) -> dict[str, float]:
        """Compute the figures of a whole set from the rows (examples, outputs * COLUMNS) of `measure`.

        `loss` is that of training at temperature 1; `kl`, `top1`, `cosine` and `relative_mse` are means over the
        outputs that have them. With several outputs each one's own stand beside them, as `NAME.cosine`. `scored`
        counts examples.
        """
        if not len(rows):
            return {}
        sums = rows.double().sum(0).view(len(self.outputs), COLUMNS)
        each = [_figures(output, row) for output, row in zip(self.outputs, sums, strict=True)]
        losses = [float(_loss(output, row)) for output, row in zip(self.outputs, sums, strict=True)]
        found = {"loss": sum(losses) / len(losses), "scored": float(len(rows))}
        for name in ("kl", "top1", "cosine", "relative_mse"):
            values = [figures[name] for figures in each if name in figures]
            if values:
                found[name] = sum(values) / len(values)
        if len(self.outputs) > 1:
            for output, figures in zip(self.outputs, each, strict=True):
                found |= {f"{output.name}.{name}": value for name, value in figures.items()}
        return found


def run(model: nn.Module, body: nn.Module, batch: Batch) -> Any:
    """The outputs of a model, perhaps wrapped for several devices, for a batch; `body` tells what it takes."""
    return model(**for_model(body, batch))


@torch.no_grad()
def find_agreement(model: nn.Module, teacher: nn.Module, batch: Batch, who: str) -> Agreement:
    """Run both models on a batch, and choose what is compared.

    Raises SourceError where the teacher `who` has no output in common with the model, or one of another shape.
    """
    size = len(next(iter(batch.values())))
    (ours, more), (theirs, _) = (_comparable(run(each, each, batch), size) for each in (model, teacher))
    names = [name for name in ours if name in theirs]
    if not names:
        raise SourceError(
            f"{who}: returns {', '.join(theirs) or 'no tensor for each example'}, and the model"
            f" {', '.join(ours) or 'none'}; nothing can be compared"
        )
    for name in names:
        if ours[name].shape != theirs[name].shape:
            shapes = f"{tuple(theirs[name].shape[1:])}, the model's {tuple(ours[name].shape[1:])}"
            raise SourceError(f"{who}: its {name} has the shape {shapes}; they must be the same")
    config = getattr(model, "config", None)
    has_boxes = "pred_boxes" in ours
    decodes = bool(getattr(config, "is_encoder_decoder", False))
    found = []
    for name in names:
        how, axis = _how(name, ours[name], config, has_boxes)
        mask = "decoder_attention_mask" if decodes and not name.startswith("encoder_") else "attention_mask"
        found.append(Output(name, how, axis, ours[name].shape[axis] if ours[name].ndim > 1 else 1, mask))
    return Agreement(tuple(found), tuple(dict.fromkeys([*more, *(name for name in ours if name not in theirs)])))


def tensors_of(outputs: Any) -> dict[str, Tensor]:
    """The tensors of a model's outputs by name; `NAME.0`, ... of a tuple of maps."""
    return dict(_named(outputs))


def _named(outputs: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(outputs, Tensor):
        yield "output", outputs
        return
    if not isinstance(outputs, Mapping):
        outputs = {"output": outputs}
    for name, value in outputs.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, list | tuple):
            yield from ((f"{name}.{i}", each) for i, each in enumerate(value) if isinstance(each, Tensor))


def _comparable(outputs: Any, size: int) -> tuple[dict[str, Tensor], list[str]]:
    """The outputs of each example that are worth comparing, and the names of similarities between examples."""
    every = tensors_of(outputs)
    embeds = any(name.endswith("embeds") for name in every)
    # these follow from the embeddings, and go by what else is in the batch
    similarities = [name for name in every if embeds and name.startswith("logits_per_")]
    kept = {
        name: tensor
        for name, tensor in every.items()
        if name not in similarities
        and tensor.is_floating_point()
        and tensor.ndim
        and len(tensor) == size
        and tensor.numel()
        and not any(part in name for part in ON_THE_WAY)
        and not name.startswith(ON_THE_WAY_FIRST)
    }
    return kept, similarities


def _how(name: str, tensor: Tensor, config: Any, has_boxes: bool) -> tuple[str, int]:
    """By which loss an output is compared, and along which axis."""
    if name.endswith("embeds"):
        return COSINE, -1
    axis = 1 if tensor.ndim == 4 else -1  # (batch, channels, height, width)
    if "logits" not in name:
        return MSE, axis
    width = tensor.shape[axis] if tensor.ndim > 1 else 1
    problem = getattr(config, "problem_type", None)
    if "mask" in name and tensor.ndim == 4:  # (batch, queries, height, width)
        return BINARY, axis
    if problem == REGRESSION or (width == 1 and tensor.ndim < 4):  # a reward, which a softmax would lose
        return MSE, axis
    # a detector without a class for "nothing" has a sigmoid for each class
    independent = has_boxes and width == getattr(config, "num_labels", None)
    if problem == MULTI or width == 1 or independent:
        return BINARY, axis
    return KL, axis


def _rows(
    output: Output, ours: Tensor, theirs: Tensor, batch: Batch, temperature: float, *, measures: bool = True
) -> Tensor:
    """One row (batch, COLUMNS) for each example; of those columns that the loss needs, unless it `measures`."""
    s, t = (_vectors(tensor, output.axis) for tensor in (ours, theirs.detach()))
    wide = torch.float64 if measures else torch.float32
    counted = _counted(output, batch, s).to(wide)
    nothing = torch.zeros_like(counted)
    divergence = hits = squared = square = cosine = nothing
    if output.how == KL:
        ours_log, theirs_log = (log_softmax(x / temperature, dim=-1) for x in (s, t))
        divergence = kl_div(ours_log, theirs_log, reduction="none", log_target=True).sum(-1) * temperature**2
        hits = s.argmax(-1).eq(t.argmax(-1)) if measures else nothing
    elif output.how == BINARY:
        divergence = _binary(s / temperature, t / temperature).mean(-1) * temperature**2
        hits = (s > 0).eq(t > 0).to(wide).mean(-1) if measures else nothing
    if output.how in (MSE, COSINE) and (measures or output.how == MSE):
        squared, square = (s - t).square().sum(-1), t.square().sum(-1)
    if output.how in (MSE, COSINE) and (measures or output.how == COSINE):
        cosine = cosine_similarity(s, t, dim=-1)
    columns = (divergence, hits, squared, square, cosine, torch.ones_like(counted))
    return torch.stack([(column.to(wide) * counted).sum(-1) for column in columns], dim=-1)


def _vectors(tensor: Tensor, axis: int) -> Tensor:
    """In fp32 (batch, positions, entries)."""
    tensor = tensor.float()
    if tensor.ndim == 1:
        return tensor[:, None, None]
    tensor = tensor.movedim(axis, -1)
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _counted(output: Output, batch: Batch, vectors: Tensor) -> Tensor:
    mask = batch.get(output.mask)
    if mask is None or mask.shape != vectors.shape[:2]:
        return torch.ones(vectors.shape[:2], device=vectors.device)
    return mask.bool().to(vectors.device)


def _binary(s: Tensor, t: Tensor) -> Tensor:
    """KL(teacher || ours) of independent classes by their logits, elementwise."""
    p = t.sigmoid()
    return p * (logsigmoid(t) - logsigmoid(s)) + (1 - p) * (logsigmoid(-t) - logsigmoid(-s))


def _loss(output: Output, sums: Tensor) -> Tensor:
    """The loss of one output from the sums of its rows."""
    divergence, _, squared, square, cosine, count = sums.unbind()
    if output.how in (KL, BINARY):
        return divergence / count.clamp(min=1)
    if output.how == COSINE:
        return 1 - cosine / count.clamp(min=1)
    return squared / square.clamp(min=torch.finfo(torch.float32).tiny)


def _figures(output: Output, sums: Tensor) -> dict[str, float]:
    divergence, hits, squared, square, cosine, count = sums.tolist()
    if not count:
        return {}
    if output.how in (KL, BINARY):
        return {"kl": divergence / count, "top1": hits / count}
    error = squared / max(square, torch.finfo(torch.float32).tiny)
    # the cosine of two numbers is only their sign
    return {**({"cosine": cosine / count} if output.width > 1 else {}), "relative_mse": error}
