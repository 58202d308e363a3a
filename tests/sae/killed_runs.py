"""Trainings in processes that are killed at a chosen operation on the store, about a second each.

A `Nursery` is one process that has everything imported and has started no thread. It forks a child for
each training; the child dies by SIGKILL at the operation that it was told. Run as a script it is that
process: it reads one JSON request a line and answers with the exit status.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class Nursery:
    """Trainings of test_checkpoint's SAEs in processes of their own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)

    def train(self, out: str, pattern: str, when: str, n: int, options: dict[str, Any] | None = None) -> int:
        """Exit status of a training: -9 if it was killed at the n-th operation that matches, from 0."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"out": out, "pattern": pattern, "when": when, "n": n, "options": options}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    import s3fs  # noqa: F401  # with Adam's imports two seconds of each child otherwise
    import test_checkpoint  # noqa: F401
    import torch._dynamo

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            _train(**request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _train(out: str, pattern: str, when: str, n: int, options: dict[str, Any] | None) -> None:
    """Train until killed or done, with parts of several files; never returns."""
    try:
        from test_checkpoint import CONFIGS, TRAINING, Breaking, _acts
        from watched import KilledAt

        import sae
        from actcache import store
        from sae import checkpoint_writer

        checkpoint_writer.FILE_BYTES = 20_000
        original = store.open_store
        store.open_store = lambda *args: KilledAt(original(*args), n, pattern, when)  # type: ignore[assignment]
        sae.train(Breaking(_acts()), CONFIGS, TRAINING, out=out, storage_options=options)
    except BaseException as err:
        print(f"{type(err).__name__}: {err}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "actcache")]
    _serve()
