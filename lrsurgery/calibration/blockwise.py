"""Block-by-block execution: all batches pass one block before the next, so that each block is loaded only once.

No assumption is made about the arguments of blocks. Each batch runs the model's own forward in a thread, which waits
before each block until all other batches have reached it. One thread runs at a time, in the order of the batches; a
thread only holds the state of its forward. A waiting batch occupies memory for its local tensors, mostly hidden
states, and on a CPU for its idle worker threads of torch.
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

from lrsurgery.calibration.offload import hold_in_memory


class Visit:
    """All batches at one block, whose weights are in memory. The block and its hooks run in the batches' threads."""

    def __init__(self, name: str, batches: Sequence[_Batch], renew: Callable[[], None]) -> None:
        self.name = name
        self._batches, self._renew, self._done = batches, renew, False

    def replay(self) -> None:
        """Run the block on copies of every batch's arguments and discard the outputs; allowed only before `run`."""
        assert not self._done, f"{self.name}: its batches are past it"
        for batch in self._batches:
            batch.resume("replay")

    def run(self) -> None:
        """Run the block, as the model holds it now, on every batch; happens once, at the visit's end at the latest."""
        if self._done:
            return
        self._done = True
        self._renew()
        for batch in self._batches:
            batch.resume()


def visit_blocks(
    model: nn.Module, blocks: Sequence[str], calls: Sequence[Callable[[], Any]]
) -> Generator[Visit, None, None]:
    """Run every call (the model on one batch) so that all of them pass a block before any reaches the next.

    Yields a visit per block. The batches run the block when the visit says so, at the latest when the next visit is
    requested. Blocks are visited in the order of `blocks`. Batches that skip a block wait at the next one, and a block
    that is called again is visited again. A block inside another is part of it.

    Calls run without gradients and must set torch's other per-thread state (autocast, default device) themselves.
    Replays copy the tensors in a block's arguments, including those in lists, tuples and dicts, since some blocks
    modify their input in place. Other objects are not copied, so turn the KV cache off (`use_cache=False`). A model
    must not keep a batch's values on its modules between blocks, since another batch would read them.

    An exception of a call is raised after all threads have ended and the blocks are restored. Closing the generator
    ends the threads in the same way.
    """
    modules: dict[str, nn.Module] = {}
    for name in blocks:
        if (block := model.get_submodule(name)) not in modules.values():
            modules[name] = block
    # what replaces a block everywhere finds it in `modules` too, through the block's own call; not in here
    stopped = dict(modules)
    order = {name: i for i, name in enumerate(modules)}
    batches = [_Batch(i, call) for i, call in enumerate(calls)]

    def renew(name: str) -> None:
        """Make the batches call the module that has replaced a block."""
        if (new := model.get_submodule(name)) is not stopped[name]:
            del stopped[name].__dict__["_call_impl"]
            modules[name] = stopped[name] = new
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
            with hold_in_memory(modules[name]):
                yield visit
                visit.run()
    finally:
        try:
            for batch in batches:
                batch.end()
        finally:
            for block in stopped.values():
                block.__dict__.pop("_call_impl", None)


class _EndedError(BaseException):
    """Unwinds the forward of a batch that is ended early."""


class _Batch(Thread):
    """A call in a thread that runs only while the caller waits in `resume`."""

    def __init__(self, number: int, call: Callable[[], Any]) -> None:
        super().__init__(name=f"batch-{number}", daemon=True)
        self.at: str | None = None  # the block it waits at
        self.inside = False
        self._call: Callable[[], Any] | None = call
        # replays run in another context than the forward, in which transformers' recording of hidden states is not on
        self._variables, self._outside = contextvars.copy_context(), contextvars.copy_context()
        self._go, self._back = Semaphore(0), Semaphore(0)
        self._order = "run"
        self._error: BaseException | None = None

    def resume(self, order: str = "run") -> None:
        """Let the batch run to its next block or to its end ("run"), or replay its block ("replay").

        Raises the exception of the batch, if any.
        """
        self._order = order
        self._go.release()
        self._back.acquire()
        if self.at is None:
            self.join()
        malloc_trim()(0)  # otherwise glibc keeps the peak memory of the block for each thread
        error, self._error = self._error, None
        if error is not None:
            raise error

    def end(self) -> None:
        """End the batch at the block where it waits or would wait next."""
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
        """Wait, in the batch's thread, before a block until it may run."""
        self.at = name
        while True:
            self._back.release()
            self._go.acquire()
            if self._order == "end":
                raise _EndedError
            if self._order == "run":
                return
            try:
                self._outside.run(replay)
            except BaseException as e:
                self._error = e


def _stop_at(modules: dict[str, nn.Module], name: str) -> None:
    """Make batches wait when they call a block, before its hooks run, so that hooks added in a visit take effect."""

    def plain(*args: Any, **kwargs: Any) -> Any:
        block = modules[name]  # looked up late, since a visit may replace the block
        call: Callable[..., Any] = type(block)._call_impl
        return call(block, *args, **kwargs)

    def stop(*args: Any, **kwargs: Any) -> Any:
        batch = current_thread()
        if not isinstance(batch, _Batch) or batch.inside:
            return plain(*args, **kwargs)
        batch.inside = True
        try:
            batch.wait(name, lambda: plain(*copy_of(args), **copy_of(kwargs)))
            return plain(*args, **kwargs)
        finally:
            batch.inside = False

    modules[name].__dict__["_call_impl"] = stop


def copy_of(value: Any) -> Any:
    """Copy the tensors in nested lists, tuples and dictionaries, without gradients; other objects are the same."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in {tuple, list}:
        return type(value)(map(copy_of, value))
    if type(value) is dict:
        return {key: copy_of(item) for key, item in value.items()}
    return value


@functools.cache
def malloc_trim() -> Callable[[int], object]:
    """The function of glibc that gives freed memory back to the system; elsewhere one that does nothing."""
    try:
        trim: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return lambda _: None
    return trim
