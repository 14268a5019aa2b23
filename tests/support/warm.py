"""Real processes that start warm: forked from a server that has imported the libraries, for tests of many processes.

A fresh process spends most of its time on imports of torch and transformers, the same ones in each test. The server
imports them once; each process is forked from it before anything has run, with its own arguments, environment, folder
and streams, and can be killed as any other. What is about starting up itself uses `subprocess`.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

PRELOADED = (
    "datasets",
    "timm",
    "torch",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.trainer",
    "lrsurgery.cli.app",
    "lrsurgery.factorise.checkpoint",
    "lrsurgery.factorise.export",
    "lrsurgery.factorise.memory",
    "lrsurgery.measure.bench",
    "lrsurgery.measure.evaluate",
    "lrsurgery.report.read",
    "lrsurgery.training.finetune",
)


def program(
    *command: object, cwd: Path | None = None, timeout: float = 280, **environment: str
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` of `python -m MODULE ...` or `python -c CODE ...`, on one thread, with its output as text."""
    python, how, *rest = map(str, command)
    assert (python, how) in ((sys.executable, "-m"), (sys.executable, "-c")), command
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if how == "-m" and rest[0] != "lrsurgery":  # torch's launcher, which starts processes of its own
        words = [python, how, *rest]
        return subprocess.run(words, cwd=cwd, timeout=timeout, env=env, capture_output=True, text=True, check=False)
    body = json.dumps({"how": how, "arguments": rest, "cwd": str(cwd or Path.cwd()), "env": env}).encode()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as asked:
        asked.write(body)
        asked.flush()
        server = _server()
        server.settimeout(60)
        socket.send_fds(server, [b"r"], [asked.fileno(), out.fileno(), err.fileno()])
        pid = int(_line(server))
        server.settimeout(timeout)
        try:
            code = int(_line(server))
        except TimeoutError:
            os.kill(pid, 9)
            server.settimeout(60)
            _line(server)
            raise subprocess.TimeoutExpired(command, timeout) from None
        out.seek(0)
        err.seek(0)
        texts = [file.read().decode("utf-8").replace("\r\n", "\n") for file in (out, err)]
    return subprocess.CompletedProcess(command, code, *texts)


def _line(server: socket.socket) -> str:
    """A number and a line break, which is all that the server says."""
    text = b""
    while not text.endswith(b"\n"):
        piece = server.recv(1)
        assert piece, "the server went away"
        text += piece
    return text.decode()


@cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
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


def _serve(own: socket.socket) -> dict[str, object] | None:
    """One process after the other. Returns in each of them what to run; in the server, None at the end."""
    while True:
        message, fds, *_ = socket.recv_fds(own, 1, 3)
        if not message:
            return None
        pid = os.fork()
        if not pid:
            own.close()
            os.dup2(fds[1], 1)
            os.dup2(fds[2], 2)
            with open(fds[0], encoding="utf-8") as file:
                file.seek(0)
                found: dict[str, object] = json.load(file)
            os.close(fds[1])
            os.close(fds[2])
            return found
        for fd in fds:
            os.close(fd)
        own.sendall(f"{pid}\n".encode())
        own.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())


if __name__ == "__main__":
    import gc
    import random
    import runpy
    import threading
    import traceback
    from importlib import import_module

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
        sys.path.insert(0, os.getcwd())
        first, *others = request["arguments"]  # type: ignore[misc]
        code = 0
        try:
            if request["how"] == "-m":
                sys.argv = [first, *others]
                runpy.run_module(first, run_name="__main__", alter_sys=True)
            else:
                sys.argv = ["-c", *others]
                exec(compile(first, "<string>", "exec"), {"__name__": "__main__"})
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
