"""Reading a dataset: any rows, which tokens they are, their statistics; `stream` serves them shuffled.

Needs neither torch nor ray. What is committed is learnt from one pinned manifest version, never
from `zarr.json`; every chunk is verified by its checksum.
Shapes: N rows, D = d_in, T = context_size.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from .cache import DEFAULT_CACHE_BYTES, Cache, CachedStore
from .chunks import ChunkReader, Request
from .corpus import kept_tokens
from .errors import SpecError
from .filters import Where
from .gathering import Gather
from .layout import site_rows
from .manifest import Manifest, read_manifest
from .opened import Opened
from .order import DEFAULT_LANES
from .packing import document_places, position_ids
from .segment_files import statistics_of
from .spec import nearest
from .statistics import merge
from .store import open_store
from .stream import Rows, Stream, StreamOptions
from .tables import Tables

Index = slice | Sequence[int] | np.ndarray | int
Places = slice | np.ndarray
"""Rows of a result or of a chunk."""

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
    position_ids: np.ndarray | None = None
    """int64 [n, T] where documents of one sequence are kept apart (packing `isolated`), else None."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Which document of the split each row is from."""

    document: np.ndarray
    """int64 [N]: number of the document in its split."""
    offset: np.ndarray
    """int64 [N]: the row's token in the document, from 0."""


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
    url: str,
    *,
    version: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> "Dataset":
    """The train split of the dataset at `url`, pinned to a manifest version (the newest by default).

    `storage_options` go to fsspec (`{"key": ..., "secret": ..., "endpoint_url": ...}` for S3) and are
    kept in memory only. Two requests; the chunk tables are read when first needed.

    With `cache_dir`, fetched chunks are kept in that local directory, up to `cache_bytes`, for every
    process of the node that names it; those used longest ago leave first.

    Raises:
        NotADataset: nothing committed there.
        FormatError, CorruptObject: the manifest is too new, hostile or damaged.
    """
    store = open_store(url, storage_options)
    if cache_dir is not None:
        store = CachedStore(store, Cache(cache_dir, cache_bytes))
    shared = Opened(store, read_manifest(store, version), storage_options)
    shared.reopen = {
        "url": store.url,
        "version": shared.manifest.version,
        "storage_options": storage_options,
        "cache_dir": cache_dir,
        "cache_bytes": cache_bytes,
    }
    return Dataset(shared, "train")


def _reopen(split: str, arguments: dict[str, Any]) -> "Dataset":
    return open_dataset(**arguments).split(split)


