"""The dense-to-factorised switch: a checkpoint of dense training, made one of factorised training.

Kamalakara et al. 2022 (arXiv 2209.13569): train dense for a while, factorise by SVD, go on at half the learning rate.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import Trainer
from typing_extensions import TypedDict

from lrsurgery.checkpoints.mapping import tied_weights
from lrsurgery.data.tasks import Subject
from lrsurgery.errors import PlanError, RecipeError
from lrsurgery.factorise.memory import factorise_module_
from lrsurgery.factorise.options import parse_target
from lrsurgery.files.json import Json, json_text, read_json
from lrsurgery.linalg.factors import Factors
from lrsurgery.surgery.apply import factorised_layers, specs_of, swap_
from lrsurgery.surgery.layers import FactorisedLayer, Spec, factor_weights
from lrsurgery.surgery.parameters.views import dense_layers
from lrsurgery.surgery.plan import SurgeryOptions
from lrsurgery.surgery.ranks import PIVOTED
from lrsurgery.surgery.speed import plan_layers
from lrsurgery.training.blend import Blend
from lrsurgery.training.checkpoints import STATE, WEIGHTS, check_owner, mark_complete, read_state, step_of
from lrsurgery.training.forms import in_training
from lrsurgery.training.loop.trainer import LINEAR, SQUARED, Groups, parameter_groups
from lrsurgery.training.recipe import Recipe
from lrsurgery.training.run_folder import LAYERS, RunFolder

ParameterState: TypeAlias = dict[str, object]  # an optimizer's, of one parameter: tensors and numbers


class OptimizerState(TypedDict):
    """A torch optimizer's state dict."""

    state: dict[int, ParameterState]  # by the parameter's place in the groups
    param_groups: list[Json]


def surgery_of(recipe: Recipe) -> SurgeryOptions:
    """What a recipe with a rank asks of `factorise`. Raises RankError or SurgeryError for a value that none can do."""
    return SurgeryOptions(
        target=parse_target(recipe.rank, None, multiple_of=recipe.multiple_of),
        init=recipe.init,
        conv=recipe.conv,
        include=recipe.include,
        exclude=recipe.exclude,
        allow_larger=recipe.allow_larger,
        seed=recipe.seed,
        form=recipe.form or PIVOTED,
    )


def check_surgery(subject: Subject, recipe: Recipe) -> None:
    """Raises PlanError or RankError where the recipe's surgery does not fit the model."""
    body = subject.body
    plan_layers(body, surgery_of(recipe), tied=tied_weights(body), device=torch.device("cpu"))


def factorise_subject_(subject: Subject, recipe: Recipe, run: RunFolder | None) -> None:
    """Factorise a model within a run, and note in the run's folder which layers became what.

    Ranks are those of the form that is published; layers get the form that they train in.
    """
    factorise_module_(subject.body, surgery_of(recipe), change=lambda plan: in_training(plan, recipe.train_form))
    if run is not None:
        run.write_layers(specs_of(subject.body))


def give_structure_(subject: Subject, layers: Mapping[str, Spec]) -> None:
    """Put factorised layers into a dense model, with weights on the meta device.

    Raises PlanError for a layer that the model does not have, or a rank that it cannot have.
    """
    modules = dense_layers(subject.body)
    for name, (_, rank, *_) in layers.items():
        weight = getattr(modules.get(name), "weight", None)
        if isinstance(weight, Tensor) and not 1 <= rank <= weight.numel():
            raise PlanError(f"{name}: rank {rank} exceeds the full rank of {tuple(weight.shape)}")
    swap_(subject.body, layers)


def restore_structure_(
    subject: Subject, run: RunFolder, checkpoint: Path, complete: Callable[[], None] = lambda: None
) -> None:
    """Give a dense model the structure of a checkpoint of factorised training, whose weights are loaded next.

    `complete` adds what the checkpoint has beside the factors.

    Raises RecipeError if the run's layers or the checkpoint are another model's.
    """
    try:
        give_structure_(subject, run.read_layers())
    except PlanError as e:
        raise RecipeError(f"{run.path / LAYERS}: is of another model: {e}; start over with --overwrite") from e
    materialise_(subject)
    complete()
    check_owner(checkpoint, subject.model)


