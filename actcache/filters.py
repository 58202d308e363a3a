"""Which rows a stream serves: conditions on norm, token and sequence.

They mask rows after the order is fixed: batches shrink and are never refilled, so a filter moves no
other row and a stream resumes as before. The state carries the filter's digest.
Specified in docs/format.md, "Reading order".
Shapes: N rows, D = d_in.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import SpecError
from .spec import digest

if TYPE_CHECKING:
    from .reader import Dataset

_BY_ROW = ("token_id", "sequence", "position")


@dataclass(frozen=True, kw_only=True)
class Where:
    """Conditions that a row must meet, all of them, to be served. At least one is given."""

    max_norm: float | Mapping[str, float] | None = None
    """Largest Euclidean norm of the row as stored, at every site of the stream or by site."""
    max_norm_percentile: float | None = None
    """The same from the statistics of `train`: 99 leaves out the rows above the 99th percentile of a site
    (attention sinks among them). One of the percents in `ds.stats(site)["norm_percentiles"]`."""
    token_ids: Collection[int] | None = None
    """Only rows of these tokens."""
    not_token_ids: Collection[int] | None = None
    """No rows of these tokens."""
    sequences: Collection[int] | None = None
    """Only rows of these sequences."""
    not_sequences: Collection[int] | None = None
    """No rows of these sequences."""

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in self.__dataclass_fields__):
            raise SpecError("Where() has no condition; give one, or leave `where` out")

    @property
    def on_norm(self) -> bool:
        """Whether a condition needs the activations."""
        return self.max_norm is not None or self.max_norm_percentile is not None


class Filter:
    """A `Where` made ready for some sites of a dataset."""

    def __init__(self, where: Where, dataset: "Dataset", sites: list[str]) -> None:
        self._shared = dataset._shared
        self._max_norm = _thresholds(where, dataset, sites)
        vocab_size = dataset.manifest.identity["tokens"]["vocab_size"]
        self._sets = [
            (array, _sorted_set(getattr(where, name), name, size, dataset.url), wanted)
            for name, array, size, wanted in (
                ("token_ids", "token_id", vocab_size, True),
                ("not_token_ids", "token_id", vocab_size, False),
                ("sequences", "sequence", dataset.n_sequences, True),
                ("not_sequences", "sequence", dataset.n_sequences, False),
            )
            if getattr(where, name) is not None
        ]
        self.digest = digest(
            {
                "max_norm": self._max_norm,
                "sets": [[array, wanted, members.tolist()] for array, members, wanted in self._sets],
            }
        )

    @property
    def arrays(self) -> list[str]:
        """Arrays by row that it looks at."""
        return [name for name in _BY_ROW if any(array == name for array, _, _ in self._sets)]

    def apply(self, parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The rows that pass, of arrays gathered for a batch."""
        rows = np.arange(len(next(iter(parts.values()))))
        for array, members, wanted in self._sets:
            rows = rows[_isin(parts[array][rows], members) == wanted]
        for site, largest in self._max_norm.items():
            rows = rows[_norms(parts, site, rows, self._shared) <= largest]
        return {name: part[rows] for name, part in parts.items()}


def _norms(parts: Mapping[str, np.ndarray], site: str, rows: np.ndarray, shared: Any) -> np.ndarray:
    """float64 [N]; always by numpy from the stored values, so that no device decides which rows are served."""
    scale = parts.get(f"{site}/scale")
    codes_ND = parts[f"{site}/codes"][rows]
    acts_ND = shared.decode(site, codes_ND, None if scale is None else scale[rows])
    return np.sqrt(np.square(acts_ND, dtype=np.float64).sum(axis=1))


def _thresholds(where: Where, dataset: "Dataset", sites: list[str]) -> dict[str, float]:
    given = where.max_norm
    if isinstance(given, Mapping):
        if unknown := sorted(set(given) - set(sites)):
            raise SpecError(f"max_norm names {', '.join(unknown)}; the stream serves {', '.join(sites)}")
        norms = {site: float(norm) for site, norm in given.items()}
    else:
        norms = {} if given is None else dict.fromkeys(sites, float(given))
    if any(not norm > 0 for norm in norms.values()):
        raise SpecError(f"max_norm is {given}; it must be above 0")
    if where.max_norm_percentile is not None:
        for site in sites:
            percentile = _percentile(dataset, site, where.max_norm_percentile)
            norms[site] = min(percentile, norms.get(site, percentile))
    return norms


def _percentile(dataset: "Dataset", site: str, percent: float) -> float:
    known = dataset.split("train").stats(site).get("norm_percentiles", {})
    found = {float(p): float(norm) for p, norm in known.items()}
    if float(percent) not in found:
        raise SpecError(
            f"max_norm_percentile is {percent:g}; the statistics of {site} have "
            f"{', '.join(f'{p:g}' for p in found) or 'no norm percentiles'}. Use one of them, or max_norm"
        )
    return found[float(percent)]


def _sorted_set(values: Iterable[int], name: str, n: int, url: str) -> np.ndarray:
    members = np.unique(np.asarray(list(values)))
    if len(members) == 0:
        members = members.astype(np.int64)
    if members.dtype.kind not in "iu" or (len(members) and not (members[0] >= 0 and members[-1] < n)):
        raise SpecError(f"{name} must be whole numbers in 0..{n - 1} for {url}, got {members[:3]} ...")
    return members.astype(np.int64)


def _isin(values_N: np.ndarray, members: np.ndarray) -> np.ndarray:
    if not len(members):
        return np.zeros(len(values_N), bool)
    at = np.minimum(np.searchsorted(members, values_N), len(members) - 1)
    return members[at] == values_N
