"""Resolution of MODEL arguments: local folders, hub ids, timm names and bare weight files.

The file is long because every kind of MODEL, and what is said of one that cannot be read, stands here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from typing_extensions import TypedDict

from lrsurgery.checkpoints.format import METHOD, without_code
from lrsurgery.checkpoints.quantised.gguf import ENDING, gguf_in, write_companions
from lrsurgery.checkpoints.quantised.schemes import Scheme, scheme_name, scheme_of
from lrsurgery.checkpoints.upstream.forms import Index, check_config, check_layers, quantisations, specs_from
from lrsurgery.errors import SourceError
from lrsurgery.files.digests import check_files
from lrsurgery.files.json import Json, read_as, read_json
from lrsurgery.surgery.layers import Spec
from lrsurgery.text import expanded
from lrsurgery.units import size_words

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")  # of weights in a folder
# of a weight file that is named itself; timm's training script writes .pth.tar, Lightning .ckpt
FILE_ENDINGS = (*WEIGHT_SUFFIXES, ".pth.tar", ".pt.tar", ".th", ".ckpt", ".gguf")
# in the order in which transformers and timm search
WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.pth",
    "model.pth",
)
# of peft, which adds an adapter to a model as it loads
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
MERGE = "peft's merge_and_unload"
OWN_CLASS = "module_class"  # key of the config of a module of neither library: its class, which its author builds
HUB_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "README.md", "*.spm", "*.vocab")
HUB_MODULES = ("[0-9]*_*/*",)  # folders of sentence-transformers, such as 1_Pooling
HUB_SAFE_WEIGHTS = ("model.safetensors", "model-*.safetensors")
HUB_PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model-*.bin")


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Options for resolving a MODEL argument."""

    revision: str | None = None  # of a hub model
    architecture: str | None = None  # timm model name of a bare weight file
    trust_remote_code: bool = False
    from_scratch_seed: int | None = None  # initialise the model from its config with this seed

    def resolve(self, reference: str) -> Source:
        """Resolve a MODEL argument; weights are not needed if the model is initialised from its config."""
        weights = self.from_scratch_seed is None
        return resolve(reference, revision=self.revision, architecture=self.architecture, weights=weights)


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine's disk."""

    reference: str  # the MODEL argument
    library: str  # "transformers" or "timm"; "torch" for a module of neither, which `load_into_` reads
    config: Json  # config.json, or {"architecture": ...} for a timm model without a folder
    folder: Path | None  # None for a bare weight file or a timm name without weights
    files: tuple[Path, ...]  # weights, all of one format; empty if none were requested
    hub_id: str | None = None
    revision: str | None = None

    @property
    def quant_method(self) -> str | None:
        """The tool that quantised or factorised the checkpoint, according to its config."""
        return next(map(scheme_name, quantisations(self.config)), None)

    @property
    def scheme(self) -> Scheme | None:
        """How the weights are quantised, if they are dequantised on reading. Raises SourceError for a bad config."""
        if self.library != "transformers":
            return None
        return scheme_of(self.config, str(self.folder / "config.json") if self.folder is not None else self.reference)

    @property
    def is_factorised(self) -> bool:
        """Whether it is a factorised checkpoint of lrsurgery."""
        return self.quant_method == METHOD

    @property
    def layers(self) -> dict[str, Spec]:
        """The factorised layers. Raises SourceError for a malformed config."""
        return specs_from(check_layers((self.config.get("quantization_config") or {}).get("layers")))

    @property
    def has_code(self) -> bool:
        return "auto_map" in self.config

    @property
    def pretrained_cfg(self) -> Json:
        """timm's metadata of its weights; empty if the config has none."""
        return dict(self.config.get("pretrained_cfg") or {})

    def with_classes(self, names: Sequence[str]) -> Source:
        """The source of a timm model with a new head for these classes."""
        old = ("label_names", "label_descriptions")  # at the top, where timm's writer puts them, they come first
        both = (self.config, self.pretrained_cfg)
        config, pretrained = ({key: value for key, value in each.items() if key not in old} for each in both)
        pretrained |= {"num_classes": len(names), "label_names": list(names)}
        return replace(self, config={**config, "num_classes": len(names), "pretrained_cfg": pretrained})

    @property
    def architecture(self) -> str | None:
        """The model class in a transformers config, if any."""
        return next(iter(self.config.get("architectures") or []), None)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how the weights are stored, and of files beside them."""
        found = []
        if self.scheme is not None and self.bytes is not None:
            found.append(f"{self.scheme.note}; the weight files have {size_words(self.bytes)}")
        names = [name for name in ADAPTER_FILES if self.folder is not None and (self.folder / name).is_file()]
        if names:
            which = f"the adapter beside the model ({', '.join(names)})"
            found.append(f"{which} is left out; merge it first ({MERGE}) if it is to count")
        return tuple(found)

    @property
    def bytes(self) -> int | None:
        """Size of the weight files in bytes; None without weight files."""
        return sum(file.stat().st_size for file in self.files) if self.files else None

    @property
    def name(self) -> str:
        """A short name for output folders."""
        path = Path(self.hub_id or self.reference.removeprefix("timm:"))
        return path.name.removesuffix(weight_ending(path.name)) or path.resolve().name


def weight_ending(name: str) -> str:
    """The ending of a weight file's name, such as ".pth.tar"; empty if it has none of `FILE_ENDINGS`."""
    return max((ending for ending in FILE_ENDINGS if name.lower().endswith(ending)), key=len, default="")


