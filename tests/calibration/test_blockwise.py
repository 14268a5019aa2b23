"""Batches in lockstep: what comes out, what each block sees, what is in memory, and what is left when it fails."""

from __future__ import annotations

import _thread
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as tf
from torch import Tensor, nn

from lrsurgery.calibration.blocks import find_blocks
from lrsurgery.calibration.blockwise import visit_blocks as visits
from lrsurgery.calibration.offload import hold_in_memory, load_offloaded
from lrsurgery.surgery.apply import replace_module_

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 96,
}
variable = ContextVar("variable", default="none")
LENGTHS = (5, 9, 9, 2)


class Quiet:
    """A visitor that does nothing but to write down its visits."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def arrive(self, name: str, replay: Callable[[], None]) -> None:
        self.events.append(("arrive", name))

    def leave(self, name: str) -> None:
        self.events.append(("leave", name))


def run_in_lockstep(
    model: nn.Module, blocks: Sequence[str], calls: Sequence[Callable[[], Any]], visitor: Quiet
) -> None:
    for visit in visits(model, blocks, calls):
        visitor.arrive(visit.name, visit.replay)
        visit.run()
        visitor.leave(visit.name)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch-")]


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_key_value_heads=2, **options)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    ).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    return tf.BertForMaskedLM(tf.BertConfig(**SMALL, max_position_embeddings=16)).eval()


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3).eval()


def sequential() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).eval()


def batches(model: nn.Module) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, tf.PreTrainedModel):
        options = {} if isinstance(model, tf.BertForMaskedLM) else {"use_cache": False}
        return [{"input_ids": torch.randint(0, 96, (2, n), generator=generator), **options} for n in LENGTHS]
    shape = (4,) if isinstance(model, nn.Sequential) else (3, 32, 32)
    return [{"input": torch.randn(n, *shape, generator=generator)} for n in LENGTHS]


def forward(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    output = model(batch["input"]) if "input" in batch else model(**batch)
    return output if isinstance(output, Tensor) else output.logits


@torch.no_grad()
def plain(model: nn.Module, inputs: list[Any]) -> list[Tensor]:
    return [forward(model, batch) for batch in inputs]


def lockstep(model: nn.Module, inputs: list[Any], visitor: Any, blocks: list[str] | None = None) -> list[Tensor]:
    found: dict[int, Tensor] = {}

    def call(i: int) -> Callable[[], None]:
        return lambda: found.__setitem__(i, forward(model, inputs[i]))

    run_in_lockstep(
        model, find_blocks(model) if blocks is None else blocks, [call(i) for i in range(len(inputs))], visitor
    )
    assert not any({"_call_impl", "forward"} & module.__dict__.keys() for module in model.modules()) or hooked(model)
    return [found[i] for i in range(len(inputs))]


def hooked(model: nn.Module) -> bool:
    """Whether accelerate put its own forward in; the rest must be as it was."""
    modules = list(model.modules())
    return any(hasattr(m, "_hf_hook") for m in modules) and not any("_call_impl" in m.__dict__ for m in modules)


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_blocks_are_found() -> None:
    assert find_blocks(llama()) == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert find_blocks(gpt2()) == ["transformer.h.0", "transformer.h.1", "transformer.h.2"]
    assert find_blocks(bert()) == ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.encoder.layer.2"]
    assert find_blocks(resnet()) == ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    assert find_blocks(sequential()) == ["0", "2", "4"]
    assert find_blocks(nn.Linear(2, 2)) == []


@pytest.mark.parametrize(
    ("name", "first", "count"),
    [
        ("resnet18", "layer1.0", 8),
        ("vit_tiny_patch16_224", "blocks.0", 12),
        ("convnext_atto", "stages.0.blocks.0", 12),
        ("efficientnet_b0", "blocks.0.0", 16),
        ("vgg11", None, 0),
    ],
)
def test_blocks_of_timm_models_are_found(name: str, first: str | None, count: int) -> None:
    with torch.device("meta"):
        found = find_blocks(timm.create_model(name))
    assert (found[0] if found else None, len(found)) == (first, count)


def test_experts_are_no_blocks() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 3)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 4)) for _ in range(3))

    model = nn.Module()
    model.layers = nn.ModuleList(Layer() for _ in range(2))
    assert find_blocks(model) == ["layers.0", "layers.1"]


@pytest.mark.parametrize("build", [gpt2, llama, bert, resnet, sequential])
def test_outputs_are_those_of_the_plain_forward(build: Callable[[], nn.Module]) -> None:
    model = build()
    inputs = batches(model)
    visitor = Quiet()
    assert same(lockstep(model, inputs, visitor), plain(model, inputs))
    assert visitor.events == [(what, name) for name in find_blocks(model) for what in ("arrive", "leave")]


def test_without_blocks_the_calls_run_one_after_another() -> None:
    model, visitor = llama(), Quiet()
    inputs = batches(model)
    order: list[tuple[int, str]] = []
    variable.set("the caller's")
    run_in_lockstep(model, [], [lambda i=i: order.append((i, variable.get())) for i in range(3)], visitor)
    assert order == [(i, "the caller's") for i in range(3)]
    assert same(lockstep(model, inputs, visitor, []), plain(model, inputs))
    assert not visitor.events


class Watch(Quiet):
    """Writes down each block's first input, in the run and in the replay."""

    def __init__(self, model: nn.Module, *, replays: bool) -> None:
        super().__init__()
        self.model, self.replays, self.phase = model, replays, ""
        self.seen: dict[tuple[str, str], list[Tensor]] = {}

    def arrive(self, name: str, replay: Callable[[], None]) -> None:
        super().arrive(name, replay)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert not torch.is_grad_enabled()
            self.seen.setdefault((name, self.phase), []).append(args[0].clone())

        # set while every batch waits at the block itself
        self.handle = self.model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
        self.phase = "replay"
        if self.replays:
            replay()
        self.phase = "run"

    def leave(self, name: str) -> None:
        super().leave(name)
        self.handle.remove()


