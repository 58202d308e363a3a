"""Whole datasets copied to another place, such as a Hugging Face dataset repository, with a card.

What is copied is one manifest version: the objects that it names, its metadata and, last of all, the
manifest, so that nobody sees a part of it. The copy reads like the original; it holds no harvest in
progress. Any fsspec URL will do: `hf://datasets/USER/NAME`, `s3://...`, a directory.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import fsspec

from .errors import Conflict, CorruptObject, StoreError
from .layout import calibration_keys, derived_arrays, derived_key, zarr_metadata
from .reader import Dataset, open_dataset
from .retry import client_errors
from .shard import shard_key
from .store import Store

_THREADS = 8
_COMMIT_BYTES = 256 * 10**6
_COMMIT_OBJECTS = 1000
_Object = tuple[str, Callable[[], bytes]]
"""A key, and what reads the bytes."""
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")
_LARGE = ("10B<n<100B", "100B<n<1T", "n>1T")


def push(
    dataset: Dataset, url: str, *, storage_options: Mapping[str, Any] | None = None, card: bool = True
) -> Dataset:
    """Copy the pinned version of a dataset, all its splits, to `url`, and open it there.

    Objects that are there in full size are passed over, so a push that was cut off goes on. With `card`,
    a `README.md` that Hugging Face shows is written from the manifest. The repository of a `hf://` URL
    must be there; it gets a commit for every 256 MB.

    Raises:
        Conflict: another dataset is there.
        CorruptObject: an object of the source is missing or has another size than committed.
        StoreError: the target refused.
    """
    shared, manifest = dataset._shared, dataset.manifest
    target = _Target(url, storage_options)
    identity, there = shared.store.read("_identity.json"), target.sizes()
    if "_identity.json" in there and target.read("_identity.json") != identity:
        raise Conflict(f"{url} holds another dataset; choose an empty place")

    def objects() -> Iterator[_Object]:
        yield "_identity.json", partial(bytes, identity)
        for key, size_bytes in _objects(dataset):
            if size_bytes is None or there.get(key) != size_bytes:
                yield key, partial(_read, shared.store, key, size_bytes)

    target.write(objects())
    last = zarr_metadata(manifest) | ({"README.md": dataset_card(dataset).encode()} if card else {})
    target.write((key, partial(bytes, data)) for key, data in last.items())
    target.write([(manifest.key, manifest.to_json)])
    return open_dataset(url, version=manifest.version, storage_options=storage_options)


def _read(store: Store, key: str, size_bytes: int | None) -> bytes:
    try:
        data = store.read(key)
    except FileNotFoundError:
        raise CorruptObject(f"{store.url}/{key} is missing although it was committed") from None
    if size_bytes is not None and len(data) != size_bytes:
        raise CorruptObject(f"{store.url}/{key} has {len(data)} bytes, wanted {size_bytes}")
    return data


class _Target:
    """A place that a dataset is copied to, by fsspec; the client's errors come out as StoreError."""

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = fsspec.core.url_to_fs(self.url, **(storage_options or {}))

    def sizes(self) -> dict[str, int]:
        """Bytes of every object that is there, by key."""
        self._fs.invalidate_cache()
        with self._errors(""):
            found = self._fs.find(self._root, detail=True)
        # the root may be spelled in another way: made absolute, or with a revision
        start = len(self._fs._strip_protocol(self._root)) + 1
        return {path[start:]: entry["size"] for path, entry in found.items()}

    def read(self, key: str) -> bytes:
        with self._errors(key):
            return self._fs.cat_file(f"{self._root}/{key}")

    def write(self, objects: Iterable[_Object]) -> None:
        """Store objects; all are there when this returns."""
        if "hf" not in self._fs.protocol:
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(lambda item: self._write(item[0], item[1]()), objects))
            return
        group: list[tuple[str, bytes]] = []
        for key, read in objects:
            group.append((key, read()))
            if sum(len(data) for _, data in group) >= _COMMIT_BYTES or len(group) == _COMMIT_OBJECTS:
                self._commit(group)
                group = []
        if group:
            self._commit(group)

    def _write(self, key: str, data: bytes) -> None:
        path = f"{self._root}/{key}"
        with self._errors(key):
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, data)

    def _commit(self, group: Sequence[tuple[str, bytes]]) -> None:
        """One commit of a Hugging Face repository: the Hub takes few of them an hour, one at a time."""
        from huggingface_hub import CommitOperationAdd, HfApi

        with self._errors(group[0][0]):
            there = self._fs.resolve_path(self._root)
            folder = f"{there.path_in_repo}/" if there.path_in_repo else ""
            HfApi(endpoint=self._fs.endpoint, token=self._fs.token).create_commit(
                there.repo_id,
                [CommitOperationAdd(f"{folder}{key}", data) for key, data in group],
                commit_message=f"actcache push: {len(group)} objects",
                repo_type=there.repo_type,
                revision=there.revision,
            )
            self._fs.invalidate_cache()

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except client_errors() as err:
            raise StoreError(
                f"{self.url}/{key}: {err}. Check the URL and permissions; then push again"
            ) from err


