"""What looks like a credential: refused where it would be kept, hidden where it would be shown.

Values are judged by their form, environment variables by their names too. It never stores or logs what it judges.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

HIDDEN = "***"
_WORD = (
    r"(?:pass(?:word|wd|phrase)|secret(?:[_-]?key)?|token|credential|(?:api|access|account|private)[_-]?key)"
)
_VALUE = re.compile(
    r"(?:AKIA|ASIA)[0-9A-Z]{16}"  # AWS access key id
    r"|\b(?:hf_|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|sk-)[A-Za-z0-9_-]{16,}"  # hub, GitHub, GitLab, ...
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}"  # JSON web token
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|://[^/\s:@]*:[^/\s@]+@"  # a URL with a password
    r"|(?<![A-Za-z0-9/+])(?=(?:[a-z0-9/+]*[A-Z]){8})(?=[A-Za-z/+]*\d)[A-Za-z0-9/+]{40}"
    r"(?![A-Za-z0-9/+=])"  # AWS secret key; a git hash and most paths have no eight capitals
    # secret=..., --api-key=...; "tokens" is another word, and short values (true, null, 8) are settings, paths
    # are where a secret lies
    rf"|(?i:{_WORD}[\"']?\s*[=:]\s*[\"']?(?!/)[^\s\"']{{8,}})"
)
_FLAG = re.compile(rf"(?i)--?(?:[\w-]*[_-])?{_WORD}")
_VARIABLE = re.compile(r"(?i)(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIALS?)(?:_ID)?$")
_LEAST = 8
"""Characters of a value that is hidden by its variable's name: shorter ones are words of the log too."""


def place_of_secret(values: Mapping[str, Any]) -> str | None:
    """Which of these (nested) values looks like a credential, e.g. "command[3]"; None if none does."""
    previous = ""
    for place, text in _strings(values):
        after_flag = _FLAG.fullmatch(previous) and not text.startswith("-") and len(text) >= _LEAST
        if _VALUE.search(text) or after_flag:
            return place
        previous = text
    return None


def secret_variables(names: Iterable[str]) -> list[str]:
    """Those of these environment variables that hold credentials, by their names or by their values here."""
    return [name for name in names if _VARIABLE.search(name) or _VALUE.search(os.environ.get(name, ""))]


def scrub(text: str) -> str:
    """The text with `***` in place of what looks like a credential, and of the values of this process's own ones."""
    values = (os.environ[name] for name in os.environ if _VARIABLE.search(name))
    for value in sorted((v for v in values if len(v) >= _LEAST), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return _VALUE.sub(HIDDEN, text)


class Scrubbed:
    """Passes text on line by line, scrubbed: a credential may come in two pieces."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write, self._rest = write, ""

    def __call__(self, text: str) -> None:
        lines, newline, self._rest = (self._rest + text).rpartition("\n")
        if newline:
            self._write(scrub(lines) + newline)

    def close(self) -> None:
        """Pass on a last line without an end."""
        if self._rest:
            self._write(scrub(self._rest))
            self._rest = ""


def _strings(values: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(values, str):
        yield place, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from _strings(value, f"{place}.{key}" if place else str(key))
    elif isinstance(values, list | tuple):
        for i, value in enumerate(values):
            yield from _strings(value, f"{place}[{i}]")
