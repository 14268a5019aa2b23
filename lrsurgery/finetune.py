"""`finetune`: heal a factorised model, train one from scratch in low rank, or pre-train dense and factorise on the way.

A run lives in OUTPUT.run (recipe, metrics, checkpoints) until OUTPUT appears, whole.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import Trainer, TrainingArguments

from lrsurgery.data import EVAL_SPLITS, digest_of, fingerprint
from lrsurgery.dynamics import steepest_decay, whole
from lrsurgery.errors import Interrupted, OutputError, RecipeError
from lrsurgery.evaluation import quality
from lrsurgery.factorise import factorise_
from lrsurgery.options import Options
from lrsurgery.preparation import (
    Examples,
    evaluation_examples,
    open_rows,
    prepare_subject,
    training_examples,
)
from lrsurgery.recipes import Recipe, read_recipe, write_recipe
from lrsurgery.report import Report
from lrsurgery.saving import round_to_stored_, save_subject
from lrsurgery.sources import Source, resolve
from lrsurgery.staging import check_output, staged
from lrsurgery.stream import versions
from lrsurgery.surgery import factorised_layers, swap_
from lrsurgery.switching import write_switched
from lrsurgery.tasks import Subject, check_teacher, load_subject, task_of
from lrsurgery.training import (
    METRICS,
    WEIGHTS,
    Event,
    LowRankTrainer,
    RunCallback,
    Watch,
    append_metrics,
    cut_metrics,
    last_checkpoint,
    mark_complete,
    parameter_groups,
    read_metrics,
    release_,
    step_of,
    training_arguments,
)

RECIPE = "recipe.yaml"
FACTS = "run.json"  # fingerprints of the model and the data
LAYERS = "layers.json"  # kind and rank of each layer that was factorised within the run
NOTES = "notes.jsonl"  # told to the user in the run, and in its report
MAY_DIFFER = ("device", "report_to")  # on resuming


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    output: Path
    report: Report
    stages: dict[str, dict[str, float]]  # "dense", "factorised", "healed" (or "trained"): what was measured at each
    steps: int

    def to_dict(self) -> dict[str, Any]:
        return {"output": str(self.output), "steps": self.steps, "stages": self.stages, "report": self.report.to_dict()}


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
        if output is None:
            if not asked.get("model"):
                raise RecipeError("no model given; name it, or with --resume name the run by its --output")
            output = Path(f"{resolve(str(asked['model']), weights=False).name}-finetuned")
        self.output = output
        self.folder = output.with_name(f"{output.name}.run")
        self.resumed = resume and (self.folder / FACTS).is_file()
        self.recipe = _resumed_recipe(self.folder, asked) if self.resumed else Recipe().merged(asked)
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
        if self.resumed and self.output.exists() and not self.overwrite:
            raise OutputError(f"{self.output}: this run is finished, there is nothing to resume")
        check_output(self.output, self.source, self.overwrite)
        if not self.resumed and (self.folder / FACTS).is_file() and not self.overwrite:
            raise OutputError(f"{self.folder}: an unfinished run; pass --resume to go on, --overwrite to begin anew")
        if resume and not self.resumed:
            self.watch(Event("note", text=f"{self.folder}: no run to resume, so this one begins at the first step"))

    # the parts of a run

    def train(self) -> Outcome:
        recipe = self.recipe
        self._open()
        torch.manual_seed(recipe.seed)  # a new head is drawn by it
        with self.args.main_process_first(desc="reading data"):
            subject, train, evaluation = self._examples()
        for note in subject.notes:
            self._note(note)
        teacher = self._teacher(subject)
        total = self._total_steps(train)
        if recipe.dense_steps >= total:
            raise RecipeError(f"dense_steps {recipe.dense_steps}: must be below the {total} steps of the whole run")
        checkpoint = self._last_checkpoint()
        if checkpoint is not None:
            self.watch(Event("note", text=f"going on from {checkpoint}"))
        if recipe.rank:  # refused now, and not after the dense steps
            self._surgery().plan_for(subject.body, dict(getattr(subject.body, "all_tied_weights_keys", None) or {}))
        self._measure_dense(subject, evaluation, teacher)
        if recipe.dense_steps and (checkpoint is None or checkpoint.parent.name == "dense"):
            if checkpoint is None or step_of(checkpoint) < recipe.dense_steps:
                checkpoint = self._train_stage(subject, "dense", train, evaluation, teacher, total, checkpoint)
            else:
                safetensors.torch.load_model(subject.model, str(checkpoint / WEIGHTS))
            checkpoint = self._switch(subject, checkpoint)
        elif recipe.rank and checkpoint is not None:
            _give_structure_(subject, json.loads((self.folder / LAYERS).read_text(encoding="utf-8")))
        elif recipe.rank:
            self._factorise(subject)
        stage = "factorised" if factorised_layers(subject.body) else "dense"
        self._train_stage(subject, stage, train, evaluation, teacher, total, checkpoint)
        return self._finish(subject, stage, evaluation)

    def _open(self) -> None:
        """The run's folder; on resuming, a check that model and data are those it was begun with."""
        recipe = self.recipe
        files = [*self.source.files, *([self.source.folder / "config.json"] if self.source.folder else [])]
        facts = {
            "model": fingerprint(files, self.source.reference if not files else ""),
            "data": digest_of(recipe.data or "", recipe.split, recipe.subset),
            "eval_data": digest_of(recipe.eval_data or "", recipe.eval_split, recipe.subset),
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
        self._together()
        if self.leads and not self.resumed:
            shutil.rmtree(self.folder, ignore_errors=True)
            try:
                self.folder.mkdir(parents=True)
                write_recipe(recipe, self.folder / RECIPE, versions())
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

    def _total_steps(self, train: Examples) -> int:
        if self.recipe.steps is not None:
            return self.recipe.steps
        batches = math.ceil(len(train.dataset) / self.args.train_batch_size)
        batches = math.ceil(batches / self.args.world_size)
        epochs = 1.0 if self.recipe.epochs is None else self.recipe.epochs
        a_pass: int = max(1, math.ceil(batches / self.args.gradient_accumulation_steps))
        return max(1, math.ceil(epochs * a_pass))

    def _last_checkpoint(self) -> Path | None:
        if not self.resumed:
            return None
        folders = [self.folder / "factorised", self.folder / "dense"]
        found = next((c for c in map(last_checkpoint, folders) if c is not None), None)
        self._together()
        if self.leads:  # what a kill left half-written, and what is past the place where this goes on
            for folder in folders:
                for stale in folder.glob("checkpoint-*"):
                    if not (stale / "complete").is_file():
                        shutil.rmtree(stale)
        self._together()
        return found

    def _surgery(self) -> Options:
        r = self.recipe
        return Options(r.rank, r.init, r.conv, r.include, r.exclude, r.allow_larger, r.multiple_of, r.seed)

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

    def _factorise(self, subject: Subject) -> None:
        options = self._surgery()
        factorise_(
            subject.body, rank=options.rank, init=options.init, conv=options.conv, include=options.include,
            exclude=options.exclude, allow_larger=options.allow_larger, multiple_of=options.multiple_of,
            seed=options.seed,
        )  # fmt: skip
        layers = {name: [layer.kind, layer.rank] for name, layer in factorised_layers(subject.body).items()}
        if self.leads:
            (self.folder / LAYERS).write_text(json.dumps(layers, indent=2) + "\n", encoding="utf-8")

    def _switch(self, subject: Subject, dense: Path) -> Path:
        decayed = _decayed(subject)
        before = parameter_groups(subject.model, self.recipe, decayed)
        self._factorise(subject)
        after = parameter_groups(subject.model, self.recipe, _decayed(subject))
        target = self.folder / "factorised" / dense.name
        if self.leads:
            partial = target.with_name(f"partial-{step_of(dense)}")
            shutil.rmtree(partial, ignore_errors=True)
            reset = write_switched(dense, partial, subject.model, before, after, self.recipe.switch_lr)
            partial.rename(target)
            mark_complete(target)
            if reset:
                self._note(
                    f"the optimizer's state of {len(reset)} factorised layers is not Adam's or SGD's; it was reset"
                )
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
        if checkpoint is None or switched:
            self._warn_of_divergence(subject, recipe.lr * (recipe.switch_lr if switched else 1))
        with interrupts() as interrupted:
            callback = RunCallback(self.folder, stage, self._unit(train, args), interrupted, last)
            trainer = LowRankTrainer(
                subject, recipe, args, train, evaluation, teacher.model if teacher else None, callback
            )
            if checkpoint is not None and _is_over(checkpoint, last):
                state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
                trainer._load_from_checkpoint(state["best_model_checkpoint"] if judged else str(checkpoint))
                trainer.state.global_step = state["global_step"]
            else:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        step = trainer.state.global_step
        if callback.stopped and step < last:
            again = f"lrsurgery finetune --resume --output {self.output}"
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

    def _warn_of_divergence(self, subject: Subject, lr: float) -> None:
        recipe = self.recipe
        drives = recipe.decay == "frobenius" and (not recipe.decay_coupled or recipe.optimizer == "sgd")
        if not drives or not factorised_layers(subject.model):
            return
        layer, square = steepest_decay(subject.model)
        reach = lr * recipe.decay_strength * square
        if reach > 1:
            self._note(
                f"decay_strength {recipe.decay_strength:g} overshoots: lr * strength * sigma_max^2 is {reach:.3g} at"
                f" {layer.removeprefix('body.')}, and must stay below 1; write at most {1 / (lr * square):.2g}"
            )

    def _unit(self, train: Examples, args: TrainingArguments) -> Watch:
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * train.size

        def tell(event: Event) -> None:
            self.watch(replace(event, unit=train.unit, per_step=per_step))

        return tell

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
            with staged(self.output, overwrite=self.overwrite) as place:
                report = save_subject(final, place, self.output.name, facts, _card_lines(self.recipe, step, stages))
                write_recipe(self.recipe, place / RECIPE, versions())
                if (self.folder / METRICS).is_file():
                    shutil.copyfile(self.folder / METRICS, place / METRICS)
                for logs in self.folder.glob("*/runs"):  # TensorBoard's
                    shutil.copytree(logs, place / "runs" / logs.parent.name)
            outcome = Outcome(self.output, report, stages, step)
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
            _give_structure_(twin, layers)
        twin.model.load_state_dict(state)
        return replace(twin, stored=subject.stored, notes=subject.notes)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self.watch(Event("note", text=text))
            if self.leads and self.folder.is_dir():
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


def check_recipe_for(recipe: Recipe, source: Source) -> None:
    """Raises RecipeError where a recipe asks of a model what cannot be done with it."""
    model = source.reference
    if (source.config.get("quantization_config") or {}).get("quant_method") == "lrsurgery":
        if recipe.rank or recipe.dense_steps or recipe.dense:
            raise RecipeError(f"{model}: is factorised already; leave --rank, --dense-steps and --dense out")
        if recipe.from_scratch:
            raise RecipeError(
                f"{model}: is factorised; for training from scratch use `lrsurgery factorise DENSE --from-scratch`"
            )
    elif not (recipe.rank or recipe.dense or recipe.from_scratch):
        raise RecipeError(
            f"{model}: is dense; pass --rank R to factorise it first, --dense-steps N --rank R to factorise it after N"
            " steps, or --dense to train it as it is"
        )


def stages_of(records: list[dict[str, Any]], stage: str) -> dict[str, dict[str, float]]:
    """What was measured at each stage of a run, from its metrics' evaluations in order."""
    dense = [r["eval"] for r in records if r["stage"] == "dense"]
    factorised = [r["eval"] for r in records if r["stage"] == "factorised"]
    if stage == "dense":
        return {"before": dense[0], "trained": dense[-1]} if dense else {}
    found = {"dense": dense[-1]} if dense else {}
    return {**found, "factorised": factorised[0], "healed": factorised[-1]} if factorised else found


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Within the block, the first SIGINT or SIGTERM only raises a flag; a second one interrupts at once."""
    raised: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def handle(number: int, frame: Any) -> None:
        if raised:
            raise KeyboardInterrupt
        raised.append(number)

    former = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(raised)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _resumed_recipe(folder: Path, asked: Mapping[str, Any]) -> Recipe:
    saved = Recipe().merged(read_recipe(folder / RECIPE))
    wanted = saved.merged(asked)
    for name in asked:
        old, new = getattr(saved, name), getattr(wanted, name)
        if old != new and name not in MAY_DIFFER:
            raise RecipeError(
                f"{folder}: was begun with {name} {old}, now it is {new}; resume with what it was begun with,"
                " or begin anew with --overwrite"
            )
    return replace(saved, **{name: getattr(wanted, name) for name in MAY_DIFFER if name in asked})


def read_notes(folder: Path) -> list[str]:
    """What a run has told its user."""
    file = folder / NOTES
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def _give_structure_(subject: Subject, layers: Mapping[str, Any]) -> None:
    """Factorised layers with room for weights that are loaded next."""
    swap_(subject.body, {name: (kind, rank) for name, (kind, rank) in layers.items()})
    for layer in factorised_layers(subject.body).values():
        layer.to_empty(device="cpu")


def _is_over(checkpoint: Path, last: int) -> bool:
    return step_of(checkpoint) >= last


def _decayed(subject: Subject) -> set[str]:
    """What the Trainer decays: all but biases and norms."""
    return set(Trainer.get_decay_parameter_names(None, subject.model))


def _card_lines(recipe: Recipe, steps: int, stages: Mapping[str, Mapping[str, float]]) -> list[str]:
    measured = {name: values for name, values in stages.items() if values}
    decay = f"{recipe.decay} decay of strength {recipe.decay_strength:g}" if recipe.decay != "none" else "no decay"
    teacher = f", teacher `{recipe.teacher}`" if recipe.teacher else ""
    lines = [
        f"Trained for {steps} steps on `{Path(recipe.data or '').name}` with {recipe.optimizer}, learning rate"
        f" {recipe.lr:g} ({recipe.schedule}), {decay} on the factors{teacher}; `recipe.yaml` has every setting,"
        " `metrics.jsonl` the course of the run.",
    ]
    if measured:
        columns = [c for c in ("loss", "perplexity", "top1", "top5") if all(c in v for v in measured.values())]
        lines += ["", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(f'{v[c]:.4f}' for c in columns)} |" for name, v in measured.items()]
    return lines
