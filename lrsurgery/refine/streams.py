"""Two streams through the blocks of two models: the dense one, and the compressed one that is being refined."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from typing import Any

from torch import nn

from lrsurgery.calibration.blockwise import Visit, copy_of, visit_blocks
from lrsurgery.calibration.collect import call
from lrsurgery.calibration.loss import Batch
from lrsurgery.errors import CalibrationError
from lrsurgery.refine.activations import Cache, Given, outputs_of


class Pair:
    """The same block of both models, whose weights are in memory, with all batches of both streams before it."""

    def __init__(self, name: str, dense: nn.Module, compressed: nn.Module, visits: tuple[Visit, Visit]) -> None:
        self.name, self.dense, self.compressed = name, dense, compressed
        self._visits = visits

    def given(self, cache: Cache, *, dense: bool = False) -> None:
        """Add what the block of a stream is given, for each batch, to a cache."""
        block, visit = (self.dense, self._visits[0]) if dense else (self.compressed, self._visits[1])

        def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
            cache.append(Given(*copy_of((args, kwargs))))

        handle = block.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            visit.replay()
        finally:
            handle.remove()

    def run_dense(self, cache: Cache | None) -> None:
        """Take the dense stream past the block and add the block's outputs, for each batch, to a cache."""

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            assert cache is not None
            cache.append([tensor.detach().clone() for tensor in outputs_of(output)])

        handle = None if cache is None else self.dense.register_forward_hook(keep)
        try:
            self._visits[0].run()
        finally:
            if handle is not None:
                handle.remove()

    def run_compressed(self) -> None:
        """Take the compressed stream past the block as it is now."""
        self._visits[1].run()


def visit_pairs(
    dense: nn.Module, compressed: nn.Module, blocks: Sequence[str], batches: Sequence[Batch]
) -> Generator[Pair, None, None]:
    """Run both models on all batches block by block, and stop before each block.

    Raises CalibrationError where the models do not run their blocks in the same order.
    """

    def calls(model: nn.Module) -> list[Callable[[], Any]]:
        return [lambda batch=batch: call(model, batch) for batch in batches]  # type: ignore[misc]

    with ExitStack() as held:
        streams = [
            held.enter_context(closing(visit_blocks(model, blocks, calls(model)))) for model in (dense, compressed)
        ]
        while True:
            visits = [next(stream, None) for stream in streams]
            names = [None if visit is None else visit.name for visit in visits]
            if names[0] != names[1]:
                raise CalibrationError(
                    f"the dense model runs {names[0] or 'nothing more'} where the factorised one runs"
                    f" {names[1] or 'nothing more'}; refine against the model that was factorised"
                )
            first, second = visits
            if first is None or second is None:
                return
            name = first.name
            yield Pair(name, dense.get_submodule(name), compressed.get_submodule(name), (first, second))
