"""Rank policies: how many singular directions a layer keeps.

A policy maps the shape of a matrix, and its singular values if needed, to a rank. To add one, write a frozen dataclass
with `rank_of` and add it to `POLICIES` and `READABLE`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from lrsurgery.errors import RankError
from lrsurgery.linalg.spectrum import stable_rank
from lrsurgery.units import finite

FORMS = ("balanced", "pivoted")  # of factorised layers; see `linalg.pivot`
BALANCED, PIVOTED = FORMS
FAST_MULTIPLE, LARGE = 8, 384  # ranks of matrices of that full rank and more are multiples of 8; see `multiple_for`
READABLE = "a fraction of full rank such as 0.5, a rank such as 64, energy:0.9, params:0.5 or stable"


@runtime_checkable
class RankPolicy(Protocol):
    """Chooses a rank between 1 and min(rows, columns)."""

    @property
    def needs_spectrum(self) -> bool:
        """Whether `rank_of` reads the singular values, so that a plan needs the weights."""
        ...

    def rank_of(self, rows: int, columns: int, values: Tensor | None = None, *, pivoted: bool = False) -> int:
        """The rank for a matrix (rows, columns) with singular values `values` (full rank,), descending.

        `pivoted` is the form that it will be stored in.
        """
        ...


def _clamp(rank: int, rows: int, columns: int) -> int:
    return max(1, min(rank, rows, columns))


@dataclass(frozen=True)
class FractionRank:
    """A fraction of full rank, rounded to the nearest integer (Kamalakara et al. 2022)."""

    fraction: float
    needs_spectrum = False

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise RankError(
                f"rank {self.fraction:g}: a fraction of full rank lies in (0, 1]; write an integer for a rank"
            )

    def rank_of(self, rows: int, columns: int, values: Tensor | None = None, *, pivoted: bool = False) -> int:
        return _clamp(round(self.fraction * min(rows, columns)), rows, columns)

    def __str__(self) -> str:
        return repr(self.fraction)


@dataclass(frozen=True)
class AbsoluteRank:
    """The same rank for every layer, capped at full rank."""

    rank: int
    needs_spectrum = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RankError(f"rank {self.rank}: a rank is at least 1")

    def rank_of(self, rows: int, columns: int, values: Tensor | None = None, *, pivoted: bool = False) -> int:
        return _clamp(self.rank, rows, columns)

    def __str__(self) -> str:
        return str(self.rank)


@dataclass(frozen=True)
class EnergyRank:
    """The smallest rank that keeps this share of the sum of squared singular values."""

    energy: float
    needs_spectrum = True

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise RankError(f"rank energy:{self.energy:g}: the share of energy lies in (0, 1]")

    def rank_of(self, rows: int, columns: int, values: Tensor | None = None, *, pivoted: bool = False) -> int:
        assert values is not None, "an energy rank needs singular values"
        squares = values.double().square()
        total = squares.sum()
        if total == 0:
            return 1
        kept = squares.cumsum(0) / total
        # cumsum rounds: without the tolerance, energy:1.0 could take one direction too many or never be reached
        return _clamp(int((kept < self.energy - 1e-12).sum()) + 1, rows, columns)

    def __str__(self) -> str:
        return f"energy:{self.energy!r}"


@dataclass(frozen=True)
class ParameterShare:
    """The largest rank with at most this share of the dense layer's parameters (SVD-LLM's ratio)."""

    share: float
    needs_spectrum = False

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise RankError(f"rank params:{self.share:g}: the share of parameters lies in (0, 1]")

    def rank_of(self, rows: int, columns: int, values: Tensor | None = None, *, pivoted: bool = False) -> int:
        return _clamp(rank_within(self.share * rows * columns, rows + columns, 1 if pivoted else 0), rows, columns)

    def __str__(self) -> str:
        return f"params:{self.share!r}"


@dataclass(frozen=True)
class StableRank:
    """The stable rank ||W||_F^2 / ||W||_2^2, rounded up (Wang et al. 2023, Cuttlefish)."""

    needs_spectrum = True

    def rank_of(self, rows: int, columns: int, values: Tensor | None = None, *, pivoted: bool = False) -> int:
        assert values is not None, "the stable rank needs singular values"
        return _clamp(math.ceil(stable_rank(values) - 1e-6), rows, columns)

    def __str__(self) -> str:
        return "stable"


def _parse_stable(rest: str) -> StableRank:
    if rest:
        raise ValueError(rest)
    return StableRank()


# name before the colon -> parser of the text after it
POLICIES: dict[str, Callable[[str], RankPolicy]] = {
    "energy": lambda number: EnergyRank(finite(number)),
    "params": lambda number: ParameterShare(finite(number)),
    "stable": _parse_stable,
}


def parse_policy(text: str) -> RankPolicy:
    """Parse `0.5`, `64`, or one of `POLICIES` such as `energy:0.9`; an integer is a rank, `1.0` is a fraction.

    Raises RankError that lists the accepted forms.
    """
    text = text.strip()
    name, _, number = text.partition(":")
    try:
        if name in POLICIES:
            return POLICIES[name](number)
        if not number:
            return AbsoluteRank(int(text)) if text.lstrip("+-").isdigit() else FractionRank(finite(text))
    except RankError:
        raise
    except ValueError:
        pass
    raise RankError(f"rank '{text}' is not readable; write {READABLE}")


@dataclass(frozen=True)
class RankSpec:
    """A default policy and overrides for layers that match a glob; the last match wins."""

    default: RankPolicy | None
    overrides: tuple[tuple[str, RankPolicy], ...] = ()
    multiple_of: int | None = None  # see `multiple_for`

    def __post_init__(self) -> None:
        if self.multiple_of is not None and self.multiple_of < 1:
            raise RankError(f"multiple of {self.multiple_of}: write a positive integer")

    def policy_for(self, name: str) -> RankPolicy | None:
        """The policy of a layer, or None if there is no default and no glob matches."""
        for pattern, policy in reversed(self.overrides):
            if fnmatchcase(name, pattern):
                return policy
        return self.default

    def names(self, name: str) -> bool:
        """Whether an override names this layer exactly, without wildcards."""
        return any(pattern == name for pattern, _ in self.overrides)

    def rank_of(
        self,
        name: str,
        rows: int,
        columns: int,
        values: Tensor | None = None,
        *,
        pivoted: bool = False,
        multiple_of: int = 1,
    ) -> int:
        """The rank of one layer, rounded to both its own `multiple_of` and that of the spec, capped at full rank.

        Without a multiple of the spec a rank that is given as a number stays as it is, a share of the parameters is
        rounded down and a share of the energy up, since both are bounds; see `multiple_for`.

        Raises RankError if an override that names the layer exactly exceeds its full rank.
        """
        policy = self.policy_for(name)
        assert policy is not None, name
        full = min(rows, columns)
        if isinstance(policy, AbsoluteRank) and policy.rank > full and self.names(name):
            raise RankError(
                f"{name}: rank {policy.rank} exceeds {full}, the full rank of ({rows}, {columns}); lower it"
            )
        rank = policy.rank_of(rows, columns, values, pivoted=pivoted)
        rounding = round if multiple_of == 1 and self.multiple_of else _ROUNDING.get(type(policy), round)
        if not (self.multiple_of is None and isinstance(policy, AbsoluteRank)):
            multiple_of = multiple_for(self.multiple_of, full, multiple_of)
        if multiple_of > 1:
            rank = max(multiple_of, rounding(rank / multiple_of) * multiple_of)
        return min(rank, full)

    @property
    def description(self) -> str:
        """The policies in words."""
        return f"rank {self}"

    def __str__(self) -> str:
        parts = [str(self.default)] if self.default is not None else []
        return " ".join([*parts, *(f"{pattern}={policy}" for pattern, policy in self.overrides)])


def multiple_for(asked: int | None, full_rank: int, own: int = 1) -> int:
    """What the rank of a matrix is a multiple of: of what is asked and of its kind's own; by default of 8 if large.

    An odd number of outputs costs BLAS up to half as much again on a CPU, and a GPU its tensor cores; in small matrices
    a step of 8 ranks is coarse.
    """
    if asked is None:
        asked = FAST_MULTIPLE if full_rank >= LARGE else 1
    return math.lcm(asked, own)


_ROUNDING: dict[type, Callable[[float], int]] = {ParameterShare: math.floor, EnergyRank: math.ceil}  # as bounds

RankLike: TypeAlias = "str | int | float | RankPolicy | RankSpec | list[str] | tuple[str, ...]"


def parse_rank(rank: RankLike, multiple_of: int | None = None) -> RankSpec:
    """Convert CLI text, a number, a policy or a list of texts (`GLOB=VALUE` for single layers) into a RankSpec.

    Raises RankError that lists the accepted forms.
    """
    if isinstance(rank, RankSpec):
        return rank
    if isinstance(rank, bool):
        raise RankError(f"rank {rank} is not readable; write {READABLE}")
    if isinstance(rank, int | float):
        return RankSpec(AbsoluteRank(rank) if isinstance(rank, int) else FractionRank(rank), (), multiple_of)
    if not isinstance(rank, str | list | tuple):
        return RankSpec(rank, (), multiple_of)
    default: RankPolicy | None = None
    overrides: list[tuple[str, RankPolicy]] = []
    for text in [rank] if isinstance(rank, str) else rank:
        pattern, equals, value = text.rpartition("=")
        if equals:
            overrides.append((pattern.strip(), parse_policy(value)))
        elif default is not None:
            raise RankError(f"rank '{text}': a default rank is already given; write GLOB=VALUE for single layers")
        else:
            default = parse_policy(text)
    if default is None and not overrides:
        raise RankError(f"no rank given; write {READABLE}")
    return RankSpec(default, tuple(overrides), multiple_of)


def rank_within(limit: float, per_rank: int, saving: int) -> int:
    """The largest r on the rising side of r per_rank - r^2 saving with at most this limit.

    In parameters a rank costs rows + columns, and the pivoted form saves 1 for each pair of ranks.
    """
    if not saving:
        return math.floor(limit / per_rank)
    root = per_rank**2 - 4 * saving * limit
    rank = math.floor((per_rank - math.sqrt(max(0.0, root))) / (2 * saving))
    # the root rounds
    return next((r for r in (rank + 1, rank, rank - 1) if r * per_rank - r * r * saving <= limit), 0)


def break_even_rank(rows: int, columns: int, *, pivoted: bool = False) -> int:
    """The largest rank with fewer parameters than the matrix itself; 0 if even rank 1 saves none.

    r (rows + columns) < rows * columns for the balanced form; every rank below full rank for the pivoted one.
    """
    return min(rows, columns) - 1 if pivoted else (rows * columns - 1) // (rows + columns)


def check_form(form: str) -> None:
    """Raise RankError that lists the forms, unless `form` is one."""
    if form not in FORMS:
        raise RankError(f"unknown form '{form}'; known: {', '.join(FORMS)}")
