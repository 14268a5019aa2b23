"""`report` on a folder: the report written at surgery, or one made from the factors where there is none."""

from __future__ import annotations

from dataclasses import replace

from lrsurgery.errors import SourceError
from lrsurgery.loading import load_model
from lrsurgery.report import FILE_NAME, Report, rank_report
from lrsurgery.sources import resolve


def read_report(reference: str) -> Report:
    """The report of a factorised folder. Raises SourceError for any other model."""
    source = resolve(reference)
    assert source.folder is not None
    if (source.config.get("quantization_config") or {}).get("quant_method") != "lrsurgery":
        raise SourceError(f"{reference}: not a factorised checkpoint; make one with lrsurgery factorise")
    if (source.folder / FILE_NAME).is_file():
        return Report.read(source.folder)
    found = rank_report(load_model(source.folder))
    return replace(found, source={"reference": reference})
