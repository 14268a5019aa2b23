"""Reading and writing files: our writer against the safetensors library's reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lrsurgery.checkpoints.output import ShardWriter, in_write_order
from lrsurgery.checkpoints.tensors import open_tensors
from lrsurgery.errors import OutputError
from lrsurgery.units import parse_size

DTYPES = [torch.float64, torch.int64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.bool]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=12),
    st.integers(1, 400),
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, described: list[tuple[torch.dtype, list[int]]], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"layer.{i}.weight": torch.randint(0, 2, shape).to(dtype) for i, (dtype, shape) in enumerate(described)}
    writer = ShardWriter(folder, shard_size=limit)
    for name in in_write_order([(tensor.dtype, name) for name, tensor in tensors.items()]):
        writer.add(name, tensors[name])
    total = writer.finish()
    assert total == sum(t.numel() * t.element_size() for t in tensors.values())
    files = sorted(folder.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert {p.name for p in files} == set(index["weight_map"].values())
        assert index["weight_map"].keys() == tensors.keys()
    source = open_tensors(files)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from([torch.bfloat16, torch.int8]), st.integers(0, 9)), min_size=1, max_size=12),
    st.sampled_from([100, 10**9]),
    st.sampled_from([0, 400, 40_000]),
    st.integers(1, 20_000),
)
def test_wide_tensors_that_come_late_stand_in_front(
    tmp_path_factory: pytest.TempPathFactory, described: list[tuple[torch.dtype, int]], limit: int, room: int, long: int
) -> None:
    """Whatever was reserved for them; and each where numpy and torch find it aligned."""
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, shard_size=limit, in_front=room)
    tensors = {f"{i}.u": torch.ones(size, dtype=dtype) * i for i, (dtype, size) in enumerate(described)}
    orders = {f"{i}.order": torch.randperm(1 + long * i).to(torch.int32) for i in range(len(described))}
    for name in in_write_order([(tensor.dtype, name) for name, tensor in tensors.items()]):
        writer.add(name, tensors[name])
        writer.add_in_front(name.replace("u", "order"), orders[name.replace("u", "order")])
    assert writer.finish() == sum(t.numel() * t.element_size() for t in (tensors | orders).values())
    files = sorted(folder.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == (tensors | orders).keys()
    for name, tensor in (tensors | orders).items():
        assert torch.equal(found[name], tensor), name
    for file in files:
        length = int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8 : 8 + length])
        for name, entry in header.items():
            if name != "__metadata__":
                assert (8 + length + entry["data_offsets"][0]) % (tensors | orders)[name].element_size() == 0, name


def test_header_grows_with_the_number_of_names(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, shard_size=10**9)
    names = [f"a.rather.long.name.of.a.layer.deep.inside.a.model.{i}.weight" for i in range(2000)]
    for i, name in enumerate(names):
        writer.add(name, torch.full((3,), float(i)))
    writer.finish()
    found = load_file(tmp_path / "model.safetensors")
    assert all(found[name][0] == i for i, name in enumerate(names))


def test_shard_is_as_large_as_allowed_and_no_larger(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, shard_size=100)
    for i in range(10):
        writer.add(str(i), torch.zeros(10))
    writer.finish()
    assert [len(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))] == [2] * 5


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("7", 7)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "abc", "0", "-1GB", "5XB", "infGB"])
def test_unreadable_sizes_are_refused(text: str) -> None:
    with pytest.raises(OutputError, match="not readable"):
        parse_size(text)