@pytest.mark.parametrize("build", [llama, resnet, sequential])
def test_a_replay_sees_what_the_run_sees_in_batch_order(build: Callable[[], nn.Module]) -> None:
    model = build()
    inputs = batches(model)
    watch = Watch(model, replays=True)
    outputs = lockstep(model, inputs, watch)
    wanted: dict[str, list[Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: wanted.setdefault(name, []).append(args[0].clone())
        )
        for name in find_blocks(model)
    ]
    assert same(outputs, plain(model, inputs))
    for handle in handles:
        handle.remove()
    assert len(wanted) == len(find_blocks(model))
    for name, tensors in wanted.items():
        assert same(watch.seen[name, "replay"], tensors)
        assert same(watch.seen[name, "run"], tensors)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, extra: dict[str, list[Tensor]]) -> Tensor:
        extra["list"][0].add_(1)
        return self.b(self.a(x.relu_())) + extra["list"][0]


class InPlaceModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(InPlace() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x, extra = x.clone(), {"list": [torch.zeros(4)]}
        for block in self.blocks:
            x = block(x, extra=extra)
        return x


def test_a_replay_of_a_block_that_changes_its_input_changes_nothing() -> None:
    torch.manual_seed(0)
    model = InPlaceModel().eval()
    inputs = [{"input": torch.randn(3, 4)} for _ in range(2)]
    assert same(lockstep(model, inputs, Watch(model, replays=True)), plain(model, inputs))


class Halve(Quiet):
    """Puts layers with half the weights in place of one in each block."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def arrive(self, name: str, replay: Callable[[], None]) -> None:
        super().arrive(name, replay)
        replay()
        halve_(self.model, f"{name}.{self.layer}".removesuffix("."))
        replay()


def halve_(model: nn.Module, name: str) -> None:
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    new = nn.Linear(old.in_features, old.out_features, bias=False)
    new.weight = nn.Parameter(old.weight.detach() / 2)
    replace_module_(model, old, new)


@pytest.mark.parametrize(("build", "layer"), [(llama, "mlp.up_proj"), (sequential, "")], ids=["in_a_block", "a_block"])
def test_what_is_replaced_on_arrival_is_what_runs(build: Callable[[], nn.Module], layer: str) -> None:
    model, replaced = build(), build()
    inputs = batches(model)
    for name in find_blocks(replaced):
        halve_(replaced, f"{name}.{layer}".removesuffix("."))
    wanted = plain(replaced, inputs)
    assert not same(plain(model, inputs), wanted)
    assert same(lockstep(model, inputs, Halve(model, layer)), wanted)


class Loops(nn.Module):
    """Passes its first block as often as a batch has rows, and skips its second for odd ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(len(x)):
            x = self.layers[0](x)
        if len(x) % 2 == 0:
            x = self.layers[1](x)
        return x if len(x) > 2 else self.layers[2](x)


def test_batches_may_repeat_and_skip_blocks() -> None:
    torch.manual_seed(0)
    model, visitor = Loops().eval(), Quiet()
    inputs = [{"input": torch.randn(n, 4)} for n in (1, 2, 3)]
    assert same(lockstep(model, inputs, visitor), plain(model, inputs))
    visits = [name for what, name in visitor.events if what == "arrive"]
    assert visits == ["layers.0", "layers.0", "layers.0", "layers.1", "layers.2"]


def test_a_shared_block_is_visited_at_each_call() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model = nn.Sequential(block, block, nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))).eval()
    inputs = batches(model)
    visitor = Quiet()
    assert find_blocks(model) == ["0", "2"]
    assert same(lockstep(model, inputs, visitor, ["0", "1", "2"]), plain(model, inputs))
    assert [name for what, name in visitor.events if what == "arrive"] == ["0", "0", "2"]


