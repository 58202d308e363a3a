"""The directory of a training run: what it holds, whether it is the same run, how it goes on.

A run directory holds `run.json`, while unfinished a checkpoint, and for each SAE a directory
`<architecture>-<d_sae>-<what controls its L0>` with `metrics.jsonl` and, once finished, the SAE
itself. It is local or at any fsspec URL: sae/files.py has what differs.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from actcache.errors import Conflict

from . import checkpoint
from .architectures import Architecture
from .core import SAE, load, parse_json
from .files import run_files

RUN_FILE, METRICS_FILE = "run.json", "metrics.jsonl"
RUN_FORMAT = 1


class RunDirectory:
    """Files of one run; `description` is what makes two runs the same run."""

    def __init__(
        self,
        location: str | os.PathLike[str],
        names: Sequence[str],
        description: Mapping[str, Any],
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.files, self.names = run_files(location, storage_options), list(names)
        self.path, self.storage_options = self.files.url, storage_options
        self.description = json.loads(json.dumps({"format": RUN_FORMAT, **description}))

    def open(self, resume: bool) -> tuple[dict[str, Tensor], dict[str, Any]] | list[SAE] | None:
        """What the directory holds: a finished run's SAEs, a checkpoint, or nothing, then made ready.

        Raises:
            Conflict: it holds a run of other settings, or any run and `resume` is False.
        """
        data = self.files.read(RUN_FILE)
        if data is not None:
            found = parse_json(f"{self.path}/{RUN_FILE}", data)
            finished = found.pop("finished", False)
            self._check_same_run(found, resume)
            if finished:
                return [load(f"{self.path}/{name}", self.storage_options) for name in self.names]
        else:
            self.files.make(self.names)
            self._write_run(finished=False)
        stored = self.files.load_checkpoint()
        if stored is None:
            for file in self.metrics_files:
                self.files.cut(file, 0)
            return None
        tensors, state = checkpoint.parse_checkpoint(*stored)
        for file, size in zip(self.metrics_files, state["metrics_bytes"], strict=True):
            self.files.cut(file, size)
        return tensors, state

    @property
    def metrics_files(self) -> list[str]:
        return [f"{name}/{METRICS_FILE}" for name in self.names]

    def append_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """One line to each SAE's metrics.jsonl."""
        for file, line in zip(self.metrics_files, lines, strict=True):
            self.files.append(file, (json.dumps(line) + "\n").encode())

    def save_checkpoint(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Replace the checkpoint, once the metrics that it counts are stored."""
        sizes = self.files.sync(self.metrics_files)
        data = checkpoint.checkpoint_bytes(tensors, {**state, "metrics_bytes": sizes})
        self.files.save_checkpoint(data, state["rows"])

    def finish(self, saes: Sequence[SAE]) -> None:
        """Save the SAEs, then mark the run as finished."""
        self.files.sync(self.metrics_files)
        for s, name in zip(saes, self.names, strict=True):
            s.save(f"{self.path}/{name}", self.storage_options)
        self._write_run(finished=True)
        self.files.remove_checkpoint()

    @property
    def has_checkpoint(self) -> bool:
        return self.files.has_checkpoint()

    def _write_run(self, finished: bool) -> None:
        text = json.dumps({**self.description, "finished": finished}, indent=2) + "\n"
        self.files.replace(RUN_FILE, text.encode())

    def _check_same_run(self, found: dict[str, Any], resume: bool) -> None:
        if not resume:
            raise Conflict(
                f"{self.path} already holds a run and resume is off; choose another directory or remove it"
            )
        changes = checkpoint.differences(found, self.description)
        if changes:
            raise Conflict(
                f"{self.path} holds a run of other settings ({'; '.join(changes)}). "
                "Choose another directory, or repeat the old settings to continue it."
            )


def run_names(configs: Sequence[Architecture]) -> list[str]:
    """A directory for each SAE: `topk-6144-32`, `standard-6144-5`; with the site where that is not enough.

    Raises:
        ValueError: two configs differ in nothing that names them.
    """
    names = [f"{c.architecture}-{c.d_sae}-{c.sparsity:g}" for c in configs]
    count = Counter(names)
    names = [
        f"{name}-{str(c.site).replace('/', '_').replace(':', '_')}" if count[name] > 1 else name
        for name, c in zip(names, configs, strict=True)
    ]
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise ValueError(f"two SAEs would both be called {twice[0]}; train them into separate directories")
    return names


def last_metrics(
    location: str | os.PathLike[str], name: str, storage_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The last line of an SAE's metrics.jsonl, of a run that has one."""
    data = run_files(location, storage_options).read(f"{name}/{METRICS_FILE}") or b""
    found: dict[str, Any] = json.loads(data.splitlines()[-1])
    return found


def progress_of(
    location: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """How far a run has come, as JSON: rows of its stored metrics, not of a process that may be running.

    `state` is `missing`, `partial` or `finished`; the figures are None where no metrics are stored.
    """
    files = run_files(location, storage_options)
    found: dict[str, Any] = {"path": str(location), "state": "missing"}
    found |= dict.fromkeys(("saes", "rows_done", "rows_wanted", "rate_rows_per_s", "eta_s"))
    data = files.read(RUN_FILE)
    if data is None:
        return found
    run = parse_json(f"{files.url}/{RUN_FILE}", data)
    wanted = run["training"]["n_rows"]
    found |= {"state": "finished" if run.get("finished") else "partial", "rows_wanted": wanted}
    found["saes"] = len(run["saes"])
    if run.get("finished"):
        return found | {"rows_done": wanted, "eta_s": 0.0}
    first = next(iter(run["saes"]))  # all of a run are at the same row
    whole, _, _ = (files.read(f"{first}/{METRICS_FILE}") or b"").rpartition(b"\n")
    if not whole:
        return found
    last = json.loads(whole.splitlines()[-1])
    rate = last["rows_per_s"]
    left = wanted - last["rows"]
    return found | {
        "rows_done": last["rows"],
        "rate_rows_per_s": rate,
        "eta_s": round(left / rate, 1) if rate else None,
    }
