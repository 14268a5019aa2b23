"""`finetune`: heal a factorised model, train one from scratch in low rank, or pre-train dense and factorise on the way.

A run lives in OUTPUT.run (recipe, metrics, checkpoints) until OUTPUT appears, whole.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lrsurgery.checkpoints.source import resolve
from lrsurgery.data.datasets import EVAL_SPLITS, digest_of, fingerprint
from lrsurgery.data.examples import Examples, evaluation_examples, open_rows, prepare_subject, training_examples
from lrsurgery.data.tasks import Subject, check_teacher, load_subject, task_of
from lrsurgery.errors import Interrupted, OutputError, RecipeError, TrainingError
from lrsurgery.factorise.checkpoint import versions
from lrsurgery.files import check_output
from lrsurgery.measure.evaluate import quality
from lrsurgery.report.schema import Report
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.training.callbacks import Event, RunCallback, Watch, interrupts
from lrsurgery.training.dynamics import whole
from lrsurgery.training.publish import publish, round_to_stored_
from lrsurgery.training.recipe import Recipe, check_recipe_for, read_recipe, write_recipe
from lrsurgery.training.run_folder import (
    FACTS,
    LAYERS,
    NOTES,
    RECIPE,
    append_metrics,
    cut_metrics,
    drop_incomplete,
    last_checkpoint,
    read_metrics,
    read_notes,
    resumed_recipe,
    stages_of,
    step_of,
)
from lrsurgery.training.switch import factorise_subject_, give_structure_, surgery_of, switch_
from lrsurgery.training.trainer import WEIGHTS, LowRankTrainer, overshoot, release_, total_steps, training_arguments


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    output: Path
    report: Report
    stages: dict[str, dict[str, float]]  # "dense", "factorised", "healed" (or "trained"): what was measured at each
    steps: int
    seconds: float = 0.0  # that this process spent on training steps, without evaluations, saving and imports

    def to_dict(self) -> dict[str, Any]:
        told = {"output": str(self.output), "steps": self.steps, "seconds": self.seconds, "stages": self.stages}
        return {**told, "report": self.report.to_dict()}


def finetune(
    settings: Mapping[str, Any], output: Path | None = None, *, recipe_file: Path | None = None, resume: bool = False,
    overwrite: bool = False, keep_checkpoints: bool = False, command: str | None = None,
    watch: Watch = lambda event: None,
) -> Outcome:  # fmt: skip
    """Trains a model by `settings` (fields of `Recipe`) on top of those in `recipe_file`; writes it to `output`.

    With `resume` a run that was interrupted goes on from its last checkpoint, with the settings it was begun with.
    Every process of `torchrun` or `accelerate launch` calls this.

    Raises SurgeryError for what the user can put right, Interrupted after SIGINT or SIGTERM, once all is saved.
    """
    asked = {**(read_recipe(recipe_file) if recipe_file else {}), **settings}
    run = _Run(asked, output, resume=resume, overwrite=overwrite, command=command, watch=watch)
    try:
        outcome = run.train()
        if run.leads and not keep_checkpoints:
            shutil.rmtree(run.folder)
        return outcome
    except Interrupted:
        raise
    except BaseException as e:
        kept = run.last_good()
        if kept is None and run.leads and run.opened:
            shutil.rmtree(run.folder, ignore_errors=True)  # nothing in it to go on from
        if isinstance(e, TrainingError):
            raise TrainingError(
                f"{e}; " + (f"the last good checkpoint stays: {kept}" if kept else "nothing is kept")
            ) from e
        raise
    finally:
        run.leave()


class _Run:
    """One run, from its settings to its output."""

    def __init__(
        self, asked: Mapping[str, Any], output: Path | None, *, resume: bool, overwrite: bool, command: str | None,
        watch: Watch,
    ) -> None:  # fmt: skip
        self.overwrite, self.command, self.watch = overwrite, command, watch
        self.notes: list[str] = []
        self.seconds = 0.0
        self.opened = False  # the run's folder, by this process
        if output is None:
            if not asked.get("model"):
                raise RecipeError("no model given; name it, or with --resume name the run by its --output")
            output = Path(f"{resolve(str(asked['model']), weights=False).name}-finetuned")
        self.output = output
        self.folder = output.with_name(f"{output.name}.run")
        self.resumed = resume and (self.folder / FACTS).is_file()
        self.recipe = resumed_recipe(self.folder, asked) if self.resumed else Recipe().merged(asked)
        self.recipe.check()
        assert self.recipe.model is not None
        assert self.recipe.data is not None
        self.source = resolve(self.recipe.model, weights=not self.recipe.from_scratch)
        check_recipe_for(self.recipe, self.source)
        self.task = self.recipe.task or task_of(self.source)
        # this also starts the process group, under torchrun
        self.args = training_arguments(self.recipe, self.folder, evaluates=self._evaluates)
        self.leads: bool = self.args.process_index == 0
        self._check_places(resume)
        if self._sharded and self.recipe.dense_steps:
            raise RecipeError("dense_steps: the switch does not work under FSDP; use data parallelism, or two runs")

    @property
    def _sharded(self) -> bool:
        return bool(self.args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"

    @property
    def _evaluates(self) -> bool:
        return self.recipe.eval_data is not None or self.recipe.eval_split is not None

    def _check_places(self, resume: bool) -> None:
        check_output(self.output, self.source, self.overwrite)
        if not self.resumed and (self.folder / FACTS).is_file() and not self.overwrite:
            raise OutputError(f"{self.folder}: an unfinished run; pass --resume to go on, --overwrite to begin anew")
        if resume and not self.resumed:
            self.watch(Event("note", text=f"{self.folder}: no run to resume, so this one begins at the first step"))

    # the parts of a run

    def train(self) -> Outcome:
        recipe = self.recipe
        facts = self._facts()
        torch.manual_seed(recipe.seed)  # a new head is drawn by it
        with self.args.main_process_first(desc="reading data"):
            subject, train, evaluation = self._examples()
        for note in subject.notes:
            self._note(note)
        teacher = self._teacher(subject)
        total = total_steps(recipe, self.args, train)
        if recipe.dense_steps >= total:
            raise RecipeError(f"dense_steps {recipe.dense_steps}: must be below the {total} steps of the whole run")
        checkpoint = self._last_checkpoint()
        if checkpoint is not None:
            self.watch(Event("note", text=f"going on from {checkpoint}"))
        if recipe.rank:  # refused now, and not after the dense steps
            surgery_of(recipe).plan_for(subject.body, dict(getattr(subject.body, "all_tied_weights_keys", None) or {}))
        self._open(facts)
        self._measure_dense(subject, evaluation, teacher)
        if recipe.dense_steps and (checkpoint is None or checkpoint.parent.name == "dense"):
            if checkpoint is None or step_of(checkpoint) < recipe.dense_steps:
                checkpoint = self._train_stage(subject, "dense", train, evaluation, teacher, total, checkpoint)
            else:
                safetensors.torch.load_model(subject.model, str(checkpoint / WEIGHTS))
            checkpoint = self._switch(subject, checkpoint)
        elif recipe.rank and checkpoint is not None:
            give_structure_(subject, json.loads((self.folder / LAYERS).read_text(encoding="utf-8")))
        elif recipe.rank:
            factorise_subject_(subject, recipe, self.folder if self.leads else None)
        stage = "factorised" if factorised_layers(subject.body) else "dense"
        self._train_stage(subject, stage, train, evaluation, teacher, total, checkpoint)
        return self._finish(subject, stage, evaluation)

    def _facts(self) -> dict[str, Any]:
        """What the run is about; on resuming, checked to be what it was begun with."""
        recipe = self.recipe
        files = [*self.source.files, *([self.source.folder / "config.json"] if self.source.folder else [])]
        facts = {
            "model": fingerprint(files, self.source.reference if not files else ""),
            "data": digest_of(recipe.data, recipe.split, recipe.subset),
            "eval_data": digest_of(recipe.eval_data, recipe.eval_split, recipe.subset),
            "world_size": self.args.world_size,
        }
        if self.resumed:
            self.notes += read_notes(self.folder)
            former = json.loads((self.folder / FACTS).read_text(encoding="utf-8"))
            for name in ("model", "data", "eval_data"):
                if former[name] != facts[name]:
                    raise RecipeError(
                        f"{getattr(recipe, name)}: has changed since the run in {self.folder} was begun;"
                        " begin anew with --overwrite, or put back what was there"
                    )
            if former["world_size"] != facts["world_size"]:
                self._note(f"the run was begun with {former['world_size']} processes, so it does not go on exactly")
        return facts

    def _open(self, facts: dict[str, Any]) -> None:
        """Makes the run's folder, once model, data and settings are known to go together."""
        self._together()
        if self.leads and not self.resumed:
            shutil.rmtree(self.folder, ignore_errors=True)
            try:
                self.folder.mkdir(parents=True)
                self.opened = True
                write_recipe(self.recipe, self.folder / RECIPE, versions())
                lines = [json.dumps(note) + "\n" for note in self.notes]
                (self.folder / NOTES).write_text("".join(lines), encoding="utf-8")
                (self.folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            except OSError as e:
                raise OutputError(f"{self.folder}: cannot be written ({e.strerror})") from e
        self._together()

    def _examples(self) -> tuple[Subject, Examples, Examples | None]:
        recipe, task = self.recipe, self.task
        assert recipe.data is not None
        rows = open_rows(recipe.data, task, recipe, split=recipe.split, streaming=recipe.streaming)
        self._rows = rows
        subject = self._build()
        train = training_examples(
            subject, rows, recipe, stride=recipe.stride, seed=recipe.seed, augment=recipe.augment,
            streaming=recipe.streaming, trust_remote_code=recipe.trust_remote_code,
        )  # fmt: skip
        if not self._evaluates:
            return subject, train, None
        held_out = open_rows(recipe.eval_data or recipe.data, task, recipe, split=recipe.eval_split, prefer=EVAL_SPLITS)
        evaluation = evaluation_examples(subject, held_out, recipe, trust_remote_code=recipe.trust_remote_code)
        return subject, train, evaluation

    def _build(self) -> Subject:
        recipe = self.recipe
        return prepare_subject(
            self.source, recipe, self._rows, new_head=recipe.new_head,
            from_scratch_seed=recipe.seed if recipe.from_scratch else None, trust_remote_code=recipe.trust_remote_code,
        )  # fmt: skip

    def _teacher(self, subject: Subject) -> Subject | None:
        if self.recipe.teacher is None:
            return None
        trust = self.recipe.trust_remote_code
        source = resolve(self.recipe.teacher)
        teacher = load_subject(source, task_of(source), trust_remote_code=trust)
        check_teacher(subject, teacher)
        return teacher

    def last_good(self) -> Path | None:
        """The newest checkpoint that is whole."""
        found = map(last_checkpoint, (self.folder / "factorised", self.folder / "dense"))
        return next((checkpoint for checkpoint in found if checkpoint is not None), None)

    def _last_checkpoint(self) -> Path | None:
        if not self.resumed:
            return None
        found = self.last_good()
        self._together()
        if self.leads:
            drop_incomplete(self.folder)
        self._together()
        return found

    def _measure_dense(self, subject: Subject, evaluation: Examples | None, teacher: Subject | None) -> None:
        """What the dense model is worth, where there is one that the run itself will not measure."""
        if evaluation is None or self.resumed or (self.recipe.dense_steps and not self.recipe.against):
            return
        if self.recipe.against is not None:
            trust = self.recipe.trust_remote_code
            dense: Subject | None = load_subject(resolve(self.recipe.against), subject.task, trust_remote_code=trust)
        elif self._sharded:  # FSDP shards a model in place, be it only to measure it
            dense = None
        elif self.recipe.rank and not self.recipe.from_scratch:
            dense = subject
        else:
            dense = teacher
        if dense is not None:
            values = quality(dense, self.recipe, evaluation, self.watch)
            if self.leads:
                append_metrics(self.folder, {"step": 0, "epoch": 0, "stage": "dense", "eval": values})
            self.watch(Event("evaluated", 0, 0, "dense", values))

    def _switch(self, subject: Subject, dense: Path) -> Path:
        target, reset = switch_(subject, self.recipe, dense, self.folder, self.leads)
        if reset:
            self._note(f"the optimizer's state of {len(reset)} factorised layers is not Adam's or SGD's; it was reset")
        self._together()
        return target

    def _train_stage(
        self, subject: Subject, stage: str, train: Examples, evaluation: Examples | None, teacher: Subject | None,
        total: int, checkpoint: Path | None,
    ) -> Path:  # fmt: skip
        """Trains to the stage's end. Returns its last checkpoint; raises Interrupted where a signal came before."""
        recipe, folder = self.recipe, self.folder / stage
        last = recipe.dense_steps if stage == "dense" and recipe.dense_steps else total
        judged = bool(recipe.best or recipe.early_stopping) and last == total
        args = training_arguments(recipe, folder, evaluates=self._evaluates, total=total, judged=judged)
        switched = checkpoint is not None and stage == "factorised" and step_of(checkpoint) == recipe.dense_steps
        args.eval_on_start = self._evaluates and (checkpoint is None or switched)
        self._cut_metrics(stage, None if switched else checkpoint)
        if checkpoint is None or switched:  # else the weights are not loaded yet
            self._note(overshoot(subject.model, recipe, recipe.lr * (recipe.switch_lr if switched else 1)))
        with interrupts() as interrupted:
            callback = RunCallback(self.folder, stage, self.watch, interrupted, train, last)
            trainer = LowRankTrainer(
                subject, recipe, args, train, evaluation, teacher.model if teacher else None, callback
            )
            if checkpoint is not None and step_of(checkpoint) >= last:
                state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
                trainer._load_from_checkpoint(state["best_model_checkpoint"] if judged else str(checkpoint))
                trainer.state.global_step = state["global_step"]
            else:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        step = trainer.state.global_step
        self.seconds += callback.seconds
        if callback.stopped and step < last:
            again = f"lrsurgery finetune --resume --output {shlex.quote(str(self.output))}"
            again += " --overwrite" if self.overwrite else ""
            raise Interrupted(f"stopped after step {step} of {total}, all is saved; to go on: {again}")
        if last == total:
            self.trainer: LowRankTrainer | None = trainer
        else:
            release_(trainer)
        return folder / f"checkpoint-{step}"

    def _cut_metrics(self, stage: str, checkpoint: Path | None) -> None:
        step = -1 if checkpoint is None else step_of(checkpoint)
        if self.leads and self.resumed:
            cut_metrics(self.folder, lambda r: r["step"] <= step if r["stage"] == stage else r["stage"] == "dense")
        self._together()

    def _finish(self, subject: Subject, stage: str, evaluation: Examples | None) -> Outcome:
        trainer = self.trainer
        assert trainer is not None
        step = trainer.state.global_step
        done = [r for r in read_metrics(self.folder) if "eval" in r and r["stage"] == stage]
        kept = trainer.args.load_best_model_at_end
        round_to_stored_(subject)
        stale = kept or subject.stored != torch.float32 or not done or done[-1]["step"] != step
        self._together()
        if evaluation is not None and stale:
            trainer.evaluate()
        self._together()
        final = self._gathered(trainer, subject)
        outcome = None
        if self.leads:
            records = [r for r in read_metrics(self.folder) if "eval" in r]
            stages = stages_of(records, stage)
            facts = {
                "source": {"reference": self.source.reference, "revision": self.source.revision},
                "command": self.command, "options": self.recipe.to_dict(), "versions": versions(),
                "notes": tuple(self.notes),
            }  # fmt: skip
            report = publish(final, self.output, self.folder, self.recipe, facts, step, stages, self.overwrite)
            outcome = Outcome(self.output, report, stages, step, self.seconds)
        self._together()
        return outcome or Outcome(self.output, Report((), 0, 0), {}, step)

    def _gathered(self, trainer: LowRankTrainer, subject: Subject) -> Subject:
        """The subject with whole weights on the CPU, where FSDP holds shards of them."""
        if not trainer.is_fsdp_enabled:
            release_(trainer)
            return subject
        state = {key: whole(value).cpu() for key, value in trainer.model.state_dict().items()}
        layers = {name: [layer.kind, layer.rank] for name, layer in factorised_layers(subject.body).items()}
        twin = self._build()
        if not subject.is_factorised:
            give_structure_(twin, layers)
        twin.model.load_state_dict(state)
        return replace(twin, stored=subject.stored, notes=subject.notes)

    def _note(self, text: str | None) -> None:
        if text is not None and text not in self.notes:
            self.notes.append(text)
            self.watch(Event("note", text=text))
            if self.leads and (self.opened or self.resumed):
                with (self.folder / NOTES).open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps(text) + "\n")

    def _together(self) -> None:
        self.args.distributed_state.wait_for_everyone()

    def leave(self) -> None:
        """Lets go of the process group, of the reducers that hold on to it first."""
        self.trainer = None
        gc.collect()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
