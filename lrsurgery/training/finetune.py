"""`finetune`: heal a factorised model, train one from scratch in low rank, or pre-train dense and factorise on the way.

A run lives in OUTPUT.run (recipe, metrics, checkpoints) until OUTPUT appears, whole. The file is long because a run is
one class, whose methods stand in the order in which they are called.
"""

from __future__ import annotations

import gc
import os
import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from lrsurgery.checkpoints.build import check_plain_factors
from lrsurgery.checkpoints.mapping import notes_of
from lrsurgery.checkpoints.output import check_apart, check_output
from lrsurgery.checkpoints.upstream.own import lacks_argument
from lrsurgery.data.batches import Examples, Rows
from lrsurgery.data.datasets import EVAL_SPLITS
from lrsurgery.data.examples import evaluation_examples, open_rows, prepare_subject, training_examples
from lrsurgery.data.images import Preprocessing, other_pixels
from lrsurgery.data.options import NO_TASK, DataOptions
from lrsurgery.data.tasks import TASKS, Subject, task_of
from lrsurgery.data.unlabelled.agreement import Agreement
from lrsurgery.data.unlabelled.models import load_bare
from lrsurgery.errors import Interrupted, OutputError, RecipeError, SourceError, TrainingError
from lrsurgery.files.faults import disk_faults
from lrsurgery.files.locks import locked
from lrsurgery.files.writing import with_name
from lrsurgery.linalg.pivot import Side
from lrsurgery.progress import USUAL, Listener
from lrsurgery.report.runs import DENSE_TRAINED, stages_of
from lrsurgery.report.schema import Report
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.training.blend import Blend, BlendCallback
from lrsurgery.training.checkpoints import WEIGHTS, State, check_owner, step_of
from lrsurgery.training.forms import describe, published_sides, to_publish_, to_train_
from lrsurgery.training.loop.arguments import total_steps, training_arguments
from lrsurgery.training.loop.callbacks import RunCallback, interrupts
from lrsurgery.training.loop.dynamics import overshoot
from lrsurgery.training.loop.range_test import range_test, test_length
from lrsurgery.training.loop.teacher import match_teacher
from lrsurgery.training.loop.trainer import LowRankTrainer, quality, release_
from lrsurgery.training.loop.unlabelled import prepare_unlabelled, training_task
from lrsurgery.training.optimizers.spectron import others_note
from lrsurgery.training.publish import FinishedRun, Outcome, gather, outcome_of, publish, round_to_stored_
from lrsurgery.training.recipe import AUTO, SPECTRON, USUAL_LR, Recipe, check_recipe_for, read_recipe
from lrsurgery.training.run_folder import BLENDED, Facts, RunFolder
from lrsurgery.training.switch import check_surgery, end_blend_, factorise_subject_, restore_structure_, switch_


def finetune(
    settings: Mapping[str, object],
    output: Path | None = None,
    *,
    recipe_file: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    keep_checkpoints: bool = False,
    command: str | None = None,
    listener: Listener = USUAL,
) -> Outcome:
    """Train a model by `settings` (fields of `Recipe`) on top of those in `recipe_file`, and write it to `output`.

    With `resume` a run that was interrupted goes on from its last checkpoint, with the settings it was begun with.
    Every process of `torchrun` or `accelerate launch` calls this.

    Raises SurgeryError for what the user can put right, Interrupted after SIGINT or SIGTERM, once all is saved.
    """
    asked = {**(read_recipe(recipe_file) if recipe_file else {}), **settings}
    output = with_name(output or _default_output(asked))
    if resume and (done := _finished(output, keep_checkpoints, listener)) is not None:
        return done
    run = _Run(asked, output, resume=resume, overwrite=overwrite, command=command, listener=listener)
    with locked(run.output) if run.leads else nullcontext():
        return _train(run, keep_checkpoints)


def _default_output(asked: Mapping[str, object]) -> Path:
    if not asked.get("model"):
        raise RecipeError("no model given; name it, or with --resume name the run by its --output")
    return Path(f"{Recipe().merged(asked).resolve(str(asked['model']), weights=False).name}-finetuned")


def _finished(output: Path, keep_checkpoints: bool, listener: Listener) -> Outcome | None:
    """The outcome of a run that was killed after its output was whole; None for any other run."""
    folder = RunFolder(output)
    if not folder.is_published(output):
        return None
    listener.note(f"{output}: the run is finished")
    if not keep_checkpoints and int(os.environ.get("WORLD_SIZE", "1")) == 1:  # else the others look at it too
        with locked(output):
            _close(folder, listener)
    return outcome_of(output)


