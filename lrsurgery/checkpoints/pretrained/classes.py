"""Two methods of transformers' `PreTrainedModel`, wrapped, because no extension point of transformers reaches them.

A quantizer takes part in `from_pretrained` alone. Without this, `from_config` makes dense layers of a factorised config
in silence, and `save_pretrained` does not tell a quantizer where it saves. Models that are not factorised are left
alone.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from lrsurgery.checkpoints.format import METHOD

WRITTEN = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")  # by save_pretrained


def _wrap_from_config() -> None:
    """Make `from_config` factorise a model whose config is that of a factorised checkpoint."""
    original = PreTrainedModel._from_config.__func__

    @functools.wraps(original)
    def _from_config(cls: Any, config: Any, **options: Any) -> Any:
        model = original(cls, config, **options)
        entry = getattr(config, "quantization_config", None)
        method = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
        if method == METHOD:
            from lrsurgery.checkpoints.pretrained.random import factorise_randomly_
            from lrsurgery.surgery.apply import factorised_layers

            if not factorised_layers(model):
                factorise_randomly_(model, entry)
        return model

    PreTrainedModel._from_config = classmethod(_from_config)  # type: ignore[arg-type]


def _wrap_save_pretrained() -> None:
    """Make `save_pretrained` of a factorised model write the state dict that it is given.

    It also keeps the card and the report of the folder that the model was loaded from.
    """
    original = PreTrainedModel.save_pretrained
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(
        self: Any, save_directory: Any, is_main_process: bool = True, *rest: Any, **options: Any
    ) -> Any:
        if getattr(getattr(self, "hf_quantizer", None), "method", None) != METHOD:
            return original(self, save_directory, is_main_process, *rest, **options)
        from lrsurgery.checkpoints.pretrained.beside import folder_of, keep_card, keep_report
        from lrsurgery.checkpoints.quantizer.saving import giving

        given = signature.bind(self, save_directory, is_main_process, *rest, **options).arguments.get("state_dict")
        whole = given is None and not getattr(self, "_hf_peft_config_loaded", False)
        folder = Path(save_directory)
        writes = self.should_save_on_this_rank(is_main_process)
        ours = writes and whole and folder_of(self) is not None and not folder.is_file()
        holds = ours and keep_card(self, folder)
        if holds and options.get("push_to_hub"):  # uploaded before the digests of what is being written are known
            folder.mkdir(parents=True, exist_ok=True)
            keep_report(self, folder, holds, ())
        with giving(self, given):
            done = original(self, save_directory, is_main_process, *rest, **options)
        if ours:
            keep_report(self, folder, holds, {file.name for pattern in WRITTEN for file in folder.glob(pattern)})
        return done

    PreTrainedModel.save_pretrained = save_pretrained


WRAPPED = "_lrsurgery"  # mark of a class whose methods are wrapped
if not hasattr(PreTrainedModel, WRAPPED):
    _wrap_from_config()
    _wrap_save_pretrained()
    setattr(PreTrainedModel, WRAPPED, True)
