"""transformers' Trainer for low-rank models: decay on factors, a teacher, exact evaluation, strict checkpoints."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import EarlyStoppingCallback, EvalPrediction, PrinterCallback, Trainer
from transformers import TrainingArguments as Arguments

from lrsurgery.checkpoints.upstream.transformers import forget_preparation_, train_on_one_gpu_
from lrsurgery.data.batches import Examples
from lrsurgery.data.scores import distillation, measure_batch, summarise
from lrsurgery.data.tasks import Subject
from lrsurgery.errors import RecipeError, TrainingError
from lrsurgery.progress import Listener
from lrsurgery.runtime import pick_device
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.decay import FrobeniusDecay
from lrsurgery.training.callbacks import EvaluationCallback, figures_of
from lrsurgery.training.dynamics import steepest_gradient, whole
from lrsurgery.training.recipe import OPTIMIZERS, Recipe

WEIGHTS = "model.safetensors"
REMEDY = "try a lower --lr, more --warmup-steps or less decay"
# fields of TrainingArguments that --set cannot have, with what to use instead
OWN_ARGUMENTS = {
    "output_dir": "; use --output",
    "remove_unused_columns": "",
    "label_names": "",
    "resume_from_checkpoint": "; use --resume",
    "max_steps": "; use --steps",
    "num_train_epochs": "; use --epochs",
    "eval_on_start": "",
    "load_best_model_at_end": "; use --best",
    "eval_strategy": "; use --eval-steps",
    "save_strategy": "; use --save-steps",
}

# names of parameters, with the optimizer's settings for them
Groups: TypeAlias = list[tuple[list[str], dict[str, float]]]
Batch: TypeAlias = dict[str, Tensor]


def parameter_groups(model: nn.Module, recipe: Recipe, decayed: set[str]) -> Groups:
    """Names and weight decay of each of the optimizer's groups: factors, other weights, biases and norms.

    `decayed` names what ordinary AdamW decay is for. Frozen parameters are in none; empty groups are left out.
    """
    layers = factorised_layers(model)
    factors = {f"{name}.{part}.weight" for name in layers for part in ("u", "v")}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    of_factors = recipe.decay_strength if recipe.decay == "l2" else 0.0
    groups = [
        ([n for n in trained if n in factors], {"weight_decay": of_factors}),
        ([n for n in trained if n not in factors and n in decayed], {"weight_decay": recipe.weight_decay}),
        ([n for n in trained if n not in factors and n not in decayed], {"weight_decay": 0.0}),
    ]
    return [(names, settings) for names, settings in groups if names]


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
        if name in OWN_ARGUMENTS:
            raise RecipeError(f"set {name}: is decided by lrsurgery{OWN_ARGUMENTS[name]}")
    try:
        arguments = Arguments(**{**own, **recipe.set})
        train_on_one_gpu_(arguments)
        return arguments
    except (ValueError, TypeError, ImportError, RuntimeError) as e:
        raise RecipeError(f"the settings do not go together: {' '.join(str(e).split())[:300]}") from e


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


class LowRankTrainer(Trainer):  # type: ignore[misc]
    """The Trainer with what low-rank models ask for; the loop, the devices and the data loading are transformers'."""

    def __init__(
        self,
        subject: Subject,
        recipe: Recipe,
        args: Arguments,
        train: Examples | None,
        evaluation: Examples | None,
        teacher: nn.Module | None = None,
        callback: EvaluationCallback | None = None,
    ) -> None:
        self.subject, self.recipe, self.teacher = subject, recipe, teacher
        self._collate_evaluation = evaluation.collate if evaluation else None
        self.use_cache: bool | None = getattr(getattr(subject.model, "config", None), "use_cache", None)
        super().__init__(
            model=subject.model,
            args=args,
            train_dataset=train.dataset if train else None,
            eval_dataset=evaluation.dataset if evaluation else None,
            data_collator=train.collate if train else None,
            compute_metrics=self._summarise,
            callbacks=[callback] if callback else None,
        )
        self.remove_callback(PrinterCallback)
        if callback is not None:
            callback.trainer = self
        if recipe.early_stopping and args.load_best_model_at_end:
            self.add_callback(EarlyStoppingCallback(early_stopping_patience=recipe.early_stopping))
        if teacher is not None:
            self.teacher = teacher.to(args.device).eval().requires_grad_(False)

    def _summarise(self, found: EvalPrediction) -> dict[str, float]:
        return summarise(self.subject.task, torch.as_tensor(found.predictions), self.subject.problem)

    # optimisation

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        built: torch.optim.Optimizer | None = vars(self)["optimizer"]  # the Trainer's own attribute, set in its init
        if built is not None:
            return built
        target = self.model if model is None else model
        parameters = dict(target.named_parameters())
        decayed = set(self.get_decay_parameter_names(target))
        groups = [
            {"params": [parameters[name] for name in names], **settings}
            for names, settings in parameter_groups(target, self.recipe, decayed)
        ]
        cls, options = self.get_optimizer_cls_and_kwargs(self.args, target)
        if self.recipe.optimizer == "sgd" and cls is torch.optim.SGD:
            options = {"momentum": self.recipe.momentum, **options}
        optimizer: torch.optim.Optimizer = cls(groups, **options)
        if self.recipe.decay == "frobenius" and self.recipe.decay_strength and factorised_layers(target):
            decay = FrobeniusDecay(target, self.recipe.decay_strength, decoupled=not self.recipe.decay_coupled)
            decay.attach(optimizer)
        self.optimizer = optimizer
        return optimizer

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss is {float(loss)} at step {self.state.global_step + 1}; the largest gradient is that of"
                f" {steepest_gradient(self.model)}; {REMEDY}"
            )
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Mapping[str, Tensor]]:
        labels = inputs.get("labels")
        if self.teacher is None or not model.training:
            found: Tensor | tuple[Tensor, Mapping[str, Tensor]] = super().compute_loss(
                model, inputs, return_outputs, num_items_in_batch
            )
            return found
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with torch.no_grad():
            answers = self.teacher(**{k: v for k, v in inputs.items() if k != "labels"})
        assert labels is not None
        task, problem, temperature = self.subject.task, self.subject.problem, self.recipe.temperature
        total, count = distillation(task, outputs["logits"], answers["logits"], labels, temperature, problem)
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            # as transformers scales the loss itself: over all tokens of all processes, which DDP then averages
            matched = total / num_items_in_batch * self.accelerator.num_processes
        else:
            matched = total / max(1, count)
        weight = self.recipe.teacher_weight
        loss = (1 - weight) * loss + weight * matched
        return (loss, outputs) if return_outputs else loss

    # evaluation

    def get_eval_dataloader(self, eval_dataset: Dataset[object] | None = None) -> DataLoader[object]:
        training = vars(self)["data_collator"]
        self.data_collator = self._collate_evaluation or training
        try:
            loader: DataLoader[object] = super().get_eval_dataloader(eval_dataset)
            return loader
        finally:
            self.data_collator = training

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor, Tensor]:
        """Sums of each example in place of logits: exact over the whole set, whatever the batches and the padding."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            # FSDP's processes have to run the model equally often
            sums = measure_batch(self.subject, model, inputs, whole=self.is_fsdp_enabled)
        return None, sums, torch.zeros(len(sums), device=sums.device)

    # checkpoints: one way for transformers' and timm's models, loaded strictly

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        # an overflow shows in the loss one step later; until then the last checkpoint has to stay the last good one
        for name, parameter in self.model.named_parameters():
            if not bool(torch.isfinite(whole(parameter)).all()):
                raise TrainingError(
                    f"{name.removeprefix('body.')} holds NaN or Inf after step {self.state.global_step}, whose largest"
                    f" gradient is that of {steepest_gradient(self.model)}; {REMEDY}"
                )
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            if state_dict is None:
                safetensors.torch.save_model(self.model, str(folder / WEIGHTS))
            else:  # gathered from FSDP's shards
                gathered = {k: v.contiguous().clone() for k, v in state_dict.items()}
                safetensors.torch.save_file(gathered, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            safetensors.torch.load_model(model or self.model, os.path.join(resume_from_checkpoint, WEIGHTS))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


def release_(trainer: LowRankTrainer) -> None:
    """Give a model back as it was before its Trainer prepared it, so that another Trainer can prepare it anew."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()
    forget_preparation_([model, trainer.model, trainer.subject.model])
    if trainer.use_cache is not None:  # training turns it off, generating from the saved model wants it
        trainer.model.config.use_cache = trainer.use_cache


def quality(subject: Subject, recipe: Recipe, examples: Examples, listener: Listener) -> dict[str, float]:
    """The figures of a model on examples, without training it: loss (nats), scored (positions), and the task's own."""
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(recipe, Path(folder), evaluates=True, total=1)
        trainer = LowRankTrainer(subject, recipe, args, None, examples, callback=EvaluationCallback(listener))
        found = trainer.evaluate()
        release_(trainer)
    return figures_of(found)
