"""What a run directory says of each of its SAEs, read from files only."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actcache.errors import CorruptObject, SpecError
from sae.evals.cli import find_saes
from sae.evals.definitions import EVAL_VERSION

_NEEDED = {"n_rows": int, "split": str, "dataset": str, "sae": Mapping}
_NEEDED_OF_LM = {"n_tokens": int, "n_sequences": int, "model": Mapping}


@dataclass
class Entry:
    """What there is to say about one SAE of the run; None or empty where a part is absent."""

    name: str
    directory: Path
    cfg: dict[str, Any]
    history: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    result: dict[str, Any] | None = None
    """eval.json"""
    tasks: dict[str, Any] = field(default_factory=dict)
    """tasks.json"""
    number: int = 0
    """Its place on the page, and so its colour."""
    notes: list[str] = field(default_factory=list)

    @property
    def site(self) -> str:
        return str(self.cfg.get("site") or "")

    @property
    def stopped(self) -> int | None:
        """Rows of the rung at which it stopped, because its rivals did better; None: it was trained to the end."""
        rung = self.cfg.get("stopped_at_rung")
        return rung if isinstance(rung, int) else None

    @property
    def short_name(self) -> str:
        """The directory's name without the site, which has a column of its own."""
        return self.name.removesuffix(f"-{self.site.replace('/', '_').replace(':', '_')}")

    @property
    def family(self) -> tuple[str, Any, str, str]:
        """SAEs that differ in sparsity alone: a line of the frontier."""
        kind, d_sae = str(self.cfg.get("architecture")), self.cfg.get("d_sae")
        named = re.fullmatch(rf"{re.escape(kind)}-{d_sae}-[\d.]+(?:e[+-]?\d+)?(.*)", self.short_name)
        return kind, d_sae, self.site, named[1] if named else ""

    def figure(self, name: str) -> float | None:
        """One number of eval.json."""
        value = (self.result or {}).get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def error(self, name: str) -> float | None:
        """Its standard error, where the evaluation gives one."""
        result = self.result or {}
        value = result.get(f"{name}_se", (result.get("standard_errors") or {}).get(name))
        return value if isinstance(value, int | float) else None


def read_run(run_dir: Path) -> list[Entry]:
    """All finished SAEs of a run, or the one SAE, by site and name.

    Raises:
        SpecError: there is none, or none yet.
        CorruptObject: a file is not what it should be.
    """
    unfinished = _unfinished(run_dir)
    entries = sorted((read_entry(Path(d)) for d in find_saes(run_dir)), key=lambda e: (e.site, e.name))
    for number, entry in enumerate(entries):
        entry.number = number
    if unfinished:
        entries[0].notes.append(f"Not finished, and so not shown: {', '.join(unfinished)}.")
    return entries


def _unfinished(run_dir: Path) -> list[str]:
    """SAEs that `run.json` names and that are not there yet.

    Raises:
        SpecError: none of them is.
    """
    from sae.core import SETTINGS_FILE, read_json
    from sae.rundir import RUN_FILE

    settings = run_dir / RUN_FILE
    names = [str(name) for name in read_json(settings).get("saes") or ()] if settings.exists() else []
    missing = [name for name in names if not (run_dir / name / SETTINGS_FILE).exists()]
    if missing and len(missing) == len(names):
        raise SpecError(
            f"the run in {run_dir} has not finished: none of {', '.join(names)} has its {SETTINGS_FILE} yet. "
            "Give the same `python -m sae train` command again; it goes on from the last checkpoint."
        )
    return missing


def read_entry(directory: Path) -> Entry:
    """Settings, training curve and evaluation of one SAE.

    Raises:
        CorruptObject: a file is not what it should be.
    """
    from sae.core import read_json  # with torch, which --help must not wait for

    settings = directory / ("sae.json" if (directory / "sae.json").exists() else "cfg.json")
    entry = Entry(directory.resolve().name, directory, read_json(settings), _history(directory))
    if (directory / "tasks.json").exists():
        entry.tasks = read_json(directory / "tasks.json")
    if (directory / "eval.json").exists():
        try:
            entry.result = read_json(directory / "eval.json")
        except CorruptObject as err:
            raise damaged(directory / "eval.json", "it is not a JSON object") from err
        _check(entry.result, directory)
        found = entry.result.get("eval_version")
        if found != EVAL_VERSION:
            entry.notes.append(
                f"Evaluated by version {found} of the definitions; this page explains {EVAL_VERSION}."
            )
    else:
        entry.notes.append(f"Not evaluated yet: python -m sae eval {directory} adds its figures and latents.")
    return entry


def damaged(path: Path, why: object) -> CorruptObject:
    """The error for a file of an evaluation that is not what `python -m sae eval` wrote."""
    return CorruptObject(
        f"{path} is damaged: {why}. Write it again: python -m sae eval {path.parent} --force."
    )


def _check(result: Mapping[str, Any], directory: Path) -> None:
    """What the page cannot do without."""
    needed = _NEEDED | (_NEEDED_OF_LM if result.get("model") else {})
    missing = [name for name, kind in needed.items() if not isinstance(result.get(name), kind)]
    if not missing and "digest" not in result["sae"]:
        missing = ["sae.digest"]
    if not missing and result.get("model") and "id" not in result["model"]:
        missing = ["model.id"]
    if missing:
        raise damaged(directory / "eval.json", f"it lacks {', '.join(missing)}")


def _history(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a kill has torn is left out."""
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    history = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ValueError(f"a {type(values).__name__}, not an object")
            history.append(values)
        except ValueError as err:
            if number < len(lines):
                raise CorruptObject(
                    f"{path} line {number} is not JSON ({err}); it was damaged. Remove that line."
                ) from err
    return history
