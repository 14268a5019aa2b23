"""How a process is asked of warm_server.py. As a script: a warm process's child, which starts one and ends as it does.

    python warm_client.py SERVER -m MODULE ARGUMENTS...

Nothing but the standard library: a child is to start in some milliseconds.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass


@dataclass
class Process:
    """A process of the server's, and the file descriptor on which its exit code comes."""

    pid: int
    told: int


def start(server: socket.socket, words: list[str], cwd: str, env: dict[str, str], out: int, err: int) -> Process:
    """Start `python WORDS`. Many may ask at once: each asks with one byte, to which its descriptors are tied."""
    ours, theirs = os.pipe()
    with tempfile.TemporaryFile() as asked:
        asked.write(json.dumps({"words": words, "cwd": cwd, "env": env}).encode())
        asked.flush()
        socket.send_fds(server, [b"r"], [asked.fileno(), out, err, theirs, server.fileno()])
    os.close(theirs)
    return Process(number(ours), ours)


def number(pipe: int) -> int:
    """A number and a line break, which is all that is said of a process."""
    text = b""
    while not text.endswith(b"\n"):
        piece = os.read(pipe, 1)
        assert piece, "the server went away"
        text += piece
    return int(text)


def _main() -> None:
    server, *words = sys.argv[1:]
    process = start(socket.socket(fileno=int(server)), words, os.getcwd(), dict(os.environ), 1, 2)
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda given, _: os.kill(process.pid, given))
    code = number(process.told)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if code != -signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    _main()
