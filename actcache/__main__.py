"""`actcache` on the command line: plan, check, harvest, ls, info, verify, gc, rm. Heavy imports wait until they are needed."""

import json
import math
import re
import sys
from typing import TYPE_CHECKING, Any

import click

from .cli import run, storage_option
from .progress import format_bytes, format_count
from .spec_options import spec_options

if TYPE_CHECKING:
    from .spec import Spec

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def _pairs(option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for item in values:
        name, separator, value = item.partition("=")
        if not name or not separator or not value:
            raise click.BadParameter(f"{item!r} is not {option.metavar}")
        pairs[name] = value
    return pairs


def _parse_labels(_: Any, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    return _pairs(option, values)


def _parse_resources(_: Any, option: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    amounts = {}
    for name, text in _pairs(option, values).items():
        try:
            amounts[name] = float(text)
        except ValueError:
            amounts[name] = math.nan
        if not 0 < amounts[name] < math.inf:
            raise click.BadParameter(f"{name}={text}: the amount must be a number above 0")
    return amounts


_lm_batch_option = click.option(
    "--lm-batch",
    type=int,
    default=32,
    show_default=True,
    metavar="B",
    help="Sequences in one forward pass; fewer where these are more than 65,536 tokens, or their rows more than a "
    "quarter of --buffer.",
)
_buffer_option = click.option(
    "--buffer",
    "buffer_gib",
    type=float,
    default=4,
    show_default=True,
    metavar="GIB",
    help="Rows and codes under way that a worker may hold in memory, beside the LM. One block always goes.",
)


@click.group(context_settings=_SETTINGS)
def cli() -> None:
    """Harvest a language model's activations once, stream them anywhere.

    plan says what a harvest would take, check whether this machine can; harvest makes a dataset, or finds it made; ls, info and verify look at what is there; gc and rm remove.
    To train and evaluate SAEs on a dataset: python -m sae --help.
    """


@cli.command(context_settings=_SETTINGS)
@spec_options
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
@_lm_batch_option
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Device of the LM: cpu, cuda, ..., or auto to spread it over a worker's GPUs.",
)
@click.option(
    "--gpus-per-worker", type=float, default=0, show_default=True, help="GPUs that Ray reserves for an actor."
)
@click.option(
    "--cpus-per-worker", type=float, default=1, show_default=True, help="CPUs that Ray reserves for an actor."
)
@click.option(
    "--worker-resource",
    "resources",
    multiple=True,
    metavar="NAME=AMOUNT",
    callback=_parse_resources,
    help="Custom Ray resource that an actor needs; repeat for several.",
)
@click.option(
    "--worker-label",
    "labels",
    multiple=True,
    metavar="KEY=VALUE",
    callback=_parse_labels,
    help="Label that an actor's node must have, e.g. pool=harvest; repeat for several.",
)
@_buffer_option
@click.option(
    "--attention",
    metavar="KERNEL",
    help="Attention kernel, e.g. flash_attention_2. Default: sdpa where it is right.",
)
@click.option("--compile", is_flag=True, help="Run the LM's blocks through torch.compile.")
@click.option("--dry-run", is_flag=True, help="Print the plan of it, as `actcache plan` does, and stop.")
@click.option(
    "--progress", is_flag=True, help="Print how much of it is stored already, whoever harvests it, and stop."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the dataset's description (plan, progress) as JSON."
)
@storage_option
def harvest(
    spec: "Spec",
    root: str,
    workers: int,
    engine: str | None,
    lm_batch: int,
    device: str,
    gpus_per_worker: float,
    cpus_per_worker: float,
    resources: dict[str, float],
    labels: dict[str, str],
    buffer_gib: float,
    attention: str | None,
    compile: bool,
    dry_run: bool,
    progress: bool,
    as_json: bool,
    storage_options: dict[str, Any],
) -> None:
    """Run a language model over a corpus and store its activations.

    The same command resumes after a crash, returns at once when everything is there, and computes only
    what is missing when --tokens is raised or a --site is added. While another run of it is at work, it waits.
    SIGTERM ends it once the blocks in flight are committed.

    \b
    Examples:
      actcache harvest --root data                                     # the bundled model and corpus
      actcache harvest --model EleutherAI/pythia-160m --corpus 's3://bucket/pile/*.jsonl.gz' \\
          --site 'blocks.{4,8}.hook_resid_post' --tokens 100000000 --root s3://bucket/acts \\
          --workers 8 --device cuda --gpus-per-worker 1
    """
    if dry_run:
        _print_plan(
            spec,
            root,
            as_json,
            workers=workers,
            gpus_per_worker=gpus_per_worker or 1,
            lm_batch=lm_batch,
            buffer_bytes=_buffer_bytes(buffer_gib),
            storage_options=storage_options,
        )
        return
    if progress:
        _print_progress(spec, root, as_json, storage_options)
        return
    from .driver import harvest as run_harvest

    engine = engine or ("ray" if workers > 1 else "local")
    if engine == "local" and (resources or labels):
        raise click.UsageError(
            "--worker-resource and --worker-label are for Ray actors; give --engine ray too"
        )
    dataset = run_harvest(
        spec,
        root,
        workers=workers,
        engine=engine,
        lm_batch=lm_batch,
        device=device,
        gpus_per_worker=gpus_per_worker,
        attention=attention,
        compile=compile,
        buffer_bytes=_buffer_bytes(buffer_gib),
        placement={"num_cpus": cpus_per_worker, "resources": resources, "label_selector": labels},
        storage_options=storage_options,
    )
    _print_info(dataset.url, storage_options, as_json)


@cli.command(context_settings=_SETTINGS)
@spec_options
@click.option(
    "--root", metavar="URL", help="Where it would be harvested: what is there already is taken into account."
)
@click.option(
    "--rate",
    type=float,
    metavar="N",
    help="Tokens/s of one worker. Default: that of a harvest of the same model under --root, scaled by "
    "operations; else operations over the peak of --gpu times --mfu.",
)
@click.option("--gpu", metavar="NAME", help="GPU of the price table. Default: h100.")
@click.option(
    "--mfu", type=float, default=0.4, show_default=True, help="Share of the GPU's peak that is reached."
)
@click.option(
    "--prices",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="TOML with your prices and GPUs in place of those of actcache/prices.toml, which are assumptions.",
)
@click.option(
    "--months", type=float, default=1, show_default=True, help="How long the dataset is kept, for its cost."
)
@click.option("--workers", type=int, default=1, show_default=True, help="That run side by side.")
@click.option(
    "--gpus-per-worker", type=float, default=1, show_default=True, help="GPUs that one worker takes."
)
@_lm_batch_option
@_buffer_option
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
@storage_option
def plan(spec: "Spec", root: str | None, as_json: bool, buffer_gib: float, **options: Any) -> None:
    """Say what a harvest would take: rows, bytes, requests, GPU hours, dollars, and when it has paid.

    Takes the options of `harvest`, writes nothing and reads no weights. What could not be counted in a
    few seconds is estimated, and marked with ~. Prices are assumptions.

    \b
    Examples:
      actcache plan --root data                             # the bundled model and corpus
      actcache plan --model EleutherAI/pythia-160m --corpus 's3://bucket/pile/*.jsonl.gz' \\
          --site 'blocks.{4,8}.hook_resid_post' --tokens 100000000 --lm-dtype bfloat16 \\
          --root s3://bucket/acts --workers 8 --gpu a100 --prices ours.toml
    """
    _print_plan(spec, root, as_json, buffer_bytes=_buffer_bytes(buffer_gib), **options)


def _buffer_bytes(buffer_gib: float) -> int:
    if not 0 < buffer_gib < math.inf:
        raise click.UsageError(f"--buffer is {buffer_gib}; give a number of GiB above 0")
    return int(buffer_gib * 2**30)


def _print_plan(spec: "Spec", root: str | None, as_json: bool, **options: Any) -> None:
    from .planning import plan as make_plan

    made = make_plan(spec, root, **options)
    if as_json:
        click.echo(json.dumps(made.as_json()))
        return
    from .plan_text import print_plan

    print_plan(made, _console())


def _print_progress(spec: "Spec", root: str, as_json: bool, storage_options: dict[str, Any]) -> None:
    from .standing import standing, standing_line

    found = standing(spec, root, storage_options)
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(f"{found['url']}\n{standing_line(found)}")
    for block in found["quarantined"]:
        click.echo(f"set aside: {block['split']} block {block['block']}: {block['error']}")


@cli.command(context_settings=_SETTINGS)
@click.argument("root")
@click.option("--model", metavar="ID", help="Also: is this model in reach, or are its weights here?")
@click.option("--model-revision", metavar="REV", help="Of the model.")
@click.option(
    "--gpus",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="GPUs with free memory that must be here.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per check.")
@storage_option
def check(
    root: str,
    model: str | None,
    model_revision: str | None,
    gpus: int,
    as_json: bool,
    storage_options: dict[str, Any],
) -> None:
    """Try on this machine what a harvest to ROOT needs, and say what helps where it fails.

    Writes a small object under ROOT/_checks and removes it. The exit code is 1 if a check fails.

    \b
    Examples:
      actcache check data
      actcache check s3://bucket/acts --model EleutherAI/pythia-160m --gpus 8
    """
    from .probe import run_checks

    checks = run_checks(
        root, model=model, revision=model_revision, gpus=gpus, storage_options=storage_options
    )
    for one in checks:
        if as_json:
            click.echo(json.dumps(one))
            continue
        click.echo(f"{'ok  ' if one['ok'] else 'FAIL'} {one['check']}: {one['found']}")
        if one["fix"]:
            click.echo(f"     fix: {one['fix']}")
    failed = [one["check"] for one in checks if not one["ok"]]
    if failed:
        raise click.ClickException(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


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
    from .catalog import list_datasets
    from .catalog_text import print_listing

    entries = list_datasets(root, storage_options)
    if as_json:
        for entry in entries:
            click.echo(json.dumps(entry.summary()))
        return
    print_listing(entries, _console())
    for entry in entries:
        if entry.error:
            click.echo(f"unreadable: {entry.name}: {entry.error}", err=True)


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
    is being harvested or seems to be written; a harvest that begins meanwhile waits. Token stores, which
    datasets share, are not touched. Writes two small objects, to learn the store's time and to keep
    harvests out, and removes them.

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

    Shows its rows and size first. Refuses a dataset that is being harvested. Interrupted, it can be run again.
    Token stores are not touched.

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
    from .catalog_text import print_description
    from .reader import open_dataset

    description = describe(open_dataset(url, storage_options=storage_options))
    if as_json:
        click.echo(json.dumps(description))
        return
    print_description(description, _console())


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
