"""`python -m sae`: train, progress, eval, compare, report, export. Options of `train` come from the config dataclasses.

Heavy imports happen inside the commands, so `--help` is quick.
"""

import json
import math
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from actcache.cli import STORAGE_OPTION, run, storage_option

if typing.TYPE_CHECKING:
    from .architectures import Architecture
    from .core import SAE
    from .evals.during import EvalDuring
    from .presets import Preset
    from .training import Training

_LAZY_COMMANDS = {
    "eval": ("sae.evals.cli", "eval_command"),
    "compare": ("sae.evals.cli", "compare_command"),
    "report": ("sae.report", "report_command"),
}


class Group(click.Group):
    """Commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["train", "progress", "eval", "compare", "report", "export"]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name == "train":
            return train_command()
        if name in _LAZY_COMMANDS:
            from importlib import import_module

            module, attribute = _LAZY_COMMANDS[name]
            command: click.Command = getattr(import_module(module), attribute)
            return command
        return super().get_command(ctx, name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One line each without importing what they need."""
        rows = [
            ("train", "Train SAEs on a cached dataset of activations."),
            ("progress", "Say how far training has come."),
            ("eval", "Measure trained SAEs on held-out data."),
            ("compare", "Say how many latents two SAEs share."),
            ("report", "Make HTML pages of a run or an SAE."),
            ("export", "Write an SAE in another project's format."),
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Sparse autoencoders on cached language-model activations.

    The usual way: `actcache harvest` makes a dataset of activations, `python -m sae train` trains on
    it, `eval` measures, `report` shows, `export` hands over to SAELens. Each has its own --help.
    """


def train_command() -> click.Command:
    """The `train` command; its options are the fields of `Training` and of the architectures."""
    from .evals.during import EvalDuring
    from .options import EVAL_PREFIX, REPEATED, field_docs, field_option, sae_fields
    from .training import Training

    of_evals = [field_option(f, field_docs(EvalDuring), prefix=EVAL_PREFIX) for f in fields(EvalDuring)]
    of_sae = [field_option(f, docs, f.name in REPEATED) for f, docs in sae_fields()]
    of_training = [field_option(f, field_docs(Training)) for f in fields(Training)]
    return click.Command(
        "train",
        params=[*_data_options(), *_choice_options(), *of_sae, *of_training, *of_evals, *_run_options()],
        callback=_train,
        help=_TRAIN_HELP,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )


def _data_options() -> list[click.Parameter]:
    return [
        click.Option(
            ["--data"],
            metavar="URL",
            help="The dataset: a directory or s3:// URL that `actcache harvest` wrote.",
        ),
        click.Option(
            ["--site"],
            multiple=True,
            metavar="SITE",
            help="Where in the model: a site of the dataset, e.g. blocks.3.hook_resid_post; repeat for "
            "one SAE at each. Default: the dataset's only site.",
        ),
        click.Option(
            ["--out"],
            metavar="DIR",
            help="Directory of the run, local or a URL such as s3://bucket/runs/x. Run the same command again to "
            "continue after an interruption; a finished run is not repeated.",
        ),
        click.Option(
            ["--config"],
            metavar="FILE",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="TOML file with the settings of the run (docs/sae.md has one); options given here come before it.",
        ),
    ]


def _choice_options() -> list[click.Parameter]:
    from .architectures import ARCHITECTURES
    from .presets import PRESETS
    from .revival import REVIVALS

    return [
        click.Option(
            ["--sae", "saes"],
            multiple=True,
            metavar="ARCH:KEY=VALUE,...",
            help="One SAE with all of its settings, e.g. topk:d_sae=6144,k=32,revive=ghost,lr=1e-4; repeat to train "
            "several. Keys are the options below with _ for -, and lr, seed, betas, eps, ... of this SAE alone; + joins "
            "the values of a list: prefixes=64+512.",
        ),
        click.Option(
            ["--preset"],
            metavar="NAME:KEY=VALUE,...",
            help=f"Published settings: {', '.join(PRESETS)}; e.g. batchtopk_gpt2:d_sae=6144,k=32; gpt2_series "
            "trains eight widths on one stream. Options given beside it come first.",
        ),
        click.Option(
            ["--start"],
            multiple=True,
            metavar="SAE",
            help="Finished SAE, a directory or URL, to take the first weights from (fine-tuning; lower --lr). One for "
            "all, or one for each in order. Without --sae or --arch its own settings are kept.",
        ),
        click.Option(
            ["--arch"],
            multiple=True,
            type=click.Choice(list(ARCHITECTURES)),
            help="Architecture; repeat to train several. What sets how few latents are active (L0): --k for "
            "topk (in each row), batchtopk and matryoshka (on average); --l1-coefficient for standard and "
            "gated; --l0-coefficient or --target-l0 for jumprelu. [default: topk]",
        ),
        click.Option(
            ["--revive"],
            type=click.Choice([*REVIVALS, "none"]),
            help="What is done about dead latents: auxk (they explain the error), ghost (ghost grads), resample "
            "(they start again at badly reconstructed rows) or none. Default: auxk for topk, batchtopk and "
            "matryoshka, none for the others.",
        ),
    ]


def _run_options() -> list[click.Parameter]:
    return [
        click.Option(["--batch-size"], type=int, help="Rows in a training step. [default: 4096]"),
        click.Option(
            ["--epochs"],
            type=int,
            default=None,
            help="Passes over the dataset. Default: one, or as many as --rows needs.",
        ),
        click.Option(
            ["--rotated"],
            is_flag=True,
            default=None,
            help="Train on the principal components as a dataset of rotated:<x> stores them, without the product "
            "that turns each row back; the finished SAE is turned back in its place. Adam takes other steps there: "
            "runs of a few hundred steps end worse, long ones as well (docs/sae.md).",
        ),
        click.Option(
            ["--device"],
            metavar="DEVICE",
            help="Where to train: cpu, cuda or cuda:1. Another run of the same settings may take over elsewhere. "
            "[default: cpu]",
        ),
        click.Option(
            ["--workers"],
            metavar="N",
            help="Processes on the Ray cluster that RAY_ADDRESS names, else on this machine, e.g. 4; 2..8 begins with "
            "at least 2 and takes up to 8 as they come. Default: this process, without Ray; or, under torchrun, its "
            "processes.",
        ),
        click.Option(
            ["--spread"],
            metavar="WAY",
            help="What the processes divide: latents, rows, saes (whole ones), or both of rows=2,latents=4. Default: saes "
            "where there are as many as processes, else latents.",
        ),
        click.Option(
            ["--gpus-per-worker"],
            type=int,
            metavar="N",
            help="1: each worker has a GPU of its own. [default: 0]",
        ),
        click.Option(
            ["--cpus-per-worker"],
            type=int,
            metavar="N",
            help="CPUs that each worker reserves, and its threads. [default: 1]",
        ),
        click.Option(
            ["--log"],
            metavar="NAME,...",
            help="Curves for tensorboard, wandb or both, beside metrics.jsonl, in DIR/tensorboard and DIR/wandb. "
            "wandb stays offline unless WANDB_MODE is online.",
        ),
        click.Option(**STORAGE_OPTION),
        click.Option(["--json"], is_flag=True, help="Print the result as JSON instead of a table."),
    ]


_TRAIN_HELP = """Train sparse autoencoders (SAEs) on a cached dataset of activations.

An SAE writes each activation (a row: d_in numbers, one token at one site) as a sum of a few of
d_sae learned directions, its latents. --d-sae says how many there are; --k, --l1-coefficient,
--l0-coefficient or --target-l0 how few are active, as the architecture wants. Data are read once,
however many SAEs are trained: repeat --arch, --d-sae, --k, a coefficient or --site, and every
combination that makes sense is trained; or list each SAE with --sae.

\b
Examples:
  python -m sae train --data acts/gpt2-ab12 --site blocks.8.hook_resid_pre --d-sae 24576 --k 32 --out runs/x
  python -m sae train --data s3://bucket/acts/gpt2-ab12 --arch topk --arch batchtopk \\
      --k 16 --k 32 --d-sae 6144 --rows 20000000 --out runs/sweep
  python -m sae train --data acts/gpt2-ab12 --sae topk:d_sae=6144,k=32 \\
      --sae jumprelu:d_sae=6144,target_l0=32,lr=7e-5 --log tensorboard --out runs/two
  python -m sae train --data acts/gpt2-ab12 --rung 5000000 --rung 10000000 --out runs/halved \\
      --sae topk:d_sae=6144,k=32,lr=1e-4 --sae topk:d_sae=6144,k=32,lr=3e-4 --sae topk:d_sae=6144,k=32,lr=1e-3
  python -m sae train --data acts/gpt2-ab12 --start runs/x/topk-24576-32 --lr 1e-5 --out runs/tuned
  python -m sae train --config run.toml --out s3://bucket/runs/y
  python -m sae train --data s3://bucket/acts/gpt2-ab12 --d-sae 131072 --k 32 --out s3://bucket/runs/z \\
      --workers 4 --gpus-per-worker 1
  python -m sae train --data acts/gpt2-ab12 --d-sae 24576 --k 32 --out runs/z --eval-every 1000000

Each SAE ends up in DIR/<arch>-<d_sae>-<k or coefficient>, with more where that is not enough to tell it
from the others (topk-6144-32-lr0.0003): `sae.load` reads it, metrics.jsonl has its curves. Losses,
coefficients and clip norm are of activations scaled as --input-scale says."""


_RANKS = ("workers", "spread", "gpus_per_worker", "cpus_per_worker")
"""Arguments of `sae.train` for several processes."""


def _train(config: Path | None, storage_options: dict[str, Any], json: bool, **options: Any) -> None:
    import actcache

    from .distributed import one_voice, started_by_torchrun, train_by_ranks
    from .inputs import checked_device
    from .naming import run_names
    from .trackers import make_trackers
    from .train import Training, train

    given = {name: value for name, value in options.items() if value not in (None, ())}
    settings = _settings(config, given)
    out, storage_options = settings["out"], {**settings["storage_options"], **storage_options}
    device = checked_device(settings.get("device", "cpu"))
    make_trackers(settings.get("log", ()), out)  # what is missing is known before anything is read
    ds = actcache.open(settings["data"], storage_options=storage_options)
    values = {f.name: given[f.name] for f in fields(Training) if f.name in given}
    values = {**settings["training"], **values}
    rows = values.get("n_rows") or ds.n_rows * settings.get("epochs", 1)
    chosen, preset, started = _chosen(settings, given, rows, storage_options)
    training = replace(preset.training, **values) if preset else Training(**{**values, "n_rows": rows})
    sites = list(settings.get("site", ())) or [c.site for c in chosen if c.site]
    sites = list(dict.fromkeys(sites)) or _only_site(ds.sites, settings["data"])
    placed = [
        (c if c.site else replace(c, site=where), start)
        for where in sites
        for c, start in zip(chosen, started, strict=True)
        if not c.site or where == sites[0]  # an SAE with a site of its own is there once
    ]
    run_names([c for c, _ in placed])  # refuses an SAE that is listed twice
    saes = dict(placed)
    stream = ds.stream(
        sites,
        batch_size=settings.get("batch_size", preset.batch_size if preset else 4096),
        seed=training.seed,
        epochs=settings.get("epochs") or math.ceil(training.n_rows / ds.n_rows),
        metadata=False,
        rotated=settings.get("rotated", False),
    )
    of_ranks = {name: settings[name] for name in _RANKS if name in settings}
    run = train
    if of_ranks or started_by_torchrun():
        run = partial(train_by_ranks, returned=False, **of_ranks)
    with one_voice() as first:
        run(
            stream,
            list(saes),
            training,
            start=list(saes.values()),
            out=out,
            log=settings.get("log", ()),
            storage_options=storage_options,
            device=device,
            eval_every=_evals(settings, given),
        )
    if first:
        _show_results(out, list(saes), training, storage_options, as_json=json)


def _settings(config: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says, and before it what the command line says; data and out are there."""
    from .options import read_file

    found = {"storage_options": {}, "training": {}} if config is None else read_file(config)
    found |= {
        name: given[name]
        for name in ("data", "site", "out", "batch_size", "epochs", "rotated", "device", *_RANKS)
        if name in given
    }
    if "log" in given:
        found["log"] = tuple(given["log"].split(","))
    for name, hint in (("data", "the dataset that `actcache harvest` wrote"), ("out", "the run's directory")):
        if name not in found:
            raise click.UsageError(f"--{name} is missing: {hint}; or name it in --config")
    for name in ("batch_size", "epochs"):
        if found.get(name, 1) < 1:
            raise click.UsageError(f"{name} is {found[name]}; it must be at least 1")
    return found


def _evals(settings: Mapping[str, Any], given: Mapping[str, Any]) -> "EvalDuring | None":
    """What the command line says of evaluations during training, and behind it the file."""
    from .evals.during import EvalDuring
    from .options import EVAL_PREFIX

    names = [f.name for f in fields(EvalDuring) if EVAL_PREFIX + f.name in given]
    values = {**settings.get("eval", {}), **{name: given[EVAL_PREFIX + name] for name in names}}
    if values and "every_rows" not in values:
        raise click.UsageError(
            f"{', '.join(values)} of evaluations during training: say how often with --eval-every ROWS"
        )
    return EvalDuring(**values) if values else None


def _chosen(
    settings: Mapping[str, Any], given: Mapping[str, Any], rows: int, storage_options: Mapping[str, Any]
) -> "tuple[list[Architecture], Preset | None, list[SAE | None]]":
    """What is trained: SAEs of the command line, else of the file; a preset; what each starts from.

    Raises:
        click.UsageError: nothing, or more than one way, says what to train.
    """
    from .core import load
    from .files import is_url
    from .options import combinations, config_of_sae, preset_of_text, sae_fields, sae_of_text

    paths = given.get("start", settings.get("start", ()))
    started = [load(path, storage_options if is_url(path) else None) for path in paths]
    names = [f.name for f, _ in sae_fields()]
    flags = {name: given[name] for name in names if name in given}
    ways = {
        "--sae": "saes" in given,
        "--preset": "preset" in given,
        "--arch, --d-sae, --k and the like": bool(flags) or "arch" in given or "revive" in given,
    }
    used = [name for name, is_used in ways.items() if is_used]
    if len(used) > 1:
        raise click.UsageError(f"{' and '.join(used)} each say what to train; give one of them")
    file_ways = [name for name in ("preset", "sae") if settings.get(name)]
    if not used and len(file_ways) > 1:
        raise click.UsageError("the file has both preset and [[sae]], and each says what to train; keep one")
    preset = None
    if "saes" in given:
        configs = [sae_of_text(text) for text in given["saes"]]
    elif "preset" in given or (not used and settings.get("preset")):
        preset = preset_of_text(given.get("preset", settings.get("preset")), rows)
        configs = [_without_own(c, {**settings["training"], **given}) for c in preset.configs]
    elif used:
        configs = combinations(given.get("arch", ("topk",)), given.get("revive"), flags)
    elif settings.get("sae"):
        configs = settings["sae"]
    elif started:
        own = {**settings["training"], **given}
        configs = [_without_own(config_of_sae(s, path), own) for s, path in zip(started, paths, strict=True)]
    else:
        raise click.UsageError("say what to train: --d-sae 6144 --k 32, --sae, --preset, --start or --config")
    if len(started) not in (0, 1, len(configs)):
        raise click.UsageError(
            f"{len(started)} SAEs to start from for {len(configs)} to train; give one, or one for each in order"
        )
    if len(started) <= 1:
        return configs, preset, [started[0] if started else None] * len(configs)
    return configs, preset, list(started)


def _without_own(config: "Architecture", given: Mapping[str, Any]) -> "Architecture":
    """The config without those optimiser settings of its own that this run was given others for."""
    given_here = {f.name: None for f in fields(config.optimiser) if f.name in given}
    return replace(config, optimiser=replace(config.optimiser, **given_here))


def _only_site(sites: list[str], data: str) -> list[str]:
    if len(sites) != 1:
        raise click.UsageError(f"{data} has several sites; choose with --site: {', '.join(sites)}")
    return sites


def _show_results(
    out: str,
    configs: "Sequence[Architecture]",
    training: "Training",
    storage_options: Mapping[str, Any],
    as_json: bool,
) -> None:
    from .naming import run_names
    from .results import ranked, results, table

    found = results(out, run_names(configs), storage_options)
    if as_json:
        click.echo(json.dumps(found))
        return
    from rich.console import Console

    click.echo(f"{out.rstrip('/')}/")
    Console(highlight=False).print(table([found[i] for i in ranked(found, configs, training)]))


@cli.command("progress")
@click.argument("runs", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per run.")
@storage_option
def progress_command(runs: tuple[str, ...], as_json: bool, storage_options: dict[str, Any]) -> None:
    """Say how far the training in each of RUNS (directories or URLs) has come, by what it has stored.

    \b
    Example:
      python -m sae progress runs/x s3://bucket/runs/y
    """
    from actcache.progress import format_count, format_duration

    from .files import is_url
    from .rundir import progress_of

    for run_dir in runs:
        found = progress_of(run_dir, storage_options if is_url(run_dir) else None)
        if as_json:
            click.echo(json.dumps(found))
            continue
        parts = [found["path"], found["state"]]
        if found["rows_done"] is not None:
            parts.append(f"{format_count(found['rows_done'])}/{format_count(found['rows_wanted'])} rows")
        if found["rate_rows_per_s"]:
            parts.append(f"{format_count(found['rate_rows_per_s'])}/s  ETA {format_duration(found['eta_s'])}")
        if found["world_size"]:
            parts.append(f"{found['world_size']} ranks by {found['spread']}")
        click.echo("  ".join(parts))


@cli.command("export")
@click.argument("sae_dir", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "format",
    type=click.Choice(["saelens", "dictionary_learning"]),  # sae.export.FORMATS, without importing torch
    default="saelens",
    show_default=True,
    help="Format.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Directory to write."
)
@click.option("--model-name", help="Model name to record, as TransformerLens spells it, e.g. gpt2-small.")
@click.option("--hook-name", help="Hook name to record. Default: the site it was trained on.")
def export_command(
    sae_dir: Path, format: str, out: Path, model_name: str | None, hook_name: str | None
) -> None:
    """Write the SAE in SAE_DIR in another project's format.

    saelens: a directory that SAELens' `SAE.load_from_disk` reads; batchtopk and matryoshka become
    jumprelu with their inference threshold, the others stay what they are. dictionary_learning: its
    `ae.pt` and `config.json`.

    \b
    Example:
      python -m sae export runs/x/topk-6144-32 --out exported/
    """
    from .core import load
    from .export import export

    given = {"model_name": model_name, "hook_name": hook_name}
    path = export(load(sae_dir), format, out, **{k: v for k, v in given.items() if v is not None})
    click.echo(f"wrote {path}")


def main(arguments: list[str] | None = None, command: click.Command = cli) -> int:
    """Run the command line; what goes wrong is one line `error: ...` and a non-zero code."""
    hint = "stopped; run the same command again to continue from the last checkpoint"
    return run(command, "python -m sae", arguments, interrupted=hint)


if __name__ == "__main__":
    sys.exit(main())