def test_a_shared_block_that_was_replaced_is_visited_again() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(4, 4)).eval()
    visitor = Halve(model, "")
    lockstep(model, batches(model), visitor)
    assert [name for what, name in visitor.events if what == "arrive"] == ["0", "0", "4"]


def test_a_shared_layer_of_albert_is_visited_at_each_call() -> None:
    config = tf.AlbertConfig(**SMALL, embedding_size=16, num_hidden_groups=1)
    model = tf.AlbertForMaskedLM(config).eval()
    visitor, inputs = Quiet(), [{"input_ids": torch.arange(n)[None]} for n in LENGTHS]
    assert same(lockstep(model, inputs, visitor), plain(model, inputs))
    assert len(visitor.events) == 2 * SMALL["num_hidden_layers"]


@pytest.mark.parametrize("where", ["first", "call", "replay", "arrive", "leave"])
def test_an_exception_ends_every_batch(where: str) -> None:
    model = llama()
    inputs = batches(model)
    ended: list[int] = []
    raised = 0

    class Fails(Quiet):
        def arrive(self, name: str, replay: Callable[[], None]) -> None:
            super().arrive(name, replay)
            if name == "model.layers.1" and where in {"call", "replay"}:
                model.model.layers[1].mlp.register_forward_hook(broken)
            if where == "replay":
                replay()
            if where == "arrive" and name == "model.layers.1":
                raise ValueError("here")

        def leave(self, name: str) -> None:
            super().leave(name)
            if where == "leave":
                raise ValueError("here")

    def broken(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal raised
        if args[0].shape[1] == LENGTHS[1]:
            raised += 1
            raise ValueError("here")

    def call(i: int) -> None:
        try:
            if where == "first" and i == 1:
                raise ValueError("here")
            forward(model, inputs[i])
        finally:
            ended.append(i)

    visitor = Fails()
    with pytest.raises(ValueError, match="here"):
        run_in_lockstep(model, find_blocks(model), [lambda i=i: call(i) for i in range(4)], visitor)
    assert raised == (1 if where in {"call", "replay"} else 0)
    assert sorted(ended) == ([0, 1] if where == "first" else [0, 1, 2, 3])
    assert not any("_call_impl" in module.__dict__ for module in model.modules())
    if where != "first":
        assert visitor.events[0] == ("arrive", "model.layers.0")
    model.model.layers[1].mlp._forward_hooks.clear()
    assert same(lockstep(model, inputs, Quiet()), plain(model, inputs))


def test_an_interrupt_ends_every_batch() -> None:
    model = llama()
    inputs = batches(model)
    run = 0

    def interrupt(*_: Any) -> None:
        nonlocal run
        run += 1
        if run == 2:
            _thread.interrupt_main()

    model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_in_lockstep(model, find_blocks(model), [lambda b=b: forward(model, b) for b in inputs], Quiet())
    assert run <= 3
    assert not any("_call_impl" in module.__dict__ for module in model.modules())


def test_what_a_block_calls_is_part_of_it() -> None:
    model, visitor = llama(), Quiet()
    inputs = batches(model)
    blocks = ["model.layers.0", "model.layers.0.mlp", "model.layers.2.mlp"]
    assert same(lockstep(model, inputs, visitor, blocks), plain(model, inputs))
    assert [name for what, name in visitor.events if what == "arrive"] == [blocks[0], blocks[2]]


def test_a_replay_after_arrival_is_refused() -> None:
    class Late(Quiet):
        def arrive(self, name: str, replay: Callable[[], None]) -> None:
            self.replay = replay

        def leave(self, name: str) -> None:
            self.replay()

    model = sequential()
    with pytest.raises(AssertionError, match="its batches are past it"):
        lockstep(model, batches(model), Late())


def test_inputs_of_a_block_are_freed_as_the_batches_pass_it() -> None:
    model = llama()
    inputs, living = batches(model), []
    inside: list[weakref.ref[Tensor]] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        living.append(sum(ref() is not None for ref in inside))
        inside.append(weakref.ref(args[0]))

    model.model.layers[1].register_forward_pre_hook(hook)
    gc.disable()  # by reference counts alone
    try:
        run_in_lockstep(model, find_blocks(model), [lambda b=b: forward(model, b) for b in inputs], Quiet())
    finally:
        gc.enable()
    assert living == [0, 0, 0, 0]
    assert all(ref() is None for ref in inside)


def in_cpu_memory(model: nn.Module) -> list[str]:
    return [n for n in find_blocks(model) if any(not p.is_meta for p in model.get_submodule(n).parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["same_dtype", "another_dtype"])
def test_one_block_from_disk_is_in_memory_at_a_time(tmp_path: Path, dtype: torch.dtype) -> None:
    llama(tie_word_embeddings=True).to(dtype).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    dense = tf.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.device("meta"):
        skeleton = tf.LlamaForCausalLM(dense.config)

    def load(**options: Any) -> nn.Module:
        return tf.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, **options).eval()

    model = load_offloaded(load, skeleton, find_blocks(skeleton), tmp_path / "offload")
    assert in_cpu_memory(model) == []
    assert not any(p.is_meta for name, p in model.named_parameters() if ".layers." not in name)
    assert not list((tmp_path / "offload").glob("*"))  # read where they lie

    class Counts(Watch):
        def arrive(self, name: str, replay: Callable[[], None]) -> None:
            assert in_cpu_memory(model) == [name]
            weights.append(model.get_submodule(name).mlp.up_proj.weight)
            super().arrive(name, replay)
            assert in_cpu_memory(model) == [name]

        def leave(self, name: str) -> None:
            super().leave(name)
            assert in_cpu_memory(model) == [name]
            assert model.get_submodule(name).mlp.up_proj.weight is weights[-1]  # loaded once

    counted: list[list[str]] = []
    weights: list[Tensor] = []
    handles = [
        model.get_submodule(name).mlp.register_forward_pre_hook(lambda *_: counted.append(in_cpu_memory(model)))
        for name in find_blocks(model)
    ]
    inputs = batches(model)
    wanted = plain(dense, inputs)
    assert same(lockstep(model, inputs, Counts(model, replays=True)), wanted)
    assert counted == [[name] for name in find_blocks(model) for _ in range(2 * len(inputs))]
    for handle in handles:
        handle.remove()
    assert in_cpu_memory(model) == []
    assert same(plain(model, inputs), wanted)  # accelerate's own way still works

    for name in find_blocks(dense):
        halve_(dense, f"{name}.mlp.up_proj")
    assert same(lockstep(model, inputs, Halve(model, "mlp.up_proj")), plain(dense, inputs))


def test_a_block_goes_back_to_disk_when_its_use_fails(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    with torch.device("meta"):
        skeleton = tf.LlamaForCausalLM(tf.LlamaConfig.from_pretrained(tmp_path / "model"))
    blocks = find_blocks(skeleton)[:2]

    def load(**options: Any) -> nn.Module:
        return tf.LlamaForCausalLM.from_pretrained(tmp_path / "model", **options)

    model = load_offloaded(load, skeleton, blocks, tmp_path / "offload")
    assert in_cpu_memory(model) == ["model.layers.2"]

    def fail() -> None:
        with hold_in_memory(model.get_submodule(blocks[0])):
            assert in_cpu_memory(model) == [blocks[0], "model.layers.2"]
            raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        fail()
    assert in_cpu_memory(model) == ["model.layers.2"]
    with hold_in_memory(model.get_submodule("model.layers.2")):
        assert in_cpu_memory(model) == ["model.layers.2"]
    assert in_cpu_memory(model) == ["model.layers.2"]


def test_a_block_with_several_hooks_is_held_in_memory() -> None:
    from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, attach_align_device_hook

    model = sequential()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(3, 4)
    wanted = model(x)
    add_hook_to_module(model[0], ModelHook())
    attach_align_device_hook(model, execution_device="cpu", offload=True, weights_map=weights)
    assert isinstance(model[0]._hf_hook, SequentialHook)
    with hold_in_memory(model):
        assert torch.equal(model(x), wanted)
        assert in_cpu_memory(model) == ["0", "2", "4"]
    assert in_cpu_memory(model) == []
