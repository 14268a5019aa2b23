"""Forward passes of any model on random input, of which only the shapes matter: what `bench` times and counts."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery.checkpoints.build import build_model
from lrsurgery.checkpoints.load import load_model, load_timm, load_with_head
from lrsurgery.checkpoints.source import Source, resolve
from lrsurgery.data.examples import position_limit
from lrsurgery.data.tasks import AUTO_CLASSES, LANGUAGE, task_of
from lrsurgery.errors import DataError, SurgeryError
from lrsurgery.timing import Timed

PREFILL, BY_TOKEN, FORWARD = "prefill", "token by token", "forward"
CACHES = ("cache", "past_key_values", "cache_params")  # what releases of transformers call what is kept of a text


@dataclass(frozen=True)
class Contender:
    """A model to run: where it is, what it is for, what it is fed."""

    source: Source
    task: str
    size: tuple[int, ...]  # of an image: channels, height, width
    vocabulary: int  # of a text: ids are below it
    limit: int | None  # the most tokens that it has positions for
    trust_remote_code: bool = False

    @staticmethod
    def of(reference: str, task: str | None = None, trust_remote_code: bool = False) -> Contender:
        """Looks at the config alone. Raises SurgeryError for a model or a task that is not run here."""
        if task is not None and task not in AUTO_CLASSES:
            raise SurgeryError(f"unknown task '{task}'; known: {', '.join(AUTO_CLASSES)}")
        source = resolve(reference)
        task = task or task_of(source)
        if source.library == "timm" and task != "image-classification":
            raise SurgeryError(f"task {task}: timm models are for image-classification")
        skeleton: Any = build_model(source, device="meta", trust_remote_code=trust_remote_code)
        if task == "image-classification":
            return Contender(source, task, _image_size(source, skeleton), 0, None, trust_remote_code)
        config = skeleton.config.get_text_config()
        limit, relative = position_limit(config)
        vocabulary = getattr(config, "vocab_size", None)
        if vocabulary is None:
            raise SurgeryError(f"{reference}: takes no tokens, which {task} is about; choose another --task")
        return Contender(source, task, (), vocabulary, None if relative else limit, trust_remote_code)

    def load(self, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
        """The model in eval mode, in the dtype that it is stored in where none is given. Raises SurgeryError."""
        source = self.source
        if source.library == "timm":
            model: Any = load_timm(source, dtype)
        elif self._own_task():
            place: str | Path = source.folder if source.folder is not None else source.reference
            model = load_model(place, dtype=dtype, trust_remote_code=self.trust_remote_code)
        else:
            name = AUTO_CLASSES[self.task]
            model, _ = load_with_head(source, name, trust_remote_code=self.trust_remote_code, dtype=dtype)
        if self.task == "sequence-classification" and model.config.get_text_config().pad_token_id is None:
            model.config.get_text_config().pad_token_id = 0  # else a decoder takes no more than one sentence
        # torch's counter of operations looks for gradients that a pass here never has
        return model.to(device).requires_grad_(False)  # type: ignore[no-any-return]

    def _own_task(self) -> bool:
        try:
            return task_of(self.source) == self.task
        except SurgeryError:
            return False

    @property
    def works(self) -> tuple[str, ...]:
        return (PREFILL, BY_TOKEN) if self.task == "causal-lm" else (FORWARD,)

    @property
    def unit(self) -> str:
        if self.task in LANGUAGE:
            return "tokens"
        return "images" if self.task == "image-classification" else "sentences"

    def units(self, work: str, batch: int, length: int) -> int:
        """How many of them a pass handles; of token by token, the pass of one token."""
        return batch * length if self.unit == "tokens" and work != BY_TOKEN else batch

    def random_input(self, model: nn.Module, batch: int, length: int, seed: int) -> Tensor:
        """Ids (batch, length), none of them 0, which often stands for padding; or images (batch, *size)."""
        generator = torch.Generator().manual_seed(seed)
        like = next(p for p in model.parameters() if p.is_floating_point())
        if self.size:
            return torch.randn(batch, *self.size, generator=generator).to(like.device, like.dtype)
        return torch.randint(min(1, self.vocabulary - 1), self.vocabulary, (batch, length), generator=generator).to(
            like.device
        )


def _image_size(source: Source, model: Any) -> tuple[int, ...]:
    from lrsurgery.data.images import Preprocessing

    try:
        pixels: Any = Preprocessing.of(source, model, None).size
    except DataError:
        config = getattr(model, "config", None)
        pixels = getattr(config, "image_size", None)
        if not isinstance(pixels, int):
            raise
        return getattr(config, "num_channels", 3), pixels, pixels
    return 3, pixels, pixels


def make_pass(
    model: Any, x: Tensor, work: str, *, new_tokens: int = 0, wrap: Callable[[Any], Any] | None = None
) -> Timed | None:
    """One kind of work on input `x` as something to time; None where the model keeps no cache to go on from.

    `wrap` (torch.compile) is put around what is timed, and not around what prepares it.
    """
    forward = model if wrap is None else wrap(model)
    if work == FORWARD:
        return Timed(functools.partial(_pass, forward, x, {}))
    # of a long text only the last logits are asked for, as transformers' generate does
    taken = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
    if work == PREFILL:
        return Timed(functools.partial(_pass, forward, x, {"use_cache": True, **last}))
    prompt = max(1, x.shape[1] - new_tokens)
    with torch.inference_mode():
        first = model(x[:, :prompt], use_cache=True, **last)
    name = next((name for name in CACHES if name in taken and getattr(first, name, None) is not None), None)
    if name is None:
        return None
    # the cache of the prompt is made once; each run grows a copy of it
    prepare = functools.partial(copy.deepcopy, getattr(first, name))
    begin = first.logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def generate(cache: Any) -> Iterator[None]:
        token = begin
        for _ in range(x.shape[1] - prompt):
            found = forward(token, use_cache=True, **{name: cache})
            token, cache = found.logits[:, -1:].argmax(-1), getattr(found, name)
            yield

    return Timed(generate, prepare)


@contextmanager
def explained(reference: str, what: str) -> Iterator[None]:
    """A model's own failure, which may be any exception, as one line that says on what. Raises SurgeryError."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise SurgeryError(f"{reference}: out of memory on {what}; lower --batch or --length") from e
    except SurgeryError:
        raise
    except Exception as e:
        reason = " ".join(str(e).split())[:200]
        raise SurgeryError(f"{reference}: fails on {what}: {type(e).__name__}: {reason}") from e


@torch.inference_mode()
def _pass(forward: Any, x: Tensor, options: dict[str, Any], given: None) -> Iterator[None]:
    forward(x, **options)
    yield


def count_flops(timed: Timed) -> int:
    """Floating point operations of the products and convolutions in a pass; a multiplication and an addition are 2.

    Of token by token, the mean of a token.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # fused attention has no count on every device; its plain form is made of counted products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        times = timed.once()
    return round(int(counter.get_total_flops()) / times)
