"""Options of `factorise`, parsed once from text into typed values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lrsurgery.calibration import texts
from lrsurgery.calibration.loss import IMPORTANCES, TEMPERATURE, check_importance, check_temperature
from lrsurgery.calibration.statistics import Statistics
from lrsurgery.checkpoints.output import OutputOptions
from lrsurgery.checkpoints.source import Source, SourceOptions
from lrsurgery.data.options import LARGEST, DataOptions
from lrsurgery.errors import CalibrationError, DataError, RankError, RecipeError, SurgeryError
from lrsurgery.files.json import Json
from lrsurgery.linalg.inits import WITHOUT_DIRECTIONS
from lrsurgery.refine.options import Refinement
from lrsurgery.report.rows import recorded_options
from lrsurgery.runtime import Compute, check_seed, pick_device, pick_dtype
from lrsurgery.surgery.budget import parse_budget
from lrsurgery.surgery.kinds.table import AUTO, CHANNEL
from lrsurgery.surgery.plan import SurgeryOptions, Target
from lrsurgery.surgery.ranks import PIVOTED, READABLE, RankLike, parse_rank
from lrsurgery.surgery.tables.embedding import EMBEDDING
from lrsurgery.units import parse_size

SAMPLES = 128  # for calibration, unless another number is asked for


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Calibration data or existing statistics, which weight the errors of layers.

    Raises CalibrationError for invalid or contradictory values.
    """

    data: str | None = None  # as for `finetune --data`, or "builtin"
    importance: str = "fisher"  # or "activations"
    samples: int = SAMPLES  # sequences, sentences or images
    fisher_temperature: float | None = None  # of the logits; None: 2, or that of the statistics
    statistics: Path | None = None  # folder of existing statistics
    save: Path | None = None  # folder to keep the statistics in
    own_statistics: Path | None = None  # folder of the statistics of `data` that an earlier part of the job collected
    split: str | None = None
    how: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        check_importance(self.importance)
        if self.fisher_temperature is not None:
            check_temperature(self.fisher_temperature)
        if not 1 <= self.samples <= LARGEST:
            raise CalibrationError(f"samples {str(self.samples)[:20]}: write 1 to {LARGEST:,}")
        if self.data is None and self.statistics is None:
            raise CalibrationError("no calibration data and no statistics are given; add --calibration or --statistics")
        if self.statistics is not None and self.data is not None:
            raise CalibrationError("--calibration and --statistics are both given; leave one out")
        if self.save is not None and self.data is None:
            raise CalibrationError("--save-statistics needs data; add --calibration")
        if self.save is not None and not next(p for p in self.save.absolute().parents if p.exists()).is_dir():
            raise CalibrationError(f"{self.save}: cannot be written, since a parent is a file; name another folder")
        if self.statistics is not None:
            self.read_statistics()  # raises CalibrationError if they cannot be read
        try:
            self.how.check()
        except RecipeError as e:
            raise CalibrationError(str(e)) from e

    @property
    def temperature(self) -> float:
        """The temperature to collect at."""
        return TEMPERATURE if self.fisher_temperature is None else self.fisher_temperature

    def read_statistics(self) -> Statistics:
        """Read the existing statistics; importance activations drops their gradients.

        Raises CalibrationError, also if they were collected at another temperature than the one asked for.
        """
        assert self.statistics is not None
        statistics = Statistics.read(self.statistics)
        if self.importance != "fisher":
            return statistics.without_gradients()
        asked, found = self.fisher_temperature, statistics.temperature
        if asked is not None and found is not None and asked != found:
            raise CalibrationError(
                f"{self.statistics}: collected at Fisher temperature {found:g}, and {asked:g} is asked for; collect"
                " again, or remove --fisher-temperature"
            )
        return statistics

    def recorded(self) -> Json:
        """The values that determine the result, as JSON; the importance keeps its key `metric` in files."""
        usual = vars(DataOptions())
        how = {key: value for key, value in vars(self.how).items() if value != usual[key]}
        return {
            "data": self.data,
            "statistics": str(self.statistics) if self.statistics else None,
            "metric": self.importance,
            "samples": self.samples,
            "temperature": self.temperature if self.data is not None and IMPORTANCES[self.importance] else None,
            "split": self.split,
            **how,
        }


