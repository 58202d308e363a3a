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

    def harvest(self, url: str, pattern: str = "", when: str = "before", n: int = 0, **extent: Any) -> int:
        """Exit status of a harvest into `url`: -9 if it was killed at the n-th operation that matches."""
        return self.harvest_together(url, [{"pattern": pattern, "when": when, "n": n, "extent": extent}])[0]

    def harvest_together(
        self, url: str, runs: list[dict[str, Any]], storage_options: dict[str, Any] | None = None
    ) -> list[int]:
        """Exit statuses of several at once, each of `extent` and perhaps `pattern`, `when` and `n`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"url": url, "options": storage_options, "runs": runs}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return [int(status) for status in json.loads(self._process.stdout.readline())]


def _serve(pickled: Path) -> None:
    from actcache import driver

    driver._COMPACT_EVERY_BLOCKS = 1  # a version for each block
    recorded = pickle.loads(pickled.read_bytes())
    for line in sys.stdin:
        request = json.loads(line)
        children = [_child(recorded, request["url"], request["options"], run) for run in request["runs"]]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(statuses), flush=True)


def _child(recorded: Any, url: str, options: dict[str, Any] | None, run: dict[str, Any]) -> int:
    """Id of a process that harvests."""
    child = os.fork()
    if child:
        return child
    try:
        _harvest(recorded, url, options, run)
    except BaseException as err:
        print(f"{type(err).__name__}: {err}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def _harvest(recorded: Any, url: str, options: dict[str, Any] | None, run: dict[str, Any]) -> None:
    from watched import KilledAt

    from actcache.store import open_store

    store: Any = open_store(url, options)
    if run.get("pattern"):
        store = KilledAt(store, run["n"], run["pattern"], run["when"])
    recorded.harvest(store, recorded.asking(**run["extent"]))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _serve(Path(sys.argv[1]))
