"""Prefill and decode of whole models for gpu.py: dense against both forms, eager, compiled and with CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from statistics import median
from typing import Any

import big_checkpoint
import running
import torch
from gpu_cells import TINY_GPT2, TINY_LLAMA, Cell, Row, Setup, rounds, row, timed
from torch import Tensor

WAYS = ("eager", "compiled", "CUDA graphs")
WARM_UP = {"eager": 1, "compiled": 2, "CUDA graphs": 3}  # a graph is recorded in the second call


@dataclass
class Family:
    """A language model's shape, its models of every rank once they are needed, and the operations counted of them."""

    name: str
    config: Any
    device: str
    models: dict[str, Any] = field(default_factory=dict)
    counted: dict[str, dict[str, int]] = field(default_factory=dict)

    def load(self) -> None:
        if not self.models:
            dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
            made = {rank: running.build(self.config, rank, self.device).to(dtype).eval() for rank in running.RANKS}
            self.models.update(made)


def prefill_and_decode(setup: Setup) -> list[Cell]:
    """Speed of whole models in bf16, over dense; what takes no compilation first, then what matters most."""
    from transformers import GPT2Config, LlamaConfig

    if setup.tiny:
        shapes = {"GPT-2-small": GPT2Config(**TINY_GPT2), "Llama-7B": LlamaConfig(**TINY_LLAMA)}
    else:
        big = {"hidden_size": big_checkpoint.HIDDEN, "intermediate_size": big_checkpoint.INTERMEDIATE}
        big |= {"num_attention_heads": big_checkpoint.HEADS, "num_hidden_layers": setup.layers}
        llama = LlamaConfig(**big, num_key_value_heads=big_checkpoint.HEADS, vocab_size=big_checkpoint.VOCABULARY)
        shapes = {"GPT-2-small": GPT2Config(), "Llama-7B": llama}
    layers = {name: config.num_hidden_layers for name, config in shapes.items()}
    families = [
        Family(f"{setup.shaped(name)}, {layers[name]} layers", config, setup.device) for name, config in shapes.items()
    ]
    batches = (1, 8, 64, 256) if not setup.tiny else (1, 2)
    ways = WAYS if not setup.tiny else WAYS[:2]  # CUDA graphs have no counterpart on a CPU
    most_used = {("decode", "CUDA graphs", 1), ("prefill", "compiled", 8)}
    cells = []
    for way in ways:
        for batch in batches:
            for family in families:
                for work in ("prefill", "decode"):
                    if setup.tiny and way != "eager" and (batch != 1 or family is not families[0]):
                        continue
                    first = way == "eager" or (work, way, batch) in most_used
                    run = partial(_speedups, setup, family, work, way, batch)
                    kind = f"{family.name} {work} {way == 'eager'}"
                    guess = 10 if way == "eager" else 60
                    name = f"{family.name}, {work}, batch {batch}, {way}"
                    cells.append((setup.tiny or not first, Cell(name=name, run=run, kind=kind, guess=guess)))
    return [cell for _, cell in sorted(cells, key=lambda pair: pair[0])]


@torch.no_grad()
def _speedups(setup: Setup, family: Family, work: str, way: str, batch: int) -> list[Row]:
    family.load()
    context, new = (running.TOKENS, running.NEW_TOKENS) if not setup.tiny else (16, 4)
    if work not in family.counted:
        plain = _workload(family, family.models, work, 1, context, new)
        family.counted[work] = {rank: running.operations(run) for rank, run in plain.items()}
    calls, note = family.models, None
    if way != "eager":
        from torch._dynamo import config, reset
        from torch._dynamo.utils import counters

        reset()  # another batch size would be compiled for any size, and at most eight times
        counters.clear()
        config.recompile_limit = 64  # type: ignore[attr-defined]  # models of one class count as one function
        options: Any = {"backend": "eager"} if setup.tiny else {}
        if way == "CUDA graphs":
            options = {"mode": "reduce-overhead"}
        calls = {rank: torch.compile(model, dynamic=False, **options) for rank, model in calls.items()}
    runs = _workload(family, calls, work, batch, context, new, marks=way == "CUDA graphs")
    seconds = rounds(runs, setup.repeats, 4, WARM_UP[way])
    if way != "eager":
        note = _what_compiled(options, len(calls))
        del calls, runs
        reset()
    tokens = batch * (context if work == "prefill" else new)
    what = f"{family.name}, {work}, batch {batch}, {way}"
    rows = []
    for rank in running.RANKS:
        gained = running.speedup(seconds, family.counted[work], rank)
        of_ideal = {"ideal": gained["ideal"], "of ideal": gained["achieved / ideal"]} if rank != "dense" else {}
        speed = tokens / median(seconds[rank])
        rows.append(row(what, rank, **timed(seconds, rank, "dense"), **of_ideal, **{"tokens/s": speed}, note=note))
    return rows


def _what_compiled(options: Mapping[str, str], models: int) -> str | None:
    """What dynamo and inductor say of the models that they compiled, where it is not one whole graph each."""
    from torch._dynamo.utils import counters

    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    skips = counters["inductor"]["cudagraph_skips"]
    facts = ["backend eager, which needs no C++ compiler"] if options.get("backend") else []
    facts += [f"{breaks} graph breaks"] if breaks else []
    facts += [f"{graphs} graphs of {models} models"] if graphs != models else []
    facts += [f"CUDA graphs skipped {skips} times"] if skips else []
    return "; ".join(facts) or None


def _workload(
    family: Family, calls: Mapping[str, Any], work: str, batch: int, context: int, new: int, *, marks: bool = False
) -> dict[str, Callable[[], None]]:
    """The prefill of `context` tokens, or the decode of `new` ones after as many, of each model."""
    x = torch.randint(0, family.config.vocab_size, (batch, context), device=family.device)
    if work == "prefill":
        return {rank: partial(_prefill, call, x, marks) for rank, call in calls.items()}
    from transformers import StaticCache

    token = torch.randint(
        0, family.config.vocab_size, (batch, 1), device=family.device
    )  # no slice: strides are guarded
    model, config = family.models["dense"], family.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    cache = StaticCache(config=config, max_cache_len=context + new)
    # before anything is compiled: graphs are recorded with the addresses of the cache
    width = config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch, heads, width, model.dtype, torch.device(family.device))
    return {rank: partial(_decode, call, token, cache, context, new, marks) for rank, call in calls.items()}


def _prefill(call: Any, x: Tensor, marks: bool) -> None:
    if marks:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
    call(x, use_cache=False, logits_to_keep=1)


def _decode(call: Any, token: Tensor, cache: Any, context: int, new: int, marks: bool) -> None:
    """Greedy decode, one token at a time; the cache is as long as after `context` tokens, of whatever content."""
    forward = getattr(call, "_orig_mod", call).forward
    name = "cache" if "cache" in signature(forward).parameters else "past_key_values"  # before transformers 5.24
    for layer in cache.layers:
        layer.cumulative_length.fill_(context)
    for _ in range(new):
        if marks:  # what the step before returned may be overwritten
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        logits = call(token, **{name: cache}, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)
