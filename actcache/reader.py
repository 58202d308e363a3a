"""Reading a dataset: random access to rows, and shuffled streams with an exact cursor.

Needs neither torch nor ray. What is committed is learnt from one pinned manifest version, never
from `zarr.json`; every chunk is verified by its checksum. The order of a stream is
`actcache.order.Order`.
Shapes: N rows, D = d_in, T = context_size, L lanes, C = chunk_rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from .codec import Precision, decode, merge
from .corpus import kept_tokens
from .errors import CorruptObject, SpecError
from .layout import array_layout, calibration_key, n_shards, parse_calibration, site_rows
from .manifest import (
    Manifest,
    ShardTable,
    read_manifest,
    read_segment_table,
    shard_tables,
    statistics_of,
)
from .order import DEFAULT_LANES, Order, Span, default_window
from .shard import decode_chunk, shard_key
from .spec import nearest
from .store import Store, open_store

Index = slice | Sequence[int] | np.ndarray | int

_FETCH_THREADS = 4
_PREFETCH_THREADS = 2


@dataclass(frozen=True, eq=False)
class Rows:
    """Which token each row is: integer arrays [N]."""

    token_id: np.ndarray
    sequence: np.ndarray
    position: np.ndarray


@dataclass(frozen=True, eq=False)
class Sequences:
    """Token sequences of a split."""

    input_ids: np.ndarray
    """[n, T], padded past `length`."""
    length: np.ndarray
    """[n]."""
    kept: np.ndarray
    """bool [n, T]: the tokens that are rows (no BOS, EOS, padding, special token)."""


class DatasetSpec(Mapping[str, Any]):
    """The identity of a dataset: a read-only mapping, with the usual fields as attributes."""

    def __init__(self, identity: Mapping[str, Any], source: str) -> None:
        self._identity = identity
        self.corpus = source

    def __getitem__(self, key: str) -> Any:
        return self._identity[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._identity)

    def __len__(self) -> int:
        return len(self._identity)

    @property
    def model(self) -> str:
        """Hub id, `bundled:NAME` or the name of a local directory."""
        return str(self._identity["model"]["id"])

    @property
    def model_revision(self) -> str:
        """Commit hash, or `sha256:...` over a local directory's files."""
        return str(self._identity["model"]["revision"])

    @property
    def context_size(self) -> int:
        return int(self._identity["tokens"]["context_size"])

    @property
    def precision(self) -> str:
        return str(self._identity["precision"])

    @property
    def prepend_bos(self) -> bool:
        return self._identity["tokens"]["bos_token_id"] is not None


def open_dataset(
    url: str, *, version: int | None = None, storage_options: Mapping[str, Any] | None = None
) -> "Dataset":
    """The train split of the dataset at `url`, pinned to a manifest version (the newest by default).

    `storage_options` go to fsspec (`{"key": ..., "secret": ..., "endpoint_url": ...}` for S3) and are
    kept in memory only. Two requests; the chunk tables are read when first needed.

    Raises:
        NotADataset: nothing committed there.
        FormatError, CorruptObject: the manifest is too new, hostile or damaged.
    """
    store = open_store(url, storage_options)
    return Dataset(_Shared(store, read_manifest(store, version)), "train")