def materialise_(subject: Subject) -> None:
    """Give the factors memory, for weights that are loaded next."""
    for layer in factorised_layers(subject.body).values():
        layer.to_empty(device="cpu")


def switch_(
    subject: Subject, recipe: Recipe, dense: Path, run: RunFolder, leads: bool, note: Callable[[str], None]
) -> Path:
    """Factorise the model in place, in each process; the one that leads writes the checkpoint to go on from.

    Returns that checkpoint. `note` is told of layers whose optimizer state was reset.
    """
    before = parameter_groups(subject.model, recipe, _decayed(subject))
    factorise_subject_(subject, recipe, run if leads else None)
    after = parameter_groups(subject.model, recipe, _decayed(subject))
    target = run.path / "factorised" / dense.name
    if not leads:
        return target
    partial = target.with_name(f"partial-{step_of(dense)}")
    shutil.rmtree(partial, ignore_errors=True)
    reset = write_switched(dense, partial, subject.model, before, after, recipe.switch_lr)
    if reset:  # told before the mark, after which nothing of this is done again
        note(f"the optimizer's state of {len(reset)} factorised layers is not Adam's or SGD's; it was reset")
    partial.rename(target)
    mark_complete(target)
    return target


def end_blend_(subject: Subject, recipe: Recipe, blended: Path, run: RunFolder, leads: bool, blend: Blend) -> Path:
    """Drop the dense weights of self-guided training; the process that leads writes the checkpoint to go on from.

    Returns that checkpoint, whose weights, moments, schedule and random states are those of `blended`.
    """
    before = parameter_groups(subject.model, recipe, _decayed(subject))
    blend.remove_()
    after = parameter_groups(subject.model, recipe, _decayed(subject))
    target = run.path / "factorised" / blended.name
    if leads:
        partial = target.with_name(f"partial-{step_of(blended)}")
        shutil.rmtree(partial, ignore_errors=True)
        write_switched(blended, partial, subject.model, before, after, 1.0)
        partial.rename(target)
        mark_complete(target)
    return target


def _decayed(subject: Subject) -> set[str]:
    """What the Trainer decays: all but biases and norms."""
    return set(Trainer.get_decay_parameter_names(None, subject.model))


def write_switched(
    dense: Path, target: Path, model: nn.Module, before: Groups, after: Groups, lr_scale: float
) -> list[str]:
    """Write the first checkpoint of factorised training, made of the last one of dense training.

    `model` is factorised by now; `before` and `after` are the parameter groups of both stages. The optimizer's state of
    untouched parameters is kept. Of a replaced one, moments of the gradient G are projected to the factors, whose
    gradients are G V^T and U^T G: first moments exactly, second moments as if the entries of G were uncorrelated. The
    state of other optimizers is reset. Returns the layers whose state was reset.
    """
    target.mkdir(parents=True)
    safetensors.torch.save_model(model, str(target / WEIGHTS))
    optimizer = cast(OptimizerState, read_state(dense / "optimizer.pt"))
    switched, reset = switch_optimizer(optimizer, model, before, after, lr_scale)
    torch.save(switched, target / "optimizer.pt")
    scheduler = cast(Json, read_state(dense / "scheduler.pt"))
    torch.save(switch_schedule(scheduler, len(after), lr_scale), target / "scheduler.pt")
    for file in (*dense.glob("rng_state*.pth"), *dense.glob("scaler.pt")):
        shutil.copyfile(file, target / file.name)
    state = read_json(dense / STATE, "a Trainer's state", RecipeError)
    # the best dense model is no candidate for the best factorised one
    state |= {"best_metric": None, "best_model_checkpoint": None, "best_global_step": None}
    (target / STATE).write_text(json_text(state), encoding="utf-8")
    return reset


