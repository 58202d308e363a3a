"""How every command line of the project ends: one line on failure, a matching exit code.

0 done; 1 failed; 2 the request cannot be met as written; 130 interrupted.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Any

import click

from .errors import ActcacheError


def run(
    command: click.Command, prog: str, arguments: Sequence[str] | None = None, *, interrupted: str
) -> int:
    """Run a click command and return the exit code; errors become one line on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    for package in ("actcache", "sae", "cluster"):
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        command.main(
            args=None if arguments is None else list(arguments), prog_name=prog, standalone_mode=False
        )
    except click.ClickException as err:
        return _fail(err.format_message(), err.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail(interrupted, 130)
    except ActcacheError as err:
        return _fail(str(err), 2 if isinstance(err, ValueError) else 1)
    return 0


def parse_storage_options(_: Any, __: Any, values: tuple[str, ...]) -> dict[str, Any]:
    """`key=value` pairs for fsspec; a value that reads as JSON is taken as such."""
    import json

    options: dict[str, Any] = {}
    for item in values:
        name, separator, value = item.partition("=")
        if not separator or not name:
            raise click.BadParameter(f"{item!r} is not KEY=VALUE")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code
