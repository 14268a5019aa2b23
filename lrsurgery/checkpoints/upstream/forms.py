"""What the JSON files of transformers, timm and sentence-transformers may hold, checked before any of it is used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field
from typing_extensions import NotRequired, TypedDict

from lrsurgery.checkpoints.format import FORMAT_VERSION, LAYERS_VERSION, METHOD
from lrsurgery.errors import SourceError, SurgeryError
from lrsurgery.files.json import Json, check_version, checked
from lrsurgery.linalg.pivot import Side
from lrsurgery.surgery.kinds.table import KINDS
from lrsurgery.surgery.layers import Spec
from lrsurgery.surgery.shared.specs import groups_in

LARGEST_RANK = 1 << 31

Size: TypeAlias = Annotated[int, Field(gt=0, lt=1 << 31)]  # of an image or a tensor
ImageSize: TypeAlias = Annotated[list[Size], Field(min_length=3, max_length=3)]
Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share: TypeAlias = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]  # of an image that a crop keeps
Interpolation: TypeAlias = Literal[
    "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"
]  # of timm's transforms
Names: TypeAlias = "str | list[str] | None"


class Index(TypedDict):
    """model.safetensors.index.json: tensor -> the file that holds it."""

    weight_map: dict[str, str]


class Module(TypedDict, total=False):
    """A module of sentence-transformers."""

    path: str | None  # of its folder, such as 1_Pooling


Modules: TypeAlias = list[Module]  # modules.json


class _Open(TypedDict):
    """An object whose further keys are its library's."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]


class _Config(_Open, total=False):
    """config.json of transformers, or what both libraries have."""

    model_type: str | None
    architectures: list[str] | None
    auto_map: dict[str, Any] | None
    num_labels: Annotated[int, Field(ge=0)] | None
    id2label: dict[str, str | int | float | None] | None
    label2id: dict[str, str | int | None] | None
    problem_type: str | None
    quantization_config: dict[str, Any] | None


class _Pretrained(_Open, total=False):
    """timm's metadata of weights; in its first format at the top of config.json."""

    architecture: str | None
    num_classes: Annotated[int, Field(ge=0, lt=1 << 31)] | None
    input_size: ImageSize | None
    test_input_size: ImageSize | None
    min_input_size: ImageSize | None
    fixed_input_size: bool | None
    interpolation: Interpolation | None
    crop_pct: Share | None
    test_crop_pct: Share | None
    crop_mode: str | None
    mean: Annotated[list[Finite], Field(min_length=1)] | None
    std: Annotated[list[Positive], Field(min_length=1)] | None
    classifier: Names
    first_conv: Names
    label_names: list[str] | None


class _TimmConfig(_Pretrained, total=False):
    """config.json of timm."""

    pretrained_cfg: _Pretrained | None
    model_args: dict[str, Any] | None


class LayerSpec(TypedDict):
    """A factorised layer."""

    kind: str
    rank: Annotated[int, Field(gt=0, lt=LARGEST_RANK)]
    form: NotRequired[Literal["balanced", "pivoted"]]
    side: NotRequired[Side]  # of a pivoted one
    groups: NotRequired[Annotated[int, Field(gt=1, lt=LARGEST_RANK)]]  # of a grouped convolution
    v_of: NotRequired[str]  # the layer that stores the v of this one
    tied_to: NotRequired[str]  # the layer that stores the u and v of this one
    # of a pivoted one whose v others share: the first of its pivots among v's outputs, and their number
    pivots: NotRequired[
        Annotated[list[Annotated[int, Field(ge=0, lt=LARGEST_RANK)]], Field(min_length=2, max_length=2)]
    ]


def check_config(file: Path, config: Json) -> None:
    """Raise SourceError, which names the file and the key, for an entry of another form than its library writes.

    Of a factorised model the layers and the version are checked too.
    """
    lead = f"{file}: not a model's config"
    checked(_Config, config, lead)
    if isinstance(config.get("architecture"), str):
        checked(_TimmConfig, config, lead, finite=False)  # timm would compute with a NaN
    for path, inner in objects_in(config):
        found = inner.get("quantization_config")
        if found is not None and not isinstance(found, dict):
            where = ".".join((*path, "quantization_config"))
            raise SourceError(f"{file}: {where} must be an object, not {json.dumps(found)[:60]}")
    own = config.get("quantization_config")
    if own is not None and own.get("quant_method") == METHOD:
        check_version(own.get("format_version"), FORMAT_VERSION, str(file))
        check_layers(own.get("layers"), f"{file}: quantization_config.layers")


def objects_in(config: Json, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Json]]:
    """A config and the configs in it, such as `text_config`, with where they stand."""
    yield path, config
    for key, value in config.items():
        if isinstance(value, dict) and key != "quantization_config":
            yield from objects_in(value, (*path, key))


