"""What GPUs and storage cost: assumptions of a plan, from `prices.toml` or a file of the person's own."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .errors import SpecError
from .spec import nearest

_BUILT_IN = Path(__file__).parent / "prices.toml"
DEFAULT_GPU = "h100"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU."""

    price_per_hour: float
    """Dollars."""
    peak_tflops: float
    """Dense bf16, 10^12 operations a second."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """An object store."""

    per_gb_month: float
    """Dollars for 10^9 bytes kept a month."""
    put_per_1000: float
    """Dollars for 1,000 writes."""
    get_per_1000: float
    """Dollars for 1,000 reads."""
    egress_per_gb: float
    """Dollars for 10^9 bytes read."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """A price table; every figure is an assumption."""

    source: str
    as_of: str
    gpu: Mapping[str, Gpu]
    storage: Storage

    def named(self, gpu: str) -> Gpu:
        """The GPU of that name.

        Raises:
            SpecError: there is none.
        """
        if gpu not in self.gpu:
            raise SpecError(
                f"no GPU {gpu!r} in {self.source}{nearest(gpu, list(self.gpu))}; it has {', '.join(self.gpu)}. "
                "Add it in a file for --prices"
            )
        return self.gpu[gpu]


def read_prices(path: str | os.PathLike[str] | None = None) -> Prices:
    """The built-in table, with what the TOML file at `path` has in place of its figures.

    Raises:
        SpecError: not there, not TOML, an unknown name, or no number >= 0 where one belongs.
    """
    table = _load(_BUILT_IN, "the built-in table")
    source = "the built-in table"
    if path is not None:
        source = os.fspath(path)
        given = _load(Path(source), source)
        _known(given, table, source)
        table = {
            "as_of": given.get("as_of", "not said"),
            "storage": table["storage"] | _section(given, "storage", source),
            "gpu": table["gpu"]
            | {
                name: table["gpu"].get(name, {}) | _section(given["gpu"], name, source)
                for name in _section(given, "gpu", source)
            },
        }
    return Prices(
        source=source,
        as_of=str(table["as_of"]),
        gpu={name: Gpu(**_numbers(Gpu, gpu, f"gpu.{name}", source)) for name, gpu in table["gpu"].items()},
        storage=Storage(**_numbers(Storage, table["storage"], "storage", source)),
    )


def _load(path: Path, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        reason = getattr(err, "strerror", None) or err
        raise SpecError(f"cannot read prices from {source}: {reason}. Copy actcache/prices.toml") from err


def _section(table: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    value = table.get(name, {})
    if not isinstance(value, dict):
        raise SpecError(f"{source}: {name} is {value!r}; it must be a table")
    return value


def _numbers(kind: type, found: Mapping[str, Any], name: str, source: str) -> dict[str, float]:
    wanted = [f.name for f in fields(kind)]
    _known(found, wanted, f"{source}, [{name}]")
    for key in wanted:
        value = found.get(key)
        least = "above" if key == "peak_tflops" else "of at least"
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else -1
        if not (0 < number < float("inf") or (number == 0 and least != "above")):
            raise SpecError(f"{source}, [{name}]: {key} is {value!r}; it must be a number {least} 0")
    return {key: float(found[key]) for key in wanted}


def _known(found: Mapping[str, Any], wanted: Any, where: str) -> None:
    for key in found:
        if key not in wanted:
            raise SpecError(
                f"{where}: unknown {key!r}{nearest(key, list(wanted))}; wanted {', '.join(wanted)}"
            )
