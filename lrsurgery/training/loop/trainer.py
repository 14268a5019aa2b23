"""transformers' Trainer for low-rank models: decay on factors, a teacher, exact evaluation, strict checkpoints.

The file is long because it is one class and its parameter groups.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import EarlyStoppingCallback, EvalPrediction, PrinterCallback, Trainer
from transformers import TrainingArguments as Arguments
from transformers.trainer_utils import TrainOutput

from lrsurgery.checkpoints.upstream.transformers import forget_preparation_, measured
from lrsurgery.data.batches import Examples
from lrsurgery.data.options import NO_TASK
from lrsurgery.data.scores import distillation, measure_batch, summarise
from lrsurgery.data.tasks import TASKS, Subject, count_logits
from lrsurgery.data.text.sliced import distil_split
from lrsurgery.data.unlabelled.agreement import Agreement, run
from lrsurgery.errors import RecipeError, TrainingError
from lrsurgery.files.faults import disk_faults
from lrsurgery.heads import find_head
from lrsurgery.modules import batch_norms, for_model, model_faults
from lrsurgery.progress import Listener
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.decay import FrobeniusDecay
from lrsurgery.training.checkpoints import WEIGHTS, State
from lrsurgery.training.loop.arguments import fitting, training_arguments
from lrsurgery.training.loop.callbacks import EvaluationCallback, figures_of
from lrsurgery.training.loop.dynamics import steepest_gradient, whole
from lrsurgery.training.optimizers.spectron import Spectron, spectral_layers
from lrsurgery.training.recipe import SPECTRON, Recipe

MOST_WHOLE = 1 << 27  # logits of a batch: 0.5 GB in fp32, of which distillation holds several copies
LINEAR = ("exp_avg", "momentum_buffer")  # an optimizer's running means of the gradient, which is linear in it
SQUARED = ("exp_avg_sq", "max_exp_avg_sq")  # running means of its square
REMEDY = "try a lower --lr, more --warmup-steps or less decay"
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
        agreement: Agreement | None = None,
    ) -> None:
        self.subject, self.recipe, self.teacher = subject, recipe, teacher
        self.agreement = agreement  # with the teacher, in place of labels
        self._collate_evaluation = evaluation.collate if evaluation else None
        self._judge = evaluation.judge if evaluation else None
        language = subject.task != NO_TASK and TASKS[subject.task].is_language
        self._classes = count_logits(subject) if language else 0
        self.use_cache: bool | None = getattr(getattr(subject.model, "config", None), "use_cache", None)
        with fitting(recipe, only_set=True):
            super().__init__(
                model=subject.model,
                args=args,
                train_dataset=train.dataset if train else None,
                eval_dataset=evaluation.dataset if evaluation else None,
                data_collator=train.collate if train else None,
                compute_metrics=self._summarise,
                callbacks=[callback] if callback else None,
            )
        self.model_accepts_loss_kwargs &= _scales_loss(subject)
        self.remove_callback(PrinterCallback)
        if callback is not None:
            callback.trainer = self
        if recipe.early_stopping and args.load_best_model_at_end:
            self.add_callback(EarlyStoppingCallback(early_stopping_patience=recipe.early_stopping))
        if teacher is not None:
            self.teacher = teacher.to(args.device).eval().requires_grad_(False)

    def _summarise(self, found: EvalPrediction) -> dict[str, float]:
        rows = torch.as_tensor(found.predictions)
        if self.agreement is not None:
            return self.agreement.summarise(rows)
        return summarise(self.subject.task, rows, self.subject.problem, self._judge)

    # optimisation

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """As the Trainer's own.

        Raises RecipeError for a setting that needs a package which is not installed, or that --set gave and a library
        refuses; SurgeryError for a model that cannot work on the data.
        """
        self._resumed = Path(resume_from_checkpoint) if resume_from_checkpoint is not None else None
        with fitting(self.recipe, only_set=True), model_faults(self.subject.source.reference):
            try:
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            except ImportError as e:
                raise RecipeError(f"a setting needs a package: {' '.join(str(e).split())[:300]}") from e

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's own. Raises as `train` does."""
        with fitting(self.recipe, only_set=True), model_faults(self.subject.source.reference):
            found: dict[str, float] = super().evaluate(*args, **kwargs)
            return found

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
        with fitting(self.recipe, only_set=True):
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            if self.recipe.optimizer == "sgd" and cls is torch.optim.SGD:
                options = {"momentum": self.recipe.momentum, **options}
            if self.recipe.optimizer == SPECTRON:
                spectral = spectral_layers(target)
                if factorised_layers(target) and not spectral:
                    raise RecipeError("optimizer spectron: no layer has two plain factors of its own; use adamw")
                cls, options = (
                    Spectron,
                    {**options, "layers": [*spectral.values()], "scale": self.recipe.spectral_scale},
                )
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
        if self.agreement is not None:
            return self._disagreement(self.agreement, model, inputs, return_outputs)
        labels, inputs = inputs.get("labels"), dict(for_model(self.model, inputs))
        if self.teacher is None or not model.training:
            found: Tensor | tuple[Tensor, Mapping[str, Tensor]] = super().compute_loss(
                model, inputs, return_outputs, num_items_in_batch
            )
            return found
        assert labels is not None
        items = num_items_in_batch if self.model_accepts_loss_kwargs else None

        def mean(total: Tensor, count: int) -> Tensor:
            # as transformers scales the loss itself: over all tokens of all processes, which DDP then averages
            return total / max(1, count) if items is None else total / items * self.accelerator.num_processes

        weight, task, temperature = self.recipe.teacher_weight, self.subject.task, self.recipe.temperature
        if not return_outputs and labels.numel() * self._classes > MOST_WHOLE:
            parts = self._distil_in_parts(model, inputs, labels)
            if parts is not None:
                own, total, count = parts
                return (1 - weight) * mean(own, count) + weight * mean(total, count)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with torch.no_grad(), model_faults(f"teacher {self.recipe.teacher}"):
            answers = self.teacher(**self._of_teacher(inputs))
        total, count = distillation(
            task, outputs["logits"], answers["logits"], labels, temperature, self.subject.problem
        )
        loss = (1 - weight) * loss + weight * mean(total, count)
        return (loss, outputs) if return_outputs else loss

    def _of_teacher(self, inputs: Batch) -> Batch:
        assert self.teacher is not None
        return {name: value for name, value in for_model(self.teacher, inputs).items() if name != "labels"}

    def _distil_in_parts(self, model: nn.Module, inputs: Batch, labels: Tensor) -> tuple[Tensor, Tensor, int] | None:
        """Sums of the loss and of the divergence over the scored tokens, and their number, without whole logits.

        None where a head needs all positions at once, and where a model's own loss may hold more than its tokens'.
        """
        ours, theirs = find_head(model), find_head(self.teacher)
        more = getattr(self.subject.config, "output_router_logits", False)
        if ours is None or theirs is None or more or self.is_fsdp_enabled:  # whose weights are there in whole forwards
            return None
        own = {name: value for name, value in inputs.items() if name != "labels"}
        with self.compute_loss_context_manager():
            student = ours.run(lambda: model(**own))
            with torch.no_grad(), model_faults(f"teacher {self.recipe.teacher}"):
                teacher = theirs.run(lambda: self.teacher(**self._of_teacher(inputs)))  # type: ignore[misc]
            if student is None or teacher is None:
                return None
            return distil_split(student, teacher, labels, TASKS[self.subject.task].align, self.recipe.temperature)

    def _disagreement(
        self, agreement: Agreement, model: nn.Module, inputs: Batch, return_outputs: bool
    ) -> Tensor | tuple[Tensor, Mapping[str, Tensor]]:
        for norm in batch_norms(self.model) if model.training else ():
            norm.eval()  # as the teacher's; those of a batch differ from what the blocks were fitted to
        outputs = run(model, self.subject.body, inputs)
        loss = agreement.loss(outputs, self._answers(inputs), inputs, self.recipe.temperature)
        return (loss, outputs) if return_outputs else loss

    def _answers(self, inputs: Batch) -> Any:
        assert self.teacher is not None
        with torch.no_grad(), model_faults(f"teacher {self.recipe.teacher}"):
            return run(self.teacher, self.teacher, inputs)

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
            whole = self.is_fsdp_enabled
            if self.agreement is None:
                sums = measure_batch(self.subject, model, inputs, whole=whole, judge=self._judge)
            else:
                sums = self.agreement.measure_batch(model, self._answers, self.subject.body, inputs, whole=whole)
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
        with disk_faults(Path(self.args.output_dir)):
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

    def _load_callback_state(self) -> None:
        # the Trainer's own begins its count of evaluations without gain anew, and keeps the best by its old path
        assert self._resumed is not None
        state = State.read(self._resumed)
        best = state.best(self._resumed)
        self.state.best_model_checkpoint = str(best) if best is not None else None
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience_counter = state.evaluations_without_gain

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with fitting_checkpoint(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    _check_moments(self.optimizer.state.get(parameter, {}), parameter)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with fitting_checkpoint(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


def _scales_loss(subject: Subject) -> bool:
    """Tell whether the model's own loss is a mean over all batches that are accumulated, whose number it is given.

    transformers takes every forward with **kwargs for such a one. Those that have no use for the number return the mean
    over their batch, and their gradients have to be divided by the number of batches.
    """
    if subject.task == NO_TASK or not TASKS[subject.task].is_language:
        return False
    return "self.loss_function" in inspect.getsource(inspect.unwrap(type(subject.model).forward))


@contextmanager
def fitting_checkpoint(checkpoint: str | None) -> Iterator[None]:
    """Turn what torch raises for the state of another run into RecipeError."""
    try:
        yield
    except Exception as e:  # of a dozen types
        if checkpoint is None:
            raise
        raise RecipeError(
            f"{checkpoint}: its optimizer, schedule or random state is of another run"
            f" ({' '.join(str(e).split())[:200] or type(e).__name__}); remove it to go on from the one before it, or"
            " start over with --overwrite"
        ) from e


def _check_moments(state: Mapping[str, object], parameter: Tensor) -> None:
    """Raises ValueError for running means of another shape than their parameter's."""
    for name in (*LINEAR, *SQUARED):
        moment = state.get(name)
        if isinstance(moment, Tensor) and moment.shape != parameter.shape:
            raise ValueError(f"{name} is {tuple(moment.shape)}, its parameter {tuple(parameter.shape)}")


def release_(trainer: LowRankTrainer) -> None:
    """Give a model back as it was before its Trainer prepared it, so that another Trainer can prepare it anew."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()
    forget_preparation_([model, trainer.model, trainer.subject.model])
    if trainer.use_cache is not None:  # training turns it off, generating from the saved model wants it
        trainer.model.config.use_cache = trainer.use_cache


def quality(
    subject: Subject,
    recipe: Recipe,
    examples: Examples,
    listener: Listener,
    teacher: nn.Module | None = None,
    agreement: Agreement | None = None,
) -> dict[str, float]:
    """The figures of a model on examples, without training it: loss (nats), scored (positions), and the task's own.

    With an `agreement`, those of that with the teacher.
    """
    with tempfile.TemporaryDirectory() as folder, measured(subject.model):
        args = training_arguments(recipe, Path(folder), evaluates=True, total=1)
        callback = EvaluationCallback(listener)
        trainer = LowRankTrainer(subject, recipe, args, None, examples, teacher, callback, agreement)
        found = trainer.evaluate()
        release_(trainer)
    return figures_of(found)
