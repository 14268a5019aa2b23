"""From checkpoint to checkpoint, one tensor at a time: the one path for models of every size."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrsurgery import __version__
from lrsurgery.cards import model_card
from lrsurgery.checkpoints import Checkpoint, Entry, Names, choose_names, list_entries, open_checkpoint, output_config
from lrsurgery.errors import OutputError, SurgeryError, WeightError
from lrsurgery.layers import KINDS, factor_weights
from lrsurgery.linalg import spectral_factors
from lrsurgery.options import DTYPES, Options, pick_device
from lrsurgery.plan import Plan, Replaced, settle_all
from lrsurgery.report import FILE_NAME, Report, Row, measured_row, plan_report
from lrsurgery.skeletons import check_not_converted
from lrsurgery.sources import Source, resolve
from lrsurgery.staging import check_output, copy_companions, staged
from lrsurgery.surgery import decompose
from lrsurgery.tensors import ShardWriter, as_bytes, in_write_order, parse_size, write_text


@dataclass(frozen=True)
class Progress:
    """A layer was dealt with."""

    name: str
    done: int
    total: int


def plan_checkpoint(reference: str, options: Options) -> Report:
    """What `factorise` would do. Weights are read only where the rank policy needs their singular values."""
    options.check()
    checkpoint, plan = _open(resolve_source(reference, options), options)
    if plan.needs_spectra:
        entries = _by_layer(list_entries(checkpoint, {row.name for row in plan.replaced}))
        device = pick_device(options.device)

        def values_of(row: Replaced) -> Tensor:
            try:
                return spectral_factors(KINDS[row.kind].to_matrix(entries[row.name].read().to(device)), 1).values
            except WeightError as e:
                raise WeightError(f"{row.name}: {e}") from e

        plan = settle_all(plan, values_of)
    return plan_report(plan, checkpoint.parameters, command=options.command, options=options.recorded())


def resolve_source(reference: str, options: Options) -> Source:
    return resolve(
        reference, revision=options.revision, architecture=options.architecture, weights=not options.from_scratch
    )


def _open(source: Source, options: Options) -> tuple[Checkpoint, Plan]:
    check_not_converted(source)
    checkpoint = open_checkpoint(
        source,
        trust_remote_code=options.trust_remote_code,
        from_scratch_seed=options.seed if options.from_scratch else None,
    )
    return checkpoint, options.plan_for(checkpoint.model, checkpoint.tied)


def _by_layer(entries: list[Entry]) -> dict[str, Entry]:
    return {e.target.removesuffix(".weight"): e for e in entries if e.target and e.target.endswith(".weight")}


def iter_factorise(reference: str, output: Path, options: Options) -> Generator[Progress, None, Report]:
    """As `factorise_checkpoint`, one layer a step; the report is the generator's value.

    Raises SurgeryError; an abandoned generator leaves nothing behind.
    """
    options.check()
    source = resolve_source(reference, options)
    check_output(output, source, options.overwrite)
    checkpoint, plan = _open(source, options)
    rows = {row.name: row for row in plan.replaced}
    entries = list_entries(checkpoint, set(rows))
    parameters = checkpoint.parameters
    aliases = _aliases(checkpoint.model, rows)
    buffers = {name for name, _ in checkpoint.model.named_buffers()}
    # last use of the dense skeleton: it is factorised here
    names = choose_names(checkpoint, entries, rows)
    with staged(output, overwrite=options.overwrite) as stage:
        stream = _Stream(checkpoint, plan, options, entries, aliases, buffers, names, stage)
        _check_space(stage, stream)
        yield from stream.run()
        layers = {
            row.name: {"kind": row.kind, "rank": row.rank}
            for row in (stream.settled[name] for name in rows)
            if isinstance(row, Replaced)
        }
        if not layers:
            raise SurgeryError(f"nothing to factorise at rank {plan.spec}: every layer would be over break-even")
        report = plan_report(
            plan.with_rows(stream.settled),
            parameters,
            stream.measured,
            bytes_before=stream.bytes_before,
            bytes_after=stream.bytes_after,
            source={
                "reference": reference,
                "hub_id": source.hub_id,
                "revision": source.revision,
                "digest": stream.digest,
            },
            command=options.command,
            options=options.recorded(),
            versions=versions(),
            notes=_notes(options, checkpoint),
        )
        copy_companions(source, stage)
        config = output_config(checkpoint, layers, DTYPES[options.dtype])
        write_text(stage / "config.json", json.dumps(config, indent=2) + "\n")
        write_text(stage / FILE_NAME, report.to_json())
        write_text(stage / "README.md", model_card(report, source, output.name))
    return report


def _aliases(model: nn.Module, rows: dict[str, Replaced]) -> dict[str, str]:
    """Every name of a planned layer -> the name in the plan, for layers that a model registers twice."""
    named = {id(module): name for name, module in model.named_modules()}
    every = model.named_modules(remove_duplicate=False)
    return {name: named[id(module)] for name, module in every if named[id(module)] in rows}


def _check_space(stage: Path, stream: _Stream) -> None:
    free = shutil.disk_usage(stage).free
    if stream.expected_bytes > free:
        raise OutputError(
            f"{stage.parent}: {stream.expected_bytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
        )


class _Stream:
    """One pass over a checkpoint's tensors: read one, factorise or pass it through, write it, let it go."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        options: Options,
        entries: list[Entry],
        aliases: dict[str, str],
        buffers: set[str],
        names: dict[str, Names],
        stage: Path,
    ) -> None:
        self.settled: dict[str, Any] = {row.name: row for row in plan.replaced}
        self.measured: dict[str, Row] = {}
        self.bytes_before = self.bytes_after = 0
        self._checkpoint, self._plan, self._options = checkpoint, plan, options
        self._aliases, self._buffers, self._names = aliases, buffers, names
        self._device = pick_device(options.device)
        self._dtype = DTYPES[options.dtype]
        self._hash = hashlib.blake2b(digest_size=16)
        self._writer = ShardWriter(stage, shard_size=parse_size(options.shard_size))
        self._entries = {entry.key: entry for entry in entries}
        self._order = list(in_write_order([(self._stored_dtype(e.dtype), e.key) for e in entries]))
        # a weight goes before its layer's bias of the same width: by then it is known whether the layer stays dense
        self._order.sort(key=lambda key: (-self._width(key), self._layer_of(key)[1] == "bias"))
        self._by_target = {entry.target: entry for entry in entries if entry.target}

    def _stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype

    def _width(self, key: str) -> int:
        return self._stored_dtype(self._entries[key].dtype).itemsize

    def _layer_of(self, key: str) -> tuple[str | None, str]:
        """(planned layer, "weight" or "bias") that a key belongs to; None for what passes through."""
        module, _, part = (self._entries[key].target or "").rpartition(".")
        return self._aliases.get(module), part

    @property
    def digest(self) -> str:
        """Of every tensor as it was read, with its name."""
        return self._hash.hexdigest()

    @property
    def expected_bytes(self) -> int:
        total = 0
        for key, entry in self._entries.items():
            layer, part = self._layer_of(key)
            row = self.settled.get(layer) if layer else None
            count = int(torch.Size(entry.shape).numel())
            if row is not None and part == "weight":
                count = row.rank * (row.rows + row.columns) if row.rank is not None else count
            total += count * self._stored_dtype(entry.dtype).itemsize
        return total

    def run(self) -> Generator[Progress, None, None]:
        total, done = len(self._plan.replaced), 0
        seen: set[tuple[str, str]] = set()
        try:
            for key in self._order:
                layer, part = self._layer_of(key)
                if layer is not None:
                    if (layer, part) in seen:
                        continue  # the same layer under its second name
                    seen.add((layer, part))
                tensor = self._read(self._entries[key])
                if layer is not None and part == "weight":
                    self._replace(layer, key, tensor)
                    done += 1
                    yield Progress(layer, done, total)
                elif layer is not None and part == "bias" and self._is_replaced(layer):
                    self._write(self._names[layer].bias, tensor)
                elif not self._is_copy(key, tensor):
                    self._write(key, tensor)
            self.bytes_after = self._writer.finish()
        finally:
            self._writer.close()

    def _is_replaced(self, layer: str) -> bool:
        row = self.settled[layer]
        if isinstance(row, Replaced) and row.rank is None:
            # a bias wider than its weight comes first, and its name hangs on what becomes of the layer
            weight = next(e for k, e in self._entries.items() if self._layer_of(k) == (layer, "weight")).read()
            values = spectral_factors(KINDS[row.kind].to_matrix(weight.to(self._device)), 1).values
            self.settled[layer] = self._plan.settle(row, values)
        return isinstance(self.settled[layer], Replaced)

    def _read(self, entry: Entry) -> Tensor:
        tensor = entry.read()
        self.bytes_before += tensor.numel() * tensor.element_size()
        self._hash.update(entry.key.encode())
        if tensor.numel():
            self._hash.update(as_bytes(tensor))
        is_weight = entry.target is not None and entry.target not in self._buffers and tensor.is_floating_point()
        if is_weight and not bool(torch.isfinite(tensor).all()):
            raise WeightError(
                f"{self._checkpoint.source.reference}: {entry.key} holds NaN or Inf; repair the checkpoint first"
            )
        return tensor

    def _is_copy(self, key: str, tensor: Tensor) -> bool:
        """Whether this is a second copy of the tensor that it is tied to, which the loader restores by itself."""
        stands_for = self._by_target.get(self._checkpoint.tied.get(self._entries[key].target or "", ""))
        return stands_for is not None and torch.equal(stands_for.read(), tensor)

    def _replace(self, layer: str, key: str, tensor: Tensor) -> None:
        row = self.settled[layer]
        if not isinstance(row, Replaced):
            self._write(key, tensor)
            return
        dense = tensor.to(self._device)

        def choose(values: Tensor) -> int:
            return self._plan.spec.rank_of(layer, row.rows, row.columns, values)

        result = decompose(row, dense, self._options.init, self._options.seed, choose)
        if row.rank is None:
            self.settled[layer] = self._plan.settle(row, result.values)
            if not isinstance(self.settled[layer], Replaced):
                self._write(key, tensor)
                return
            row = self.settled[layer]
        stored = dense.to(self._stored_dtype(dense.dtype))
        u, v = factor_weights(row.kind, stored, result.factors)
        kind = KINDS[row.kind]
        self.measured[layer] = measured_row(row, kind.to_matrix(dense), kind.to_matrices(u, v), result.values)
        names = self._names[layer]
        if len(self.measured) == 1:
            # the tripwire: a load that does not know this format fails on its shape, and not in silence
            self._writer.add(names.dense, torch.empty(0, dtype=u.dtype))
        self._write(names.u, u)
        self._write(names.v, v)

    def _write(self, key: str, tensor: Tensor) -> None:
        stored = tensor.to(self._stored_dtype(tensor.dtype))
        if stored.dtype != tensor.dtype and not bool(torch.isfinite(stored).all()):
            raise WeightError(f"{key}: overflows {stored.dtype}; choose another --dtype")
        self._writer.add(key, stored)


def _notes(options: Options, checkpoint: Checkpoint) -> tuple[str, ...]:
    notes = []
    if options.init != "spectral" and not options.from_scratch:
        notes.append(f"--init {options.init} gives up the pretrained values: the model must be trained again")
    if options.from_scratch:
        notes.append("initialised from its config, no pretrained weight is left: the model must be trained")
    if checkpoint.unused:
        listed = ", ".join(checkpoint.unused[:3]) + (", ..." if len(checkpoint.unused) > 3 else "")
        notes.append(
            f"passed through, though the model class does not use them: {len(checkpoint.unused)} tensors ({listed})"
        )
    return tuple(notes)


def versions() -> dict[str, str]:
    """Of this package and of those that decide the numbers."""
    from importlib.metadata import version

    others = ("torch", "transformers", "timm", "safetensors")
    return {"lrsurgery": __version__, **{name: version(name) for name in others}}
