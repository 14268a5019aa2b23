"""Settings of a training run: their defaults and help texts, their checks, and the YAML file that holds them.

To add a setting: a field of `Recipe`; `lrsurgery finetune` builds its options from the fields. Importing this module
imports neither torch nor transformers, so that `--help` is fast. The file is long because every setting is a field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args, get_type_hints

from lrsurgery.data.options import DATA, IMAGES, TEXT, DataOptions, Setting, check_choice, setting
from lrsurgery.errors import RecipeError
from lrsurgery.files.writing import replace_file
from lrsurgery.files.yaml import read_yaml

if TYPE_CHECKING:
    from lrsurgery.checkpoints.source import Source
    from lrsurgery.files.json import Json

SURGERY, DECAY, TRAINING, RUN, MACHINE = "Surgery", "Decay", "Training", "The run", "Machine"  # panels of help
DECAYS = ("frobenius", "l2", "none")
OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd", "spectron": "adamw_torch"}  # transformers' names
SPECTRON = "spectron"
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
FORMS = ("balanced", "pivoted")  # of `surgery.ranks`, which imports torch
TRAIN_FORMS = ("auto", *FORMS)
DEVICES = ("auto", "cpu", "cuda")
AUTO: Final = "auto"  # of lr
USUAL_LR = 1e-3  # where auto runs no range test
WARM_UP = 20  # times the warm-up of cosine is the run, in steps
# what only the command line can turn on: running a checkpoint's code, and sending anything elsewhere
LOCAL_TRACKERS = ("tensorboard", "none")  # of report_to; all others can upload
UPLOADING = ("deepspeed", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "logging_dir")  # of set
PERMISSIONS = ("trust_remote_code", "report_to", "set")  # settings that hold them


@dataclass(frozen=True)
class Recipe(DataOptions):
    """A whole training run. Recipe files keep the fields' order."""

    model: str | None = setting(
        None, "Factorised folder, or dense model with --rank; here or in the recipe.", panel=RUN, metavar="MODEL"
    )
    data: str | None = setting(
        None, "Training data: text, jsonl, csv, parquet, a folder or a hub dataset.", panel=DATA, metavar="DATA"
    )
    eval_data: str | None = setting(
        None, "Held-out data to measure on while training, of the same forms.", panel=DATA, metavar="DATA"
    )
    split: str | None = setting(None, "Split to train on; train by default.", panel=DATA)
    eval_split: str | None = setting(None, "Split to measure on: of --eval-data, or without it of --data.", panel=DATA)
    streaming: bool = setting(
        False, "Text that is read as training needs it, for data too large to hold; with --steps.", panel=DATA
    )
    stride: int | None = setting(
        None,
        "Tokens between the starts of training blocks; the block size by default.",
        panel=DATA,
        least=1,
        of=(TEXT,),
    )
    augment: bool = setting(True, "Random crops and flips of training images.", panel=DATA, of=(IMAGES,))
    new_head: bool = setting(False, "New head for the classes of the data.", panel=DATA)

    from_scratch: bool = setting(False, "Fresh weights by the model's config and --seed.", panel=SURGERY)
    dense: bool = setting(False, "Training of a dense model as it is, without factorising.", panel=SURGERY)
    dense_steps: int = setting(0, "Steps of dense training before the model is factorised.", panel=SURGERY, least=0)
    rank: tuple[str, ...] = setting(
        (),
        "Rank to factorise a dense model to: 0.5 (of full rank), 64, energy:0.9, params:0.5 or stable.",
        panel=SURGERY,
        metavar="RANK|GLOB=RANK",
        short="-r",
    )
    init: str = setting(
        "spectral", "Initialisation of the factors.", panel=SURGERY, table=("lrsurgery.linalg.inits", "INITS")
    )
    conv: str = setting(
        "auto",
        "Scheme of convolutions; channel: kh x kw then 1x1, spatial: kh x 1 then 1 x kw, auto: what loses less.",
        panel=SURGERY,
        table=("lrsurgery.surgery.kinds.common", "CONV_SCHEMES"),
    )
    include: tuple[str, ...] = setting(("*",), "Layers to factorise.", panel=SURGERY, metavar="GLOB")
    exclude: tuple[str, ...] = setting((), "Layers to leave dense.", panel=SURGERY, metavar="GLOB")
    form: str | None = setting(
        None,
        "Form of the output, which --rank counts; pivoted with --rank, else as it was read.",
        panel=SURGERY,
        choices=FORMS,
    )
    multiple_of: int | None = setting(
        None, "Number that ranks are rounded to multiples of; see factorise.", panel=SURGERY, least=1
    )
    allow_larger: bool = setting(False, "Layers of balanced form at or over break-even too.", panel=SURGERY)
    switch_lr: float = setting(
        0.5, "Scale of the learning rate from the end of the dense steps on.", panel=SURGERY, positive=True
    )

    train_form: str = setting(
        "auto",
        "Form that pivoted layers train in; auto: balanced, where that is no larger than dense.",
        panel=TRAINING,
        choices=TRAIN_FORMS,
    )
    decay: str = setting("frobenius", "Weight decay of the factors.", panel=DECAY, choices=DECAYS)
    decay_strength: float = setting(0.01, "Strength (lambda) of --decay.", panel=DECAY)
    decay_coupled: bool = setting(
        False, "Frobenius decay added to the gradient, as Khodak et al. do, rather than decoupled.", panel=DECAY
    )
    weight_decay: float = setting(0.01, "Weight decay of all other weights, biases and norms excepted.", panel=DECAY)

    optimizer: str = setting(
        "adamw",
        "Optimizer; spectron bounds the updates of products by their spectral norm, and is AdamW for other weights.",
        panel=TRAINING,
        choices=tuple(OPTIMIZERS),
    )
    spectral_scale: float = setting(
        10.0, "Bound of spectron's updates, times the learning rate.", panel=TRAINING, positive=True
    )
    momentum: float = setting(0.9, "Momentum of sgd.", panel=TRAINING)
    lr: Literal["auto"] | float = setting(
        AUTO,
        "Peak learning rate, or auto: found by a range test of a few steps; 1e-3 in short runs.",
        panel=TRAINING,
        positive=True,
        metavar="FLOAT|auto",
    )
    schedule: str = setting(
        "cosine", "Learning rate schedule; cosine and linear go to 0.", panel=TRAINING, choices=SCHEDULES
    )
    warmup_steps: int | None = setting(
        None,
        "Steps of linear warm-up; a twentieth of the run with cosine, else 0, by default.",
        panel=TRAINING,
        least=0,
    )
    epochs: float | None = setting(None, "Passes over the data; 1 without --steps.", panel=TRAINING, positive=True)
    steps: int | None = setting(None, "Optimizer steps, in place of epochs.", panel=TRAINING, least=1)
    batch_size: int = setting(8, "Examples of a batch, in each process.", panel=TRAINING, least=1)
    eval_batch_size: int | None = setting(
        None, "Examples of a batch when measuring; --batch-size by default.", panel=TRAINING, least=1
    )
    accumulate: int = setting(1, "Batches of an optimizer step; their gradients add up.", panel=TRAINING, least=1)
    seed: int = setting(0, "Seed of data order, dropout, new heads and fresh weights.", panel=TRAINING, least=0)
    precision: str = setting(
        "auto", "Autocast; auto: bf16 on a GPU that has it, fp32 elsewhere.", panel=MACHINE, choices=PRECISIONS
    )
    gradient_checkpointing: bool = setting(
        False, "Activations computed again in the backward pass: less memory, more time.", panel=MACHINE
    )
    early_stopping: int | None = setting(
        None, "Evaluations without gain after which training stops.", panel=TRAINING, least=1
    )
    best: bool = setting(False, "Best model by the evaluations as output, not the last.", panel=TRAINING)
    blend: int = setting(
        0,
        "Steps of self-guided training: layers pass from their dense weights over to the factors.",
        panel=TRAINING,
        least=0,
    )
    teacher: str | None = setting(None, "Model to distil from, by its outputs.", panel=TRAINING, metavar="DENSE")
    temperature: float = setting(2.0, "Temperature of distillation.", panel=TRAINING, positive=True)
    teacher_weight: float = setting(0.5, "Share of the loss that distillation has, 0 to 1.", panel=TRAINING)

    eval_steps: int | None = setting(
        None, "Steps between evaluations; --save-steps or a tenth of the run by default.", panel=RUN, least=1
    )
    save_steps: int | None = setting(
        None, "Steps between checkpoints; as many as between evaluations by default.", panel=RUN, least=1
    )
    log_steps: int | None = setting(
        None, "Steps between logged losses; a twentieth of the run, at most 50, by default.", panel=RUN, least=1
    )
    report_to: tuple[str, ...] = setting(
        (), "Installed tracker of experiments, such as tensorboard or wandb.", panel=RUN, metavar="NAME"
    )
    architecture: str | None = setting(
        None, "timm model name of weight files without a config.", panel=MACHINE, metavar="NAME"
    )
    against: str | None = setting(None, "Dense model to measure beside the healed one.", panel=RUN, metavar="DENSE")
    against_trained: bool = setting(
        False,
        "Row for the dense model trained as long, since one without the training flatters the healed model.",
        panel=RUN,
    )
    device: str = setting("auto", "Device to train on.", panel=MACHINE, suggestions=DEVICES)
    trust_remote_code: bool = setting(
        False, "Permission to run Python code that comes with the checkpoint; read it first.", panel=MACHINE
    )
    set: Mapping[str, object] = field(
        default_factory=dict,
        metadata={
            "setting": Setting(
                default=(),
                help="Any other field of transformers' TrainingArguments.",
                panel=RUN,
                metavar="KEY=VALUE",
            )
        },
    )

    def check(self) -> None:
        """Raises RecipeError (or RankError) for a value that no model or data could make right."""
        for name in ("model", "data"):
            if not getattr(self, name):
                raise RecipeError(f"no {name} given; name it on the command line or in the recipe")
        if not 0 <= self.teacher_weight <= 1:
            raise RecipeError(f"teacher_weight {self.teacher_weight}: write a number from 0 to 1")
        if self.epochs is not None and self.steps is not None:
            raise RecipeError("epochs and steps are both given; leave one out")
        super().check()
        if self.streaming and self.steps is None:
            raise RecipeError("streaming data has no known length; say how many --steps to train")
        if (self.best or self.early_stopping) and self.eval_data is None and self.eval_split is None:
            raise RecipeError("best and early_stopping need --eval-data to judge by")
        if self.dense_steps and not self.rank:
            raise RecipeError(f"dense_steps {self.dense_steps}: say with --rank what to factorise to after them")
        if self.dense and self.rank:
            raise RecipeError("dense and rank are both given: train dense, or factorise; leave one out")
        if self.against_trained and self.eval_data is None and self.eval_split is None:
            raise RecipeError("against_trained needs --eval-data to measure on")
        if self.against_trained and self.dense:
            raise RecipeError("against_trained and dense are both given: the run trains the dense model already")
        if self.optimizer == SPECTRON and (self.dense or (self.from_scratch and not self.rank)):
            raise RecipeError("optimizer spectron: is for factors, and this run trains none; use adamw")
        if self.optimizer == SPECTRON and "optim" in self.set:
            raise RecipeError("set optim: is another optimizer than spectron; leave one out")
        if self.blend and (self.dense or self.dense_steps):
            raise RecipeError("blend: does not go with --dense or --dense-steps, which train without factors")
        if self.steps is not None and self.blend >= self.steps > 0:
            raise RecipeError(f"blend {self.blend}: must be below the {self.steps} steps of the whole run")
        if self.steps is not None and self.dense_steps >= self.steps > 0:
            raise RecipeError(f"dense_steps {self.dense_steps}: must be below the {self.steps} steps of the whole run")
        self._check_surgery()

    def _check_surgery(self) -> None:
        from lrsurgery.linalg.inits import get_init
        from lrsurgery.surgery.kinds.table import CONV_SCHEMES
        from lrsurgery.surgery.ranks import parse_rank

        check_choice("conv", self.conv, CONV_SCHEMES)
        if self.rank:
            parse_rank(self.rank, self.multiple_of)
        get_init(self.init)

    @property
    def peak_lr(self) -> float:
        """The peak learning rate as a number, the usual one as long as it is still to be found."""
        return USUAL_LR if self.lr == AUTO else self.lr

    def warm_up(self, total: int) -> int:
        """The steps of linear warm-up of a run of `total` steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return total // WARM_UP if self.schedule == "cosine" else 0

    def to_dict(self) -> Json:
        """Plain values, as YAML and JSON hold them."""
        plain = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    def resolve(self, reference: str, *, weights: bool = True) -> Source:
        """Find a model of this recipe on disk: its own, its teacher or the dense one. Raises SourceError."""
        from lrsurgery.checkpoints.source import resolve

        return resolve(reference, architecture=self.architecture, weights=weights)

    def merged(self, given: Mapping[str, object]) -> Recipe:
        """With these settings in place of its own. Raises RecipeError that names a key or value it does not know."""
        kinds = kinds_of_values()
        for key in given:
            if key not in kinds:
                close = _closest(key, kinds)
                raise RecipeError(f"unknown setting '{key}'" + (f"; did you mean '{close}'?" if close else ""))
        return dataclasses.replace(self, **{key: _typed(key, kinds[key], value) for key, value in given.items()})


@dataclass(frozen=True)
class ValueKind:
    """What values a setting takes."""

    type: type  # bool, int, float, str or dict; of a list, of its items
    is_list: bool = False
    is_optional: bool = False
    words: tuple[str, ...] = ()  # texts that stand for a value


@cache
def kinds_of_values() -> Mapping[str, ValueKind]:
    """Setting -> what values it takes, read from the fields' annotations."""
    return {name: _kind(hint) for name, hint in get_type_hints(Recipe).items()}


