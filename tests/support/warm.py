"""Real processes that start warm: forked from a server that has imported the libraries (warm_server.py).

A fresh process spends most of its time on imports of torch and transformers, the same ones in each test. The server
imports them once; each process is forked from it before anything has run, with its own arguments, environment, folder
and streams, and can be killed as any other; what it starts as `python -m MODULE` is forked from the server, too. What
is about starting up itself uses `subprocess`.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from support import tiny
from support.warm_client import Process, number, start
from torch.distributed import TCPStore


def program(
    *command: object, cwd: Path | None = None, timeout: float = 280, **environment: str
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` of `python`, `-m MODULE`, `-c CODE` or a script, on one thread, with its output as text.

    `tiny.TORCHRUN` before a module or a script starts two of them, as torchrun does: the first that fails ends the
    other, and what both said is one text. What torchrun itself must do is tested with `subprocess`.
    """
    words = [str(word) for word in command]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    launcher = tiny.TORCHRUN
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if words[: len(launcher)] == launcher:
            rest = words[len(launcher) :]
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the launcher holds it
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
            shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            ranks = [{**env, **shared, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        else:
            assert words[0] == sys.executable, command
            rest, ranks = words[1:], [env]
        here = str(cwd or Path.cwd())
        codes = _wait([start(_server(), rest, here, one, out.fileno(), err.fileno()) for one in ranks], timeout)
        if codes is None:
            raise subprocess.TimeoutExpired(words, timeout)
        out.seek(0)
        err.seek(0)
        texts = [file.read().decode("utf-8").replace("\r\n", "\n") for file in (out, err)]
    return subprocess.CompletedProcess(words, next(filter(None, codes), 0), *texts)


def _wait(processes: list[Process], timeout: float) -> list[int] | None:
    """Exit codes; None when the time was over. The first that fails ends the others, at most 20 seconds later."""
    codes: dict[int, int] = {}
    end, late, sent = time.monotonic() + timeout, False, None
    while left := [process for process in processes if process.told not in codes]:
        ready, _, _ = select.select([process.told for process in left], [], [], max(0, end - time.monotonic()))
        codes |= {told: number(told) for told in ready}
        if not ready:
            late, sent = late or sent is None, signal.SIGKILL
        elif any(codes.values()) and sent is None:
            sent = signal.SIGTERM
        else:
            continue
        end = time.monotonic() + 20
        for process in left:
            if process.told not in codes:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, sent)
    for process in processes:
        os.close(process.told)
    return None if late else [codes[process.told] for process in processes]


@cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("warm_server.py"), str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
    )
    theirs.close()

    def stop() -> None:
        ours.sendall(b"q")  # a process that is left may still hold the socket
        process.wait(30)

    atexit.register(stop)
    return ours
