"""`python -m sae report`: one self-contained HTML file about all the SAEs of a run.

Owns what the report says; `plots` draws the figures and `templates/report.html.jinja` holds the
page with its CSS and script. Figures come from files only (`sae.json`, `metrics.jsonl`,
`eval.json`, `latents.parquet`) and every number in the metrics table is the one in `eval.json`.
The dataset, where it can be reached, adds its card and the snippets. What is absent is said, not
guessed. Text of the corpus is escaped, always: nothing in it can become markup.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from markupsafe import Markup

from actcache.cli import storage_option
from actcache.errors import ActcacheError, CorruptObject, SpecError
from actcache.progress import Progress, format_bytes
from sae import plots
from sae.evals.cli import dataset_url, find_saes
from sae.evals.definitions import DEFINITIONS, EVAL_VERSION
from sae.snippets import Snippet, TokenTexts, snippets_of

_SNIPPETS = 8  # of the 16 places kept for each latent
_CURVES = (  # field of metrics.jsonl, title
    ("fvu", "Fraction of variance unexplained"),
    ("loss", "Training loss"),
    ("l0", "Active latents per row (L0)"),
    ("dead", "Dead latents"),
)
_CARD_NUMBERS = ("latent", "density", "fires", "mean_activation", "max_activation")
_MAX_POINTS = 400  # of a training curve: more cannot be told apart at this size


@dataclass
class Entry:
    """What there is to say about one SAE of the run; None or empty where a part is absent."""

    name: str
    directory: Path
    cfg: dict[str, Any]
    history: list[dict[str, Any]]
    result: dict[str, Any] | None = None
    number: int = 0
    """Its place on the page, and so its colour."""
    notes: list[str] = field(default_factory=list)
    histograms: list[Markup] = field(default_factory=list)
    groups: list[tuple[str, list["LatentCard"]]] = field(default_factory=list)

    @property
    def site(self) -> str:
        return str(self.cfg.get("site") or "")

    @property
    def short_name(self) -> str:
        """The directory's name without the site, which has a column of its own."""
        return self.name.removesuffix(f"-{self.site.replace('/', '_').replace(':', '_')}")


@dataclass(frozen=True)
class LatentCard:
    """One latent of the sample: its row of `latents.parquet` and its strongest contexts."""

    latent: int
    density: float
    fires: int
    mean_activation: float
    max_activation: float
    snippets: list[Snippet]

    def value(self, activation: float) -> str:
        """An activation with as many decimals as all others of this latent."""
        if self.max_activation <= 0:  # nothing but negative activations, as some foreign SAEs have
            return f"{activation:.3g}"
        return f"{activation:.{max(0, 2 - math.floor(math.log10(self.max_activation)))}f}"


def write_report(
    run_dir: Path,
    ds: Any = None,
    *,
    out: Path | None = None,
    n_latents: int = 12,
    seed: int = 0,
    tokenizer: Any = None,
    dataset_note: str = "",
) -> Path:
    """Write the report of a run and return where it is (`report.html` in the run by default).

    Args:
        run_dir: a run directory of `sae.train`, or one SAE in it.
        ds: what `actcache.open` returned, or None: then there is no dataset card and no snippet.
        out: the HTML file.
        n_latents: living latents drawn at random from each SAE, beside the most and least frequent.
        seed: of that draw.
        tokenizer: the LM's; loaded from the model named by `ds` when absent.
        dataset_note: why there is no `ds`, shown in its place.

    Raises:
        SpecError: no finished SAE in `run_dir`.
        CorruptObject: a file of the run is not what it should be.
    """
    entries = sorted(
        (_entry(Path(directory)) for directory in find_saes(Path(run_dir))), key=lambda e: (e.site, e.name)
    )
    for number, entry in enumerate(entries):
        entry.number = number
    for entry in entries:
        _add_histograms(entry)
    _add_latents(entries, ds, tokenizer, n_latents, seed)
    out = Path(out) if out is not None else Path(run_dir) / "report.html"
    page = _render(
        title=Path(run_dir).resolve().name,
        lead=_lead(entries, ds),
        best=_best(entries),
        entries=entries,
        definitions=DEFINITIONS,
        curves=_curves(entries),
        card=_dataset_card(ds),
        dataset_note=dataset_note or "The dataset was not given, so its card and the snippets are left out.",
    )
    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        partial.replace(out)
    except OSError as err:
        raise SpecError(f"{out} cannot be written ({err.strerror}). Choose another file with --out.") from err
    return out


