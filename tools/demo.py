"""`make demo`: text in, a trained and evaluated SAE out, on embedded defaults.

The bundled LM over this machine's Python standard library: two sites harvested in one pass by two
Ray actors, two SAEs trained on one stream, evaluated on held-out files, and an HTML report. Run it
again and the dataset is a cache hit; kill it anywhere and run it again, and it goes on.
"""

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import actcache
import sae
from actcache.cli import start_logging
from actcache.errors import ActcacheError
from actcache.progress import format_bytes, format_count, format_duration
from sae.evals import evaluate_many
from sae.report import write_report

SITES = ("blocks.3.hook_resid_post", "blocks.3.hook_mlp_out")
MODEL = "bundled:stdlib-gpt2"


def run(out: Path, n_tokens: int, workers: int) -> Path:
    """The whole path; returns the report's file."""
    spec = actcache.Spec(
        model=MODEL,
        corpus=actcache.Corpus("bundled:stdlib"),
        sites=SITES,
        context_size=256,
        n_tokens=n_tokens,
    )
    dataset = actcache.harvest(spec, str(out / "datasets"), engine="ray", workers=workers)
    stream = dataset.stream(SITES[0], batch_size=2048, epochs=2, metadata=False)
    configs = [sae.TopK(d_sae=1536, k=32), sae.BatchTopK(d_sae=1536, k=32)]
    training = sae.Training(n_rows=2 * stream.n_rows, lr=2e-3)
    saes = sae.train(stream, configs, training, out=out / "runs" / f"demo-{n_tokens}")
    results = evaluate_many(saes, dataset, MODEL, "validation", n_sequences=128)
    report = write_report(saes[0].path.parent, dataset, model=MODEL, out=out / "report.html")
    _print_summary(dataset, saes, results)
    return report


def _print_summary(dataset: actcache.Dataset, saes: list[sae.SAE], results: list[dict]) -> None:
    console = Console(highlight=False)
    stats = dataset.stats(SITES[0])
    table = Table(box=None, padding=(0, 2), show_header=False)
    rows_per_s = dataset.manifest.provenance.get("rows_per_s", 0)
    for name, value in (
        ("rows", f"{dataset.n_rows:,} for training, {dataset.split('validation').n_rows:,} held out"),
        ("sites", ", ".join(dataset.sites)),
        ("bits per value", f"{stats['bits_per_value']:.2f} (float32: 32)"),
        ("noise of storing", f"FVU {stats['fvu_core']:.1e}, CE {_fidelity(dataset):+.1e} nats"),
        ("on disk", format_bytes(sum(dataset.split(s).size_bytes() for s in dataset.splits))),
        ("harvest rate", f"{format_count(rows_per_s)} rows/s, both sites"),
    ):
        table.add_row(name, value)
    console.print(table)
    table = Table(box=None, padding=(0, 2))
    table.add_column("SAE")
    for name in ("L0", "FVU", "CE recovered", "dead latents"):
        table.add_column(name, justify="right")
    for s, r in zip(saes, results, strict=True):
        dead = f"{r['dead_latents']:,} of {s.W_dec.shape[0]:,}"
        numbers = (f"{r['l0']:.1f}", f"{r['fvu']:.4f}", f"{r['ce_recovered_zero']:.4f}", dead)
        table.add_row(s.path.name, *numbers)
    console.print(table)


def _fidelity(dataset: actcache.Dataset) -> float:
    return dataset.manifest.fidelity[SITES[0]]["ce_change"]


def main() -> int:
    """Parse the options and run; errors are one line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="directory for everything it makes"
    )
    parser.add_argument("--tokens", type=int, default=2_000_000, help="rows to harvest for training")
    parser.add_argument("--workers", type=int, default=2, help="Ray actors")
    options = parser.parse_args()
    start_logging()
    start = time.monotonic()
    try:
        report = run(options.out, options.tokens, options.workers)
    except ActcacheError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    took = format_duration(time.monotonic() - start)
    print(f"\nreport: {report} (open it in a browser)\ntook {took} on this machine")
    return 0


if __name__ == "__main__":
    sys.exit(main())
