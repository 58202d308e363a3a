"""The harvest: plan what is missing, run it on one process or many Ray actors, commit it.

The driver alone writes manifests and `zarr.json`; Harvesters write shards and records. Any of
them may die at any time: the same call again finishes the rest and repeats no committed block.
"""

import hashlib
import importlib.metadata
import logging
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .catalog import find_dataset
from .codec import Precision
from .commit import create_exact_shard
from .corpus import ResolvedCorpus, TokenStore, resolve_corpus, tokenise, tokens_identity
from .engines import Engine, LocalEngine, RayEngine, Unit
from .errors import ActcacheError, Conflict, HarvestError, SpecError
from .harvester import Job
from .layout import calibration_key, offset_arrays, parse_calibration, zarr_metadata
from .manifest import (
    SPLITS,
    BlockRecord,
    Manifest,
    SiteExtent,
    commit_manifest,
    latest_version,
    read_manifest,
    read_records,
    read_segment_table,
    record_key,
    write_segment,
)
from .progress import Progress, format_bytes
from .spec import FORMAT, Spec, canonical_json, dataset_name, digest, shown_source
from .store import Store, open_store
from .untrusted import MAX_CHUNK_BYTES, readable_chunk

if TYPE_CHECKING:
    from .reader import Dataset

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Times a block is tried before it is set aside and the rest finished."""
_COMPACT_EVERY_S = 60.0
_COMPACT_EVERY_BLOCKS = 1000


@dataclass(frozen=True)
class Resolved:
    """A Spec against the world: its identity, the sites by name, and what to read it with."""

    spec: Spec
    identity: dict[str, Any]
    widths: dict[str, int]
    """d_in of each wanted site, in forward order."""
    corpus: ResolvedCorpus
    tokenizer: Any

    @property
    def sites(self) -> tuple[str, ...]:
        """The wanted sites by name, globs expanded."""
        return tuple(self.widths)

    @property
    def id(self) -> str:
        """sha256 of the identity."""
        return digest(self.identity)


def resolve(spec: Spec, storage_options: Mapping[str, Any] | None = None) -> Resolved:
    """Fix what a Spec leaves open: revisions, digests, special tokens, block shape, site globs.

    Reads the corpus's content digest, the model's config and its tokenizer; no weights are loaded
    (a local model's are hashed).

    Raises:
        SpecError: unknown model or site, no tokenizer, context size beyond the model's.
        CorpusError: nothing matches the corpus.
    """
    from . import capture

    _, model_id, revision = capture.resolve_model(spec.model, spec.model_revision)
    skeleton = capture.skeleton(spec.model, spec.model_revision)
    config = skeleton.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and spec.context_size > longest:
        raise SpecError(
            f"context_size is {spec.context_size}, but {model_id} takes at most {longest} tokens; lower it"
        )
    tokenizer = capture.load_tokenizer(spec.model, spec.model_revision)
    if len(tokenizer) > config.vocab_size:
        raise SpecError(
            f"the tokenizer has {len(tokenizer)} tokens, but {model_id} embeds {config.vocab_size}; use its own"
        )
    sites = tuple(capture.resolve_sites(skeleton, list(spec.sites)))
    corpus = resolve_corpus(spec.corpus, storage_options)
    block_rows, chunk_rows = spec.block_shape(config.hidden_size)
    identity = {
        "format": FORMAT,
        "model": {"id": model_id, "revision": revision, "lm_dtype": spec.lm_dtype},
        "tokens": tokens_identity(spec, corpus, tokenizer),
        "precision": str(Precision.parse(spec.precision)),
        "block_rows": block_rows,
        "chunk_rows": chunk_rows,
        "seed": spec.seed,
    }
    widths = {site: capture.site_width(skeleton, site) for site in sites}
    for site, width in widths.items():
        if not readable_chunk(chunk_rows, width):
            raise SpecError(
                f"chunk_rows is {chunk_rows}: chunks of {site}, {width} wide, would exceed the "
                f"{format_bytes(MAX_CHUNK_BYTES)} that readers take. Lower it, or leave it out"
            )
    return Resolved(spec, identity, widths, corpus, tokenizer)


def harvest(
    spec: Spec,
    root: str,
    *,
    workers: int = 1,
    engine: str = "local",
    lm_batch: int = 32,
    device: str = "cpu",
    gpus_per_worker: float = 0,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> "Dataset":
    """The committed dataset of `spec` under `root`; returns at once when it is already there.

    Only what is missing is computed, so the same call resumes after a crash, and a larger
    `n_tokens` or more sites extend the dataset. Several drivers may run the same Spec at once.

    Args:
        spec: what to harvest.
        root: a directory or fsspec URL that holds datasets and token stores.
        workers: Harvesters to run; the local engine runs one.
        engine: "ray" (one actor per worker, on the connected or a fresh local cluster) or "local".
        lm_batch: sequences in one forward pass. Never changes which row is where.
        device: of the LM, e.g. "cpu" or "cuda".
        gpus_per_worker: GPUs that Ray reserves for each actor.
        storage_options: for fsspec; never stored.
        progress: show bars or lines on standard error.

    Raises:
        SpecError, CorpusError: the request cannot be met as written.
        HarvestError: some blocks failed repeatedly; the rest is committed.
        StoreError: the store refused.
    """
    from .reader import open_dataset

    if engine not in ("ray", "local"):
        raise SpecError(f"engine is {engine!r}; it must be 'ray' or 'local'")
    if workers < 1 or lm_batch < 1:
        raise SpecError(f"workers is {workers} and lm_batch {lm_batch}; both must be at least 1")
    start = time.monotonic()
    resolved = resolve(spec, storage_options)
    base = open_store(root, storage_options)
    found = find_dataset(base, resolved.id)
    name = found or dataset_name(resolved.identity, spec.corpus.source)
    store = base.sub(name)
    _claim(store, resolved)  # also shows at once whether the root can be written
    tokens = tokenise(spec, resolved.corpus, resolved.tokenizer, base, progress=progress)
    job = Job(
        identity=resolved.identity,
        dataset_url=store.url,
        tokens_url=tokens.store.url,
        storage_options=dict(storage_options or {}),
        model=spec.model,
        model_revision=resolved.identity["model"]["revision"],
        sites=resolved.sites,
        lm_batch=lm_batch,
        device=device,
        threads=0,
    )
    engine_of = (
        LocalEngine
        if engine == "local"
        else partial(RayEngine, workers=workers, gpus_per_worker=gpus_per_worker)
    )
    workers = workers if engine == "ray" else 1
    harvest_missing(store, resolved, tokens, job, engine_of, start=start, workers=workers, progress=progress)
    return open_dataset(store.url, storage_options=storage_options)


def harvest_missing(
    store: Store,
    resolved: Resolved,
    tokens: TokenStore,
    job: Job,
    engine_of: Callable[[Job], Engine],
    *,
    start: float,
    workers: int = 1,
    progress: bool = True,
) -> None:
    """Compute and commit what `store` lacks of `resolved`; no engine is made where nothing is missing."""
    state = _State(store, resolved, tokens)
    missing = state.missing()
    if state.covered():
        assert state.manifest is not None
        if not _metadata_is_current(store, state.manifest):
            _write_metadata(store)  # a driver died between its manifest and the Zarr metadata
        log.info("cache hit: %s holds all that was asked for, nothing to compute", store.url)
        return
    log.info("%s: %d of %d blocks to harvest", store.url, len(missing), len(state.wanted))
    with engine_of(job) as pool:
        _run(pool, state, missing, job, start, workers, progress)


class _State:
    """What is committed and what is wanted: from manifest, segments and loose records alone."""

    def __init__(self, store: Store, resolved: Resolved, tokens: TokenStore) -> None:
        self.store, self.resolved, self.tokens = store, resolved, tokens
        spec, rows = resolved.spec, resolved.identity["block_rows"]
        limits = {
            "train": -(-spec.n_tokens // rows),
            "validation": spec.validation_blocks,
            "test": spec.test_blocks,
        }
        self.wanted = [
            (split, block)
            for split in ("validation", "test", "train")
            for block in range(min(limits[split], -(-tokens.n_rows(split) // rows)))
        ]

        self.refresh()

    def refresh(self) -> None:
        """Read again what is committed."""
        version = latest_version(self.store)
        self.manifest: Manifest | None = read_manifest(self.store, version) if version else None
        self.done: dict[tuple[str, int], set[str]] = {}
        self.loose: list[BlockRecord] = []
        """Committed records that no segment holds yet."""
        known = []
        for segment in self.manifest.segments if self.manifest else ():
            table = read_segment_table(self.store, segment.statistics, segment.statistics_sha256)
            for row in table.select(["split", "block", "site", "sites"]).to_pylist():
                self.done.setdefault((row["split"], row["block"]), set()).add(row["site"])
                known.append(record_key(row["split"], row["block"], row["sites"].split(",")))
        for record in read_records(self.store, known):
            self.add(record)

    def add(self, record: BlockRecord) -> None:
        """Take in a record that was just committed."""
        self.done.setdefault((record.split, record.block), set()).update(record.statistics)
        self.loose.append(record)

    def missing(self) -> list[Unit]:
        """Blocks that lack a wanted site, held-out splits first."""
        units = []
        for split, block in self.wanted:
            sites = tuple(s for s in self.resolved.sites if s not in self.done.get((split, block), ()))
            if sites:
                units.append((split, block, sites))
        return units

    def covered(self) -> bool:
        """Whether the manifest, not only loose records, holds all that is wanted."""
        manifest = self.manifest
        return manifest is not None and all(
            site in manifest.fidelity and block < manifest.sites[site].n_blocks[split]
            for split, block in self.wanted
            for site in self.resolved.sites
        )

    def prefix(self, split: str, site: str) -> int:
        """How many blocks from the first on are committed for a site."""
        n = 0
        while site in self.done.get((split, n), ()):
            n += 1
        return n

    def extents(self, widths: Mapping[str, int], calibrations: Mapping[str, str]) -> dict[str, SiteExtent]:
        """The committed extent of each site that has any block."""
        return {
            site: SiteExtent(
                widths[site], {split: self.prefix(split, site) for split in SPLITS}, calibrations[site]
            )
            for site in sorted(widths)
        }

    def split_sizes(self, sites: Mapping[str, SiteExtent]) -> dict[str, dict[str, int]]:
        """n_blocks, n_rows and n_sequences of each split's longest committed prefix."""
        block_rows = self.resolved.identity["block_rows"]
        sizes = {}
        for split in SPLITS:
            n_blocks = max((e.n_blocks[split] for e in sites.values()), default=0)
            n_rows = min(n_blocks * block_rows, self.tokens.n_rows(split))
            row_start = self.tokens.row_start(split)
            n_sequences = int(np.searchsorted(row_start, n_rows, side="left")) if n_rows else 0
            sizes[split] = {"n_blocks": n_blocks, "n_rows": n_rows, "n_sequences": n_sequences}
        return sizes


def _run(
    pool: "Engine",
    state: _State,
    missing: Sequence[Unit],
    job: Job,
    start: float,
    workers: int,
    progress: bool,
) -> None:
    """Run the missing units and commit manifests as they come; raise if any failed for good."""
    attention = pool.prepare()
    failed: list[tuple[Unit, BaseException]] = []
    begun = time.monotonic()
    rows_done = 0
    last_compact = time.monotonic()
    total = sum(_unit_rows(state, u) for u in missing)
    with Progress("harvest", total, "rows", show=progress) as bar:
        for unit, result in _with_attempts(pool, missing):
            if isinstance(result, BaseException):
                failed.append((unit, result))
                log.error("block %d of %s set aside: %s", unit[1], unit[0], result)
                continue
            record = BlockRecord.from_json(result, f"record of {unit[0]} block {unit[1]}")
            state.add(record)
            rows_done += record.n_rows
            bar.advance(record.n_rows, out=_bits_per_value(record))
            now = time.monotonic()
            if now - last_compact > _COMPACT_EVERY_S or len(state.loose) >= _COMPACT_EVERY_BLOCKS:
                _commit(state, {}, {}, complete=False)
                last_compact = now
    elapsed = time.monotonic() - begun
    provenance = _provenance(job, workers) | {
        "attention": attention,
        "rows": rows_done,
        "harvest_s": round(elapsed, 3),
        "rows_per_s": round(rows_done / elapsed, 1) if rows_done else 0.0,
        "startup_s": round(begun - start, 3),
    }
    known = state.manifest.fidelity if state.manifest else {}
    fidelity = {} if failed else pool.fidelity([site for site in job.sites if site not in known])
    _commit(state, fidelity, provenance, complete=not failed)
    if failed:
        names = ", ".join(f"{u[0]} block {u[1]}" for u, _ in failed[:5])
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise HarvestError(
            f"{len(failed)} of {len(missing)} blocks failed ({names}{more}): {failed[0][1]}. "
            "The rest is committed; run the same command again to retry these"
        ) from failed[0][1]


def _with_attempts(pool: "Engine", units: Iterable[Unit]) -> Iterator[tuple[Unit, bytes | BaseException]]:
    """Each unit once with its record or its last error; transient errors are tried `ATTEMPTS` times."""
    queue = deque(units)
    attempts: dict[Unit, int] = {}
    while queue or pool.busy():
        while queue and pool.free():
            pool.submit(queue.popleft())
        for unit, result in pool.completed():
            if isinstance(result, BaseException):
                attempts[unit] = attempts.get(unit, 0) + 1
                final = isinstance(result, ActcacheError) and not isinstance(result, OSError)
                if not final and attempts[unit] < ATTEMPTS:
                    log.warning("block %d of %s: %s; trying again", unit[1], unit[0], result)
                    queue.append(unit)
                    continue
            yield unit, result


def _commit(
    state: _State,
    fidelity: Mapping[str, dict[str, float]],
    provenance: Mapping[str, Any],
    *,
    complete: bool,
) -> None:
    """Compact loose records into a segment, create the next manifest version, grow `zarr.json`.

    Another driver may create that version first: then what it committed is taken in and the next
    version tried.
    """
    store, spec = state.store, state.resolved.spec
    while True:
        before = state.manifest
        known = {site: e.d_in for site, e in before.sites.items()} if before else {}
        all_widths = {**known, **state.resolved.widths}
        raw = {site: store.read(calibration_key(site)) for site in all_widths}
        digests = {site: _sha256(data) for site, data in raw.items()}
        segment = write_segment(store, state.loose) if state.loose else None
        sites = state.extents(all_widths, digests)
        manifest = Manifest(
            version=before.version + 1 if before else 1,
            id=state.resolved.id,
            identity=state.resolved.identity,
            source=shown_source(spec.corpus.source),
            splits=state.split_sizes(sites),
            sites=sites,
            segments=(*(before.segments if before else ()), *([segment] if segment else ())),
            wanted={
                "sites": list(state.resolved.sites),
                "n_tokens": spec.n_tokens,
                "validation_blocks": spec.validation_blocks,
                "test_blocks": spec.test_blocks,
            },
            complete=complete and not state.missing(),
            fidelity={**(before.fidelity if before else {}), **fidelity},
            provenance=dict(provenance) or (before.provenance if before else {}),
        )
        if commit_manifest(store, manifest):
            state.manifest, state.loose = manifest, []
            break
        state.refresh()
    _write_metadata(store)


def _write_metadata(store: Store) -> None:
    """Bring offsets and `zarr.json` to the newest manifest; the root's `zarr.json` comes last.

    Whoever commits a version checks afterwards that none came meanwhile, so the last word is that of
    the newest version and no shape stays shrunk.
    """
    while True:
        manifest = read_manifest(store)
        for path, site, array in offset_arrays(manifest):
            calibration = parse_calibration(store.read(calibration_key(site)), site)
            create_exact_shard(store, path, 0, calibration.offset_D, array)
        for key, data in zarr_metadata(manifest).items():
            store.replace(key, data)
        if latest_version(store) == manifest.version:
            return


def _metadata_is_current(store: Store, manifest: Manifest) -> bool:
    """Whether the last write of `_write_metadata` for this version happened: one request."""
    try:
        return store.read("zarr.json") == zarr_metadata(manifest)["zarr.json"]
    except FileNotFoundError:
        return False


def _claim(store: Store, resolved: Resolved) -> None:
    """Make the prefix ours: `_identity.json` is created first, or is there and says the same."""
    wanted = canonical_json(resolved.identity).encode()
    try:
        found = store.read("_identity.json")
    except FileNotFoundError:
        store.create("_identity.json", wanted)
        return
    if found != wanted:
        raise Conflict(
            f"{store.url} belongs to another dataset (its _identity.json differs); use another root"
        )


def _unit_rows(state: _State, unit: Unit) -> int:
    block_rows = state.resolved.identity["block_rows"]
    return min(block_rows, state.tokens.n_rows(unit[0]) - unit[1] * block_rows)


def _bits_per_value(record: BlockRecord) -> str:
    stored = sum(o.size_bytes for o in record.objects if o.path.endswith(("/codes", "/scale")))
    values = sum(len(s.mean_D) for s in record.statistics.values()) * record.n_rows
    return f"{8 * stored / values:.2f} bits/value"


def _provenance(job: Job, workers: int) -> dict[str, Any]:
    versions = {}
    for package in ("actcache", "numpy", "torch", "transformers", "zarr", "numcodecs"):
        versions[package] = importlib.metadata.version(package)
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": job.device,
        "lm_batch": job.lm_batch,
        "workers": workers,
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
