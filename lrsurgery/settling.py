"""From a plan to one whose ranks are all known: statistics from calibration, singular values, the budget shared out."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lrsurgery.allocation import share_out
from lrsurgery.budget import Budget
from lrsurgery.calibrate import iter_calibrate, iter_resample
from lrsurgery.checkpoints import Entry
from lrsurgery.errors import OutputError, SurgeryError
from lrsurgery.jobs import stored_dtype, tensor_digest
from lrsurgery.layers import KINDS
from lrsurgery.linalg import singular_values
from lrsurgery.metric import second_order, weighted_values
from lrsurgery.moments import FILE_NAME, Statistics
from lrsurgery.options import Options, pick_device
from lrsurgery.pieces import WorkFolder
from lrsurgery.plan import Kept, Plan, Replaced, settle_all
from lrsurgery.sources import Source
from lrsurgery.spectra import SpectrumCache
from lrsurgery.steps import Note, Progress
from lrsurgery.threads import in_order, layers_at_once, memory


def calibrated(
    source: Source, plan: Plan, options: Options, folder: Path
) -> Generator[Progress | Note, None, Statistics | None]:
    """The statistics that the options ask for, kept in `folder`, from where a resumed job takes them again."""
    if not options.calibration.wanted:
        return None
    if (folder / FILE_NAME).exists():
        return Statistics.read(folder)
    shutil.rmtree(folder, ignore_errors=True)
    found = yield from iter_calibrate(
        source, options.calibration, plan.replaced, folder, seed=options.seed, device=pick_device(options.device),
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    if options.calibration.save is not None:
        _save(folder, options.calibration.save)
    return found


def _save(folder: Path, target: Path) -> None:
    half = target.with_name(f".{target.name}.half")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(folder, half)
        half.rename(target)
    except OSError as e:
        shutil.rmtree(half, ignore_errors=True)
        raise OutputError(f"{target}: cannot be written ({e.strerror or e})") from e


def resampled(
    source: Source, plan: Plan, options: Options, known: Statistics, folder: Path
) -> Generator[Progress | Note, None, Statistics]:
    """The statistics of --sequential, for a plan whose ranks are known."""
    if (folder / FILE_NAME).exists():
        return Statistics.read(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return (
        yield from iter_resample(
            source, options.calibration, plan, known, folder, seed=options.seed, init=options.init,
            device=pick_device(options.device), trust_remote_code=options.trust_remote_code,
        )
    )  # fmt: skip


def settled(plan: Plan, entries: list[Entry], options: Options, parameters: int, statistics: Statistics | None) -> Plan:
    """The plan with every rank known, from singular values, which are kept for the next time.

    With statistics they are those in the layer's metric. `parameters` are the model's.

    Raises SurgeryError that names the layer.
    """
    by_layer, device = _by_layer(entries), pick_device(options.device)
    cache = SpectrumCache() if options.cache else None
    budget = plan.spec.default if isinstance(plan.spec.default, Budget) else None
    weigh = statistics is not None
    rows = [row for row in plan.replaced if row.rank is None or budget is not None or weigh]

    def values_of(row: Replaced) -> Tensor:
        tensor = by_layer[row.name].read()
        digest = tensor_digest(tensor.dtype, tuple(tensor.shape), [tensor])
        metric = statistics.metric(row.name) if statistics is not None else None
        if statistics is not None and metric is not None:
            digest += f"-{statistics.digests[row.name]}"
        known = cache.get(digest, row.kind) if cache else None
        if known is not None:
            return known.values
        matrix = KINDS[row.kind].to_matrix(tensor.to(device))
        try:
            values = singular_values(matrix) if metric is None else weighted_values(matrix, metric)
        except SurgeryError as e:
            raise type(e)(f"{row.name}: {e}") from e
        if cache:
            cache.put(digest, row.kind, values)
        return values

    threads = torch.get_num_threads()
    needs = [memory(row, by_layer[row.name].dtype.itemsize, weighted=weigh) for row in rows]
    at_once = (options.jobs or layers_at_once(needs, threads)) if device.type == "cpu" else 1
    values = dict(zip((row.name for row in rows), in_order(values_of, rows, at_once, threads), strict=True))
    if budget is not None:
        widths = {name: stored_dtype(entry.dtype, options).itemsize for name, entry in by_layer.items()}
        whole = sum(torch.Size(e.shape).numel() * stored_dtype(e.dtype, options).itemsize for e in entries)
        plan = share_out(plan, budget, values, statistics, parameters=parameters, widths=widths, total_bytes=whole)
    else:
        plan = settle_all(plan, lambda row: values[row.name])
    if statistics is None or not statistics.has_gradients:
        return plan
    return plan.with_rows(
        {row.name: replace(row, predicted_loss=second_order(values[row.name], row.rank or 0)) for row in plan.replaced}
    )


def as_agreed(plan: Plan, options: Options, work: WorkFolder) -> tuple[Plan, Statistics | None]:
    """The plan and the statistics that the first process has left in the work folder, for the others."""
    ranks = work.ranks()
    rows = {
        row.name: replace(row, rank=ranks[row.name])
        if not isinstance(ranks[row.name], str)
        else Kept(row.name, row.kind, row.shape, row.parameters, ranks[row.name])
        for row in plan.replaced
    }
    if not options.calibration.wanted:
        return plan.with_rows(rows), None
    if options.calibration.statistics is not None:
        return plan.with_rows(rows), options.calibration.kept()
    folder = work.path / ("sequential" if options.calibration.sequential else "statistics")
    return plan.with_rows(rows), Statistics.read(folder)


def _by_layer(entries: list[Entry]) -> dict[str, Entry]:
    return {e.target.removesuffix(".weight"): e for e in entries if e.target and e.target.endswith(".weight")}
