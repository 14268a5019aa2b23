"""What every task shares: datasets as they were opened, examples of them, and batches of these."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import torch

from lrsurgery.data.datasets import WHOLE
from lrsurgery.data.labels import Labels

if TYPE_CHECKING:
    from lrsurgery.data.datasets import Table

Batch: TypeAlias = dict[str, torch.Tensor]  # a model's inputs by name
Example: TypeAlias = dict[str, Any]  # the same of one example, before collation: tensors, lists of tokens, numbers
Collator: TypeAlias = Callable[[Sequence[Example]], Batch]

IGNORED = -100  # the label that no loss counts, as everywhere in transformers
PLACES = "places"  # of a batch to measure: each example's place in its dataset, by which a judge finds its texts
UNREAD = ("labels", PLACES)  # what a batch holds beside the inputs of a model


class ExampleSet(Protocol):
    """A torch dataset with a length."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example: ...


class Judge(Protocol):
    """Further figures of a task, from columns of its own, so that examples of any batches add up."""

    columns: ClassVar[int]  # of each example

    def measure(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """Judge the outputs for a batch: (batch, columns), in fp64."""
        ...

    def summarise(self, rows: torch.Tensor) -> dict[str, float]:
        """Compute the figures of a whole set from the columns of its examples."""
        ...


@dataclass(frozen=True)
class Rows:
    """A dataset as it was opened: its rows, what the user called it, and the labels in it."""

    rows: Table
    reference: str
    labels: Labels | None = None  # None where the task has none, or nobody reads them

    @property
    def name(self) -> str:
        """What the user called the data, with the split where it has several."""
        split = str(getattr(self.rows, "split", None) or WHOLE)
        return self.reference if split == WHOLE else f"{self.reference} ({split})"


@dataclass(frozen=True)
class Examples:
    """What a model is trained or measured on."""

    dataset: ExampleSet
    collate: Collator
    unit: str  # what progress counts: the unit of the task
    size: int  # units in one example
    notes: tuple[str, ...] = ()  # for the user: how the data is read
    judge: Judge | None = None  # of examples to measure on


def seed_of(*parts: int) -> int:
    """Hash several numbers to one seed, the same on every machine and independent of earlier draws."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
