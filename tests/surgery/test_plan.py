"""Plans: what is chosen, what stays dense and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import zoo
from torch import nn

import lrsurgery
from lrsurgery.checkpoints.mapping import tied_weights
from lrsurgery.errors import PlanError, RankError
from lrsurgery.surgery.plan import Plan, SurgeryOptions, find_heads, make_plan
from lrsurgery.surgery.ranks import parse_rank
from lrsurgery.surgery.rows import Kept, Replacement


def plan(model: nn.Module, rank: Any = 0.5, **given: Any) -> Plan:
    options = SurgeryOptions(target=parse_rank(rank), **given)
    return make_plan(model, options, heads=find_heads(model), tied=tied_weights(model))


def reasons(found: Plan) -> dict[str, str]:
    return {row.name: row.reason for row in found.rows if isinstance(row, Kept)}


class Mixed(nn.Module):
    """One of everything that must not be factorised."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.wide = nn.Linear(16, 64)
        self.attention = nn.MultiheadAttention(16, 2)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.conv1d = nn.Conv1d(16, 16, 3)
        self.tiny = nn.Linear(1, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 64))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 64))
        self.table = nn.Parameter(torch.zeros(4, 5))
        self.fc = nn.Linear(16, 10)


def test_what_stays_dense_says_why() -> None:
    found = plan(Mixed())
    assert [row.name for row in found.replacements] == ["wide", "attention.in_proj_weight", "conv1d", "normed"]
    assert reasons(found) == {
        "table": "a bare parameter, not a layer",
        "embed": "embedding",
        "attention.out_proj": "output of nn.MultiheadAttention, which reads its weight and never calls it",
        "grouped": "grouped convolution with 4 outputs a group (16 needed)",
        "depthwise": "depthwise convolution",
        "tiny": "no rank saves parameters",
        "spectral.parametrizations.weight.original": "part of a weight that is parametrised in another way than weight"
        " norm",
        "fc": "output head",
    }


def test_every_matrix_of_a_model_is_in_its_plan() -> None:
    """Nothing is skipped silently: the rows account for every parameter of two axes or more."""
    for name in zoo.TRANSFORMERS:
        model = zoo.build_transformers(name)
        rows = {row.name for row in plan(model).rows}
        seen: set[int] = set()
        for key, parameter in model.named_parameters():
            if parameter.ndim >= 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                layer = key.removesuffix(".weight").partition(".parametrizations.")[0]
                assert key in rows or layer in rows, (name, key)


def test_counts_match_the_model_after_surgery() -> None:
    model = zoo.build_timm("resnet18")
    found = plan(model, "params:0.4", conv="channel")
    before = sum(p.numel() for p in model.parameters())
    saved = sum(row.parameters - (row.factorised_parameters or 0) for row in found.replacements)
    lrsurgery.factorise_(model, rank="params:0.4", conv="channel")
    assert sum(p.numel() for p in model.parameters()) == before - saved


