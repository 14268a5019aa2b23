"""Low-rank surgery on pretrained transformers and timm models: factorise, heal, report, ship.

The names below load on first use, so that importing the package costs next to nothing. Factorised checkpoints load
through transformers' own `from_pretrained` where the package is installed; `import lrsurgery.hf` sees to it elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrsurgery import errors as errors
    from lrsurgery import linalg as linalg
    from lrsurgery.calibration.collect import collect_statistics as collect_statistics
    from lrsurgery.calibration.statistics import Statistics as Statistics
    from lrsurgery.checkpoints.load import load_model as load_model
    from lrsurgery.checkpoints.loading.modules import load_into_ as load_into_
    from lrsurgery.checkpoints.output import save_model as save_model
    from lrsurgery.errors import SurgeryError as SurgeryError
    from lrsurgery.export.forms import export_form as export_form
    from lrsurgery.export.quantised import export_quantised as export_quantised
    from lrsurgery.export.targets import export_dense as export_dense
    from lrsurgery.export.targets import export_graph as export_graph
    from lrsurgery.factorise.checkpoint import factorise_checkpoint as factorise_checkpoint
    from lrsurgery.factorise.memory import balance_ as balance_
    from lrsurgery.factorise.memory import densify_ as densify_
    from lrsurgery.factorise.memory import factorise_ as factorise_
    from lrsurgery.factorise.memory import pivot_ as pivot_
    from lrsurgery.factorise.options import Calibration as Calibration
    from lrsurgery.factorise.refining import refine_checkpoint as refine_checkpoint
    from lrsurgery.measure.evaluate import evaluate as evaluate
    from lrsurgery.refine.options import Refinement as Refinement
    from lrsurgery.refine.walk import refine_ as refine_
    from lrsurgery.report.rows import rank_report as rank_report
    from lrsurgery.report.schema import Report as Report
    from lrsurgery.surgery import layers as layers
    from lrsurgery.surgery import ranks as ranks
    from lrsurgery.surgery.apply import factorised_layers as factorised_layers
    from lrsurgery.surgery.decay import FrobeniusDecay as FrobeniusDecay
    from lrsurgery.surgery.forms.layout import prepare_for_inference_ as prepare_for_inference_
    from lrsurgery.training.finetune import finetune as finetune
    from lrsurgery.training.loop.decay import FrobeniusDecayCallback as FrobeniusDecayCallback

__version__ = "0.2.0"

_HOME = {
    "Calibration": "lrsurgery.factorise.options",
    "FrobeniusDecay": "lrsurgery.surgery.decay",
    "FrobeniusDecayCallback": "lrsurgery.training.loop.decay",
    "Report": "lrsurgery.report.schema",
    "Statistics": "lrsurgery.calibration.statistics",
    "SurgeryError": "lrsurgery.errors",
    "balance_": "lrsurgery.factorise.memory",
    "collect_statistics": "lrsurgery.calibration.collect",
    "densify_": "lrsurgery.factorise.memory",
    "evaluate": "lrsurgery.measure.evaluate",
    "export_dense": "lrsurgery.export.targets",
    "export_form": "lrsurgery.export.forms",
    "export_quantised": "lrsurgery.export.quantised",
    "export_graph": "lrsurgery.export.targets",
    "factorise_": "lrsurgery.factorise.memory",
    "factorise_checkpoint": "lrsurgery.factorise.checkpoint",
    "refine_checkpoint": "lrsurgery.factorise.refining",
    "refine_": "lrsurgery.refine.walk",
    "Refinement": "lrsurgery.refine.options",
    "factorised_layers": "lrsurgery.surgery.apply",
    "finetune": "lrsurgery.training.finetune",
    "load_into_": "lrsurgery.checkpoints.loading.modules",
    "load_model": "lrsurgery.checkpoints.load",
    "pivot_": "lrsurgery.factorise.memory",
    "prepare_for_inference_": "lrsurgery.surgery.forms.layout",
    "rank_report": "lrsurgery.report.rows",
    "save_model": "lrsurgery.checkpoints.output",
}
_MODULES = {
    "errors": "lrsurgery.errors",
    "hf": "lrsurgery.hf",
    "layers": "lrsurgery.surgery.layers",
    "linalg": "lrsurgery.linalg",
    "ranks": "lrsurgery.surgery.ranks",
    "timm": "lrsurgery.timm",
}

__all__ = ["__version__", *_HOME, *_MODULES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(_MODULES[name])
    raise AttributeError(f"module 'lrsurgery' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