def _kind(annotation: Any) -> ValueKind:
    hint = str(annotation)
    if "Mapping" in hint:
        return ValueKind(dict)
    kind = next(t for t in (bool, int, float, str) if t.__name__ in hint)
    words = tuple(word for part in get_args(annotation) for word in get_args(part) if isinstance(word, str))
    return ValueKind(kind, hint.startswith("tuple"), "None" in hint, words)


def _typed(key: str, kind: ValueKind, value: Any) -> Any:
    """A YAML value in the setting's own type; text such as `1e-3`, which YAML takes for a string, becomes a number."""
    wanted = kind.type
    if value in kind.words:
        return value
    if value is None:
        if kind.is_optional:
            return None
        raise RecipeError(f"{key}: needs a value")
    if kind.is_list:
        return tuple(str(v) for v in (value if isinstance(value, list | tuple) else [value]))
    if wanted is dict:
        if isinstance(value, Mapping):
            return dict(value)
        raise RecipeError(f"{key}: write it as 'NAME: value' lines")
    if wanted is bool and not isinstance(value, bool):
        raise RecipeError(f"{key} '{value}': write true or false")
    try:
        if wanted is int and (isinstance(value, bool) or float(value) != int(float(value))):
            raise ValueError
        return wanted(float(value)) if wanted is int else wanted(value)
    except (TypeError, ValueError, OverflowError) as e:
        number = "a whole number" if wanted is int else "a number"
        raise RecipeError(f"{key} '{value}': write {' or '.join([number, *kind.words])}") from e


