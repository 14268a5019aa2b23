"""What the sections of gpu.py share: their cells, the columns of their rows, times and peaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from harness import in_turn, ratio

Row = dict[str, Any]
TIMES = ("ms", "times as fast", "smallest", "largest", "as", "ideal", "of ideal", "tokens/s")
COLUMNS = ("section", "what", "variant", *TIMES, "error", "peak GPU GB", "peak CPU GB", "rounds", "note")
TINY_LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY_LLAMA |= {"num_key_value_heads": 2, "vocab_size": 128}
TINY_GPT2 = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 128, "n_positions": 64}
TINY_GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the options of gpu.py decide."""

    tiny: bool
    layers: int  # of the Llama-7B-shaped models
    repeats: int
    scratch: Path

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"

    def shaped(self, name: str) -> str:
        return f"{name}-shaped{', tiny' if self.tiny else ''}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Candidates that are measured side by side: a name, and a function that returns their rows.

    Cells of one `kind` take about as long; the first of a kind is expected to take `guess` seconds.
    """

    name: str
    run: Callable[[], list[Row]]
    kind: str
    guess: float


def row(what: str, variant: str, **figures: Any) -> Row:
    return {**dict.fromkeys(COLUMNS), "what": what, "variant": variant, **figures}


def rounds(
    runs: Mapping[str, Callable[[], Any]], most: int, allowed: float, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each run in each round: one round at least, then as many up to `most` as the allowed seconds hold."""
    in_turn(runs, 0, warm_up=warm_up)
    begun = perf_counter()
    seconds = in_turn(runs, 1, warm_up=0)
    one = perf_counter() - begun
    more = in_turn(runs, max(0, min(most, int(allowed / one)) - 1), warm_up=0)
    return {name: [*taken, *more[name]] for name, taken in seconds.items()}


def timed(seconds: Mapping[str, list[float]], name: str, over: str) -> Row:
    """The columns of a time, and of how many times as fast it is as that of `over`."""
    found = ratio(seconds[over], seconds[name])
    compared = {"times as fast": found["median"], "smallest": found["min"], "largest": found["max"], "as": over}
    return {"ms": 1e3 * median(seconds[name]), "rounds": len(seconds[name]), **(compared if name != over else {})}


def peak_of(run: Callable[[], Any]) -> float | None:
    """Peak GB that torch allocated on the GPU while `run` ran, with what was there before; None on a CPU."""
    if not torch.cuda.is_available():
        run()
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e9
