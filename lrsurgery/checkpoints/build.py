"""Dense models built from a source's config: skeletons on the meta device, or freshly initialised models."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import nn

from lrsurgery.checkpoints.format import CODE
from lrsurgery.checkpoints.quantised.schemes import scheme_name
from lrsurgery.checkpoints.source import Source
from lrsurgery.checkpoints.tensors import DictSource, TensorSource, open_tensors
from lrsurgery.checkpoints.upstream.construction import Held, Look, bounded, check_numbers, check_size, held_by, meta_of
from lrsurgery.checkpoints.upstream.layouts import check_not_packed, spellings, unwrap, without_inner
from lrsurgery.checkpoints.upstream.own import lacks_for_loading
from lrsurgery.errors import SourceError, SurgeryError
from lrsurgery.modules import Unfilled


def check_not_converted(source: Source) -> None:
    """Raise SourceError if the checkpoint is already factorised, or quantised in a way that is not read."""
    if source.is_factorised:
        raise SourceError(
            f"{source.reference}: already factorised; make it dense first with lrsurgery export --to dense"
        )
    if source.quant_method and source.scheme is None:
        raise SourceError(
            f"{source.reference}: quantised with {source.quant_method}, which is not read; start from the checkpoint"
            " before quantisation"
        )


def factors_quantised_by(source: Source) -> str | None:
    """The tool that quantised the factors of a factorised checkpoint, if one did."""
    then = (source.config.get("quantization_config") or {}).get("then")
    return scheme_name(then) if source.is_factorised and isinstance(then, dict) else None


def check_plain_factors(source: Source) -> None:
    """Raise SourceError for a factorised checkpoint whose factors are quantised, which may only be run."""
    if (tool := factors_quantised_by(source)) is not None:
        raise SourceError(
            f"{source.reference}: its factors are quantised by {tool}, so it can be run and measured, no more; start"
            " from the folder that it was exported from"
        )


def has_own_code(source: Source) -> bool:
    """Whether the layers of a folder have their code beside them, which is not run where this package reads it."""
    return source.is_factorised and source.folder is not None and (source.folder / f"{CODE}.py").is_file()


def build_model(source: Source, *, device: str, trust_remote_code: bool = False) -> nn.Module:
    """Build the dense model of a source's config in eval mode: on "meta" without weights, on "cpu" initialised.

    Raises SourceError with the library's reason if transformers or timm cannot build it, or if the config asks for far
    more than the weight files hold.
    """
    where = str(source.folder / "config.json") if source.folder is not None else source.reference

    @functools.cache
    def look() -> Held | None:
        if not source.files:
            return None
        tensors = open_tensors(list(source.files))
        return held_by({key: tensors.describe(key)[1] for key in tensors.keys()})  # noqa: SIM118

    try:
        check_numbers(source.config, where, look)
        with bounded(where, look):
            if source.library == "timm":
                return _build_timm(source, device, where, look).eval()
            return _build_transformers(source, device, trust_remote_code, where, look).eval()
    except SurgeryError:
        raise
    except Exception as e:  # model constructors raise exceptions of any type for a bad config
        reason = " ".join(str(e).split())[:300]
        raise SourceError(f"{source.reference}: {source.library} cannot build this model: {reason}") from e


def _build_timm(source: Source, device: str, where: str, look: Look) -> nn.Module:
    import timm

    if source.folder is None and source.files and "num_classes" not in source.config:
        source = read_num_classes(source)
    if source.folder is not None:
        name, options = f"local-dir:{source.folder}", {}
    else:
        name, options = source.config["architecture"], {k: v for k, v in source.config.items() if k != "architecture"}

    def build() -> nn.Module:
        return timm.create_model(name, pretrained=False, **options)  # type: ignore[no-any-return]

    # the names of timm say how large a model is, unless the config changes its arguments
    if device != "meta" and not source.config.get("model_args"):
        return build()
    skeleton = meta_of(build)  # some constructors read the values of tensors, which fails on the meta device
    if skeleton is not None:
        check_size(skeleton, where, look)
    if device != "meta":
        return build()
    return skeleton if skeleton is not None else build().to("meta")


def _build_transformers(source: Source, device: str, trust_remote_code: bool, where: str, look: Look) -> nn.Module:
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
    if has_own_code(source):
        config = upstream.config_of(source.config)
    else:
        trusted = trust_remote_code and not native
        config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=trusted)
    if source.scheme is not None:  # the model is dense, and so is what it writes
        upstream.forget_quantisation_(config)
    try:
        cls = upstream.model_class(config, source.folder, None if native else source.config["auto_map"])
    except AttributeError as e:
        raise SourceError(
            f"{source.reference}: {e} is not a model class of transformers {transformers.__version__}"
        ) from e
    if cls is None:
        raise SourceError(f"{source.reference}: its auto_map names no model class")
    if device != "meta" and (skeleton := meta_of(lambda: cls(config))) is not None:
        check_size(skeleton, where, look)
    with torch.device(device), Unfilled():
        model: nn.Module = cls(config)
    if device == "meta":
        check_size(model, where, look)
    if (lacks := lacks_for_loading(model)) is not None:
        raise SourceError(f"{source.reference}: {cls.__name__} {lacks}")
    return model


def timm_tensors(source: Source, model: nn.Module, tensors: TensorSource) -> TensorSource:
    """Rename tensors to the model's state-dict keys; timm's filter converts older layouts in memory.

    Raises SourceError for a tensor that the architecture does not have.
    """
    wanted = set(model.state_dict())
    tensors = unwrap(tensors, wanted.__contains__)
    keys = tensors.keys()
    if keys_match(set(keys), wanted):
        return tensors
    from lrsurgery.checkpoints.upstream import timm as upstream

    convert = upstream.checkpoint_filter(model)
    if convert is not None:
        state = {name: tensors.read(name) for name in keys}
        try:
            converted = convert(state, build_model(source, device="cpu"))
        except Exception as e:
            raise SourceError(f"{source.reference}: timm's conversion of these weights fails: {e}") from e
        if keys_match(set(converted), wanted):
            return DictSource(converted, tensors.wrappers, tensors.beside)
    foreign = sorted(set(keys) - wanted)
    if foreign:
        check_not_packed(source, keys)
        raise SourceError(
            f"{source.reference}: {foreign[0]} has no place in timm's {source.config['architecture']};"
            " is it another architecture?"
        )
    return tensors  # the caller reports missing tensors


def read_num_classes(source: Source) -> Source:
    """Read the number of classes from the classifier's weight, for a bare weight file."""
    import timm

    cfg = timm.get_pretrained_cfg(source.config["architecture"])
    classifier = getattr(cfg, "classifier", None)
    names = {f"{name}.weight" for name in ([classifier] if isinstance(classifier, str) else classifier or ())}
    tensors = open_tensors(list(source.files))
    for key in tensors.keys():  # noqa: SIM118
        if names.intersection(spellings(without_inner(key))):
            return replace(source, config={**source.config, "num_classes": tensors.describe(key)[1][0]})
    return source


def keys_match(have: set[str], wanted: set[str]) -> bool:
    """Whether the keys fill a model; batch counters, which old checkpoints lack, may be missing."""
    return have <= wanted and all(key.endswith("num_batches_tracked") for key in wanted - have)
