"""Dense models built from a source's config: skeletons on the meta device, or freshly initialised models."""

from __future__ import annotations

import torch
from torch import nn

from lrsurgery.checkpoints.source import Source
from lrsurgery.checkpoints.tensors import DictSource, TensorSource
from lrsurgery.errors import SourceError, SurgeryError


def check_not_converted(source: Source) -> None:
    """Raise SourceError if the checkpoint is already factorised or quantised."""
    if source.is_factorised:
        raise SourceError(
            f"{source.reference}: already factorised; make it dense first with lrsurgery export --to dense"
        )
    if source.quant_method:
        raise SourceError(
            f"{source.reference}: quantised with {source.quant_method}; start from the checkpoint before quantisation"
        )


def build_model(source: Source, *, device: str, trust_remote_code: bool = False) -> nn.Module:
    """Build the dense model of a source's config in eval mode: on "meta" without weights, on "cpu" initialised.

    Raises SourceError with the library's reason if transformers or timm cannot build it.
    """
    try:
        if source.library == "timm":
            return _build_timm(source, device).eval()
        return _build_transformers(source, device, trust_remote_code).eval()
    except SurgeryError:
        raise
    except Exception as e:  # model constructors raise exceptions of any type for a bad config
        reason = " ".join(str(e).split())[:300]
        raise SourceError(f"{source.reference}: {source.library} cannot build this model: {reason}") from e


def _build_timm(source: Source, device: str) -> nn.Module:
    import timm

    if source.folder is not None:
        name, options = f"local-dir:{source.folder}", {}
    else:
        name, options = source.config["architecture"], {k: v for k, v in source.config.items() if k != "architecture"}
    if device != "meta":
        return timm.create_model(name, pretrained=False, **options)  # type: ignore[no-any-return]
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **options)  # type: ignore[no-any-return]
    except (RuntimeError, NotImplementedError):
        # some constructors read the values of tensors, which fails on the meta device
        return timm.create_model(name, pretrained=False, **options).to("meta")  # type: ignore[no-any-return]


def _build_transformers(source: Source, device: str, trust_remote_code: bool) -> nn.Module:
    import transformers

    from lrsurgery.checkpoints.upstream import transformers as upstream

    model_type = source.config.get("model_type")
    native = upstream.is_native(model_type)
    if not native and not source.has_code:
        raise SourceError(
            f"{source.reference}: model type '{model_type}' is not in transformers {transformers.__version__};"
            " upgrade transformers if it is newer"
        )
    if not native and not trust_remote_code:
        raise SourceError(
            f"{source.reference}: needs the Python code in the checkpoint; review it, then add --trust-remote-code"
        )
    assert source.folder is not None
    config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code and not native)
    try:
        cls = upstream.model_class(config, source.folder, None if native else source.config["auto_map"])
    except AttributeError as e:
        raise SourceError(
            f"{source.reference}: {e} is not a model class of transformers {transformers.__version__}"
        ) from e
    if cls is None:
        raise SourceError(f"{source.reference}: its auto_map names no model class")
    with torch.device(device):
        model: nn.Module = cls(config)
    return model


def timm_tensors(source: Source, model: nn.Module, tensors: TensorSource) -> TensorSource:
    """Rename tensors to the model's state-dict keys; timm's filter converts older layouts in memory.

    Raises SourceError for a tensor that the architecture does not have.
    """
    wanted = set(model.state_dict())
    keys = tensors.keys()
    plain = {key: strip_wrappers(key) for key in keys}
    if keys_match(set(plain.values()), wanted):
        if all(key == name for key, name in plain.items()):
            return tensors
        return DictSource({name: tensors.read(key) for key, name in plain.items()})
    from lrsurgery.checkpoints.upstream import timm as upstream

    convert = upstream.checkpoint_filter(model)
    if convert is not None:
        state = {name: tensors.read(key) for key, name in plain.items()}
        try:
            converted = convert(state, build_model(source, device="cpu"))
        except Exception as e:
            raise SourceError(f"{source.reference}: timm's conversion of these weights fails: {e}") from e
        if keys_match(set(converted), wanted):
            return DictSource(converted)
    foreign = sorted(set(plain.values()) - wanted)
    if foreign:
        raise SourceError(
            f"{source.reference}: {foreign[0]} has no place in timm's {source.config['architecture']};"
            " is it another architecture?"
        )
    return tensors  # the caller reports missing tensors


def strip_wrappers(key: str) -> str:
    """Remove the prefixes of torch.compile, DistributedDataParallel and TimmWrapper from a key."""
    return key.removeprefix("_orig_mod.").removeprefix("module.").removeprefix("timm_model.")


def keys_match(have: set[str], wanted: set[str]) -> bool:
    """Whether the keys fill a model; batch counters, which old checkpoints lack, may be missing."""
    return have <= wanted and all(key.endswith("num_batches_tracked") for key in wanted - have)
