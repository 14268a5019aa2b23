"""Dense models from a source's config: on the meta device as skeletons, or freshly initialised."""

from __future__ import annotations

import torch
from torch import nn

from lrsurgery.checkpoints.source import Source
from lrsurgery.checkpoints.tensors import DictSource, TensorSource
from lrsurgery.errors import SourceError, SurgeryError


def check_not_converted(source: Source) -> None:
    """Raises SourceError for a checkpoint that is already factorised or quantised."""
    if source.is_factorised:
        raise SourceError(
            f"{source.reference}: already factorised; make it dense first with lrsurgery export --to dense"
        )
    if source.quant_method:
        raise SourceError(
            f"{source.reference}: quantised with {source.quant_method}; start from the checkpoint before quantisation"
        )


def build_model(source: Source, *, device: str, trust_remote_code: bool = False) -> nn.Module:
    """The dense model of a source's config, in eval mode: on "meta" without weights, on "cpu" freshly initialised.

    Raises SourceError where transformers or timm cannot build it, with their reason.
    """
    try:
        if source.library == "timm":
            return _build_timm(source, device).eval()
        return _build_transformers(source, device, trust_remote_code).eval()
    except SurgeryError:
        raise
    except Exception as e:  # their constructors raise anything; whatever it is, the config is at fault
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
        # some constructors read values of tensors, which meta tensors lack
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
            f"{source.reference}: needs Python code that comes with the checkpoint;"
            " read it, then pass --trust-remote-code"
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
    """The tensors under the model's own names; older layouts go through timm's own filter, in memory."""
    wanted = set(model.state_dict())
    keys = tensors.keys()
    plain = {key: without_wrappers(key) for key in keys}
    if plain_values_match(set(plain.values()), wanted):
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
            raise SourceError(f"{source.reference}: timm's own conversion of these weights fails: {e}") from e
        if plain_values_match(set(converted), wanted):
            return DictSource(converted)
    foreign = sorted(set(plain.values()) - wanted)
    if foreign:
        raise SourceError(
            f"{source.reference}: {foreign[0]} has no place in timm's {source.config['architecture']};"
            " is it another architecture?"
        )
    return tensors  # what is missing is named later


def without_wrappers(key: str) -> str:
    """A key as the model has it, without what torch.compile, DistributedDataParallel and TimmWrapper put before it."""
    return key.removeprefix("_orig_mod.").removeprefix("module.").removeprefix("timm_model.")


def plain_values_match(have: set[str], wanted: set[str]) -> bool:
    """Whether keys fill a model, but for batch counters, which old checkpoints lack."""
    return have <= wanted and all(key.endswith("num_batches_tracked") for key in wanted - have)
