"""Names of the SAEs of a run, each a directory: what an SAE is, then what tells it from the others.

Makes no directory. A name has letters, digits and `._-` only, so it is safe in paths and URLs.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from .architectures import Architecture, Optimiser, config_to_dict
from .training import Rules


def run_names(configs: Sequence[Architecture]) -> list[str]:
    """A name for each SAE: `topk-6144-32`, `standard-6144-5`, and more only where that is not enough.

    SAEs of one architecture, width and control of L0 that differ otherwise say in what: `topk-6144-32-lr0.0003`,
    `topk-6144-32-seed1`; a setting that is left to its default is not said. The site comes last, where SAEs that
    would have one name are of several.

    Raises:
        ValueError: one SAE is listed twice.
    """
    twice = [c for i, c in enumerate(configs) if c in configs[:i]]
    if twice:
        raise ValueError(
            f"the SAE {_plain_name(twice[0])} is listed twice; leave one out, or give them seeds of their own, e.g. "
            "seed=1"
        )
    names = list(map(_plain_name, configs))
    sites = _grouped(names, [str(c.site) for c in configs])
    by_site = [f"{name} {c.site}" for name, c in zip(names, configs, strict=True)]
    settings = [_settings(c) for c in configs]
    differing = {
        key: {field for field, _ in set.union(*group) - set.intersection(*group)}
        for key, group in _grouped(by_site, [set(s.items()) for s in settings]).items()
    }
    found = []
    for c, name, key, own in zip(configs, names, by_site, settings, strict=True):
        labels = [_label(field, own[field]) for field in own if field in differing[key]]
        site = [str(c.site).replace("/", "_").replace(":", "_")] if len(set(sites[name])) > 1 else []
        found.append("-".join([name, *filter(None, labels), *site]))
    return [
        f"{name}-{_digest(c)}" if found.count(name) > 1 else name
        for name, c in zip(found, configs, strict=True)
    ]


def check_distinct(
    names: Sequence[str], configs: Sequence[Architecture], rules: Sequence[Rules], starts: Sequence[object]
) -> None:
    """See that no two SAEs would be trained alike, though their settings are written in different ways.

    Raises:
        ValueError: two would.
    """
    found: dict[Any, str] = {}
    for name, config, rule, start in zip(names, configs, rules, starts, strict=True):
        other = found.setdefault((replace(config, optimiser=Optimiser()), rule, id(start)), name)
        if other != name:
            raise ValueError(
                f"the SAEs {other} and {name} are the same: what one has of its own is the run's setting for the "
                "other; leave one out, or give them seeds of their own, e.g. seed=1"
            )


def _plain_name(config: Architecture) -> str:
    return f"{config.architecture}-{config.d_sae}-{config.sparsity:g}"


def _grouped(keys: Sequence[str], values: Sequence[Any]) -> dict[str, list[Any]]:
    found = defaultdict(list)
    for key, value in zip(keys, values, strict=True):
        found[key].append(value)
    return found


def _settings(config: Architecture) -> dict[str, str]:
    """Every setting but the site that is not left to its default, in one flat table, as a name can show it."""
    parts = [p for p in (config, config.revive, config.optimiser) if p is not None]
    found: dict[str, str] = {}
    for part in parts:
        for f in fields(part):
            value = getattr(part, f.name)
            if f.name == "revive":
                value = None if value is None else value.kind
                if value != getattr(f.default, "kind", None):
                    found[f.name] = _shown(value)
            elif f.name not in ("site", "optimiser") and value != f.default:
                found[f.name] = _shown(value)
    return found


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "_".join(map(_shown, value))
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value).lower()


def _label(field: str, value: str) -> str:
    """`lr0.0003`, `decoder_unit`, `target_l0_8`: a word, or a digit after a digit, is set apart."""
    apart = field[-1].isdigit() or not value[:1].isdigit()
    return _safe(f"{field}_{value}" if apart and not value.startswith("-") else f"{field}{value}")


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", text)


def _digest(config: Architecture) -> str:
    """Eight digits that another config has not, for what a name can not show."""
    text = json.dumps(config_to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
