"""Datasets as a person reads them: the table of `actcache ls` and the page of `actcache info`."""

from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .catalog import Entry
from .progress import format_bytes, format_count

_TABLE_WIDTH = 140  # columns; names of datasets are long, and a folded one cannot be copied


def print_listing(entries: Sequence[Entry], console: Console) -> None:
    """A line a dataset; a few lines each on a narrow console."""
    rows = [_ls_row(entry.summary()) for entry in entries]
    if console.width < _TABLE_WIDTH:
        for name, model, sites, *figures in rows:
            click.echo(name)
            labels = ("rows {}", "{}", "{}", "FVU {}", "CE {}")
            shown = [label.format(f) for label, f in zip(labels, figures, strict=True) if f]
            click.echo("  ".join(["", model, *shown] if model else ["", *shown]))
            click.echo("".join(f"  {site}\n" for site in sites.split("\n") if site), nl=False)
    else:
        table = Table(box=None, padding=(0, 1), pad_edge=False)
        for column in ("name", "model", "sites"):
            table.add_column(column, overflow="fold")
        for column in ("rows", "size", "state", "FVU", "CE"):
            table.add_column(column, justify="left" if column == "state" else "right", no_wrap=True)
        for cells in rows:
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table)


def print_description(description: Mapping[str, Any], console: Console) -> None:
    """What `catalog.describe` gives, with a table of its sites."""
    console.print(
        f"[bold]{description['url']}[/bold]  ({'complete' if description['complete'] else 'partial'})"
    )
    for name in ("model", "corpus", "context_size", "precision"):
        console.print(f"  {name.replace('_', ' '):14s}{description[name]}")
    rows = ", ".join(f"{split} {format_count(n)}" for split, n in description["rows"].items())
    console.print(f"  {'rows':14s}{rows}")
    console.print(f"  {'size':14s}{format_bytes(description['size_bytes'])}")
    table = Table(box=None, padding=(0, 1))
    table.add_column("site", no_wrap=True)
    for name in ("d_in", "bits/value", "FVU core", "FVU all", "median channel", "rescaled", "CE change"):
        table.add_column(name, justify="right", no_wrap=True)
    for site, s in description["sites"].items():
        change = "not measured" if s["ce_change"] is None else f"{s['ce_change']:+.1e}"
        numbers = (
            f"{s['bits_per_value']:.2f}",
            f"{s['fvu_core']:.2e}",
            f"{s['fvu_all']:.2e}",
            "not known" if s["fvu_median_channel"] is None else f"{s['fvu_median_channel']:.2e}",
            str(s["rows_rescaled"]),
        )
        table.add_row(site, str(s["d_in"]), *numbers, change)
    console.print(table)


def _ls_row(line: dict[str, Any]) -> tuple[str, ...]:
    """The cells of one dataset; blank where the manifest does not say."""
    if line["state"] == "unreadable":
        return line["name"], "", "", "", "", line["state"], "", ""

    def worst(name: str, form: str) -> str:
        known = [site[name] for site in line["sites"].values() if site[name] is not None]
        return form.format(max(known, key=abs)) if known else ""

    size = line["size_bytes"]
    return (
        line["name"],
        line["model"],
        "\n".join(line["sites"]),
        format_count(line["rows"]["train"]),
        "" if size is None else format_bytes(size),
        line["state"],
        worst("fvu_core", "{:.1e}"),
        worst("ce_change", "{:+.0e}"),
    )
