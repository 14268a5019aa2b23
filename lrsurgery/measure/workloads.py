"""The work that `bench` times, on random input, of which only the shape matters.

Prefill, decode or a forward pass of a model; and its factorised layers by themselves.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lrsurgery.checkpoints.build import build_model
from lrsurgery.checkpoints.load import load_source, load_with_head
from lrsurgery.checkpoints.loading.modules import load_timm
from lrsurgery.checkpoints.source import Source, resolve
from lrsurgery.checkpoints.upstream.samples import sample_inputs
from lrsurgery.checkpoints.upstream.transformers import head_classes
from lrsurgery.data.speech.recordings import SOUNDS
from lrsurgery.data.tasks import SEQ2SEQ, SPEECH_SEQ2SEQ, TASKS, TIMM, is_for, task_of
from lrsurgery.data.text.padding import position_limit
from lrsurgery.errors import DataError, SurgeryError
from lrsurgery.surgery.apply import factorised_layers
from lrsurgery.surgery.forms.fill import dense_bias
from lrsurgery.surgery.forms.layout import prepare_for_inference_
from lrsurgery.surgery.layers import FactorisedLayer, build_dense, dense_weight, outline
from lrsurgery.timing import Workload

PREFILL, FORWARD = "prefill", "forward"
DECODE = "token by token"  # the name that bench.json has for it
SPOKEN = 64  # tokens that a decoder writes of a recording
CACHES = ("cache", "past_key_values", "cache_params")  # arguments that carry a KV cache or a state in transformers
Forward: TypeAlias = Callable[..., Any]  # a model, compiled or not; its output is its library's


class Setting(NamedTuple):
    """One kind of work at one batch size and length (tokens of a text, pixels of an image's side)."""

    work: str
    batch: int
    length: int

    @property
    def name(self) -> str:
        return "decode" if self.work == DECODE else self.work


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model to measure, as its config describes it: its task and its input."""

    source: Source
    task: str
    size: tuple[int, ...] = ()  # of an image (channels, height, width) or of sound; empty for text
    vocabulary: int = 0  # of text: ids are below it
    limit: int | None = None  # positions that the model has; None: no limit is known
    trust_remote_code: bool = False

    @staticmethod
    def of(
        reference: str, task: str | None = None, trust_remote_code: bool = False, architecture: str | None = None
    ) -> Contender:
        """Read the config alone. Raises SurgeryError for a model or a task that cannot be measured."""
        source = resolve(reference, architecture=architecture)
        task = task or task_of(source)
        if source.library == "timm" and task != TIMM.name:
            raise SurgeryError(f"task {task}: timm models are for {TIMM.name}")
        skeleton = build_model(source, device="meta", trust_remote_code=trust_remote_code)
        if TASKS[task].takes_images or TASKS[task].listens:
            size = _image_size(source, skeleton) if TASKS[task].takes_images else _sound_size(source, skeleton)
            return Contender(source=source, task=task, size=size, trust_remote_code=trust_remote_code)
        limit, relative = position_limit(skeleton)
        vocabulary = getattr(_text_config(skeleton), "vocab_size", None)
        if vocabulary is None:
            raise SurgeryError(f"{reference}: takes no tokens, which {task} is about; choose another --task")
        return Contender(
            source=source,
            task=task,
            vocabulary=vocabulary,
            limit=None if relative else limit,
            trust_remote_code=trust_remote_code,
        )

    def load(self, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
        """The model in eval mode, without gradients; a dtype of None keeps the stored one. Raises SurgeryError."""
        source = self.source
        if source.library == "timm":
            model = load_timm(source, dtype)
        elif is_for(source, self.task):
            model = load_source(source, dtype=dtype, trust_remote_code=self.trust_remote_code)
        else:
            name = TASKS[self.task].auto_class
            model, _ = load_with_head(source, name, trust_remote_code=self.trust_remote_code, dtype=dtype)
        if TASKS[self.task].needs_padding and getattr(_text_config(model), "pad_token_id", None) is None:
            _text_config(model).pad_token_id = 0  # a decoder without one takes a single sentence at most
        # torch's counter of FLOPs would look for gradients, which are never computed here
        return model.to(device).requires_grad_(False)

    @property
    def works(self) -> tuple[str, ...]:
        """The kinds of work that the task has."""
        return (PREFILL, DECODE) if TASKS[self.task].generates else (FORWARD,)

    @property
    def unit(self) -> str:
        """What throughput counts."""
        return TASKS[self.task].unit

    def units(self, work: str, batch: int, length: int) -> int:
        """Units of one pass; a pass of decode is one token of each sequence."""
        return batch * length if self.unit == "tokens" and work != DECODE else batch

    def random_input(self, model: nn.Module, batch: int, length: int, seed: int) -> Tensor:
        """Token ids (batch, length), without 0, which is often padding; or images (batch, channels, height, width).

        Sound has the shape that the model takes: spectra (batch, bins, frames), or samples (batch, samples).
        """
        generator = torch.Generator().manual_seed(seed)
        like = next(p for p in model.parameters() if p.is_floating_point())
        if self.size:
            return torch.randn(batch, *self.size, generator=generator).to(like.device, like.dtype)
        least = min(1, self.vocabulary - 1)
        return torch.randint(least, self.vocabulary, (batch, length), generator=generator).to(like.device)


def _text_config(model: Any) -> Any:
    """The config of the text part of a transformers model."""
    return model.config.get_text_config()


def _image_size(source: Source, model: nn.Module) -> tuple[int, ...]:
    from lrsurgery.data.images import Preprocessing

    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    try:
        shape = Preprocessing.of(source, model, None).shape
    except DataError:  # a transformers folder without a preprocessor
        if not isinstance(size, int):
            raise
        shape = None
    if shape is not None:
        return shape
    if not isinstance(size, int):
        raise SurgeryError(f"{source.reference}: neither its processor nor its config names one size of images")
    return getattr(config, "num_channels", 3), size, size


def _sound_size(source: Source, model: nn.Module) -> tuple[int, ...]:
    found = sample_inputs(model)[0]
    name = next((name for name in SOUNDS if name in found), None)
    if name is None:
        raise SurgeryError(f"{source.reference}: its config does not say how much sound it takes")
    return tuple(found[name].shape[1:])


def make_workload(
    model: nn.Module, x: Tensor, work: str, *, new_tokens: int = 0, wrap: Callable[[nn.Module], Forward] | None = None
) -> Workload | None:
    """One kind of work on the input `x`, to be timed; None for decode with a model that returns no cache.

    `wrap` (torch.compile) is applied to what is timed, and not to what prepares it.
    """
    forward = model if wrap is None else wrap(model)
    if work == FORWARD:
        return Workload(functools.partial(_forward, forward, x, _beside(model, x)))
    # a prefill needs the last logits alone, as in transformers' generate
    arguments = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in arguments else {}
    if work == PREFILL:
        return Workload(functools.partial(_forward, forward, x, {"use_cache": True, **last}))
    prompt = max(1, x.shape[1] - new_tokens)
    with torch.no_grad():  # as transformers' generate; in inference mode no layer knows whether its input has changed
        first = model(x[:, :prompt], use_cache=True, **last)
    name = next((name for name in CACHES if name in arguments and getattr(first, name, None) is not None), None)
    if name is None:
        return None
    # the prompt is prefilled once; each run extends a copy of its cache
    prepare = functools.partial(copy.deepcopy, getattr(first, name))
    begin = first.logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def decode(cache: object) -> Iterator[None]:
        token = begin
        for _ in range(x.shape[1] - prompt):
            output = forward(token, use_cache=True, **{name: cache})
            token, cache = output.logits[:, -1:].argmax(-1), getattr(output, name)
            yield

    return Workload(decode, prepare)


def _beside(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What a forward pass takes beside x: the tokens of a decoder that writes a text, as many as those of x."""
    if type(model).__name__ in head_classes(SPEECH_SEQ2SEQ.heads):
        tokens = min(SPOKEN, position_limit(model)[0] or SPOKEN)
        return {"decoder_input_ids": torch.ones(len(x), tokens, dtype=torch.long, device=x.device)}
    return {"decoder_input_ids": x} if type(model).__name__ in head_classes(SEQ2SEQ.heads) else {}


@torch.no_grad()
def _forward(forward: Forward, x: Tensor, options: Mapping[str, object], prepared: None) -> Iterator[None]:
    forward(x, **options)
    yield


@contextmanager
def name_failures(reference: str, what: str) -> Iterator[None]:
    """Turn any exception of a model into one line that names the model and the work. Raises SurgeryError."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise SurgeryError(f"{reference}: out of memory on {what}; lower --batch or --length") from e
    except SurgeryError:
        raise
    except Exception as e:
        reason = " ".join(str(e).split())[:200]
        raise SurgeryError(f"{reference}: fails on {what}: {type(e).__name__}: {reason}") from e


def compile_now(workload: Workload, reference: str) -> None:
    """Make the first call, which compiles. Raises SurgeryError; the model is known to run without compilation."""
    try:
        workload.once()
    except Exception as e:
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise SurgeryError(f"{reference}: torch.compile fails: {lines[0][:200]}; leave --compile out") from e


def count_flops(workload: Workload) -> int:
    """FLOPs of the matrix products and convolutions in one pass, two for a multiply-add; of decode, mean of a token."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # fused attention and recurrence have no count on every device; their plain forms consist of products, which have
    with (
        _without_onednn(),
        torch.backends.cudnn.flags(enabled=False),
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        passes = workload.once()
    return round(int(counter.get_total_flops()) / passes)


@contextmanager
def _without_onednn() -> Iterator[None]:
    # `mkldnn.flags` would set its other options too, and warn of one of them
    before, *_ = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before, _fp32_precision=None)  # type: ignore[no-untyped-call]


def prepare(models: Iterable[nn.Module]) -> list[str]:
    """Call `prepare_for_inference_` on each model; return a note that says so."""
    if any([prepare_for_inference_(model) for model in models]):  # noqa: C419  # each of them, not up to the first
        return ["--prepare: measured after prepare_for_inference_, which a program of your own has to call"]
    return ["--prepare changed nothing: every linear layer lies so already, or is not on a CPU"]


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Factorised layers that are timed as one: of the same dense layer, rank, form and input."""

    names: tuple[str, ...]
    layer: FactorisedLayer  # the first of them
    shape: tuple[int, ...]  # of the input

    def build_dense(self) -> nn.Module:
        """The dense layer with the same product and bias."""
        dense = build_dense(self.layer)
        dense.weight = nn.Parameter(dense_weight(self.layer), requires_grad=False)
        if (bias := dense_bias(self.layer)) is not None:
            dense.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return dense

    def random_input(self, device: torch.device, seed: int) -> Tensor:
        """Normal values of the input's shape, in the layer's dtype."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape, generator=generator).to(device, outline(self.layer.u.weight).dtype)


def layer_groups(model: nn.Module, x: Tensor) -> list[LayerGroup]:
    """The factorised layers that a forward pass on `x` calls, grouped, in the order of their first calls."""
    layers = factorised_layers(model)
    groups: dict[tuple[object, ...], list[str]] = {}
    shapes = _input_shapes(model, layers, x)
    for name, shape in shapes.items():
        layer = layers[name]
        key = (layer.kind, str(build_dense(layer)), outline(layer.u.weight).dtype, layer.rank, layer.side, shape)
        groups.setdefault(key, []).append(name)
    return [LayerGroup(names=tuple(names), layer=layers[names[0]], shape=shapes[names[0]]) for names in groups.values()]


def _input_shapes(model: nn.Module, layers: Mapping[str, FactorisedLayer], x: Tensor) -> dict[str, tuple[int, ...]]:
    """Layer -> shape of its input, at its first call in a forward pass on `x`."""
    shapes: dict[str, tuple[int, ...]] = {}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
            shapes.setdefault(name, tuple([*args, *options.values()][0].shape))

        return hook

    handles = [layer.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            model(x, **_beside(model, x))
    finally:
        for handle in handles:
            handle.remove()
    return shapes
