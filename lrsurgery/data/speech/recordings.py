"""Recordings in a column of the data: decoded, checked for their rate, and made into what the model is fed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lrsurgery.errors import DataError

if TYPE_CHECKING:
    from lrsurgery.checkpoints.source import Source
    from lrsurgery.data.batches import Rows

AUDIO_COLUMNS = ("audio", "speech", "sound")
SOUNDS = ("input_features", "input_values")  # arguments of models of sound


class Recordings:
    """The recordings of one column, by the checkpoint's feature extractor.

    Raises DataError for a checkpoint without an extractor.
    """

    def __init__(
        self, source: Source, rows: Rows, column: str, takes: Sequence[str], trust_remote_code: bool = False
    ) -> None:
        from transformers import AutoFeatureExtractor

        try:
            extractor = AutoFeatureExtractor.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
            rate = int(extractor.sampling_rate)
        except Exception as e:
            raise DataError(
                f"{source.reference}: no feature extractor that loads; sound needs preprocessor_config.json in the"
                " folder"
            ) from e
        self.extractor: Any = extractor
        self.note = f"sound ({column}) at {rate:,} Hz, by the checkpoint's {type(extractor).__name__}"
        self._rate, self._takes, self._column, self._reference = rate, tuple(takes), column, rows.reference
        self._table = _decoded(rows, column, rate)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """What the model is fed of one recording, by name: arrays without the axis of a batch. Raises DataError."""
        try:
            samples, rate = _samples(self._table[index][self._column])
        except Exception as e:  # of the decoder, which is another package
            said = " ".join(str(e).split())[:200]
            raise DataError(
                f"{self._reference}: sound {index} does not decode ({said}); give arrays of samples, or a column of"
                f" {next(name for name in SOUNDS if name in self._takes)}"
            ) from e
        if rate is not None and rate != self._rate:
            raise DataError(
                f"{self._reference}: sound {index} has {rate:,} samples a second, the model takes {self._rate:,};"
                " resample the data"
            )
        made = self.extractor(samples, sampling_rate=self._rate, return_tensors="np")
        return {name: value[0] for name, value in made.items() if name in self._takes}


def _decoded(rows: Rows, column: str, rate: int) -> Any:
    """The column alone, its sound decoded and resampled by `datasets` where it holds files."""
    from datasets import Audio

    table = rows.rows.select_columns([column])
    return table.cast_column(column, Audio(sampling_rate=rate)) if isinstance(table.features[column], Audio) else table


def _samples(value: Any) -> tuple[Any, int | None]:
    """Samples (n,) and their number a second, None where the data does not say it."""
    if hasattr(value, "get_all_samples"):  # of torchcodec
        found = value.get_all_samples()
        return found.data.mean(0).numpy(), int(found.sample_rate)
    if isinstance(value, Mapping):
        rate = value.get("sampling_rate")
        return np.asarray(value["array"], np.float32), None if rate is None else int(rate)
    return np.asarray(value, np.float32), None
