"""Valid JSON of odd values: what a damaged or hostile file may hold in place of what its program wrote."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 10**30, 1.5, 1e308, -2.5),
    *("", "x", "../x", [], [1], ["a"], [[1, 2]], [None], {}, {"x": 1}, {"0": None}, [{}]),
)


def places(body: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value of a JSON body stands, of lists the first three."""
    if path:
        yield path
    if isinstance(body, dict):
        for key, value in body.items():
            yield from places(value, (*path, key))
    elif isinstance(body, list):
        for i, value in enumerate(body[:3]):
            yield from places(value, (*path, i))


def mutations(body: Any, count: int, seed: int = 0) -> Iterator[tuple[str, Any]]:
    """(what was changed, the changed body): a value is replaced by an odd one or left out, at any depth alike."""
    rng = random.Random(seed)
    by_depth: dict[int, list[tuple[Any, ...]]] = {}
    for path in places(body):
        by_depth.setdefault(len(path), []).append(path)
    for _ in range(count):
        changed = copy.deepcopy(body)
        path = rng.choice(by_depth[rng.choice(list(by_depth))])
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        if rng.random() < 0.1:
            del inner[path[-1]]
            yield f"without {path}", changed
        else:
            inner[path[-1]] = rng.choice(VALUES)
            yield f"{path} = {inner[path[-1]]!r}", changed