def _closest(key: str, known: Mapping[str, object]) -> str | None:
    import difflib

    return next(iter(difflib.get_close_matches(key, list(known), 1)), None)


def read_recipe(file: Path) -> Json:
    """The settings of a recipe file, checked by name. Raises RecipeError."""
    body = read_yaml(file)
    settings = {key.replace("-", "_"): value for key, value in body.items() if key != "made_with"}
    try:
        check_permissions(Recipe().merged(settings))
    except RecipeError as e:
        raise RecipeError(f"{file}: {e}") from e
    return settings


def check_permissions(recipe: Recipe) -> None:
    """Raise RecipeError for what a recipe of a file turns on, and only the command line can."""
    if recipe.trust_remote_code:
        raise RecipeError(
            "trust_remote_code: no file can turn it on; leave it out, read the checkpoint's code, and pass"
            " --trust-remote-code"
        )
    for name in recipe.report_to:
        if name not in LOCAL_TRACKERS:
            raise RecipeError(f"report_to {name}: may upload; leave it out of the file and pass --report-to {name}")
    for name in recipe.set:
        if name in UPLOADING:
            raise RecipeError(
                f"set {name}: may upload or write elsewhere; leave it out of the file and pass --set {name}=..."
            )


def without_permissions(recipe: Recipe) -> Recipe:
    """A recipe as a file may hold it."""
    return dataclasses.replace(
        recipe,
        trust_remote_code=False,
        report_to=tuple(name for name in recipe.report_to if name in LOCAL_TRACKERS),
        set={name: value for name, value in recipe.set.items() if name not in UPLOADING},
    )


