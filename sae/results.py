"""What a training ended with: the last line of metrics of each SAE, as JSON and as a table of 80 columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from .architectures import Architecture
from .core import SETTINGS_FILE, parse_json
from .files import run_files
from .rundir import last_metrics
from .rungs import rivals
from .training import Training


def results(
    out: str, names: Sequence[str], storage_options: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Path and last metrics of each SAE of a finished run, in the order of the names.

    Of one that stopped at a rung also `stopped_at_rung`.
    """
    files, found = run_files(out, storage_options), []
    for name in names:
        cfg = parse_json(f"{files.url}/{name}", files.read(f"{name}/{SETTINGS_FILE}") or b"")
        stopped = {key: cfg[key] for key in ("stopped_at_rung",) if key in cfg}
        path = f"{out.rstrip('/')}/{name}"
        found.append({"path": path, **last_metrics(out, name, storage_options), **stopped})
    return found


def ranked(
    found: Sequence[Mapping[str, Any]], configs: Sequence[Architecture], training: Training
) -> list[int]:
    """Numbers of the SAEs: rivals together, in each group those that went furthest first, then the best.

    The best have the least FVU where k fixes L0, elsewhere the least loss, in the last batch.
    """

    def key(i: int) -> tuple[Any, ...]:
        return -found[i]["rows"], found[i].get("score", found[i][configs[i].scored_by]), i

    groups = rivals(configs, [training.rules(c) for c in configs])
    return [i for group in groups for i in sorted(group, key=key)]


def table(found: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A row for each SAE, in this order; a column for the rungs where one stopped."""
    stopped = any("stopped_at_rung" in r for r in found)
    shown = Table(box=None, pad_edge=False)
    headings = ["SAE", "rows", "L0", "FVU (last batch)", "dead"]
    for heading in [*headings, *(["stopped"] if stopped else [])]:
        shown.add_column(heading, justify="left" if heading == "SAE" else "right", overflow="fold")
    for r in found:
        cells = [
            r["path"].rpartition("/")[2],
            f"{r['rows']:,}",
            f"{r['l0']:.1f}",
            f"{r['fvu']:.4f}",
            str(r["dead"]),
        ]
        shown.add_row(*cells, *(["yes" if "stopped_at_rung" in r else ""] if stopped else []))
    return shown
