"""Settings of a training run from text: `--sae topk:d_sae=6144,k=32`, `--preset ...`, a TOML file, options.

Everything here is read off the config dataclasses: names, types, help. A name that does not exist or a
value of the wrong type is one line with the nearest name. Trains nothing; torch is imported in the
functions, so that `--help` of the group stays quick.
"""

import ast
import inspect
import itertools
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

if typing.TYPE_CHECKING:
    from .architectures import Architecture
    from .core import SAE
    from .presets import Preset

REPEATED = ("d_sae", "k", "l1_coefficient", "l0_coefficient", "target_l0")
"""Fields whose option may be repeated: every combination is trained."""
_STRUCTURED = ("revive", "optimiser")
_RENAMED = {
    "n_rows": "rows",
    "rungs": "rung",
    "eval_every_rows": "eval_every",
    "eval_n_rows": "eval_rows",
    "eval_n_sequences": "eval_sequences",
}
EVAL_PREFIX = "eval_"
"""Before the names of `EvalDuring`'s fields on the command line."""
FILE_KEYS = (
    "data",
    "site",
    "out",
    "batch_size",
    "epochs",
    "rotated",
    "device",
    "workers",
    "spread",
    "gpus_per_worker",
    "cpus_per_worker",
    "preset",
    "start",
    "log",
    "storage_options",
    "training",
    "eval",
    "sae",
)
"""What a TOML file may hold."""


def sae_of_text(text: str) -> "Architecture":
    """The config that `topk:d_sae=6144,k=32,lr=1e-4` means.

    Raises:
        ValueError: an unknown architecture or key (with the nearest), or a value of the wrong type.
    """
    name, _, rest = text.partition(":")
    return sae_of_table({"architecture": name, **_pairs(rest, f"--sae {text}")})


def sae_of_table(table: Mapping[str, Any]) -> "Architecture":
    """The config of a flat table: fields of the architecture, of its optimiser and of what revives.

    `revive` is a name (`auxk`, `ghost`, `resample`, `none`); `revive` and `optimiser` may be tables of
    their own too, as in run.json.

    Raises:
        ValueError: as `sae_of_text`.
    """
    from .architectures import ARCHITECTURES, Optimiser
    from .revival import REVIVALS

    values = {**table, **_inner(table, "optimiser")}
    values.pop("optimiser", None)
    inner = _inner(table, "revive")
    if inner or isinstance(table.get("revive"), Mapping):
        values["revive"] = inner.pop("kind", None)
        values |= inner
    name = values.pop("architecture", None)
    _check_names([name], ARCHITECTURES, "architecture")
    kind = ARCHITECTURES[name]
    own = {f.name: f for f in fields(kind) if f.name not in _STRUCTURED}
    optimiser = {f.name: f for f in fields(Optimiser)}
    revival = _revival_name(kind, values.pop("revive", ""), name)
    of_revival = {f.name: f for f in fields(REVIVALS[revival])} if revival else {}
    others = {f.name: r for r, k in REVIVALS.items() for f in fields(k) if f.name not in of_revival}
    for key in values:
        if key in others and key not in own:
            raise ValueError(f"{name}: {key} belongs to revive={others[key]}; add that, or leave {key} out")
    _check_names(values, [*own, "revive", *optimiser, *of_revival], f"{name}: key")
    parts = [_taken(values, known, name) for known in (own, optimiser, of_revival)]
    missing = [f.name for f in own.values() if f.default is MISSING and f.name not in parts[0]]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}; e.g. {missing[0]}=32")
    revive = REVIVALS[revival](**parts[2]) if revival else None
    try:
        return kind(**parts[0], optimiser=Optimiser(**parts[1]), revive=revive)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def preset_of_text(text: str, n_rows: int) -> "Preset":
    """The preset that `openai_topk:d_sae=32768,k=32` means; `n_rows` where its source names none.

    Raises:
        ValueError: an unknown preset or argument, or one that is missing.
    """
    from .presets import PRESETS

    name, _, rest = text.partition(":")
    _check_names([name], PRESETS, "preset")
    function, given = PRESETS[name], _pairs(rest, f"--preset {text}")
    parameters = inspect.signature(function).parameters
    _check_names(given, parameters, f"{name}: key")
    kinds = {k: p.annotation for k, p in parameters.items()}
    values = {k: fitted(kinds[k], _listed(kinds[k], v), f"{name}: {k}") for k, v in given.items()}
    if "n_rows" in parameters:
        values.setdefault("n_rows", n_rows)
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in values]
    if missing:
        raise ValueError(f"preset {name} needs {', '.join(missing)}: --preset {name}:{missing[0]}=...")
    return function(**values)


