"""Puts the tables of results/*.json into README.md, each between `<!-- NAME -->` and `<!-- end -->`.

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
    """The command, the machine and the rows of one results file as Markdown."""
    machine = ", ".join(f"{key} {value}" for key, value in body["machine"].items() if value is not None)
    script = Path(body["command"].split()[0]).name
    options = " ".join(body["command"].split()[1:])
    return f"`python examples/benchmarks/{script} {options}`\n({machine})\n\n{table(body['rows'])}"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    for name in re.findall(r"<!-- (\w+) -->", text):
        if name != "end":
            body = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
            pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
            text = re.sub(pattern, lambda m, b=body: f"{m[1]}{block(b)}\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
