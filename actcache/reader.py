"""Reading a dataset: any rows, which tokens they are, their statistics; `stream` serves them shuffled.

Needs neither torch nor ray. What is committed is learnt from one pinned manifest version, never
from `zarr.json`; every chunk is verified by its checksum.
Shapes: N rows, D = d_in, T = context_size.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    OBJECTS,
    STATISTICS,
    Manifest,
    ShardTable,
    read_manifest,
    read_segment_table,
    shard_tables,
    statistics_of,
)
from .order import DEFAULT_LANES
from .shard import decode_chunk, shard_key
from .spec import nearest
from .store import Store, open_store
from .stream import Rows, Stream

Index = slice | Sequence[int] | np.ndarray | int

_FETCH_THREADS = 4


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
        tables = [read_segment_table(self.store, s.objects, s.objects_sha256) for s in self.manifest.segments]
        return pa.concat_tables(tables) if tables else OBJECTS.empty_table()

    @cached_property
    def statistics(self) -> pa.Table:
        tables = [
            read_segment_table(self.store, s.statistics, s.statistics_sha256) for s in self.manifest.segments
        ]
        return pa.concat_tables(tables) if tables else STATISTICS.empty_table()

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
        counts = n_shards(self.manifest, self.split_name)
        present = {f"{self.split_name}/{path}": n for path, n in counts.items() if n}
        return shard_tables(self._shared.objects, self.split_name, present)

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
