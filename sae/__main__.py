"""`python -m sae`: train, eval, report, export. Options of `train` come from the config dataclasses.

Heavy imports happen inside the commands, so `--help` is quick.
"""

import ast
import inspect
import itertools
import json
import math
import sys
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import click

from actcache.cli import STORAGE_OPTION, run

if typing.TYPE_CHECKING:
    from .architectures import Architecture

_LAZY_COMMANDS = {"eval": ("sae.evals.cli", "eval_command"), "report": ("sae.report", "report_command")}
_RENAMED = {"n_rows": "rows"}


class Group(click.Group):
    """Commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["train", "eval", "report", "export"]

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
            ("eval", "Measure trained SAEs on held-out data."),
            ("report", "Make one HTML page of a run or an SAE."),
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
    from .architectures import ARCHITECTURES
    from .revival import REVIVALS
    from .training import Training

    own = [
        click.Option(["--data"], required=True, metavar="URL", help=_DATA_HELP),
        click.Option(
            ["--site"],
            multiple=True,
            metavar="SITE",
            help="Where in the model: a site of the dataset, e.g. blocks.3.hook_resid_post; repeat for "
            "one SAE at each. Default: the dataset's only site.",
        ),
        click.Option(
            ["--arch"],
            multiple=True,
            default=["topk"],
            show_default=True,
            type=click.Choice(list(ARCHITECTURES)),
            help="Architecture; repeat to train several. What sets how few latents are active (L0): --k for "
            "topk (in each row), batchtopk and matryoshka (on average); --l1-coefficient for standard and "
            "gated; --l0-coefficient or --target-l0 for jumprelu.",
        ),
        click.Option(
            ["--revive"],
            type=click.Choice([*REVIVALS, "none"]),
            help="What is done about dead latents: auxk (they explain the error), ghost (ghost grads), resample "
            "(they start again at badly reconstructed rows) or none. Default: auxk for topk, batchtopk and "
            "matryoshka, none for the others.",
        ),
        click.Option(
            ["--out"], required=True, metavar="DIR", type=click.Path(path_type=Path), help=_OUT_HELP
        ),
        click.Option(
            ["--batch-size"], type=int, default=4096, show_default=True, help="Rows in a training step."
        ),
        click.Option(
            ["--epochs"],
            type=int,
            default=None,
            help="Passes over the dataset. Default: one, or as many as --rows needs.",
        ),
        click.Option(**STORAGE_OPTION),
        click.Option(["--json"], is_flag=True, help="Print the result as JSON instead of a table."),
    ]
    of_sae = [_option(f, docs, f.name in _REPEATED) for f, docs in _sae_fields()]
    of_training = [_option(f, field_docs(Training), False) for f in fields(Training)]
    return click.Command(
        "train",
        params=[*own[:3], *of_sae[:2], own[3], *of_sae[2:], own[4], *of_training, *own[5:]],
        callback=_train,
        help=_TRAIN_HELP,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )


_REPEATED = ("d_sae", "k", "l1_coefficient", "l0_coefficient", "target_l0")
_NOT_OPTIONS = ("site", "revive", "optimiser")


def _sae_fields() -> list[tuple["Field[Any]", dict[str, str]]]:
    """The fields of all architectures and of what revives dead latents, each name once."""
    from .architectures import ARCHITECTURES, TopK
    from .revival import REVIVALS

    found: dict[str, tuple[Field[Any], dict[str, str]]] = {}
    for kind in (TopK, *ARCHITECTURES.values(), *REVIVALS.values()):
        for f in fields(kind):
            if f.name not in _NOT_OPTIONS:
                found.setdefault(f.name, (f, field_docs(kind)))
    return list(found.values())


_DATA_HELP = "The dataset: a directory or s3:// URL that `actcache harvest` wrote."
_OUT_HELP = (
    "Directory of the run. Run the same command again to continue after an interruption; "
    "a finished run is not repeated."
)
_TRAIN_HELP = """Train sparse autoencoders (SAEs) on a cached dataset of activations.

An SAE writes each activation (a row: d_in numbers, one token at one site) as a sum of a few of
d_sae learned directions, its latents. --d-sae says how many there are; --k, --l1-coefficient,
--l0-coefficient or --target-l0 how few are active, as the architecture wants. Data are read once,
however many SAEs are trained: repeat --arch, --d-sae, --k, a coefficient or --site, and every
combination that makes sense is trained.

\b
Examples:
  python -m sae train --data acts/gpt2-ab12 --site blocks.8.hook_resid_pre --d-sae 24576 --k 32 --out runs/x
  python -m sae train --data s3://bucket/acts/gpt2-ab12 --arch topk --arch batchtopk \\
      --k 16 --k 32 --d-sae 6144 --rows 20000000 --out runs/sweep
  python -m sae train --data acts/gpt2-ab12 --arch jumprelu --target-l0 32 --d-sae 6144 --out runs/jump

