"""`actcache` on the command line: harvest, ls, info, verify, gc, rm. Heavy imports wait until they are needed."""

import json
import re
import sys
from typing import Any

import click

from .cli import run, storage_option
from .progress import format_bytes, format_count

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_DEFAULT_SITE = "blocks.3.hook_resid_post"
_TABLE_WIDTH = 140  # columns; names of datasets are long, and a folded one cannot be copied


@click.group(context_settings=_SETTINGS)
def cli() -> None:
    """Harvest a language model's activations once, stream them anywhere.

    harvest makes a dataset, or finds it made; ls, info and verify look at what is there; gc and rm remove.
    To train and evaluate SAEs on a dataset: python -m sae --help.
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
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line, by site.")
@storage_option
def list_command(root: str, as_json: bool, storage_options: dict[str, Any]) -> None:
    """List the datasets under ROOT (a directory or URL).

    Rows are of the train split. FVU is the noise of storing as a fraction of the variance of core rows, CE
    the change of the model's loss in nats when stored values take the place of its own: the worst site's.

    \b
    Examples:
      actcache ls data
      actcache ls s3://bucket/acts --json
    """
    from rich.table import Table
    from rich.text import Text

    from .catalog import list_datasets

    entries = list_datasets(root, storage_options)
    if as_json:
        for entry in entries:
            click.echo(json.dumps(entry.summary()))
        return
    rows = [_ls_row(entry.summary()) for entry in entries]
    console = _console()
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
    for entry in entries:
        if entry.error:
            click.echo(f"unreadable: {entry.name}: {entry.error}", err=True)


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


@cli.command(context_settings=_SETTINGS)
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
@storage_option
def info(url: str, as_json: bool, storage_options: dict[str, Any]) -> None:
    """Describe the dataset at URL: model, corpus, rows, size and measured fidelity."""
    _print_info(url, storage_options, as_json)


@cli.command(context_settings=_SETTINGS)
@click.argument("url")
@click.option("--deep", is_flag=True, help="Also read every object whole: checksums, tokens, statistics.")
@click.option(
    "--replay",
    type=click.IntRange(0),
    default=0,
    metavar="K",
    help="Also compute K random rows again with the LM, spread over sites and splits.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which rows --replay draws.")
@click.option(
    "--model",
    metavar="PATH",
    help="For --replay, where the LM is. Default: the bundled or hub model that was harvested.",
)
@click.option("--device", default="cpu", show_default=True, help="Of the LM: cpu, cuda, ...")
@click.option("--json", "as_json", is_flag=True, help="The counts and problems as JSON.")
@storage_option
def verify(
    url: str,
    deep: bool,
    replay: int,
    seed: int,
    model: str | None,
    device: str,
    as_json: bool,
    storage_options: dict[str, Any],
) -> None:
    """Check the dataset at URL against its manifest; print what was checked, or every problem.

    Without options it takes one listing and the metadata: missing and truncated objects, and zarr.json.
    --deep reads everything, in the memory of a block or two. The exit code is 1 if anything is wrong.

    \b
    Examples:
      actcache verify data/NAME
      actcache verify s3://bucket/acts/NAME --deep --replay 100
      actcache verify data/NAME --replay 100 --model models/my-gpt2   # harvested from a directory
    """
    from .errors import DamagedDataset
    from .reader import open_dataset
    from .verify import verify as run_verify

    dataset = open_dataset(url, storage_options=storage_options)
    problems: list[str] = []
    try:
        checked = run_verify(dataset, deep=deep, replay=replay, seed=seed, model=model, device=device)
    except DamagedDataset as err:
        checked, problems = err.checked, err.problems
    if as_json:
        click.echo(json.dumps({"url": dataset.url, "checked": checked, "problems": problems}))
    else:
        _print_counts(checked)
    for problem in problems:
        click.echo(f"problem: {problem}", err=True)
    if problems:
        raise click.ClickException(f"{dataset.url} has {len(problems)} problems")


@cli.command(context_settings=_SETTINGS)
@click.argument("url")
@click.option(
    "--grace",
    default="24h",
    show_default=True,
    metavar="TIME",
    help="Touch nothing younger than this by the store's clock, e.g. 90s, 30m, 24h, 7d.",
)
@click.option(
    "--keep",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    metavar="N",
    help="Manifest versions to keep whatever their age.",
)
@click.option("--dry-run", is_flag=True, help="List what would be removed, remove nothing.")
@click.option("--json", "as_json", is_flag=True, help="Keys and counts as JSON.")
@storage_option
def gc(
    url: str, grace: str, keep: int, dry_run: bool, as_json: bool, storage_options: dict[str, Any]
) -> None:
    """Remove what no kept manifest version of the dataset at URL names.

    Such as blocks of dead writers, old versions, and records that a segment holds. Refuses a dataset that
    seems to be written: wait until a harvest has ended, and start none meanwhile. Token stores, which
    datasets share, are not touched. Writes one small object to learn the store's time, and removes it.

    \b
    Examples:
      actcache gc data/NAME --dry-run
      actcache gc s3://bucket/acts/NAME --grace 7d --keep 3
    """
    from .gc import collect_garbage

    done = collect_garbage(
        url, grace_s=_seconds(grace), keep=keep, dry_run=dry_run, storage_options=storage_options
    )
    if as_json:
        click.echo(json.dumps(done))
        return
    if dry_run:
        click.echo("".join(f"{key}\n" for key in done["keys"]), nl=False)
    for key in done["unknown_keys"]:
        click.echo(f"kept, not of this format: {key}", err=True)
    parts = ", ".join(f"{n:,} {name}" for name, n in done["removed"].items() if n) or "nothing"
    click.echo(f"{'would remove' if dry_run else 'removed'} {parts} ({format_bytes(done['size_bytes'])})")


@cli.command(context_settings=_SETTINGS)
@click.argument("url")
@click.option("--yes", is_flag=True, help="Do not ask; for scripts.")
@storage_option
def rm(url: str, yes: bool, storage_options: dict[str, Any]) -> None:
    """Remove the whole dataset at URL, after you typed its id.

    Shows its rows and size first. Interrupted, it can be run again. Token stores are not touched.

    \b
    Examples:
      actcache rm data/NAME
      actcache rm s3://bucket/acts/NAME --yes
    """
    from .gc import plan_removal, remove_dataset

    removal = plan_removal(url, storage_options)
    rows = ", ".join(f"{split} {format_count(n)}" for split, n in removal.n_rows.items())
    n_objects = sum(map(len, removal.objects.values()))
    click.echo(f"{removal.store.url}\n  rows     {rows or 'none that can be read'}")
    click.echo(f"  size     {format_bytes(removal.size_bytes)} in {n_objects:,} objects")
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("standard input is no terminal; give --yes to remove without asking")
        short = removal.name.rsplit("-", 1)[-1]
        if click.prompt(f"type {short} to remove it", default="", show_default=False) != short:
            raise click.ClickException(f"that is not {short}; nothing was removed")
    removed = remove_dataset(removal)
    for key in removal.unknown:
        click.echo(f"kept, not of this format: {key}", err=True)
    click.echo(f"removed {removed:,} objects")


def _seconds(text: str) -> float:
    """`90s`, `30m`, `24h` or `7d` in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if match is None:
        raise click.UsageError(f"--grace is {text!r}; give a number with s, m, h or d, such as 24h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def _print_counts(counts: dict[str, Any]) -> None:
    for name, n in counts.items():
        shown = format_bytes(n) if name.endswith("bytes") else f"{n:,}"
        click.echo(f"{name}: {shown}")


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
