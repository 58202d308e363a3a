"""How far a harvest has come, from what the store holds; it needs neither the driver nor its cluster.

Reads the token store's counts, the newest manifest, the block columns of its segments, and the records that
came later. It writes nothing and loads no weights.
"""

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from .catalog import coverage, find_dataset
from .corpus import open_tokens
from .driver import blocks_wanted, resolve
from .lease import DEAD_AFTER_S, FOLDER, parse_lease
from .manifest import SPLITS, Segment, latest_version, read_manifest, read_records
from .progress import format_count, format_duration
from .segment_files import segment_records
from .spec import Spec, dataset_name, token_store_name
from .store import Store, open_store


def standing(spec: Spec, root: str, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What of `spec` is committed under `root`, as JSON.

    A block counts for each wanted site. `quarantined` are blocks that the last finished run set aside and that
    are still missing. `blocks_wanted`, `blocks_missing`, `rows_wanted` and `eta_s` are None until the corpus is
    tokenised, `rate_rows_per_s` and `eta_s` where the run has committed fewer than two blocks. `running`: its
    lease was renewed lately, by the store's clock against this machine's.

    Raises:
        SpecError, CorpusError: the Spec cannot be met as written.
        StoreError: the store refused.
    """
    resolved = resolve(spec, storage_options)
    base = open_store(root, storage_options)
    name = find_dataset(base, resolved.id) or dataset_name(resolved.identity, spec.corpus.shown)
    store = base.sub(name)
    tokens_name = token_store_name(resolved.identity["tokens"], spec.corpus.shown)
    tokens = open_tokens(base.sub(f"tokens/{tokens_name}"))
    since_s, running = _lease(base, name)
    done, complete, set_aside = _Units(), False, []
    version = latest_version(store)
    if version:
        manifest = read_manifest(store, version)
        for segment in manifest.segments:
            done.take_segment(store, segment)
        set_aside = manifest.provenance.get("set_aside", [])
        if tokens is not None:
            n_rows = {split: tokens.n_rows(split) for split in SPLITS}
            have, all_of_it = coverage(manifest, spec, resolved.sites, n_rows)
            complete = have == all_of_it and all(
                "ce_change" in manifest.fidelity.get(site, {}) for site in resolved.sites
            )
    done.take_records(store)
    found: dict[str, Any] = {"url": store.url, "complete": complete, "running": running}
    found |= dict.fromkeys(
        ("blocks_wanted", "blocks_missing", "rows_wanted", "rows_done", "rate_rows_per_s", "eta_s")
    )
    found |= {"blocks_done": 0, "quarantined": []}
    if tokens is None:
        return found
    block_rows = resolved.identity["block_rows"]
    wanted = {
        (split, block): min(block_rows, tokens.n_rows(split) - block * block_rows)
        for split, n in blocks_wanted(resolved, tokens).items()
        for block in range(n)
    }
    whole = [b for b in wanted if all((*b, site) in done.units for site in resolved.sites)]
    rows_wanted, rows_done = sum(wanted.values()), sum(wanted[b] for b in whole)
    rate = _rate(done.committed_s, wanted, since_s)
    missing = set(wanted) - set(whole)
    return found | {
        "blocks_wanted": len(wanted),
        "blocks_done": len(whole),
        "blocks_missing": len(missing),
        "quarantined": [a for a in set_aside if (a["split"], a["block"]) in missing],
        "rows_wanted": rows_wanted,
        "rows_done": rows_done,
        "rate_rows_per_s": rate and round(rate, 1),
        "eta_s": round((rows_wanted - rows_done) / rate, 1) if rate else None,
    }


def standing_line(found: Mapping[str, Any]) -> str:
    """What `standing` gives, as one line for people."""
    if found["blocks_wanted"] is None:
        return "the corpus is not tokenised yet"
    share = found["rows_done"] / found["rows_wanted"] if found["rows_wanted"] else 1.0
    parts = ["complete" if found["complete"] else f"{share:.0%}"]
    parts.append(f"{format_count(found['rows_done'])}/{format_count(found['rows_wanted'])} rows")
    parts.append(f"blocks {found['blocks_done']}/{found['blocks_wanted']}")
    if found["quarantined"]:
        parts.append(f"set aside {len(found['quarantined'])}")
    if found["rate_rows_per_s"] and not found["complete"]:
        parts.append(f"{format_count(found['rate_rows_per_s'])}/s  ETA {format_duration(found['eta_s'])}")
    return "  ".join(parts)


class _Units:
    """(split, block, site) that are committed, and when each record was written."""

    def __init__(self) -> None:
        self.units: set[tuple[str, int, str]] = set()
        self.committed_s: dict[tuple[str, int], float] = {}
        self._records: dict[str, tuple[str, int]] = {}

    def take_segment(self, store: Store, segment: Segment) -> None:
        for name in segment_records(store, segment):
            self.units |= {(name.split, name.block, site) for site in name.sites.split(",")}
            self._records[name.key] = (name.split, name.block)

    def take_records(self, store: Store) -> None:
        """Those that no segment holds, and the times of all."""
        for record in read_records(store, self._records):
            self.units |= {(record.split, record.block, site) for site in record.statistics}
            self._records[record.key] = (record.split, record.block)
        for listed in store.listing("_records"):
            if listed.key in self._records:
                self.committed_s[self._records[listed.key]] = listed.modified_s


def _lease(base: Store, name: str) -> tuple[float | None, bool]:
    """Since when somebody harvests the dataset, and whether they seem to be alive."""
    for listed in base.listing(FOLDER):
        if listed.key == f"{FOLDER}/{name}.json":
            try:
                held = parse_lease(base.read(listed.key))
                since = datetime.strptime(str(held.get("since")), "%Y-%m-%d %H:%M:%SZ").replace(tzinfo=UTC)
            except (FileNotFoundError, ValueError):
                return None, False
            return since.timestamp(), time.time() - listed.modified_s < DEAD_AFTER_S
    return None, False


def _rate(
    committed_s: Mapping[tuple[str, int], float],
    wanted: Mapping[tuple[str, int], int],
    since_s: float | None,
) -> float | None:
    """Rows a second of the run that began at `since_s`, from its first commit to its last."""
    if since_s is None:
        return None
    times = sorted((s, wanted[b]) for b, s in committed_s.items() if b in wanted and s >= since_s)
    if len(times) < 2 or times[-1][0] <= times[0][0]:
        return None
    return sum(rows for _, rows in times[1:]) / (times[-1][0] - times[0][0])
