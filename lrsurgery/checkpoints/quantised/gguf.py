"""GGUF files of llama.cpp, through transformers' and gguf's own readers.

Written against transformers 5.17 to 5.24, whose readers of GGUF files are undocumented.
"""

from __future__ import annotations

import atexit
import functools
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lrsurgery.errors import SourceError
from lrsurgery.files.json import json_text

ENDING = ".gguf"
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # types that are no blocks
TOKENS = "tokenizer.ggml.tokens"
REMEDY = "take the safetensors of the model"


def gguf_in(folder: Path) -> Path | None:
    """The GGUF file of a folder that has no other weights. Raises SourceError for several."""
    files = sorted(folder.glob(f"*{ENDING}"))
    others = [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    if not files or others:
        return None
    if len(files) > 1:
        raise SourceError(f"{folder}: has {len(files)} GGUF files; name one of them, such as {files[0]}")
    return files[0]


def write_companions(file: Path) -> Path:
    """Write the config and tokenizer that a GGUF file holds into a folder, as those of any model; return the folder.

    The folder goes when the process ends. Raises SourceError for a file that cannot be read.
    """
    status = file.stat()
    return _companions(file.resolve(), status.st_mtime_ns, status.st_size)


@functools.cache
def _companions(file: Path, modified: int, size: int) -> Path:
    header = GgufSource(file)
    folder = Path(tempfile.mkdtemp(prefix="lrsurgery-gguf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        from transformers import AutoConfig, AutoTokenizer

        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name).to_diff_dict()
        if TOKENS in header.fields:
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    except Exception as e:  # whatever it stumbles over in metadata that it did not expect
        raise _unreadable(file, e) from e
    config = {key: value for key, value in config.items() if key not in ("_name_or_path", "torch_dtype")}
    config["architectures"] = config.get("architectures") or [_class_name(config["model_type"])]
    config["dtype"] = str(header.dtype).removeprefix("torch.")
    config["quantization_config"] = {"quant_method": "gguf"}
    (folder / "config.json").write_text(json_text(config), encoding="utf-8")
    return folder


def _class_name(model_type: str) -> str:
    """The model class of what llama.cpp runs: a causal language model, else one from text to text."""
    from transformers.models.auto import modeling_auto

    for mapping in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM"):
        found = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").get(model_type)
        if found is not None:
            return found if isinstance(found, str) else str(found[0])
    raise ValueError(f"model type {model_type} has no head for text")


@functools.cache
def _reader(file: Path, modified: int, size: int) -> Any:
    """gguf's reader of a file, which takes seconds for each 100,000 tokens of a vocabulary."""
    try:
        from gguf import GGUFReader
    except ImportError as e:
        raise SourceError(f"{file}: GGUF files need the package gguf; pip install 'lrsurgery[gguf]'") from e
    try:
        return GGUFReader(file)
    except Exception as e:  # of a file cut off anywhere, numpy raises anything
        raise SourceError(f"{file}: not a whole GGUF file ({_cause(e)}); download it again") from e


class GgufSource:
    """The tensors of a GGUF file, dequantised; under llama.cpp's names until `for_model` gives them a model's."""

    wrappers: tuple[str, ...] = ()

    def __init__(self, file: Path) -> None:
        """Raises SourceError for a file that is damaged, or of an architecture that is not read."""
        status = file.stat()
        reader = _reader(file, status.st_mtime_ns, status.st_size)
        self._file = file
        self.fields: Any = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._check_architecture()
        types = {tensor.tensor_type.name for tensor in self._tensors.values()}
        of_floats = next((FLOATS[name] for name in ("BF16", "F16", "F32") if name in types), torch.bfloat16)
        # blocks tell nothing of the dtype before them, which is bfloat16 for today's models
        self.dtype = of_floats if types <= FLOATS.keys() else torch.bfloat16
        # of the model: parameter -> names in the file, and its shape
        self._names: dict[str, list[str]] = {}
        self._shapes = {name: tuple(int(n) for n in reversed(each.shape)) for name, each in self._tensors.items()}
        self.beside: tuple[str, ...] = ()
        self._processor: Any = None
        self._places: dict[str, str] = {}

    def _check_architecture(self) -> None:
        from transformers import modeling_gguf_pytorch_utils as library

        found = library.read_field(self, "general.architecture")
        self._architecture = str(found[0]) if found else ""
        known = {*library.GGUF_SUPPORTED_ARCHITECTURES, *library.TENSOR_PROCESSORS}
        if not self._tensors or self._architecture not in known or self._architecture in _of_newer_reader():
            what = f"architecture '{self._architecture[:60]}'" if self._tensors else "a file without tensors"
            raise SourceError(f"{self._file}: {what} is not read from GGUF; {REMEDY}")
        count = library.read_field(self, "split.count")
        if count and int(count[0]) > 1:
            raise SourceError(
                f"{self._file}: one of {count[0]} parts; join them first (llama-gguf-split --merge), or {REMEDY}"
            )

    def for_model(self, model: nn.Module) -> GgufSource:
        """The same tensors under the names of `model`, which may be on the meta device. Raises SourceError."""
        from transformers import modeling_gguf_pytorch_utils as library

        found = GgufSource(self._file)
        try:
            config = cast(Any, model).config.to_dict()
            processor = library.TENSOR_PROCESSORS.get(self._architecture, library.TensorProcessor)(config=config)
            places = library.get_gguf_hf_weights_map(model, processor)
        except Exception as e:
            raise _unreadable(self._file, e) from e
        state = model.state_dict()
        shapes: dict[str, tuple[int, ...]] = {}
        beside = []
        for name in self._tensors:
            # fused experts have no ".weight" at the end of their names
            place = places.get(name) or places.get(name.removesuffix(".weight"))
            if place in state:
                found._names.setdefault(place, []).append(name)
                shapes[place] = tuple(state[place].shape)
            else:
                beside.append(name)
        for place, names in found._names.items():
            have = sum(math.prod(self._shapes[name]) for name in names)
            if have != math.prod(shapes[place]):  # a size that transformers did not find in the file
                raise SourceError(
                    f"{self._file}: {' and '.join(names)} hold {have:,} numbers, and {place} of the model that"
                    f" transformers makes of it is {shapes[place]}; {REMEDY}"
                )
        found._shapes, found.beside, found._processor, found._places = shapes, tuple(beside), processor, places
        return found

    def keys(self) -> list[str]:
        return list(self._shapes)

    def describe(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return self.dtype, self._shapes[key]

    def read(self, key: str) -> Tensor:
        return self._checked(key, self._shapes[key], slice(None))

    def part(self, key: str, index: int) -> Tensor:
        if len(self._shapes[key]) < 3:
            return self.read(key)[index]
        return self._checked(key, (1, *self._shapes[key][1:]), slice(index, index + 1))[0]

    def _checked(self, key: str, shape: tuple[int, ...], experts: slice) -> Tensor:
        try:
            weight = self._read(key, experts)
        except Exception as e:  # of a type that gguf does not unpack, or of another shape than the config's
            raise SourceError(f"{self._file}: {key} cannot be read ({_cause(e)}); {REMEDY}") from e
        if tuple(weight.shape) != shape:
            raise SourceError(f"{self._file}: {key} has shape {tuple(weight.shape)}, the model wants {shape}; {REMEDY}")
        if not bool(torch.isfinite(weight).all()):
            raise SourceError(f"{self._file}: {key} holds NaN or Inf; download it again")
        return weight

    def _read(self, key: str, experts: slice) -> Tensor:
        """The weight; of one with three axes some of the first."""
        from gguf import dequantize

        parsed: Any = {"tensors": {}}  # where some of transformers' processors put what is made of several tensors
        for name in self._names.get(key, [key]):
            tensor = self._tensors[name]
            values = dequantize(tensor.data[experts], tensor.tensor_type)
            if self._processor is None:
                return torch.tensor(values).to(self.dtype)
            found = self._processor.process(
                weights=values, name=name, tensor_key_mapping=self._places, parsed_parameters=parsed
            )
            if found.name is not None:
                return torch.tensor(found.weights).to(self.dtype)
        made: Tensor = parsed["tensors"][key]
        return made.to(self.dtype)

    def slices(self, key: str) -> Iterator[Tensor]:
        yield self.read(key).reshape(-1)


def _of_newer_reader() -> frozenset[str]:
    """Architectures that transformers reads by another way, which has no reading of one tensor alone."""
    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    except ImportError:  # before 5.24
        return frozenset()
    return frozenset(GGUF_CONFIG_ARCHS)


def _cause(e: Exception) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"


def _unreadable(file: Path, e: Exception) -> SourceError:
    return SourceError(f"{file}: transformers cannot read it ({_cause(e)}); {REMEDY}")