def resolve(
    reference: str, *, revision: str | None = None, architecture: str | None = None, weights: bool = True
) -> Source:
    """Find the model on disk, after downloading hub ids to the hub's cache. `weights=False` needs only the config.

    Raises SourceError that gives the file or name, the fault and the remedy.
    """
    if not reference.strip():
        raise SourceError("no model given; write a folder, a hub id, timm:NAME or a weight file")
    if reference.startswith("timm:"):
        return _timm_name(reference, revision, weights)
    path = expanded(reference)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as e:  # a name that no file can have
        raise SourceError(f"{reference[:200]}: no such file or folder ({e})") from e
    if is_folder:
        return _folder(path, reference, weights)
    if is_file and path.suffix.lower() == ENDING:
        return _gguf(path, reference, weights)
    if is_file:
        if not weight_ending(path.name):
            raise SourceError(f"{reference}: not a weight file; known endings: {', '.join(FILE_ENDINGS)}")
        if architecture is None:
            raise SourceError(f"{reference}: a bare weight file needs --architecture with its timm model name")
        return Source(reference, "timm", _timm_config(architecture), None, (path,))
    looks_local = reference.startswith((".", "/", "~")) or bool(weight_ending(path.name)) or reference.count("/") > 1
    if looks_local:
        raise SourceError(f"{reference}: no such file or folder")
    folder = _fetch(reference, revision, weights)
    # the hub cache's snapshots are named by their commit
    return _folder(folder, reference, weights, hub_id=reference, revision=folder.name)


def _gguf(file: Path, reference: str, weights: bool) -> Source:
    folder = write_companions(file)  # the config and the tokenizer in the file
    return Source(reference, "transformers", read_config(folder), folder, (file,) if weights else ())


def _folder(
    folder: Path, reference: str, weights: bool, *, hub_id: str | None = None, revision: str | None = None
) -> Source:
    check_files(folder)
    if (file := gguf_in(folder)) is not None:
        return _gguf(file, reference, weights)
    config = read_config(folder)
    library = "timm" if isinstance(config.get("architecture"), str) else "transformers"
    return Source(reference, library, config, folder, tuple(weight_files(folder) if weights else ()), hub_id, revision)


def read_config(folder: Path) -> Json:
    """Read config.json of a model folder. Raises SourceError if it is missing, no JSON object or not a model's."""
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise SourceError(f"{folder}: a LoRA adapter; merge it into its base model first ({MERGE})")
        if (folder / "model_index.json").is_file():
            raise SourceError(f"{folder}: a diffusers pipeline; name one of its transformers or timm models")
        raise SourceError(f"{file}: missing, so this is no transformers or timm model folder")
    config = without_code(read_json(file))
    check_config(file, config)
    if isinstance(name := config.get(OWN_CLASS), str):
        raise SourceError(
            f"{folder}: the weights of a {name[:200]}, which its own code builds; build it dense, then call"
            f" lrsurgery.load_into_(module, {str(folder)!r})"
        )
    if not (
        isinstance(config.get("model_type"), str) or isinstance(config.get("architecture"), str) or "auto_map" in config
    ):
        if isinstance(name := config.get("_class_name"), str):
            raise SourceError(
                f"{file}: of diffusers ({name[:60]}), whose folders are not read; load the module with diffusers and"
                " call lrsurgery.factorise_ on it"
            )
        raise SourceError(f"{file}: not a model's (it has neither model_type nor architecture)")
    return config


def resolve_own(folder: Path) -> Source:
    """The folder that `save_model` wrote for a module of neither library. Raises SourceError for any other."""
    check_files(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise SourceError(f"{file}: missing; lrsurgery.save_model writes one")
    config = read_json(file)
    check_config(file, config)
    if not isinstance(config.get(OWN_CLASS), str):
        raise SourceError(f"{folder}: not the weights of a module of one's own; use lrsurgery.load_model")
    return Source(str(folder), "torch", config, folder, tuple(weight_files(folder)))


def weight_files(folder: Path) -> list[Path]:
    """List the weight files of a model folder in shard order. Raises SourceError for missing or unsafe files."""
    for name in WEIGHT_NAMES:
        file = folder / name
        if not file.exists() and not file.is_symlink():
            continue
        if not name.endswith(".index.json"):
            return [check_inside(folder, file)]
        return [check_inside(folder, shard) for shard in _shards(folder, file)]
    loose = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES and p.name not in ADAPTER_FILES)
    if len(loose) == 1:
        return [check_inside(folder, loose[0])]
    if any((folder / name).is_file() for name in ADAPTER_FILES):
        raise SourceError(f"{folder}: a LoRA adapter beside a config; merge it into its base model first ({MERGE})")
    others = [p.name for p in folder.iterdir() if p.suffix in (".h5", ".msgpack", ".onnx", ".ckpt")]
    hint = f"; the format of {others[0]} is not supported" if others else ""
    raise SourceError(f"{folder}: no weights ({WEIGHT_NAMES[0]} or an index of shards){hint}")


