"""How every command line of the project ends: one line on failure, a matching exit code.

0 done; 1 failed; 2 the request cannot be met as written; 130 interrupted; 143 ended by SIGTERM, after what was
in flight had been finished.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from .errors import ActcacheError, Drained


def run(
    command: click.Command, prog: str, arguments: Sequence[str] | None = None, *, interrupted: str
) -> int:
    """Run a click command and return the exit code; errors become one line on standard error."""
    start_logging()
    try:
        command.main(
            args=None if arguments is None else list(arguments), prog_name=prog, standalone_mode=False
        )
    except click.ClickException as err:
        return _fail(err.format_message(), err.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail(interrupted, 130)
    except ModuleNotFoundError as err:
        extra = "train" if prog.endswith("sae") else "harvest"
        return _fail(f"this needs {err.name}, which is not installed: pip install 'actcache[{extra}]'", 1)
    except Drained as err:
        return _fail(str(err), 143)
    except (ActcacheError, ValueError, OSError) as err:
        return _fail(str(err), 2 if isinstance(err, ValueError) else 1)
    return 0


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def start_logging() -> None:
    """Show this project's messages, and others' warnings, on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for package in ("actcache", "sae"):
        logging.getLogger(package).setLevel(logging.INFO)


def _parse_storage_options(_: Any, __: Any, values: tuple[str, ...]) -> dict[str, Any]:
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


STORAGE_OPTION: dict[str, Any] = {
    "param_decls": ("--storage-option", "storage_options"),
    "multiple": True,
    "metavar": "KEY=VALUE",
    "callback": _parse_storage_options,
    "help": "Passed to fsspec, e.g. endpoint_url=http://host:9000 or anon=true; repeat. Never stored. "
    "Credentials are better left to the environment.",
}
"""Arguments of the option that every command with a URL takes, for `click.Option(**STORAGE_OPTION)`."""


def storage_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: give a command the `--storage-option`, as `storage_options`."""
    settings = {name: value for name, value in STORAGE_OPTION.items() if name != "param_decls"}
    return click.option(*STORAGE_OPTION["param_decls"], **settings)(command)


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code
