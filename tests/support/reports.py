"""Reports of real surgery, healing and benchmarks, for everything that is drawn from a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from support.tiny import run, save_gpt2, write_text

from lrsurgery.report.dense.profile import ProfileOptions
from lrsurgery.report.read import read_report
from lrsurgery.report.schema import Report
from lrsurgery.report.targets.schema import Choice, Curve, Point
from lrsurgery.runtime import Compute
from lrsurgery.surgery.ranks import parse_rank

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!--<script>&amp;${1}'\"\u2028"
BLOCKS = 4
Reports = Callable[[str], Report]


class Shop:
    """Makes the models that the reports are of, each when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.train, self.valid = write_text(folder / "text")

    def _run(self, name: str, *arguments: object) -> Path:
        assert run(*arguments, "-o", self.folder / name, "--quiet") == 0
        return self.folder / name

    @cache  # noqa: B019
    def dense(self, blocks: int = BLOCKS) -> Path:
        return save_gpt2(self.folder / f"gpt2-{blocks}", blocks=blocks)

    @cache  # noqa: B019
    def factorised(self, blocks: int = BLOCKS) -> Path:
        """Of each third block, one layer stays dense."""
        kept = [f"--exclude=*.h.{block}.attn.c_proj" for block in range(0, blocks, 3)]
        return self._run(f"half-{blocks}", "factorise", self.dense(blocks), "--rank", "0.4", *kept)

    @cache  # noqa: B019
    def calibrated(self) -> Path:
        words = ("--budget", "0.7", "--calibration", self.train, "--samples", "4")
        return self._run("gpt2-calibrated", "factorise", self.dense(2), *words)

    @cache  # noqa: B019
    def healed(self, decay: str) -> Path:
        """Dense for 4 steps, then factorised for 8."""
        words = ("--data", self.train, "--eval-data", self.valid, "--steps", "12", "--dense-steps", "4")
        more = ("--rank", "0.4", "--eval-steps", "4", "--log-steps", "1", "--batch-size", "2", "--decay", decay)
        return self._run(f"healed-{decay}", "finetune", self.dense(), *words, *more, "--lr", "0.002")

    @cache  # noqa: B019
    def timed(self) -> Path:
        words = ("--batch", "1", "--length", "8,16", "--new-tokens", "2", "--layers", "--seconds", "0.2")
        healed = self.healed("frobenius")
        assert run("bench", healed, "--against", self.dense(), *words, "--save", "--quiet") == 0
        return healed

    def report(self, which: str) -> Report:
        if which == "after surgery":
            return self._read(self.timed(), against=self.dense())
        if which == "before surgery":
            return self._read(self.dense())
        if which == "training runs":
            return self._read(self.healed("frobenius"), self.healed("l2"))
        if which == "a plan":
            return self._read(self.dense(2), plan="0.4")
        if which == "calibrated":
            return self._read(self.calibrated())
        if which == "untrained":
            return self._read(self.factorised())
        if which == "hundreds of layers":
            return self._read(self.factorised(70))
        if which == "a curve":
            return replace(self.report("before surgery"), curve=_curve("valid.txt"), choice=None)
        if which == "hostile names":
            found = self.report("calibrated")
            first = found.factorised[0]
            rows = tuple(replace(row, name=HOSTILE) if row is first else row for row in found.rows)
            more = {"curve": _curve(HOSTILE), "choice": _choice(HOSTILE)}
            return replace(found, name=HOSTILE, notes=(HOSTILE,), command=HOSTILE, rows=rows, **more)
        assert which == "nothing but a name"
        return Report((), 0, None, about="runs", name="bare")

    def _read(self, *folders: Path, against: Path | None = None, plan: str | None = None) -> Report:
        return read_report(
            [str(folder) for folder in folders],
            Compute(device=torch.device("cpu")),
            profile_options=None if plan is None else ProfileOptions(target=parse_rank([plan])),
            against=None if against is None else str(against),
            command="lrsurgery report",
        )


def _curve(data: str) -> Curve:
    """Of ten sizes; one point has no figure, as a wreck has none, and one was not timed."""
    points: list[Point] = []
    for i in range(1, 11):
        values = {"loss": 3 + 2 / i, "perplexity": 20 + 300 / i, "top1": i / 20, "top5": i / 11}
        at = Point(
            budget=f"{i / 10:g}", layers=10 - i, parameters=1_000 * i, share=i / 10, bytes=4_000 * i, values=values
        )
        points.append({**at, "speedup": 1.5 - i / 20, "interval": [1.4 - i / 20, 1.6 - i / 20]})
    points[0]["values"] = {}
    points[1]["speedup"] = points[1]["interval"] = None
    points[-1]["budget"] = None
    return Curve(points=points, knee=3, rule="by eye", data=data, setting="prefill of 1 x 8 on cpu", heal=0, notes=[])


def _choice(data: str) -> Choice:
    lines = [f"--max-loss 2%: found by {data}", data]
    figures = {"loss": 3.0}
    return Choice(
        target="--max-loss 2%",
        lines=lines,
        budget="0.5",
        bound=3.1,
        dense=figures,
        values=figures,
        points=[],
        data=data,
    )


WHICH = (
    "after surgery",
    "before surgery",
    "training runs",
    "a plan",
    "calibrated",
    "a curve",
    "untrained",
    "hundreds of layers",
    "hostile names",
    "nothing but a name",
)
