"""Low-rank surgery on pretrained transformers and timm models: factorise, heal, report, ship.

The names below load on first use, so that importing the package costs next to nothing. `import lrsurgery.hf` makes
factorised checkpoints load through transformers' own `from_pretrained`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrsurgery import errors as errors
    from lrsurgery import linalg as linalg
    from lrsurgery.calibration import collect_statistics as collect_statistics
    from lrsurgery.decay import FrobeniusDecay as FrobeniusDecay
    from lrsurgery.errors import SurgeryError as SurgeryError
    from lrsurgery.export import export_dense as export_dense
    from lrsurgery.factorise import densify_ as densify_
    from lrsurgery.factorise import factorise_ as factorise_
    from lrsurgery.factorise import factorise_checkpoint as factorise_checkpoint
    from lrsurgery.loading import load_model as load_model
    from lrsurgery.moments import Statistics as Statistics
    from lrsurgery.report import Report as Report
    from lrsurgery.rows import rank_report as rank_report

__version__ = "0.1.0"

_HOME = {
    "FrobeniusDecay": "lrsurgery.decay",
    "SurgeryError": "lrsurgery.errors",
    "Report": "lrsurgery.report",
    "Statistics": "lrsurgery.moments",
    "collect_statistics": "lrsurgery.calibration",
    "densify_": "lrsurgery.factorise",
    "export_dense": "lrsurgery.export",
    "factorise_": "lrsurgery.factorise",
    "factorise_checkpoint": "lrsurgery.factorise",
    "load_model": "lrsurgery.loading",
    "rank_report": "lrsurgery.rows",
}
_MODULES = ("errors", "hf", "linalg", "ranks", "layers")

__all__ = ["__version__", *_HOME, *_MODULES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(f"lrsurgery.{name}")
    raise AttributeError(f"module 'lrsurgery' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