def _close(folder: RunFolder, listener: Listener) -> None:
    for left in folder.close():
        listener.note(f"{left}: stays, since this program did not write it")


def _train(run: _Run, keep_checkpoints: bool) -> Outcome:
    try:
        with disk_faults(run.folder.path):
            run.check_free()  # another process may have been at work until now
            outcome = run.train()
        if run.leads and not keep_checkpoints:
            _close(run.folder, run.listener)
        return outcome
    except Interrupted:
        raise
    except BaseException as e:
        kept = run.folder.last_good() if run.opened or run.resumed else None
        if run.leads and kept is not None:
            run.folder.drop_incomplete()  # its place on a full disk is needed
        elif run.leads and run.opened:
            run.folder.remove()  # nothing in it to go on from
        if kept is not None and isinstance(e, KeyboardInterrupt | SystemExit):  # a second Ctrl-C
            raise Interrupted(f"interrupted; the last good checkpoint stays: {kept}; to continue: {run.again}") from e
        if isinstance(e, TrainingError):
            raise TrainingError(
                f"{e}; " + (f"the last good checkpoint stays: {kept}" if kept else "nothing is kept")
            ) from e
        if isinstance(e, OutputError) and e.__cause__ is not None:  # a disk that refuses
            stays = f"the last good checkpoint stays: {kept}; to continue: {run.again}" if kept else "nothing is kept"
            raise OutputError(f"{e}; {stays}") from e.__cause__
        raise
    finally:
        run.leave()


@dataclass(frozen=True)
class _Parts:
    """What a run trains and measures."""

    rows: Rows
    held_out: Rows | None
    subject: Subject
    train: Examples
    evaluation: Examples | None
    teacher: Subject | None
    total: int  # optimizer steps
    agreement: Agreement | None = None  # with the teacher, where there is no task