def pull(url: str, directory: str, *, storage_options: Mapping[str, Any] | None = None) -> Dataset:
    """Copy the newest version of the dataset at `url` to a local directory, and open it there."""
    return push(open_dataset(url, storage_options=storage_options), directory, card=False)


def _objects(dataset: Dataset) -> Iterator[tuple[str, int | None]]:
    """Key and committed size of everything a version needs but its JSON; size None where none is recorded."""
    manifest = dataset.manifest
    for split in manifest.splits:
        part = dataset.split(split)
        for table in part._tables.values():
            ndim = 1 + len(part._layout[table.path.partition("/")[2]]["row"])
            for shard, size_bytes in enumerate(table.size_bytes.tolist()):
                yield shard_key(table.path, shard, ndim), size_bytes
    for path, _, _, array in derived_arrays(manifest):
        yield derived_key(path, array), None
    for site in manifest.sites:
        for key in calibration_keys(dataset._shared.store, site):
            yield key, None
    for segment in manifest.segments:
        for file in segment.files:
            yield file.key, None


def dataset_card(dataset: Dataset) -> str:
    """The README.md of a dataset: a YAML header as Hugging Face reads it, then what is stored and how to read it."""
    manifest, spec = dataset.manifest, dataset.spec
    n_rows = sum(size["n_rows"] for size in manifest.splits.values())
    size = (*_SIZES, *_LARGE)[min(max(0, len(str(n_rows)) - 3), 10)]
    header = {
        "pretty_name": f"Activations of {spec.model}",
        "size_categories": [size],
        "tags": ["activations", "sparse-autoencoder", "interpretability", "actcache", "zarr"],
        "viewer": False,
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", ""]
    lines += [f"# Activations of {spec.model}", ""]
    lines += [
        f"Activations of `{spec.model}` (revision `{spec.model_revision}`, run in "
        f"{manifest.identity['model']['lm_dtype']}) on `{spec.corpus}`, context {spec.context_size}, one row a "
        f"token, globally shuffled. Stored as `{spec.precision}` in plain Zarr v3 by actcache; dataset "
        f"`{dataset.id[:12]}`, version {manifest.version}.",
        "",
        "| split | rows | sequences |",
        "|---|---|---|",
    ]
    lines += [f"| {s} | {n['n_rows']:,} | {n['n_sequences']:,} |" for s, n in manifest.splits.items()]
    lines += ["", "| site | width | mean norm | FVU of storing | bits per value |", "|---|---|---|---|---|"]
    for site in dataset.sites:
        stats = dataset.split("train").stats(site)
        lines.append(
            f"| {site} | {dataset.d_in(site)} | {stats['mean_norm']:.4g} | {stats['fvu_core']:.2e} | "
            f"{stats['bits_per_value']:.2f} |"
        )
    site = dataset.sites[0]
    lines += [
        "",
        "```python",
        "import actcache",
        "",
        'ds = actcache.open("hf://datasets/USER/NAME")  # or wherever this directory is',
        f'for batch in ds.stream("{site}", batch_size=4096):',
        f'    acts = batch["{site}"]',
        "```",
        "",
        "Or with `zarr` alone; the group's attributes have the line that decodes it:",
        "",
        "```python",
        "import zarr",
        "",
        f'site = zarr.open_group(path, mode="r")["train"]["{site}"]',
        'print(site.attrs["actcache"]["decode"])',
        "```",
        "",
    ]
    return "\n".join(lines)
