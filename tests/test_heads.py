"""Heads apart from their bodies: the logits of slices against those of the model's own forward."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from lrsurgery import collect_statistics, factorise_
from lrsurgery.calibration import collect, loss
from lrsurgery.data import scores
from lrsurgery.data.batches import IGNORED
from lrsurgery.data.tasks import CAUSAL_LM, TASKS
from lrsurgery.data.text import sliced
from lrsurgery.heads import find_head

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
OPT = {"word_embed_proj_dim": 32, "ffn_dim": 48, **SMALL}
FAMILIES = [
    ("gpt2", GPT2),
    ("llama", SMALL),
    ("gemma2", {**SMALL, "head_dim": 8, "final_logit_softcapping": 2.0}),  # its logits are bent behind the head
    ("gemma3_text", {**SMALL, "head_dim": 8}),
    ("cohere", {**SMALL, "logit_scale": 0.1}),
    ("granite", {**SMALL, "logits_scaling": 8.0}),
    ("opt", OPT),  # calls the decoder of its base model
    ("mixtral", {**SMALL, "num_local_experts": 2}),
    ("bert", SMALL),  # has a layer and a norm in front of the decoder
    ("modernbert", {**SMALL, "global_attn_every_n_layers": 2}),
    ("distilbert", {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
]


def build(name: str, settings: dict[str, Any]) -> Any:
    config = tf.AutoConfig.for_model(name, **settings)
    causal = type(config) in tf.AutoModelForCausalLM._model_mapping
    masked = name in ("bert", "modernbert", "distilbert")
    torch.manual_seed(0)
    return (tf.AutoModelForCausalLM if causal and not masked else tf.AutoModelForMaskedLM).from_config(config).eval()


def batch_of(model: Any, *, padded: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(1, model.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def widest(module: nn.Module) -> Iterator[list[int]]:
    """The most values that a module returned at once within this context."""
    seen = [0]

    def see(_: nn.Module, __: Any, output: Tensor) -> None:
        seen[0] = max(seen[0], output.numel())

    handle = module.register_forward_hook(see)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize(("name", "settings"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_slices_are_those_of_the_whole(name: str, settings: dict[str, Any]) -> None:
    model = build(name, settings)
    batch = batch_of(model)
    head = find_head(model)
    assert head is not None
    with torch.no_grad():
        whole = model(**batch).logits.flatten(0, 1)
        split = head.run(lambda: model(**batch))
        assert split is not None
        states = split.hidden.flatten(0, 1)
        found = torch.cat([split.logits(states[part]) for part in split.slices(len(states), 5 * 61)])
        again = model(**batch).logits.flatten(0, 1)
    assert torch.allclose(found, whole, atol=1e-5)
    assert torch.equal(again, whole)  # nothing stays on the model


def test_gradients_of_slices_are_those_of_the_whole() -> None:
    model = build("gemma2", {**SMALL, "head_dim": 8, "final_logit_softcapping": 2.0})
    batch = batch_of(model)
    head = find_head(model)
    assert head is not None

    def gradients(logits: Tensor) -> list[Tensor]:
        model.zero_grad()
        logits.square().sum().backward()  # type: ignore[no-untyped-call]
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    whole = gradients(model(**batch).logits)
    split = head.run(lambda: model(**batch))
    assert split is not None
    states = split.hidden.flatten(0, 1)
    parts = gradients(torch.cat([split.logits(states[part]) for part in split.slices(len(states), 7 * 61)]))
    for one, other in zip(parts, whole, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "of",
    [
        pytest.param(lambda: tf.T5Config(vocab_size=61, d_model=32, d_kv=8, num_layers=2, num_heads=4), id="t5"),
        pytest.param(lambda: tf.BertConfig(**SMALL), id="classifier"),
    ],
)
def test_other_models_have_none(of: Any) -> None:
    config = of()
    cls = tf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else tf.AutoModelForSequenceClassification
    assert find_head(cls.from_config(config)) is None


def test_a_model_is_not_held() -> None:
    """What is known of its head stays no longer than the model."""

    def use() -> weakref.ref[nn.Module]:
        model = build("gpt2", GPT2)
        head = find_head(model)
        assert head is not None
        assert head.run(lambda: model(**batch_of(model))) is not None
        return weakref.ref(model.transformer)

    body = use()
    gc.collect()
    assert body() is None


def test_a_head_that_mixes_positions_is_run_whole() -> None:
    """Its logits of one position depend on the others, which a slice would not show."""
    model = build("gpt2", GPT2)
    head = model.lm_head
    own = head.forward
    head.forward = lambda x: own(x - x.mean(1, keepdim=True))
    found = find_head(model)
    assert found is not None
    assert found.run(lambda: model(**batch_of(model))) is None


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_statistics_do_not_depend_on_slices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, dict(FAMILIES)[name])
    batches = [batch_of(model), batch_of(model, padded=False)]
    whole = build(name, dict(FAMILIES)[name])
    monkeypatch.setattr(collect, "find_head", lambda _: None)
    wanted = collect_statistics(whole, batches, heads=True)
    monkeypatch.undo()
    monkeypatch.setattr(loss, "WIDE", 4 * 61)
    monkeypatch.setattr(loss, "CACHED", 3 * 61)
    with widest(model.get_output_embeddings()) as most:
        found = collect_statistics(model, batches, heads=True)
    assert 0 < most[0] <= 4 * 61
    assert set(found.uses) == set(wanted.uses)
    for key, use in wanted.uses.items():
        one, other = found.moments(key, use.kind), wanted.moments(key, use.kind)
        assert found.uses[key] == use
        assert torch.allclose(one.inputs, other.inputs, rtol=1e-4, atol=1e-6), key
        assert one.gradients is not None
        assert other.gradients is not None
        assert torch.allclose(one.gradients, other.gradients, rtol=1e-3, atol=1e-6 * float(other.gradients.max())), key


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_figures_do_not_depend_on_slices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, dict(FAMILIES)[name])
    batch = batch_of(model)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    labels[0, :5] = IGNORED
    task = "causal-lm" if name == "gpt2" else "masked-lm"
    head = find_head(model)
    assert head is not None
    monkeypatch.setattr(sliced, "AT_A_TIME", 4 * 61)
    with torch.no_grad():
        wanted = scores.measure(task, model(**batch).logits, labels)
        split = head.run(lambda: model(**batch))
        assert split is not None
        found = sliced.measure_split(split, labels, TASKS[task].align)
    assert torch.allclose(found, wanted, rtol=1e-6)
    assert found[:, 1].sum() > 0


@pytest.mark.parametrize("low", [False, True], ids=["dense", "low rank"])
def test_distillation_does_not_depend_on_slices(low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, divergence and their gradients, also those of a head that is factorised."""
    torch.manual_seed(0)
    student, teacher = build("gpt2", {**GPT2, "tie_word_embeddings": not low}), build("gpt2", GPT2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    if low:
        factorise_(student, rank=0.5, heads=True)
        assert not isinstance(student.lm_head, nn.Linear)
    batch = batch_of(student)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    heads = [find_head(each) for each in (student, teacher)]
    monkeypatch.setattr(sliced, "AT_A_TIME", 4 * 61)

    def gradients(total: Tensor) -> dict[str, Tensor]:
        student.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    logits = student(**batch).logits
    matched, count = scores.distillation(CAUSAL_LM.name, logits, teacher(**batch).logits.detach(), labels, 2.0)
    own = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    wanted = gradients(own + matched)
    with widest(student.get_output_embeddings()) as most:
        ours, theirs = (
            head.run(lambda model=model: model(**batch))  # type: ignore[union-attr, misc]
            for head, model in zip(heads, (student, teacher), strict=True)
        )
        assert ours is not None
        assert theirs is not None
        parts = sliced.distil_split(ours, theirs, labels, CAUSAL_LM.align, 2.0)
        found = gradients(parts[0] + parts[1])
    assert 0 < most[0] <= 4 * 61
    assert torch.allclose(parts[0], own, rtol=1e-5)
    assert torch.allclose(parts[1], matched, rtol=1e-4)
    assert parts[2] == count
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max())), name
