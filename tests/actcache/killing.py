"""Processes that harvest and are killed at a chosen operation, in about a tenth of a second each.

A `Nursery` is one process that has everything imported and has started no thread. It forks a child for
each harvest; the child dies by SIGKILL at the operation that it was told. Run as a script it is that
process: it reads a pickled `Recorded`, then one JSON request a line, and answers with the exit status.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any


class Nursery:
    """Harvests of `recorded` in processes of their own."""

    def __init__(self, recorded: Any, directory: Path) -> None:
        pickled = directory / "recorded.pickle"
        pickled.write_bytes(pickle.dumps(recorded))
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(pickled)],
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

    def harvest(
        self,
        url: str,
        pattern: str = "",
        when: str = "before",
        n: int = 0,
        *,
        storage_options: dict[str, Any] | None = None,
        **extent: Any,
    ) -> int:
        """Exit status of a harvest into `url`: -9 if it was killed at the n-th operation that matches."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"url": url, "pattern": pattern, "when": when, "n": n, "extent": extent}
        self._process.stdin.write(json.dumps(request | {"options": storage_options}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def _serve(pickled: Path) -> None:
    from actcache import driver

    driver._COMPACT_EVERY_BLOCKS = 1  # a version for each block
    recorded = pickle.loads(pickled.read_bytes())
    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                _harvest(recorded, json.loads(line))
            except BaseException as err:
                print(f"{type(err).__name__}: {err}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _harvest(recorded: Any, request: dict[str, Any]) -> None:
    from watched import KilledAt

    from actcache.store import open_store

    store: Any = open_store(request["url"], request["options"])
    if request["pattern"]:
        store = KilledAt(store, request["n"], request["pattern"], request["when"])
    recorded.harvest(store, recorded.asking(**request["extent"]))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _serve(Path(sys.argv[1]))
