"""What transformers' Trainer is told: its `TrainingArguments` for a recipe."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_type_hints

import torch
from transformers import TrainingArguments as Arguments

from lrsurgery.checkpoints.upstream.transformers import train_on_one_gpu_
from lrsurgery.data.batches import Examples
from lrsurgery.errors import Interrupted, RecipeError, SurgeryError
from lrsurgery.modules import frames_after_ours
from lrsurgery.runtime import pick_device
from lrsurgery.training.recipe import OPTIMIZERS, Recipe

# fields of TrainingArguments that --set cannot have, with what to use instead
OWN_ARGUMENTS = {
    "output_dir": "; use --output",
    "remove_unused_columns": "",
    "label_names": "",
    "resume_from_checkpoint": "; use --resume",
    "max_steps": "; use --steps",
    "num_train_epochs": "; use --epochs",
    "eval_on_start": "",
    "batch_eval_metrics": "",
    "eval_do_concat_batches": "",
    "prediction_loss_only": "",
    "report_to": "; use --report-to",
    "save_only_model": ", and a run has to be able to go on",
    "enable_jit_checkpoint": "",  # its SIGTERM handler in place of ours
    "restore_callback_states_from_checkpoint": "",
    "load_best_model_at_end": "; use --best",
    "eval_strategy": "; use --eval-steps",
    "save_strategy": "; use --save-steps",
}
# numbers that --set can have -> the least that a library takes, which it may only find out in the middle of a run
LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "dataloader_prefetch_factor": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
    "data_seed": 0,
}


def training_arguments(
    recipe: Recipe, folder: Path, *, evaluates: bool, total: int | None = None, judged: bool = False
) -> Arguments:
    """transformers' TrainingArguments for a recipe, of `total` optimizer steps where they are known by now.

    `judged` says that the best model is to be kept. Raises RecipeError that names the setting at fault.
    """
    device = pick_device(recipe.device)
    if device.index:
        raise RecipeError(
            f"device {recipe.device}: for training, choose a GPU with CUDA_VISIBLE_DEVICES={device.index}"
        )
    _check_trackers(recipe.report_to)
    bf16, fp16 = _precision(recipe.precision, device)
    own: dict[str, object] = {
        "output_dir": str(folder),
        "learning_rate": recipe.peak_lr,
        "lr_scheduler_type": recipe.schedule,
        "optim": OPTIMIZERS[recipe.optimizer],
        "weight_decay": recipe.weight_decay,
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": recipe.eval_batch_size or recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulate,
        "seed": recipe.seed,
        "bf16": bf16,
        "fp16": fp16,
        "use_cpu": device.type == "cpu",
        "report_to": list(recipe.report_to) or "none",
        "dataloader_pin_memory": device.type == "cuda",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "save_total_limit": 2,
        "save_strategy": "steps",
        "eval_strategy": "steps" if evaluates else "no",
    }
    if recipe.gradient_checkpointing:
        known = Arguments.__dataclass_fields__  # the newer of the two names, where this transformers has it
        own["activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"] = True
    if device.type == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        own["ddp_backend"] = "gloo"
    if total is not None:
        own |= _step_arguments(recipe, total, judged)
    for name in recipe.set:
        if name not in Arguments.__dataclass_fields__:
            raise RecipeError(f"set {name}: transformers' TrainingArguments has no such field")
        if name.startswith(("push_to_hub", "hub_")):
            raise RecipeError(f"set {name}: is decided by lrsurgery; upload the output with `hf upload`")
        if name in OWN_ARGUMENTS:
            raise RecipeError(f"set {name}: is decided by lrsurgery{OWN_ARGUMENTS[name]}")
    given = {name: _typed(name, value) for name, value in recipe.set.items()}
    limit = given.get("save_total_limit")
    if isinstance(limit, int | float) and limit < 2:  # the older one goes before the newer one is marked
        raise RecipeError(f"set save_total_limit={limit}: write at least 2, so that a whole checkpoint is always left")
    with fitting(recipe):
        arguments = Arguments(**{**own, **given})
        train_on_one_gpu_(arguments)
        return arguments


def _typed(name: str, value: object) -> object:
    """The value of a field, as a number where its default is one.

    Raises RecipeError for a value of another type than the field's, of none of its choices or below its bound.
    """
    default = Arguments.__dataclass_fields__[name].default
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise RecipeError(f"set {name}={value}: write true or false")
    elif isinstance(default, int | float) and not isinstance(value, int | float):
        try:
            value = float(str(value))  # YAML takes 1e-3 for text
        except ValueError as e:
            raise RecipeError(f"set {name}={value}: write a number") from e
    _check_type(name, value)
    choices = Arguments.__dataclass_fields__[name].metadata.get("choices")
    if choices and value is not None and value not in choices:
        raise RecipeError(f"set {name}={value}: choose one of {', '.join(map(str, choices))}")
    if isinstance(value, int | float) and value < LEAST.get(name, value):
        raise RecipeError(f"set {name}={value}: must be at least {LEAST[name]}")
    return value


def _check_type(name: str, value: object) -> None:
    """Raise RecipeError for a value that the annotation of a field of TrainingArguments does not allow."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    try:
        hint = get_type_hints(Arguments)[name]
        adapter: TypeAdapter[object] = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a type that takes no further config
        adapter = TypeAdapter(hint)
    except NameError:  # an annotation that only a type checker can read
        return
    try:
        adapter.validate_python(value)
    except ValidationError as e:
        said = [fault["msg"][:1].lower() + fault["msg"][1:] for fault in e.errors() if fault["type"] != "none_required"]
        raise RecipeError(f"set {name}={str(value)[:60]}: {', or '.join(dict.fromkeys(said))}") from e


