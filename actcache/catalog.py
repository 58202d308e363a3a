"""The datasets under one prefix: find one by identity or Spec, list them all.

No database: the object store is the truth. A listing takes one request for the prefix and at most
two for each folder in it, whatever the datasets hold.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ActcacheError, NotADataset
from .manifest import SPLITS, Manifest, latest_version, read_manifest
from .spec import token_store_name
from .store import Store, open_store

if TYPE_CHECKING:
    from .reader import Dataset
    from .spec import Spec

log = logging.getLogger(__name__)

_THREADS = 16  # requests in flight: a listing is all latency


@dataclass(frozen=True)
class Entry:
    """One dataset of a prefix, as its newest manifest describes it; `error` where it cannot be read."""

    name: str
    manifest: Manifest | None
    error: str = ""

    @property
    def state(self) -> str:
        """`complete` (all that was last asked for is there), `partial` or `unreadable`."""
        if self.manifest is None:
            return "unreadable"
        return "complete" if self.manifest.complete else "partial"

    def summary(self) -> dict[str, Any]:
        """What `actcache ls` shows, as JSON; None where the manifest does not say."""
        line: dict[str, Any] = {"name": self.name, "state": self.state, "error": self.error or None}
        manifest = self.manifest
        if manifest is None:
            return line
        sizes = [size.get("size_bytes") for size in manifest.splits.values()]
        fidelity = {site: manifest.fidelity.get(site, {}) for site in sorted(manifest.sites)}
        return line | {
            "id": manifest.id,
            "version": manifest.version,
            "model": manifest.identity["model"]["id"],
            "precision": manifest.identity["precision"],
            "rows": {split: size["n_rows"] for split, size in manifest.splits.items()},
            "size_bytes": None if None in sizes else sum(n for n in sizes if n is not None),
            "sites": {
                site: {"fvu_core": f.get("fvu_core"), "ce_change": f.get("ce_change")}
                for site, f in fidelity.items()
            },
        }


def find_dataset(base: Store, dataset_id: str) -> str | None:
    """Name of the dataset with this identity under `base`, whatever its readable part; None if absent.

    One listing; no other dataset is read.
    """
    for name in base.folders():
        if name.endswith(f"-{dataset_id[:12]}"):
            return name
    return None


def find(spec: "Spec", root: str, storage_options: Mapping[str, Any] | None = None) -> "Dataset | None":
    """The dataset of `spec` under `root`, if anything of it is committed; nothing is computed or written.

    The extent is no part of what a dataset is: it may hold fewer sites or rows than `spec` asks for, or
    more. How much of what was asked for is there is logged; `coverage` gives it as numbers.

    Raises:
        SpecError, CorpusError: the Spec cannot be met as written.
        FormatError, CorruptObject: it is there and cannot be read.
    """
    from .corpus import open_tokens
    from .driver import resolve
    from .reader import open_dataset

    resolved = resolve(spec, storage_options)
    base = open_store(root, storage_options)
    name = find_dataset(base, resolved.id)
    if name is None:
        return None
    try:
        dataset = open_dataset(base.sub(name).url, storage_options=storage_options)
    except NotADataset:
        return None
    tokens = open_tokens(
        base.sub(f"tokens/{token_store_name(resolved.identity['tokens'], spec.corpus.shown)}")
    )
    rows = {split: tokens.n_rows(split) for split in SPLITS} if tokens else {}
    have, wanted = coverage(dataset.manifest, spec, resolved.sites, rows)
    log.info("%s holds %d of the %d blocks asked for, over all sites", dataset.url, have, wanted)
    return dataset


def coverage(
    manifest: Manifest, spec: "Spec", sites: Sequence[str], n_rows: Mapping[str, int]
) -> tuple[int, int]:
    """(committed blocks that `spec` asks for, blocks that it asks for), summed over sites and splits.

    Args:
        manifest: of the dataset of `spec`.
        spec: its extent counts.
        sites: those of `spec` by name.
        n_rows: by split, what the corpus gives; without it a Spec of more than that looks unfinished.
    """
    block_rows = manifest.identity["block_rows"]
    have = wanted = 0
    for split, asked in blocks_asked(spec, block_rows).items():
        limit = min(asked, -(-n_rows[split] // block_rows)) if split in n_rows else asked
        wanted += limit * len(sites)
        have += sum(
            min(limit, manifest.sites[site].n_blocks[split]) for site in sites if site in manifest.sites
        )
    return have, wanted


def blocks_asked(spec: "Spec", block_rows: int) -> dict[str, int]:
    """Blocks of each split that `spec` asks for; the corpus may give fewer."""
    return {
        "train": -(-spec.n_tokens // block_rows),
        "validation": spec.validation_blocks,
        "test": spec.test_blocks,
    }


def list_datasets(root: str, storage_options: Mapping[str, Any] | None = None) -> list[Entry]:
    """Every dataset directly under `root`, sorted by name; other folders are left out.

    One listing of `root` and at most two requests a folder, 16 at a time.

    Raises:
        NotADataset: there is nothing at `root`.
    """
    base = open_store(root, storage_options)
    names = base.folders()
    if not names:
        raise NotADataset(f"nothing at {base.url}; give the root that harvests were written under")
    return read_entries(base, [name for name in names if _may_be_dataset(name)])


def read_entries(base: Store, names: Sequence[str]) -> list[Entry]:
    """The datasets among the folders `names` of `base`, in that order: two requests each, 16 at a time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return [entry for entry in pool.map(lambda name: _entry(base, name), names) if entry is not None]


def _may_be_dataset(name: str) -> bool:
    return name != "tokens" and not name.startswith(("_", "."))


def _entry(base: Store, name: str) -> Entry | None:
    """What is in the folder `name`: two requests; None if it is no dataset."""
    try:
        store = base.sub(name)
        version = latest_version(store)
        if version:
            return Entry(name, read_manifest(store, version))
        if store.exists("_identity.json"):
            return Entry(name, None, "nothing is committed yet; run the harvest again")
    except ActcacheError as err:
        return Entry(name, None, str(err))
    return None


def describe(dataset: "Dataset") -> dict[str, Any]:
    """What `actcache info` shows and reports quote, as JSON: identity in words, sizes, fidelity.

    Per-site numbers are of the train split.
    """
    manifest = dataset.manifest
    splits = {name: dataset.split(name) for name in dataset.splits}
    sites: dict[str, dict[str, Any]] = {}
    for site in dataset.sites:
        if not manifest.sites[site].n_blocks.get("train"):
            continue
        stats = dataset.stats(site)
        sites[site] = {"d_in": dataset.d_in(site), "fvu_median_channel": stats["fvu_median_channel"]}
        sites[site] |= {k: v for k, v in stats.items() if isinstance(v, int | float)}
        for name in ("ce_clean", "ce_stored", "ce_change"):
            sites[site][name] = manifest.fidelity.get(site, {}).get(name)
    return {
        "url": dataset.url,
        "id": dataset.id,
        "version": manifest.version,
        "complete": manifest.complete,
        "model": dataset.spec.model,
        "model_revision": dataset.spec.model_revision,
        "corpus": dataset.spec.corpus,
        "context_size": dataset.spec.context_size,
        "precision": dataset.spec.precision,
        "rows": {name: split.n_rows for name, split in splits.items()},
        "size_bytes": sum(split.size_bytes() for split in splits.values()),
        "sites": sites,
        "provenance": manifest.provenance,
    }