class _Shared:
    """What the splits of one opened dataset have in common."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store, self.manifest = store, manifest
        self.precision = Precision.parse(manifest.identity["precision"])
        self.offset = lru_cache(maxsize=None)(self._offset)

    @cached_property
    def objects(self) -> pa.Table:
        return pa.concat_tables(
            read_segment_table(self.store, s.objects, s.objects_sha256) for s in self.manifest.segments
        )

    @cached_property
    def statistics(self) -> pa.Table:
        return pa.concat_tables(
            read_segment_table(self.store, s.statistics, s.statistics_sha256) for s in self.manifest.segments
        )

    def _offset(self, site: str) -> np.ndarray | None:
        if not self.precision.quantised:
            return None
        key = calibration_key(site)
        try:
            data = self.store.read(key)
        except FileNotFoundError:
            raise CorruptObject(f"{self.store.url}/{key} is missing although it was committed") from None
        sha256 = self.manifest.sites[site].calibration_sha256
        return parse_calibration(data, f"{self.store.url}/{key}", sha256).offset_D


class Dataset:
    """One split of a committed dataset. Safe to read from many threads."""

    def __init__(self, shared: _Shared, split: str) -> None:
        self._shared, self.split_name = shared, split
        self._chunk = lru_cache(maxsize=64)(self._read_chunk)

    def __repr__(self) -> str:
        return (
            f"<Dataset {self.url} [{self.split_name}]: {self.n_rows:,} rows, sites {', '.join(self.sites)}>"
        )

    @property
    def url(self) -> str:
        return self._shared.store.url

    @property
    def id(self) -> str:
        """sha256 of the identity, 64 hex digits."""
        return self.manifest.id

    @property
    def manifest(self) -> Manifest:
        """The pinned manifest version."""
        return self._shared.manifest

    @property
    def spec(self) -> DatasetSpec:
        return DatasetSpec(self.manifest.identity, self.manifest.source)

    @property
    def sites(self) -> list[str]:
        return sorted(self.manifest.sites)

    @property
    def n_rows(self) -> int:
        """Committed rows of the split."""
        return int(self._size["n_rows"])

    @property
    def n_sequences(self) -> int:
        """Sequences that the committed rows come from."""
        return int(self._size["n_sequences"])

    @property
    def splits(self) -> list[str]:
        """Splits that hold rows."""
        return [s for s, size in self.manifest.splits.items() if size["n_rows"]]

    @property
    def _size(self) -> Mapping[str, int]:
        return self.manifest.splits[self.split_name]

    def split(self, name: str) -> "Dataset":
        """The same surface over another split ("train", "validation" or "test")."""
        if name not in self.manifest.splits:
            raise SpecError(f"no split {name!r} in {self.url}; it has {', '.join(self.manifest.splits)}")
        return Dataset(self._shared, name)

    def d_in(self, site: str) -> int:
        """Width of a site's rows."""
        return self.manifest.sites[self._checked(site)].d_in

    def stats(self, site: str) -> dict[str, Any]:
        """Statistics of a site's rows in this split; docs/format.md, "Statistics".

        "mean" and "variance" are float64 [D], the rest numbers: mean_norm, max_abs, n_rows, n_core,
        fvu_core and fvu_all (noise of storing over variance), max_error, rows_rescaled, stored_bytes,
        bits_per_value.
        """
        n_blocks = self.manifest.sites[self._checked(site)].n_blocks.get(self.split_name, 0)
        parts = statistics_of(self._shared.statistics, self.split_name, site, n_blocks)
        if not parts:
            raise SpecError(f"{self.url} holds no rows of {site} in split {self.split_name}")
        summary = merge(parts).summary()
        tables = [t for path, t in self._tables.items() if path.startswith(f"{self.split_name}/{site}/")]
        stored = int(sum(t.size_bytes.sum() for t in tables))
        values = summary["n_rows"] * self.d_in(site)
        return summary | {"stored_bytes": stored, "bits_per_value": 8 * stored / values}

    def size_bytes(self) -> int:
        """Stored bytes of all the split's shards, row metadata and tokens included."""
        return int(sum(t.size_bytes.sum() for t in self._tables.values()))

    def read(self, site: str, index: Index) -> np.ndarray:
        """Decoded rows float32 [N, D], in the order asked for; each chunk is fetched once, concurrently.

        Raises:
            IndexError: a row past the committed ones.
            CorruptObject: a stored object is damaged or missing; names the key.
        """
        self._checked(site)
        rows = self._row_index(index, self._site_rows(site))
        codes_ND = self._gather(f"{site}/codes", rows)
        scale_N = self._gather(f"{site}/scale", rows) if self._shared.precision.quantised else None
        return decode(codes_ND, scale_N, self._shared.offset(site), self._shared.precision)

    def rows(self, index: Index) -> Rows:
        """Which token each row is."""
        rows = self._row_index(index, self.n_rows)
        return Rows(*(self._gather(name, rows) for name in ("token_id", "sequence", "position")))

    def context(self, sequence: int) -> np.ndarray:
        """Input ids of one sequence, without padding."""
        found = self.sequences([sequence])
        return found.input_ids[0, : found.length[0]]

    def sequences(self, index: Index) -> Sequences:
        """Token sequences, and which of their tokens are rows."""
        chosen = self._row_index(index, self.n_sequences)
        input_ids = self._gather("input_ids", chosen)
        length = self._gather("length", chosen)
        special = self.manifest.identity["tokens"]["special_token_ids"]
        return Sequences(input_ids, length, kept_tokens(input_ids, length, special))

    def stream(
        self,
        sites: Sequence[str] | str | None = None,
        *,
        batch_size: int = 4096,
        seed: int = 0,
        epochs: int = 1,
        rank: int = 0,
        world_size: int = 1,
        state: Mapping[str, Any] | None = None,
        lanes: int = DEFAULT_LANES,
        window: int | None = None,
        metadata: bool = True,
    ) -> "Stream":
        """Shuffled batches of aligned sites, each row exactly once an epoch over all ranks.

        Args:
            sites: which sites; all by default.
            batch_size: rows of the global batch; a rank serves its share of them.
            seed: of the order; with the manifest version, split, lanes and window it fixes the order.
            epochs: passes over the split, each in another order.
            rank, world_size: serves global rows g with g % world_size == rank; world_size divides `lanes`.
            state: of `Stream.state()`, from any rank and world size: continue after that batch.
            lanes, window: see docs/format.md, "Reading order"; memory is lanes * window chunks a site.
            metadata: also fetch token_id, sequence and position.

        Raises:
            SpecError: unknown site, bad sizes, or a state of another dataset or order.
        """
        chosen = [sites] if isinstance(sites, str) else list(sites or self.sites)
        for site in chosen:
            self._checked(site)
        return Stream(
            self, chosen, batch_size, seed, epochs, rank, world_size, state, lanes, window, metadata
        )

    def _checked(self, site: str) -> str:
        if site not in self.manifest.sites:
            hint = nearest(site, self.sites)
            raise SpecError(f"no site {site!r} in {self.url}{hint}; it has {', '.join(self.sites)}")
        return site

    def _site_rows(self, site: str) -> int:
        return site_rows(self.manifest, self.split_name, site)

    @cached_property
    def _layout(self) -> dict[str, dict[str, Any]]:
        return array_layout(self.manifest.identity, {s: e.d_in for s, e in self.manifest.sites.items()})

    @cached_property
    def _tables(self) -> dict[str, ShardTable]:
        counts = {f"{self.split_name}/{p}": n_shards(self.manifest, self.split_name, p) for p in self._layout}
        return shard_tables(self._shared.objects, self.split_name, {p: n for p, n in counts.items() if n})

    def _row_index(self, index: Index, n: int) -> np.ndarray:
        if isinstance(index, slice):
            return np.arange(*index.indices(n))
        rows = np.atleast_1d(np.asarray(index))
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        rows = rows.astype(np.int64)
        if len(rows) and not (-n <= rows.min() and rows.max() < n):
            raise IndexError(
                f"index {rows.min()}..{rows.max()} is out of range; {self.url} [{self.split_name}] has {n}"
            )
        return np.where(rows < 0, rows + n, rows)

    def _gather(self, path: str, rows: np.ndarray) -> np.ndarray:
        """Rows of an array, any order; every chunk read once."""
        array = self._layout[path]
        out = np.empty((len(rows), *array["row"]), array["dtype"])
        chunk_N = rows // array["chunk_rows"]
        chunks = np.unique(chunk_N)

        def fill(chunk: int) -> None:
            here = np.flatnonzero(chunk_N == chunk)
            out[here] = self._chunk(path, int(chunk))[rows[here] - chunk * array["chunk_rows"]]

        if len(chunks) > 2:
            with ThreadPoolExecutor(_FETCH_THREADS) as pool:
                list(pool.map(fill, chunks))
        else:
            for chunk in chunks:
                fill(chunk)
        return out

    def _read_chunk(self, path: str, chunk: int) -> np.ndarray:
        """One chunk of an array, decoded from its codec chain, checksum verified; not to be written to."""
        array = self._layout[path]
        table = self._tables[f"{self.split_name}/{path}"]
        shard, inner = divmod(chunk, array["shard_rows"] // array["chunk_rows"])
        shape = (array["chunk_rows"], *array["row"])
        if not np.isnan(table.constant[shard]):
            return np.full(shape, table.constant[shard], array["dtype"])
        start, size = int(table.chunk_offset[shard, inner]), int(table.chunk_nbytes[shard, inner])
        key = shard_key(table.path, shard, len(shape))
        where = f"{self.url}/{key}"
        try:
            payload = self._shared.store.read(key, start, start + size)
        except FileNotFoundError:
            raise CorruptObject(
                f"{where} is missing although it was committed; restore it or harvest again"
            ) from None
        if len(payload) != size:
            raise CorruptObject(
                f"{where} holds {start + len(payload)} bytes, wanted {start + size} or more; it is truncated"
            )
        checksum = int(table.chunk_crc32c[shard, inner])
        out = decode_chunk(payload, shape, array["dtype"], where, checksum)
        out.flags.writeable = False
        return out


@dataclass(frozen=True, eq=False)
class Batch(Mapping[str, np.ndarray]):
    """Rows of aligned sites: `batch[site]` is float32 [n, D]; `len(batch)` is n."""

    acts: Mapping[str, np.ndarray]
    _rows: Rows | None

    def __getitem__(self, site: str) -> np.ndarray:
        return self.acts[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.acts)

    def __len__(self) -> int:
        """Rows, not sites."""
        return len(next(iter(self.acts.values())))

    @property
    def token_id(self) -> np.ndarray:
        return self._metadata.token_id

    @property
    def sequence(self) -> np.ndarray:
        return self._metadata.sequence

    @property
    def position(self) -> np.ndarray:
        return self._metadata.position

    @property
    def _metadata(self) -> Rows:
        if self._rows is None:
            raise SpecError("this stream was opened with metadata=False; open it with metadata=True")
        return self._rows


@dataclass
class _Lane:
    """Where one lane stands: its current window in the pool and the next one on its way."""

    number: int
    windows: list[list[Span]]
    next_window: int
    start: int
    """Lane position of the current window's first row."""
    stop: int
    coming: Future[dict[str, np.ndarray]] | None


class Stream:
    """An iterator of batches. `state()` between any two batches resumes exactly there.

    Two background threads read ahead, one window a lane; an error there reaches the consumer at
    the batch that needs the data. `close()`, exhaustion or garbage collection ends them.
    """

    def __init__(
        self,
        dataset: Dataset,
        sites: list[str],
        batch_size: int,
        seed: int,
        epochs: int,
        rank: int,
        world_size: int,
        state: Mapping[str, Any] | None,
        lanes: int,
        window: int | None,
        metadata: bool,
    ) -> None:
        identity = dataset.manifest.identity
        if batch_size < 1 or epochs < 1:
            raise SpecError(f"batch_size is {batch_size} and epochs {epochs}; both must be at least 1")
        if lanes < 1 or world_size < 1 or lanes % world_size or not 0 <= rank < world_size:
            raise SpecError(
                f"rank {rank} of world_size {world_size} with {lanes} lanes: world_size must divide lanes, "
                "and rank lie below it"
            )
        self.dataset, self.sites, self.batch_size, self.epochs = dataset, sites, batch_size, epochs
        self.rank, self.world_size, self.metadata = rank, world_size, metadata
        self.seed, self.lanes = seed, lanes
        self.n_rows = min(dataset._site_rows(site) for site in sites)
        if not self.n_rows:
            raise SpecError(
                f"{dataset.url} holds no rows of {', '.join(sites)} in split {dataset.split_name}"
            )
        self.window = window or default_window(
            batch_size, lanes, identity["tokens"]["context_size"], identity["block_rows"]
        )
        self._chunk_rows = identity["chunk_rows"]
        self._epoch, self._row = 0, 0
        if state is not None:
            self.restore(state)
        self._names = [f"{site}/codes" for site in sites]
        if dataset._shared.precision.quantised:
            self._names += [f"{site}/scale" for site in sites]
        if metadata:
            self._names += ["token_id", "sequence", "position"]
        self._pool: ThreadPoolExecutor | None = None

    @property
    def dataset_url(self) -> str:
        return self.dataset.url

    def stats(self, site: str) -> dict[str, Any]:
        """As `Dataset.stats`."""
        return self.dataset.stats(site)

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON: the order's parameters and the next global row."""
        return {**self._order_id(), "epoch": self._epoch, "row": self._row}

    def __len__(self) -> int:
        """Batches in all epochs."""
        return self.epochs * -(-self.n_rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from where the stream stands to the end of the last epoch."""
        while self._epoch < self.epochs:
            order = Order(self.n_rows, self._chunk_rows, self.seed, self._epoch, self.lanes, self.window)
            with ThreadPoolExecutor(_PREFETCH_THREADS, thread_name_prefix="actcache-read") as pool:
                self._pool = pool
                try:
                    reader = _EpochReader(self, order, pool, self._row // self.lanes)
                    while self._row < self.n_rows:
                        stop = min(self._row + self.batch_size, self.n_rows)
                        batch = reader.take(self._row, stop)
                        self._advance(stop)
                        yield batch
                        if self._row == 0:
                            break
                finally:
                    pool.shutdown(cancel_futures=True)
                    self._pool = None

    def _advance(self, row: int) -> None:
        self._row = row
        if row == self.n_rows:
            self._epoch, self._row = self._epoch + 1, 0

    def _order_id(self) -> dict[str, Any]:
        return {
            "format": 1,
            "dataset": self.dataset.id,
            "version": self.dataset.manifest.version,
            "split": self.dataset.split_name,
            "n_rows": self.n_rows,
            "seed": self.seed,
            "lanes": self.lanes,
            "window": self.window,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` says; O(1). Call it between iterations, not during one.

        Raises:
            SpecError: the state is of another dataset version or order.
        """
        for name, ours in self._order_id().items():
            if state.get(name) != ours:
                raise SpecError(
                    f"the stream state has {name} {state.get(name)!r}, this stream {ours!r}; "
                    "open the same dataset version with the same seed, lanes and window to resume"
                )
        epoch, row = state.get("epoch"), state.get("row")
        if not (isinstance(epoch, int) and isinstance(row, int) and epoch >= 0 and 0 <= row < self.n_rows):
            raise SpecError(
                f"the stream state stands at epoch {epoch!r}, row {row!r}; wanted a row below {self.n_rows}"
            )
        self._epoch, self._row = epoch, row


class _EpochReader:
    """The windows of one epoch's lanes: codes and metadata of the current window of each, in one pool."""

    def __init__(self, stream: Stream, order: Order, pool: ThreadPoolExecutor, position: int) -> None:
        self.stream, self.order, self.pool = stream, order, pool
        layout = stream.dataset._layout
        numbers = range(stream.rank, stream.lanes, stream.world_size)
        self.rows_per_lane = order.window * order.chunk_rows
        shape = (len(numbers), self.rows_per_lane)
        self.data = {
            name: np.empty((*shape, *layout[name]["row"]), layout[name]["dtype"]) for name in stream._names
        }
        self.permutation_LP = np.zeros(shape, np.int64)
        self.lanes = [self._lane_at(slot, number, position) for slot, number in enumerate(numbers)]
        for slot in range(len(self.lanes)):
            self._next_window(slot)

    def take(self, begin: int, end: int) -> Batch:
        """This rank's rows among global rows [begin, end)."""
        n_lanes = self.stream.lanes
        first, last = begin // n_lanes, -(-end // n_lanes)
        parts: list[dict[str, np.ndarray]] = []
        position = first
        while position < last:
            for slot, lane in enumerate(self.lanes):
                if position >= lane.stop and lane.next_window < len(lane.windows):
                    self._next_window(slot)
            stop = min([last, *(lane.stop for lane in self.lanes if lane.stop > position)])
            parts.append(self._gather(position, stop, begin, end))
            position = stop
        joined = (
            {name: np.concatenate([p[name] for p in parts]) for name in self.data}
            if len(parts) > 1
            else parts[0]
        )
        return self._decode(joined)

    def _gather(self, position: int, stop: int, begin: int, end: int) -> dict[str, np.ndarray]:
        """Lane positions [position, stop) of every lane, cut to the global rows [begin, end)."""
        starts_L = np.array([lane.start for lane in self.lanes])
        numbers_L = np.array([lane.number for lane in self.lanes])
        within_PL = np.arange(position, stop)[:, None] - starts_L
        np.clip(within_PL, 0, self.rows_per_lane - 1, out=within_PL)  # lanes that have ended are cut below
        slot_L = np.arange(len(self.lanes))
        index = (self.permutation_LP[slot_L, within_PL] + slot_L * self.rows_per_lane).ravel()
        row = (np.arange(position, stop)[:, None] * self.stream.lanes + numbers_L).ravel()
        if row[0] < begin or row[-1] >= end:
            index = index[(row >= begin) & (row < end)]
        return {
            name: pool.reshape(-1, *pool.shape[2:]).take(index, axis=0) for name, pool in self.data.items()
        }

    def _decode(self, parts: dict[str, np.ndarray]) -> Batch:
        shared = self.stream.dataset._shared
        acts = {
            site: decode(
                parts[f"{site}/codes"], parts.get(f"{site}/scale"), shared.offset(site), shared.precision
            )
            for site in self.stream.sites
        }
        rows = Rows(parts["token_id"], parts["sequence"], parts["position"]) if self.stream.metadata else None
        return Batch(acts, rows)

    def _lane_at(self, slot: int, number: int, position: int) -> _Lane:
        """The lane just before the window that holds lane position `position`."""
        windows = self.order.lane_windows(number)
        start, window = 0, 0
        while window < len(windows) and position >= start + _length(windows[window]):
            start += _length(windows[window])
            window += 1
        lane = _Lane(number, windows, window, start, start, None)
        if window < len(windows):
            lane.coming = self.pool.submit(self._load, windows[window])
        return lane

    def _next_window(self, slot: int) -> None:
        """Put the lane's next window into the pool and send for the one after it."""
        lane = self.lanes[slot]
        if lane.coming is None:
            return
        loaded = lane.coming.result()
        lane.start, window = lane.stop, lane.next_window
        lane.stop += _length(lane.windows[window])
        n = lane.stop - lane.start
        for name, values in loaded.items():
            self.data[name][slot, :n] = values
        self.permutation_LP[slot, :n] = self.order.window_permutation(lane.number, window, n)
        lane.next_window += 1
        more = lane.next_window < len(lane.windows)
        lane.coming = self.pool.submit(self._load, lane.windows[lane.next_window]) if more else None

    def _load(self, spans: list[Span]) -> dict[str, np.ndarray]:
        read = self.stream.dataset._read_chunk
        return {
            name: np.concatenate([read(name, span.chunk)[span.start : span.stop] for span in spans])
            for name in self.data
        }


def _length(spans: list[Span]) -> int:
    return sum(span.stop - span.start for span in spans)
