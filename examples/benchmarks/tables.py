"""Put tables of results/*.json into README.md, between `<!-- NAME -->` or `<!-- NAME.PART -->` and `<!-- end -->`.

python examples/benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from harness import RESULTS, table

README = Path(__file__).parent / "README.md"


def block(body: dict[str, Any]) -> str:
    """Format the command, the machine and the rows of one results file as Markdown."""
    machine = ", ".join(f"{key} {value}" for key, value in body["machine"].items() if value is not None)
    script = Path(body["command"].split()[0]).name
    options = " ".join(body["command"].split()[1:])
    return f"`python examples/benchmarks/{script} {options}`\n({machine})\n\n{table(body['rows'])}"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    for mark in re.findall(r"<!-- ([\w.]+) -->", text):
        if mark != "end":
            name, _, part = mark.partition(".")
            body = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
            filled = table(body[part]) if part else block(body)
            pattern = rf"(<!-- {re.escape(mark)} -->\n).*?(<!-- end -->)"
            text = re.sub(pattern, lambda m, f=filled: f"{m[1]}{f}\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
