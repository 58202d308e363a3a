"""The directory of a training run: what it holds, whether it is the same run, how it goes on.

A run directory holds `run.json`, while unfinished `checkpoint.safetensors`, and for each SAE a
directory `<architecture>-<d_sae>-<what controls its L0>` with `metrics.jsonl` and, once finished,
the SAE itself.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from actcache.errors import Conflict, SpecError

from . import checkpoint
from .architectures import Architecture
from .core import SAE, load, read_json

RUN_FILE, METRICS_FILE = "run.json", "metrics.jsonl"
RUN_FORMAT = 1


class RunDirectory:
    """Files of one run; `description` is what makes two runs the same run."""

    def __init__(self, path: Path, names: Sequence[str], description: Mapping[str, Any]) -> None:
        self.path, self.names = path, list(names)
        self.description = json.loads(json.dumps({"format": RUN_FORMAT, **description}))

    def open(self, resume: bool) -> tuple[dict[str, Tensor], dict[str, Any]] | list[SAE] | None:
        """What the directory holds: a finished run's SAEs, a checkpoint, or nothing, then made ready.

        Raises:
            Conflict: it holds a run of other settings, or any run and `resume` is False.
        """
        run_file = self.path / RUN_FILE
        if run_file.exists():
            found = read_json(run_file)
            finished = found.pop("finished", False)
            self._check_same_run(found, resume)
            if finished:
                return [load(self.path / name) for name in self.names]
        else:
            self._make()
            self._write_run(finished=False)
        stored = checkpoint.load_checkpoint(self.path)
        if stored is None:
            for file in self.metrics_files:
                file.write_bytes(b"")
            return None
        for file, size in zip(self.metrics_files, stored[1]["metrics_bytes"], strict=True):
            os.truncate(file, size)
        return stored

    @property
    def metrics_files(self) -> list[Path]:
        return [self.path / name / METRICS_FILE for name in self.names]

    def append_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """One line to each SAE's metrics.jsonl."""
        for file, line in zip(self.metrics_files, lines, strict=True):
            with open(file, "a") as handle:
                handle.write(json.dumps(line) + "\n")

    def save_checkpoint(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Replace the checkpoint, once the metrics that it counts are on the disk."""
        for file in self.metrics_files:
            with open(file, "ab") as handle:
                os.fsync(handle.fileno())
        sizes = [file.stat().st_size for file in self.metrics_files]
        checkpoint.save_checkpoint(self.path, tensors, {**state, "metrics_bytes": sizes})

    def finish(self, saes: Sequence[SAE]) -> None:
        """Save the SAEs, then mark the run as finished."""
        for s, name in zip(saes, self.names, strict=True):
            s.save(self.path / name)
        self._write_run(finished=True)
        checkpoint.remove_checkpoint(self.path)

    @property
    def has_checkpoint(self) -> bool:
        return (self.path / checkpoint.CHECKPOINT_FILE).exists()

    def _make(self) -> None:
        try:
            for name in self.names:
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpecError(
                f"{self.path} can not be made: {error.strerror}. Choose a writable directory."
            ) from error

    def _write_run(self, finished: bool) -> None:
        text = json.dumps({**self.description, "finished": finished}, indent=2) + "\n"
        checkpoint.write_atomically(self.path / RUN_FILE, text.encode())

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
