"""Whatever is damaged or hostile in what a command reads: it works, or it says one line and leaves all as it was.

40 cases run in every run. `pytest -m fuzz tests/end_to_end/test_fuzz.py` runs LRSURGERY_FUZZ of them (500 by default)
from the seed LRSURGERY_FUZZ_SEED, goes on after a failure and counts them by command.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import fuzz

EVERY_RUN = 40


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuzz.make(tmp_path_factory.mktemp("fuzz") / "artefacts")


@pytest.mark.process
def test_unchanged_every_command_works(artefacts: Path, tmp_path: Path) -> None:
    """Else a case would be right for another reason than its change."""
    for number, command in enumerate(fuzz.COMMANDS):
        folder = tmp_path / str(number)
        shutil.copytree(artefacts, folder)
        assert fuzz.check(fuzz.Case(folder, command, list(command.words))) == (command.name, 0)


@pytest.mark.process
@settings(
    max_examples=EVERY_RUN,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # a case says all of itself; to shrink it would take minutes
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(rng=st.randoms(use_true_random=False))
def test_works_or_says_one_line(rng: random.Random, artefacts: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("case") / "w"
    fuzz.check(fuzz.draw(rng, artefacts, folder))
    shutil.rmtree(folder.parent)


@pytest.mark.fuzz
@pytest.mark.process
def test_many(artefacts: Path, tmp_path: Path) -> None:
    count, seed = int(os.environ.get("LRSURGERY_FUZZ", "500")), int(os.environ.get("LRSURGERY_FUZZ_SEED", "0"))

    def one(number: int) -> tuple[str, int | str | None]:
        case = fuzz.draw(random.Random(f"{seed} {number}"), artefacts, tmp_path / str(number) / "w")
        try:
            return fuzz.check(case)
        except Exception as e:  # counted below, with all others
            return case.command.name, f"case {number} of seed {seed}: {e or type(e).__name__}"
        finally:
            shutil.rmtree(tmp_path / str(number), ignore_errors=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(one, range(count)))
    broken = [str(what) for _, what in found if isinstance(what, str)]
    counts = Counter((command, "broken" if isinstance(what, str) else what) for command, what in found)
    table = "\n".join(f"{command:10} {what}: {n}" for (command, what), n in sorted(counts.items(), key=str))
    print(f"\n{table}\n{len(broken)} of {count} broken")
    assert not broken, "\n\n".join([table, *broken])
