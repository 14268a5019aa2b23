"""Model cards: README.md of an output folder, as the hub reads it; the text is in card.md.jinja."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lrsurgery.checkpoints.format import ENTRY, without_code
from lrsurgery.checkpoints.source import Source
from lrsurgery.errors import SourceError
from lrsurgery.files.json import Json
from lrsurgery.report.hub import HUB, card_data, head_of, is_hub_id
from lrsurgery.report.runs import read_metrics, stages_of
from lrsurgery.report.schema import Report, Row
from lrsurgery.report.views.columns import BY_KEY, QUALITY, Column, form_words
from lrsurgery.text import code, code_block, markdown

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

TEMPLATE = Path(__file__).with_name("card.md.jinja")
TABLE_ROWS = 40
NO_PART_OF_IT = ("--resume",)  # of a command: it changes nothing in the output, so nothing in its card

NEEDS = {
    "low rank": "With lrsurgery installed (`pip install lrsurgery`), which is enough",
    "remote": "With transformers alone: `modeling_lowrank.py` beside the weights has the code of the layers",
    "dense": "With nothing but its own library",
}

# columns of the layers' table and how their values are written; one that no layer has a value for is left out
COLUMNS = {
    "name": "{}",
    "kind": "{}",
    "rank": "{}",
    "full_rank": "{}",
    "parameters_after": "{:,}",
    "kept": "{:.2%}",
    "energy_kept": "{:.2%}",
    "relative_error": "{:.2%}",
    "predicted_loss": "{:.3g}",
}
TITLES = {"parameters_after": "parameters", "kept": "kept"}  # where the column's own is not a card's


def model_card(
    report: Report,
    source: Source,
    name: str,
    config: Json,
    training: Sequence[str] = (),
    then: str | None = None,
) -> str:
    """The card of a model made from `source`: what was done, at what cost, how to load the result.

    `name` is the output folder's, `config` its config.json, `training` are Markdown lines about a training run, and
    `then` is the command that wrote the output after the report's own.
    """
    options, former = report.options, _report_of(source)
    count = len(report.factorised)
    done = [f"{count} layers made low rank"] if count else []
    done += ["trained"] if training else []
    paragraphs = [] if training or report.command else [f"Options: {code(json.dumps(options))}"]
    paragraphs += ["\n".join(training)] if training else []
    if report.share_saved_by_form is not None:
        words = form_words(report)
        paragraphs.append(f"{words[0].upper()}{words[1:]}.")
    if report.loss_check is not None:
        paragraphs.append(f"Loss right after surgery: {markdown(report.loss_check['text'])}.")
    if report.refinement is not None:
        paragraphs.append(f"Refined: {markdown(report.refinement['text'])}.")
    if report.choice is not None:
        paragraphs.append("\n".join(f"- {markdown(line)}" for line in report.choice["lines"]))
    paragraphs += [f"Note: {markdown(note)}." for note in report.notes]
    return _filled(
        source,
        name,
        config,
        trained=bool(training),
        fresh=bool(options.get("from_scratch")),
        data=options.get("data"),
        low_rank=bool(count),
        done=f"{' and '.join(done)} by lrsurgery.",
        commands=list(dict.fromkeys([former.command if former else None, report.command, then])),
        paragraphs=paragraphs,
        report=report,
    )


def dense_card(source: Source, name: str, config: Json, command: str | None = None) -> str:
    """The card of a dense export of the folder `source`; `name`, `config` as for `model_card`."""
    former = _report_of(source)
    paragraphs = []
    if former is not None and former.parameters_after is not None:
        paragraphs = [
            f"{len(former.factorised)} layers had been made low rank.",
            "| | low rank | this model |\n|---|---|---|\n"
            f"| parameters | {former.parameters_after:,} | {former.parameters_before:,} |",
        ]
    table = quality_lines(stages_in(source.folder)) if source.folder else []
    return _filled(
        source,
        name,
        config,
        done="a model made low rank by lrsurgery, multiplied out into ordinary layers again. It loads with nothing but"
        " its own library; it is as large as a dense model, and as good as the low-rank one.",
        commands=[former.command if former else None, command],
        paragraphs=[*paragraphs, "\n".join(table)] if table else paragraphs,
    )


def graph_card(source: Source, name: str, config: Json, runtime: str, usage: str, command: str | None = None) -> str:
    """The card of the folder `source` as a graph of a runtime; `usage` is Python that runs it."""
    former = _report_of(source)
    return _filled(
        source,
        name,
        config,
        done=f"a model made low rank by lrsurgery, as a graph for {runtime}, in fp32. Its layers are still low rank.",
        commands=[former.command if former else None, command],
        paragraphs=[f"{len(former.factorised)} layers are low rank."] if former is not None else [],
        usage=usage,
    )


def _filled(
    source: Source,
    name: str,
    config: Json,
    *,
    done: str,
    commands: Sequence[str | None],
    paragraphs: Sequence[str],
    report: Report | None = None,
    low_rank: bool = False,
    trained: bool = False,
    fresh: bool = False,
    data: str | None = None,
    usage: str | None = None,
) -> str:
    """The template with all that it names; see `hub.card_data` for `fresh`, and for `trained` on `data`.

    `usage` is Python that takes the place of the library's.
    """
    from huggingface_hub import ModelCard

    metadata = card_data(source, without_code(config), trained=trained, fresh=fresh, data=data)
    trusted = source.library == "transformers" and config.get("auto_map")
    remote = ENTRY in config  # the folder has the code of its layers
    rows, dense = (report.factorised, report.dense) if report is not None else ((), ())
    columns = [BY_KEY[key] for key in COLUMNS if any(BY_KEY[key].value(row) is not None for row in rows[:TABLE_ROWS])]
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        name=name,
        library=source.library,
        low_rank=low_rank,
        usage=usage,
        limit=TABLE_ROWS,
        quote=shlex.quote,
        literal=_literal,
        markdown=markdown,
        block=code_block,
        link=f"[{source.hub_id}]({HUB}/{source.hub_id})" if source.hub_id else code(source.name),
        done=done,
        remote=remote,
        needs=NEEDS["remote" if remote else "low rank" if low_rank else "dense"],
        auto_class="AutoModelForImageClassification" if source.library == "timm" else head_of(without_code(config))[0],
        trusted=", trust_remote_code=True" if trusted else "",
        commands=[_cleaned(command) for command in commands if isinstance(command, str) and command],
        paragraphs=paragraphs,
        sizes=_sizes(report) if report is not None else (),
        factorised=len(rows),
        columns=[TITLES.get(column.key, column.title) for column in columns],
        layers=[[_cell(column, row) for column in columns] for row in rows[:TABLE_ROWS]],
        dense=dense,
        reasons=_reasons(dense),
        licence=_licence(metadata),
    )
    return f"{card}\n"


def public_name(reference: str) -> str:
    """A model or data as a card names it: a hub id, or of a file or folder the last part of its path."""
    return reference if is_hub_id(reference) else Path(reference).name


def quality_lines(stages: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A Markdown table of what was measured at each stage; no lines where nothing was."""
    measured = {name: values for name, values in stages.items() if values}
    if not measured:
        return []
    columns = [c for c in QUALITY if all(c in values for values in measured.values())]
    lines = [f"| quality | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return [*lines, *(f"| {name} | {' | '.join(f'{v[c]:.4f}' for c in columns)} |" for name, v in measured.items())]


def _report_of(source: Source) -> Report | None:
    """The source's own report; None where there is none that can be read, which a card can do without."""
    try:
        return Report.read(source.folder) if source.folder else None
    except SourceError:
        return None


def stages_in(folder: Path) -> dict[str, dict[str, float]]:
    """What the run that made a folder measured at each stage; empty where there was none."""
    try:
        records = read_metrics(folder)
    except SourceError:  # somebody else's file of that name
        return {}
    return stages_of([r for r in records if "eval" in r], records[-1]["stage"]) if records else {}


def _cleaned(command: str) -> str:
    try:
        return shlex.join(word for word in shlex.split(command) if word not in NO_PART_OF_IT)
    except ValueError:  # not one of ours, though a report says so
        return command


def _sizes(report: Report) -> list[list[str]]:
    sizes = (
        ("parameters", report.parameters_before, report.parameters_after),
        ("bytes of the weights", report.bytes_before, report.bytes_after),
    )
    rows = []
    for what, before, after in sizes:
        if after is not None:
            share = f"{after / before:.1%}" if before else ""
            rows.append([what, "" if before is None else f"{before:,}", f"{after:,}", share])
    return rows


def _reasons(dense: Sequence[Row]) -> list[list[str]]:
    """Why layers stayed dense, how many, their parameters and the first of them."""
    by_reason: dict[str, list[Row]] = {}
    for row in dense:
        by_reason.setdefault(row.reason or "", []).append(row)
    return [
        [
            markdown(reason),
            str(len(rows)),
            f"{sum(row.parameters_before for row in rows):,}",
            code(rows[0].name, cell=True),
        ]
        for reason, rows in by_reason.items()
    ]


def _licence(metadata: ModelCardData) -> str:
    licence = metadata.get("license")
    named = ", ".join(licence) if isinstance(licence, list) else metadata.get("license_name") or licence
    link = metadata.get("license_link")
    if not named:
        return "The model that this was made from names none; look for its terms before you share this one."
    named = markdown(named)
    plain = isinstance(link, str) and re.fullmatch(r"(https?://)?[\w./%?=&:@+-]+", link) and "javascript:" not in link
    return f"That of the base model: {f'[{named}]({link})' if plain else named}."


def _cell(column: Column[Row], row: Row) -> str:
    value = column.value(row)
    if value is None:
        return ""
    text = COLUMNS[column.key].format(value)
    return code(text, cell=True) if column.key == "name" else markdown(text) if isinstance(value, str) else text


def _literal(name: str) -> str:
    """A name as a text of Python."""
    return json.dumps(name, ensure_ascii=not name.isprintable())
