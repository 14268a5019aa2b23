"""Healing of a copy in memory, as `finetune` heals a written folder with the same settings."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from lrsurgery.calibration import texts
from lrsurgery.data.examples import open_rows, training_examples
from lrsurgery.data.options import DataOptions
from lrsurgery.data.tasks import Subject
from lrsurgery.errors import RecipeError
from lrsurgery.factorise.options import Calibration
from lrsurgery.training.forms import to_publish_, to_train_
from lrsurgery.training.loop.arguments import training_arguments
from lrsurgery.training.loop.trainer import LowRankTrainer, release_
from lrsurgery.training.publish import round_to_stored_
from lrsurgery.training.recipe import Recipe

FLAGS = ("join", "test_size")  # settings without a value on the command line


@dataclass(frozen=True)
class Healing:
    """A number of finetune steps on the calibration data, with the recipe's defaults for all else.

    Raises RecipeError where there is no data to train on.
    """

    steps: int
    calibration: Calibration | None
    device: str = "auto"
    how: DataOptions | None = None  # of labels, which calibration does not read

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise RecipeError(f"heal {self.steps}: write at least 1 step, or leave --heal out")
        if self.calibration is None or self.calibration.data in (None, texts.NAME):
            raise RecipeError("--heal trains on the calibration data; add --calibration DATA of your own")

    @property
    def settings(self) -> dict[str, object]:
        """Settings of `finetune`, as far as they differ from the defaults; without the model."""
        assert self.calibration is not None
        usual, how = vars(DataOptions()), vars(self.calibration.how) | self._labels
        given = {each.name: how[each.name] for each in fields(DataOptions) if how[each.name] != usual[each.name]}
        split = {} if self.calibration.split is None else {"split": self.calibration.split}
        device = {} if self.device == "auto" else {"device": self.device}
        return {"data": self.calibration.data, **split, **given, "steps": self.steps, **device}

    @property
    def _labels(self) -> dict[str, object]:
        return {} if self.how is None else {name: vars(self.how)[name] for name in ("label_column", "label_map")}

    def command(self, folder: Path) -> str:
        """The command that heals a written folder so."""
        words = ["lrsurgery", "finetune", str(folder)]
        for name, value in self.settings.items():
            words += [f"--{name.replace('_', '-')}"] + ([] if name in FLAGS else [str(value)])
        return shlex.join([*words, "--output", f"{folder}-healed"])

    def apply_(self, subject: Subject, *, trust_remote_code: bool) -> None:
        """Train the model of a subject in place; it ends in its own form, and rounded to the dtype it is stored in."""
        settings: Mapping[str, object] = {"model": subject.source.reference, **self.settings}
        recipe = Recipe().merged(settings)
        recipe.check()
        torch.manual_seed(recipe.seed)
        rows = open_rows(str(recipe.data), subject.task, recipe, split=recipe.split)
        sides = to_train_(subject.body, recipe.train_form)
        train = training_examples(
            subject,
            rows,
            recipe,
            stride=recipe.stride,
            seed=recipe.seed,
            augment=recipe.augment,
            trust_remote_code=trust_remote_code,
        )
        with tempfile.TemporaryDirectory() as folder:
            args = training_arguments(recipe, Path(folder), evaluates=False, total=self.steps)
            args.save_strategy = "no"  # type: ignore[assignment]
            trainer = LowRankTrainer(subject, recipe, args, train, None)
            trainer.train()
            release_(trainer)
        to_publish_(subject.body, sides)
        round_to_stored_(subject)
        subject.model.eval()
