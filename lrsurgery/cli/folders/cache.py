"""The `cache` command."""

from __future__ import annotations

from typing import Annotated

import typer

from lrsurgery.cli.arguments import DebugOption, JsonOption, QuietOption, make_screen


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove every entry.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Show or clear the singular values that earlier runs kept, so that another rank or a plan need not compute them.

    $LRSURGERY_CACHE names another folder, $LRSURGERY_CACHE_SIZE another limit than 10GB.

    [bold]Examples[/bold]

      lrsurgery cache

      lrsurgery cache --clear
    """
    screen = make_screen(quiet, as_json)
    from lrsurgery.checkpoints.spectra import SpectrumCache

    kept = SpectrumCache()
    if clear:
        kept.clear()
    entries, size = kept.size()
    screen.emit({"folder": str(kept.folder), "entries": entries, "bytes": size})
    screen.show(f"{kept.folder}: {entries} entries, {size / 1e6:.1f} MB")
