"""The classes of a folder that loads with its own code: those of transformers, with low-rank layers put in.

`folder` writes them, and all that they reach of this package, into the folder. The table of the layers
stands under `lowrank` in its config, whose model type is one that no library knows: without the code, nothing loads it.
"""

from __future__ import annotations

import json
from typing import Any

from lrsurgery.checkpoints.format import PREFIX
from lrsurgery.checkpoints.quantizer.names import config_names, match_names, with_partners
from lrsurgery.checkpoints.upstream.forms import layers_entry, specs_from
from lrsurgery.checkpoints.upstream.transformers import keep_names_plain, retie_
from lrsurgery.errors import SourceError
from lrsurgery.surgery.apply import check_orders, factorised_layers, swap_
from lrsurgery.surgery.tables.ties import copy_orders_


class LowRankConfig:
    """What a config class of transformers needs beside: another model type in its file than in memory."""

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        found, rest = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        if str(found.get("model_type")).startswith(PREFIX):
            found["model_type"] = found["model_type"].removeprefix(PREFIX)
        return found, rest

    def to_json_string(self, *args: Any, **kwargs: Any) -> str:
        found = json.loads(super().to_json_string(*args, **kwargs))  # type: ignore[misc]
        found["model_type"] = f"{PREFIX}{found['model_type']}"
        return json.dumps(found, indent=2, sort_keys=True) + "\n"


class LowRankModel:
    """What a model class of transformers needs beside: its layers are low rank before its weights are loaded."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        if not any(parameter.is_meta for parameter in model.parameters()):  # weight norms have some values at once
            raise SourceError(
                f"{type(self).__name__}: its low-rank layers have no values but in files; use from_pretrained"
            )
        layers = with_partners(model, match_names(model, specs_from(config.lowrank["layers"])))
        swap_(model, layers)
        retie_(model)
        # a base model loaded from a checkpoint with a head, or the reverse, has other names than the config
        model.config.lowrank = layers_entry(config_names(model, layers))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        found = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = found[0] if isinstance(found, tuple) else found
        copy_orders_(factorised_layers(model).values())
        check_orders(model)
        keep_names_plain(model, [layer.layout.weight_key(name) for name, layer in factorised_layers(model).items()])
        return found

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for a decorator in the file of the class, which is that of the next class here
        return bool(cls.__mro__[cls.__mro__.index(LowRankModel) + 1]._can_set_experts_implementation())  # type: ignore[attr-defined]
