"""Text from elsewhere (names of files, layers and classes, notes about them) where it must not be more than text.

A path that begins with `~` is the one that is read as more.
"""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # control and format characters, halves of pairs, private use, separators
JOINERS = "\u200c\u200d"  # format characters that words of some languages and emoji are spelt with
BARS = "▁▂▃▄▅▆▇█"  # of sketches in the terminal
MARKDOWN = "\\`*_[]<>|&~$"  # characters that Markdown, or HTML in it, takes for its own


def expanded(path: str | Path) -> Path:
    """A path with the home folder in the place of `~`, which a shell leaves as it is within quotes or behind `=`.

    The home of an unknown user, as in `~nobody/x`, stays a name as in a shell.
    """
    return Path(os.path.expanduser(path))


def visible(text: str) -> str:
    """`text` with each control character but the line break as an escape, such as \\x1b.

    Those that turn the direction of writing and halves of surrogate pairs are escaped as well: no name can colour a
    terminal, set its title, or look like another name.
    """
    return "".join(_escaped(c) if unicodedata.category(c) in HIDDEN and c not in f"\n{JOINERS}" else c for c in text)


def _escaped(character: str) -> str:
    return " " if character == "\t" else character.encode("unicode_escape").decode()


def one_line(text: str) -> str:
    """`text` in one line, with control characters as escapes."""
    return visible(" ".join(text.split()))


def markdown(text: str) -> str:
    """`text` in one line, as it is in Markdown: nothing in it is markup."""
    escaped = "".join("\\" + c if c in MARKDOWN else c for c in one_line(text))
    return f"\\{escaped}" if escaped.startswith(("#", "- ", "+ ")) else escaped


def code(text: str, *, cell: bool = False) -> str:
    """`text` in one line as a code span of Markdown; in a `cell` of a table a bar has to be escaped, in code too."""
    text = one_line(text).replace("|", "\\|" if cell else "|")
    fence = "`" * (_longest_run(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{space}{text}{space}{fence}"


def code_block(text: str, language: str = "") -> str:
    """`text` as a fenced block of Markdown, which no backticks in it end."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{visible(text)}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
