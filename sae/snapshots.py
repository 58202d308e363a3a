"""SAEs as a run has them now: read from a complete checkpoint, in one process, whatever ranks wrote it.

Only the weights are read, a third of what the checkpoint holds of an SAE. Nothing is written, so any number of
processes may do this while the run goes on; it removes the checkpoint once a newer one is complete.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from actcache.errors import CorruptObject

from .architectures import Architecture, config_from_dict
from .checkpoint import StoredCheckpoint
from .checkpoint_folder import Checkpoints
from .core import SAE, load, parse_json
from .files import run_files
from .learner import folded
from .rotation import turned
from .rundir import RUN_FILE

_STOPPED = "stopped_at_rung"


def load_checkpoint(
    run: str | os.PathLike[str],
    name: str,
    rows: int | None = None,
    *,
    ds: Any = None,
    storage_options: Mapping[str, Any] | None = None,
) -> SAE:
    """An SAE of a run that is not finished, as a complete checkpoint has it; `cfg["rows"]` says after how many rows.

    Of a finished run, and if it has stopped at a rung, it is the SAE itself, as `sae.load` gives it.

    Args:
        run: the run's directory or URL, `out` of `sae.train`.
        name: the SAE's name in the run, e.g. topk-6144-32.
        rows: the checkpoint after this many rows. None: the newest.
        ds: the dataset of a run in rotated coordinates, whose rotation turns the SAE back. None opens the one
            that the checkpoint names.
        storage_options: passed to fsspec for `run`, and for the dataset where it is opened.

    Raises:
        FileNotFoundError: there is no such run, SAE or checkpoint, or a newer checkpoint has replaced it.
        CorruptObject: the checkpoint is damaged.
        FormatError: another version wrote it.
    """
    moment = Moment(run, rows, ds=ds, storage_options=storage_options)
    if name not in moment.names:
        raise FileNotFoundError(f"{moment.run} trains no SAE {name!r}; it trains {', '.join(moment.names)}")
    return moment.load(name)


class Moment:
    """One moment of a run: a checkpoint, or its end. Arguments and errors are those of `load_checkpoint`."""

    def __init__(
        self,
        run: str | os.PathLike[str],
        rows: int | None = None,
        *,
        ds: Any = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        files = run_files(run, storage_options)
        self.run, self._rows, self._ds, self._options = files.url, rows, ds, storage_options
        data = files.read(RUN_FILE)
        if data is None:
            raise FileNotFoundError(f"{self.run} has no {RUN_FILE}; give the directory of a run of sae.train")
        self._description = parse_json(f"{self.run}/{RUN_FILE}", data)
        self.names = list(self._description["saes"])
        self._checkpoints = Checkpoints(files.store)
        self._stored = self._find()

    def running(self) -> list[str]:
        """Names of the SAEs that train, or have trained to the end: those that have not stopped at a rung."""
        if self._stored is not None:
            states = self._stored.state["saes"]
            return [name for name, state in zip(self.names, states, strict=True) if _STOPPED not in state]
        return [name for name in self.names if _STOPPED not in self.load(name).cfg]

    def load(self, name: str) -> SAE:
        """One of its SAEs."""
        i, stored = self.names.index(name), self._stored
        if stored is None or _STOPPED in stored.state["saes"][i]:
            return load(f"{self.run}/{name}", self._options)
        try:
            found = _read(stored, i, config_from_dict(self._description["saes"][name]))
        except CorruptObject as error:
            if self._is_there(stored.rows):
                raise
            raise self._gone(stored.rows) from error
        if not self._description["data"].get("rotated"):
            return found
        return turned(found, _rotation(found.cfg, self._ds, self._options))

    def _find(self) -> StoredCheckpoint | None:
        """The checkpoint; None at the end of a finished run."""
        rows, finished = self._rows, self._description.get("finished")
        if rows is not None and self._is_there(rows):
            return self._checkpoints.at(rows)
        if finished and rows in (None, self._description["training"]["n_rows"]):
            return None
        stored = None if finished or rows is not None else self._checkpoints.newest()
        if stored is None:
            raise self._gone(rows)
        return stored

    def _is_there(self, rows: int) -> bool:
        try:
            self._checkpoints.at(rows)
        except FileNotFoundError:
            return False
        return True

    def _gone(self, rows: int | None) -> FileNotFoundError:
        if rows is None:
            return FileNotFoundError(f"{self.run} has no checkpoint yet; try again once it has one")
        return FileNotFoundError(
            f"{self.run} has no checkpoint after {rows:,} rows, or not any more; try again, without rows for the newest"
        )


def _read(stored: StoredCheckpoint, i: int, config: Architecture) -> SAE:
    """The i-th SAE in the coordinates that it is trained in."""
    state, tensors = stored.state["saes"][i], stored.under(f"{i}.")
    names = ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D", *config.extra_parameters(torch.float32))
    averaged = any(key.endswith(".average") for key in tensors)
    p = {name: tensors[f"{name}.average" if averaged else name] for name in names}
    return folded(config, p, state["threshold"], state["scale"], state["cfg"])


def _rotation(cfg: Mapping[str, Any], ds: Any, storage_options: Mapping[str, Any] | None) -> np.ndarray:
    """By which the SAE of a run in rotated coordinates returns to the model's activations."""
    if ds is None:
        import actcache

        ds = actcache.open(cfg["dataset"]["url"], storage_options=storage_options)
    found: np.ndarray = ds.stream([cfg["site"]], rotated=True, metadata=False).rotation(cfg["site"])
    return found
