"""What a training run is asked for: the settings, their checks, and the YAML file that holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from lrsurgery.checkpoints.source import Source
from lrsurgery.data.options import DataOptions, check_at_least, check_choice, check_finite
from lrsurgery.errors import RecipeError
from lrsurgery.linalg.inits import get_init
from lrsurgery.surgery.ranks import parse_rank

DECAYS = ("frobenius", "l2", "none")
OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd"}
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Recipe(DataOptions):
    """A whole training run; the CLI's options of the same names say more."""

    model: str | None = None
    data: str | None = None
    eval_data: str | None = None
    split: str | None = None
    eval_split: str | None = None
    streaming: bool = False
    stride: int | None = None  # training blocks begin this many tokens apart; block_size where it is not named
    augment: bool = True
    new_head: bool = False
    # surgery, where the model is dense
    from_scratch: bool = False
    dense: bool = False
    dense_steps: int = 0
    rank: tuple[str, ...] = ()
    init: str = "spectral"
    conv: str = "channel"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    multiple_of: int = 1
    allow_larger: bool = False
    switch_lr: float = 0.5
    # decay
    decay: str = "frobenius"
    decay_strength: float = 0.01
    decay_coupled: bool = False
    weight_decay: float = 0.01
    # optimisation
    optimizer: str = "adamw"
    momentum: float = 0.9
    lr: float = 1e-3
    schedule: str = "linear"
    warmup_steps: int = 0
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 8
    eval_batch_size: int | None = None
    accumulate: int = 1
    seed: int = 0
    precision: str = "auto"
    gradient_checkpointing: bool = False
    early_stopping: int | None = None
    best: bool = False
    teacher: str | None = None
    temperature: float = 2.0
    teacher_weight: float = 0.5
    # the run
    eval_steps: int | None = None
    save_steps: int | None = None
    log_steps: int | None = None
    report_to: tuple[str, ...] = ()
    against: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    set: Mapping[str, Any] = field(default_factory=dict)  # any other field of transformers' TrainingArguments

    def check(self) -> None:
        """Raises RecipeError (or RankError) for a value that no model or data could make right."""
        super().check()
        for name in ("model", "data"):
            if not getattr(self, name):
                raise RecipeError(f"no {name} given; name it on the command line or in the recipe")
        check_choice("decay", self.decay, DECAYS)
        check_choice("optimizer", self.optimizer, tuple(OPTIMIZERS))
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("conv", self.conv, ("channel", "spatial"))
        for name in ("decay_strength", "weight_decay", "momentum", "lr", "switch_lr", "temperature"):
            check_finite(name, getattr(self, name), positive=name in ("lr", "switch_lr", "temperature"))
        if not 0 <= self.teacher_weight <= 1:
            raise RecipeError(f"teacher_weight {self.teacher_weight}: write a number from 0 to 1")
        for name in ("batch_size", "accumulate", "stride", "steps", "eval_batch_size", "early_stopping", "eval_steps",
                     "save_steps", "log_steps", "multiple_of"):  # fmt: skip
            check_at_least(name, getattr(self, name), 1)
        for name in ("warmup_steps", "dense_steps", "seed"):
            check_at_least(name, getattr(self, name), 0)
        if self.epochs is not None and self.steps is not None:
            raise RecipeError("epochs and steps are both given; leave one out")
        if self.epochs is not None:
            check_finite("epochs", self.epochs, positive=True)
        if self.streaming and self.steps is None:
            raise RecipeError("streaming data has no known length; say how many --steps to train")
        if (self.best or self.early_stopping) and self.eval_data is None and self.eval_split is None:
            raise RecipeError("best and early_stopping need --eval-data to judge by")
        if self.dense_steps and not self.rank:
            raise RecipeError(f"dense_steps {self.dense_steps}: say with --rank what to factorise to after them")
        if self.dense and self.rank:
            raise RecipeError("dense and rank are both given: train dense, or factorise; leave one out")
        if self.steps is not None and self.dense_steps >= self.steps > 0:
            raise RecipeError(f"dense_steps {self.dense_steps}: must be below the {self.steps} steps of the whole run")
        if self.rank:
            parse_rank(self.rank, self.multiple_of)
        get_init(self.init)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them."""
        plain = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    def merged(self, given: Mapping[str, Any]) -> Recipe:
        """With these settings in place of its own. Raises RecipeError that names a key or value it does not know."""
        hints = get_type_hints(Recipe)
        for key in given:
            if key not in hints:
                close = _closest(key, hints)
                raise RecipeError(f"unknown setting '{key}'" + (f"; did you mean '{close}'?" if close else ""))
        return dataclasses.replace(self, **{key: _typed(key, hints[key], value) for key, value in given.items()})


def read_recipe(file: Path) -> dict[str, Any]:
    """The settings of a recipe file, checked by name. Raises RecipeError."""
    body = read_yaml(file)
    settings = {key.replace("-", "_"): value for key, value in body.items() if key != "made_with"}
    try:
        Recipe().merged(settings)
    except RecipeError as e:
        raise RecipeError(f"{file}: {e}") from e
    return settings


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file of named values. Raises RecipeError where it is missing or anything else."""
    import yaml

    try:
        body = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise RecipeError(f"{file}: no such recipe") from e
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise RecipeError(f"{file}: not a recipe ({' '.join(str(e).split())})") from e
    if not isinstance(body, dict) or not all(isinstance(key, str) for key in body):
        raise RecipeError(f"{file}: not a recipe; write one 'setting: value' a line")
    return body


def write_recipe(recipe: Recipe, file: Path, versions: Mapping[str, str]) -> None:
    """The full recipe, every setting spelled out, so that `finetune --recipe` runs it again."""
    import yaml

    body = {**recipe.to_dict(), "made_with": dict(versions)}
    file.write_text(yaml.safe_dump(body, sort_keys=False), encoding="utf-8")


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


def _typed(key: str, hint: Any, value: Any) -> Any:
    """A YAML value in the setting's own type; text such as `1e-3`, which YAML takes for a string, becomes a number."""
    text = str(hint)
    if value is None:
        if "None" in text:
            return None
        raise RecipeError(f"{key}: needs a value")
    if text.startswith("tuple"):
        return tuple(str(v) for v in (value if isinstance(value, list | tuple) else [value]))
    if "Mapping" in text:
        if isinstance(value, Mapping):
            return dict(value)
        raise RecipeError(f"{key}: write it as 'NAME: value' lines")
    wanted: type = next(t for t in (bool, int, float, str) if t.__name__ in text)
    if wanted is bool and not isinstance(value, bool):
        raise RecipeError(f"{key} '{value}': write true or false")
    try:
        if wanted is int and (isinstance(value, bool) or float(value) != int(float(value))):
            raise ValueError
        return wanted(float(value)) if wanted is int else wanted(value)
    except (TypeError, ValueError) as e:
        raise RecipeError(f"{key} '{value}': write {'a whole number' if wanted is int else 'a number'}") from e


def _closest(key: str, known: Mapping[str, Any]) -> str | None:
    import difflib

    return next(iter(difflib.get_close_matches(key, list(known), 1)), None)
