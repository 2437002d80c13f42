"""Commands of pages without the seconds that each one's imports take.

A server imports torch and the command line once; every command runs in a fork of it, with the folder, the environment
and the files of whoever asked:

    with server(folder, environment):
        ...                      # folder/warm.py birkhoff list; folder/warm.py snippet.py

What a fork cannot show, that a command starts without torch and by its console script, others hold
(`tests/pipeline/cli/test_startup.py`, `make compress` in `test_pages`).
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SOCKET = "socket"
IMPORTED = (
    "torch",
    "transformers.models.sam.modeling_sam",
    "birkhoff.pipeline.cli.main",
    "birkhoff.pipeline.load.load",
)

_CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as asked:
    asked.connect({socket!r})
    order = {{"words": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}}
    socket.send_fds(asked, [b"."], [0, 1, 2])
    asked.sendall(json.dumps(order).encode())
    asked.shutdown(socket.SHUT_WR)
    answer = b"".join(iter(lambda: asked.recv(16), b""))  # to its end, which is that of the process
sys.exit(int(answer) if answer else 70)
"""


@contextlib.contextmanager
def server(folder: Path, environment: dict[str, str]) -> Iterator[Path]:
    """Run a server for the block; gives the script that asks it, `warm.py WORD...`."""
    with tempfile.TemporaryDirectory(prefix="warm-") as place:  # the name of a socket may have 107 bytes
        listening = Path(place) / SOCKET
        command = [sys.executable, "-m", "tests.warm", str(listening)]
        process = subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[1])
        try:
            while not listening.exists():
                assert process.poll() is None, "the server ended before it listened"
                time.sleep(0.05)
            client = folder / "warm.py"
            client.write_text(_CLIENT.format(python=sys.executable, socket=str(listening)))
            client.chmod(0o755)
            yield client
        finally:
            process.terminate()
            process.wait()


def _serve(place: str) -> None:
    for name in IMPORTED:
        importlib.import_module(name)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for forks: each answers by itself
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{place}.new")
        listening.listen()
        Path(f"{place}.new").rename(place)
        while True:
            asked, _ = listening.accept()
            if os.fork() == 0:
                break
            asked.close()
    _answer(asked)


def _answer(asked: socket.socket) -> None:
    """Do what was asked, and say its exit code; the process then ends as any does."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, _, _ = socket.recv_fds(asked, 1, 3)
    order = json.loads(b"".join(iter(lambda: asked.recv(1 << 16), b"")))
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    code: object = 70
    try:
        code = _run(order["words"])
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        asked.sendall(str(code if isinstance(code, int) else 0 if code is None else 1).encode())


def _run(words: list[str]) -> int:
    program, *rest = words
    if program == "birkhoff":
        sys.argv = [".venv/bin/birkhoff", *rest]
        from birkhoff.pipeline.cli.main import main

        main()
        return 0
    sys.argv = [program, *rest]
    sys.path[0] = str(Path.cwd())
    runpy.run_path(program, run_name="__main__")
    return 0


if __name__ == "__main__":
    _serve(sys.argv[1])