class _Run:
    """One run, from its settings to its output."""

    def __init__(
        self,
        asked: Mapping[str, object],
        output: Path,
        *,
        resume: bool,
        overwrite: bool,
        command: str | None,
        listener: Listener,
    ) -> None:
        self.overwrite, self.command, self.listener = overwrite, command, listener
        self.notes: list[str] = []
        self.seconds = 0.0
        self.opened = False  # the run's folder, by this process
        self.trainer: LowRankTrainer | None = None  # of the last stage
        self.read: dict[str, Side | None] = {}  # sides of layers that were read pivoted and train balanced
        self.blend: Blend | None = None  # once it is begun
        self.sides: dict[str, Side | None] = {}  # published, of layers that train in another form
        self.output = output
        self.folder = RunFolder(self.output)
        self.folder.check()
        self.resumed = resume and self.folder.is_unfinished
        self.recipe = self.folder.resumed_recipe(asked) if self.resumed else Recipe().merged(asked)
        self.recipe.check()
        assert self.recipe.model is not None
        self.source = self.recipe.resolve(self.recipe.model, weights=not self.recipe.from_scratch)
        check_recipe_for(self.recipe, self.source)
        check_plain_factors(self.source)
        self.task = training_task(self.recipe, self.source)
        # this also starts the process group, under torchrun
        self.args = training_arguments(self.recipe, self.folder.path, evaluates=self._evaluates)
        self.leads: bool = self.args.process_index == 0
        self.check_free()
        if resume and not self.resumed:
            listener.note(f"{self.folder.path}: no run to resume, so this one begins at the first step")
        if self._sharded and self.recipe.dense_steps:
            raise RecipeError("dense_steps: the switch does not work under FSDP; use data parallelism, or two runs")
        if self._sharded and self.recipe.blend:
            raise RecipeError("blend: does not work under FSDP, whose weights are sharded; use data parallelism")
        if self._sharded and self.recipe.generate:
            raise RecipeError("generate: does not work under FSDP; lrsurgery evaluate generates from the output")
        if self._sharded and self.recipe.against_trained:
            raise RecipeError("against_trained: does not work under FSDP; train the dense model in a run of its own")

    def check_free(self) -> None:
        """Raise OutputError if the output or the run's folder may not be written, and before anything is."""
        recipe, read = self.recipe, (self.source.folder, *self.source.files)
        others = (recipe.teacher, recipe.against)
        check_output(self.output, self.source, self.overwrite, others)
        check_apart(self.folder.path, [Path(place) for place in (*read, recipe.model, *others) if place is not None])
        self.folder.check()
        if not self.resumed and self.folder.is_unfinished and not self.overwrite:
            raise OutputError(
                f"{self.folder.path}: an unfinished run; pass --resume to continue it, --overwrite to start over"
            )

    @property
    def _sharded(self) -> bool:
        return bool(self.args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"

    @property
    def _evaluates(self) -> bool:
        return self.recipe.eval_data is not None or self.recipe.eval_split is not None

    def train(self) -> Outcome:
        """All of the run: dense steps and the switch where they are asked for, low-rank steps, the output."""
        recipe = self.recipe
        facts = self._facts()
        torch.manual_seed(recipe.seed)  # a new head is drawn by it
        parts = self._prepare()
        subject = parts.subject
        if recipe.blend >= parts.total:
            raise RecipeError(f"blend {recipe.blend}: must be below the {parts.total} steps of the whole run")
        if recipe.dense_steps >= parts.total:
            raise RecipeError(
                f"dense_steps {recipe.dense_steps}: must be below the {parts.total} steps of the whole run"
            )
        checkpoint = self._resumed_checkpoint()
        if checkpoint is not None:
            self.listener.note(f"going on from {checkpoint}")
        if recipe.rank:  # refused now, and not after the dense steps
            check_surgery(subject, recipe)
        self._open(facts)
        if checkpoint is None:
            self._measure_dense(parts)
        dense = self._dense_layers(parts) if self._blends(checkpoint) else {}
        if recipe.rank and not recipe.dense_steps and checkpoint is None:
            factorise_subject_(subject, recipe, self.folder if self.leads else None)
        if recipe.lr == AUTO:
            if checkpoint is not None:
                raise RecipeError(
                    f"{self.folder.path}: names no learning rate that was found, but has steps that used one; start"
                    " over with --overwrite"
                )
            recipe = self._find_lr(parts)
        if recipe.dense_steps and (checkpoint is None or checkpoint.parent.name == "dense"):
            if checkpoint is None or step_of(checkpoint) < recipe.dense_steps:
                checkpoint = self._train_stage(parts, "dense", checkpoint)
            else:
                check_owner(checkpoint, subject.model)
                safetensors.torch.load_model(subject.model, str(checkpoint / WEIGHTS))
            checkpoint = switch_(subject, recipe, checkpoint, self.folder, self.leads, self._note)
            self._together()
        elif recipe.rank and checkpoint is not None:
            restore_structure_(subject, self.folder, checkpoint, lambda: self._blend(subject, dense))
            if step_of(checkpoint) == recipe.dense_steps:  # the factors are looked at before the Trainer loads them
                safetensors.torch.load_model(subject.model, str(checkpoint / WEIGHTS))
        self.sides = published_sides(subject.body, recipe, self.read)
        self._note(describe(subject.body, self.sides))
        if recipe.optimizer == SPECTRON:
            self._note(others_note(subject.body))
        stage = "factorised" if factorised_layers(subject.body) else "dense"
        if self._blends(checkpoint):
            self._blend(subject, dense)
            dense.clear()
            checkpoint = self._train_stage(parts, BLENDED, checkpoint)
            assert self.blend is not None
            checkpoint = end_blend_(subject, recipe, checkpoint, self.folder, self.leads, self.blend)
            self._together()
        self._train_stage(parts, stage, checkpoint)
        return self._finish(parts, stage)

    # what is there before training

    def _facts(self) -> Facts:
        facts = Facts.of(self.recipe, self.source, self.args.world_size)
        if self.resumed:
            self.notes += self.folder.read_notes()
            self._note(self.folder.check_facts(facts, self.recipe))
        return facts

    def _prepare(self) -> _Parts:
        recipe = self.recipe
        assert recipe.data is not None
        if self.task == NO_TASK:
            return self._prepare_unlabelled()
        evaluation: Examples | None = None
        held_out: Rows | None = None
        with self.args.main_process_first(desc="reading data"):
            rows = open_rows(recipe.data, self.task, recipe, split=recipe.split, streaming=recipe.streaming)
            subject = self._build(rows)
            if (lacks := lacks_argument(subject.model, ["labels"])) is not None:
                raise SourceError(f"{recipe.model}: {type(subject.body).__name__}: {lacks}")
            train = self._examples(subject, rows)
            if self._evaluates:
                data = recipe.eval_data or recipe.data
                held_out = open_rows(data, self.task, recipe, split=recipe.eval_split, prefer=EVAL_SPLITS)
                evaluation = evaluation_examples(subject, held_out, recipe, trust_remote_code=recipe.trust_remote_code)
        read = () if recipe.from_scratch else notes_of(self.source, trust_remote_code=recipe.trust_remote_code)
        for note in (*read, *subject.notes):
            self._note(note)
        # said but not kept: they name the data's files, which a card does not
        for note in (*train.notes, *(evaluation.notes if evaluation is not None else ())):
            self.listener.note(note)
        teacher = None
        if recipe.teacher is not None:
            source, trust = recipe.resolve(recipe.teacher), recipe.trust_remote_code
            teacher = prepare_subject(source, DataOptions(task=task_of(source)), rows, trust_remote_code=trust)
            teacher = match_teacher(subject, teacher, train.size if TASKS[self.task].is_language else 1, trust)
            for note in (*(f"{recipe.teacher}: {note}" for note in source.notes), *teacher.notes):
                self._note(note)
            if TASKS[self.task].takes_images and not TASKS[self.task].takes_masks:
                ours, theirs = (
                    Preprocessing.of(each.source, each.body, size, trust_remote_code=trust)
                    for each, size in ((subject, recipe.image_size), (teacher, None))
                )
                self._note(other_pixels(ours, theirs, f"teacher {recipe.teacher}"))
        return _Parts(rows, held_out, subject, train, evaluation, teacher, total_steps(recipe, self.args, train))

    def _prepare_unlabelled(self) -> _Parts:
        recipe = self.recipe
        with self.args.main_process_first(desc="reading data"):
            found = prepare_unlabelled(recipe, self.source, evaluates=self._evaluates)
        subject, train, evaluation = found.pair.subject, found.train, found.evaluation
        self.read = to_train_(subject.body, recipe.train_form) or self.read
        for note in (*notes_of(self.source, trust_remote_code=recipe.trust_remote_code), *found.notes):
            self._note(note)
        for note in (*train.notes, *(evaluation.notes if evaluation is not None else ())):
            self.listener.note(note)
        total = total_steps(recipe, self.args, train)
        pair = found.pair
        return _Parts(found.rows, found.held_out, subject, train, evaluation, pair.teacher, total, pair.agreement)

    def _build(self, rows: Rows) -> Subject:
        recipe = self.recipe
        if self.task == NO_TASK:
            subject = load_bare(self.source, rows, recipe, trust_remote_code=recipe.trust_remote_code)
            self.read = to_train_(subject.body, recipe.train_form) or self.read
            return subject
        subject = prepare_subject(
            self.source,
            recipe,
            rows,
            new_head=recipe.new_head,
            from_scratch_seed=recipe.seed if recipe.from_scratch else None,
            trust_remote_code=recipe.trust_remote_code,
        )
        self.read = to_train_(subject.body, recipe.train_form) or self.read
        return subject

    def _examples(self, subject: Subject, rows: Rows) -> Examples:
        recipe = self.recipe
        return training_examples(
            subject,
            rows,
            recipe,
            stride=recipe.stride,
            seed=recipe.seed,
            augment=recipe.augment,
            streaming=recipe.streaming,
            trust_remote_code=recipe.trust_remote_code,
        )

    @property
    def again(self) -> str:
        """The command that continues the run."""
        return f"lrsurgery finetune --resume --output {shlex.quote(str(self.output))}" + (
            " --overwrite" if self.overwrite else ""
        )

    def _resumed_checkpoint(self) -> Path | None:
        """The checkpoint to go on from; what was written after it is dropped."""
        if not self.resumed:
            return None
        self._together()
        if self.leads:
            self.folder.drop_incomplete()
            self.folder.set_damaged_aside(self.listener.note)
            self.folder.cut_metrics(self.folder.last_good())
        self._together()
        return self.folder.last_good()

    def _open(self, facts: Facts) -> None:
        """Make the run's folder, once model, data and settings are known to go together."""
        self._together()
        if self.leads and not self.resumed:
            self.opened = True
            self.folder.begin(self.recipe, facts, self.notes)
        self._together()

    def _measure_dense(self, parts: _Parts) -> None:
        """Measure the dense model, where there is one that the run itself will not measure."""
        recipe = self.recipe
        if parts.evaluation is None or (recipe.dense_steps and not recipe.against):
            return
        if parts.agreement is not None:  # the teacher agrees with itself
            return
        dense, examples = parts.teacher, parts.evaluation
        if recipe.against is not None:
            assert parts.held_out is not None
            dense = self._dense(parts.rows, parts.subject.task)
            examples = evaluation_examples(dense, parts.held_out, recipe, trust_remote_code=recipe.trust_remote_code)
        elif self._sharded:  # FSDP shards a model in place, be it only to measure it
            dense = None
        elif recipe.rank and not recipe.from_scratch:
            dense = parts.subject
        if dense is not None:
            values = quality(dense, recipe, examples, self.listener)
            if self.leads:
                self.folder.append_metrics({"step": 0, "epoch": 0, "stage": "dense", "eval": values})
            self.listener.evaluated("dense", 0, 0, values)

    # training

    def _blends(self, checkpoint: Path | None) -> bool:
        """Whether the next step, after that of the checkpoint, is of self-guided training, or ends it."""
        return bool(self.recipe.blend) and (checkpoint is None or checkpoint.parent.name == BLENDED)

    def _dense_layers(self, parts: _Parts) -> dict[str, nn.Module]:
        """The modules of the dense model by name: before the surgery of this run, or of --against or --teacher."""
        if self.recipe.rank:
            return dict(parts.subject.body.named_modules())
        source, trust = self.recipe.resolve(str(self._dense_name)), self.recipe.trust_remote_code
        options = replace(self.recipe, task=parts.subject.task)
        return dict(prepare_subject(source, options, parts.rows, trust_remote_code=trust).body.named_modules())

    @property
    def _dense_name(self) -> str | None:
        """The model with the dense weights of self-guided training, as the user calls it."""
        recipe = self.recipe
        return recipe.model if recipe.rank else recipe.against or recipe.teacher

    def _blend(self, subject: Subject, dense: Mapping[str, nn.Module]) -> None:
        """Put the dense layers beside the factorised ones, unless they are there or the blend is over."""
        if dense and self.blend is None:
            self.blend = Blend(subject.body, dense, str(self._dense_name))

    def _find_lr(self, parts: _Parts) -> Recipe:
        """Find the learning rate of `lr: auto` on the model as it is; note it, keep it, and return the recipe with it.

        Resumed runs read what was kept; one that was stopped before that has no checkpoint, and finds the same again.
        """
        steps, usual = test_length(parts.total), f"the learning rate is {USUAL_LR:g}"
        if self._sharded or self.args.deepspeed:
            lr, note = USUAL_LR, f"{usual}: no range test where weights are sharded; give --lr"
        elif not steps:
            lr, note = USUAL_LR, f"{usual}: a run of {parts.total} steps is too short for a range test; give --lr"
        else:
            teacher = parts.teacher.model if parts.teacher else None
            curve = range_test(parts.subject, self.recipe, parts.train, teacher, steps, parts.agreement)
            lr, note = curve.found, curve.describe()
        self.recipe = replace(self.recipe, lr=lr)
        if self.leads:
            self.folder.set_lr(self.recipe)
        self._note(note)
        self._together()
        return self.recipe

    def _train_stage(self, parts: _Parts, stage: str, checkpoint: Path | None) -> Path:
        """Train to the stage's end. Returns its last checkpoint; raises Interrupted where a signal came before."""
        recipe, folder, total = self.recipe, self.folder.path / stage, parts.total
        ends = {"dense": recipe.dense_steps, BLENDED: recipe.blend}  # of stages that another follows
        last = ends.get(stage) or total
        judged = bool(recipe.best or recipe.early_stopping) and last == total
        args = training_arguments(recipe, folder, evaluates=self._evaluates, total=total, judged=judged)
        switched = checkpoint is not None and stage == "factorised" and step_of(checkpoint) == recipe.dense_steps
        args.eval_on_start = self._evaluates and (checkpoint is None or switched)
        if checkpoint is None or switched:  # else the weights are not loaded yet
            lr = recipe.peak_lr * (recipe.switch_lr if switched else 1)
            self._note(overshoot(parts.subject.model, recipe, lr))
        with interrupts() as interrupted:
            shown = "factorised" if stage == BLENDED else stage
            callback = RunCallback(self.folder, shown, self.listener, interrupted, parts.train, last)
            teacher = parts.teacher.model if parts.teacher else None
            data = (parts.train, parts.evaluation)
            trainer = LowRankTrainer(parts.subject, recipe, args, *data, teacher, callback, parts.agreement)
            if stage == BLENDED and self.blend is not None:
                trainer.add_callback(BlendCallback(self.blend, recipe.blend, self._note))
            if checkpoint is not None and self._ends_at(checkpoint, last):
                best = State.read(checkpoint).best(checkpoint) if judged else None
                trainer._load_from_checkpoint(str(best or checkpoint))
                trainer.state.global_step = step_of(checkpoint)
            else:
                if checkpoint is not None:
                    check_owner(checkpoint, parts.subject.model)
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        step = trainer.state.global_step
        self.seconds += callback.seconds
        if callback.stopped and step < last:
            raise Interrupted(f"stopped after step {step} of {total}, all is saved; to continue: {self.again}")
        if last == total:
            self.trainer = trainer
        else:
            release_(trainer)
        return folder / f"checkpoint-{step}"

    def _ends_at(self, checkpoint: Path, last: int) -> bool:
        patience = self.recipe.early_stopping
        stopped = patience is not None and State.read(checkpoint).evaluations_without_gain >= patience
        return stopped or step_of(checkpoint) >= last

    # the output

    def _finish(self, parts: _Parts, stage: str) -> Outcome:
        trainer, subject = self.trainer, parts.subject
        assert trainer is not None
        step = trainer.state.global_step
        done = [record for record in self.folder.evaluations() if record["stage"] == stage]
        kept = trainer.args.load_best_model_at_end
        if not self._sharded:  # then what is measured is in the form that is published
            to_publish_(subject.body, self.sides)
        round_to_stored_(subject)
        stale = kept or subject.stored != torch.float32 or not done or done[-1]["step"] != step
        self._together()
        if parts.evaluation is not None and stale:
            trainer.evaluate()
        self._together()
        final = gather(trainer, subject, lambda: self._build(parts.rows))
        if self._sharded:
            to_publish_(final.body, self.sides)
        if self.recipe.against_trained:
            self._train_dense(parts)
        outcome = Outcome(self.output, Report((), 0, 0), {}, step)
        if self.leads:
            stages = stages_of(self.folder.evaluations(), stage)
            run = FinishedRun(
                recipe=self.recipe, command=self.command, notes=tuple(self.notes), steps=step, stages=stages
            )
            report = publish(final, self.output, self.folder, run, overwrite=self.overwrite)
            outcome = Outcome(self.output, report, stages, step, self.seconds)
        self._together()
        return outcome

    def _dense(self, rows: Rows, task: str, new_head: bool = False) -> Subject:
        """The dense model to compare with: that of --against, else the run's own before its surgery."""
        recipe = self.recipe
        if recipe.against is None:
            return self._build(rows)
        source, trust = recipe.resolve(recipe.against), recipe.trust_remote_code
        return prepare_subject(source, replace(recipe, task=task), rows, new_head=new_head, trust_remote_code=trust)

    def _train_dense(self, parts: _Parts) -> None:
        """Train the dense model for as many steps on the same data with the same settings, and measure it."""
        assert parts.held_out is not None
        recipe = replace(self.recipe, rank=(), dense=True, dense_steps=0, blend=0, teacher=None)
        torch.manual_seed(recipe.seed)
        subject = self._dense(parts.rows, parts.subject.task, recipe.new_head)
        judged = bool(recipe.best or recipe.early_stopping)
        train = self._examples(subject, parts.rows)
        evaluation = evaluation_examples(subject, parts.held_out, recipe, trust_remote_code=recipe.trust_remote_code)
        folder = self.folder.path / DENSE_TRAINED.replace(" ", "-")
        args = training_arguments(recipe, folder, evaluates=True, total=parts.total, judged=judged)
        with interrupts() as interrupted:
            callback = RunCallback(self.folder, DENSE_TRAINED, self.listener, interrupted, train, parts.total)
            trainer = LowRankTrainer(subject, recipe, args, train, evaluation, None, callback)
            trainer.train()
        if callback.stopped and trainer.state.global_step < parts.total:
            raise Interrupted(
                f"stopped while the dense model was trained as long; the healed one is saved; to continue: {self.again}"
            )
        round_to_stored_(subject)
        trainer.evaluate()
        release_(trainer)

    def _note(self, text: str | None) -> None:
        if text is not None and text not in self.notes:
            self.notes.append(text)
            self.listener.note(text)
            if self.leads and (self.opened or self.resumed):
                self.folder.append_note(text)

    def _together(self) -> None:
        self.args.distributed_state.wait_for_everyone()

    def leave(self) -> None:
        """Let go of the process group, of the reducers that hold on to it first."""
        self.trainer = None
        gc.collect()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
