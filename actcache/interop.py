"""Datasets as other libraries want them: Arrow, Ray Data, Hugging Face datasets, numpy files.

Every function reads through the ordinary `Dataset`; libraries are imported when their function is
called. What needs torch classes is in `torch_data.py`, copies of whole datasets in `hub.py`.
Examples: docs/reading.md.
Shapes: N rows, D = d_in.
"""

import contextlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from .errors import Conflict, SpecError
from .reader import Dataset

if TYPE_CHECKING:
    import datasets
    import ray.data

_BY_ROW = ("token_id", "sequence", "position")
_BATCH_BYTES = 32 * 2**20


def arrow_schema(dataset: Dataset, sites: Sequence[str] | str | None = None) -> pa.Schema:
    """Columns of `to_batches`: token_id, sequence and position, then each site as fixed-size list of float32.

    The schema's metadata name the dataset, its manifest version and the split.
    """
    fields = [pa.field(name, pa.from_numpy_dtype(dataset._layout[name]["dtype"])) for name in _BY_ROW]
    fields += [pa.field(site, pa.list_(pa.float32(), dataset.d_in(site))) for site in _chosen(dataset, sites)]
    about = {
        "actcache.id": dataset.id,
        "actcache.version": str(dataset.manifest.version),
        "actcache.split": dataset.split_name,
    }
    return pa.schema(fields, metadata=about)


def to_batches(
    dataset: Dataset,
    sites: Sequence[str] | str | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
    batch_rows: int | None = None,
) -> Iterator[pa.RecordBatch]:
    """Rows [start, stop) of the split in stored order, as Arrow record batches.

    `batch_rows` is by default the number of whole chunks that fit 32 MiB. Stored rows are shuffled
    within blocks already; for a full shuffle use `Dataset.stream`.
    """
    chosen = _chosen(dataset, sites)
    schema = arrow_schema(dataset, chosen)
    stop = _site_rows(dataset, chosen) if stop is None else min(stop, _site_rows(dataset, chosen))
    batch_rows = batch_rows or _batch_rows(dataset, chosen)
    for begin in range(start, stop, batch_rows):
        index = slice(begin, min(begin + batch_rows, stop))
        rows = dataset.rows(index)
        columns: list[pa.Array] = [pa.array(getattr(rows, name)) for name in _BY_ROW]
        for site in chosen:
            acts_ND = dataset.read(site, index)
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(acts_ND.reshape(-1)), acts_ND.shape[1]))
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def record_batch_reader(
    dataset: Dataset, sites: Sequence[str] | str | None = None, **options: Any
) -> pa.RecordBatchReader:
    """`to_batches` as a RecordBatchReader, which DuckDB, Polars, Lance and others consume."""
    return pa.RecordBatchReader.from_batches(
        arrow_schema(dataset, sites), to_batches(dataset, sites, **options)
    )


def ray_datasource(dataset: Dataset, sites: Sequence[str] | str | None = None) -> "ray.data.Datasource":
    """A source for `ray.data.read_datasource`: each task reads a run of chunks, in stored order.

    Workers open the dataset again by URL, so they need access to it. Ray carries its storage options in
    the task; where these are secrets, give workers credentials of their own instead.
    """
    try:
        from ray.data import Datasource
        from ray.data.block import BlockMetadata
        from ray.data.datasource import ReadTask
    except ImportError as err:
        raise SpecError(f"ray_datasource needs Ray Data ({err}); pip install 'ray[data]'") from err

    chosen = _chosen(dataset, sites)
    n_rows, row_bytes = _site_rows(dataset, chosen), _row_bytes(dataset, chosen)

    class ActivationDatasource(Datasource):
        def get_name(self) -> str:
            return "actcache"

        def estimate_inmemory_data_size(self) -> int:
            return n_rows * row_bytes

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[ReadTask]:
            return [
                ReadTask(
                    _ray_reader(dataset, chosen, start, stop),
                    BlockMetadata(
                        num_rows=stop - start,
                        size_bytes=(stop - start) * row_bytes,
                        exec_stats=None,
                        input_files=None,
                    ),
                    arrow_schema(dataset, chosen),
                    per_task_row_limit,
                )
                for start, stop in _ranges(dataset, n_rows, parallelism)
            ]

    return ActivationDatasource()


def _ray_reader(
    dataset: Dataset, sites: list[str], start: int, stop: int
) -> Callable[[], Iterable[pa.Table]]:
    def read() -> Iterator[pa.Table]:
        for batch in to_batches(dataset, sites, start=start, stop=stop):
            yield pa.Table.from_batches([batch])

    return read