def config_of_sae(s: "SAE", where: str) -> "Architecture":
    """The config that a finished SAE was trained with, or that its kind has, for fine-tuning.

    Raises:
        ValueError: its settings do not say all that training needs.
    """
    from .architectures import ARCHITECTURES

    kind = ARCHITECTURES[s.cfg["architecture"]]
    known = [f.name for f in fields(kind) if f.name != "site"]
    table = {name: s.cfg[name] for name in known if s.cfg.get(name) is not None}
    if "revive" in s.cfg and s.cfg["revive"] is None:
        table["revive"] = "none"
    try:
        return sae_of_table({"architecture": kind.architecture, **table})
    except ValueError as error:
        raise ValueError(f"{where} does not say how to train it ({error}); give --sae too") from error


def read_file(path: Path) -> dict[str, Any]:
    """The settings of a TOML file: `FILE_KEYS`, `training` and `eval` checked against `Training` and `EvalDuring`.

    Raises:
        ValueError: no TOML, an unknown key or a value of the wrong type.
    """
    from .evals.during import EvalDuring
    from .training import Training

    try:
        found = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    _check_names(found, FILE_KEYS, f"{path}: key")
    known: dict[str, Any] = {f.name: f for f in fields(Training)}
    training = _table(found.pop("training", {}), f"{path}: training")
    _check_names(training, known, f"{path}: training key")
    of_evals: dict[str, Any] = {f.name: f for f in fields(EvalDuring)}
    evals = _table(found.pop("eval", {}), f"{path}: eval")
    _check_names(evals, of_evals, f"{path}: eval key")
    saes = found.pop("sae", [])
    if not isinstance(saes, list) or not all(isinstance(s, dict) for s in saes):
        raise ValueError(f"{path}: sae is {saes!r}; it wants tables, each headed [[sae]]")
    kinds = {
        "data": str,
        "out": str,
        "preset": str,
        "batch_size": int,
        "epochs": int,
        "rotated": bool,
        "device": str,
        "workers": int | str,
        "spread": str,
        "gpus_per_worker": int,
        "cpus_per_worker": int,
        "site": tuple[str, ...],
        "start": tuple[str, ...],
        "log": tuple[str, ...],
    }
    checked = {
        k: fitted(kinds[k], _listed(kinds[k], v), f"{path}: {k}") for k, v in found.items() if k in kinds
    }
    options = _table(found.get("storage_options", {}), f"{path}: storage_options")
    try:
        configs = [sae_of_table(s) for s in saes]
        values = _taken(training, known, "training")
        eval_values = _taken(evals, of_evals, "eval")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return {**checked, "storage_options": options, "training": values, "eval": eval_values, "sae": configs}


def fitted(annotation: Any, value: Any, what: str) -> Any:
    """`value` as the annotation wants it; whole floats become ints, ints floats, lists tuples.

    Raises:
        ValueError: it does not fit.
    """
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for kind in options:
        found = _fit(kind, value)
        if found is not _NO_FIT:
            return found
    wanted = " or ".join(_spoken(kind) for kind in options)
    raise ValueError(f"{what} is {value!r}; it must be {wanted}")


_NO_FIT = object()


def _fit(kind: Any, value: Any) -> Any:
    if kind is types.NoneType:
        return value if value is None else _NO_FIT
    if typing.get_origin(kind) is typing.Literal:
        return value if value in typing.get_args(kind) else _NO_FIT
    if typing.get_origin(kind) is tuple:
        of = typing.get_args(kind)
        if not isinstance(value, list | tuple) or (of[-1] is not Ellipsis and len(of) != len(value)):
            return _NO_FIT
        items = tuple(_fit(of[0], item) for item in value)
        return _NO_FIT if any(item is _NO_FIT for item in items) else items
    if isinstance(value, bool) or kind is bool:
        return value if kind is bool and isinstance(value, bool) else _NO_FIT
    if kind is int:
        return int(value) if isinstance(value, int | float) and value == value // 1 else _NO_FIT
    if kind is float:
        return float(value) if isinstance(value, int | float) else _NO_FIT
    return value if isinstance(value, kind) else _NO_FIT


