"""What a MODEL argument means: a local folder, a hub id, a timm name or a bare weight file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrsurgery.errors import SourceError

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# in the order in which transformers and timm look
WEIGHT_NAMES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "pytorch_model.pth", "model.pth",
)  # fmt: skip
HUB_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "README.md", "*.spm", "*.vocab")
HUB_SAFE_WEIGHTS = ("model.safetensors", "model-*.safetensors")
HUB_PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model-*.bin")


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine's disk."""

    reference: str  # what the user wrote
    library: str  # "transformers" or "timm"
    config: dict[str, Any]  # config.json as it stands, or what stands for it
    folder: Path | None  # None for a bare weight file or a timm name without weights
    files: tuple[Path, ...]  # weights, all of one format; empty where none were asked for
    hub_id: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """A short name for output folders."""
        text = self.hub_id or self.reference.removeprefix("timm:")
        path = Path(text)
        stem = path.stem if path.suffix in WEIGHT_SUFFIXES else path.name
        return stem or path.resolve().name


def resolve(
    reference: str, *, revision: str | None = None, architecture: str | None = None, weights: bool = True
) -> Source:
    """Finds the model; hub ids are fetched to the hub's cache first. With `weights` False only the config is needed.

    Raises SourceError: which file or name, what is wrong, what to do.
    """
    if not reference.strip():
        raise SourceError("no model given; write a folder, a hub id, timm:NAME or a weight file")
    if reference.startswith("timm:"):
        return _timm_name(reference, revision, weights)
    path = Path(reference).expanduser()
    if path.is_dir():
        return _folder(path, reference, weights)
    if path.is_file():
        if path.suffix not in WEIGHT_SUFFIXES:
            raise SourceError(f"{reference}: not a weight file; known endings: {', '.join(WEIGHT_SUFFIXES)}")
        if architecture is None:
            raise SourceError(f"{reference}: a bare weight file needs --architecture with its timm model name")
        return Source(reference, "timm", _timm_config(architecture), None, (path,))
    looks_local = reference.startswith((".", "/", "~")) or path.suffix in WEIGHT_SUFFIXES or reference.count("/") > 1
    if looks_local:
        raise SourceError(f"{reference}: no such file or folder")
    folder = _fetch(reference, revision, weights)
    # the hub cache's snapshots are named by their commit
    return _folder(folder, reference, weights, hub_id=reference, revision=folder.name)


def _folder(
    folder: Path, reference: str, weights: bool, *, hub_id: str | None = None, revision: str | None = None
) -> Source:
    config = read_config(folder)
    library = "timm" if isinstance(config.get("architecture"), str) else "transformers"
    files = tuple(weight_files(folder)) if weights else ()
    return Source(reference, library, config, folder, files, hub_id, revision)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises SourceError where it is missing, not JSON or not a model's."""
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise SourceError(f"{folder}: a LoRA adapter; merge it into its base model first (peft's merge_and_unload)")
        if (folder / "model_index.json").is_file():
            raise SourceError(f"{folder}: a diffusers pipeline; name one of its transformers or timm models")
        raise SourceError(f"{file}: missing, so this is no transformers or timm model folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise SourceError(f"{file}: not JSON ({e})") from e
    if not isinstance(config, dict) or not (
        isinstance(config.get("model_type"), str) or isinstance(config.get("architecture"), str) or "auto_map" in config
    ):
        raise SourceError(f"{file}: not a model's (it has neither model_type nor architecture)")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, in shard order. Raises SourceError for missing, foreign or unsafe names."""
    for name in WEIGHT_NAMES:
        file = folder / name
        if not file.exists() and not file.is_symlink():
            continue
        if not name.endswith(".index.json"):
            return [inside(folder, file)]
        return [inside(folder, shard) for shard in _shards(folder, file)]
    loose = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    if len(loose) == 1:
        return [inside(folder, loose[0])]
    others = [p.name for p in folder.iterdir() if p.suffix in (".h5", ".msgpack", ".gguf", ".onnx", ".ckpt")]
    found = f"; {others[0]} is of a format that this tool does not read" if others else ""
    raise SourceError(f"{folder}: no weights ({WEIGHT_NAMES[0]} or an index of shards){found}")


def _shards(folder: Path, index: Path) -> list[Path]:
    try:
        weight_map = json.loads(inside(folder, index).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as e:
        raise SourceError(f"{index}: not an index of shards ({e!r})") from e
    if not names:
        raise SourceError(f"{index}: lists no tensors")
    for name in names:
        if not isinstance(name, str) or "/" in name or "\\" in name or name in ("", ".", ".."):
            raise SourceError(f"{index}: names {name!r}, which is not a file of this folder")
    if len({Path(name).suffix for name in names}) > 1:
        raise SourceError(f"{index}: mixes file formats")
    return [folder / name for name in names]


def check_index(folder: Path, keys_of: dict[str, set[str]]) -> None:
    """Raises SourceError where the folder's index lists a tensor that the shard named for it does not hold.

    `keys_of` maps a shard's file name to the keys in it.
    """
    for name in WEIGHT_NAMES:
        if (folder / name).exists():
            if name.endswith(".index.json"):
                for key, file in json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].items():
                    if key not in keys_of.get(file, set()):
                        raise SourceError(
                            f"{folder / name}: lists {key} in {file}, which does not hold it; fetch it again"
                        )
            return


def inside(folder: Path, file: Path) -> Path:
    """The file, once it is known to lie in its folder: links out of it are refused, but for the hub cache's own.

    Raises SourceError.
    """
    home = folder.resolve()
    real = file.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":  # hub cache: snapshots/COMMIT/FILE -> ../../blobs/HASH
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise SourceError(f"{file}: links to a file outside of {folder}, which is not followed")
    if not real.is_file():
        raise SourceError(f"{file}: the shard is missing")
    return file


def _fetch(hub_id: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id):
        raise SourceError(f"{hub_id}: no such file or folder, and not a hub id")

    def fetch(*patterns: str) -> Path:
        wanted: Any = {"revision": revision, "allow_patterns": list(patterns), "ignore_patterns": ["*/*"]}
        try:
            return Path(snapshot_download(hub_id, **wanted))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError):
            raise
        except Exception:  # no answer; which class tells so hangs on the version of huggingface_hub
            # version 1 asks the hub about a commit even where the cache holds it
            return Path(snapshot_download(hub_id, **wanted, local_files_only=True))

    try:
        folder = fetch(*HUB_SMALL_FILES, *(HUB_SAFE_WEIGHTS if weights else ()))
        if weights and not any(folder.glob("*.safetensors")):
            folder = fetch(*HUB_SMALL_FILES, *HUB_PICKLED_WEIGHTS)
    except Exception as e:  # of several libraries: whatever it is, the model was not fetched
        at = f" at revision {revision}" if revision else ""
        reason = " ".join(str(e).split())[:200]
        raise SourceError(f"{hub_id}{at}: no such folder, and it could not be fetched from the hub: {reason}") from e
    return folder


def _timm_config(architecture: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    import timm

    name = architecture.removeprefix("timm:")
    if not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"{name.split('_')[0][:6]}*")[:3]
        hint = f"; names like it: {', '.join(near)}" if near else ""
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
        from timm.models._hub import download_cached_file

        try:
            return Source(reference, "timm", config, None, (Path(download_cached_file(cfg.url)),))
        except OSError as e:
            raise SourceError(f"{reference}: could not be fetched: {e}") from e
    raise SourceError(
        f"{reference}: timm has no pretrained weights for it in a format that is read here;"
        " use --from-scratch, or a weight file with --architecture"
    )
