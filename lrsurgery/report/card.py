"""Model cards: README.md of an output folder, as the hub reads it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrsurgery.checkpoints.source import Source
from lrsurgery.errors import SourceError
from lrsurgery.report.hub import HUB, card_data, head_of, is_hub_id
from lrsurgery.report.runs import read_metrics, stages_of
from lrsurgery.report.schema import Report, Row

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

TABLE_ROWS = 40
NO_PART_OF_IT = ("--resume",)  # of a command: it changes nothing in the output, so nothing in its card
CITATION = """\
Cite the base model as its authors ask for it, and the method as

```bibtex
@article{kamalakara2022exploring,
  title   = {Exploring Low Rank Training of Deep Neural Networks},
  author  = {Kamalakara, Siddhartha Rao and Locatelli, Acyr and Venkitesh, Bharat and Ba, Jimmy and Gal, Yarin and
             Gomez, Aidan N.},
  journal = {arXiv preprint arXiv:2209.13569},
  year    = {2022}
}
```"""

# column, what a row shows there; None where it is not known. A column that no row knows is left out
COLUMNS: dict[str, Callable[[Row], str | None]] = {
    "layer": lambda row: f"`{row.name}`",
    "kind": lambda row: row.kind,
    "rank": lambda row: str(row.rank),
    "full rank": lambda row: str(row.full_rank),
    "parameters": lambda row: f"{row.parameters_after:,}",
    "kept": lambda row: _percent((row.parameters_after or 0) / row.parameters_before),
    "energy kept": lambda row: _percent(row.energy_kept),
    "relative error": lambda row: _percent(row.relative_error),
    "predicted loss": lambda row: None if row.predicted_loss is None else f"{row.predicted_loss:.3g}",
}


def model_card(
    report: Report, source: Source, name: str, config: Mapping[str, Any], training: Sequence[str] = ()
) -> str:
    """What was done, at what cost, how to load the result.

    `name` is the output folder's, `config` its config.json, `training` are Markdown lines about a training run.
    """
    options, former = report.options, _report_of(source)
    data = card_data(
        source, config, trained=bool(training), fresh=bool(options.get("from_scratch")), data=options.get("data")
    )
    low_rank = bool(report.factorised)
    count = len(report.factorised)
    done = [f"{count} layers made low rank"] if low_rank else []
    done += ["trained"] if training else []
    lines = [
        f"{_link(source)}, {' and '.join(done)} by lrsurgery.",
        "",
        *_loading(source, name, config, low_rank),
        "## What was done",
        "",
        *_commands(former.command if former else None, report.command),
        *([] if training or report.command else [f"Options: `{json.dumps(options)}`", ""]),
        *([*training, ""] if training else []),
        *(f"Note: {note}.\n" for note in report.notes),
        *_size(report),
        *(_layers(report) if low_rank else []),
    ]
    return _card(data, name, lines)


def dense_card(source: Source, name: str, config: Mapping[str, Any], command: str | None = None) -> str:
    """The card of a dense export of the folder `source`; `name`, `config` as for `model_card`."""
    report = _report_of(source)
    lines = [
        f"{_link(source)}, a model made low rank by lrsurgery, multiplied out into ordinary layers again. It loads with"
        " nothing but its own library; it is as large as a dense model, and as good as the low-rank one.",
        "",
        *_loading(source, name, config, low_rank=False),
        "## What was done",
        "",
        *_commands(report.command if report else None, command),
    ]
    if report is not None and report.parameters_after is not None:
        lines += [f"{len(report.factorised)} layers had been made low rank.", ""]
        lines += [
            "| | low rank | this model |",
            "|---|---|---|",
            f"| parameters | {report.parameters_after:,} | {report.parameters_before:,} |",
            "",
        ]
    table = quality_lines(_stages(source.folder)) if source.folder else []
    lines += [*table, ""] if table else []
    return _card(card_data(source, config), name, lines)


def _report_of(source: Source) -> Report | None:
    """The source's own report; None where there is none that can be read, which a card can do without."""
    try:
        return Report.read(source.folder) if source.folder else None
    except SourceError:
        return None


def training_lines(recipe: Any, steps: int, stages: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The card's lines about a training run: its settings in one sentence, and what was measured at each stage."""
    decay = f"{recipe.decay} decay of strength {recipe.decay_strength:g}" if recipe.decay != "none" else "no decay"
    teacher = f", teacher `{public_name(recipe.teacher)}`" if recipe.teacher else ""
    lines = [
        f"Trained for {steps} steps on `{public_name(recipe.data or '')}` with {recipe.optimizer}, learning rate"
        f" {recipe.lr:g} ({recipe.schedule}), {decay} on the factors{teacher}; `recipe.yaml` has every setting,"
        " `metrics.jsonl` the course of the run.",
    ]
    table = quality_lines(stages)
    if not table:
        return lines
    split = f", split `{recipe.eval_split}`" if recipe.eval_split else ""
    return [*lines, "", f"Measured on `{public_name(recipe.eval_data or recipe.data or '')}`{split}:", "", *table]


def _card(data: ModelCardData, name: str, lines: Sequence[str]) -> str:
    licence = data.get("license")
    named = ", ".join(licence) if isinstance(licence, list) else data.get("license_name") or licence
    link = data.get("license_link")
    named = f"[{named}]({link})" if link else named
    about = (
        f"That of the base model: {named}."
        if named
        else "The model that this was made from names none; look for its terms before you share this one."
    )
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---",
            f"# {name}",
            "",
            *lines,
            "## Licence",
            "",
            about,
            "",
            "## Citation",
            "",
            CITATION,
            "",
        ]
    )


