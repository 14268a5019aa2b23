"""No test reaches a hub; every test process keeps to its share of the cores, and can be interrupted."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections import Counter

os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="lrsurgery-datasets-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ["LRSURGERY_CACHE"] = tempfile.mkdtemp(prefix="lrsurgery-cache-")
atexit.register(shutil.rmtree, os.environ["LRSURGERY_CACHE"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

# a job in a shell's background ignores Ctrl-C, and so would the programs that tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long runs out, unless they are asked for; begin with files that take long, so that none is the last."""
    if "fuzz" not in config.getoption("-m"):
        out = [item for item in items if item.get_closest_marker("fuzz")]
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]
    starts = Counter(item.path for item in items if item.get_closest_marker("process"))
    items.sort(key=lambda item: -starts[item.path])
