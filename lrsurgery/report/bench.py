"""bench.json: how fast a model is, as `lrsurgery bench --save` writes it beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import Field
from typing_extensions import TypedDict

from lrsurgery.files.json import Json, read_as

BENCH_FILE = "bench.json"
BENCH_FORMAT = 1
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


def read_bench(folder: Path) -> Bench | None:
    """What `bench --save` wrote into a model's folder; None where it wrote nothing.

    Raises SourceError where the file is damaged or newer than this version reads.
    """
    file = folder / BENCH_FILE
    if not file.exists():
        return None
    return read_as(Bench, file, "what bench --save writes; run it again", newest=BENCH_FORMAT)
