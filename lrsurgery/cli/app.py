"""The command line: the commands, what is common to them, and how errors end the program."""

from __future__ import annotations

import atexit
import codecs
import functools
import gc
import io
import json
import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from lrsurgery import __version__
from lrsurgery.cli.bench import bench
from lrsurgery.cli.factorise import factorise
from lrsurgery.cli.folders.cache import cache
from lrsurgery.cli.folders.export import export
from lrsurgery.cli.folders.refine import refine
from lrsurgery.cli.report import report
from lrsurgery.cli.study import study
from lrsurgery.cli.training import evaluate, finetune
from lrsurgery.errors import Interrupted, SurgeryError
from lrsurgery.files.faults import disk_fault
from lrsurgery.text import expanded, one_line

app = typer.Typer(
    name="lrsurgery",
    help="Make the layers of a pretrained transformers or timm model low rank, see what it cost, ship the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lrsurgery {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    imports: Annotated[
        list[Path] | None,
        typer.Option(
            "--import",
            metavar="FILE.py",
            show_default=False,
            help="Run this Python file first, such as one that registers a model with timm. Read it before.",
        ),
    ] = None,
) -> None:
    """Make the layers of a pretrained transformers or timm model low rank, see what it cost, ship the result.

    [bold]Examples[/bold]

      lrsurgery factorise gpt2 --rank 0.5

      lrsurgery finetune gpt2-rank-0.5 --data train.txt --eval-data valid.txt --output gpt2-healed

      lrsurgery evaluate gpt2-healed --data test.txt --against gpt2

      lrsurgery report gpt2-healed
    """
    if imports:
        from lrsurgery.runtime import import_file

        for file in imports:
            import_file(expanded(file))


def _at_home(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the home folder in the place of `~` in its paths, be they read or written."""

    @functools.wraps(command)
    def run(*args: object, **options: object) -> None:
        command(*args, **{name: expanded(each) if isinstance(each, Path) else each for name, each in options.items()})

    return run


def _without_eof(command: Callable[..., None]) -> Callable[..., None]:
    """The command with SurgeryError in place of EOFError, which typer takes for Ctrl-D; no command asks anything."""

    @functools.wraps(command)
    def run(*args: object, **options: object) -> None:
        try:
            command(*args, **options)
        except EOFError as e:
            raise SurgeryError(f"a file ends before its content does ({e}); --debug shows where it is read") from e

    return run


COMMANDS = (factorise, refine, finetune, evaluate, report, bench, study, export, cache)
for command in COMMANDS:
    app.command()(_without_eof(_at_home(command)))


def main() -> None:
    """The `lrsurgery` program: 0 for success, 2 for what the user can put right, 130 after Ctrl-C, 1 for our bugs."""
    import signal

    atexit.register(gc.freeze)  # else the collector walks through all of torch and transformers as the process ends
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a half-written output is removed
    _write_plainly()
    arguments = sys.argv[1:]
    debug, as_json = "--debug" in arguments, "--json" in arguments
    # their loaders' own bars and warnings are not this program's voice
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(name, "1")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        import warnings

        warnings.filterwarnings("ignore")
    try:
        code = app(standalone_mode=False)
    except typer.Exit as e:
        code = e.exit_code
    except typer.Abort:
        _fail("aborted", 1, as_json)
    except Interrupted as e:
        _fail(str(e), 130, as_json)
    except SurgeryError as e:
        if debug:
            raise
        _fail(str(e), e.exit_code, as_json)
    except Exception as e:
        if debug:
            raise
        if hasattr(e, "format_message") and hasattr(e, "exit_code"):  # a usage error of the command line parser
            context = getattr(e, "ctx", None)
            command = context.command_path if context else "lrsurgery"
            message = e.format_message().rstrip(".").replace("Value error, ", "")
            if not message:  # no arguments at all, for which help was printed
                sys.exit(0)
            _fail(f"{message}. See {command} --help", 2, as_json)
        if (fault := disk_fault(e) or _memory_fault(e)) is not None:
            _fail(fault, 2, as_json)
        _fail(f"unexpected {type(e).__name__}: {e} (a bug; --debug shows where)", 1, as_json)
    if code == 130:  # typer's exit code for Ctrl-C, of which it says nothing
        _fail("interrupted; nothing was written", 130, as_json)
    sys.exit(code if isinstance(code, int) else 0)


# what stands for a character that a console's encoding lacks
PLAIN = {"→": "->", "←": "<-", "×": "x", "·": ".", "…": "...", "–": "-", "—": "-", "≤": "<=", "≥": ">=", "−": "-"}
PLAIN |= dict(zip("▁▂▃▄▅▆▇█", "..--==##", strict=True))  # bars


def _write_plainly() -> None:
    """Let the output streams write what their encoding lacks in ASCII."""

    def replace(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        lacking = error.object[error.start : error.end]
        return "".join(PLAIN.get(one) or _without_accent(one) for one in lacking), error.end

    codecs.register_error("lrsurgery", replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="lrsurgery")


def _without_accent(character: str) -> str:
    return unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or "?"


def _memory_fault(error: Exception) -> str | None:
    """What to do about memory that is used up, of a GPU or of the machine; None for any other error."""
    remedy = "lower --batch-size, --block-size or --samples"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be imported here
        return f"the GPU's memory is used up; {remedy}, or add --device cpu ({' '.join(str(error).split())[:150]})"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return f"the machine's memory is used up; {remedy} ({' '.join(str(error).split())[:150] or 'MemoryError'})"
    return None


def _fail(message: str, code: int, as_json: bool) -> None:
    message = one_line(message)
    sys.stderr.write(f"lrsurgery: {message}\n")
    if as_json:
        sys.stdout.write(json.dumps({"error": message}) + "\n")
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