# What a run directory holds


def _entry(directory: Path) -> Entry:
    settings = directory / ("sae.json" if (directory / "sae.json").exists() else "cfg.json")
    from sae.core import read_json  # with torch, which --help must not wait for

    entry = Entry(directory.resolve().name, directory, read_json(settings), _history(directory))
    if (directory / "eval.json").exists():
        entry.result = read_json(directory / "eval.json")
        if entry.result.get("eval_version") != EVAL_VERSION:
            found = entry.result.get("eval_version")
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


# Figures


def _curves(entries: Sequence[Entry]) -> list[tuple[str, Markup]]:
    """One small plot for each quantity that was logged, all SAEs in it."""
    figures = []
    for name, title in _CURVES:
        series = []
        for e in entries:
            points = [(h["rows"], h[name]) for h in e.history if h.get(name) is not None]
            if points:
                x, y = zip(*points, strict=True)
                series.append(plots.Line(e.short_name, e.number, x, y))
        if series:
            figures.append((title, plots.lines(series, title=title, x_label="rows seen")))
    return figures


def _add_histograms(entry: Entry) -> None:
    histograms = (entry.result or {}).get("histograms", {})
    if l0 := histograms.get("l0_per_row"):
        label = f"rows of {entry.name} by number of active latents"
        entry.histograms.append(
            plots.bars(l0["edges"], l0["counts"], entry.number, label, "active latents on a row (L0)", "rows")
        )
    if density := histograms.get("log10_density"):
        label = f"latents of {entry.name} by share of rows on which they fire"
        edges, counts = _without_empty_ends(density["edges"], density["counts"])
        x_label = "share of rows on which a latent fires"
        entry.histograms.append(
            plots.bars(edges, counts, entry.number, label, x_label, "latents", log10=True)
        )


def _without_empty_ends(edges: list[float], counts: list[int]) -> tuple[list[float], list[int]]:
    """The histogram from the decade of its first latent on."""
    first = next((i for i, count in enumerate(counts) if count), 0)
    start = max((i for i in range(first + 1) if float(edges[i]).is_integer()), default=0)
    return edges[start:], counts[start:]


# Latents


def _add_latents(entries: Sequence[Entry], ds: Any, tokenizer: Any, n_latents: int, seed: int) -> None:
    """Give every evaluated SAE its sample of latents; say why where that cannot be."""
    ready = [e for e in entries if e.result is not None and (e.directory / "latents.parquet").exists()]
    if not ready or ds is None:
        return
    if tokenizer is None:
        from actcache.lm import load_tokenizer

        try:
            tokenizer = load_tokenizer(ds.spec.model, ds.spec.get("model", {}).get("revision"))
        except ActcacheError as err:
            for entry in ready:
                entry.notes.append(f"No snippets: {err} Name the model's directory with --model.")
            return
    texts = TokenTexts(tokenizer)
    with Progress("collecting snippets", total=len(ready), unit="SAEs") as progress:
        for entry in ready:
            _add_latents_of(entry, ds, texts, n_latents, seed)
            progress.advance(1)


def _add_latents_of(entry: Entry, ds: Any, texts: TokenTexts, n_latents: int, seed: int) -> None:
    import sae
    from sae.evals.evaluation import digest
    from sae.evals.latents import activations_around, read_parquet

    result = entry.result
    assert result is not None
    s = sae.load(entry.directory)
    if digest(s) != result["sae"]["digest"]:
        entry.notes.append("The weights are not those that were evaluated: run python -m sae eval again.")
        return
    if ds.id != result["dataset"]:
        entry.notes.append("No snippets: it was evaluated on another dataset than the one given.")
        return
    table = read_parquet(entry.directory / "latents.parquet")
    chosen = _sample(table, n_latents, seed)
    latents = [latent for _, group in chosen for latent in group]
    view = ds.split(result["split"])
    sequences = sorted({q for latent in latents for q in table[latent]["top_sequence"]})
    around = activations_around(s, view, sequences, latents, result["n_rows"]) if latents else {}
    context = {q: view.context(q) for q in sequences}
    column = {latent: i for i, latent in enumerate(latents)}
    for title, group in chosen:
        cards = []
        for latent in group:
            row = table[latent]
            values = {q: around[q][:, column[latent]] for q in row["top_sequence"]}
            snippets = snippets_of(row, values, context, texts, _SNIPPETS)
            numbers = {name: row[name] for name in _CARD_NUMBERS}
            cards.append(LatentCard(**numbers, snippets=snippets))
        entry.groups.append((title, cards))


