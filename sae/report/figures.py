"""Every figure of the evaluations as rows of a table, whatever `eval.json` holds.

Owns which values are figures (numbers that `DEFINITIONS` names first, then the other numbers of
`eval.json` and of the objects in it), tables and histograms in it, and their CSV files.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae.evals.definitions import DEFINITIONS, GROUPS
from sae.report.entries import Entry
from sae.report.words import with_error

_NOT_FIGURES = {
    "eval_version",
    "sae",
    "dataset",
    "split",
    "n_rows",
    "n_sequences",
    "n_tokens",
    "model",
    "settings",
    "eval_batch_sequences",
} | {
    "standard_errors",
    "histograms",
}
_MAX_DEPTH = 3
_TABLES = {  # name in eval.json or tasks.json: title, what its rows are
    "breakdowns · position": ("By position", "Rows of tokens at positions from–to of their sequence."),
    "breakdowns · norm": (
        "By norm",
        "Rows by their norm, in half octaves around the mean norm of the train rows.",
    ),
    "breakdowns · loss_by_position": (
        "Loss of the LM by position",
        "Nats per token predicted from positions from–to; beyond context: longer than what was harvested.",
    ),
    "probing": (
        "Sparse probing",
        "AUC of telling a kind of token from the rest by 1, 2 or 5 latents, and by a linear probe on the raw row "
        "(dense); ood: on files of another origin.",
    ),
    "tasks": (
        "Logit differences",
        "Mean logit of the right next token minus the wrong one; recovered: 1 as the clean LM, 0 as with the mean row.",
    ),
}


@dataclass(frozen=True)
class Cell:
    """One figure of one SAE."""

    entry: Entry
    value: float | None
    error: float | None

    @property
    def text(self) -> str:
        return "–" if self.value is None else with_error(self.value, self.error)


@dataclass(frozen=True)
class Figure:
    """One figure of all SAEs."""

    name: str
    definition: str
    cells: list[Cell]

    @property
    def group(self) -> str:
        """What it is about."""
        return next((title for title, names in GROUPS.items() if self.name in names), "Others")


@dataclass
class Table:
    """A list of objects found in `eval.json`: figures by position, by norm, by task."""

    name: str
    entry: Entry
    columns: list[str]
    rows: list[list[Any]] = field(default_factory=list)

    @property
    def title(self) -> str:
        return _TABLES.get(self.name, (self.name, ""))[0]

    @property
    def note(self) -> str:
        """What its rows are."""
        return _TABLES.get(self.name, (self.name, ""))[1]


def figures(entries: Sequence[Entry]) -> list[Figure]:
    """A row for each number that any of the SAEs has, in the order of DEFINITIONS, then as found."""
    evaluated = [e for e in entries if e.result is not None]
    found: dict[str, None] = {}
    flat = {e.name: dict(_numbers(e.result or {})) for e in evaluated}
    for name in DEFINITIONS:
        if any(name in flat[e.name] for e in evaluated):
            found[name] = None
    for values in flat.values():
        found |= dict.fromkeys(values)
    errors = {name for name in found if name.endswith("_se") and name.removesuffix("_se") in found}
    return [
        Figure(
            name,
            DEFINITIONS.get(name, ""),
            [
                Cell(e, flat[e.name].get(name), flat[e.name].get(f"{name}_se", e.error(name)))
                for e in evaluated
            ],
        )
        for name in found
        if name not in errors
    ]


def _numbers(values: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if depth == 0 and name in _NOT_FIGURES:
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, value
        elif value is None and prefix + name in DEFINITIONS:
            yield prefix + name, None
        elif isinstance(value, Mapping) and depth < _MAX_DEPTH and not _is_histogram(value):
            yield from _numbers(value, f"{prefix}{name} · ", depth + 1)


def _is_histogram(value: Any) -> bool:
    if not (isinstance(value, Mapping) and {"edges", "counts"} <= value.keys()):
        return False
    edges, counts = value["edges"], value["counts"]
    return isinstance(edges, list) and isinstance(counts, list) and len(edges) == len(counts) + 1


def histograms(entry: Entry) -> list[tuple[str, list[float], list[int]]]:
    """(name, edges, counts) of all histograms of an evaluation."""
    stored = (entry.result or {}).get("histograms") or {}
    return [(name, h["edges"], h["counts"]) for name, h in stored.items() if _is_histogram(h)]


def tables(entry: Entry) -> list[Table]:
    """Lists of objects, and objects of lists of one length, anywhere in `eval.json`."""
    return list(_tables(entry, entry.result or {}, ""))


def _tables(entry: Entry, values: Mapping[str, Any], prefix: str, depth: int = 0) -> Iterator[Table]:
    for name, value in values.items():
        if depth == 0 and name in _NOT_FIGURES:
            continue
        if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
            columns = list(dict.fromkeys(key for row in value for key in row if _is_scalar(row[key])))
            if columns:
                rows = [[row.get(key) for key in columns] for row in value]
                yield Table(prefix + name, entry, columns, rows)
        elif isinstance(value, Mapping) and not _is_histogram(value):
            lists = {key: v for key, v in value.items() if isinstance(v, list) and all(map(_is_scalar, v))}
            lengths = {len(v) for v in lists.values()}
            if len(lists) > 1 and len(lengths) == 1 and lengths != {0}:
                yield Table(
                    prefix + name, entry, list(lists), [list(r) for r in zip(*lists.values(), strict=True)]
                )
            if depth < _MAX_DEPTH:
                yield from _tables(entry, value, f"{prefix}{name} · ", depth + 1)


def task_tables(entry: Entry) -> list[Table]:
    """Results of tasks: a table for each with a row for each of its parts, and one of all the others."""
    parts = {
        name: found
        for name, found in entry.tasks.items()
        if isinstance(found, Mapping) and found and all(isinstance(v, Mapping) for v in found.values())
    }
    rest = {n: v for n, v in entry.tasks.items() if n not in parts and isinstance(v, Mapping)}
    found = {**parts, **({"tasks": rest} if rest else {})}
    return [_of_rows(name, entry, rows) for name, rows in found.items()]


def _of_rows(name: str, entry: Entry, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    flat = {row: dict(_scalars(values)) for row, values in rows.items()}
    columns = list(dict.fromkeys(column for values in flat.values() for column in values))
    cells = [[row, *(values.get(column) for column in columns)] for row, values in flat.items()]
    return Table(name, entry, ["of", *columns], cells)


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name} ")
        elif isinstance(value, list) and all(map(_is_scalar, value)):
            yield prefix + name, ", ".join(map(str, value))
        elif _is_scalar(value):
            yield prefix + name, value


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, int | float | str)


def write_csv(entries: Sequence[Entry], directory: Path) -> list[Path]:
    """`figures.csv` with every figure, and one file for each table and histogram; values in full.

    Args:
        entries: the SAEs of the run.
        directory: where the files go; it exists.
    """
    head = ["figure", "sae", "value", "standard_error", "definition"]
    rows = [[f.name, c.entry.name, c.value, c.error, f.definition] for f in figures(entries) for c in f.cells]
    files: dict[str, list[list[Any]]] = {"figures": [head, *rows]}
    for entry in entries:
        for table in [*tables(entry), *task_tables(entry)]:
            files[f"{entry.name}-{table.name}"] = [table.columns, *table.rows]
        for name, edges, counts in histograms(entry):
            bins = map(list, zip(edges[:-1], edges[1:], counts, strict=True))
            files[f"{entry.name}-{name}"] = [["from", "to", "count"], *bins]
        if entry.history:
            columns = list(dict.fromkeys(key for line in entry.history for key in line))
            lines = [[line.get(key) for key in columns] for line in entry.history]
            files[f"{entry.name}-training"] = [columns, *lines]
    written = []
    for name, content in files.items():
        written.append(directory / f"{_file(name)}.csv")
        with open(written[-1], "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([_exact(value) for value in row] for row in content)
    return written


def _file(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _exact(value: Any) -> Any:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)
