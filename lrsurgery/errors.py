"""Errors for the user: one line that gives the place, the fault, the bound and the remedy."""

from __future__ import annotations


class SurgeryError(Exception):
    """Base class of errors that the user can correct. The CLI prints one line and exits with `exit_code`."""

    exit_code = 2


class RankError(SurgeryError, ValueError):
    """A rank that cannot be parsed, or that exceeds the full rank of the matrix."""


class BudgetError(SurgeryError, ValueError):
    """A budget that cannot be parsed, or that no choice of ranks meets."""


class PlanError(SurgeryError, ValueError):
    """A plan that does not fit the model: an unknown layer name, a glob that matches nothing."""


class SourceError(SurgeryError):
    """A model reference or checkpoint file that cannot be used."""


class OutputError(SurgeryError):
    """An output folder that cannot be written."""


class WeightError(SurgeryError, ValueError):
    """A tensor that cannot be factorised: not finite, of the wrong shape, or no LAPACK driver converges on it."""


class RecipeError(SurgeryError, ValueError):
    """An invalid setting of a training run."""


class DataError(SurgeryError):
    """A dataset that cannot be read, or that does not fit the task."""


class TrainingError(SurgeryError):
    """A training run that had to stop; the text gives the cause, the step and a remedy."""


class CalibrationError(SurgeryError, ValueError):
    """Calibration data or statistics that cannot be used: not finite, or of another model."""


class StudyError(SurgeryError):
    """A study whose folder or preparation cannot be used."""


class Interrupted(Exception):
    """A job that stopped on request and saved its state; the text says how to resume. The CLI exits with code 130."""
