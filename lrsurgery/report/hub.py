"""The metadata at the top of a model card, and what of the source's own still holds for a model made from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from typing_extensions import TypedDict

from lrsurgery.checkpoints.source import Source, check_inside
from lrsurgery.files.json import Json
from lrsurgery.text import expanded

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

HUB = "https://huggingface.co"
TAGS = ("lrsurgery", "low-rank")
LONGEST = 200  # characters of a text, texts of a list: anything longer is neither an id nor a name

# transformers' mapping, its auto class, the hub's task; the first mapping that lists a class wins. transformers 5 has
# no pipeline for text to text any more, so such a model is tagged as its source is, or not at all.
HEADS = (
    ("IMAGE_TEXT_TO_TEXT", "AutoModelForImageTextToText", "image-text-to-text"),
    ("CAUSAL_LM", "AutoModelForCausalLM", "text-generation"),
    ("MASKED_LM", "AutoModelForMaskedLM", "fill-mask"),
    ("SEQ_TO_SEQ_CAUSAL_LM", "AutoModelForSeq2SeqLM", None),
    ("SPEECH_SEQ_2_SEQ", "AutoModelForSpeechSeq2Seq", "automatic-speech-recognition"),
    ("CTC", "AutoModelForCTC", "automatic-speech-recognition"),
    ("SEQUENCE_CLASSIFICATION", "AutoModelForSequenceClassification", "text-classification"),
    ("TOKEN_CLASSIFICATION", "AutoModelForTokenClassification", "token-classification"),
    ("QUESTION_ANSWERING", "AutoModelForQuestionAnswering", "question-answering"),
    ("IMAGE_CLASSIFICATION", "AutoModelForImageClassification", "image-classification"),
    ("AUDIO_CLASSIFICATION", "AutoModelForAudioClassification", "audio-classification"),
    ("VIDEO_CLASSIFICATION", "AutoModelForVideoClassification", "video-classification"),
    ("OBJECT_DETECTION", "AutoModelForObjectDetection", "object-detection"),
    ("PRETRAINING", "AutoModelForPreTraining", None),
)


class Licence(TypedDict, total=False):
    """A card's fields about the licence."""

    license: str | list[str]
    license_name: str | None
    license_link: str | None


def head_of(config: Json) -> tuple[str, str | None]:
    """(auto class that loads the architecture of a transformers config.json, the hub's task or None).

    A model with its own code is loaded by the auto class that its config names for it.
    """
    from lrsurgery.checkpoints.upstream.transformers import head_classes

    name = next(iter(config.get("architectures") or []), None)
    own = config.get("auto_map")
    if isinstance(own, Mapping):
        for auto, place in own.items():
            if isinstance(place, str) and place.rpartition(".")[2] == name and str(auto).isidentifier():
                return auto, next((task for _, known, task in HEADS if known == auto), None)
    for mapping, auto, task in HEADS:
        if isinstance(name, str) and name in head_classes(mapping):
            return auto, task
    return "AutoModel", None


def card_data(
    source: Source, config: Json, *, trained: bool = False, fresh: bool = False, data: str | None = None
) -> ModelCardData:
    """The metadata of a model made from `source`, whose config.json is now `config`.

    `trained` says that it was trained, on `data`; `fresh` that no weight of the source is left in it. The base model is
    the hub id that the source came from. A folder has no hub id, so the base model that its own card names is taken.
    """
    from huggingface_hub import ModelCardData

    known = {} if fresh else source_metadata(source)
    kept = {key: _texts(known.get(key)) for key in ("base_model", "datasets", "language")}
    base = None if fresh else source.hub_id or kept["base_model"]
    datasets = kept["datasets"]
    if data is not None and is_hub_id(data):
        datasets = list(dict.fromkeys([*([datasets] if isinstance(datasets, str) else datasets or []), data]))
    task = "image-classification" if source.library == "timm" else head_of(config)[1]
    # the hub has no relation for a decomposition; a healed model is a finetune, and so is its dense export
    healed = trained or (source.hub_id is None and known.get("base_model_relation") == "finetune")
    return ModelCardData(
        base_model=base,
        base_model_relation="finetune" if base and healed else None,
        datasets=datasets,  # type: ignore[arg-type]
        language=kept["language"],
        library_name=source.library,
        pipeline_tag=task or _text(known.get("pipeline_tag")),
        tags=list(TAGS),
        **_licence(source),  # type: ignore[arg-type]  # the hub takes several licences
    )


def source_metadata(source: Source) -> Json:
    """The YAML at the top of the source's card; empty where it cannot be read. Nothing in it is executed."""
    card = source.folder / "README.md" if source.folder else None
    if card is None or source.folder is None or not card.is_file():
        return {}
    from huggingface_hub.repocard import metadata_load

    try:
        return dict(metadata_load(check_inside(source.folder, card)) or {})
    except Exception:  # whatever is wrong with its YAML, its encoding or its link says nothing against the model
        return {}


def is_hub_id(reference: str) -> bool:
    """Whether a readable model or dataset came from the hub: it did where it is neither a file nor a folder."""
    return not expanded(reference).exists() and bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", reference))


def _licence(source: Source) -> Licence:
    """The licence of the source's card, or of its timm config."""
    known = source_metadata(source)
    licence = _texts(known.get("license"))
    if licence is None:
        named = _text(source.pretrained_cfg.get("license"))
        return {"license": named.lower()} if named and re.fullmatch(r"[\w.-]+", named) else {}
    found: Licence = {"license": licence}
    if licence == "other":
        link = _text(known.get("license_link"))
        if link and "://" not in link and not link.startswith("LICENSE") and source.hub_id:
            link = f"{HUB}/{source.hub_id}/blob/{source.revision or 'main'}/{link}"  # licence files alone are copied
        found["license_name"], found["license_link"] = _text(known.get("license_name")), link
    return found


def _text(value: object) -> str | None:
    if value is False:
        return "no"  # Norwegian, to YAML
    text = value.strip() if isinstance(value, str) else ""
    return text if 0 < len(text) <= LONGEST and "\n" not in text else None


def _texts(value: object) -> str | list[str] | None:
    """One text, or those in a list."""
    if not isinstance(value, list):
        return _text(value)
    return [text for text in map(_text, value[:LONGEST]) if text is not None] or None
