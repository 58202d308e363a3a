"""How a run and its SAEs came about: `run.json`, by which two runs are the same run, and `sae.json`.

Makes JSON of settings; trains and writes nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .architectures import Architecture, config_to_dict
from .inputs import Inputs
from .learner import Learner
from .streams import Stream, dataset_of
from .training import Training


def run_description(
    saes: Mapping[str, Architecture],
    started: Mapping[str, str],
    stream: Stream,
    inputs: Inputs,
    training: Training,
) -> dict[str, Any]:
    """What makes two runs the same run.

    Args:
        saes: config of each SAE, by name.
        started: digest of the SAE that each begins with, where it does.
        stream: rows, and their order.
        inputs: the sites.
        training: settings of all SAEs.
    """
    return {
        "training": training_settings(training),
        "saes": {name: config_to_dict(config) for name, config in saes.items()},
        **({"start": dict(started)} if started else {}),
        "data": {
            "dataset": dataset_of(stream).get("id"),
            "n_rows": stream.n_rows,
            "batch_size": stream.batch_size,
            "order": {
                # the position moves, and a manifest version that adds sites changes no row
                name: value
                for name, value in stream.state().items()
                if name not in ("epoch", "row", "version")
            },
            **({"rotated": True} if inputs.rotated else {}),
            "sites": {
                site: {"d_in": len(stats["mean"]), "mean_norm": float(stats["mean_norm"])}
                for site, stats in inputs.stats.items()
            },
        },
    }


def sae_settings(
    learner: Learner, stream: Stream, inputs: Inputs, training: Training, rows: int, steps: int
) -> dict[str, Any]:
    """`sae.json` of an SAE after so many rows and steps: settings, then how it came about."""
    dataset = dataset_of(stream)
    return {
        **json.loads(json.dumps(config_to_dict(learner.config))),
        "d_in": learner.d_in,
        "dtype": "float32",
        "model": dataset.pop("model", None),
        "context_size": dataset.pop("context_size", None),
        "prepend_bos": dataset.pop("prepend_bos", None),
        "dataset": dataset,
        "rows": rows,
        "steps": steps,
        "batch_size": stream.batch_size,
        "lr": learner.rules.lr,
        "input_scale_folded": learner.scale,
        **({"trained_rotated": True} if inputs.rotated else {}),
        "training": training_settings(training),
        "actcache_version": _version(),
    }


def training_settings(training: Training) -> dict[str, Any]:
    """The run's settings as JSON; those of rungs only where there are rungs, as in runs before there were any."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(training)))
    if not training.rungs:
        del found["rungs"], found["rung_keep"]
    return found


def _version() -> str | None:
    """The installed package's; None in a checkout on the path."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("actcache")
    except PackageNotFoundError:
        return None
