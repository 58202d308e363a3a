"""The HTML files of a report: one of each SAE, and for several SAEs a summary that links to them.

Owns which file holds what; `templates/` has the page with its CSS and script, `words`, `figures`
and `plots` what it says, `dashboards` and `payload` its latents.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from actcache.errors import ActcacheError, SpecError
from actcache.progress import Progress, format_bytes
from sae import plots
from sae.evals.definitions import DEFINITIONS
from sae.report import figures, words
from sae.report.entries import Entry, read_run

N_LATENTS = 6144
"""Dashboards of a page unless more are asked for: what fits 15 MB."""

_MAX_POINTS = 400  # of a training curve: more cannot be told apart at this size
_CURVES = (  # field of metrics.jsonl, title
    ("fvu", "Fraction of variance unexplained"),
    ("loss", "Training loss"),
    ("l0", "Active latents per row (L0)"),
    ("dead", "Dead latents"),
)
_HISTOGRAMS = {  # name in eval.json: title, x, y, whether edges are log10
    "log10_density": ("Latents by how often they fire", "share of rows", "latents", True),
    "l0_per_row": ("Rows by active latents", "active latents on a row (L0)", "rows", False),
}


@dataclass
class _Source:
    """Where dashboards come from."""

    ds: Any
    tokenizer: Any
    W_U_VD: Any = None
    note: str = ""
    """Why there are no logit effects."""


def write_report(
    run_dir: Path,
    ds: Any = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    out: Path | None = None,
    n_latents: int = N_LATENTS,
    seed: int = 0,
    dataset_note: str = "",
    assets: Path | None = None,
    neuronpedia: Path | None = None,
) -> Path:
    """Write the report of a run and return where it is (`report.html` in the run by default).

    One SAE gives one file. Several give a summary, and beside it `report-NAME.html` of each.

    Args:
        run_dir: a run directory of `sae.train`, or one SAE in it.
        ds: what `actcache.open` returned, or None: then there is no dataset card and no dashboard.
        model: the LM that was harvested (a path or hub id, or an `actcache.lm.LM`), for the latents'
            effect on its logits; None leaves that out.
        tokenizer: the LM's; loaded from the model named by `ds` when absent.
        out: the HTML file.
        n_latents: dashboards of each SAE; where it has more latents, living ones are drawn at random.
        seed: of that draw, and of the sample that is shown first.
        dataset_note: why there is no `ds`, shown in its place.
        assets: a directory for the figures as SVG and PNG and the tables as CSV.
        neuronpedia: a directory for the dashboards in Neuronpedia's upload layout.

    Raises:
        SpecError: no finished SAE in `run_dir`, or a place cannot be written to (found before any work).
        CorruptObject: a file of the run is not what it should be.
    """
    run_dir = Path(run_dir)
    entries = read_run(run_dir)
    out = Path(out) if out is not None else run_dir / "report.html"
    card = words.dataset_card(ds)
    note = dataset_note or "The dataset was not given, so its card and the latents' dashboards are left out."
    shared: dict[str, Any] = {"card": card, "dataset_note": note, "run": run_dir.resolve().name}
    several = len(entries) > 1
    pages = {e.name: f"{out.stem}-{e.name}{out.suffix}" if several else out.name for e in entries}
    for place, option in ((out.parent, "--out"), (assets, "--assets"), (neuronpedia, "--neuronpedia")):
        if place is not None:
            _check_writable(Path(place), option)
    source = _source(entries, ds, model, tokenizer)
    for entry in entries:
        latents = _latents(entry, source, n_latents, seed, neuronpedia) if source else None
        back = (out.name, run_dir.resolve().name) if several else None
        page = _render(entries=[entry], latents=latents, pages={}, back=back, ds=ds, **shared)
        _write(out.with_name(pages[entry.name]), page)
    if several:
        _write(out, _render(entries=entries, latents=None, pages=pages, back=None, ds=ds, **shared))
    if assets is not None:
        with _writing(assets, "--assets"):
            _write_assets(entries, Path(assets))
    return out


def _write(path: Path, page: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with _writing(path, "--out"):
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)


def _check_writable(directory: Path, option: str) -> None:
    """Make the directory and a file in it: minutes of work should not end where nothing can be written."""
    with _writing(directory, option):
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()


@contextmanager
def _writing(place: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        where, why = err.filename or place, err.strerror or err
        raise SpecError(f"{where} cannot be written ({why}). Choose another place with {option}.") from err


# Figures


def curves(entries: Sequence[Entry]) -> list[plots.Plot]:
    """One small plot for each quantity that was logged, all SAEs in it."""
    found = []
    for name, title in _CURVES:
        series = []
        for e in entries:
            points = [(h["rows"], h[name]) for h in e.history if {"rows", name} <= h.keys()]
            points = _thinned([(x, y) for x, y in points if x is not None and y is not None])
            if points:
                x, y = zip(*points, strict=True)
                series.append(plots.Line(e.short_name, e.number, x, y))
        if series:
            found.append(plots.lines(series, title=title, x_label="rows seen"))
    return found


def _thinned(points: list[Any]) -> list[Any]:
    """At most about _MAX_POINTS of them at even distances, the last one always."""
    step = max(1, -(-len(points) // _MAX_POINTS))
    return points[::step] + (points[-1:] if (len(points) - 1) % step else [])


def frontiers(entries: Sequence[Entry]) -> list[plots.Plot]:
    """L0 against FVU and against CE recovered, where more than one SAE has them."""
    found = []
    for name, title in (("fvu", "FVU"), ("ce_recovered_zero", "CE recovered")):
        points = [
            plots.Point(e.short_name, e.number, e.family, l0, y, e.error(name), e.number + 1)
            for e in entries
            if (l0 := e.figure("l0")) is not None and (y := e.figure(name)) is not None
        ]
        if len(points) > 1:
            found.append(plots.frontier(points, title=f"{title} by L0", x_label="L0", y_label=title))
    return found


def histograms(entry: Entry) -> list[plots.Plot]:
    """All histograms of an evaluation, density first."""
    stored = {name: (edges, counts) for name, edges, counts in figures.histograms(entry)}
    found = []
    for name in sorted(stored, key=lambda name: (name not in _HISTOGRAMS, name != "log10_density")):
        edges, counts = stored[name]
        title, x_label, y_label, log10 = _HISTOGRAMS.get(name, (name, name, "count", False))
        if log10:
            edges, counts = _without_empty_ends(edges, counts)
        found.append(
            plots.bars(
                edges, counts, entry.number, title=title, x_label=x_label, y_label=y_label, log10=log10
            )
        )
    return found


def _without_empty_ends(edges: list[float], counts: list[int]) -> tuple[list[float], list[int]]:
    """The histogram from the decade of its first latent on."""
    first = next((i for i, count in enumerate(counts) if count), 0)
    start = max((i for i in range(first + 1) if float(edges[i]).is_integer()), default=0)
    return edges[start:], counts[start:]


def _write_assets(entries: Sequence[Entry], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for plot in [*curves(entries), *frontiers(entries)]:
        plot.save(directory, _file_name(plot.title))
    for entry in entries:
        for plot in histograms(entry):
            plot.save(directory, _file_name(f"{entry.name} {plot.title}"))
    figures.write_csv(entries, directory)


def _file_name(title: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())


# Latents


def _source(entries: Sequence[Entry], ds: Any, model: Any, tokenizer: Any) -> _Source | None:
    """What all dashboards need; None, with a note to each SAE, where there can be none."""
    ready = [e for e in entries if e.result is not None and (e.directory / "latents.parquet").exists()]
    if not ready or ds is None:
        return None
    if tokenizer is None:
        from actcache.lm import load_tokenizer

        name = model if isinstance(model, str) else ds.spec.model
        revision = ds.spec.get("model", {}).get("revision") if name == ds.spec.model else None
        try:
            tokenizer = load_tokenizer(name, revision)
        except ActcacheError as err:
            for entry in ready:
                entry.notes.append(f"No dashboards: {err} Name the model's directory with --model.")
            return None
    source = _Source(ds, tokenizer)
    if model is None:
        source.note = "The LM was not given, so the latents' effects on its logits are left out."
        return source
    from sae.report.dashboards import unembedding

    try:
        source.W_U_VD = unembedding(_lm(model, ds))
    except ActcacheError as err:
        source.note = f"No effects on logits: {err}"
    return source


def _lm(model: Any, ds: Any) -> Any:
    from actcache.lm import load_harvested_lm

    return load_harvested_lm(ds.spec["model"], model) if isinstance(model, str) else model


def _latents(
    entry: Entry, source: _Source, n_latents: int, seed: int, neuronpedia: Path | None
) -> dict[str, Any] | None:
    """What the page needs of an SAE's latents; None, with a note, where that cannot be."""
    import sae
    from sae.evals.evaluation import digest
    from sae.report import dashboards, payload
    from sae.report.texts import TokenTexts

    result, ds = entry.result, source.ds
    if n_latents == 0 or result is None or not (entry.directory / "latents.parquet").exists():
        return None
    s = sae.load(entry.directory)
    if digest(s) != result["sae"]["digest"]:
        entry.notes.append(
            f"The weights are not those that were evaluated: run python -m sae eval {entry.directory} again."
        )
        return None
    if ds.id != result["dataset"]:
        entry.notes.append(
            f"No dashboards: it was evaluated on dataset {result['dataset'][:12]}, not on {ds.id[:12]}. "
            "Give that one with --data, or evaluate it on this one."
        )
        return None
    n_rows = result["n_rows"]
    with Progress(f"dashboards of {entry.short_name}", total=n_rows, unit="rows") as progress:
        found = dashboards.build(
            s,
            ds.split(result["split"]),
            n_rows,
            entry.directory / "latents.parquet",
            n_latents=n_latents,
            seed=seed,
            W_U_VD=source.W_U_VD,
            on_rows=progress.advance,
        )
    texts = TokenTexts(source.tokenizer)
    if neuronpedia is not None:
        from sae.report.neuronpedia import write_neuronpedia

        with _writing(neuronpedia, "--neuronpedia"):
            write_neuronpedia(found, s, ds, texts, Path(neuronpedia), split=result["split"])
    note = source.note
    if not note and found.logits is None:
        note = f"{entry.site} is not in the basis of the LM's residual stream: no effects on logits."
    return {
        "blocks": payload.blocks(found, texts, seed),
        "shown": len(found.latents),
        "d_sae": found.d_sae,
        "alive": int((found.snippets.fires > 0).sum()),
        "n_rows": n_rows,
        "split": result["split"],
        "note": note,
        "columns": [name for name in words.LATENT_COLUMNS if name in {*found.columns, *found.words}],
    }


