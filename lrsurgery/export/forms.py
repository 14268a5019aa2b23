"""Export of factorised checkpoints with their layers in another form, a layer at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from lrsurgery.checkpoints.build import build_model
from lrsurgery.checkpoints.format import METHOD
from lrsurgery.checkpoints.loading.check import check_folder
from lrsurgery.checkpoints.mapping import key_map
from lrsurgery.checkpoints.output import OutputOptions, ShardWriter, copy_companions, in_write_order, output_config
from lrsurgery.checkpoints.remote_code.folder import check_code, write_code
from lrsurgery.checkpoints.source import SourceOptions
from lrsurgery.checkpoints.upstream.forms import layers_entry
from lrsurgery.errors import SurgeryError
from lrsurgery.export.parts import Parts, open_parts, read_layer, stems_of
from lrsurgery.factorise.work.jobs import check_finite, check_overflow
from lrsurgery.files.digests import file_digests
from lrsurgery.files.faults import disk_faults
from lrsurgery.files.json import json_text
from lrsurgery.files.locks import locked
from lrsurgery.files.writing import staged, with_name, write_text
from lrsurgery.linalg.factors import Factors, balance_of
from lrsurgery.progress import SILENT, USUAL, Listener
from lrsurgery.report.card import model_card, quality_lines, stages_in
from lrsurgery.report.rows import planned_row, rank_report, replacement_of
from lrsurgery.report.runs import METRICS, RECIPE
from lrsurgery.report.schema import FILE_NAME, Report, Row
from lrsurgery.runtime import versions
from lrsurgery.surgery.apply import factorised_layers, swap_
from lrsurgery.surgery.forms.change import reform_, side_in
from lrsurgery.surgery.layers import FactorisedLayer, Spec
from lrsurgery.surgery.ranks import check_form
from lrsurgery.surgery.shared.modules import SharedLinear
from lrsurgery.surgery.tables.ties import leaders_of_tied
from lrsurgery.units import parse_size


def export_form(
    folder: str | Path,
    output: str | Path,
    *,
    form: str | None = None,
    format_version: int | None = None,
    shard_size: str = "5GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write the factorised checkpoint in `folder` with its layers in `form`, "balanced" or "pivoted", if they have it.

    The product of each layer is the same up to one rounding. `form` None keeps each layer's own. `format_version` is
    that of the output, by default the oldest that holds it; versions of lrsurgery that know format 1 alone read no
    other. Raises SurgeryError that gives the file or layer, the fault and the remedy; nothing is written then.
    """
    options = OutputOptions(shard_size=parse_size(shard_size), overwrite=overwrite)
    source_options = SourceOptions(trust_remote_code=trust_remote_code)
    export_in_form(
        str(folder), Path(output), source_options, options, form=form, version=format_version, listener=USUAL
    )


def export_in_form(
    reference: str,
    output: Path,
    source_options: SourceOptions,
    options: OutputOptions,
    *,
    form: str | None = None,
    version: int | None = None,
    listener: Listener = SILENT,
) -> None:
    """Write a factorised checkpoint with its layers in a form; see `export_form`. Raises SurgeryError."""
    if form is not None:
        check_form(form)
    output = with_name(output)
    with disk_faults(output, lambda: "nothing is written"), locked(output):
        write_in_form(reference, output, source_options, options, form=form, version=version, listener=listener)


def write_in_form(
    reference: str,
    output: Path,
    source_options: SourceOptions,
    options: OutputOptions,
    *,
    form: str | None = None,
    version: int | None = None,
    listener: Listener = SILENT,
) -> None:
    """As `export_in_form`, to a path that is locked."""
    parts = open_parts(reference, output, source_options, overwrite=options.overwrite)
    if options.remote_code:
        check_code(parts.source)
    specs = _specs_in(parts, form)
    entry = layers_entry(specs, version)  # raises before anything is written
    model = build_model(parts.source, device="meta", trust_remote_code=source_options.trust_remote_code)
    swap_(model, specs)
    tripwires = [] if options.remote_code else parts.tripwires
    rewriting = _Rewriting(parts=parts, model=model, names=_choose_names(parts, model), tripwires=tripwires)
    with staged(output, overwrite=options.overwrite) as stage:
        bytes_after = rewriting.write(stage, options.shard_size, listener)
        copy_companions(parts.source, stage)
        lines = _carry_run(parts.source.folder, stage)
        config = output_config(parts.source, model, {})
        config["quantization_config"] = {"quant_method": METHOD, **entry}
        if options.remote_code:
            config = write_code(stage, config, model)
        write_text(stage / "config.json", json_text(config))
        check_folder(stage, reference, unused=parts.unused, trust_remote_code=source_options.trust_remote_code)
        report = _report(parts, model, form, rewriting.balances)
        report = replace(report, bytes_after=bytes_after, files=file_digests(stage))
        write_text(stage / FILE_NAME, report.to_json())
        card = model_card(report, parts.source, output.name, config, lines, options.command)
        write_text(stage / "README.md", card)