def test_fused_experts_are_layers() -> None:
    rows = {row.name: row for row in plan(zoo.build_transformers("mixtral")).replacements}
    assert rows["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 192, 48)


def test_tied_head_and_embedding_stay_dense() -> None:
    found = reasons(plan(zoo.build_transformers("gpt2")))
    assert found["lm_head"] == "tied to transformer.wte"
    assert found["transformer.wte"] == "embedding"


class Same(nn.Linear):
    """Another order of operations, and a setting of its own."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, **options: Any) -> None:
        super().__init__(inputs, outputs, bias, **options)
        self.note = "same"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x.unsqueeze(-2) * self.weight).sum(-1)
        return y if self.bias is None else y + self.bias


class SameConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def test_subclasses_that_compute_the_same_are_factorised() -> None:
    from timm.layers import Linear
    from transformers.models.falcon.modeling_falcon import FalconLinear

    torch.manual_seed(0)
    model = nn.Sequential(
        SameConv(3, 16, 3, stride=2, padding_mode="circular", padding=1),
        nn.Flatten(),
        *(Linear(64, 64), FalconLinear(64, 16), Same(16, 64), Same(64, 16, bias=False)),
    ).eval()
    x = torch.randn(3, 3, 4, 4)
    wanted = model(x)
    assert not reasons(plan(model, 1.0, allow_larger=True))
    with torch.device("meta"):
        assert not reasons(plan(nn.Sequential(Same(16, 65), SameConv(3, 17, 3)), 1.0, allow_larger=True))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert not reasons(plan(nn.Sequential(Same(16, 66), SameConv(3, 18, 3)), 1.0, allow_larger=True))
    finally:
        torch.set_default_dtype(torch.float32)
    lrsurgery.factorise_(model, rank=1.0, allow_larger=True)
    assert (model(x) - wanted).abs().max() <= 1e-5


class Changed(Same):
    """Computes something else where one of its settings says so."""

    def __init__(self, how: str, square: int = 16) -> None:
        super().__init__(square, square)
        self.how = how
        if how == "parameter":
            self.scale = nn.Parameter(torch.ones(square))
        elif how == "buffer":
            self.register_buffer("mask", torch.ones(square))
        elif how == "child":
            self.act = nn.Identity()

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) * scale


class Differs(Same):
    def __init__(self, how: str, square: int = 16) -> None:
        super().__init__(square, square)
        self.how = how
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if self.how == "raises":
            raise RuntimeError
        return {
            "transposed": lambda: x @ self.weight + self.bias,
            "only in training": lambda: y * 2 if self.training else y,
            "only in eval": lambda: y if self.training else y * 2,
            "clamped": lambda: y.clamp(max=100),
            "tuple": lambda: (y, y),
            "flattened": lambda: y.reshape(-1, y.shape[-1]),
            "slightly": lambda: y * 1.0001,
            "without bias": lambda: y - self.bias,
            "the last output": lambda: torch.cat([y[..., :-1], y[..., -1:] * 2], -1),
            "after a call": lambda: y if self.seen.append(1) or len(self.seen) > 2 else y * 2,  # type: ignore[func-returns-value]
        }[self.how]()


DIFFERENT = ("raises", "transposed", "only in training", "only in eval", "clamped", "tuple", "flattened", "slightly")
DIFFERENT += ("without bias", "the last output", "after a call")


@pytest.mark.parametrize("how", DIFFERENT)
def test_subclasses_that_compute_something_else_stay_dense(how: str) -> None:
    # one that computes the same, with other settings, is no proof of it
    model = nn.Sequential(Same(16, 16), Differs(how))
    assert reasons(plan(model, 3)) == {"1": "subclass Differs of Linear that computes something else"}
    assert model[1].seen == []  # the model itself is not run


@pytest.mark.parametrize("how", ["parameter", "buffer", "child", "argument"])
def test_subclasses_that_hold_or_take_more_stay_dense(how: str) -> None:
    found = plan(nn.Sequential(Same(16, 16), Changed(how)), 3)
    wanted = {"1": "subclass Changed of Linear that computes something else"}
    assert reasons(found) == ({"1.weight": "a bare parameter, not a layer"} if how == "child" else wanted)


@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 3, "stride": 2}, {"kernel_size": 2, "stride": 2}, {"kernel_size": 16, "stride": 16}],
    ids=["3 by 2", "2 by 2", "patches"],
)
def test_padding_by_the_size_of_the_input_shows(options: dict[str, int]) -> None:
    """timm's Conv2dSame is nn.Conv2d on images that are a multiple of its stride."""
    from timm.layers import Conv2dSame

    found = plan(nn.Sequential(Conv2dSame(8, 16, **options), Conv2dSame(8, 16, 1, stride=2)), 3, conv="channel")
    assert reasons(found) == {"0": "subclass Conv2dSame of Conv2d that computes something else"}


def test_a_subclass_is_tried_once_for_each_of_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []
    monkeypatch.setattr(
        Same, "forward", lambda self, x: (calls.append(x.shape), F.linear(x, self.weight, self.bias))[1]
    )
    model = nn.Sequential(*(Same(24, 24) for _ in range(50)))
    assert len(plan(model, 3).replacements) == 50
    once = len(calls)
    assert 0 < once < 20
    plan(nn.Sequential(*(Same(24, 24) for _ in range(50))), 3)
    assert len(calls) == once
    model[0].note = "another"
    plan(model, 3)
    assert len(calls) == 2 * once


def test_trying_a_subclass_moves_no_random_numbers() -> None:
    class Draws(Same):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 0 * torch.rand(1)

    model = nn.Sequential(Draws(20, 20), Draws(20, 30))
    before = torch.get_rng_state()
    assert len(plan(model, 3).replacements) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_head_of_a_known_subclass_is_an_output_head() -> None:
    found = reasons(plan(zoo.build_timm("mobilenetv3_small_100")))
    assert found["classifier"] == "output head"


def test_parameters_shared_in_memory_are_tied() -> None:
    model = nn.Sequential(nn.Linear(16, 64, bias=False), nn.Linear(16, 64, bias=False), nn.Linear(64, 16))
    model[1].weight = model[0].weight
    assert reasons(plan(model)) == {"0": "tied to 1", "1": "tied to 0"}


def test_head_is_factorised_only_where_its_name_is_spelled_out() -> None:
    model = zoo.build_transformers("bert")
    model.config.tie_word_embeddings = False
    classifier = zoo.build_transformers("distilbert")
    assert reasons(plan(classifier, ["0.5", "*=0.25"]))["pre_classifier"] == "output head"
    named = plan(classifier, ["0.5", "pre_classifier=0.25"])
    assert [row.rank for row in named.replacements if row.name == "pre_classifier"] == [12]


CLASSES = 1000
TORCHVISION = ("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5")
TORCHVISION += ("mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "vgg11", "vit_b_16")


@pytest.mark.parametrize("name", TORCHVISION)
def test_heads_of_torchvision_are_the_layers_that_give_the_classes(name: str) -> None:
    import torchvision

    with torch.device("meta"):
        quick = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **quick)
    assert model.training
    layers = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    wanted = {n for n, weight in layers.items() if len(weight) == CLASSES and not n.lower().startswith("aux")}
    assert set(find_heads(model)) == wanted
    assert model.training


class Net(nn.Module):
    """A network whose parts have no name that says what they are."""

    def __init__(self, end: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.end, self.quiet = end, nn.Dropout()

    def forward(self, x: torch.Tensor) -> Any:
        return self.end(self, self.one(x).relu())


@pytest.mark.parametrize(
    ("end", "wanted"),
    [
        (lambda net, h: net.three(net.two(h)), {"three"}),
        (lambda net, h: net.quiet(net.two(net.three(h))).softmax(-1), {"two"}),
        (lambda net, h: {"a": net.two(h), "b": (net.three(h).mean(), h)}, {"two", "three"}),
        (lambda net, h: net.three(net.two(h)).reshape(h.shape[0], 2, 4), {"three"}),
        (lambda net, h: h + net.three(net.two(h)), set()),  # a block with its residual
        (lambda net, h: net.three(h) if h.sum() > 0 else net.two(h), set()),  # goes by its input
    ],
    ids=["last", "activation", "several", "sizes", "residual", "untraceable"],
)
def test_heads_are_known_by_their_use(end: Callable[[Any, torch.Tensor], Any], wanted: set[str]) -> None:
    assert set(find_heads(Net(end))) == wanted


def test_what_has_nothing_but_a_head_has_none() -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)  # type: ignore[no-any-return]

    assert not find_heads(Only())
    assert not find_heads(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))  # a block, for all that it says


