"""A run as RUN.toml describes it: which command, with what resources, environment and code.

Owns the checks of that file. It never reads the environment (submit.py does, when it sends) and
never touches the cluster; an error names the field, never the value, which may be a secret.
"""

import difflib
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")  # fits Kubernetes' 47 with room for -<attempt>
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_WORD = (
    r"(?:pass(?:word|wd|phrase)|secret(?:[_-]?key)?|token|credential|(?:api|access|account|private)[_-]?key)"
)
_SECRET = re.compile(
    r"(?:AKIA|ASIA)[0-9A-Z]{16}"  # AWS access key id
    r"|\b(?:hf_|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|sk-)[A-Za-z0-9_-]{16,}"  # hub, GitHub, GitLab, ...
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}"  # JSON web token
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|://[^/\s:@]*:[^/\s@]+@"  # a URL with a password
    r"|(?<![A-Za-z0-9/+])(?=(?:[a-z0-9/+]*[A-Z]){8})(?=[A-Za-z/+]*\d)[A-Za-z0-9/+]{40}"
    r"(?![A-Za-z0-9/+=])"  # AWS secret key; a git hash and most paths have no eight capitals
    # secret=..., --api-key=...; "tokens" is another word, and short values (true, null, 8) are settings
    rf"|(?i:{_SECRET_WORD}[\"']?\s*[=:]\s*[\"']?[^\s\"']{{8,}})"
)
_SECRET_FLAG = re.compile(rf"(?i)--?(?:[\w-]*[_-])?{_SECRET_WORD}")


class ConfigError(ValueError):
    """RUN.toml cannot be used as written; the message says which field and what it must be."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One command to run on a cluster, and what it needs there."""

    name: str
    """Names the run on the cluster; its attempts are NAME-1, NAME-2, ..."""
    command: tuple[str, ...]
    """Arguments as a list, no shell: ["actcache", ...] or ["python", "-m", "sae", ...]."""
    python: str = "python"
    """What `python` and `actcache` in the command run with there; it must have ray, actcache and sae."""
    num_cpus: float = 0
    """CPUs that the command itself reserves; the actors it starts reserve their own."""
    num_gpus: float = 0
    """GPUs that the command itself reserves, e.g. 1 for `sae train`; harvest's actors reserve their own."""
    env: tuple[str, ...] = ()
    """Names of environment variables to pass on; the values come from whoever submits."""
    working_dir: str | None = None
    """Directory of code to upload and run in; None: the code of the cluster's image."""

    def __post_init__(self) -> None:
        _check_types(self)
        if not _NAME.fullmatch(self.name):
            raise ConfigError("name must be at most 40 of a-z, 0-9 and '-', without '-' at the ends")
        if not self.command or not self.command[0]:
            raise ConfigError('command is empty; it must be a list, e.g. ["actcache", "harvest", ...]')
        for i, name in enumerate(self.env):
            if not _ENV_NAME.fullmatch(name):
                raise ConfigError(f"env[{i}] is not a variable's name; list names only, never NAME=value")
        for field in ("num_cpus", "num_gpus"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be 0 or more")
        refuse_secrets({f.name: getattr(self, f.name) for f in fields(self)})

    @property
    def entrypoint(self) -> str:
        """The shell command that Ray runs: `python` and `actcache` by the run's own interpreter."""
        program, *arguments = self.command
        known = {"python": [self.python], "actcache": [self.python, "-m", "actcache"]}
        return shlex.join([*known.get(program, [program]), *arguments])


def read_run(path: str | Path) -> Run:
    """The run in a TOML file; a relative `working_dir` is taken from the file's own directory.

    Raises:
        ConfigError: the file is missing, is not TOML, or has an unknown, missing or unusable field.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        run = _from_values(values)
    except OSError as err:
        raise ConfigError(f"{path} cannot be read: {err.strerror}") from err
    except ValueError as err:  # TOMLDecodeError, UnicodeDecodeError, ConfigError
        raise ConfigError(f"{path}: {err}") from err
    if run.working_dir is None:
        return run
    directory = (path.parent / run.working_dir).resolve()
    if not directory.is_dir():
        raise ConfigError(f"{path}: working_dir {directory} is not a directory")
    return replace(run, working_dir=str(directory))


def refuse_secrets(values: Mapping[str, Any]) -> None:
    """Raise ConfigError where a string looks like a credential; the message names the place only."""
    previous = ""
    for place, text in _strings(values):
        after_flag = _SECRET_FLAG.fullmatch(previous) and not text.startswith("-") and len(text) >= 8
        if _SECRET.search(text) or after_flag:
            raise ConfigError(
                f"{place} looks like a secret, and files are kept and shared; "
                "put it in an environment variable and its name in env"
            )
        previous = text


def _strings(values: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(values, str):
        yield place, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from _strings(value, f"{place}.{key}" if place else str(key))
    elif isinstance(values, list | tuple):
        for i, value in enumerate(values):
            yield from _strings(value, f"{place}[{i}]")


def _from_values(values: dict[str, Any]) -> Run:
    known = [f.name for f in fields(Run)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it can be {', '.join(known)}"
            raise ConfigError(f"no field is called {key!r}; {hint}")
    for key in ("name", "command"):
        if key not in values:
            raise ConfigError(f"{key} is missing")
    fixed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Run(**fixed)


def _check_types(run: Run) -> None:
    wanted = dict.fromkeys(("command", "env"), "a list of strings")
    wanted |= dict.fromkeys(("num_cpus", "num_gpus"), "a number")
    for f in fields(run):
        value, want = getattr(run, f.name), wanted.get(f.name, "a string")
        if want == "a list of strings":
            good = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
        elif want == "a number":
            good = isinstance(value, int | float) and not isinstance(value, bool)
        else:
            good = isinstance(value, str) or (value is None and f.default is None)
        if not good:
            raise ConfigError(f"{f.name} is a {type(value).__name__}; it must be {want}")