def _link(source: Source) -> str:
    return f"[{source.hub_id}]({HUB}/{source.hub_id})" if source.hub_id else f"`{source.name}`"


def public_name(reference: str) -> str:
    """A model or data as a card names it: a hub id, and of what lies on a disk the name alone."""
    return reference if is_hub_id(reference) else Path(reference).name


def _loading(source: Source, name: str, config: Mapping[str, Any], low_rank: bool) -> list[str]:
    auto = "AutoModelForImageClassification" if source.library == "timm" else head_of(config)[0]
    trusted = ", trust_remote_code=True" if source.library == "transformers" and config.get("auto_map") else ""
    through_transformers = [
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("{name}"{trusted})',
    ]
    if source.library == "timm":
        timm = [
            "import timm",
            "",
            f'model = timm.create_model("local-dir:{name}", pretrained=True)  # "hf-hub:ID" once it is on the hub',
        ]
        ours = ["import lrsurgery", "", f'model = lrsurgery.load_model("{name}")  # the timm module']
        first = ours if low_rank else timm
    else:
        first = []
    if low_rank:
        through_transformers = [
            "import lrsurgery.hf  # registers the format with transformers",
            *through_transformers,
        ]
    needs = "With lrsurgery installed (`pip install lrsurgery`)" if low_rank else "With nothing but its own library"
    lines = ["## How to load it", "", f"{needs}; put the hub id in place of the folder where it is on the hub.", ""]
    for code in filter(None, (first, through_transformers)):
        lines += ["```python", *code, "```", ""]
    if low_rank:
        folder = shlex.quote(name)
        lines += [
            "As ordinary dense layers, for programs that know nothing of lrsurgery:",
            "",
            "```bash",
            f"lrsurgery export {folder} --to dense --output {shlex.quote(f'{name}-dense')}",
            "```",
            "",
        ]
    return lines


def _commands(*commands: str | None) -> list[str]:
    shown = [_cleaned(command) for command in commands if isinstance(command, str) and command]
    return ["Made by", "", "```bash", *shown, "```", ""] if shown else []


def _cleaned(command: str) -> str:
    try:
        return shlex.join(word for word in shlex.split(command) if word not in NO_PART_OF_IT)
    except ValueError:  # not one of ours, though a report says so
        return command


def _size(report: Report) -> list[str]:
    sizes = (
        ("parameters", report.parameters_before, report.parameters_after),
        ("bytes of the weights", report.bytes_before, report.bytes_after),
    )
    lines = ["## Size", "", "| | before | after | kept |", "|---|---|---|---|"]
    for what, before, after in sizes:
        if after is not None:
            former = ("", "") if before is None else (f"{before:,}", f"{after / before:.1%}" if before else "")
            lines.append(f"| {what} | {former[0]} | {after:,} | {former[1]} |")
    return [*lines, ""]


def _layers(report: Report) -> list[str]:
    rows, dense = report.factorised, report.dense
    lines = [f"## Layers\n\n{len(rows)} are low rank, {len(dense)} stayed dense.", ""]
    shown = {title: [show(row) for row in rows[:TABLE_ROWS]] for title, show in COLUMNS.items()}
    shown = {title: cells for title, cells in shown.items() if any(cells)}
    lines += [f"| {' | '.join(shown)} |", "|---" * len(shown) + "|"]
    lines += [f"| {' | '.join(cell or '' for cell in cells)} |" for cells in zip(*shown.values(), strict=True)]
    if len(rows) > TABLE_ROWS:
        lines.append(f"\n{len(rows) - TABLE_ROWS} more stand in `rank_report.json`.")
    if dense:
        reasons: dict[str, list[Row]] = {}
        for row in dense:
            reasons.setdefault(row.reason or "", []).append(row)
        lines += ["", "| why they stayed dense | layers | parameters | the first |", "|---|---|---|---|"]
        for reason, kept in list(reasons.items())[:TABLE_ROWS]:
            parameters = sum(row.parameters_before for row in kept)
            lines.append(f"| {reason} | {len(kept)} | {parameters:,} | `{kept[0].name}` |")
    return [*lines, ""]


def quality_lines(stages: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A table of what was measured at each stage; no lines where nothing was."""
    measured = {name: values for name, values in stages.items() if values}
    if not measured:
        return []
    columns = [c for c in ("loss", "perplexity", "top1", "top5") if all(c in v for v in measured.values())]
    lines = [f"| quality | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return [*lines, *(f"| {name} | {' | '.join(f'{v[c]:.4f}' for c in columns)} |" for name, v in measured.items())]


def _stages(folder: Path) -> dict[str, dict[str, float]]:
    """What the run that made a folder measured at each stage; empty where there was none."""
    records = read_metrics(folder)
    try:
        return stages_of([r for r in records if "eval" in r], records[-1]["stage"]) if records else {}
    except (KeyError, TypeError):  # somebody else's file of that name
        return {}


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.2%}"
