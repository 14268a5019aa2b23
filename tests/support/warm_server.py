"""The server of warm.py: imports the libraries once, and forks a process for each that is asked for."""

from __future__ import annotations

import atexit
import gc
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

# not lrsurgery.hf, which has an effect: a program that needs it has to import it
PRELOADED = (
    "datasets",
    "pydantic.dataclasses",
    "pydantic.type_adapter",
    *(f"rich.{module}" for module in ("console", "live", "progress", "table")),
    "timm",
    "torch",
    "torch.utils.flop_counter",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.tokenization_utils_tokenizers",
    "transformers.trainer",
    "lrsurgery.cli.app",
    "lrsurgery.factorise.checkpoint",
    "lrsurgery.export.targets",
    "lrsurgery.factorise.memory",
    "lrsurgery.measure.bench",
    "lrsurgery.measure.evaluate",
    "lrsurgery.report.read",
    "lrsurgery.training.finetune",
)


def _serve(own: socket.socket) -> dict[str, object] | None:
    """Start processes as they are asked for. Returns in each of them what to run; in the server, None at the end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that wait are buried by nobody
    while True:
        message, fds, *_ = socket.recv_fds(own, 1, 5)
        if message != b"r":
            return None
        asked, out, err, tell, server = fds
        if not os.fork():  # waits for the process, and tells how it ended
            own.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            pid = os.fork()
            if not pid:
                os.dup2(out, 1)
                os.dup2(err, 2)
                # those of the server may be of another kind than these, which can be pipes
                sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)
                sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
                sys.__stderr__ = sys.stderr
                with open(asked, encoding="utf-8") as file:
                    file.seek(0)
                    found: dict[str, object] = json.load(file)
                for fd in (out, err, tell):
                    os.close(fd)
                _start_children_warm(server)
                return found
            for fd in (asked, out, err, server):
                os.close(fd)
            os.write(tell, f"{pid}\n".encode())
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.write(tell, f"{code}\n".encode())
            os._exit(0)
        for fd in fds:
            os.close(fd)


def _start_children_warm(server: int) -> None:
    """Let `python -m MODULE`, where this process starts it, be forked from the server."""
    client = str(Path(__file__).with_name("warm_client.py"))

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, args: Any, *rest: Any, pass_fds: tuple[int, ...] = (), **options: Any) -> None:
            if isinstance(args, list) and args[:2] == [sys.executable, "-m"]:
                args = [sys.executable, "-I", "-S", client, str(server), *args[1:]]
                pass_fds = (*pass_fds, server)
            super().__init__(args, *rest, pass_fds=pass_fds, **options)

    subprocess.Popen = Popen  # type: ignore[misc]


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # a program finds its own modules alone
    for module in PRELOADED:
        import_module(module)
    gc.freeze()  # what is shared stays shared: collections in a process do not touch it
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        random.seed()
        os.environ.clear()
        os.environ.update(request["env"])  # type: ignore[call-overload]
        os.chdir(str(request["cwd"]))
        how, *rest = request["words"]  # type: ignore[misc]
        code = 0
        try:
            if how == "-m":
                sys.path.insert(0, os.getcwd())
                sys.argv = rest
                runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
            elif how == "-c":
                sys.path.insert(0, os.getcwd())
                sys.argv = [how, *rest[1:]]
                exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
            else:
                sys.path.insert(0, str(Path(how).parent))
                sys.argv = [how, *rest]
                runpy.run_path(how, run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            code = 1
        # as the interpreter ends, but for taking apart thousands of modules that this process shares with the server
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