def _shards(folder: Path, index: Path) -> list[Path]:
    names = sorted(set(read_as(Index, check_inside(folder, index), "an index of shards")["weight_map"].values()))
    if not names:
        raise SourceError(f"{index}: lists no tensors")
    for name in names:
        if "/" in name or "\\" in name or "\0" in name or name in ("", ".", ".."):
            raise SourceError(f"{index}: names {name[:60]!r}, which is not a file of this folder")
    if len({Path(name).suffix for name in names}) > 1:
        raise SourceError(f"{index}: mixes file formats")
    return [folder / name for name in names]


def check_index(folder: Path, keys_of: dict[str, set[str]]) -> None:
    """Raise SourceError if the folder's index lists a tensor in a shard that does not hold it.

    `keys_of` maps the file name of a shard to the keys in it.
    """
    for name in WEIGHT_NAMES:
        if (folder / name).exists():
            if name.endswith(".index.json"):
                for key, file in read_as(Index, folder / name, "an index of shards")["weight_map"].items():
                    if key not in keys_of.get(file, set()):
                        raise SourceError(
                            f"{folder / name}: lists {key} in {file}, which does not hold it; download it again"
                        )
            return


def check_inside(folder: Path, file: Path) -> Path:
    """Return the file after checking that it lies in its folder; only links of the hub cache may leave the folder.

    Raises SourceError for any other link, or for a missing file.
    """
    home = folder.resolve()
    try:
        real = file.resolve()
        is_file = real.is_file()
    except (OSError, RuntimeError, ValueError) as e:  # a loop of links, a name that no file can have
        raise SourceError(f"{str(file)[:200]}: no file ({e})") from e
    allowed = [home]
    if home.parent.name == "snapshots":  # hub cache: snapshots/COMMIT/FILE -> ../../blobs/HASH
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise SourceError(f"{file}: links to a file outside of {folder}; copy the file into the folder")
    if not is_file:
        raise SourceError(f"{file}: the shard is missing")
    return file


class _DownloadOptions(TypedDict):
    revision: str | None
    allow_patterns: list[str]
    ignore_patterns: list[str]


def _fetch(hub_id: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id):
        raise SourceError(f"{hub_id}: no such file or folder, and not a hub id")

    def fetch(*patterns: str) -> Path:
        wanted = _DownloadOptions(revision=revision, allow_patterns=list(patterns), ignore_patterns=["[!0-9]*/*"])
        try:
            return Path(snapshot_download(hub_id, **wanted))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError):
            raise
        except Exception:  # offline; the exception's class depends on the version of huggingface_hub
            # version 1 contacts the hub for a commit even if the cache holds it
            return Path(snapshot_download(hub_id, **wanted, local_files_only=True))

    try:
        folder = fetch(*HUB_SMALL_FILES, *HUB_MODULES, *(HUB_SAFE_WEIGHTS if weights else ()))
        if weights and not any(folder.glob("*.safetensors")):
            folder = fetch(*HUB_SMALL_FILES, *HUB_MODULES, *HUB_PICKLED_WEIGHTS)
    except Exception as e:  # of huggingface_hub, its HTTP library or the disk
        at = f" at revision {revision}" if revision else ""
        reason = " ".join(str(e).split())[:200]
        raise SourceError(f"{hub_id}{at}: no such folder, and the download from the hub failed: {reason}") from e
    return folder


def _timm_config(architecture: str, overrides: Json | None = None) -> Json:
    import timm

    name = architecture.removeprefix("timm:")
    if not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"{name.split('_')[0][:6]}*")[:3]
        hint = f"; similar names: {', '.join(near)}" if near else ""
        raise SourceError(f"{name}: timm {timm.__version__} has no model of this name{hint}")
    return {"architecture": name, **(overrides or {})}


def _timm_name(reference: str, revision: str | None, weights: bool) -> Source:
    import timm

    config = _timm_config(reference)
    if not weights:
        return Source(reference, "timm", config, None, ())
    cfg = timm.get_pretrained_cfg(config["architecture"])
    if cfg is not None and cfg.hf_hub_id and not cfg.hf_hub_filename:
        folder = _fetch(cfg.hf_hub_id, revision, weights)
        return _folder(folder, reference, weights, hub_id=cfg.hf_hub_id, revision=folder.name)
    if cfg is not None and cfg.url and not cfg.custom_load and cfg.url.endswith((".pth", ".pt")):
        from lrsurgery.checkpoints.upstream import timm as upstream

        try:
            return Source(reference, "timm", config, None, (upstream.download(cfg.url),))
        except OSError as e:
            raise SourceError(f"{reference}: the download failed: {e}") from e
    raise SourceError(
        f"{reference}: timm has no pretrained weights for it in a supported format;"
        " use --from-scratch, or a weight file with --architecture"
    )
