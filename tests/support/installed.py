"""A fresh Python whose environment has lrsurgery installed as from its wheel, whatever this environment is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SITE = "import site; site.addsitedir({!r})\n"


def beside_the_package() -> dict[str, Path]:
    """What the wheel has beside the package, by its name there."""
    _, _, table = (ROOT / "pyproject.toml").read_text().partition("[tool.hatch.build.targets.wheel.force-include]\n")
    pairs = (line.split(" = ") for line in table.partition("\n\n")[0].splitlines())
    return {name.strip('"'): ROOT / source.strip('"') for source, name in pairs}


def environment(folder: Path, package: Path = ROOT, *, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Environment variables of a Python that reads a site folder made in `folder`; `package` is where lrsurgery is.

    `without` names files of the wheel that are missing.
    """
    site, start = folder / "site", folder / "start"
    for each in (site, start):
        each.mkdir(parents=True)
    for name, source in beside_the_package().items():
        if name not in without:
            shutil.copy(source, site / name)
    (start / "sitecustomize.py").write_text(SITE.format(str(site)))
    kept = {name: value for name, value in os.environ.items() if "AUTOLOAD" not in name}
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, (start, package))), "HF_HUB_OFFLINE": "1"}


def python(variables: dict[str, str], *words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run that Python in `cwd`, by default in a folder where it finds no checkout of lrsurgery."""
    command, here = [sys.executable, *map(str, words)], cwd or variables["PYTHONPATH"].partition(os.pathsep)[0]
    return subprocess.run(command, env=variables, cwd=here, capture_output=True, text=True, timeout=280, check=False)
