"""SAE architectures, one file each: config, formula, what controls L0, where defaults come from.

A config says what is trained; `sae.train` says how.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from ..revival import REVIVALS
from .base import Architecture, Moment, Optimiser, Parameters, Terms
from .batch_topk import BatchTopK
from .gated import Gated
from .jumprelu import JumpReLU
from .matryoshka import Matryoshka
from .standard import Standard
from .topk import TopK

ARCHITECTURES: dict[str, type[Architecture]] = {
    c.architecture: c for c in (Standard, Gated, JumpReLU, TopK, BatchTopK, Matryoshka)
}
"""Name, as on the command line and in `sae.json`, to config class."""


def config_to_dict(config: Architecture) -> dict[str, Any]:
    """JSON-able, with the names of the architecture and of its `revive`."""
    values = asdict(config)
    if config.revive is not None:
        values["revive"] = {"kind": config.revive.kind, **values["revive"]}
    values["optimiser"] = {name: value for name, value in values["optimiser"].items() if value is not None}
    return {"architecture": config.architecture, **values}


def config_from_dict(values: Mapping[str, Any]) -> Architecture:
    """The config back.

    Raises:
        ValueError: unknown architecture or field; the message names the nearest known one.
    """
    values = dict(values)
    kind = _known(ARCHITECTURES, values.pop("architecture", None), "architecture")
    revive = values.get("revive")
    if isinstance(revive, Mapping):
        given = dict(revive)
        values["revive"] = from_fields(_known(REVIVALS, given.pop("kind", None), "revive.kind"), given)
    if isinstance(values.get("optimiser"), Mapping):
        values["optimiser"] = from_fields(Optimiser, values["optimiser"])
    found: Architecture = from_fields(kind, values)
    return found


def from_fields(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """`kind(**values)` of JSON or TOML, whose lists become tuples.

    Raises:
        ValueError: an unknown or a missing field; the message names the nearest known one.
    """
    from dataclasses import MISSING
    from difflib import get_close_matches

    known = [f.name for f in fields(kind)]
    for field in values:
        if field not in known:
            near = get_close_matches(field, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"{kind.__name__} has no field {field!r}; {hint}")
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.name not in values]
    if missing:
        raise ValueError(f"{kind.__name__} needs {', '.join(missing)}; give a value")
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _known(table: Mapping[str, type[Any]], name: Any, what: str) -> type[Any]:
    if name not in table:
        raise ValueError(f"{what} {name!r} is not known; there are {', '.join(table)}")
    return table[name]


__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "BatchTopK",
    "Gated",
    "JumpReLU",
    "Matryoshka",
    "Moment",
    "Optimiser",
    "Parameters",
    "Standard",
    "Terms",
    "TopK",
    "config_from_dict",
    "config_to_dict",
    "from_fields",
]
