"""An SAE as a run has it now: read from a complete checkpoint, in one process, whatever ranks wrote it.

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


def load_checkpoint(
    run: str | os.PathLike[str],
    name: str,
    rows: int | None = None,
    *,
    ds: Any = None,
    storage_options: Mapping[str, Any] | None = None,
) -> SAE:
    """An SAE of a run that is not finished, as a complete checkpoint has it; `cfg["rows"]` says after how many rows.

    Of a finished run it is the SAE itself, as `sae.load` gives it.

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
    files = run_files(run, storage_options)
    data = files.read(RUN_FILE)
    if data is None:
        raise FileNotFoundError(f"{files.url} has no {RUN_FILE}; give the directory of a run of sae.train")
    description = parse_json(f"{files.url}/{RUN_FILE}", data)
    names = list(description["saes"])
    if name not in names:
        raise FileNotFoundError(f"{files.url} trains no SAE {name!r}; it trains {', '.join(names)}")
    checkpoints = Checkpoints(files.store)
    stored = _stored(checkpoints, rows, description)
    if stored is None:
        return _finished(files.url, name, rows, description, storage_options)
    if "cfg" not in stored.state["saes"][names.index(name)]:  # it stopped at a rung, and was saved as it is
        return load(f"{files.url}/{name}", storage_options)
    try:
        found = _read(stored, names.index(name), config_from_dict(description["saes"][name]))
    except CorruptObject as error:
        if _is_there(checkpoints, stored.rows):
            raise
        raise _gone(files.url, stored.rows) from error
    if not description["data"].get("rotated"):
        return found
    return turned(found, _rotation(found.cfg, ds, storage_options))


def _stored(
    checkpoints: Checkpoints, rows: int | None, description: Mapping[str, Any]
) -> StoredCheckpoint | None:
    """The checkpoint asked for; None if there is none, or the run is finished and none was named."""
    if rows is not None:
        return checkpoints.at(rows) if _is_there(checkpoints, rows) else None
    return None if description.get("finished") else checkpoints.newest()


def _finished(
    run: str,
    name: str,
    rows: int | None,
    description: Mapping[str, Any],
    storage_options: Mapping[str, Any] | None,
) -> SAE:
    """The SAE of a finished run, where it is the one after `rows` rows."""
    if not description.get("finished"):
        raise _gone(run, rows)
    s = load(f"{run}/{name}", storage_options)
    if rows is not None and s.cfg["rows"] != rows:
        raise _gone(run, rows)
    return s


def _gone(run: str, rows: int | None) -> FileNotFoundError:
    if rows is None:
        return FileNotFoundError(f"{run} has no checkpoint yet; try again once it has one")
    return FileNotFoundError(
        f"{run} has no checkpoint after {rows:,} rows, or not any more; try again, without rows for the newest"
    )


def _read(stored: StoredCheckpoint, i: int, config: Architecture) -> SAE:
    """The i-th SAE in the coordinates that it is trained in."""
    state, tensors = stored.state["saes"][i], stored.under(f"{i}.")
    names = ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D", *config.extra_parameters(torch.float32))
    averaged = any(key.endswith(".average") for key in tensors)
    p = {name: tensors[f"{name}.average" if averaged else name] for name in names}
    return folded(config, p, state["threshold"], state["scale"], state["cfg"])


def _is_there(checkpoints: Checkpoints, rows: int) -> bool:
    try:
        checkpoints.at(rows)
    except FileNotFoundError:
        return False
    return True


def _rotation(cfg: Mapping[str, Any], ds: Any, storage_options: Mapping[str, Any] | None) -> np.ndarray:
    """By which the SAE of a run in rotated coordinates returns to the model's activations."""
    if ds is None:
        import actcache

        ds = actcache.open(cfg["dataset"]["url"], storage_options=storage_options)
    found: np.ndarray = ds.stream([cfg["site"]], rotated=True, metadata=False).rotation(cfg["site"])
    return found