@contextmanager
def fitting(recipe: Recipe, *, only_set: bool = False) -> Iterator[None]:
    """Turn transformers' own refusal of settings into RecipeError, which names what was given with --set.

    With `only_set` nothing else is at fault: without --set an error is no setting's and goes on as it is, and so does
    one that comes out of other rooms of this package.
    """
    try:
        yield
    except (SurgeryError, Interrupted, OSError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # of a dozen libraries, some of which find an odd value only in the first step
        if only_set and (not recipe.set or not frames_after_ours(e)[0].startswith("training/loop/")):
            raise
        given = f" (set: {', '.join(recipe.set)})" if recipe.set else ""
        said = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)
        kind = "" if isinstance(e, ValueError | ImportError | RuntimeError | KeyError) else f"{type(e).__name__}: "
        raise RecipeError(f"the settings do not go together{given}: {kind}{' '.join(said.split())[:300]}") from e


def _step_arguments(recipe: Recipe, total: int, judged: bool) -> dict[str, object]:
    """The arguments that count steps, for a run of `total`."""
    eval_steps = recipe.eval_steps or recipe.save_steps or max(1, math.ceil(total / 10))
    save_steps = recipe.save_steps or eval_steps
    found: dict[str, object] = {
        "max_steps": total,
        "warmup_steps": recipe.warm_up(total),
        "eval_steps": eval_steps,
        "save_steps": save_steps,
        "logging_steps": recipe.log_steps or max(1, min(50, total // 20)),
    }
    if judged:
        if save_steps % eval_steps:
            raise RecipeError(
                f"save_steps {save_steps}: must be a multiple of eval_steps {eval_steps}, to keep the best"
            )
        found |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
        # one more: the one before the newest has to stay until the newest is whole
        found["save_total_limit"] = 3
    return found


def _check_trackers(names: tuple[str, ...]) -> None:
    from transformers.integrations import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    for name in names:
        if name not in (*installed, "none"):
            known = ", ".join(installed) or "none"
            raise RecipeError(f"report_to {name}: is not installed here (installed: {known}); pip install it first")


def _precision(name: str, device: torch.device) -> tuple[bool, bool]:
    """(bf16, fp16) autocast on this device. Raises RecipeError where it cannot."""
    if name == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(), False
    if name == "fp16" and device.type == "cpu":
        raise RecipeError("precision fp16: this machine trains on the CPU, which has bf16 and fp32")
    return name == "bf16", name == "fp16"


def total_steps(recipe: Recipe, args: Arguments, train: Examples) -> int:
    """Optimizer steps of a whole run, as the Trainer counts them."""
    if recipe.steps is not None:
        return recipe.steps
    batches = math.ceil(math.ceil(len(train.dataset) / args.train_batch_size) / args.world_size)
    a_pass: int = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return max(1, math.ceil((1.0 if recipe.epochs is None else recipe.epochs) * a_pass))
