"""The datasets under one prefix: find one by identity, list them all.

No database: the object store is the truth.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ActcacheError, NotADataset
from .manifest import Manifest, read_manifest
from .store import Store, open_store

if TYPE_CHECKING:
    from .reader import Dataset


@dataclass(frozen=True)
class Entry:
    """One dataset of a prefix, as its newest manifest describes it; `error` where it cannot be read."""

    name: str
    manifest: Manifest | None
    error: str = ""


def find_dataset(base: Store, dataset_id: str) -> str | None:
    """Name of the dataset with this identity under `base`, whatever its readable part; None if absent."""
    for name in base.folders():
        if name.endswith(f"-{dataset_id[:12]}"):
            return name
    return None


def list_datasets(root: str, storage_options: Mapping[str, Any] | None = None) -> list[Entry]:
    """Every dataset directly under `root`, sorted by name; one listing and two requests a dataset.

    Raises:
        NotADataset: there is nothing at `root`.
    """
    base = open_store(root, storage_options)
    entries = []
    names = base.folders()
    if not names:
        raise NotADataset(f"nothing at {base.url}; give the root that harvests were written under")
    for name in names:
        if name == "tokens" or name.startswith("_"):
            continue
        try:
            entries.append(Entry(name, read_manifest(base.sub(name))))
        except ActcacheError as err:
            entries.append(Entry(name, None, str(err)))
    return entries


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
        stats = {k: v for k, v in dataset.stats(site).items() if isinstance(v, int | float)}
        sites[site] = {"d_in": dataset.d_in(site), **stats}
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
