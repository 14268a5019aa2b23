"""Errors meant for the person at the keyboard: one line that says where, what, the bound and what to do."""

from __future__ import annotations


class SurgeryError(Exception):
    """Something the user can put right. The CLI prints it as one line and exits with code 2."""


class RankError(SurgeryError, ValueError):
    """A rank that cannot be read, or that the matrix cannot have."""


class BudgetError(SurgeryError, ValueError):
    """A budget that cannot be read, or that no choice of ranks meets."""


class PlanError(SurgeryError, ValueError):
    """A plan that does not fit the model: an unknown layer name, a glob that matches nothing."""


class SourceError(SurgeryError):
    """A model reference or checkpoint file that cannot be used."""


class OutputError(SurgeryError):
    """An output folder that cannot be written."""


class WeightError(SurgeryError, ValueError):
    """A tensor that cannot be factorised: not finite, of the wrong shape, or beyond LAPACK."""


class RecipeError(SurgeryError, ValueError):
    """A setting of a training run that cannot be used."""


class DataError(SurgeryError):
    """A dataset that cannot be read, or that does not fit the task."""


class TrainingError(SurgeryError):
    """A run that had to stop: what happened, at which step, what to try."""


class CalibrationError(SurgeryError, ValueError):
    """Calibration data or statistics that cannot be used: not finite, of another model, a budget out of reach."""


class StudyError(SurgeryError):
    """A study whose folder or preparation cannot be used."""


class Interrupted(Exception):
    """A run that was asked to stop, and has saved itself; the text says how to go on. The CLI exits with code 130."""
