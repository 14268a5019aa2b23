"""Other people's packages, which the interop job installs and a plain development environment may lack."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest

REQUIRED = "LRSURGERY_INTEROP"  # set where every one must be there


def need(package: str) -> ModuleType:
    """The package; without it the test is left out, or fails in the interop job."""
    if os.environ.get(REQUIRED):
        return importlib.import_module(package)
    found: ModuleType = pytest.importorskip(package, reason=f"{package}: pip install '.[test-interop]'")
    return found


# for tests of many fresh processes that need no package: the main job has no time for them
in_its_job = pytest.mark.skipif(not os.environ.get(REQUIRED), reason=f"the interop job runs it: {REQUIRED}=1")