class Dataset:
    """One split of a committed dataset. Safe to read from many threads.

    A pickle of it holds its URL, version and storage options: another process opens it again.
    """

    def __init__(self, shared: Opened, split: str) -> None:
        self._shared, self.split_name = shared, split
        self._chunk = lru_cache(maxsize=64)(lambda path, chunk: self._chunks.read(path, chunk))

    def __repr__(self) -> str:
        return (
            f"<Dataset {self.url} [{self.split_name}]: {self.n_rows:,} rows, sites {', '.join(self.sites)}>"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.split_name, self._shared.reopen)

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

        "mean" and "variance" are float64 [D], "norm_percentiles" maps percent to norm, the rest are
        numbers: mean_norm, max_abs, n_rows, n_core, fvu_core and fvu_all (noise of storing over
        variance), fvu_median_channel (the same of the median channel; None if it was not recorded),
        max_error, rows_rescaled, stored_bytes, bits_per_value.
        """
        n_blocks = self.manifest.sites[self._checked(site)].n_blocks.get(self.split_name, 0)
        parts = statistics_of(self._shared.statistics, self.split_name, site, n_blocks)
        if not parts:
            raise SpecError(f"{self.url} holds no rows of {site} in split {self.split_name}")
        summary = merge([statistics for _, statistics in parts]).summary()
        tables = [t for path, t in self._tables.items() if path.startswith(f"{self.split_name}/{site}/")]
        stored = int(sum(t.size_bytes.sum() for t in tables))
        values = summary["n_rows"] * self.d_in(site)
        return summary | {"stored_bytes": stored, "bits_per_value": 8 * stored / values}

    def size_bytes(self) -> int:
        """Stored bytes of all the split's shards, row metadata and tokens included."""
        return int(sum(t.size_bytes.sum() for t in self._tables.values()))

    def read(self, site: str, index: Index) -> np.ndarray:
        """Decoded rows float32 [N, D], in the order asked for.

        Each chunk is fetched once, neighbours together, many of them concurrently.

        Raises:
            IndexError: a row past the committed ones.
            CorruptObject: a stored object is damaged or missing; names the key.
        """
        self._checked(site)
        rows = self._row_index(index, self._site_rows(site), f"{site}/codes")
        scale_N = self._gather(f"{site}/scale", rows) if self._shared.precision.quantised else None
        out_ND = np.empty((len(rows), self.d_in(site)), np.float32)

        def place(chunk: np.ndarray, here: Places, within: Places) -> None:
            scale = None if scale_N is None else scale_N[here]
            if isinstance(here, slice):
                self._shared.decode(site, chunk[within], scale, out_ND[here])
            else:
                out_ND[here] = self._shared.decode(site, chunk[within], scale)

        self._each_chunk(f"{site}/codes", rows, place)
        return out_ND

    def rows(self, index: Index) -> Rows:
        """Which token each row is."""
        rows = self._row_index(index, self.n_rows, "token_id")
        return Rows(*(self._gather(name, rows) for name in ("token_id", "sequence", "position")))

    def documents(self, index: Index) -> Documents:
        """Which document of the split, and which token of it, each row is."""
        rows = self._row_index(index, self.n_rows, "token_id")
        return self.documents_at(self._gather("sequence", rows), self._gather("position", rows))

    def documents_at(self, sequence_N: np.ndarray, position_N: np.ndarray) -> Documents:
        """As `documents`, of tokens by their sequence and position; they need not be rows."""
        sequence, index_N = np.unique(sequence_N, return_inverse=True)
        names = ("document", "document_offset", "document_begins")
        document_S, offset_S, begins_ST = (self._gather(n, sequence.astype(np.int64)) for n in names)
        tokens = self.manifest.identity["tokens"]
        return Documents(*document_places(index_N, position_N, document_S, offset_S, begins_ST, tokens))

    def sources(self, documents: Sequence[int] | np.ndarray) -> list[tuple[str, int]]:
        """File (below the corpus's folder) and record in it, from 0, of documents of this split.

        They are in the token store, which must lie beside the dataset as the harvest left it.

        Raises:
            NotADataset: no token store there.
        """
        tokens = self._shared.tokens
        return [tokens.source(self.split_name, int(document)) for document in documents]

    def context(self, sequence: int) -> np.ndarray:
        """Input ids of one sequence, without padding."""
        found = self.sequences([sequence])
        return found.input_ids[0, : found.length[0]]

    def sequences(self, index: Index) -> Sequences:
        """Token sequences, and which of their tokens are rows."""
        chosen = self._row_index(index, self.n_sequences, "input_ids")
        input_ids = self._gather("input_ids", chosen)
        length = self._gather("length", chosen)
        special = self.manifest.identity["tokens"]["special_token_ids"]
        kept = kept_tokens(input_ids, length, special)
        if self.manifest.identity["tokens"]["packing"] != "isolated":
            return Sequences(input_ids, length, kept)
        return Sequences(input_ids, length, kept, position_ids(self._gather("document_begins", chosen)))

    def sequence_activations(self, site: str, sequence: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of one sequence in the order of its tokens: float32 [n, D], and their positions int64 [n].

        Special tokens and padding are no rows, nor is what lies past the last committed block. The rows
        are looked for where the sequence's block and its neighbours are: rows are shuffled in blocks.
        """
        self._checked(site)
        rows = self._rows_of_sequence(int(self._row_index([sequence], self.n_sequences, "input_ids")[0]))
        rows = rows[rows < self._site_rows(site)]
        position_N = self._gather("position", rows).astype(np.int64)
        order = np.argsort(position_N)
        return self.read(site, rows[order]), position_N[order]

    def _rows_of_sequence(self, sequence: int) -> np.ndarray:
        """Which rows a sequence has, ascending."""
        n_sequences_K = self._shared.sequence_ends(self.split_name)
        first = int(np.searchsorted(n_sequences_K, sequence, side="right"))
        goes_on = first + 1 < len(n_sequences_K) and n_sequences_K[first] == sequence + 1
        block_rows = self.manifest.identity["block_rows"]
        rows = np.arange(
            first * block_rows, min((first + (2 if goes_on else 1)) * block_rows, self.n_rows), dtype=np.int64
        )
        return rows[self._gather("sequence", rows) == sequence]

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
        split: str | None = None,
        lanes: int = DEFAULT_LANES,
        window: int | None = None,
        prefetch_bytes: int | None = None,
        metadata: bool = True,
        where: Where | None = None,
        drop_last: bool = False,
        dtype: Any = "float32",
        device: Any = None,
        centre: bool = False,
        unit_norm: bool = False,
        rotated: bool = False,
        gather: Gather | None = None,
    ) -> "Stream":
        """Shuffled batches of aligned sites, each row exactly once an epoch over all ranks.

        Args:
            sites: which sites; all by default.
            batch_size: rows of the global batch; a rank serves its share of them.
            seed: of the order; with the manifest version, split, lanes and window it fixes the order.
            epochs: passes over the split, each in another order.
            rank, world_size: serves the global rows of the lanes l with l % world_size == rank. Any world_size from
                1 to `lanes`; where it does not divide `lanes`, shares of a batch differ by about one lane's part.
            state: of `Stream.state()`, from any rank and world size: continue after that batch.
            split: another split than this one.
            lanes, window: see docs/format.md, "Reading order".
            prefetch_bytes: the most memory for what is read ahead. At least a window of each lane of the rank:
                ceil(lanes / world_size) * window chunks of each site; by default twice that, a next window each.
            metadata: also fetch token_id, sequence and position.
            where: serve only the rows that meet these conditions; batches shrink and are not refilled.
            drop_last: leave out the short batch that ends an epoch.
            dtype: "float32", "float16" or "bfloat16" (torch only).
            device: None for numpy, else a torch device, to which codes are copied and decoded there.
            centre: subtract the site's mean, from the statistics of `train`.
            unit_norm: divide by the site's mean norm; of centred rows, by their root mean square norm.
            rotated: of a dataset stored as `rotated:<x>`: rows in the coordinates of their principal components,
                without the product that brings them back; `stream.rotation(site)` does: rows @ rotation.
            gather: how this rank exchanges rows with others (`actcache.gathering.Gather`); it then serves the rows of
                all of them, in the order of a single reader.

        Raises:
            SpecError: unknown site, bad sizes, or a state of another dataset or order.
        """
        dataset = self if split is None else self.split(split)
        options = StreamOptions(
            batch_size=batch_size,
            seed=seed,
            epochs=epochs,
            rank=rank,
            world_size=world_size,
            lanes=lanes,
            window=window,
            prefetch_bytes=prefetch_bytes,
            metadata=metadata,
            where=where,
            drop_last=drop_last,
            dtype=dtype,
            device=device,
            centre=centre,
            unit_norm=unit_norm,
            rotated=rotated,
            gather=gather,
        )
        return Stream(dataset, dataset._chosen(sites), options, state)

    def _chosen(self, sites: Sequence[str] | str | None) -> list[str]:
        """The sites meant: all by default."""
        return [self._checked(site) for site in ([sites] if isinstance(sites, str) else sites or self.sites)]

    def _checked(self, site: str) -> str:
        if site not in self.manifest.sites:
            hint = nearest(site, self.sites)
            raise SpecError(f"no site {site!r} in {self.url}{hint}; it has {', '.join(self.sites)}")
        return site

    def _site_rows(self, site: str) -> int:
        """Committed rows of a site, all of whose shards are listed."""
        self._listed(f"{site}/codes")
        return site_rows(self.manifest, self.split_name, site)

    @property
    def _layout(self) -> dict[str, dict[str, Any]]:
        return self._shared.layout

    @property
    def _tables(self) -> Tables:
        return self._shared.tables(self.split_name)

    def _listed(self, path: str) -> None:
        """See that all committed shards of an array are listed: nothing is allocated by a manifest's word alone.

        Raises:
            FormatError: they are not.
        """
        if f"{self.split_name}/{path}" in self._tables:
            _ = self._tables[f"{self.split_name}/{path}"]

    @cached_property
    def _chunks(self) -> ChunkReader:
        return ChunkReader(self._shared.store, self.split_name, self._layout, self._tables)

    def _row_index(self, index: Index, n: int, path: str) -> np.ndarray:
        """Which of the `n` rows of an array are meant."""
        self._listed(path)
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
        """Rows of an array, in any order."""
        array = self._layout[path]
        out = np.empty((len(rows), *array["row"]), array["dtype"])

        def place(chunk: np.ndarray, here: Places, within: Places) -> None:
            out[here] = chunk[within]

        self._each_chunk(path, rows, place)
        return out

    def _each_chunk(
        self, path: str, rows: np.ndarray, work: Callable[[np.ndarray, Places, Places], None]
    ) -> None:
        """Call `work(chunk, here, within)` for each chunk that holds rows: `rows[here]` are its rows `within`.

        Each chunk is fetched once, many of them in threads.
        """
        self._shared.check_process()
        places = _places(rows, self._layout[path]["chunk_rows"])
        if len(places) <= 2:  # a few rows, and often the same chunk again
            for chunk, (here, within) in places.items():
                work(self._chunk(path, chunk), here, within)
            return

        def run(request: Request) -> None:
            for chunk, values in enumerate(self._chunks.fetch(request), request.first):
                work(values, *places[chunk])

        with ThreadPoolExecutor(_FETCH_THREADS) as pool:
            list(pool.map(run, self._chunks.requests(path, list(places))))


def _places(rows: np.ndarray, chunk_rows: int) -> dict[int, tuple[Places, Places]]:
    """By chunk, ascending: which of `rows` it holds, and which of its own rows these are."""
    if not len(rows):
        return {}
    if (np.diff(rows) == 1).all():
        first, last = int(rows[0]), int(rows[-1]) + 1
        out: dict[int, tuple[Places, Places]] = {}
        for chunk in range(first // chunk_rows, -(-last // chunk_rows)):
            start, stop = max(first, chunk * chunk_rows), min(last, (chunk + 1) * chunk_rows)
            within = slice(start - chunk * chunk_rows, stop - chunk * chunk_rows)
            out[chunk] = slice(start - first, stop - first), within
        return out
    chunk_N = rows // chunk_rows
    order = np.argsort(chunk_N, kind="stable")
    chunks, starts = np.unique(chunk_N[order], return_index=True)
    parts = np.split(order, starts[1:])
    return {int(c): (here, rows[here] - c * chunk_rows) for c, here in zip(chunks, parts, strict=True)}