def _spoken(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    if typing.get_origin(kind) is tuple:
        of = typing.get_args(kind)
        count = "" if of[-1] is Ellipsis else f"{len(of)} "
        return f"{count}{_spoken(of[0]).split(' ', 1)[1]}s (joined by + on the command line)"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(kind, "none")


def _pairs(text: str, where: str) -> dict[str, Any]:
    """`a=1,b=x+y` as a dict; numbers, true, false and none are read as such, `+` separates a tuple."""
    found: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{where}: {item!r} is not KEY=VALUE; e.g. topk:d_sae=6144,k=32")
        if key.strip() in found:
            raise ValueError(f"{where}: {key.strip()} is given twice; keep one")
        found[key.strip()] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": "none"}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if "+" in text:
        return tuple(_value(part) for part in text.split("+"))
    return text


def _taken(values: Mapping[str, Any], known: Mapping[str, "Field[Any]"], name: str) -> dict[str, Any]:
    """The values of the known fields, checked; one value where a tuple is wanted becomes one."""
    return {
        key: fitted(f.type, _listed(f.type, values[key]), f"{name}: {key}")
        for key, f in known.items()
        if key in values
    }


def _listed(annotation: Any, value: Any) -> Any:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    wanted = any(typing.get_origin(kind) is tuple for kind in options)
    if value == "none" and types.NoneType in options:
        return None
    return (value,) if wanted and value is not None and not isinstance(value, list | tuple) else value


def _inner(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    return dict(table[name]) if isinstance(table.get(name), Mapping) else {}


def _table(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {value!r}; it must be a table")
    return value


def _revival_name(kind: "type[Architecture]", given: Any, name: str) -> str | None:
    from .revival import REVIVALS

    if given == "":
        default: str | None = getattr(kind.revive, "kind", None)
        return default
    if given in (None, "none"):
        return None
    _check_names([given], [*REVIVALS, "none"], f"{name}: revive")
    return str(given)


def _check_names(given: Iterable[Any], known: Iterable[str], what: str) -> None:
    """Raise `ValueError` for the first name that is not known, with the nearest."""
    names = list(known)
    for name in given:
        if name not in names:
            near = get_close_matches(str(name), names, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise ValueError(f"{what} {name!r} is not known; {hint}")


def combinations(arch: Sequence[str], revive: str | None, values: Mapping[str, Any]) -> "list[Architecture]":
    """A config for each architecture and value of the repeated options.

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
        swept = [n for n in REPEATED if n in own]
        for one in itertools.product(*(own[n] for n in swept)):
            try:
                configs.append(from_fields(kind, {**own, **dict(zip(swept, one, strict=True))}))
            except ValueError as error:
                raise click.UsageError(f"{name}: {error}") from error
    if unused:
        options = ", ".join("--" + n.replace("_", "-") for n in sorted(unused))
        raise click.UsageError(f"{options}: no architecture or --revive chosen here has this option")
    return list(dict.fromkeys(configs))


def sae_fields() -> list[tuple["Field[Any]", dict[str, str]]]:
    """The fields of all architectures and of what revives dead latents, each name once."""
    from .architectures import ARCHITECTURES, TopK
    from .revival import REVIVALS

    found: dict[str, tuple[Field[Any], dict[str, str]]] = {}
    for kind in (TopK, *ARCHITECTURES.values(), *REVIVALS.values()):
        for f in fields(kind):
            if f.name not in (*_STRUCTURED, "site"):
                found.setdefault(f.name, (f, field_docs(kind)))
    return list(found.values())


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


def field_option(
    f: "Field[Any]", docs: Mapping[str, str], multiple: bool = False, prefix: str = ""
) -> click.Option:
    """A command-line option for a config field, `prefix` before its name; its help is the field's own text.

    Its value is None, or (), when it is not given: the dataclass knows its default.
    """
    help_text = docs[f.name].replace("None: ", "Default: ")
    if f.name == "n_rows" and not prefix:
        help_text += " Default: every row of the dataset, once per epoch."
    if multiple:
        help_text += " Repeat to train several."
    kind, extra = _click_type(f.type)
    if f.default not in (MISSING, None, ()):
        shown = f"{f.default:g}" if kind is float else str(f.default)
        help_text += f" [default: {shown}]"
    extra.setdefault("multiple", multiple)
    name = prefix + f.name
    flag = _RENAMED.get(name, name).replace("_", "-")
    return click.Option([f"--{flag}", name], type=kind, default=None, help=help_text, **extra)


def _click_type(annotation: Any) -> tuple[Any, dict[str, Any]]:
    if typing.get_origin(annotation) is typing.Literal:
        return click.Choice(typing.get_args(annotation)), {}
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is tuple:
        of = typing.get_args(annotation)
        return of[0], {"multiple": True} if of[-1] is Ellipsis else {"nargs": len(of)}
    return annotation, {"is_flag": True} if annotation is bool else {}
