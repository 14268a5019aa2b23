"""Lazy reading of sharded checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import TypedDict

from lrsurgery.errors import SourceError
from lrsurgery.files.digests import check_files

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
}
DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}


SLICE_BYTES = 1 << 26  # buffer size for copying tensors; a multiple of every item size


def in_slices(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the elements of a tensor in order, flat, `SLICE_BYTES` at a time."""
    return iter(tensor.contiguous().reshape(-1).split(SLICE_BYTES // tensor.element_size()))  # type: ignore[no-untyped-call]


class HeaderEntry(TypedDict):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


class TensorSource(Protocol):
    """Named tensors, read one at a time."""

    @property
    def wrappers(self) -> tuple[str, ...]:
        """What was taken off around the weights: entries of a training checkpoint, prefixes of keys."""
        ...

    @property
    def beside(self) -> tuple[str, ...]:
        """Keys outside of the wrappers, which are left out."""
        ...

    def keys(self) -> list[str]: ...

    def describe(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape, without reading the data."""
        ...

    def read(self, key: str) -> Tensor:
        """Read the tensor to the CPU. Raises SourceError that names it."""
        ...

    def slices(self, key: str) -> Iterator[Tensor]:
        """Yield the tensor's elements in order, flat, some at a time."""
        ...

    def part(self, key: str, index: int) -> Tensor:
        """Read `tensor[index]` alone, as `read` does."""
        ...


class SafetensorsSource:
    """One or several .safetensors files. Raises SourceError for a file whose header does not match its data.

    The safetensors library validates the files. Tensors are then read with plain reads, since the pages of a mapped
    file stay in the resident memory of the process until it is closed.
    """

    wrappers: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def __init__(self, files: list[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._where: dict[str, tuple[Path, int, HeaderEntry]] = {}  # key -> file, offset of its data, header entry
        for file in files:
            try:
                with safe_open(file, framework="pt"):
                    pass
                with file.open("rb") as opened:
                    size = int.from_bytes(opened.read(8), "little")
                    header = json.loads(opened.read(size))
            except FileNotFoundError as e:
                raise SourceError(f"{file}: the shard is missing") from e
            except (SafetensorError, OSError, ValueError) as e:
                raise SourceError(f"{file}: not a whole safetensors file ({e}); download it again") from e
            header.pop("__metadata__", None)
            # in the order of the data on disk
            for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                self._where[key] = (file, 8 + size, entry)

    def keys(self) -> list[str]:
        return list(self._where)

    def file_of(self, key: str) -> Path:
        return self._where[key][0]

    def describe(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        file, _, entry = self._where[key]
        if entry["dtype"] not in DTYPES:
            raise SourceError(f"{file}: {key} has dtype {entry['dtype']}, which is not supported")
        return DTYPES[entry["dtype"]], tuple(entry["shape"])

    def read(self, key: str) -> Tensor:
        dtype, shape = self.describe(key)
        return self._bytes(key, 0, self._size(key)).view(dtype).reshape(shape)

    def slices(self, key: str) -> Iterator[Tensor]:
        dtype, _ = self.describe(key)
        for begin in range(0, self._size(key), SLICE_BYTES):
            yield self._bytes(key, begin, min(begin + SLICE_BYTES, self._size(key))).view(dtype)

    def part(self, key: str, index: int) -> Tensor:
        dtype, shape = self.describe(key)
        size = self._size(key) // shape[0]
        return self._bytes(key, index * size, (index + 1) * size).view(dtype).reshape(shape[1:])

    def _size(self, key: str) -> int:
        begin, end = self._where[key][2]["data_offsets"]
        return int(end - begin)

    def _bytes(self, key: str, begin: int, end: int) -> Tensor:
        file, data, entry = self._where[key]
        buffer = torch.empty(end - begin, dtype=torch.uint8)
        try:
            with file.open("rb", buffering=0) as opened:  # one handle per read, since threads read concurrently
                opened.seek(data + entry["data_offsets"][0] + begin)
                view, done = memoryview(buffer.numpy()), 0  # type: ignore[arg-type]
                while done < len(view):
                    count = opened.readinto(view[done:])
                    if not count:
                        raise OSError("unexpected end of file")
                    done += count
        except OSError as e:
            raise SourceError(f"{file}: {key} cannot be read ({e})") from e
        return buffer


class DictSource:
    """Tensors in memory, or in a file mapped by `torch.load(mmap=True)`."""

    def __init__(
        self, tensors: Mapping[str, Tensor], wrappers: tuple[str, ...] = (), beside: tuple[str, ...] = ()
    ) -> None:
        self._tensors = tensors
        self.wrappers, self.beside = wrappers, beside

    def keys(self) -> list[str]:
        return list(self._tensors)

    def describe(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        tensor = self._tensors[key]
        if tensor.dtype not in SAFETENSORS_NAMES:
            raise SourceError(f"{key} has dtype {str(tensor.dtype).removeprefix('torch.')}, which is not supported")
        return tensor.dtype, tuple(tensor.shape)

    def read(self, key: str) -> Tensor:
        return self._tensors[key].detach()

    def slices(self, key: str) -> Iterator[Tensor]:
        yield from in_slices(self.read(key))

    def part(self, key: str, index: int) -> Tensor:
        return self.read(key)[index]


class RenamedSource:
    """Tensors of another source under other names."""

    def __init__(
        self, tensors: TensorSource, names: Mapping[str, str], wrappers: tuple[str, ...], beside: tuple[str, ...]
    ) -> None:
        """`names` maps each name to its key in `tensors`."""
        self._tensors, self._names = tensors, names
        self.wrappers, self.beside = wrappers, beside

    @property
    def prefixes(self) -> list[str] | None:
        """What was taken off in front of the keys; None where that alone does not make the names out of them."""
        in_front = all(key.endswith(name) for name, key in self._names.items())
        if self.beside or not in_front or isinstance(self._tensors, RenamedSource):
            return None
        return list(dict.fromkeys(key.removesuffix(name) for name, key in self._names.items() if key != name))

    def keys(self) -> list[str]:
        return list(self._names)

    def describe(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return self._tensors.describe(self._names[key])

    def read(self, key: str) -> Tensor:
        return self._tensors.read(self._names[key])

    def slices(self, key: str) -> Iterator[Tensor]:
        return self._tensors.slices(self._names[key])

    def part(self, key: str, index: int) -> Tensor:
        return self._tensors.part(self._names[key], index)


def check_weights(folder: Path | None, files: Iterable[Path]) -> None:
    """Raise SourceError that names a weight file which is not as the report of its folder says."""
    if folder is not None:
        names = [file.name for file in files]
        check_files(folder, [*names, *(file.name for file in folder.glob("*.index.json"))] if names else [])


def open_tensors(files: list[Path]) -> TensorSource:
    """Open the files of a checkpoint, which are all of one format. Raises SourceError."""
    if files and files[0].suffix == ".safetensors":
        return SafetensorsSource(files)
    if files and files[0].suffix == ".gguf":
        from lrsurgery.checkpoints.quantised.gguf import GgufSource

        return GgufSource(files[0])
    from lrsurgery.checkpoints.upstream.pickles import read_pickles

    return DictSource(*read_pickles(files))
