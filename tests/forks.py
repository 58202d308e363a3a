"""Drivers and Ray workers forked in milliseconds from one process that has torch and transformers imported.

`Forks` starts that process. It forks `actcache` commands when asked to, and, for raylets whose
`setup_worker_path` is this file, Ray's workers: importing would cost each of them 4 s of CPU time. Apart
from that they are what they always are, and die by signals like any other.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ADDRESS = "ACTCACHE_TESTS_FORKS"
"""Environment variable with the path of the socket on which the process listens."""


class Forks:
    """The process that forks; `pid`. Its own files lie in `directory`, which must have a short name."""

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="forks-")
        self._socket = f"{self.directory}/socket"
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "serve", self._socket],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        self.pid = self._process.pid
        os.environ[ADDRESS] = self._socket

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *exc: object) -> None:
        """Returns when all that was forked is gone; what is not after 20 s is killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + 20
        while (left := self.running()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()
        os.environ.pop(ADDRESS)
        os.unlink(self._socket)
        os.rmdir(self.directory)
        assert not left, f"still running: {left}"

    def running(self) -> dict[int, str]:
        """Command lines of what was forked and runs, by process id."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) == self.pid and state != "Z":
                    found[int(entry.name)] = (entry / "cmdline").read_text().rstrip("\0").replace("\0", " ")
            except OSError:
                continue
        return found

    def start(self, arguments: list[str], log: Path, **environment: str) -> int:
        """Process id of `actcache *arguments`, which appends what it says to `log`."""
        return int(self._ask(arguments=arguments, log=str(log), environment=environment))

    def status(self, pid: int, timeout_s: float) -> int:
        """Exit status of a started process, once it has ended: negative for a signal.

        Raises:
            TimeoutError: it still ran after `timeout_s`.
        """
        with open(os.pidfd_open(pid)) as descriptor:
            if not select.select([descriptor], [], [], timeout_s)[0]:
                raise TimeoutError(f"process {pid} still runs after {timeout_s:.0f} s")
        return int(self._ask(status=pid))

    def _ask(self, **request: Any) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._process.stdout.readline()


def _serve(address: str) -> None:
    """Fork as asked: on standard input by lines of JSON, on the socket by Ray's launchers."""
    sys.path[0] = str(Path(__file__).parents[1])  # not this directory, whose folders have the packages' names
    import torch
    from transformers import GPT2LMHeadModel  # noqa: F401

    import actcache.__main__
    import actcache.capture
    import actcache.driver
    import actcache.lm
    import actcache.reader  # noqa: F401

    assert (
        "ray" not in sys.modules
    )  # it reads its environment, which differs from worker to worker, when imported

    torch.set_num_threads(1)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    statuses: dict[int, int] = {}
    while True:
        for ready in select.select([sys.stdin, listener], [], [], 0.1)[0]:
            if ready is listener:
                connection, _ = listener.accept()
                if not os.fork():
                    _be_worker(json.loads(connection.makefile().readline()))
                connection.close()
                continue
            line = os.read(0, 1 << 20)  # one request: the asker waits for its answer
            if not line:
                return
            request = json.loads(line)
            if "status" in request:
                pid = request["status"]
                if pid not in statuses:
                    statuses[pid] = os.waitpid(pid, 0)[1]
                print(os.waitstatus_to_exitcode(statuses.pop(pid)), flush=True)
            else:
                child = os.fork()
                if not child:
                    _be_driver(request)
                print(child, flush=True)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            statuses[pid] = status


def _be_driver(request: dict[str, Any]) -> None:
    from actcache.__main__ import main

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.environ |= request["environment"]
    sys.argv = ["actcache", *request["arguments"]]
    _be(main, log)


def _be_worker(request: dict[str, Any]) -> None:
    import runpy

    os.environ.clear()
    os.environ |= request["environment"]
    sys.argv = request["arguments"]
    _be(lambda: runpy.run_path(sys.argv[0], run_name="__main__"), os.open(os.devnull, os.O_WRONLY))


def _be(run: Any, output: int) -> None:
    """Run it as a process of its own; never returns."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 0
    try:
        run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _launch(arguments: list[str]) -> None:
    """In place of Ray's setup_worker.py: have the worker forked."""
    passed = [a for a in arguments if not a.startswith(("-s", "-S", "--language=", "--serialized-runtime"))]
    environment = dict(os.environ)
    for argument in arguments:
        if argument.startswith("--serialized-runtime-env-context="):
            environment |= json.loads(argument.partition("=")[2]).get("env_vars") or {}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[ADDRESS])
        connection.sendall(json.dumps({"arguments": passed, "environment": environment}).encode() + b"\n")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(sys.argv[2])
    else:
        _launch(sys.argv[1:])