def test_break_even_keeps_a_layer_unless_larger_is_allowed() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 256))
    assert reasons(plan(model)) == {"0": "rank 32 is over break-even (31)"}
    assert len(plan(model, allow_larger=True).replacements) == 2


def test_globs_choose_layers() -> None:
    model = zoo.build_transformers("llama")
    found = plan(model, include=["*.mlp.*"], exclude=["*.1.*"])
    assert {row.name for row in found.replacements} == {
        f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")
    }
    assert reasons(found)["model.layers.1.mlp.up_proj"] == "excluded"
    assert reasons(found)["model.layers.0.self_attn.k_proj"] == "not included"


@pytest.mark.parametrize("options", [{"include": ["x*"]}, {"exclude": ["x*"]}, {"rank": ["0.5", "x*=3"]}], ids=str)
def test_glob_that_matches_nothing_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"'x\*' matches no layer"):
        plan(zoo.build_transformers("llama"), **options)


def test_plan_with_nothing_in_it_is_an_error() -> None:
    with pytest.raises(PlanError, match="nothing to factorise"):
        plan(nn.Sequential(nn.Linear(8, 8)), 0.9)


def test_unknown_conv_scheme_lists_the_known() -> None:
    with pytest.raises(PlanError, match="channel, spatial"):
        plan(nn.Sequential(nn.Linear(8, 64)), conv="depth")


def test_named_rank_above_full_rank_is_an_error() -> None:
    with pytest.raises(RankError, match="0: rank 900 exceeds 8"):
        plan(nn.Sequential(nn.Linear(8, 64)), "0=900")


def test_energy_policy_waits_for_values() -> None:
    found = plan(nn.Sequential(nn.Linear(8, 64)), "energy:0.5")
    assert found.needs_spectra
    (row,) = found.replacements
    decided = found.decide(row, torch.tensor([10.0] + [0.1] * 7))
    assert isinstance(decided, Replacement)
    assert decided.rank == 1