def _specs_in(parts: Parts, form: str | None) -> dict[str, Spec]:
    """What the layers are in a form; None keeps that of each."""
    specs = dict(parts.source.layers)
    if form is None:
        return specs
    names = {id(layer): name for name, layer in parts.modules.items() if name in specs}
    stems = stems_of(parts)
    for name, spec in parts.source.layers.items():
        layer = parts.modules[name]
        side = side_in(layer, form)
        if side == spec.side:
            continue
        if side is None or not isinstance(layer, SharedLinear):
            specs[name] = spec._replace(side=side, pivots=None)
        elif layer.leader is layer:  # which layers the pivots are in is known once they are chosen
            read = read_layer(parts, stems[id(layer)], whole=True)
            assert isinstance(read, SharedLinear)
            reform_(read, side)
            for each, original in zip(read.group, layer.group, strict=True):
                other = names[id(original)]
                specs[other] = parts.source.layers[other]._replace(side=side, pivots=each.spec.pivots)
    return specs


def _choose_names(parts: Parts, model: nn.Module) -> dict[str, str]:
    """What the keys of each layer begin with, in the files -> in the output, whose loader must find its parts too."""
    keys, chosen = key_map(parts.source, model), {}
    for stem, layer in parts.layers.items():
        wanted = [key.removeprefix(layer) for key in keys.state if key.startswith(f"{layer}.")]
        names = (stem, layer)
        found = (n for n in names if all(keys.target(f"{n}{part}") == (f"{layer}{part}", None) for part in wanted))
        name = next(found, None)
        if name is None:
            raise SurgeryError(f"{layer}: transformers would rename its factors on loading; its form cannot be changed")
        chosen[stem] = name
    return chosen


