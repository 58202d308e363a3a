"""SAE architectures, one file each: config, formula, dense rule (the oracle) and sparse selection.

A config says what is trained; `sae.train` says how. `activate` and `select` of a config agree
exactly (ties aside), which the tests hold.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from .batch_topk import BatchTopK
from .topk import TopK

Config = TopK | BatchTopK

ARCHITECTURES: dict[str, type[TopK] | type[BatchTopK]] = {c.architecture: c for c in (TopK, BatchTopK)}
"""Name, as on the command line and in `sae.json`, to config class."""


def config_to_dict(config: Config) -> dict[str, Any]:
    """JSON-able, with the architecture's name."""
    return {"architecture": config.architecture, **asdict(config)}


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The config back.

    Raises:
        ValueError: unknown architecture or field; the message names the nearest known one.
    """
    from difflib import get_close_matches

    name = values.get("architecture")
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture {name!r} is not known; there are {', '.join(ARCHITECTURES)}")
    kind = ARCHITECTURES[name]
    known = [f.name for f in fields(kind)]
    for field in values:
        if field != "architecture" and field not in known:
            near = get_close_matches(field, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"{kind.__name__} has no field {field!r}; {hint}")
    return kind(**{field: value for field, value in values.items() if field != "architecture"})


__all__ = ["ARCHITECTURES", "BatchTopK", "Config", "TopK", "config_from_dict", "config_to_dict"]
