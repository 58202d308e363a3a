"""Dataclasses from TOML tables: misspelled, missing and mistyped fields are named, values never: they may be secrets."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

_WANTED: dict[Any, str] = {
    str: "a string",
    str | None: "a string",
    float: "a number",
    float | None: "a number",
    int: "a whole number",
    int | str: 'a whole number, or a text such as "2..8"',
    bool: "true or false",
    tuple[str, ...]: "a list of strings",
    Mapping[str, str]: "a table of strings",
}
_FOUND = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", dict: "a table"}
_FOUND |= {tuple: "a list", list: "a list"}


class ConfigError(ValueError):
    """RUN.toml cannot be used as written; the message says which field and what it must be."""


def from_table(kind: Any, values: Any, place: str, required: Sequence[str] = ()) -> Any:
    """A dataclass from a TOML table.

    Args:
        kind: the dataclass; fields without a default are required.
        place: what stands before its fields in messages.
        required: fields that must be there although they have a default.

    Raises:
        ConfigError: it is no table, or has an unknown or a missing field.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{place.rstrip('.')} is {_found(values)}; it must be a table")
    known = [f.name for f in fields(kind)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it can be {', '.join(known)}"
            raise ConfigError(f"no field is called {place + key!r}; {hint}")
    own = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    for key in [*own, *required]:
        if key not in values:
            raise ConfigError(f"{place}{key} is missing; put it in, docs/cluster.md has an example")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def check_types(of: Any, place: str) -> None:
    """Refuse values of a dataclass that are not of their fields' types; tables within it are checked apart.

    Raises:
        ConfigError: names the field and what it must be.
    """
    for f in fields(of):
        value, want = getattr(of, f.name), _WANTED.get(f.type)
        if want is None or (value is None and f.default is None):
            continue  # a table, which `from_table` made, or nothing where nothing is allowed
        if not _is(value, want):
            raise ConfigError(f"{place}{f.name} is {_found(value, want)}; it must be {want}")


def _is(value: Any, want: str) -> bool:
    """Whether a value is what a field must be, in the words of `_WANTED`."""
    if want == "a list of strings":
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if want == "a table of strings":
        return isinstance(value, Mapping) and all(isinstance(item, str) for item in value.values())
    kinds: dict[str, Any] = {
        "a string": str,
        "true or false": bool,
        "a whole number": int,
        "a number": int | float,
    }
    return isinstance(value, kinds.get(want, int | str)) and (
        want == "true or false" or not isinstance(value, bool)
    )


def _found(value: Any, want: str = "") -> str:
    """What a value is, in the words of TOML."""
    kind = _FOUND.get(type(value), f"a {type(value).__name__}")
    return f"{kind} of other things" if want.startswith(f"{kind} of") else kind
