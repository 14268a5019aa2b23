"""bench.json: the speed and memory of a model, as `bench --save` writes them and every view reads them."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field
from typing_extensions import TypedDict

from lrsurgery.files.json import Json

Count: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 63)]  # as far as a file may count
Size: TypeAlias = Annotated[int, Field(gt=0, lt=1 << 63)]


class BenchModel(TypedDict):
    """A model whose speed was measured."""

    name: str
    parameters: Count
    bytes: Count | None  # of its weight files
    peak_memory: Count | None  # bytes; None where this system does not tell


class BenchFigures(TypedDict):
    """Times of one model at one setting."""

    flops: Count
    median_ms: float
    p95_ms: float
    throughput: float  # units a second


class BenchCertainty(TypedDict):
    """How much faster, and how surely."""

    speedup: float | None
    interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None  # of the speedup, at `confidence`
    confidence: float
    rounds: int
    reached: bool  # whether the interval got as narrow as was asked for


class BenchRun(BenchFigures, BenchCertainty):
    """One kind of work at one batch size and length."""

    work: str
    batch: Count
    length: Count
    unit: str
    against: BenchFigures | None
    ideal: float | None  # speedup by FLOPs alone


class BenchLayer(BenchCertainty):
    """Factorised layers of one shape, rank and input against their dense form."""

    names: Annotated[list[str], Field(min_length=1)]
    kind: str
    shape: list[int]
    rank: int
    input: list[int]
    dense_ms: float
    factorised_ms: float
    slower: bool


class Bench(TypedDict):
    """bench.json, as `lrsurgery bench --save` writes it."""

    format_version: int
    command: str | None
    versions: dict[str, str]
    machine: Json
    options: Json
    task: str
    model: BenchModel
    against: BenchModel | None
    runs: list[BenchRun]
    layers: list[BenchLayer]
    notes: list[str]
