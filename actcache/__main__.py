"""`actcache` on the command line: harvest, ls, info, verify. Heavy imports wait until they are needed."""

import json
import sys
from typing import Any

import click

from .cli import run, storage_option
from .progress import format_bytes, format_count

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_DEFAULT_SITE = "blocks.3.hook_resid_post"


@click.group(context_settings=_SETTINGS)
def cli() -> None:
    """Harvest a language model's activations once, stream them anywhere.

    harvest makes a dataset, or finds it made; ls, info and verify look at what is there. To train and
    evaluate SAEs on a dataset: python -m sae --help.
    """


@cli.command(context_settings=_SETTINGS)
@click.option(
    "--model",
    default="bundled:stdlib-gpt2",
    show_default=True,
    metavar="ID",
    help="Hugging Face causal LM: id or directory.",
)
@click.option(
    "--model-revision", metavar="REV", help="Hub commit, branch or tag. Default: the newest commit."
)
@click.option(
    "--lm-dtype",
    default="float32",
    show_default=True,
    help="What the LM runs in: float32, bfloat16 or float16. Never taken from the checkpoint.",
)
@click.option(
    "--corpus",
    "source",
    default="bundled:stdlib",
    show_default=True,
    metavar="SOURCE",
    help="File, glob, directory or URL of text, .jsonl or .parquet files; s3:// and hf:// too.",
)
@click.option(
    "--text-field", default="text", show_default=True, help="Field (jsonl) or column (parquet) with the text."
)
@click.option(
    "--max-tokens", type=int, metavar="N", help="Take only the first N tokens of the corpus. Default: all."
)
@click.option(
    "--site",
    "sites",
    multiple=True,
    metavar="SITE",
    help="Where to take activations: a TransformerLens name (globs allowed: 'blocks.*.hook_resid_post') or a "
    f"module path with :in or :out; repeat for several. Default for the bundled model: {_DEFAULT_SITE}.",
)
@click.option(
    "--context-size", type=int, default=256, show_default=True, metavar="T", help="Tokens in a sequence."
)
@click.option(
    "--tokens",
    "n_tokens",
    type=int,
    default=2_000_000,
    show_default=True,
    metavar="N",
    help="Rows wanted for training, rounded up to whole blocks; raise it later to extend the dataset.",
)
@click.option(
    "--precision",
    default="fvu:1e-3",
    show_default=True,
    help="fvu:<x> (int8; noise is at most the fraction x of the variance), rotated:<x> (the same noise on "
    "principal components; fewer bits, slower), bf16, fp16 or fp32.",
)
@click.option(
    "--block-rows", type=int, metavar="N", help="Rows in a block, the unit of work. Default: 131072."
)
@click.option(
    "--prepend-bos/--no-prepend-bos", default=None, help="Start sequences with BOS. Default: if there is one."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the shuffles.")
@click.option(
    "--root",
    required=True,
    metavar="URL",
    help="Directory or URL that holds the datasets, e.g. s3://bucket/acts.",
)
@click.option(
    "--workers", type=int, default=1, show_default=True, help="Ray actors, each with its own copy of the LM."
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    help="local: in this process; ray: actors on the cluster of RAY_ADDRESS, or on a fresh local one. "
    "Default: ray for more than one worker.",
)
@click.option(
    "--lm-batch", type=int, default=32, show_default=True, metavar="B", help="Sequences in one forward pass."
)
@click.option("--device", default="cpu", show_default=True, help="Device of the LM: cpu, cuda, ...")
@click.option(
    "--gpus-per-worker", type=float, default=0, show_default=True, help="GPUs that Ray reserves for an actor."
)
@click.option("--json", "as_json", is_flag=True, help="Print the dataset's description as JSON.")
@storage_option
def harvest(
    source: str,
    text_field: str,
    max_tokens: int | None,
    sites: tuple[str, ...],
    root: str,
    workers: int,
    engine: str | None,
    lm_batch: int,
    device: str,
    gpus_per_worker: float,
    as_json: bool,
    storage_options: dict[str, Any],
    **fields: Any,
) -> None:
    """Run a language model over a corpus and store its activations.

    The same command resumes after a crash, returns at once when everything is there, and computes only
    what is missing when --tokens is raised or a --site is added.

    \b
    Examples:
      actcache harvest --root data                                     # the bundled model and corpus
      actcache harvest --model EleutherAI/pythia-160m --corpus 's3://bucket/pile/*.jsonl.gz' \\
          --site 'blocks.{4,8}.hook_resid_post' --tokens 100000000 --root s3://bucket/acts \\
          --workers 8 --device cuda --gpus-per-worker 1
    """
    from .driver import harvest as run_harvest
    from .spec import Corpus, Spec

    if not sites:
        if not fields["model"].startswith("bundled:"):
            raise click.UsageError("--site is required for this model, e.g. --site blocks.6.hook_resid_post")
        sites = (_DEFAULT_SITE,)
    spec = Spec(corpus=Corpus(source, text_field=text_field, max_tokens=max_tokens), sites=sites, **fields)
    dataset = run_harvest(
        spec,
        root,
        workers=workers,
        engine=engine or ("ray" if workers > 1 else "local"),
        lm_batch=lm_batch,
        device=device,
        gpus_per_worker=gpus_per_worker,
        storage_options=storage_options,
    )
    _print_info(dataset.url, storage_options, as_json)


@cli.command("ls", context_settings=_SETTINGS)
@click.argument("root")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@storage_option
def list_command(root: str, as_json: bool, storage_options: dict[str, Any]) -> None:
    """List the datasets under ROOT (a directory or URL)."""
    from rich.table import Table

    from .catalog import list_datasets

    entries = list_datasets(root, storage_options)
    table = Table("name", "sites", "train rows", "state", box=None)
    for entry in entries:
        manifest = entry.manifest
        line: dict[str, Any] = {"name": entry.name, "state": entry.error}
        if manifest is not None:
            line |= {"sites": sorted(manifest.sites), "rows": manifest.splits["train"]["n_rows"]}
            line["state"] = "complete" if manifest.complete else "partial"
        if as_json:
            click.echo(json.dumps(line))
        elif manifest is None:
            table.add_row(entry.name, "", "", f"unreadable: {entry.error}")
        else:
            table.add_row(entry.name, "\n".join(line["sites"]), format_count(line["rows"]), line["state"])
    if not as_json:
        _console().print(table)


@cli.command(context_settings=_SETTINGS)
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
@storage_option
def info(url: str, as_json: bool, storage_options: dict[str, Any]) -> None:
    """Describe the dataset at URL: model, corpus, rows, size and measured fidelity."""
    _print_info(url, storage_options, as_json)


@cli.command(context_settings=_SETTINGS)
@click.argument("url")
@click.option("--deep", is_flag=True, help="Also read every object and check every checksum.")
@click.option("--json", "as_json", is_flag=True, help="The counts as JSON.")
@storage_option
def verify(url: str, deep: bool, as_json: bool, storage_options: dict[str, Any]) -> None:
    """Check the dataset at URL against its manifest; --deep reads all of it."""
    from .reader import open_dataset
    from .verify import verify as run_verify

    report = run_verify(open_dataset(url, storage_options=storage_options), deep=deep)
    click.echo(json.dumps(report) if as_json else "\n".join(f"{k}: {v}" for k, v in report.items()))


def _print_info(url: str, storage_options: dict[str, Any], as_json: bool) -> None:
    from .catalog import describe
    from .reader import open_dataset

    description = describe(open_dataset(url, storage_options=storage_options))
    if as_json:
        click.echo(json.dumps(description))
        return
    from rich.table import Table

    console = _console()
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
    for name in ("d_in", "bits/value", "FVU core", "FVU all", "rescaled", "CE change"):
        table.add_column(name, justify="right", no_wrap=True)
    for site, s in description["sites"].items():
        change = "not measured" if s["ce_change"] is None else f"{s['ce_change']:+.1e}"
        numbers = (
            f"{s['bits_per_value']:.2f}",
            f"{s['fvu_core']:.2e}",
            f"{s['fvu_all']:.2e}",
            str(s["rows_rescaled"]),
        )
        table.add_row(site, str(s["d_in"]), *numbers, change)
    console.print(table)


def _console() -> Any:
    """Standard output; wide when it is no terminal, so that a pipe or file loses nothing."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def main() -> None:
    """The console script."""
    sys.exit(
        run(cli, "actcache", interrupted="stopped; what is committed stays, run the same command to go on")
    )


if __name__ == "__main__":
    main()
