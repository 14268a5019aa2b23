"""Tables of tokens and the heads tied to them: what they compute, what they stay tied to, and in which metric."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import lrsurgery
from lrsurgery.calibration.loss import SampledLoss
from lrsurgery.errors import PlanError
from lrsurgery.linalg.weighted import Metric, combine, weighted_factors, weighted_norm, weighted_values
from lrsurgery.surgery.apply import swap_
from lrsurgery.surgery.decay import FrobeniusDecay
from lrsurgery.surgery.layers import Spec
from lrsurgery.surgery.plan import SurgeryOptions, plan_rows
from lrsurgery.surgery.ranks import ParameterShare, RankSpec
from lrsurgery.surgery.rows import Kept, Replacement
from lrsurgery.surgery.tables.embedding import FactorisedEmbedding
from lrsurgery.surgery.tables.find import find_tables

SIZES: dict[str, Any] = {"vocab_size": 67, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 2}


def llama(**options: Any) -> Any:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, **HEADS, **{"tie_word_embeddings": True, **options}))


def gemma() -> Any:
    sizes = {**SIZES, "num_key_value_heads": 1, "head_dim": 12, "pad_token_id": 0}
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**sizes, **HEADS))


def gpt2() -> Any:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=67, n_embd=24, n_layer=2, n_head=2, n_positions=32))


def bert() -> Any:
    return tf.BertForMaskedLM(tf.BertConfig(**SIZES, **HEADS, max_position_embeddings=32))


def t5() -> Any:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=67, d_model=24, d_ff=40, d_kv=12, num_layers=2, num_heads=2, tie_word_embeddings=True)
    )


FAMILIES = {
    "llama": (llama, "model.embed_tokens", "lm_head"),
    "gemma, whose rows are scaled": (gemma, "model.embed_tokens", "lm_head"),
    "gpt2": (gpt2, "transformer.wte", "lm_head"),
    "bert, whose head has a bias": (bert, "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    "t5": (t5, "shared", "lm_head"),
}


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> tuple[Any, str, str]:
    make, table, head = FAMILIES[request.param]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model, table, head


def outputs(model: Any) -> Tensor:
    tokens = torch.arange(24).reshape(2, 12) * 5 % 67
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=tokens, **more).logits  # type: ignore[no-any-return]


def close(found: Tensor, wanted: Tensor, bound: float = 1e-5) -> bool:
    return float((found - wanted).abs().max() / wanted.abs().max()) < bound


@pytest.mark.parametrize("form", ["balanced", "pivoted"])
@pytest.mark.parametrize("rank", ["1.0", "0.5"])
def test_a_model_computes_what_it_does_with_the_product_as_its_table(
    family: tuple[Any, str, str], rank: str, form: str
) -> None:
    model, table, head = family
    low = copy.deepcopy(model)
    lrsurgery.factorise_(low, rank=rank, include=[table], embeddings=True, allow_larger=True, form=form)
    layers = lrsurgery.factorised_layers(low)
    assert {table, head} <= set(layers)  # T5 has tables in both its halves, too
    best = lrsurgery.linalg.truncated_svd(model.get_submodule(table).weight.detach(), layers[table].rank)
    with torch.no_grad():
        model.get_submodule(table).weight.copy_(best.u @ best.v)  # tied, so the head has it too
    assert close(outputs(low), outputs(model), 1e-4)
    assert layers[table].u.weight is layers[head].u.weight
    assert layers[table].v.weight is layers[head].v.weight
    lrsurgery.densify_(low)
    assert low.get_submodule(table).weight is low.get_submodule(head).weight
    assert close(outputs(low), outputs(model), 1e-4)


@pytest.mark.parametrize("form", ["balanced", "pivoted"])
def test_it_is_saved_once_and_tied_again(family: tuple[Any, str, str], form: str, tmp_path: Path) -> None:
    model, table, head = family
    lrsurgery.factorise_(model, rank="0.5", embeddings=True, form=form)
    wanted = outputs(model)
    model.save_pretrained(tmp_path / "m")
    read = type(model).from_pretrained(tmp_path / "m").eval()
    assert torch.equal(outputs(read), wanted)
    assert read.get_submodule(head).u.weight is read.get_submodule(table).u.weight
    assert sum(p.numel() for p in read.parameters()) == lrsurgery.rank_report(read).parameters_after
    stored = sum(p.numel() for p in model.parameters())
    assert (tmp_path / "m/model.safetensors").stat().st_size < 4 * stored + 20_000
    read.tie_weights()
    assert torch.equal(outputs(read), wanted)
    other = "pivoted" if form == "balanced" else "balanced"
    lrsurgery.save_model(read, tmp_path / "other", form=other)
    assert close(outputs(lrsurgery.load_model(tmp_path / "other")), wanted, 1e-4)
    assert torch.equal(outputs(read), wanted)  # as it was
    again = pickle.loads(pickle.dumps(copy.deepcopy(read)))
    assert torch.equal(outputs(again), wanted)
    assert again.get_submodule(head).u.weight is again.get_submodule(table).u.weight


def test_a_base_model_and_one_with_a_head_read_each_others_files(tmp_path: Path) -> None:
    model = llama()
    lrsurgery.factorise_(model, rank="0.5", embeddings=True, form="pivoted")
    model.save_pretrained(tmp_path / "head")
    base = tf.AutoModel.from_pretrained(tmp_path / "head")
    base.save_pretrained(tmp_path / "base")
    read = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(outputs(read), outputs(model.eval()))


@pytest.mark.parametrize("form", ["balanced", "pivoted"])
def test_resizing_keeps_low_rank_and_ties(family: tuple[Any, str, str], form: str) -> None:
    model, table, head = family
    lrsurgery.factorise_(model, rank="0.5", embeddings=True, form=form)
    before, mean = outputs(model), model.get_submodule(table).u.weight.detach().mean(0)
    model.resize_token_embeddings(80)
    low, tied = model.get_submodule(table), model.get_submodule(head)
    assert isinstance(low, FactorisedEmbedding)
    assert low.u.weight is tied.u.weight
    assert low.num_embeddings == tied.out_features == 80
    assert torch.allclose(low.u.weight[67:], mean.expand(13, -1), atol=1e-3)
    assert close(outputs(model)[..., :67], before, 1e-4)
    assert outputs(model).shape[-1] == 80
    lrsurgery.densify_(model)
    model.resize_token_embeddings(90)  # the library's own way again
    assert model.get_submodule(table).weight.shape == (90, 24)


def test_an_untied_head_is_a_layer_by_itself() -> None:
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=False).eval()
    lrsurgery.factorise_(model, rank="0.5", embeddings=True, form="pivoted")
    assert set(find_tables(model)) == set()  # it is none any more
    assert not isinstance(model.lm_head, lrsurgery.layers.FactorisedLinear)
    lrsurgery.factorise_(model, rank="0.5", heads=True, form="pivoted")
    assert isinstance(model.lm_head, lrsurgery.layers.FactorisedLinear)
    before = outputs(model)
    model.resize_token_embeddings(80)
    assert close(outputs(model)[..., :67], before, 1e-4)
    assert outputs(model).shape[-1] == 80


def test_plans_say_which_tables_stay_and_why() -> None:
    options = SurgeryOptions(target=RankSpec(ParameterShare(0.5)), embeddings=True)
    rows = {row.name: row for row in plan_rows(bert(), options)}
    assert isinstance(rows["bert.embeddings.word_embeddings"], Replacement)
    kept = {name: row.reason for name, row in rows.items() if isinstance(row, Kept)}
    assert kept["bert.embeddings.position_embeddings"] == "embedding of positions or types"
    assert kept["bert.embeddings.token_type_embeddings"] == "embedding of positions or types"
    assert kept["cls.predictions.decoder"] == "tied to bert.embeddings.word_embeddings"
    plain = {row.name: row.reason for row in plan_rows(bert(), SurgeryOptions(target=options.target))}
    assert plain["bert.embeddings.word_embeddings"] == "embedding"


def test_flops_are_those_of_the_head_and_a_product_with_v() -> None:
    (row,) = (
        row
        for row in plan_rows(llama(), SurgeryOptions(target=RankSpec(ParameterShare(0.5)), embeddings=True))
        if row.name == "model.embed_tokens" and isinstance(row, Replacement)
    )
    assert row.flops == 2 * 67 * 24
    assert row.factorised_flops == 2 * (row.rank or 0) * (67 + 24 + 24)


def test_a_head_of_another_shape_cannot_be_tied() -> None:
    model = llama()
    specs = {"model.embed_tokens": Spec("embedding", 4), "lm_head": Spec("linear", 5, tied_to="model.embed_tokens")}
    with pytest.raises(PlanError, match=r"^lm_head: its shape, rank or form is not that of model\.embed_tokens"):
        swap_(model, specs)


def test_decay_of_tied_factors_is_that_of_one_product() -> None:
    torch.manual_seed(0)
    model = llama()
    lrsurgery.factorise_(model, rank="0.5", embeddings=True, include=["model.embed_tokens"])
    table = model.model.embed_tokens
    u, v = (factor.weight.detach().clone().requires_grad_() for factor in (table.u, table.v))
    (0.5 * 0.1 * (u @ v).square().sum()).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    FrobeniusDecay(model, 0.1).attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(table.u.weight, u.detach() - u.grad, atol=1e-6)
    assert torch.allclose(table.v.weight, v.detach() - v.grad, atol=1e-6)


def test_moments_are_those_of_both_uses() -> None:
    """Against autograd and sums written out, position by position."""
    torch.manual_seed(0)
    model = llama().eval()
    tokens = torch.randint(0, 67, (3, 8))
    found = lrsurgery.collect_statistics(model, [{"input_ids": tokens}], seed=3)
    caught: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            caught[name], caught[f"{name} in"] = output, inputs[0]

        return hook

    model.model.embed_tokens.register_forward_hook(keep("table"))
    model.lm_head.register_forward_hook(keep("head"))
    loss, count = SampledLoss(3, 2.0)(model(input_ids=tokens, use_cache=False), {"input_ids": tokens})
    loss.backward()  # type: ignore[no-untyped-call]
    table, head = found.moments("model.embed_tokens"), found.moments("lm_head")
    g = caught["table"].grad.flatten(0, 1)  # type: ignore[union-attr]
    h, of_logits = caught["head in"].flatten(0, 1), caught["head"].grad.flatten(0, 1)  # type: ignore[union-attr]
    assert torch.allclose(table.inputs, sum(torch.outer(x, x) for x in g) / len(g), rtol=1e-3, atol=1e-8)
    assert table.gradients is not None
    assert head.gradients is not None
    assert torch.equal(table.gradients * count, torch.bincount(tokens.flatten(), minlength=67).float())
    assert torch.allclose(head.inputs, sum(torch.outer(x, x) for x in h) / len(h), rtol=1e-3, atol=1e-6)
    assert torch.allclose(head.gradients, of_logits.square().sum(0) / count, rtol=1e-3, atol=1e-8)


def test_a_diagonal_metric_is_the_whole_one_with_that_diagonal() -> None:
    torch.manual_seed(0)
    weight, c, g = torch.randn(20, 8), torch.randn(8, 30), torch.rand(20).double() + 0.1
    c = (c @ c.T).double()
    one, other = Metric(c, g), Metric(c, g.diag())
    assert torch.allclose(weighted_values(weight, one), weighted_values(weight, other))
    found, wanted = (weighted_factors(weight, 3, metric).factors for metric in (one, other))
    assert torch.allclose(found.u @ found.v, wanted.u @ wanted.v, atol=1e-5)
    rest = weight - found.u @ found.v
    assert weighted_norm(rest, one) == pytest.approx(weighted_norm(rest, other))
    tail = weighted_values(weight, one)[3:].square().sum().sqrt()  # Eckart & Young
    assert weighted_norm(rest, one) == pytest.approx(float(tail), rel=1e-5)


def test_a_metric_of_two_uses_keeps_the_traces_of_their_sum() -> None:
    torch.manual_seed(0)
    inputs = [(x @ x.T).double() for x in torch.randn(2, 5, 9)]
    gradients = [torch.rand(7).double() for _ in range(2)]
    both = combine([Metric(c, g) for c, g in zip(inputs, gradients, strict=True)])
    whole = sum(torch.kron(g.diag(), c) for c, g in zip(inputs, gradients, strict=True))
    assert isinstance(whole, Tensor)
    blocks = whole.reshape(7, 5, 7, 5)
    assert both.inputs is not None
    assert both.gradients is not None
    assert torch.allclose(both.gradients.sum() * both.inputs, blocks.diagonal(dim1=0, dim2=2).sum(-1))
    assert torch.allclose(both.inputs.trace() * both.gradients, blocks.diagonal(dim1=1, dim2=3).sum(-1).diagonal())