# The page


def _render(
    *, entries: Sequence[Entry], latents: dict[str, Any] | None, ds: Any, run: str, **page: Any
) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sae"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {
        "percent": words.percent,
        "significant": words.significant,
        "bytes": format_bytes,
        "exact": lambda value: json.dumps(value),
    }
    environment.filters.update(filters)
    alone = entries[0] if len(entries) == 1 else None
    return environment.get_template("report.html.jinja").render(
        title=alone.name if alone else run,
        lead=words.lead(entries, ds),
        best=words.best(entries),
        entries=entries,
        latents=latents,
        figures=figures.figures(entries),
        tables=[*figures.tables(alone), *figures.task_tables(alone)] if alone else [],
        definitions=DEFINITIONS,
        columns=words.LATENT_COLUMNS,
        architecture=words.architecture,
        with_error=words.with_error,
        frontiers=[(plot.title, plot.inline()) for plot in frontiers(entries)],
        curves=[(plot.title, plot.inline()) for plot in curves(entries)],
        histograms=[(plot.title, plot.inline()) for plot in histograms(alone)] if alone else [],
        css=_template("report.css"),
        script=_template("report.js"),
        **page,
    )


def _template(name: str) -> Markup:
    return Markup((files("sae") / "templates" / name).read_text(encoding="utf-8"))
