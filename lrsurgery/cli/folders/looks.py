"""What `report` shows without reading weights: the reach of dense models, and whether folders are as written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrsurgery.text import expanded

if TYPE_CHECKING:
    from lrsurgery.cli.console import Screen


def show_reach(models: list[str], source_options: dict[str, Any], screen: Screen) -> None:
    """Show what of dense models can be factorised. Raises SurgeryError."""
    from lrsurgery.checkpoints.source import SourceOptions
    from lrsurgery.errors import SurgeryError
    from lrsurgery.report.dense.reach import read_reach

    options, found, notes = SourceOptions(**source_options), {}, {}
    for name in models:
        source = options.resolve(name)
        if source.is_factorised:
            raise SurgeryError(f"{name}: is factorised; --reach looks at a dense model")
        found[name], notes[name] = read_reach(source, options), source.notes
    screen.emit({"models": {name: each.to_dict() for name, each in found.items()}})
    for name, each in found.items():
        screen.show(f"{name}: {each.parameters:,} parameters")
        for note in notes[name]:
            screen.say(f"Note: {note}")
        for line in each.lines():
            screen.show(line)


def verify_folders(models: list[str], screen: Screen) -> None:
    """Compare folders with the digests in their reports. Raises SurgeryError that counts the files which differ."""
    from dataclasses import asdict

    from lrsurgery.errors import SurgeryError
    from lrsurgery.files.digests import verify_folder

    found = {name: verify_folder(expanded(name)) for name in models}
    screen.emit({"folders": {name: asdict(each) for name, each in found.items()}})
    for name, each in found.items():
        for file, what in each.remarks:
            screen.show(f"{Path(name) / file}: {what}")
        if each.whole:
            screen.show(f"{name}: {each.files} files, {each.bytes / 1e9:.2f} GB, as written")
    bad = {name: each for name, each in found.items() if not each.whole}
    if bad:
        count, of = (
            sum(n) for n in zip(*((len(e.missing) + len(e.damaged), e.files) for e in bad.values()), strict=True)
        )
        raise SurgeryError(f"{', '.join(bad)}: {count} of {of} files are not as written; download or copy them again")
