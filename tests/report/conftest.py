"""Reports of real models, made once for all files of this room."""

from __future__ import annotations

from functools import cache

import pytest
from support.reports import Reports, Shop


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("reports"))


@pytest.fixture(scope="session")
def report_of(shop: Shop) -> Reports:
    """A report by its name in `WHICH`."""
    return cache(shop.report)