def parse_calibration(
    data: str | None = None,
    *,
    importance: str = "fisher",
    statistics: Path | None = None,
    samples: int = SAMPLES,
    fisher_temperature: float | None = None,
    save: Path | None = None,
    split: str | None = None,
    how: DataOptions | None = None,
) -> Calibration | str | None:
    """Make the calibration of these options; None without data and statistics.

    "none" for data or importance "none", which decline calibration. Raises CalibrationError.
    """
    check_importance(importance, "none")
    declined, data = data == texts.DECLINED, None if data == texts.DECLINED else data
    unused = data is None and statistics is None and save is None
    if importance == "none" or (declined and unused):
        return texts.DECLINED
    if unused and samples >= 1:
        usual, asked = vars(DataOptions()), vars(how or DataOptions())
        given = {
            "--importance": importance != "fisher",
            "--samples": samples != SAMPLES,
            "--fisher-temperature": fisher_temperature is not None,
            "--split": split is not None,
            **{f"--{name.replace('_', '-')}": asked[name] != usual[name] for name in asked},
        }
        if names := ", ".join(name for name, is_given in given.items() if is_given):
            raise CalibrationError(
                f"{names}: about calibration, which has no data; add --calibration DATA, for language models also"
                f" --calibration {texts.NAME}"
            )
        return None
    return Calibration(
        data=data,
        importance=importance,
        samples=samples,
        fisher_temperature=fisher_temperature,
        statistics=statistics,
        save=save,
        split=split,
        how=how or DataOptions(),
    )


@dataclass(frozen=True, kw_only=True)
class FactoriseOptions:
    """All options of a job, grouped by the part that uses them. Raises SurgeryError for contradictory options."""

    surgery: SurgeryOptions
    source: SourceOptions = field(default_factory=SourceOptions)
    compute: Compute
    output: OutputOptions = field(default_factory=OutputOptions)
    calibration: Calibration | None = None
    declined: bool = False  # no calibration, though a budget would take the built-in text
    loss_check: bool = True  # see `factorise.check`
    refinement: Refinement | None = None  # of the blocks, once they are factorised

    def __post_init__(self) -> None:
        init = self.surgery.init
        if self.calibration is not None:
            if init in WITHOUT_DIRECTIONS:
                raise SurgeryError(
                    f"init {init} discards the weights' directions, so --calibration would change nothing; remove one"
                )
            if self.source.from_scratch_seed is not None:
                raise SurgeryError("--from-scratch has no pretrained weights to calibrate; remove --calibration")
            if self.surgery.svd == "fast":
                raise SurgeryError("--svd fast applies to plain SVD only; remove it, or remove --calibration")
            if self.refinement is not None and self.calibration.data is None:
                raise CalibrationError("--refine needs the data itself, and not statistics; add --calibration DATA")

    @property
    def can_calibrate(self) -> bool:
        """Whether these options leave calibration something to weigh."""
        keeps = self.surgery.init not in WITHOUT_DIRECTIONS and self.source.from_scratch_seed is None
        return keeps and self.surgery.svd != "fast"

    def recorded(self) -> Json:
        """The options that determine the result, as JSON."""
        calibration = None if self.calibration is None else self.calibration.recorded()
        refine = {} if self.refinement is None else {"refine": self.refinement.recorded()}
        return {**recorded_options(self.surgery, self.source, self.output.dtype, calibration), **refine}


def choose_calibration(source: Source, options: FactoriseOptions) -> tuple[FactoriseOptions, str | None]:
    """Calibrate a budget over a language model without data on the built-in text; and a note on what goes without."""
    if options.calibration is not None and options.surgery.budget is not None:
        note = (
            "a budget by activations: inputs alone do not say on which layers the loss depends, so none goes below the"
            " rank that keeps the same share of every layer; --importance fisher compares them by the loss"
        )
        return options, note if options.calibration.importance == "activations" else None
    if options.calibration is not None or not options.can_calibrate:
        return options, None
    if options.surgery.budget is None:
        note = (
            "plain SVD: without data it minimises the error of the weights, not that of the outputs; --calibration"
            f" DATA weighs errors by data, for language models also --calibration {texts.NAME}"
        )
        return options, note if options.surgery.init == "spectral" else None
    if not options.declined and _reads_text(source, options.source.trust_remote_code):
        note = (
            f"a budget without data: calibrated on {texts.TITLE}; --calibration DATA takes text of your own,"
            f" --calibration {texts.DECLINED} goes by the weights alone"
        )
        return replace(options, calibration=Calibration(data=texts.NAME)), note
    note = (
        "a budget without data: layers compare by the relative energy of their weights, and none goes below 3/4 of the"
        " rank that keeps the same share of every layer; --calibration DATA compares them by the loss"
    )
    return options, note


