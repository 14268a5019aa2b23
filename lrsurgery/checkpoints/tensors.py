"""Lazy reading of sharded checkpoints, and writing of safetensors shards one tensor at a time."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Protocol

import torch
from torch import Tensor
from typing_extensions import TypedDict

from lrsurgery.errors import SourceError
from lrsurgery.files.digests import as_bytes, check_files
from lrsurgery.files.json import json_text
from lrsurgery.files.writing import write_text

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


class _Entry(TypedDict):
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


class SafetensorsSource:
    """One or several .safetensors files. Raises SourceError for a file whose header does not match its data.

    The safetensors library validates the files. Tensors are then read with plain reads, since the pages of a mapped
    file stay in the resident memory of the process until it is closed.
    """

    wrappers: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def __init__(self, files: list[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._where: dict[str, tuple[Path, int, _Entry]] = {}  # key -> file, offset of its data, header entry
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


def check_weights(folder: Path | None, files: Iterable[Path]) -> None:
    """Raise SourceError that names a weight file which is not as the report of its folder says."""
    if folder is not None:
        names = [file.name for file in files]
        check_files(folder, [*names, *(file.name for file in folder.glob("*.index.json"))] if names else [])


def open_tensors(files: list[Path]) -> TensorSource:
    """Open the files of a checkpoint, which are all of one format. Raises SourceError."""
    if files and files[0].suffix == ".safetensors":
        return SafetensorsSource(files)
    from lrsurgery.checkpoints.upstream.pickles import read_pickles

    return DictSource(*read_pickles(files))


class ShardWriter:
    """Writer of safetensors shards, tensor by tensor, with at most one tensor in memory.

    The safetensors library needs all tensors of a file in memory. This class writes the same format one tensor at a
    time, with a header padded with spaces, which the format allows. Tensors must come in descending order of item size,
    so that each is aligned without gaps.
    """

    def __init__(self, folder: Path, *, shard_size: int, stem: str = "model") -> None:
        self._folder = folder
        self._limit = shard_size
        self._stem = stem
        self._file: IO[bytes] | None = None
        self._shards: list[tuple[Path, dict[str, _Entry], int]] = []
        self._item_size = 16
        self._names: set[str] = set()

    HEADER_BYTES = 1 << 16  # a shard with a longer header is rewritten

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor under a new name."""
        self.add_slices(name, tensor.dtype, tuple(tensor.shape), [tensor])

    def add_slices(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], slices: Iterable[Tensor]) -> None:
        """Append a tensor from slices: its elements in order, of this dtype, that fill this shape."""
        assert name not in self._names, name
        assert dtype.itemsize <= self._item_size, f"{name}: tensors must come in descending item size"
        self._names.add(name)
        self._item_size = dtype.itemsize
        size = math.prod(shape) * dtype.itemsize
        if self._file is None or (self._shards[-1][2] and self._shards[-1][2] + size > self._limit):
            self._close_shard()
            path = self._folder / f"{self._stem}-{len(self._shards) + 1:05d}.partial"
            self._file = path.open("wb")
            self._file.seek(self.HEADER_BYTES)
            self._shards.append((path, {}, 0))
        path, entries, offset = self._shards[-1]
        written = 0
        for part in slices:
            if part.numel():
                assert part.dtype == dtype, name
                written += self._file.write(as_bytes(part.detach().cpu()))
        assert written == size, name
        entries[name] = _Entry(dtype=SAFETENSORS_NAMES[dtype], shape=list(shape), data_offsets=[offset, offset + size])
        self._shards[-1] = (path, entries, offset + size)

    def _close_shard(self) -> None:
        if self._file is None:
            return
        path, entries, _ = self._shards[-1]
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        room = self.HEADER_BYTES - 8
        if len(header) > room:  # thousands of tensors: copy the shard behind a larger header
            room = -(-(len(header) + 8) // 4096) * 4096 - 8
            self._file.close()
            moved = path.with_suffix(".moved")
            with path.open("rb") as old, moved.open("wb") as new:
                old.seek(self.HEADER_BYTES)
                new.seek(room + 8)
                while chunk := old.read(1 << 24):
                    new.write(chunk)
            moved.replace(path)
            self._file = path.open("r+b")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", room) + header.ljust(room))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None

    def finish(self) -> int:
        """Rename the shards, write the index if there are several, and return the bytes of all tensors."""
        self._close_shard()
        total = sum(size for _, _, size in self._shards)
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, (path, entries, _) in enumerate(self._shards, 1):
            name = (
                f"{self._stem}.safetensors" if count == 1 else f"{self._stem}-{number:05d}-of-{count:05d}.safetensors"
            )
            path.rename(self._folder / name)
            weight_map.update(dict.fromkeys(entries, name))
        if count > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_text(self._folder / f"{self._stem}.safetensors.index.json", json_text(index))
        return total

    def close(self) -> None:
        """Close the open file without finishing it."""
        if self._file is not None:
            self._file.close()
            self._file = None


def in_write_order(items: list[tuple[torch.dtype, str]]) -> Iterator[str]:
    """Yield names in the order that `ShardWriter` needs: wide dtypes first, then natural order of names."""

    def place(part: str) -> tuple[int, int, str]:
        is_number = part.isascii() and part.isdigit() and len(part) < 20
        return (0, int(part), "") if is_number else (1, 0, part)

    def natural(name: str) -> list[tuple[int, int, str]]:
        return [place(part) for part in name.split(".")]

    for _, name in sorted(items, key=lambda item: (-item[0].itemsize, natural(item[1]))):
        yield name
