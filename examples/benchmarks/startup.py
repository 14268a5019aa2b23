"""How fast the program starts: `--help` beside a bare typer program's, and what a tiny model's `factorise` is spent on.

The bare program has two commands of one option each. `factorise` is split at the import system: "imports" is the time
inside the outermost load of a module, "outside imports" all else between the first line and the last, in whichever
thread, so what torch, transformers and safetensors do when called counts against us there. What is left of the whole
process is the interpreter's start and end.

    python examples/benchmarks/startup.py --save
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from harness import finish, in_turn, parser, ratio, run_measured

BARE = """
import typer

app = typer.Typer()


@app.command()
def first(name: str = "x") -> None:
    \"\"\"One thing.\"\"\"


@app.command()
def second(name: str = "x") -> None:
    \"\"\"Another.\"\"\"


app()
"""
# The import system looks `_find_and_load` up anew for each module that is not loaded yet.
TIMED = """
import _frozen_importlib, json, sys, time

load, depth, spent = _frozen_importlib._find_and_load, 0, 0.0

def timed(name, *rest):
    global depth, spent
    depth, begun = depth + 1, time.perf_counter()
    try:
        return load(name, *rest)
    finally:
        depth -= 1
        if not depth:
            spent += time.perf_counter() - begun

begun = time.perf_counter()
_frozen_importlib._find_and_load = timed
from lrsurgery.cli.app import main
place = sys.argv.pop(1)
try:
    main()
finally:
    figures = {"main_s": time.perf_counter() - begun, "imports_s": spent}
    figures["packages"] = sorted({name.partition(".")[0] for name in sys.modules})
    open(place, "w").write(json.dumps(figures))
"""
# Heavy packages that a factorisation has no use for.
UNWANTED = ("accelerate", "datasets", "matplotlib", "pandas", "pyarrow", "scipy", "sklearn", "tensorboard")


def tiny(folder: Path) -> Path:
    """A two-layer GPT-2 of width 64."""
    from transformers import GPT2Config, GPT2LMHeadModel

    target = folder / "tiny"
    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(target)
    return target


def _row(what: str, seconds: float, share: float | None = None, bar: float | None = None) -> dict[str, Any]:
    return {"what": what, "seconds": seconds, "ratio or share": share, "bar": bar}


def main() -> None:
    arguments = parser(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        (place / "bare.py").write_text(BARE, encoding="utf-8")
        source, figures = tiny(place), place / "figures.json"
        walls: list[float] = []
        timed: list[dict[str, Any]] = []
        words = [
            "factorise",
            str(source),
            "--rank",
            "0.5",
            "--overwrite",
            "--output",
            str(place / "out"),
            "--quiet",
            "--no-loss-check",
        ]

        def python(*rest: str) -> float:
            cache = str(place / f"cache-{len(timed)}")
            return run_measured([sys.executable, *rest], LRSURGERY_CACHE=cache)["wall_s"]

        def time_it() -> None:
            walls.append(python("-c", TIMED, str(figures), *words))
            timed.append(json.loads(figures.read_text(encoding="utf-8")))

        candidates = {
            "--help of a bare typer program": lambda: python(str(place / "bare.py"), "--help"),
            "--help of lrsurgery": lambda: python("-m", "lrsurgery", "--help"),
            "factorise of a tiny model": time_it,
        }
        seconds = in_turn(candidates, arguments.repeats)
    bare, ours = seconds["--help of a bare typer program"], seconds["--help of lrsurgery"]
    rounds = slice(1, None)  # the first was the warm-up
    outside = [(t["main_s"] - t["imports_s"]) / w for t, w in zip(timed[rounds], walls[rounds], strict=True)]
    imports = [t["imports_s"] / w for t, w in zip(timed[rounds], walls[rounds], strict=True)]
    whole = median(seconds["factorise of a tiny model"])
    rows = [
        _row("--help of a bare typer program", median(bare)),
        _row("--help of lrsurgery, over it", median(ours), ratio(ours, bare)["median"], 2.0),
        _row("factorise of a tiny model", whole),
        _row("of it imports", whole * median(imports), median(imports)),
        _row("of it outside imports", whole * median(outside), median(outside), 0.2),
    ]
    loaded = [name for name in UNWANTED if name in timed[-1]["packages"]]
    finish("startup", rows, arguments, loaded_without_need=loaded)


if __name__ == "__main__":
    main()
