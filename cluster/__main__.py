"""`python -m cluster`: submit, status, logs, stop, list. Exit codes: 0, 1 failed, 2 usage, 130 interrupted."""

import json
import logging
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from . import submit as jobs
from .config import ConfigError, read_run

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def _address(_: Any, __: Any, value: str | None) -> None:
    if value is None:
        return
    if not value.startswith(("http://", "https://")):
        raise click.BadParameter(f"{value!r} is not http://HOST:PORT of a job server, usually port 8265")
    os.environ["RAY_API_SERVER_ADDRESS"] = value  # else Ray lets RAY_ADDRESS override what was typed


_address_option = click.option(
    "--address",
    metavar="URL",
    callback=_address,
    expose_value=False,
    help="Job server of the cluster, e.g. http://127.0.0.1:8265. Default: that of RAY_API_SERVER_ADDRESS or "
    "RAY_ADDRESS, else of a cluster on this machine.",
)
_attempt_option = click.option(
    "--attempt", type=int, metavar="N", help="Which attempt of the run. Default: the newest."
)
_json_option = click.option("--json", "as_json", is_flag=True, help="JSON, one object per line.")


@click.group(context_settings=_SETTINGS)
def cli() -> None:
    """Run harvests and training on a Ray cluster.

    A run is described by a RUN.toml (see deploy/ray/run.toml). RUN below is that file or the run's name.
    Submit again what failed or was stopped, and it goes on from what it had stored.

    \b
    Example:
      python -m cluster submit run.toml --address http://HOST:8265 --follow
    """


@cli.command(context_settings=_SETTINGS)
@click.argument("run_toml", type=click.Path(path_type=Path))
@_address_option
@click.option("--dry-run", is_flag=True, help="Print what would be sent, without values of env, and stop.")
@click.option("--follow", is_flag=True, help="Show the log until the end; exit non-zero if it fails.")
def submit(run_toml: Path, dry_run: bool, follow: bool) -> None:
    """Start a run that is not running and has not succeeded.

    Its jobs are NAME-1, NAME-2, ...: one more whenever a failed, stopped or changed run is submitted.
    """
    run = read_run(run_toml)
    if dry_run:
        sent = jobs.request(run, "<attempt>")
        sent["runtime_env"]["env_vars"] |= dict.fromkeys(run.env, "<from the environment>")
        click.echo(json.dumps(sent, indent=2))
        return
    client = jobs.connect()
    attempt, new = jobs.submit(client, run)
    if not new:
        click.echo(f"{attempt.id} has succeeded already; change its command or its name to run it again")
        return
    click.echo(f"submitted {attempt.id}; follow it with: python -m cluster logs -f {run.name}")
    if follow:
        _follow(client, attempt)


@cli.command(context_settings=_SETTINGS)
@click.argument("run")
@_attempt_option
@_address_option
@_json_option
def status(run: str, attempt: int | None, as_json: bool) -> None:
    """Show the state of RUN, and why it failed."""
    found = _find(run, attempt)[1]
    if as_json:
        click.echo(_as_json(found))
        return
    click.echo(f"{_line(found)}\n{found.message.strip()}")


@cli.command(context_settings=_SETTINGS)
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends; exit non-zero if it fails.")
@_attempt_option
@_address_option
def logs(run: str, follow: bool, attempt: int | None) -> None:
    """Print what RUN has printed."""
    client, found = _find(run, attempt)
    if follow:
        _follow(client, found)
    else:
        click.echo(jobs.logs(client, found), nl=False)


@cli.command(context_settings=_SETTINGS)
@click.argument("run")
@_address_option
def stop(run: str) -> None:
    """End RUN and wait until it has ended.

    The command gets SIGTERM and half a minute to finish what it is doing; then it is killed.
    """
    client, found = _find(run, None)
    ended = found if found.over else jobs.stop(client, found)
    click.echo(f"{ended.id} {'was already' if found.over else 'is'} {ended.status}")


@cli.command("list", context_settings=_SETTINGS)
@_address_option
@_json_option
def list_command(as_json: bool) -> None:
    """List the attempts of all runs, oldest first."""
    for found in jobs.attempts(jobs.connect()):
        click.echo(_as_json(found) if as_json else _line(found))


def _find(run: str, number: int | None) -> tuple[Any, jobs.Attempt]:
    """The client and the attempt that `run` (a file or a name) and `number` mean."""
    name = read_run(run).name if run.endswith(".toml") else run
    client = jobs.connect()
    if number is None:
        return client, jobs.newest(client, name)
    for found in jobs.attempts(client, name):
        if found.number == number:
            return client, found
    raise jobs.ClusterError(f"this cluster knows no {name}-{number}; see `python -m cluster list`")


def _follow(client: Any, attempt: jobs.Attempt) -> None:
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # "WebSocket closed"
    ended = jobs.follow(client, attempt, lambda text: click.echo(text, nl=False))
    if ended.status != "SUCCEEDED":
        reason = ended.message.partition(", last available logs")[0].strip().splitlines() or [""]
        raise jobs.ClusterError(f"{ended.id} {ended.status}: {reason[0]}")
    click.echo(f"{ended.id} SUCCEEDED")


def _line(attempt: jobs.Attempt) -> str:
    started, seconds = "not started", ""
    if attempt.started_s:
        started = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(attempt.started_s))
        seconds = f"{(attempt.ended_s or time.time()) - attempt.started_s:.0f} s"
    return f"{attempt.id:24} {attempt.status:9} {started} {seconds:>8}  {attempt.entrypoint}"


def _as_json(attempt: jobs.Attempt) -> str:
    return json.dumps({"id": attempt.id} | asdict(attempt))


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
    except jobs.ClusterError as err:
        return _fail(str(err), 1)
    return 0


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
