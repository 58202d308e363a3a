"""The harvest: plan what is missing, run it on one process or many Ray actors, commit it.

The driver alone writes manifests and `zarr.json`; Harvesters write shards and records. Any of
them may die at any time: the same call again finishes the rest and repeats no committed block.
"""

import importlib.metadata
import logging
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .catalog import find_dataset
from .codec import Precision
from .commit import create_exact_shard
from .committed import Committed
from .corpus import ResolvedCorpus, TokenStore, resolve_corpus, tokenise, tokens_identity
from .engines import Engine, LocalEngine, RayEngine, Unit
from .errors import ActcacheError, Conflict, HarvestError, SpecError
from .harvester import Job
from .layout import derived_arrays, derived_key, read_calibration, zarr_metadata
from .manifest import (
    SPLITS,
    BlockRecord,
    Manifest,
    latest_version,
    read_manifest,
    record_key,
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
_COMPACT_EVERY_SHARE = (
    0.01  # of the time run: a month is then 700 versions, one page of a listing, not 43,000
)
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
    source = shown_source(resolved.spec.corpus.source)
    wanted = _blocks_wanted(resolved, tokens)
    state = Committed(store, resolved.identity, source, resolved.widths, wanted)
    missing = state.missing()
    if state.covered():
        assert state.manifest is not None
        if not _metadata_is_current(store, state.manifest):
            _write_metadata(store, set())  # a driver died between its manifest and the Zarr metadata
        log.info("cache hit: %s holds all that was asked for, nothing to compute", store.url)
        return
    log.info("%s: %d of %d blocks to harvest", store.url, len(missing), sum(wanted.values()))
    with engine_of(job) as pool:
        _run(pool, state, tokens, missing, job, start, workers, progress)


def _blocks_wanted(resolved: Resolved, tokens: TokenStore) -> dict[str, int]:
    """Blocks of each split that the Spec asks for and the tokens give."""
    spec, rows = resolved.spec, resolved.identity["block_rows"]
    asked = {
        "train": -(-spec.n_tokens // rows),
        "validation": spec.validation_blocks,
        "test": spec.test_blocks,
    }
    return {split: min(asked[split], -(-tokens.n_rows(split) // rows)) for split in SPLITS}


def _run(
    pool: "Engine",
    state: Committed,
    tokens: TokenStore,
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
    derived: set[str] = set()
    block_rows = state.identity["block_rows"]
    total = sum(min(block_rows, tokens.n_rows(split) - block * block_rows) for split, block, _ in missing)
    with Progress("harvest", total, "rows", show=progress) as bar:
        for unit, result in _with_attempts(pool, missing):
            if isinstance(result, BaseException):
                failed.append((unit, result))
                log.error(
                    "block %d of %s set aside: %s", unit[1], unit[0], str(result) or type(result).__name__
                )
                continue
            record = BlockRecord.from_json(result, record_key(*unit))
            state.add(record)
            rows_done += record.n_rows
            bar.advance(record.n_rows, out=_bits_per_value(record))
            now = time.monotonic()
            if _version_due(now - last_compact, now - begun, len(state.loose)):
                state.commit({}, {})
                _write_metadata(state.store, derived)
                last_compact = now
    elapsed = time.monotonic() - begun
    provenance = _provenance(job, workers) | {
        "attention": attention,
        "rows": rows_done,
        "harvest_s": round(elapsed, 3),
        "rows_per_s": round(rows_done / elapsed, 1) if rows_done else 0.0,
        "startup_s": round(begun - start, 3),
    }
    state.commit({} if failed else pool.fidelity(state.unmeasured()), provenance)
    _write_metadata(state.store, derived)
    if failed:
        names = ", ".join(f"{u[0]} block {u[1]}" for u, _ in failed[:5])
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise HarvestError(
            f"{len(failed)} of {len(missing)} blocks failed ({names}{more}): {failed[0][1]}. "
            "The rest is committed; run the same command again to retry these"
        ) from failed[0][1]


def _version_due(waited_s: float, run_s: float, n_loose: int) -> bool:
    """Whether to commit a version `waited_s` after the last, `run_s` into the run."""
    return n_loose >= _COMPACT_EVERY_BLOCKS or waited_s > max(_COMPACT_EVERY_S, _COMPACT_EVERY_SHARE * run_s)


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
                    what = str(result) or type(result).__name__
                    log.warning("block %d of %s: %s; trying again", unit[1], unit[0], what)
                    queue.append(unit)
                    continue
            yield unit, result


def _write_metadata(store: Store, derived: set[str]) -> None:
    """Bring offsets, rotations and `zarr.json` to the newest manifest; the root's `zarr.json` comes last.

    `derived` has the offset and rotation arrays known to be there.

    No shape ever shrinks, however late a driver's write comes: what it replaces was read before it saw
    that its version is the newest, so it is of that version or an older one. Whoever commits a version
    checks afterwards that none came meanwhile, so the last word is that of the newest version.
    """
    while True:
        manifest = read_manifest(store)
        for path, site, field, array in derived_arrays(manifest):
            if path not in derived and not store.exists(derived_key(path, array)):
                values = getattr(read_calibration(store, site), field)
                create_exact_shard(store, path, 0, values, array)
            derived.add(path)  # a rotation of d 4096 is 64 MiB
        wanted = zarr_metadata(manifest)
        found = {key: _read_if_there(store, key) for key in wanted}
        if latest_version(store) != manifest.version:
            continue
        swapped = all(found[key] == data or store.swap(key, found[key], data) for key, data in wanted.items())
        if swapped and latest_version(store) == manifest.version:
            return


def _metadata_is_current(store: Store, manifest: Manifest) -> bool:
    """Whether the last write of `_write_metadata` for this version happened: one request."""
    return _read_if_there(store, "zarr.json") == zarr_metadata(manifest)["zarr.json"]


def _read_if_there(store: Store, key: str) -> bytes | None:
    try:
        return store.read(key)
    except FileNotFoundError:
        return None


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
