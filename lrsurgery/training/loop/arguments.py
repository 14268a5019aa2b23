"""What transformers' Trainer is told: its `TrainingArguments` for a recipe."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import TrainingArguments as Arguments

from lrsurgery.checkpoints.upstream.transformers import train_on_one_gpu_
from lrsurgery.data.batches import Examples
from lrsurgery.errors import RecipeError
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
        "learning_rate": recipe.lr,
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": recipe.warmup_steps,
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
    """The value of a field, as a number where its default is one. Raises RecipeError for another kind of value."""
    default = Arguments.__dataclass_fields__[name].default
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise RecipeError(f"set {name}={value}: write true or false")
    elif isinstance(default, int | float) and not isinstance(value, int | float):
        try:
            return float(str(value))  # YAML takes 1e-3 for text
        except ValueError as e:
            raise RecipeError(f"set {name}={value}: write a number") from e
    return value


@contextmanager
def fitting(recipe: Recipe, *, only_set: bool = False) -> Iterator[None]:
    """Turn transformers' own refusal of settings into RecipeError, which names what was given with --set.

    With `only_set` nothing else is at fault: without --set an error is no setting's and goes on as it is.
    """
    try:
        yield
    except (ValueError, TypeError, ImportError, RuntimeError) as e:
        if only_set and (not recipe.set or isinstance(e, torch.OutOfMemoryError)):
            raise
        given = f" (set: {', '.join(recipe.set)})" if recipe.set else ""
        raise RecipeError(f"the settings do not go together{given}: {' '.join(str(e).split())[:300]}") from e


def _step_arguments(recipe: Recipe, total: int, judged: bool) -> dict[str, object]:
    """The arguments that count steps, for a run of `total`."""
    eval_steps = recipe.eval_steps or recipe.save_steps or max(1, math.ceil(total / 10))
    save_steps = recipe.save_steps or eval_steps
    found: dict[str, object] = {
        "max_steps": total,
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