def _reads_text(source: Source, trust_remote_code: bool) -> bool:
    """Whether it is a language model with its tokenizer."""
    from lrsurgery.data.tasks import TASKS, task_of
    from lrsurgery.data.text.tokens import load_tokenizer

    try:
        if not TASKS[task_of(source)].is_language:
            return False
        load_tokenizer(source, trust_remote_code)
    except (DataError, RecipeError):
        return False
    return True


def parse_target(
    rank: RankLike | None, budget: str | float | None, *, of: str = "layers", multiple_of: int | None = None
) -> Target:
    """Parse rank policies or a budget, of which exactly one is given. Raises RankError, BudgetError."""
    if budget is None:
        if rank is None:
            raise RankError(f"no rank and no budget is given; write --rank with {READABLE}, or --budget 0.5")
        if of != "layers":
            raise RankError(f"--budget-of {of} needs a budget; add --budget")
        return parse_rank(rank, multiple_of)
    if rank is not None:
        raise RankError("rank and budget are both given; a budget chooses every rank, so leave one out")
    return parse_budget(str(budget), of, multiple_of)


def parse_options(
    *,
    rank: RankLike | None = None,
    budget: str | float | None = None,
    budget_of: str = "layers",
    multiple_of: int | None = None,
    init: str = "spectral",
    conv: str = "auto",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    allow_larger: bool = False,
    min_speedup: float | None = None,
    svd: str = "auto",
    seed: int = 0,
    from_scratch: bool = False,
    revision: str | None = None,
    architecture: str | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
    jobs: int | None = None,
    cache: bool = True,
    keep_vectors: bool = False,
    dtype: str = "keep",
    shard_size: str = "5GB",
    overwrite: bool = False,
    resume: bool = False,
    check: bool = False,
    remote_code: bool = False,
    command: str | None = None,
    calibration: Calibration | str | None = None,
    loss_check: bool = True,
    form: str = PIVOTED,
    share: str = AUTO,
    embeddings: bool | None = None,
    heads: bool = False,
    refine: Refinement | bool = False,
) -> FactoriseOptions:
    """Parse the options of the command line and of Python callers. Raises SurgeryError that names the value.

    `calibration` is a `Calibration`, or its data as text: "builtin" for the built-in text, "none" to decline it.
    """
    check_seed(seed)
    if from_scratch and conv == AUTO:
        conv = CHANNEL  # random weights give no reason to prefer a scheme
    declined = calibration == texts.DECLINED
    if isinstance(calibration, str):
        calibration = None if declined else Calibration(data=calibration)
    if embeddings is None and calibration is not None and calibration.statistics is not None:
        # a budget over the model takes tables by itself, but not with statistics that were collected without them
        uses = calibration.read_statistics().uses.values()
        embeddings = None if any(use.kind == EMBEDDING.name for use in uses) else False
    surgery = SurgeryOptions(
        target=parse_target(rank, budget, of=budget_of, multiple_of=multiple_of),
        init=init,
        conv=conv,
        include=include,
        exclude=exclude,
        allow_larger=allow_larger,
        seed=seed,
        min_speedup=min_speedup,
        svd=svd,
        form=form,
        share=share,
        embeddings=embeddings,
        heads=heads,
    )
    source = SourceOptions(
        revision=revision,
        architecture=architecture,
        trust_remote_code=trust_remote_code,
        from_scratch_seed=seed if from_scratch else None,
    )
    compute = Compute(device=pick_device(device), jobs=jobs, cache=cache, keep_vectors=keep_vectors)
    output = OutputOptions(
        dtype=pick_dtype(dtype),
        shard_size=parse_size(shard_size),
        overwrite=overwrite,
        resume=resume,
        check=check,
        remote_code=remote_code,
        command=command,
    )
    return FactoriseOptions(
        surgery=surgery,
        source=source,
        compute=compute,
        output=output,
        calibration=calibration,
        declined=declined,
        loss_check=loss_check,
        refinement=Refinement(seed=seed) if refine is True else refine or None,
    )