Each SAE ends up in DIR/<arch>-<d_sae>-<k or coefficient>: `sae.load` reads it, metrics.jsonl has
its curves. Losses, coefficients and clip norm are of activations scaled as --input-scale says."""


def _train(
    data: str,
    site: tuple[str, ...],
    arch: tuple[str, ...],
    out: Path,
    batch_size: int,
    epochs: int | None,
    storage_options: dict[str, Any],
    json: bool,
    revive: str | None,
    **values: Any,
) -> None:
    import actcache

    from .train import Training, run_names, train

    ds = actcache.open(data, storage_options=storage_options)
    sites = list(dict.fromkeys(site)) or _only_site(ds.sites, data)
    rows = values.pop("n_rows") or ds.n_rows * (epochs or 1)
    sae_values = {f.name: values.pop(f.name) for f, _ in _sae_fields()}
    training = Training(n_rows=rows, **values)
    configs = _combinations(sites, arch, revive, sae_values)
    stream = ds.stream(
        sites,
        batch_size=batch_size,
        seed=training.seed,
        epochs=epochs or math.ceil(rows / ds.n_rows),
        metadata=False,
    )
    train(stream, configs, training, out=out)
    _show_results(out, run_names(configs), as_json=json)


def _combinations(
    sites: list[str], arch: tuple[str, ...], revive: str | None, values: Mapping[str, Any]
) -> "list[Architecture]":
    """A config for each architecture, site and value of the repeated options.

    Raises:
        click.UsageError: an option that no chosen architecture has, or one that is missing.
    """
    from .architectures import ARCHITECTURES, from_fields
    from .revival import REVIVALS

    given = {name: value for name, value in values.items() if value not in (None, ())}
    unused = set(given)
    configs = []
    for name in dict.fromkeys(arch):
        kind = ARCHITECTURES[name]
        own = {f.name: given[f.name] for f in fields(kind) if f.name in given}
        unused -= set(own)
        revival = revive if revive is not None else getattr(kind.revive, "kind", "none")
        if revival in REVIVALS:
            settings = {f.name: given[f.name] for f in fields(REVIVALS[revival]) if f.name in given}
            unused -= set(settings)
            own["revive"] = REVIVALS[revival](**settings)
        elif revive is not None:
            own["revive"] = None
        swept = [n for n in _REPEATED if n in own]
        for where, *one in itertools.product(sites, *(own[n] for n in swept)):
            try:
                configs.append(
                    from_fields(kind, {**own, **dict(zip(swept, one, strict=True)), "site": where})
                )
            except ValueError as error:
                raise click.UsageError(f"{name}: {error}") from error
    if unused:
        options = ", ".join("--" + n.replace("_", "-") for n in sorted(unused))
        raise click.UsageError(f"{options}: no architecture or --revive chosen here has this option")
    return list(dict.fromkeys(configs))


def _only_site(sites: list[str], data: str) -> list[str]:
    if len(sites) != 1:
        raise click.UsageError(f"{data} has several sites; choose with --site: {', '.join(sites)}")
    return sites


def _show_results(out: Path, names: list[str], as_json: bool) -> None:
    from .train import METRICS_FILE

    results: list[dict[str, Any]] = []
    for name in names:
        lines = (out / name / METRICS_FILE).read_text().splitlines()
        results.append({"path": str(out / name), **json.loads(lines[-1])})
    if as_json:
        click.echo(json.dumps(results))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("SAE", "rows", "L0", "FVU (last batch)", "dead latents"):
        table.add_column(heading, justify="left" if heading == "SAE" else "right", overflow="fold")
    for r in results:
        table.add_row(r["path"], f"{r['rows']:,}", f"{r['l0']:.1f}", f"{r['fvu']:.4f}", str(r["dead"]))
    Console(highlight=False).print(table)


@cli.command("export")
@click.argument("sae_dir", type=click.Path(path_type=Path))
@click.option(
    "--to", "format", type=click.Choice(["saelens"]), default="saelens", show_default=True, help="Format."
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
    jumprelu with their inference threshold, the others stay what they are.

    \b
    Example:
      python -m sae export runs/x/topk-6144-32 --out exported/
    """
    from .core import load
    from .export import export

    given = {"model_name": model_name, "hook_name": hook_name}
    path = export(load(sae_dir), format, out, **{k: v for k, v in given.items() if v is not None})
    click.echo(f"wrote {path}")


def field_docs(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass and of those it extends, as one paragraph."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        found |= _own_field_docs(base)
    return found


def _own_field_docs(kind: type) -> dict[str, str]:
    node = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(node, ast.ClassDef)
    found = {}
    for statement, after in itertools.pairwise(node.body):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[statement.target.id] = " ".join(str(after.value.value).split())
    return found


def _option(f: "Field[Any]", docs: Mapping[str, str], multiple: bool) -> click.Option:
    """A command-line option for a config field; its help is the field's own text."""
    is_training = f.name not in {g.name for g, _ in _sae_fields()}
    help_text = docs[f.name].replace("None: ", "Default: ")
    if f.name == "n_rows":
        help_text += " Default: every row of the dataset, once per epoch."
    if multiple:
        help_text += " Repeat to train several."
    kind, extra = _click_type(f.type)
    name = _RENAMED.get(f.name, f.name).replace("_", "-")
    # what is not given on the command line is left to the dataclass, which knows its default
    known = f.default not in (MISSING, None)
    if known and not is_training:
        help_text += f" [default: {f.default:g}]" if kind is float else f" [default: {f.default}]"
    extra.setdefault("multiple", multiple)
    return click.Option(
        [f"--{name}", f.name],
        type=kind,
        required=f.name == "d_sae",
        default=f.default if known and is_training else None,
        show_default=known and is_training,
        help=help_text,
        **extra,
    )


def _click_type(annotation: Any) -> tuple[Any, dict[str, Any]]:
    if typing.get_origin(annotation) is typing.Literal:
        return click.Choice(typing.get_args(annotation)), {}
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is tuple:
        of = typing.get_args(annotation)
        return of[0], {"multiple": True} if of[-1] is Ellipsis else {"nargs": len(of)}
    return annotation, {"is_flag": True} if annotation is bool else {}


def main(arguments: list[str] | None = None, command: click.Command = cli) -> int:
    """Run the command line; what goes wrong is one line `error: ...` and a non-zero code."""
    hint = "stopped; run the same command again to continue from the last checkpoint"
    return run(command, "python -m sae", arguments, interrupted=hint)


if __name__ == "__main__":
    sys.exit(main())