def switch_optimizer(
    saved: OptimizerState, model: nn.Module, before: Groups, after: Groups, lr_scale: float
) -> tuple[OptimizerState, list[str]]:
    """An optimizer's state dict for the factorised model's groups, and the layers that begin without state."""
    places = [name for names, _ in before for name in names]
    new: dict[str, ParameterState] = {name: saved["state"].get(index, {}) for index, name in enumerate(places)}
    reset = []
    for name, layer in factorised_layers(model).items():
        state = new.pop(layer.layout.weight_key(name), {})
        if state and (
            layer.folded is not None or layer.groups > 1
        ):  # of the tensors that a weight is computed from, or of several
            reset.append(name)
            state = {}
        bias = new.get(f"{name}.bias", {})
        factors = {f"{name}.{part}.weight": _projected(state, bias, layer, part) for part in ("u", "v")}
        if state and not any(factors.values()):
            reset.append(name)
        new |= {key: value for key, value in factors.items() if value}
        if f"{name}.bias" in new:
            new |= _biases(new.pop(f"{name}.bias"), name, layer)
    template = saved["param_groups"][0]
    state_by_index: dict[int, ParameterState] = {}
    groups = []
    for names, settings in after:
        indices = list(range(len(state_by_index), len(state_by_index) + len(names)))
        for index, name in zip(indices, names, strict=True):
            state_by_index[index] = new.get(name, {})
        rates: Json = {key: template[key] * lr_scale for key in ("lr", "initial_lr") if key in template}
        groups.append({**template, **settings, **rates, "params": indices})
    kept = {index: state for index, state in state_by_index.items() if state}
    return OptimizerState(state=kept, param_groups=groups), reset


def _projected(state: ParameterState, bias: ParameterState, layer: FactorisedLayer, part: str) -> ParameterState:
    """The state of one factor, from that of the dense weight and bias; {} where it holds tensors of another meaning."""
    found: ParameterState = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            found[key] = value.clone() if isinstance(value, Tensor) else value
        elif key in LINEAR or key in SQUARED:
            found[key] = _project(value, bias.get(key), layer, part, squared=key in SQUARED)
        else:
            return {}
    return found


@torch.no_grad()
def _project(moment: Tensor, bias: object, layer: FactorisedLayer, part: str, *, squared: bool) -> Tensor:
    """The moment of one factor, from that of the dense weight and, if it is a tensor, of the dense bias."""
    u, v = (factor.detach().to("cpu", torch.float32) for factor in layer.factors)
    if squared:
        u, v = u.square(), v.square()
    matrix = layer.layout.to_matrix(moment.float())
    to_u, to_v = matrix @ v.mT, u.mT @ matrix
    if layer.side == "rows" and layer.v.bias is not None and isinstance(bias, Tensor):
        kept = layer.v.bias.detach().to("cpu", torch.float32)  # which the mixing multiplies, too
        to_u += torch.outer(bias.float(), kept.square() if squared else kept)
    if layer.order is not None:  # the pivots' own rows or columns are an identity in the mixing, and no parameters
        mixed = layer.order[layer.rank :].to("cpu", torch.long)
        to_u, to_v = (to_u[mixed], to_v) if layer.side == "rows" else (to_u, to_v[:, mixed])
    stored = factor_weights(layer.layout, moment, Factors(to_u, to_v))
    return (stored.u if part == "u" else stored.v).to(moment.dtype).contiguous()


def _biases(state: ParameterState, name: str, layer: FactorisedLayer) -> dict[str, ParameterState]:
    """The state of a layer's biases, from that of the dense bias: v's acts on its own outputs and through u."""
    if layer.side != "rows":
        return {f"{name}.u.bias": state}
    assert layer.order is not None
    order = layer.order.to("cpu", torch.long)
    mixing = layer.pivoted.mixing.detach().to("cpu", torch.float32)
    first: ParameterState = {}
    rest: ParameterState = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            first[key], rest[key] = (value.clone() if isinstance(value, Tensor) else value for _ in range(2))
        elif key in LINEAR or key in SQUARED:
            own, others = value.float()[order].tensor_split([layer.rank])
            through = (mixing.square() if key in SQUARED else mixing).T @ others
            first[key], rest[key] = (own + through).to(value.dtype), others.to(value.dtype)
        else:
            return {}
    return {f"{name}.v.bias": first, f"{name}.u.bias": rest}


def switch_schedule(saved: Json, groups: int, lr_scale: float) -> Json:
    """A learning rate schedule's state dict that goes on where it was, scaled, for another number of groups."""
    found = dict(saved)
    for key in ("base_lrs", "_last_lr"):
        if key in found:
            found[key] = [found[key][0] * lr_scale] * groups
    if isinstance(found.get("lr_lambdas"), Sequence):
        found["lr_lambdas"] = [found["lr_lambdas"][0]] * groups
    return found
