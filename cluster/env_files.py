"""Variables of a run whose values lie in files of the machines that run it, such as /run/secrets/hf_token.

Only names and paths travel, in one variable of the run's environment: Ray keeps that of a job in clear, in its job table and in
the logs of its nodes. `load` is Ray's hook in each worker process. The job's own process has none: a command is started
by `python -m cluster.env_files COMMAND...`, and `cluster.steps` loads for itself.
"""

import json
import os
import sys
from collections.abc import Mapping

VARIABLE = "ACTCACHE_ENV_FILES"
HOOK = f"{__name__}.load"


def variable(env_files: Mapping[str, str]) -> dict[str, str]:
    """What the environment of a run must have for `load`; empty where there is nothing to load."""
    return {VARIABLE: json.dumps(dict(env_files))} if env_files else {}


def load() -> None:
    """Set the variables of this process.

    A file that cannot be read is said on stderr and its variable stays as it is: with an exception here Ray would start
    the worker again and again. `loaded` is for who starts the command.
    """
    for name, path in _wanted().items():
        try:
            os.environ[name] = _read(path)
        except OSError as err:
            print(_trouble(name, path, err), file=sys.stderr, flush=True)


def loaded() -> bool:
    """Set the variables of this process; False, and a line on stderr, if one cannot be."""
    if found := troubles():
        print(f"error: {'; '.join(found)}. Put it there, or correct env_files", file=sys.stderr)
        return False
    load()
    return True


def troubles() -> list[str]:
    """A line for each variable whose file cannot be read here, or is empty."""
    found = []
    for name, path in _wanted().items():
        try:
            if not _read(path):
                found.append(f"{name} is wanted from {path}, which is empty")
        except OSError as err:
            found.append(_trouble(name, path, err))
    return found


def _wanted() -> dict[str, str]:
    return dict(json.loads(os.environ.get(VARIABLE) or "{}"))


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def _trouble(name: str, path: str, err: OSError) -> str:
    return f"{name} is wanted from {path}, which cannot be read here: {err.strerror}"


def main() -> int:
    """Become the command in the arguments; 1 if a file cannot be read."""
    if not loaded():
        return 1
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