def write_recipe(recipe: Recipe, file: Path, versions: Mapping[str, str]) -> None:
    """Write every setting of a recipe, so that `finetune --recipe` runs it again with the same permissions."""
    import yaml

    body = {**without_permissions(recipe).to_dict(), "made_with": dict(versions)}
    replace_file(file, yaml.safe_dump(body, sort_keys=False))


def check_recipe_for(recipe: Recipe, source: Source) -> None:
    """Raises RecipeError where a recipe asks of a model what cannot be done with it."""
    model = source.reference
    if source.is_factorised:
        if recipe.against_trained and recipe.against is None:
            raise RecipeError(f"{model}: is factorised; name the dense model to train as long with --against")
        if recipe.blend and not (recipe.against or recipe.teacher):
            raise RecipeError(
                f"blend: {model} holds no dense weights; name the dense model with --against or --teacher"
            )
        if recipe.rank or recipe.dense_steps or recipe.dense:
            raise RecipeError(f"{model}: is factorised already; leave --rank, --dense-steps and --dense out")
        if recipe.from_scratch:
            raise RecipeError(
                f"{model}: is factorised; for training from scratch use `lrsurgery factorise DENSE --from-scratch`"
            )
    elif recipe.blend and not recipe.rank:
        raise RecipeError(f"blend: {model} is dense; say with --rank what to factorise it to")
    elif not (recipe.rank or recipe.dense or recipe.from_scratch):
        raise RecipeError(
            f"{model}: is dense; pass --rank R to factorise it first, --dense-steps N --rank R to factorise it after N"
            " steps, or --dense to train it as it is"
        )