def quantisations(config: Json) -> list[Json]:
    """Every quantization_config of a config and of the configs in it."""
    found = [inner.get("quantization_config") for _, inner in objects_in(config)]
    return [each for each in found if each]


def check_layers(
    layers: object, where: str = "quantization_config.layers", error: type[SurgeryError] = SourceError
) -> dict[str, LayerSpec]:
    """Check the `layers` entry of a config and return it. Raises `error` unless it maps names to kind and rank."""
    specs = checked(dict[str, LayerSpec], layers, f"{where} must map layer names to a kind and a rank", error)
    for name, spec in specs.items():
        if spec["kind"] not in KINDS:
            raise error(f"{where}: {name}: unknown kind '{spec['kind'][:60]}'; known: {', '.join(KINDS)}")
        if (spec.get("form") == "pivoted") != ("side" in spec):
            raise error(f"{where}: {name}: a pivoted layer has a side, rows or columns, and no other has")
        if ("v_of" in spec or "pivots" in spec) and not KINDS[spec["kind"]].shares_v:
            raise error(f"{where}: {name}: a {spec['kind']} layer shares its v with no other")
        _check_tied(name, spec, specs, f"{where}: {name}", error)
    groups_in(specs_from(specs), error, f"{where}: ")
    return specs


def _check_tied(
    name: str, spec: LayerSpec, specs: Mapping[str, LayerSpec], where: str, error: type[SurgeryError]
) -> None:
    leader = spec.get("tied_to")
    if leader is None:
        return
    other = specs.get(leader)
    if other is None or leader == name or "tied_to" in other:
        raise error(f"{where}: tied to {leader[:60]}, which is no layer that stores factors")
    if other["rank"] != spec["rank"] or other.get("side") != spec.get("side") or "v_of" in (spec | other):
        raise error(f"{where}: tied to {leader}, whose rank or form is another")


def specs_from(layers: Mapping[str, LayerSpec]) -> dict[str, Spec]:
    """What a config's `layers` say, which `check_layers` has passed."""
    return {
        name: Spec(
            spec["kind"],
            spec["rank"],
            spec.get("side"),
            spec.get("v_of"),
            (spec["pivots"][0], spec["pivots"][1]) if "pivots" in spec else None,
            spec.get("groups", 1),
            spec.get("tied_to"),
        )
        for name, spec in layers.items()
    }


def layers_entry(specs: Mapping[str, Spec], version: int | None = None) -> Json:
    """`format_version` and `layers` of a config; the oldest version that knows the layers' forms by default.

    Raises SurgeryError for a version that there is not, or that a layer's form is too new for.
    """
    if version not in (None, *range(1, LAYERS_VERSION + 1)):
        raise SurgeryError(f"format {version}: write 1, which has balanced layers alone, or {LAYERS_VERSION}")
    pivoted = [name for name, spec in specs.items() if spec.side]
    led = [name for name, spec in specs.items() if spec.v_of is not None]
    if version == 1 and led:
        raise SurgeryError(
            f"{led[0]}: has the v of {specs[led[0]].v_of}, and in format 1 every layer has its own; write format 2"
        )
    newer = [name for name, spec in specs.items() if KINDS[spec.kind].since > 1 or spec.groups > 1]
    if version == 1 and newer:
        spec = specs[newer[0]]
        what = f"{spec.kind} layer" + (f" of {spec.groups} groups" if spec.groups > 1 else "")
        raise SurgeryError(f"{newer[0]}: a {what}, which format 1 does not have; write format 2")
    if version == 1 and pivoted:
        raise SurgeryError(
            f"{pivoted[0]}: is pivoted, as {len(pivoted)} of {len(specs)} layers are, and format 1 has balanced layers"
            " alone; add --form balanced"
        )
    if not (pivoted or led or newer) and version != LAYERS_VERSION:
        return {"format_version": 1, "layers": {n: LayerSpec(kind=s.kind, rank=s.rank) for n, s in specs.items()}}
    layers = {}
    for name, spec in specs.items():
        layers[name] = LayerSpec(kind=spec.kind, rank=spec.rank, form="pivoted" if spec.side else "balanced")
        if spec.side:
            layers[name]["side"] = spec.side
        if spec.groups > 1:
            layers[name]["groups"] = spec.groups
        if spec.v_of is not None:
            layers[name]["v_of"] = spec.v_of
        if spec.pivots is not None:
            layers[name]["pivots"] = list(spec.pivots)
        if spec.tied_to is not None:
            layers[name]["tied_to"] = spec.tied_to
    return {"format_version": LAYERS_VERSION, "layers": layers}
