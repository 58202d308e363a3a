"""Which rows a stream serves: conditions on norm, token, sequence and document.

They mask rows after the order is fixed: batches shrink and are never refilled, so a filter moves no
other row and a stream resumes as before. The state carries the filter's digest.
Specified in docs/format.md, "Reading order".
Shapes: N rows, D = d_in.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
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
    documents: Collection[int] | None = None
    """Only rows of these documents of the split, numbered as `ds.documents` numbers them."""
    not_documents: Collection[int] | None = None
    """No rows of these documents."""

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
        self._documents: _Documents | None = None
        by_document = [
            (_sorted_set(getattr(where, name), name, None, dataset.url), wanted)
            for name, wanted in (("documents", True), ("not_documents", False))
            if getattr(where, name) is not None
        ]
        if by_document:
            self._documents = _Documents(dataset, by_document)
        self.digest = digest(
            {
                "max_norm": self._max_norm,
                "sets": [[array, wanted, members.tolist()] for array, members, wanted in self._sets]
                + [["document", wanted, members.tolist()] for members, wanted in by_document],
            }
        )

    @property
    def arrays(self) -> list[str]:
        """Arrays by row that it looks at."""
        used = {array for array, _, _ in self._sets} | (
            {"sequence", "position"} if self._documents else set()
        )
        return [name for name in _BY_ROW if name in used]

    def apply(self, parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The rows that pass, of arrays gathered for a batch."""
        rows = np.arange(len(next(iter(parts.values()))))
        for array, members, wanted in self._sets:
            rows = rows[_isin(parts[array][rows], members) == wanted]
        if self._documents is not None:
            rows = rows[self._documents.pass_N(parts["sequence"][rows], parts["position"][rows])]
        for site, largest in self._max_norm.items():
            rows = rows[_norms(parts, site, rows, self._shared) <= largest]
        return {name: part[rows] for name, part in parts.items()}


class _Documents:
    """Which tokens are of chosen documents, by runs: 9 bytes for each sequence and each document in one."""

    def __init__(self, dataset: "Dataset", conditions: Sequence[tuple[np.ndarray, bool]]) -> None:
        self._context_size = dataset.spec.context_size
        start, passes = [], []
        for first in range(0, dataset.n_sequences, step := max(1, 2**24 // self._context_size)):
            sequences = np.arange(first, min(first + step, dataset.n_sequences))
            document_S = dataset._gather("document", sequences).astype(np.int64)
            begins_ST = dataset._gather("document_begins", sequences)
            # a run begins with each sequence, and where another document does
            sequence_R, position_R = np.nonzero(begins_ST)
            n_before = np.concatenate([[0], np.cumsum(begins_ST.astype(bool).sum(axis=1))])
            document_R = document_S[sequence_R] + 1 + np.arange(len(sequence_R)) - n_before[sequence_R]
            start_R = np.concatenate([sequences, sequences[sequence_R]]) * self._context_size
            start_R[len(sequences) :] += position_R
            order = np.argsort(start_R, kind="stable")
            document_R = np.concatenate([document_S, document_R])[order]
            start.append(start_R[order])
            passes.append(np.all([_isin(document_R, m) == wanted for m, wanted in conditions], axis=0))
        self._start_R, self._pass_R = np.concatenate(start), np.concatenate(passes)

    def pass_N(self, sequence_N: np.ndarray, position_N: np.ndarray) -> np.ndarray:
        """bool [N]: whether the document of each token is one that passes."""
        token_N = sequence_N.astype(np.int64) * self._context_size + position_N
        return self._pass_R[np.searchsorted(self._start_R, token_N, side="right") - 1]


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


def _sorted_set(values: Iterable[int], name: str, n: int | None, url: str) -> np.ndarray:
    members = np.unique(np.asarray(list(values)))
    if len(members) == 0:
        members = members.astype(np.int64)
    last = np.iinfo(np.int64).max if n is None else n - 1  # how many documents a split has is not stored
    if members.dtype.kind not in "iu" or (len(members) and not (members[0] >= 0 and members[-1] <= last)):
        raise SpecError(f"{name} must be whole numbers in 0..{last} for {url}, got {members[:3]} ...")
    return members.astype(np.int64)


def _isin(values_N: np.ndarray, members: np.ndarray) -> np.ndarray:
    if not len(members):
        return np.zeros(len(values_N), bool)
    at = np.minimum(np.searchsorted(members, values_N), len(members) - 1)
    return members[at] == values_N