@dataclass(kw_only=True)
class _Rewriting:
    """Writing of the weights: layers that change their form one at a time, all other tensors as they are."""

    parts: Parts
    model: nn.Module  # on the meta device, with the layers in their new form
    names: Mapping[str, str]
    tripwires: Sequence[str]  # keys of those that the output has too
    balances: dict[str, float | None] = field(default_factory=dict)  # of the layers that changed, see `Row.balance`
    # the layer read last, with those that share its v, in their new form: what its keys begin with -> layer
    held: dict[str, FactorisedLayer] = field(default_factory=dict)
    partners: dict[str, list[str]] = field(default_factory=dict)  # layer -> those that are tied to it

    def write(self, stage: Path, shard_size: int, listener: Listener) -> int:
        """Write the shards and return the bytes of all tensors."""
        tensors = self.parts.tensors
        copied = {key: key for key in (*self.parts.others, *self.tripwires)}
        changed: dict[str, tuple[torch.dtype, str, str]] = {}  # key in the output -> dtype, stem, part
        every = dict(self.model.named_modules(remove_duplicate=False))
        orders = 0
        tied = leaders_of_tied(factorised_layers(self.model))
        self.partners = {leader: [name for name, of in tied.items() if of == leader] for leader in tied.values()}
        for stem, layer in self.parts.layers.items():
            old, new = self.parts.modules[layer], every[layer]
            assert isinstance(new, FactorisedLayer)
            if old.side == new.side:
                copied |= {f"{self.names[stem]}.{part}": f"{stem}.{part}" for part in old.state_dict()}
                own = self.partners.get(layer, [])
                copied |= {key: key for key, name in self.parts.copies.items() if name in own}
                continue
            orders += 0 if new.order is None else 4 * len(new.order) * (1 + len(self.partners.get(layer, [])))
            for part in new.state_dict():
                if part != "order":  # known no sooner than the weights; see `_add`
                    dtype = tensors.describe(f"{stem}.u.{part.rpartition('.')[2]}")[0]
                    changed[f"{self.names[stem]}.{part}"] = (dtype, stem, part)
        total = len({stem for _, stem, _ in changed.values()})
        writer = ShardWriter(stage, shard_size=shard_size, in_front=orders)
        items = [(tensors.describe(key)[0], name) for name, key in copied.items()]
        items += [(dtype, name) for name, (dtype, *_) in changed.items()]
        done: set[str] = set()
        try:
            for name in in_write_order(items):
                if name in copied:
                    key = copied[name]
                    writer.add_slices(name, *tensors.describe(key), tensors.slices(key))
                    continue
                _, stem, part = changed[name]
                self._add(writer, name, stem, part, every[self.parts.layers[stem]])
                if stem not in done:
                    done.add(stem)
                    listener.progress(self.parts.layers[stem], len(done), total)
            return writer.finish()
        finally:
            writer.close()

    def _add(self, writer: ShardWriter, name: str, stem: str, part: str, new: nn.Module) -> None:
        """Add a part of a layer that changes its form, and its order in front, which is wider than some weights."""
        assert isinstance(new, FactorisedLayer)
        if stem not in self.held:
            layer = read_layer(self.parts, stem, whole=True)
            self.held = self._with_group(stem, layer)
            for each, one in self.held.items():
                for key, tensor in one.state_dict().items():
                    check_finite(tensor, f"{each}.{key}", self.parts.source.reference)
            reform_(layer, new.side)
            for each, one in self.held.items():
                alone = not isinstance(one, SharedLinear)
                self.balances[self.parts.layers[each]] = _balance_of(one) if alone and not one.side else None
        layer = self.held[stem]
        tensor = layer.state_dict()[part]
        check_overflow(tensor, name)
        writer.add(name, tensor)
        if part == "u.weight" and layer.order is not None:
            partners = self.partners.get(self.parts.layers[stem], [])
            for each in (self.names[stem], *partners):
                writer.add_in_front(f"{each}.order", layer.order)

    def _with_group(self, stem: str, layer: FactorisedLayer) -> dict[str, FactorisedLayer]:
        original = self.parts.modules[self.parts.layers[stem]]
        if not isinstance(layer, SharedLinear) or not isinstance(original, SharedLinear):
            return {stem: layer}
        stems = stems_of(self.parts)
        return {stems[id(old)]: new for old, new in zip(original.group, layer.group, strict=True)}


def _balance_of(layer: FactorisedLayer) -> float:
    u, v = (factor.detach() for factor in layer.factors)
    return balance_of(Factors(u, v))


def _carry_run(folder: Path | None, stage: Path) -> list[str]:
    """Copy what a training run left beside its model, and return the card's lines about it."""
    left = [name for name in (RECIPE, METRICS) if folder is not None and (folder / name).is_file()]
    if folder is None or not left:
        return []
    for name in left:
        shutil.copyfile(folder / name, stage / name)
    table = quality_lines(stages_in(folder))
    lines = ["Trained; `recipe.yaml` has every setting, `metrics.jsonl` the course of the run."]
    return [*lines, "", *table] if table else lines


def _report(parts: Parts, model: nn.Module, form: str | None, balances: Mapping[str, float | None]) -> Report:
    """The report of the folder, or one of its layers where it has none, with what the new form stores."""
    folder = parts.source.folder
    if folder is None or not (folder / FILE_NAME).is_file():
        return replace(rank_report(model, measured=False), versions=versions())
    written, layers = Report.read(folder), factorised_layers(model)
    names = {id(layer): name for name, layer in layers.items()}

    def row_of(row: Row) -> Row:
        if row.name not in layers or row.status != "factorised":
            return row
        new = planned_row(replacement_of(row.name, layers[row.name], names))
        return replace(
            row,
            form=new.form,
            parameters_after=new.parameters_after,
            flops_after=None if row.flops_before is None else new.flops_after,
            balance=balances.get(row.name, row.balance),
        )

    rows = tuple(map(row_of, written.rows))
    after = written.parameters_after
    if after is not None:
        was = sum(row.parameters_after or 0 for row in written.factorised)
        after += sum(row.parameters_after or 0 for row in rows if row.status == "factorised") - was
    count = len(balances)
    notes = (*written.notes, *([f"{count} layers were put into the {form} form by lrsurgery export"] if count else []))
    return replace(written, rows=rows, parameters_after=after, versions=versions(), notes=notes)
