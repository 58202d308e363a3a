"""Where latents fire and the tokens around, from one pass over a split, in bounded memory.

Owns the pass: rows are read in stored order and encoded; every activation, keyed by latent,
sequence and position, is spilled to parquet, cut into parts of some sequences each; the places
that will be shown are chosen on the way. Snippets are then assembled part by part from what was
spilled: no row is read or encoded twice, and none is looked up on its own. Memory is that of one
part, of the chosen places and of a chunk of rows, whatever the number of rows; the disk holds
at most 12 bytes an activation until the pass has ended.

Which places: of each latent the `TOP` largest activations, places of one sequence less than
`NEAR` tokens apart shown once; and `SAMPLED` that are spread evenly over the strengths of a
uniform random sample of `_SAMPLE` of its activations, and so over their quantiles. The sample is
drawn by a hash of (latent, sequence, position): it depends on nothing but the activations.

Shapes: N rows, C activations of a chunk, L latents shown, S snippets, W = BEFORE + 1 + AFTER
tokens of a snippet, B bins, T tokens of a sequence.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actcache.errors import ActcacheError, StoreError
from sae.codes import encode_sparse
from sae.select import Entries, Scratch

BEFORE, AFTER = 21, 10
WIDTH = BEFORE + 1 + AFTER
TOP, SAMPLED = 12, 8
NEAR = 8
BINS = 32
_KEPT_TOP = 3 * TOP  # places kept of each latent, so that enough are left when near ones are dropped
_SAMPLE = 4 * SAMPLED
_CHUNK_ROWS = 4096
_PART_CODES = 1 << 22  # activations of a part: peak memory rose by 307 MiB in a pass of one such part
_FLUSH_CODES = 1 << 21
_PENDING = 1 << 20


@dataclass(frozen=True, eq=False)
class Snippets:
    """What some latents do, and the text places that show it; snippets are ordered by latent, then as shown."""

    n_rows: int
    latents: np.ndarray
    """int64 [L]: numbers of the latents, ascending."""
    fires: np.ndarray
    """int64 [L]: rows on which a latent is above 0."""
    sums: np.ndarray
    """float64 [L]: sum of those activations."""
    largest: np.ndarray
    """float32 [L]"""
    histogram: np.ndarray
    """int64 [L, B]: activations by size, in B equal bins from 0 to the largest."""
    starts: np.ndarray
    """int64 [L + 1]: snippets of latent i are `starts[i]:starts[i + 1]`."""
    n_top: np.ndarray
    """int64 [L]: how many of them, the first ones, are the largest activations; the rest is the sample."""
    sequence: np.ndarray
    """int64 [S]"""
    position: np.ndarray
    """int64 [S]: of the token at column BEFORE."""
    value: np.ndarray
    """float32 [S]: its activation."""
    token_ids: np.ndarray
    """int32 [S, W]; -1 outside the sequence."""
    values: np.ndarray
    """float32 [S, W]; 0 where the latent is not active, or the token is no row."""


def collect(
    s: Any,
    view: Any,
    n_rows: int,
    latents: Sequence[int] | np.ndarray | None = None,
    *,
    directory: Path | None = None,
    on_rows: Callable[[int], None] = lambda n: None,
) -> Snippets:
    """The snippets of an SAE's latents over the first `n_rows` rows of a split.

    Args:
        s: what `sae.train` or `sae.load` returned.
        view: one split of a dataset.
        n_rows: how many rows, from the first.
        latents: which latents; all by default.
        directory: where activations are spilled, in a folder of its own that is removed; by default
            where the system keeps temporary files.
        on_rows: told the number of rows after each chunk.

    Raises:
        StoreError: activations cannot be spilled, as on a full disk.
    """
    d_sae = int(s.cfg["d_sae"])
    wanted = np.arange(d_sae) if latents is None else np.unique(np.asarray(latents, np.int64))
    n_tokens = int(view.sequences(slice(0, 1)).input_ids.shape[1])
    spilled = Path(tempfile.mkdtemp(prefix="snippets-", dir=directory))
    try:
        pass_ = _Pass(d_sae, wanted, n_tokens, spilled)
        for codes, rows in _encoded(s, view, n_rows):
            pass_.add(codes, rows)
            on_rows(codes.n_rows)
        pass_.flush()
        return _assemble(pass_, view, n_rows)
    except OSError as err:
        if isinstance(err, ActcacheError):
            raise
        raise StoreError(
            f"{spilled} cannot be written ({err.strerror or err}): activations are spilled there, up to 12 bytes "
            "each. Make room, or set TMPDIR to a directory on another disk."
        ) from err
    finally:
        shutil.rmtree(spilled, ignore_errors=True)


# Encoding


def _encoded(s: Any, view: Any, n_rows: int) -> Iterator[tuple[Entries, Any]]:
    """The positive activations of each chunk of rows, and which tokens its rows are."""
    scratch = Scratch()
    was_training = s.training
    s.eval()
    try:
        for start in range(0, n_rows, _CHUNK_ROWS):
            where = slice(start, min(start + _CHUNK_ROWS, n_rows))
            acts_ND = np.require(view.read(s.cfg["site"], where), np.float32, ["C", "W"])
            yield encode_sparse(s, torch.from_numpy(acts_ND), scratch), view.rows(where)
    finally:
        s.train(was_training)


# The pass


class _Pass:
    """Sums over latents, the chosen places, and every activation on disk."""

    def __init__(self, d_sae: int, latents: np.ndarray, n_tokens: int, directory: Path) -> None:
        self.latents, self.n_tokens, self.directory = latents, n_tokens, directory
        self._index_F = np.full(d_sae, -1, np.int32)
        self._index_F[latents] = np.arange(len(latents), dtype=np.int32)
        self.fires = np.zeros(len(latents), np.int64)
        self.sums = np.zeros(len(latents))
        self.largest = np.zeros(len(latents), np.float32)
        self.top, self.sample = _Kept(len(latents), _KEPT_TOP), _Kept(len(latents), _SAMPLE)
        self.part_places = 0
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._n_pending = self._n_flushes = 0

    def add(self, codes: Entries, rows: Any) -> None:
        place_N = rows.sequence.astype(np.int64) * self.n_tokens + rows.position
        index_C, place_C, value_C = self._index_F[codes.columns], place_N[codes.rows], codes.values
        if len(self.latents) < len(self._index_F):
            here = index_C >= 0
            index_C, place_C, value_C = index_C[here], place_C[here], value_C[here]
        n = len(self.latents)
        self.fires += np.bincount(index_C, minlength=n)
        self.sums += np.bincount(index_C, weights=value_C, minlength=n)
        np.maximum.at(self.largest, index_C, value_C)
        self.top.add(index_C, value_C.astype(np.float64), place_C, value_C)
        self.sample.add(index_C, _random(self.latents[index_C], place_C), place_C, value_C)
        if not self.part_places:  # parts of about equal size, going by the first chunk
            per_sequence = max(1.0, len(value_C) / max(codes.n_rows, 1)) * self.n_tokens
            self.part_places = max(1, int(_PART_CODES / per_sequence)) * self.n_tokens
        self._pending.append((place_C, index_C, value_C))
        self._n_pending += len(place_C)
        if self._n_pending >= _FLUSH_CODES:
            self.flush()

    def flush(self) -> None:
        """Write what is pending, a file for each part that it touches."""
        if not self._n_pending:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        place, index, value = (np.concatenate(column) for column in zip(*self._pending, strict=True))
        self._pending, self._n_pending = [], 0
        part = place // self.part_places
        nearby = part - part.min()  # 16-bit numbers are sorted by radix
        order = np.argsort(nearby.astype(np.uint16) if nearby.max() < 1 << 16 else nearby, kind="stable")
        parts, starts = np.unique(part[order], return_index=True)
        for number, chosen in zip(parts, np.split(order, starts[1:]), strict=True):
            local = (place[chosen] - number * self.part_places).astype(np.int32)
            table = pa.table({"place": local, "latent": index[chosen], "value": value[chosen]})
            folder = self.directory / str(number)
            folder.mkdir(exist_ok=True)
            pq.write_table(
                table, folder / f"{self._n_flushes}.parquet", compression="lz4", use_dictionary=False
            )
        self._n_flushes += 1

    def parts(self) -> list[int]:
        return sorted(int(folder.name) for folder in self.directory.iterdir())

    def read(self, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(place in the part, latent's index, activation) of all its activations."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        files = sorted((self.directory / str(part)).glob("*.parquet"))
        table = pa.concat_tables([pq.ParquetFile(file).read() for file in files])
        place, latent, value = (table[name].to_numpy() for name in ("place", "latent", "value"))
        return place, latent, value


class _Kept:
    """The k entries of highest priority of each latent; equal ones by place."""

    def __init__(self, n_latents: int, k: int) -> None:
        self.k = k
        self._floor = np.full(n_latents, -np.inf)  # the k-th priority, once there are k
        self.latent = np.zeros(0, np.int32)
        self.priority = np.zeros(0)
        self.place = np.zeros(0, np.int64)
        self.value = np.zeros(0, np.float32)
        self._pending: list[tuple[np.ndarray, ...]] = []
        self._n_pending = 0

    def add(self, latent: np.ndarray, priority: np.ndarray, place: np.ndarray, value: np.ndarray) -> None:
        keep = priority >= self._floor[latent]
        self._pending.append((latent[keep], priority[keep], place[keep], value[keep]))
        self._n_pending += int(keep.sum())
        if self._n_pending >= _PENDING:
            self.settle()

    def settle(self) -> None:
        """Drop what is not among the k; the columns are then ordered by latent and priority."""
        columns = zip((self.latent, self.priority, self.place, self.value), *self._pending, strict=True)
        latent, priority, place, value = (np.concatenate(parts) for parts in columns)
        self._pending, self._n_pending = [], 0
        order = np.lexsort((place, -priority, latent))
        latent = latent[order]
        rank = np.arange(len(latent)) - np.searchsorted(latent, latent)
        last = order[rank == self.k - 1]
        self._floor[latent[rank == self.k - 1]] = priority[last]
        kept = order[rank < self.k]
        self.latent, self.priority = latent[rank < self.k], priority[kept]
        self.place, self.value = place[kept], value[kept]


def _random(latent: np.ndarray, place: np.ndarray) -> np.ndarray:
    """float64 in [0, 1), by (latent, place): splitmix64's mixing (Steele et al. 2014, OOPSLA, fig. 15)."""
    with np.errstate(over="ignore"):
        x = place.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + latent.astype(np.uint64)
        x *= np.uint64(0xD1342543DE82EF95)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    mantissa: np.ndarray = (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return mantissa


# Snippets


def _assemble(pass_: _Pass, view: Any, n_rows: int) -> Snippets:
    """Choose the places and read what stands around them, part by part."""
    index, n_top, place, value = _choose(pass_)
    n_latents = len(pass_.latents)
    token_ids = np.full((len(place), WIDTH), -1, np.int32)
    values = np.zeros((len(place), WIDTH), np.float32)
    histogram = np.zeros((n_latents, BINS), np.int64)
    part_S = place // pass_.part_places if pass_.part_places else place
    for part in pass_.parts():
        place_C, latent_C, value_C = pass_.read(part)
        bin_C = np.minimum((value_C / pass_.largest[latent_C] * BINS).astype(np.int64), BINS - 1)
        histogram += np.bincount(
            latent_C.astype(np.int64) * BINS + bin_C, minlength=n_latents * BINS
        ).reshape(n_latents, BINS)
        here = np.flatnonzero(part_S == part)
        if len(here):
            local = place[here] - part * pass_.part_places
            values[here] = _around(pass_, place_C, latent_C, value_C, index[here], local)
            token_ids[here] = _tokens(view, place[here], pass_.n_tokens)
    return Snippets(
        n_rows=n_rows,
        latents=pass_.latents,
        fires=pass_.fires,
        sums=pass_.sums,
        largest=pass_.largest,
        histogram=histogram,
        starts=np.searchsorted(index, np.arange(n_latents + 1)),
        n_top=n_top,
        sequence=place // pass_.n_tokens,
        position=place % pass_.n_tokens,
        value=value,
        token_ids=token_ids,
        values=values,
    )


def _choose(pass_: _Pass) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(latent's index, how many of each latent are its largest, place, value) of what is shown, in order."""
    pass_.top.settle()
    pass_.sample.settle()
    n = len(pass_.latents)
    top_starts = np.searchsorted(pass_.top.latent, np.arange(n + 1))
    sample_starts = np.searchsorted(pass_.sample.latent, np.arange(n + 1))
    index: list[int] = []
    place: list[int] = []
    value: list[float] = []
    n_top = np.zeros(n, np.int64)
    for i in range(n):
        a, b = top_starts[i], top_starts[i + 1]
        ranked = list(zip(pass_.top.place[a:b].tolist(), pass_.top.value[a:b].tolist(), strict=True))
        shown = _spaced(ranked, pass_.n_tokens)
        n_top[i] = len(shown)
        taken = {where for where, _ in shown}
        a, b = sample_starts[i], sample_starts[i + 1]
        pool = zip(pass_.sample.place[a:b].tolist(), pass_.sample.value[a:b].tolist(), strict=True)
        shown += _spread(sorted((entry for entry in pool if entry[0] not in taken), key=_strongest_first))
        index += [i] * len(shown)
        place += [where for where, _ in shown]
        value += [strength for _, strength in shown]
    return np.array(index, np.int64), n_top, np.array(place, np.int64), np.array(value, np.float32)


def _strongest_first(entry: tuple[int, float]) -> tuple[float, int]:
    return -entry[1], entry[0]


def _spaced(ranked: list[tuple[int, float]], n_tokens: int) -> list[tuple[int, float]]:
    """The first TOP of them that are not close to one before them in the same sequence."""
    shown: list[tuple[int, float]] = []
    for place, value in ranked:
        near = any(q // n_tokens == place // n_tokens and abs(q - place) < NEAR for q, _ in shown)
        if not near:
            shown.append((place, value))
            if len(shown) == TOP:
                break
    return shown


def _spread(ranked: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """SAMPLED of them at even distances in the order of strength, or all if there are fewer."""
    n = len(ranked)
    if n <= SAMPLED:
        return ranked
    return [ranked[(2 * i + 1) * n // (2 * SAMPLED)] for i in range(SAMPLED)]


def _around(
    pass_: _Pass,
    place_C: np.ndarray,
    latent_C: np.ndarray,
    value_C: np.ndarray,
    index_S: np.ndarray,
    local_S: np.ndarray,
) -> np.ndarray:
    """Activations [S, W] of each snippet's latent around its place; places are those within the part."""
    key_C = latent_C.astype(np.int64) * pass_.part_places + place_C
    order = np.argsort(key_C)
    key_C, n_tokens = key_C[order], pass_.n_tokens
    first_S = np.maximum(local_S - BEFORE, local_S // n_tokens * n_tokens)
    last_S = np.minimum(local_S + AFTER, (local_S // n_tokens + 1) * n_tokens - 1)
    a_S = np.searchsorted(key_C, index_S * pass_.part_places + first_S)
    n_S = np.searchsorted(key_C, index_S * pass_.part_places + last_S, side="right") - a_S
    snippet = np.repeat(np.arange(len(index_S)), n_S)
    found = order[np.arange(len(snippet)) + np.repeat(a_S - np.cumsum(n_S) + n_S, n_S)]
    out_SW = np.zeros((len(index_S), WIDTH), np.float32)
    out_SW[snippet, place_C[found] - local_S[snippet] + BEFORE] = value_C[found]
    return out_SW


def _tokens(view: Any, place_S: np.ndarray, n_tokens: int) -> np.ndarray:
    """Token ids [S, W] around places; -1 outside the sequence."""
    sequence_S, position_S = place_S // n_tokens, place_S % n_tokens
    first = int(sequence_S.min())
    block = view.sequences(slice(first, int(sequence_S.max()) + 1))
    column_SW = position_S[:, None] + np.arange(-BEFORE, AFTER + 1)
    inside_SW = (column_SW >= 0) & (column_SW < np.asarray(block.length)[sequence_S - first][:, None])
    ids_ST = np.asarray(block.input_ids).astype(np.int32)  # stored without a sign, and -1 needs one
    ids_SW = ids_ST[(sequence_S - first)[:, None], np.clip(column_SW, 0, n_tokens - 1)]
    return np.where(inside_SW, ids_SW, np.int32(-1))
