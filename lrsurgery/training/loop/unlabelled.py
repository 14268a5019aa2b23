"""Training without a task: when it is, what it refuses, and what it trains and measures."""

from __future__ import annotations

from dataclasses import dataclass

from lrsurgery.checkpoints.source import Source
from lrsurgery.data.batches import Examples, Rows
from lrsurgery.data.datasets import EVAL_SPLITS
from lrsurgery.data.options import NO_TASK
from lrsurgery.data.tasks import task_of
from lrsurgery.data.unlabelled.models import Pair, examples_of, load_pair, open_unlabelled, task_or_none
from lrsurgery.errors import RecipeError
from lrsurgery.modules import batch_norms
from lrsurgery.training.loop.teacher import compare_vocabularies
from lrsurgery.training.recipe import Recipe

# settings that need labels or a head for them -> what they are without
LABELLED = {
    "new_head": False,
    "streaming": False,
    "stride": None,
    "from_scratch": False,
    "against": None,
    "against_trained": False,
    "teacher_weight": Recipe().teacher_weight,
}


@dataclass(frozen=True)
class Unlabelled:
    """A run's pair of models and its inputs."""

    pair: Pair
    rows: Rows
    held_out: Rows | None
    train: Examples
    evaluation: Examples | None
    notes: tuple[str, ...]


def training_task(recipe: Recipe, source: Source) -> str:
    """Name the task of a run; NO_TASK where the model has none, or none is asked for.

    Raises RecipeError where a model without a task has no teacher, or a setting needs labels.
    """
    if recipe.task not in (None, NO_TASK):
        return str(recipe.task)
    if recipe.task is None and recipe.new_head:  # which needs a task's name
        return task_of(source)
    task = recipe.task or task_or_none(source)
    if task != NO_TASK:
        return task
    if recipe.teacher is None:
        raise RecipeError(_no_teacher(recipe, source))
    for name, value in LABELLED.items():
        if getattr(recipe, name) != value:
            raise RecipeError(
                f"{name}: is for models with a task, and {source.reference} is trained without one; leave it out"
            )
    return NO_TASK


def _no_teacher(recipe: Recipe, source: Source) -> str:
    if recipe.task == NO_TASK:
        return f"task {NO_TASK}: learns from the outputs of the dense model; name it with --teacher"
    try:
        task_of(source)
    except RecipeError as e:
        return f"{e}, or the dense model whose outputs it learns with --teacher"
    return (
        f"{source.reference}: has no classes; name the dense model whose outputs it learns with --teacher, or make a"
        " classifier with --new-head"
    )


def prepare_unlabelled(recipe: Recipe, source: Source, *, evaluates: bool) -> Unlabelled:
    """Open data, model and teacher of a run without a task. Raises SurgeryError."""
    assert recipe.data is not None
    assert recipe.teacher is not None
    trust, teacher = recipe.trust_remote_code, recipe.resolve(recipe.teacher)
    rows = open_unlabelled(recipe.data, recipe, split=recipe.split)
    pair = load_pair(source, teacher, rows, recipe, trust_remote_code=trust)
    seed = recipe.seed if recipe.augment else None
    train = examples_of(pair, rows, recipe, augment_seed=seed, trust_remote_code=trust)
    held_out = evaluation = None
    if evaluates:
        data = recipe.eval_data or recipe.data
        held_out = open_unlabelled(data, recipe, split=recipe.eval_split, prefer=EVAL_SPLITS)
        evaluation = examples_of(pair, held_out, recipe, trust_remote_code=trust)
    notes = [*(f"{recipe.teacher}: {note}" for note in teacher.notes), *pair.notes]
    if batch_norms(pair.subject.model):
        notes.append(f"{source.reference}: batch normalisation keeps its means and variances, as the teacher's does")
    return Unlabelled(pair, rows, held_out, train, evaluation, (*notes, *other_tokens(pair, trust)))


def other_tokens(pair: Pair, trust_remote_code: bool) -> list[str]:
    """Notes on a teacher without a tokenizer. Raises SourceError for one with other tokens than the model's."""
    if not (pair.feed.text or "input_ids" in pair.feed.tensors):
        return []
    who = f"teacher {pair.teacher.source.reference}"
    return compare_vocabularies(pair.subject, pair.teacher, who, trust_remote_code)
