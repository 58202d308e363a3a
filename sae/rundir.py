"""The directory of a training run: what it holds, whether it is the same run, how it goes on.

A run directory holds `run.json`, while unfinished a checkpoint (sae/checkpoint.py), and for each SAE a
directory (sae/naming.py) with `metrics.jsonl`, `evals.jsonl` where it is evaluated in training
(sae/evals/during.py) and, once finished, the SAE itself. It is local or at any fsspec URL: sae/files.py has
what differs. One process of a run writes; the other ranks of a distributed one only look, and write their
parts of checkpoints.
"""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from actcache.errors import Conflict, StoreError

from .checkpoint import PartInfo, StoredCheckpoint
from .checkpoint_folder import Checkpoints
from .checkpoint_writer import CheckpointWriter
from .core import SAE, load, parse_json
from .files import run_files

RUN_FILE, METRICS_FILE, EVALS_FILE = "run.json", "metrics.jsonl", "evals.jsonl"
RUN_FORMAT = 1
_OF_RANKS = ("world_size", "spread", "stall_by_rank")
"""What metrics of several ranks have in addition."""
_FREE = ("checkpoint_every_rows", "checkpoint_every_s")
"""Settings of `training` that change no number: a run may go on with others."""


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
        self.checkpoints = Checkpoints(self.files.store)
        self.evaluated_rows = dict.fromkeys(self.names, 0)
        """Rows of the newest checkpoint of which each SAE's evaluation is kept; 0 if there is none."""
        self._evals_to_sync: set[str] = set()
        self.description = json.loads(json.dumps({"format": RUN_FORMAT, **description}))

    def open(
        self, resume: bool, writer: bool = True, load: bool = True
    ) -> StoredCheckpoint | list[SAE] | None:
        """What the directory holds: a finished run's SAEs, a checkpoint, or nothing, then made ready.

        Args:
            resume: False refuses a directory that already holds a run.
            writer: False for the other ranks of a distributed run, once `open` of the rank that writes has
                returned: changes nothing and ignores `resume`.
            load: False gives an empty list for a finished run.

        Raises:
            Conflict: it holds a run of other settings, or any run and `resume` is False; or a checkpoint
                without its settings.
            FormatError: its checkpoint is of another version.
            CorruptObject: its checkpoint is damaged.
            StoreError: this rank does not see the directory.
        """
        data = self.files.read(RUN_FILE)
        if data is None and not writer:
            raise StoreError(
                f"{self.path} has no {RUN_FILE} as seen by this rank. Give all ranks one place: a file system that "
                "all nodes share, or a URL."
            )
        if data is not None:
            found = parse_json(f"{self.path}/{RUN_FILE}", data)
            finished = found.pop("finished", False)
            self._check_same_run(found, resume or not writer)
            if finished:
                if writer:
                    self.checkpoints.remove()  # of a process that was killed as it did so
                return [self.load(i) for i in range(len(self.names))] if load else []
        stored = self.checkpoints.newest()
        if not writer:
            return stored
        if data is None and stored is not None:
            raise Conflict(
                f"{self.path} has a checkpoint but no {RUN_FILE}, so nobody knows its settings. Restore {RUN_FILE} from a "
                f"copy, or remove {stored.where} to start again."
            )
        if data is None:
            self.files.make(self.names)
            self._write_run(finished=False)
        sizes = [0] * len(self.names) if stored is None else stored.state["metrics_bytes"]
        for file, size in zip(self.metrics_files, sizes, strict=True):
            self.files.cut(file, size)
        for name in self.names:
            self._cut_evals(name, 0 if stored is None else stored.rows)
        return stored

    @property
    def finished(self) -> bool:
        """Whether it holds a finished run."""
        data = self.files.read(RUN_FILE)
        return data is not None and bool(parse_json(f"{self.path}/{RUN_FILE}", data).get("finished"))

    @property
    def metrics_files(self) -> list[str]:
        return [f"{name}/{METRICS_FILE}" for name in self.names]

    def append_metrics(self, lines: Mapping[str, Mapping[str, Any]]) -> None:
        """One line to the metrics.jsonl of each SAE that is named."""
        for name, line in lines.items():
            self.files.append(f"{name}/{METRICS_FILE}", (json.dumps(line) + "\n").encode())

    def checkpoint(self, rows: int) -> StoredCheckpoint:
        """The checkpoint after `rows` rows, which a rank has completed.

        Raises:
            StoreError: this rank does not see it.
        """
        try:
            return self.checkpoints.at(rows)
        except FileNotFoundError as error:
            raise StoreError(
                f"{self.path} has no checkpoint after {rows:,} rows as seen by this rank. Give all ranks one place: a "
                "file system that all nodes share, or a URL."
            ) from error

    def append_evals(self, rows: int, lines: Mapping[str, Mapping[str, Any]]) -> None:
        """The figures of the checkpoint after `rows` rows: a line to the evals.jsonl of each SAE that has it not yet.

        In an object store they are written with the next checkpoint, or by `sync_evals`.
        """
        for name, line in lines.items():
            if self.evaluated_rows[name] < rows:
                self.files.append(f"{name}/{EVALS_FILE}", (json.dumps(line) + "\n").encode())
                self.evaluated_rows[name] = rows
                self._evals_to_sync.add(f"{name}/{EVALS_FILE}")

    def sync_evals(self) -> None:
        """Make the evaluations so far durable."""
        self.files.sync(sorted(self._evals_to_sync))
        self._evals_to_sync.clear()

    def _cut_evals(self, name: str, rows: int) -> None:
        """Leave the evaluations of checkpoints up to `rows`."""
        data = self.files.read(f"{name}/{EVALS_FILE}")
        kept = _lines_up_to(data or b"", rows)
        if data is not None:
            self.files.cut(f"{name}/{EVALS_FILE}", sum(len(line) for line in kept))
        self.evaluated_rows[name] = json.loads(kept[-1])["rows"] if kept else 0

    def checkpoint_writer(
        self, rank: int = 0, world: int = 1, attempt: str | None = None
    ) -> CheckpointWriter:
        """What a rank writes its parts of checkpoints with."""
        return CheckpointWriter(self.files.store, rank, world, attempt)

    def with_metrics(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a checkpoint that begins now, with the metrics so far, which are made durable."""
        self.sync_evals()
        return {**state, "metrics_bytes": self.files.sync(self.metrics_files)}

    def complete_checkpoint(self, rows: int, state: Mapping[str, Any], parts: Sequence[PartInfo]) -> None:
        """Make the parts of all ranks the run's checkpoint; those before are removed.

        Raises:
            Conflict: another process trains into the same directory.
            StoreError: a part is not to be seen from here, or the store refused.
        """
        self.checkpoints.complete(rows, state, parts)

    def save(self, i: int, s: SAE) -> None:
        """Save the i-th SAE once it is trained; any rank may."""
        s.save(f"{self.path}/{self.names[i]}", self.storage_options)

    def load(self, i: int) -> SAE:
        """The i-th SAE, which was saved."""
        return load(f"{self.path}/{self.names[i]}", self.storage_options)

    def finish(self) -> None:
        """Mark the run as finished, once all SAEs are saved."""
        self.files.sync(self.metrics_files)
        self.sync_evals()
        self._write_run(finished=True)
        self.checkpoints.remove()

    @property
    def checkpoint_rows(self) -> int | None:
        """Rows of the newest checkpoint that was found or completed; None if there is none."""
        return self.checkpoints.rows

    def _write_run(self, finished: bool) -> None:
        text = json.dumps({**self.description, "finished": finished}, indent=2) + "\n"
        self.files.replace(RUN_FILE, text.encode())

    def _check_same_run(self, found: dict[str, Any], resume: bool) -> None:
        if not resume:
            raise Conflict(
                f"{self.path} already holds a run and resume is off; choose another directory or remove it"
            )
        changes = differences(_fixed(found), _fixed(self.description))
        if changes:
            raise Conflict(
                f"{self.path} holds a run of other settings ({'; '.join(changes)}). "
                "Choose another directory, or repeat the old settings to continue it."
            )


def _lines_up_to(data: bytes, rows: int) -> list[bytes]:
    """The lines of an evals.jsonl up to the first that is torn, or is of a checkpoint after more rows."""

    def kept(line: bytes) -> bool:
        try:
            return line.endswith(b"\n") and json.loads(line)["rows"] <= rows
        except ValueError:
            return False

    return list(itertools.takewhile(kept, data.splitlines(keepends=True)))


def _fixed(description: Mapping[str, Any]) -> dict[str, Any]:
    """What must stay as it is for a run to go on."""
    training = description.get("training", {})
    return {**description, "training": {k: v for k, v in training.items() if k not in _FREE}}


def differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    """Where two JSON values differ, as `field: found -> wanted`."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        names = list(found) + [name for name in wanted if name not in found]
        return [
            line
            for name in names
            for line in differences(found.get(name), wanted.get(name), f"{where}.{name}".lstrip("."))
        ]
    if found == wanted:
        return []
    old, new = ("present" if isinstance(value, dict) else str(value) for value in (found, wanted))
    return [f"{where}: {old} -> {new}"]


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

    `state` is `missing`, `partial` or `finished`; the figures are None where no metrics are stored. Of several
    ranks there are also `world_size`, what they share (`spread`), and `stall_by_rank`, the share of its time that
    each has waited for rows; `rate_rows_per_s` is of all of them together.
    """
    files = run_files(location, storage_options)
    found: dict[str, Any] = {"path": str(location), "state": "missing"}
    found |= dict.fromkeys(("saes", "rows_done", "rows_wanted", "rate_rows_per_s", "eta_s", *_OF_RANKS))
    data = files.read(RUN_FILE)
    if data is None:
        return found
    run = parse_json(f"{files.url}/{RUN_FILE}", data)
    wanted = run["training"]["n_rows"]
    found |= {"state": "finished" if run.get("finished") else "partial", "rows_wanted": wanted}
    found["saes"] = len(run["saes"])
    if run.get("finished"):
        return found | {"rows_done": wanted, "eta_s": 0.0}
    # all of a run are at the same row, but for those that stopped at a rung
    names = list(run["saes"]) if run["training"].get("rungs") else list(run["saes"])[:1]
    metrics = [(files.read(f"{name}/{METRICS_FILE}") or b"").rpartition(b"\n")[0] for name in names]
    lines = [json.loads(whole.splitlines()[-1]) for whole in metrics if whole]
    if not lines:
        return found
    last = max(lines, key=lambda line: line["rows"])
    rate = last["rows_per_s"]
    left = wanted - last["rows"]
    return found | {
        "rows_done": last["rows"],
        "rate_rows_per_s": rate,
        "eta_s": round(left / rate, 1) if rate else None,
        **{name: last.get(name) for name in _OF_RANKS},
    }
