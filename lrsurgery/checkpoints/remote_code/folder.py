"""The code that a folder has for its own layers: which models can have it, and what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

import lrsurgery
from lrsurgery.checkpoints.format import CODE, ENTRY, PREFIX
from lrsurgery.checkpoints.remote_code.bundle import bundle
from lrsurgery.checkpoints.source import Source
from lrsurgery.checkpoints.upstream.transformers import auto_classes, is_native
from lrsurgery.errors import SurgeryError
from lrsurgery.files.json import Json
from lrsurgery.files.writing import write_text

CLASSES = "lrsurgery.checkpoints.remote_code.classes"
HEAD = '''"""Low-rank layers for transformers: load the folder of this file with trust_remote_code=True.

Made by lrsurgery {version} of its own source (Apache-2.0), without its annotations and comments. Each layer of the
config's "{entry}" has two factors in place of its weight.
"""

from __future__ import annotations
'''


def check_code(source: Source) -> None:
    """Raise SurgeryError for a model whose classes the code of a folder cannot take up."""
    if source.library == "timm":
        raise SurgeryError(
            f"{source.reference}: a timm model, and remote code is for transformers' Auto classes; export it --to dense"
        )
    if not is_native(source.config.get("model_type")):
        raise SurgeryError(
            f"{source.reference}: its model has code of its own, to which none can be added; export it --to dense"
        )


def write_code(stage: Path, config: Json, model: nn.Module) -> Json:
    """Write the code for a folder of the class of `model`, and return its config for one that has it.

    Raises SurgeryError if no Auto class of transformers loads the class.
    """
    config_class: Any = type(model.config)
    native = type(model)
    autos = auto_classes(config_class)
    if native not in autos.values():
        raise SurgeryError(f"{native.__name__}: no Auto class of transformers loads it; export it --to dense")
    classes = list(dict.fromkeys(autos.values()))
    parts = [HEAD.format(version=lrsurgery.__version__, entry=ENTRY)]
    parts.append(bundle([(CLASSES, "LowRankConfig"), (CLASSES, "LowRankModel")]))
    parts += [
        _subclass("LowRankConfig", config_class, []),
        *(_subclass("LowRankModel", each, [f"config_class = {config_class.__name__}"]) for each in classes),
    ]
    write_text(stage / f"{CODE}.py", "\n\n".join(parts))
    made = {name: value for name, value in config.items() if name != "quantization_config"}
    made[ENTRY] = {key: value for key, value in config["quantization_config"].items() if key != "quant_method"}
    made["model_type"] = f"{PREFIX}{config_class.model_type}"
    made["auto_map"] = {"AutoConfig": f"{CODE}.{config_class.__name__}"}
    made["auto_map"] |= {auto: f"{CODE}.{each.__name__}" for auto, each in autos.items()}
    return made


def _subclass(first: str, native: type, lines: list[str]) -> str:
    """A class of the same name as transformers' own, which its pipelines and losses go by."""
    name = native.__name__
    body = [f'"""{native.__module__}.{name} with low-rank layers."""', *lines]
    head = f"from {native.__module__} import {name} as Dense{name}\n\n\nclass {name}({first}, Dense{name}):"
    return "\n    ".join([head, *body]) + "\n"
