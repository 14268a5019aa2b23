"""Real processes that start warm: forked from a server that has imported the libraries (warm_server.py).

A fresh process spends most of its time on imports of torch and transformers, the same ones in each test. The server
imports them once; each process is forked from it before anything has run, with its own arguments, environment, folder
and streams, and can be killed as any other. What is about starting up itself uses `subprocess`.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from support import tiny
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
        codes = _wait([_start(rest, cwd or Path.cwd(), one, out.fileno(), err.fileno()) for one in ranks], timeout)
        if codes is None:
            raise subprocess.TimeoutExpired(words, timeout)
        out.seek(0)
        err.seek(0)
        texts = [file.read().decode("utf-8").replace("\r\n", "\n") for file in (out, err)]
    return subprocess.CompletedProcess(words, next(filter(None, codes), 0), *texts)


@dataclass
class _Process:
    pid: int
    told: int  # file descriptor on which its exit code comes


def _start(words: list[str], cwd: Path, env: dict[str, str], out: int, err: int) -> _Process:
    ours, theirs = os.pipe()
    with tempfile.TemporaryFile() as asked:
        asked.write(json.dumps({"words": words, "cwd": str(cwd), "env": env}).encode())
        asked.flush()
        socket.send_fds(_server(), [b"r"], [asked.fileno(), out, err, theirs])
    os.close(theirs)
    return _Process(_number(ours), ours)


def _wait(processes: list[_Process], timeout: float) -> list[int] | None:
    """Exit codes; None when the time was over. The first that fails ends the others, at most 20 seconds later."""
    codes: dict[int, int] = {}
    end, late, number = time.monotonic() + timeout, False, None
    while left := [process for process in processes if process.told not in codes]:
        ready, _, _ = select.select([process.told for process in left], [], [], max(0, end - time.monotonic()))
        codes |= {told: _number(told) for told in ready}
        if not ready:
            late, number = late or number is None, signal.SIGKILL
        elif any(codes.values()) and number is None:
            number = signal.SIGTERM
        else:
            continue
        end = time.monotonic() + 20
        for process in left:
            if process.told not in codes:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)
    for process in processes:
        os.close(process.told)
    return None if late else [codes[process.told] for process in processes]


def _number(pipe: int) -> int:
    """A number and a line break, which is all that is said of a process."""
    text = b""
    while not text.endswith(b"\n"):
        piece = os.read(pipe, 1)
        assert piece, "the server went away"
        text += piece
    return int(text)


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
        ours.close()
        process.wait(30)

    atexit.register(stop)
    return ours
