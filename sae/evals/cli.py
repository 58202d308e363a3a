"""`python -m sae eval`: evaluate trained SAEs from the command line.

Owns the options and what is printed; `find_saes` is also how `report` reads a run directory.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from actcache.cli import storage_option
from actcache.errors import SpecError

_WIDE = 1000  # columns of a table that no terminal cuts
_COLUMNS = (  # heading, figure, format
    ("L0", "l0", "{:.1f}"),
    ("FVU", "fvu", "{:.4f}"),
    ("dead", "dead_latents", "{:,}"),
    ("CE clean", "ce_clean", "{:.4f}"),
    ("CE spliced", "ce_spliced", "{:.4f}"),
    ("CE recovered, zero", "ce_recovered_zero", "{:.4f}"),
    ("CE recovered, mean", "ce_recovered_mean", "{:.4f}"),
)


def find_saes(path: Path | str, storage_options: Mapping[str, Any] | None = None) -> list[Path | str]:
    """Directories of finished SAEs: `path` itself, or those directly below it, by name.

    At an fsspec URL: a run's SAEs, as its run.json names them.

    Raises:
        SpecError: there is none.
    """
    from sae.files import is_url, local_path

    if is_url(path):
        return _saes_at_url(str(path).rstrip("/"), storage_options)
    path, names = local_path(path), ("sae.json", "cfg.json")
    if any((path / name).exists() for name in names):
        return [path]
    found = sorted(p for p in path.glob("*/") if any((p / name).exists() for name in names))
    if not found:
        raise SpecError(
            f"{path} holds no finished SAE (no sae.json in it nor one level below). "
            "Give the --out directory of `python -m sae train`, or one SAE inside it."
        )
    return list(found)


def _saes_at_url(url: str, storage_options: Mapping[str, Any] | None) -> list[Path | str]:
    from sae.core import SETTINGS_FILE, parse_json
    from sae.files import run_files
    from sae.rundir import RUN_FILE

    files = run_files(url, storage_options)
    if files.read(SETTINGS_FILE) is not None:
        return [url]
    run = files.read(RUN_FILE)
    names = () if run is None else sorted(parse_json(f"{url}/{RUN_FILE}", run).get("saes", ()))
    found: list[Path | str] = [
        f"{url}/{name}" for name in names if files.read(f"{name}/{SETTINGS_FILE}") is not None
    ]
    if not found:
        raise SpecError(
            f"{url} holds no finished SAE (no {SETTINGS_FILE} in it, nor a finished run's {RUN_FILE}). "
            "Give the --out URL of `python -m sae train`, or one SAE inside it."
        )
    return found


def dataset_url(cfgs: Sequence[dict[str, Any]], given: str | None) -> str:
    """The dataset asked for, or the one that all these SAEs were trained on.

    Raises:
        SpecError: none was given and the SAEs name none, or several.
    """
    if given is not None:
        return given
    known = {(cfg.get("dataset") or {}).get("url") for cfg in cfgs}
    urls = sorted(url for url in known if url)
    if len(urls) != 1:
        found = (
            f"were trained on several datasets ({', '.join(urls)})" if urls else "do not say their dataset"
        )
        raise SpecError(f"these SAEs {found}. Give one with --data URL.")
    return urls[0]


@click.command("eval", short_help="Evaluate trained SAEs on held-out activations and in their LM.")
@click.argument("paths", nargs=-1, required=True, type=str)
@click.option(
    "--data",
    "urls",
    multiple=True,
    metavar="URL",
    help="Dataset. Default: the one that the SAEs were trained on. Repeat it to see how they transfer, e.g. from "
    "the activations of a base model to those of its chat model: each SAE is evaluated on each.",
)
@click.option("--split", default="validation", show_default=True, help="Split of the dataset.")
@click.option("--model", help="LM path or hub id. Default: the one that was harvested.")
@click.option("--no-model", is_flag=True, help="Only the metrics that need no LM: from the shards alone.")
@click.option(
    "--sequences",
    "n_sequences",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Sequences run through the LM, from the first of the split.",
)
@click.option(
    "--tokens",
    "n_tokens",
    type=click.IntRange(1),
    help="Tokens run through the LM, rounded up to whole sequences; instead of --sequences.",
)
@click.option(
    "--target-error",
    type=click.FloatRange(0, 1, min_open=True),
    help="As many tokens as bring the standard error of CE recovered (zero) below this; instead of --sequences.",
)
@click.option(
    "--join",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Sequences joined into one for the LM: losses by position beyond the harvested context.",
)
@click.option(
    "--compat",
    type=click.Choice(["saelens"]),
    help="Ablate and count losses as SAELens and SAEBench do, to compare with their figures.",
)
@click.option(
    "--token-sets",
    is_flag=True,
    help="Which kind of token each latent promotes (slow for large vocabularies).",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME",
    help="Also run a task: probing, brackets (bundled LM), ioi (GPT-2), or a JSONL file of prompt, answer and "
    "wrong. Repeat for several; results go to tasks.json.",
)
@click.option(
    "--workers",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Ray actors that share the work; 0: this process. The figures are the same.",
)
@click.option(
    "--gpus-per-worker", type=click.FloatRange(0), default=0, show_default=True, help="GPUs of an actor."
)
@click.option(
    "--rows", "n_rows", type=click.IntRange(1), help="Rows the SAEs see, from the first. Default: all."
)
@click.option("--force", is_flag=True, help="Evaluate again even where the same result is stored.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as a JSON list on standard output.")
@storage_option
def eval_command(
    paths: tuple[str, ...],
    urls: tuple[str, ...],
    split: str,
    model: str | None,
    no_model: bool,
    n_sequences: int,
    n_tokens: int | None,
    target_error: float | None,
    join: int,
    compat: str | None,
    token_sets: bool,
    tasks: tuple[str, ...],
    workers: int,
    gpus_per_worker: float,
    n_rows: int | None,
    force: bool,
    as_json: bool,
    storage_options: dict[str, Any],
) -> None:
    """Evaluate the SAEs in PATHS: SAE directories, or run directories that hold them, also at URLs.

    Writes eval.json and latents.parquet beside each local SAE and prints a table. A result of the same
    SAE, data and settings is reused. Losses are in nats per token; docs/evals.md explains the figures.

    \b
    Examples:
      python -m sae eval runs/x
      python -m sae eval runs/x/topk-6144-32 --no-model --rows 65536
      python -m sae eval runs/x --data s3://bucket/prefix/NAME --workers 8 --target-error 0.001 --json
    """
    import actcache
    import sae
    from sae.evals.evaluation import evaluate_many

    if no_model and (model is not None or tasks):
        other = "--model" if model is not None else "--task"
        raise SpecError(f"{other} and --no-model contradict each other; give one of them.")
    directories = [directory for path in paths for directory in find_saes(path, storage_options)]
    saes = [sae.load(directory, storage_options) for directory in directories]
    found = urls or (dataset_url([s.cfg for s in saes], None),)
    datasets = [actcache.open(url, storage_options=storage_options) for url in found]

    def evaluate_on(ds: Any) -> list[dict[str, Any]]:
        lm = None if no_model else model or ds.spec.model
        tokenizer = None
        if lm is not None and (token_sets or tasks):
            from actcache.lm import load_tokenizer

            tokenizer = load_tokenizer(lm)
        results = evaluate_many(
            saes,
            ds,
            lm,
            split,
            n_sequences=n_sequences if n_tokens is None else -(-n_tokens // ds.spec.context_size),
            n_rows=n_rows,
            target_error=target_error,
            join=join,
            compat=compat,
            tokenizer=tokenizer if token_sets else None,
            workers=workers,
            gpus_per_worker=gpus_per_worker,
            reuse=not force,
        )
        if tasks and lm is not None:
            from actcache.lm import load_harvested_lm
            from sae.evals.tasks import run_tasks

            loaded = load_harvested_lm(ds.spec["model"], lm)
            by_sae = [run_tasks(s, ds, loaded, tokenizer, tasks) for s in saes]
            results = [{**result, "tasks": by_task} for result, by_task in zip(results, by_sae, strict=True)]
        return results

    # eval.json and tasks.json are of the evaluation that ran last: let it be the dataset named first
    results = [result for ds in datasets[::-1] for result in evaluate_on(ds)[::-1]][::-1]
    if as_json:
        click.echo(json.dumps(results, indent=2))
    else:
        rows = [(directory, ds) for ds in datasets for directory in directories]
        _print_table([d for d, _ in rows], results, [ds.url for _, ds in rows] if len(datasets) > 1 else None)


@click.command("compare", short_help="Say how many latents two SAEs share.")
@click.argument("one", metavar="SAE")
@click.argument("other", metavar="OTHER")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON on standard output.")
@storage_option
def compare_command(one: str, other: str, as_json: bool, storage_options: dict[str, Any]) -> None:
    """Compare the decoder directions of two SAEs of one width d_in; from weights alone.

    
    mcc                   mean |cosine| of latents matched one to one (mean correlation coefficient)
    max_cosine_to_other   mean over the first's latents of |cosine| to the nearest of the second
    max_cosine_from_other the same from the second's latents

    About 7 s at 6,144 latents on 2 cores; the time grows with the cube of the width.

    
    Examples:
      python -m sae compare runs/seed0/topk-6144-32 runs/seed1/topk-6144-32
    """
    import sae
    from sae.evals.geometry import compare

    a, b = (sae.load(path, storage_options) for path in (one, other))
    try:
        figures = compare(a, b)
    except ValueError as err:
        raise SpecError(f"{one} and {other}: {err}.") from err
    if as_json:
        click.echo(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        click.echo(f"{name:<22} {value:.4f}")


def _print_table(
    directories: Sequence[Path | str], results: Sequence[dict[str, Any]], datasets: Sequence[str] | None
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("SAE", overflow="fold", min_width=18)
    if datasets is not None:
        table.add_column("dataset", overflow="fold", min_width=18)
    columns = [column for column in _COLUMNS if any(result.get(column[1]) is not None for result in results)]
    for heading, _, _ in columns:
        table.add_column(heading, justify="right", min_width=6)
    for i, (directory, result) in enumerate(zip(directories, results, strict=True)):
        values = ["" if result.get(name) is None else form.format(result[name]) for _, name, form in columns]
        where = [] if datasets is None else [_last_name(datasets[i])]
        table.add_row(_last_name(directory), *where, *values)
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width to keep to
        console = Console(highlight=False, width=_WIDE)
    console.print(table)
    for directory, result in zip(directories, results, strict=True):
        for name, found in result.get("tasks", {}).items():
            click.echo(f"{_last_name(directory)} {name}: {_task_line(found)}")
    first = results[0]
    click.echo(
        f"{first['split']} split: {first['n_rows']:,} rows"
        + (f", {first['n_sequences']:,} sequences through {first['model']['id']}" if first["model"] else "")
    )


def _last_name(where: Path | str) -> str:
    return str(where).rstrip("/").rsplit("/", 1)[-1]


def _task_line(found: dict[str, Any]) -> str:
    """A task's result in one line."""
    if "skipped" in found:
        return f"skipped: {found['skipped']}"
    if "recovered" in found:
        recovered = "undefined" if found["recovered"] is None else f"{found['recovered']:.3f}"
        return f"logit difference recovered {recovered}, accuracy {found['accuracy']:.0%}"
    parts = []
    for label, scores in found.items():
        if "skipped" in scores:
            parts.append(f"{label} skipped")
        else:
            parts.append(
                f"{label} AUC {scores['k1']['auc']:.2f} by one latent, {scores['dense']['auc']:.2f} dense"
            )
    return "; ".join(parts)