def _sample(table: Sequence[dict[str, Any]], n: int, seed: int) -> list[tuple[str, list[int]]]:
    """Latents in groups: at random among the living, then the most and the least frequent."""
    alive = [row["latent"] for row in table if row["fires"] > 0]
    by_fires = sorted(alive, key=lambda latent: (-table[latent]["fires"], latent))
    drawn = sorted(np.random.default_rng(seed).permutation(alive)[:n].tolist())
    groups: list[tuple[str, list[int]]] = [(f"Drawn at random (seed {seed})", drawn)]
    seen = set(drawn)
    for title, candidates in (
        ("Most frequent", by_fires),
        ("Rarest", [latent for latent in reversed(by_fires) if table[latent]["fires"] >= _SNIPPETS]),
    ):
        group = [latent for latent in candidates if latent not in seen][: max(1, n // 4)]
        seen.update(group)
        groups.append((title, group))
    return [(title, group) for title, group in groups if group]


# Words and numbers


def _lead(entries: Sequence[Entry], ds: Any) -> str:
    """What was trained, on what, in one sentence."""
    n = len(entries)
    sites = sorted({e.site for e in entries if e.site})
    rows = {e.cfg["rows"] for e in entries if "rows" in e.cfg}
    model = (
        ds.spec.model if ds is not None else next((e.cfg["model"] for e in entries if e.cfg.get("model")), "")
    )
    sentence = "One sparse autoencoder" if n == 1 else f"{_in_words(n)} sparse autoencoders"
    if len(rows) == 1:
        sentence += f", trained on {_count(rows.pop())} activation rows"
    if model:
        sentence += f" of {model}"
    if sites:
        sentence += f" at {' and '.join(sites) if len(sites) < 3 else f'{len(sites)} sites'}"
    return sentence + "."


def _best(entries: Sequence[Entry]) -> str:
    """How good the best one is; empty without an evaluation."""
    measured = [e for e in entries if e.result and e.result.get("fvu") is not None]
    if not measured:
        return ""
    with_lm = [e for e in measured if (e.result or {}).get("ce_recovered_zero") is not None]
    if with_lm:
        best = max(with_lm, key=lambda e: (e.result or {})["ce_recovered_zero"])
    else:
        best = min(measured, key=lambda e: (e.result or {})["fvu"])
    r = best.result or {}
    where = f" at {best.site}" if len({e.site for e in entries}) > 1 else ""
    text = f"With {r['l0']:.1f} of {r['sae']['d_sae']:,} latents active on a row, {best.short_name}{where} "
    text += f"leaves {_percent(r['fvu'])} of the variance unexplained"
    if with_lm:
        text += (
            f" and recovers {_percent(r['ce_recovered_zero'])} of the loss that zeros in its place would cost"
        )
    return text + (", the most in this run." if with_lm and len(entries) > 1 else ".")


def _in_words(n: int) -> str:
    words = ("Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve")
    return words[n - 2] if 2 <= n < 2 + len(words) else str(n)


def _count(n: float) -> str:
    return f"{n / 1e6:.3g} million" if n >= 1e6 else f"{n:,.0f}"


def _percent(share: float) -> str:
    """Two significant digits below 10 %, one decimal above; `96.8 %`, `0.031 %`."""
    percent = 100 * share
    return f"{percent:.1f} %" if abs(percent) >= 10 or percent == 0 else f"{percent:.2g} %"


def _significant(value: float) -> str:
    """Three significant digits without an exponent where that is short: `0.000947`, `12.3`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _dataset_card(ds: Any) -> dict[str, Any] | None:
    """What the dataset says of itself: facts (term, value) and a row for each site."""
    if ds is None:
        return None
    identity, manifest = ds.spec, getattr(ds, "manifest", None)
    model, tokens = identity.get("model", {}), identity.get("tokens", {})
    provenance = getattr(manifest, "provenance", {}) or {}
    splits = getattr(manifest, "splits", {}) or {"train": {"n_rows": ds.n_rows}}
    order = sorted(splits, key=lambda name: -splits[name]["n_rows"])
    rows = ", ".join(f"{splits[name]['n_rows']:,} {name}" for name in order if splits[name]["n_rows"])
    facts = [
        (
            "Language model",
            f"{ds.spec.model} ({str(model.get('revision', '')).removeprefix('sha256:')[:12]})",
        ),
        ("Corpus", str(ds.spec.corpus)),
        (
            "Context",
            f"{ds.spec.context_size} tokens"
            + (", BOS first" if tokens.get("bos_token_id") is not None else ""),
        ),
        ("Rows", rows),
        ("Precision", f"{identity.get('precision', '')}, LM in {model.get('lm_dtype', '')}"),
    ]
    if hasattr(ds, "size_bytes"):
        size = sum(ds.split(name).size_bytes() for name, size in splits.items() if size["n_rows"])
        facts.append(("Size on disk", f"{format_bytes(size)} with tokens and row metadata"))
    if provenance.get("rows_per_s"):
        rate = f"{provenance['rows_per_s']:,.0f} rows/s with {provenance.get('workers', 1)} worker(s)"
        facts.append(("Last harvest", f"{rate} on {provenance.get('device', 'cpu')}"))
    facts += [("Dataset", ds.id[:12]), ("Address", ds.url)]
    fidelity = getattr(manifest, "fidelity", {}) or {}
    sites = [{**ds.stats(site), "site": site, **fidelity.get(site, {})} for site in ds.sites]
    for row in sites:
        row["d_in"] = len(row["mean"])
    return {"facts": [(term, value) for term, value in facts if value], "sites": sites}


def _render(**page: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sae"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {
        "percent": _percent,
        "significant": _significant,
        "bytes": format_bytes,
        "exact": lambda value: json.dumps(value),
    }
    environment.filters.update(filters)
    return environment.get_template("report.html.jinja").render(**page)


@click.command("report", short_help="Write one HTML file about all the SAEs of a run.")
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data", "url", help="Dataset URL. Default: the one that the SAEs were trained on.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="HTML file. Default: RUN_DIR/report.html."
)
@click.option("--model", help="Where the tokenizer is. Default: the LM that was harvested.")
@click.option(
    "--latents",
    "n_latents",
    type=click.IntRange(0),
    default=12,
    show_default=True,
    help="Latents shown of each SAE, drawn at random.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of that draw.")
@storage_option
def report_command(
    run_dir: Path,
    url: str | None,
    out: Path | None,
    model: str | None,
    n_latents: int,
    seed: int,
    storage_options: dict[str, Any],
) -> None:
    """Write one self-contained HTML page about the SAEs in RUN_DIR and print where it is.

    It opens from disk, needs no network, and shows what is there: without eval.json it has the
    training curves only.

    \b
    Examples:
      python -m sae report runs/x
      python -m sae report runs/x --data s3://bucket/prefix/NAME --out report.html
    """
    import actcache
    from actcache.lm import load_tokenizer

    ds, note = None, ""
    cfgs = [_entry(Path(directory)).cfg for directory in find_saes(run_dir)]
    try:
        ds = actcache.open(dataset_url(cfgs, url), storage_options=storage_options)
    except ActcacheError as err:
        if url is not None:
            raise
        note = f"The dataset could not be opened, so its card and the snippets are left out: {err}"
    tokenizer = load_tokenizer(model) if model else None
    click.echo(
        write_report(
            run_dir, ds, out=out, n_latents=n_latents, seed=seed, tokenizer=tokenizer, dataset_note=note
        )
    )
