"""`python -m cluster`: submit, status, logs, stop, list, preflight. Exit codes: 0, 1 failed, 2 usage, 130 interrupted."""

import json
import os
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from . import terminal
from .attempts import Attempt, Backend, ClusterError, backend
from .config import BACKENDS, ConfigError, Run, read_run
from .credentials import Scrubbed, scrub, secret_variables
from .ray_jobs import is_job_server

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def _address(_: Any, __: Any, value: str | None) -> None:
    if value is None:
        return
    if not is_job_server(value):
        raise click.BadParameter(f"{value!r} is not http://HOST:PORT of a job server, usually port 8265")
    os.environ["RAY_API_SERVER_ADDRESS"] = value  # else Ray lets RAY_ADDRESS override what was typed


_address_option = click.option(
    "--address",
    metavar="URL",
    callback=_address,
    expose_value=False,
    help="Job server of the Ray cluster, e.g. http://127.0.0.1:8265. Default: that of RAY_API_SERVER_ADDRESS or "
    "RAY_ADDRESS, else of a cluster on this machine.",
)
_backend_option = click.option(
    "--backend",
    "backend_name",
    type=click.Choice(BACKENDS),
    help="Where it runs. Default: what RUN.toml says; for a name, where it is known; else ray.",
)
_attempt_option = click.option(
    "--attempt",
    type=click.IntRange(min=1),
    metavar="N",
    help="Which attempt of the run. Default: the newest.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="JSON, one object per line.")


@click.group(context_settings=_SETTINGS)
def cli() -> None:
    """Run harvests, training and pipelines here, on Ray, KubeRay or Slurm.

    A run is described by a RUN.toml (docs/cluster.md). RUN below is that file or the run's name. Submit again what
    failed or was stopped, and it goes on from what it had stored.

    \b
    Example:
      python -m cluster submit run.toml --address http://HOST:8265 --follow
    """


@cli.command(context_settings=_SETTINGS)
@click.argument("run_toml", type=click.Path(path_type=Path))
@_backend_option
@_address_option
@click.option(
    "--dry-run", is_flag=True, help="Print what would be sent, and the plan of each harvest, and stop."
)
@click.option("--follow", is_flag=True, help="Show the log until the end; exit non-zero if it fails.")
def submit(run_toml: Path, backend_name: str | None, dry_run: bool, follow: bool) -> None:
    """Start a run that is not running and has not succeeded.

    Its attempts are NAME-1, NAME-2, ...: one more whenever a failed, stopped or changed run is submitted.
    """
    run = read_run(run_toml)
    if backend_name is not None:
        run = replace(run, backend=backend_name)
    where = backend(run.backend)
    if dry_run:
        _dry_run(where, run)
        return
    if run.backend == "ray" and run.env_in_clear and (found := secret_variables(run.env)):
        click.echo(f"warning: Ray keeps {', '.join(found)} in clear (env_in_clear)", err=True)
    attempt, new = where.submit(run)
    if not new:
        click.echo(f"{attempt.id} has succeeded already; change its command or its name to run it again")
        return
    click.echo(f"submitted {attempt.id}; follow it with: python -m cluster logs -f {run.name}")
    if follow:
        _follow(where, attempt)


def _dry_run(where: Backend, run: Run) -> None:
    from .progress import plans

    click.echo(where.request(run, "<attempt>"))
    _show_trainings(where, run)
    for name, text, good in plans(json.loads(run.as_json())):
        if good:
            click.echo(f"\nplan of {name}:\n{text}")
        else:
            click.echo(f"no plan of {name} from here: {text}", err=True)


def _show_trainings(where: Backend, run: Run) -> None:
    """Each training with ranks: the command as it runs, and its ranks beside what the cluster has."""
    trainings = run.trainings()
    if not trainings:
        return
    try:
        nodes, why = where.nodes(run), ""
    except ClusterError as err:
        nodes, why = None, str(err)
    commands = {step.name: run.program(step.command) for step in run.all_steps}
    for name, ranks in trainings.items():
        taken = ranks.beside(nodes) if nodes is not None else str(ranks)
        click.echo(f"\nranks of {name}: {taken}\n{shlex.join(commands[name])}")
    if why:
        click.echo(f"what the cluster has is not known from here: {why}", err=True)


@cli.command(context_settings=_SETTINGS)
@click.argument("run")
@_attempt_option
@_backend_option
@_address_option
@_json_option
def status(run: str, attempt: int | None, backend_name: str | None, as_json: bool) -> None:
    """Show how far RUN is, by what it has stored.

    Rows, rate and time to go of each step, and what the backend says.
    With RUN.toml it works when the cluster is gone: what is stored is read from the store.
    """
    from .progress import progress

    found, trouble = None, ""
    try:
        found = _find(run, attempt, backend_name)[1]
    except ClusterError as err:
        if attempt is not None or not _is_file(run):
            raise
        trouble = str(err)
    if _is_file(run):
        steps = progress(json.loads(read_run(run).as_json()))
    else:
        assert found is not None
        steps = progress(terminal.run_of(found))
    if as_json:
        state = _json_of(found) if found else {"id": None, "status": "UNKNOWN", "message": trouble}
        click.echo(json.dumps(state | {"steps": steps}))
        return
    lines = [*terminal.table([found]), terminal.reason(found)] if found else [f"backend: {trouble}"]
    for line in [*lines, *terminal.of_steps(steps)]:
        click.echo(scrub(line))


@cli.command(context_settings=_SETTINGS)
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends; exit non-zero if it fails.")
@_attempt_option
@_backend_option
@_address_option
def logs(run: str, follow: bool, attempt: int | None, backend_name: str | None) -> None:
    """Print what RUN has printed."""
    where, found = _find(run, attempt, backend_name)
    if follow:
        _follow(where, found)
    else:
        click.echo(scrub(where.logs(found)), nl=False)


@cli.command(context_settings=_SETTINGS)
@click.argument("run")
@_backend_option
@_address_option
def stop(run: str, backend_name: str | None) -> None:
    """End RUN and wait until it has ended.

    The command gets SIGTERM and `drain_s` (RUN.toml; 60 s) to commit the blocks in flight; then it is killed.
    """
    where, found = _find(run, None, backend_name)
    ended = found if found.over else where.stop(found)
    click.echo(f"{ended.id} {'was already' if found.over else 'is'} {ended.status}")


@cli.command("list", context_settings=_SETTINGS)
@_backend_option
@_address_option
@_json_option
def list_command(backend_name: str | None, as_json: bool) -> None:
    """List the attempts of all runs of a backend, oldest first."""
    found = backend(backend_name or "ray").attempts()
    for line in [json.dumps(_json_of(one)) for one in found] if as_json else terminal.table(found):
        click.echo(line if as_json else scrub(line))


@cli.command(context_settings=_SETTINGS)
@click.argument("run_toml", type=click.Path(path_type=Path))
@_backend_option
@_address_option
@_json_option
def preflight(run_toml: Path, backend_name: str | None, as_json: bool) -> None:
    """Check what RUN needs: bucket, GPUs, model, versions.

    Each is tried where the run would run, on every node of a Ray cluster; a failure comes with a fix.
    """
    from .preflight import preflight as run_preflight

    run = read_run(run_toml)
    n, failed = 0, []
    for check in run_preflight(run, backend_name or run.backend):
        n += 1
        if not check["ok"]:
            failed.append(check["check"])
        if as_json:
            click.echo(json.dumps(check))
            continue
        state = "ok  " if check["ok"] else "FAIL"
        click.echo(
            terminal.wrapped(scrub(f"{state} {check['where']}: {check['check']}: {check['found']}"), 9)
        )
        if check["fix"]:
            click.echo(terminal.wrapped(scrub(f"     fix: {check['fix']}"), 10))
    if failed:
        raise ClusterError(f"{len(failed)} of {n} checks failed: {', '.join(failed)}")


def _find(run: str, number: int | None, backend_name: str | None) -> tuple[Backend, Attempt]:
    """The backend and the attempt that `run` (a file or a name) and `number` mean."""
    name = run
    namespace = None
    if _is_file(run):
        described = read_run(run)
        name, namespace = described.name, described.kuberay.namespace
        backend_name = backend_name or described.backend
    if backend_name is None:
        known = (other for other in ("local", "slurm") if backend(other).attempts(name))
        backend_name = next(known, "ray")
    where = backend(backend_name, namespace=namespace)
    if number is None:
        return where, where.newest(name)
    for found in where.attempts(name):
        if found.number == number:
            return where, found
    raise ClusterError(f"this cluster knows no {name}-{number}; see `python -m cluster list`")


def _is_file(run: str) -> bool:
    """Whether RUN is a file; no name has such characters."""
    return run.endswith(".toml") or os.sep in run


def _json_of(found: Attempt) -> dict[str, Any]:
    """An attempt; Ray puts the end of its log into the message."""
    return {"id": found.id} | {k: scrub(v) if isinstance(v, str) else v for k, v in asdict(found).items()}


def _follow(where: Backend, attempt: Attempt) -> None:
    def show(text: str) -> None:
        click.echo(text, nl=False)

    bars = terminal.Bars(show)
    write = Scrubbed(bars if sys.stdout.isatty() else show)
    try:
        ended = where.follow(attempt, write)
    finally:
        write.close()
        bars.close()
    if ended.status != "SUCCEEDED":
        raise ClusterError(f"{ended.id} {ended.status}: {terminal.reason(ended)}")
    click.echo(f"{ended.id} SUCCEEDED")


def main() -> int:
    """Run the command line; what goes wrong is one line `error: ...` and a non-zero code."""
    try:
        cli.main(prog_name="python -m cluster", standalone_mode=False)
    except click.ClickException as err:
        return _fail(err.format_message(), err.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted; a submitted run goes on", 130)
    except ConfigError as err:
        return _fail(str(err), 2)
    except ClusterError as err:
        return _fail(str(err), 1)
    return 0


def _fail(message: str, code: int) -> int:
    click.echo(terminal.wrapped(f"error: {scrub(' '.join(message.split()))}", 7), err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
