"""Put tables of results/*.json into README.md and the guides.

Each stands between `<!-- NAME -->` or `<!-- NAME.PART -->` and `<!-- end -->`.

python examples/benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from harness import RESULTS, table

HERE = Path(__file__).parent
FILES = (HERE / "README.md", *sorted((HERE.parent / "guides").glob("*.md")))


def block(body: dict[str, Any]) -> str:
    """Format the command, the machine and the rows of one results file as Markdown."""
    machine = ", ".join(f"{key} {value}" for key, value in body["machine"].items() if value is not None)
    script = Path(body["command"].split()[0]).name
    options = " ".join(body["command"].split()[1:])
    return f"`python examples/benchmarks/{script} {options}`\n({machine})\n\n{table(body['rows'])}"


def fill(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for mark in re.findall(r"<!-- ([\w.]+) -->", text):
        if mark != "end":
            name, _, part = mark.partition(".")
            body = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
            filled = table(body[part]) if part else block(body)
            pattern = rf"(<!-- {re.escape(mark)} -->\n).*?(<!-- end -->)"
            text = re.sub(pattern, lambda m, f=filled: f"{m[1]}{f}\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    file.write_text(text, encoding="utf-8")


def main() -> None:
    for file in FILES:
        fill(file)


if __name__ == "__main__":
    main()
