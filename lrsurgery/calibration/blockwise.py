"""All batches through a model block by block: for models larger than memory, a block's weights come once for all.

Nothing is known of the arguments that blocks take. Each batch runs the model's own forward in a thread of its own,
which stops where it calls a block until every other batch has come as far. One thread runs at a time, in the batches'
order: the threads only hold where each forward stands. For a batch that waits, memory keeps what its forward holds
there, mostly hidden states; on a CPU its thread keeps the idle ones of torch's that helped it.
"""

from __future__ import annotations

import contextvars
import ctypes
import functools
from collections.abc import Callable, Generator, Sequence
from threading import Semaphore, Thread, current_thread
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.calibration.offload import in_memory


class Visit:
    """All batches at one block, whose weights are in memory. What runs, runs in the batches' threads, hooks too."""

    def __init__(self, name: str, batches: Sequence[_Batch], renew: Callable[[], None]) -> None:
        self.name = name
        self._batches, self._renew, self._done = batches, renew, False

    def replay(self) -> None:
        """Run the block on every batch for nothing, on copies of its arguments; only before `run`."""
        assert not self._done, f"{self.name}: its batches are past it"
        for batch in self._batches:
            batch.resume("replay")

    def run(self) -> None:
        """Run the block on every batch, with what was put in its place or in it; once, by itself if not called."""
        if self._done:
            return
        self._done = True
        self._renew()
        for batch in self._batches:
            batch.resume()


def lockstep(
    model: nn.Module, blocks: Sequence[str], calls: Sequence[Callable[[], Any]]
) -> Generator[Visit, None, None]:
    """Run every call, which each run the model on one batch, so that all of them pass a block before any has the next.

    Yields a visit for each block: the batches run it when they are told to, at the latest when the next visit is asked
    for. Blocks are visited in the order of `blocks`; batches that skip one are waited for at the next, and a block that
    is called again is visited again. A block inside another is part of it.

    Calls run without gradients; what else torch keeps per thread (autocast, the default device) they must set
    themselves. Replays run on copies of the tensors in a block's arguments, lists, tuples and dicts of them included:
    some blocks change their input in place. Other objects are not copied, so turn caches off (`use_cache=False`). A
    model that keeps values of a batch on its modules between blocks would find those of another batch.

    Raises what a call raises, once no thread is left and the blocks are as before; so does closing it early.
    """
    modules: dict[str, nn.Module] = {}
    for name in blocks:
        if (block := model.get_submodule(name)) not in modules.values():
            modules[name] = block
    order = {name: i for i, name in enumerate(modules)}
    batches = [_Batch(i, call) for i, call in enumerate(calls)]

    def renew(name: str) -> None:
        """Let the batches run what was put in a block's place."""
        if (new := model.get_submodule(name)) is not modules[name]:
            del modules[name].__dict__["_call_impl"]
            modules[name] = new
            _stop_at(modules, name)

    try:
        for name in modules:
            _stop_at(modules, name)
        for batch in batches:
            batch.start()
            batch.resume()
        while waiting := [batch for batch in batches if batch.at is not None]:
            name = min((batch.at for batch in waiting if batch.at is not None), key=order.__getitem__)
            visit = Visit(name, [batch for batch in waiting if batch.at == name], functools.partial(renew, name))
            with in_memory(modules[name]):
                yield visit
                visit.run()
    finally:
        try:
            for batch in batches:
                batch.end()
        finally:
            for block in modules.values():
                block.__dict__.pop("_call_impl", None)


class _EndedError(BaseException):
    """Unwinds the forward of a batch that is not to go on."""


class _Batch(Thread):
    """A call in a thread that runs only while the caller's waits in `resume`."""

    def __init__(self, number: int, call: Callable[[], Any]) -> None:
        super().__init__(name=f"batch-{number}", daemon=True)
        self.at: str | None = None  # the block that it waits at
        self.inside = False
        self._call: Callable[[], Any] | None = call
        self._variables = contextvars.copy_context()
        self._go, self._back = Semaphore(0), Semaphore(0)
        self._order = "run"
        self._error: BaseException | None = None

    def resume(self, order: str = "run") -> None:
        """Let the batch run until it waits again or is done ("run"), or run its block only ("replay").

        Raises what that raises.
        """
        self._order = order
        self._go.release()
        self._back.acquire()
        if self.at is None:
            self.join()
        _malloc_trim()(0)  # glibc would keep, for each thread, what its block needed at its peak
        error, self._error = self._error, None
        if error is not None:
            raise error

    def end(self) -> None:
        """End the batch, one that still runs where it would wait next."""
        if self.is_alive():
            self._order = "end"
            self._go.release()
            self.join()

    def run(self) -> None:
        try:
            self._go.acquire()
            call, self._call = self._call, None
            if self._order == "run":
                assert call is not None
                with torch.no_grad():
                    self._variables.run(call)
        except _EndedError:
            pass
        except BaseException as e:
            self._error = e
        finally:
            self.at = None
            self._back.release()

    def wait(self, name: str, replay: Callable[[], None]) -> None:
        """In the batch's thread: stands before the block until it may run it."""
        self.at = name
        while True:
            self._back.release()
            self._go.acquire()
            if self._order == "end":
                raise _EndedError
            if self._order == "run":
                return
            try:
                replay()
            except BaseException as e:
                self._error = e


def _stop_at(modules: dict[str, nn.Module], name: str) -> None:
    """Make batches wait where they call a block, before any of its hooks: those set in the meantime see the call."""

    def plain(*args: Any, **kwargs: Any) -> Any:
        block = modules[name]  # looked up late: the visitor may have put another there
        call: Callable[..., Any] = type(block)._call_impl
        return call(block, *args, **kwargs)

    def stop(*args: Any, **kwargs: Any) -> Any:
        batch = current_thread()
        if not isinstance(batch, _Batch) or batch.inside:
            return plain(*args, **kwargs)
        batch.inside = True
        try:
            batch.wait(name, lambda: plain(*_copy(args), **_copy(kwargs)))
            return plain(*args, **kwargs)
        finally:
            batch.inside = False

    modules[name].__dict__["_call_impl"] = stop


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in {tuple, list}:
        return type(value)(map(_copy, value))
    if type(value) is dict:
        return {key: _copy(item) for key, item in value.items()}
    return value


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    try:
        trim: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return lambda _: None
    return trim
