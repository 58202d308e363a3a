"""What a run directory says of each of its SAEs, read from files only."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actcache.errors import CorruptObject
from sae.evals.definitions import EVAL_VERSION

_MAX_POINTS = 400  # of a training curve: more cannot be told apart at this size


@dataclass
class Entry:
    """What there is to say about one SAE of the run; None or empty where a part is absent."""

    name: str
    directory: Path
    cfg: dict[str, Any]
    history: list[dict[str, Any]]
    """Lines of metrics.jsonl, thinned."""
    result: dict[str, Any] | None = None
    """eval.json"""
    number: int = 0
    """Its place on the page, and so its colour."""
    notes: list[str] = field(default_factory=list)

    @property
    def site(self) -> str:
        return str(self.cfg.get("site") or "")

    @property
    def short_name(self) -> str:
        """The directory's name without the site, which has a column of its own."""
        return self.name.removesuffix(f"-{self.site.replace('/', '_').replace(':', '_')}")

    @property
    def family(self) -> tuple[str, Any, str]:
        """SAEs that differ in sparsity alone: a line of the frontier."""
        return str(self.cfg.get("architecture")), self.cfg.get("d_sae"), self.site

    def figure(self, name: str) -> float | None:
        """One number of eval.json."""
        value = (self.result or {}).get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def error(self, name: str) -> float | None:
        """Its standard error, where the evaluation gives one."""
        result = self.result or {}
        value = result.get(f"{name}_se", (result.get("standard_errors") or {}).get(name))
        return value if isinstance(value, int | float) else None


def read_entry(directory: Path) -> Entry:
    """Settings, training curve and evaluation of one SAE.

    Raises:
        CorruptObject: a file is not what it should be.
    """
    from sae.core import read_json  # with torch, which --help must not wait for

    settings = directory / ("sae.json" if (directory / "sae.json").exists() else "cfg.json")
    entry = Entry(directory.resolve().name, directory, read_json(settings), _history(directory))
    if (directory / "eval.json").exists():
        entry.result = read_json(directory / "eval.json")
        found = entry.result.get("eval_version")
        if found != EVAL_VERSION:
            entry.notes.append(
                f"Evaluated by version {found} of the definitions; this page explains {EVAL_VERSION}."
            )
    else:
        entry.notes.append(
            f"Not evaluated yet: python -m sae eval {directory.name} adds its figures and latents."
        )
    return entry


def _history(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a kill has torn is left out."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    history = []
    for number, line in enumerate(lines, 1):
        try:
            history.append(json.loads(line))
        except ValueError as err:
            if number < len(lines):
                raise CorruptObject(f"{path} line {number} is not JSON ({err}); it was damaged.") from err
    step = -(-len(history) // _MAX_POINTS) if history else 1
    return history[::step] + (history[-1:] if (len(history) - 1) % step else [])
