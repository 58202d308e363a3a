"""The `report` command: its options, and what it can do without."""

from pathlib import Path
from typing import Any

import click

from actcache.cli import storage_option
from actcache.errors import ActcacheError, SpecError
from sae.evals.cli import dataset_url

_FILE = click.Path(dir_okay=False, path_type=Path)
_DIRECTORY = click.Path(file_okay=False, path_type=Path)


@click.command("report", short_help="Write HTML about the SAEs of a run.")
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data", "url", help="Dataset URL. Default: the one that the SAEs were trained on.")
@click.option("--out", type=_FILE, help="HTML file. Default: RUN_DIR/report.html.")
@click.option("--model", help="LM path or hub id. Default: the one that was harvested.")
@click.option("--no-model", is_flag=True, help="Without the LM: no effects of latents on its logits.")
@click.option(
    "--latents",
    "n_latents",
    type=click.IntRange(0),
    default=6144,
    show_default=True,
    help="Latents with a dashboard, of each SAE; where it has more, living ones are drawn at random.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of that draw and of the sample shown first.")
@click.option(
    "--assets", type=_DIRECTORY, help="Also write figures (SVG, PNG) and tables (CSV) to this directory."
)
@click.option("--neuronpedia", type=_DIRECTORY, help="Also write Neuronpedia's upload layout there.")
@storage_option
def report_command(
    run_dir: Path,
    url: str | None,
    out: Path | None,
    model: str | None,
    no_model: bool,
    n_latents: int,
    seed: int,
    assets: Path | None,
    neuronpedia: Path | None,
    storage_options: dict[str, Any],
) -> None:
    """Write a self-contained HTML page about the SAEs in RUN_DIR and print where it is.

    Several SAEs give a summary with a page of each beside it. Pages open from disk and need no
    network; they show what is there: without eval.json, the training curves only.

    \b
    Examples:
      python -m sae report runs/x
      python -m sae report runs/x --data s3://bucket/prefix/NAME --out report.html
      python -m sae report runs/x/topk-6144-32 --assets figures --neuronpedia upload
    """
    import actcache
    from sae.report.entries import read_run
    from sae.report.page import write_report

    if model is not None and no_model:
        raise SpecError("--model and --no-model contradict each other; give one of them.")
    ds, note = None, ""
    cfgs = [entry.cfg for entry in read_run(run_dir)]
    try:
        ds = actcache.open(dataset_url(cfgs, url), storage_options=storage_options)
    except ActcacheError as err:
        if url is not None or neuronpedia is not None:
            raise
        note = f"The dataset could not be opened, so its card and the dashboards are left out: {err}. Give its place with --data."
    lm = None if no_model or ds is None else model or ds.spec.model
    click.echo(
        write_report(
            run_dir,
            ds,
            model=lm,
            out=out,
            n_latents=n_latents,
            seed=seed,
            dataset_note=note,
            assets=assets,
            neuronpedia=neuronpedia,
        )
    )