def hf_dataset(
    dataset: Dataset, sites: Sequence[str] | str | None = None, *, n_shards: int = 64
) -> "datasets.IterableDataset":
    """A Hugging Face `IterableDataset` of single rows in stored order, in `n_shards` runs of chunks.

    It shuffles, splits by node and by worker as such datasets do. Rows are Python dicts there, one at a
    time: convenient, not fast.
    """
    try:
        import datasets
    except ImportError as err:
        raise SpecError("hf_dataset needs the package datasets; pip install 'actcache[hub]'") from err
    chosen = _chosen(dataset, sites)
    features = {name: datasets.Value(str(dataset._layout[name]["dtype"])) for name in _BY_ROW}
    for site in chosen:
        features[site] = datasets.List(datasets.Value("float32"), length=dataset.d_in(site))
    return datasets.IterableDataset.from_generator(
        _hf_rows,
        features=datasets.Features(features),
        gen_kwargs={
            "dataset": dataset,
            "sites": tuple(chosen),
            "ranges": list(_ranges(dataset, _site_rows(dataset, chosen), n_shards)),
        },
    )


def _hf_rows(
    dataset: Dataset, sites: Sequence[str], ranges: list[tuple[int, int]]
) -> Iterator[dict[str, Any]]:
    for start, stop in ranges:
        for batch in to_batches(dataset, list(sites), start=start, stop=stop):
            yield from batch.to_pylist()


def export_npy(
    dataset: Dataset,
    site: str,
    path: str | os.PathLike[str],
    *,
    start: int = 0,
    stop: int | None = None,
    dtype: str = "float32",
) -> np.ndarray:
    """Write decoded rows [start, stop) to a `.npy` file and return it memory-mapped, read-only; [N, D].

    For small sets: a row takes 4 D bytes. The file appears whole or not at all. Rows stand as stored, so
    `dataset.rows(slice(start, stop))` says which tokens they are.

    Raises:
        Conflict: the file exists.
    """
    target = Path(path)
    if target.exists():
        raise Conflict(f"{target} exists; remove it, or choose another file")
    stop = dataset._site_rows(site) if stop is None else min(stop, dataset._site_rows(site))
    if dtype not in ("float32", "float16"):
        raise SpecError(f"dtype is {dtype!r}; wanted float32 or float16")
    shape = (max(0, stop - start), dataset.d_in(site))
    step = _batch_rows(dataset, [site])
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        out_ND = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            acts_ND = dataset.read(site, slice(begin, end))
            if dtype == "float16" and np.abs(acts_ND).max() > np.finfo(np.float16).max:
                raise SpecError(f"{site} exceeds float16 in rows {begin}..{end}; use float32")
            out_ND[begin - start : end - start] = acts_ND
        out_ND.flush()
        del out_ND
        os.link(temporary, target)
    except FileExistsError:
        raise Conflict(f"{target} exists; remove it, or choose another file") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return np.load(target, mmap_mode="r")


def _chosen(dataset: Dataset, sites: Sequence[str] | str | None) -> list[str]:
    return [
        dataset._checked(s) for s in ([sites] if isinstance(sites, str) else list(sites or dataset.sites))
    ]


def _site_rows(dataset: Dataset, sites: Sequence[str]) -> int:
    return min(dataset._site_rows(site) for site in sites)


def _row_bytes(dataset: Dataset, sites: Sequence[str]) -> int:
    return sum(4 * dataset.d_in(site) for site in sites) + 12


def _batch_rows(dataset: Dataset, sites: Sequence[str]) -> int:
    """Rows of the whole chunks that fit `_BATCH_BYTES`; at least one chunk."""
    chunk_rows = int(dataset.manifest.identity["chunk_rows"])
    return chunk_rows * max(1, _BATCH_BYTES // (_row_bytes(dataset, sites) * chunk_rows))


def _ranges(dataset: Dataset, n_rows: int, parts: int) -> Iterator[tuple[int, int]]:
    """At most `parts` runs of whole chunks that cover the rows, of nearly equal size."""
    chunk_rows = int(dataset.manifest.identity["chunk_rows"])
    n_chunks = -(-n_rows // chunk_rows)
    parts = max(1, min(parts, n_chunks))
    for i in range(parts):
        start, stop = (n_chunks * j // parts * chunk_rows for j in (i, i + 1))
        yield start, min(stop, n_rows)
