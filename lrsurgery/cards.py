"""Model cards: README.md of an output folder, as the hub reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrsurgery.recipes import Recipe
from lrsurgery.report import Report
from lrsurgery.sources import Source

TABLE_ROWS = 40


def model_card(report: Report, source: Source, name: str, training: Sequence[str] = ()) -> str:
    """What was done, at what cost, how to load the result; `training` are Markdown lines about a training run."""
    totals = report.to_dict()["totals"]
    share = totals["share"]
    kept = "" if share is None else f" ({share:.1%})"
    lines = [
        *_front_matter(source),
        f"# {name}",
        "",
        *_introduction(report, source, name),
        *([*training, ""] if training else []),
        f"Parameters: {totals['parameters_before']:,} before, {totals['parameters_after']:,} after{kept}.",
        *([] if training else [f"Options: `{json.dumps(report.options)}`", ""]),
        *(f"Note: {note}.\n" for note in report.notes),
    ]
    if report.factorised:
        lines += [
            "| layer | rank | full rank | parameters | kept | energy kept | relative error |",
            "|---|---|---|---|---|---|---|",
        ]
    for row in report.factorised[:TABLE_ROWS]:
        assert row.parameters_after is not None
        cells = (
            row.name, row.rank, row.full_rank, f"{row.parameters_after:,}",
            _percent(row.parameters_after / row.parameters_before),
            _percent(row.energy_kept), _percent(row.relative_error),
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if len(report.factorised) > TABLE_ROWS:
        lines.append(f"\n{len(report.factorised) - TABLE_ROWS} more layers stand in `rank_report.json`.")
    return "\n".join(lines) + "\n"


def _introduction(report: Report, source: Source, name: str) -> list[str]:
    base = source.hub_id or source.name
    if not report.factorised:
        return [f"`{base}`, trained by lrsurgery. It loads with nothing but its own library.", ""]
    return [
        f"`{base}` with {len(report.factorised)} layers made low rank by lrsurgery."
        " Load it with lrsurgery installed (`pip install lrsurgery`):",
        "",
        "```python",
        *_loading(source, name),
        "```",
        "",
    ]


def dense_card(source: Source, name: str) -> str:
    """The card of a dense export."""
    return "\n".join(
        [
            *_front_matter(source),
            f"# {name}",
            "",
            f"`{source.name}`, a model made low rank by lrsurgery, multiplied out into ordinary layers again. It loads"
            " with nothing but its own library; it is as large as a dense model, and as good as the low-rank one.",
            "",
        ]
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _loading(source: Source, name: str) -> list[str]:
    if source.library == "timm":
        return [
            "import lrsurgery",
            f'model = lrsurgery.load_model("{name}")  # a timm module',
            "",
            "import lrsurgery.hf  # or through transformers",
            "from transformers import AutoModelForImageClassification",
            f'model = AutoModelForImageClassification.from_pretrained("{name}")',
        ]
    return [
        "import lrsurgery.hf  # registers the format with transformers",
        "from transformers import AutoModel  # or the AutoModelFor... class of your task",
        f'model = AutoModel.from_pretrained("{name}")',
    ]


def _front_matter(source: Source) -> list[str]:
    fields: dict[str, Any] = {}
    licence = _licence(source)
    if licence:
        fields["license"] = licence
    fields["library_name"] = "timm" if source.library == "timm" else "transformers"
    if source.hub_id:
        fields["base_model"] = source.hub_id
    lines = [f"{key}: {value}" for key, value in fields.items()]
    return ["---", *lines, "tags:", "- lrsurgery", "- low-rank", "---"]


def _licence(source: Source) -> str | None:
    """The licence that the source's card or timm config names."""
    card = source.folder / "README.md" if source.folder else None
    if card is not None and card.is_file():
        found = re.search(
            r"^license:\s*([\w.-]+)\s*$", card.read_text(encoding="utf-8", errors="replace")[:4000], re.MULTILINE
        )
        if found:
            return found.group(1)
    named = (source.config.get("pretrained_cfg") or {}).get("license")
    return named if isinstance(named, str) and re.fullmatch(r"[\w.-]+", named) else None


def training_lines(recipe: Recipe, steps: int, stages: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The card's lines about a training run: its settings in one sentence, and what was measured at each stage."""
    measured = {name: values for name, values in stages.items() if values}
    decay = f"{recipe.decay} decay of strength {recipe.decay_strength:g}" if recipe.decay != "none" else "no decay"
    teacher = f", teacher `{recipe.teacher}`" if recipe.teacher else ""
    lines = [
        f"Trained for {steps} steps on `{Path(recipe.data or '').name}` with {recipe.optimizer}, learning rate"
        f" {recipe.lr:g} ({recipe.schedule}), {decay} on the factors{teacher}; `recipe.yaml` has every setting,"
        " `metrics.jsonl` the course of the run.",
    ]
    if measured:
        columns = [c for c in ("loss", "perplexity", "top1", "top5") if all(c in v for v in measured.values())]
        lines += ["", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(f'{v[c]:.4f}' for c in columns)} |" for name, v in measured.items()]
    return lines
