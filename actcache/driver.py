"""The harvest: plan what is missing, run it on one process or many Ray actors, commit it.

The driver alone writes manifests and `zarr.json`; Harvesters write shards and records. Any of
them may die at any time: the same call again finishes the rest and repeats no committed block.
"""

import importlib.metadata
import logging
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .catalog import blocks_asked, coverage, find_dataset
from .codec import Precision
from .committed import Committed
from .corpus import TokenStore, in_order, open_tokens, tokenise, tokens_identity
from .dispatch import Drain, Monitor, work_off
from .engines import Engine, LocalEngine, Unit
from .errors import Conflict, Drained, HarvestError, SpecError
from .harvester import Job
from .lease import Lease
from .manifest import (
    SPLITS,
    latest_version,
    read_manifest,
    record_key,
)
from .metadata import metadata_is_current, write_metadata
from .probe import require_conditions
from .progress import format_bytes
from .ray_engine import RayEngine, in_a_cluster, ray_map
from .sources import ResolvedCorpus, resolve_corpus
from .spec import FORMAT, Spec, canonical_json, dataset_name, digest, shown_source, token_store_name
from .store import Store, open_store
from .untrusted import MAX_CHUNK_BYTES, readable_chunk

if TYPE_CHECKING:
    from .reader import Dataset

log = logging.getLogger(__name__)

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

    def job(
        self,
        dataset_url: str,
        tokens_url: str,
        storage_options: Mapping[str, Any] | None = None,
        **execution: Any,
    ) -> Job:
        """What its Harvesters are told; `execution` has the fields of `Job` from `lm_batch` on."""
        return Job(
            identity=self.identity,
            dataset_url=dataset_url,
            tokens_url=tokens_url,
            storage_options=dict(storage_options or {}),
            model=self.spec.model,
            model_revision=self.identity["model"]["revision"],
            sites=self.sites,
            **execution,
        )


@dataclass(frozen=True)
class Survey:
    """A Spec against its model's config and tokenizer: what is known before any content is read."""

    spec: Spec
    model_id: str
    skeleton: Any
    """The model's modules on the meta device."""
    tokenizer: Any
    widths: dict[str, int]
    """d_in of each wanted site, in forward order."""
    block_rows: int
    chunk_rows: int

    def identity(self, revision: str | None, corpus: ResolvedCorpus) -> dict[str, Any]:
        """The identity of the dataset; `revision` is the model's."""
        from . import lm

        return {
            "format": FORMAT,
            "model": {"id": self.model_id, "revision": revision, "lm_dtype": self.spec.lm_dtype},
            "tokens": tokens_identity(self.spec, corpus, self.tokenizer, lm.n_embeddings(self.skeleton)),
            "precision": str(Precision.parse(self.spec.precision)),
            "block_rows": self.block_rows,
            "chunk_rows": self.chunk_rows,
            "seed": self.spec.seed,
        }


def survey(spec: Spec) -> Survey:
    """Fix what the model's config and tokenizer decide: block shape, site globs and widths.

    Raises:
        SpecError: unknown model or site, no tokenizer, context size beyond the model's.
    """
    from . import capture, lm

    model_id = lm.model_name(spec.model)
    skeleton = lm.skeleton(spec.model, spec.model_revision)
    config = skeleton.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and spec.context_size > longest:
        raise SpecError(
            f"context_size is {spec.context_size}, but {model_id} takes at most {longest} tokens; lower it"
        )
    tokenizer = lm.load_tokenizer(spec.model, spec.model_revision)
    block_rows, chunk_rows = spec.block_shape(config.hidden_size)
    widths = capture.site_widths(skeleton, capture.resolve_sites(skeleton, list(spec.sites)))
    for site, width in widths.items():
        if not readable_chunk(chunk_rows, width):
            raise SpecError(
                f"chunk_rows is {chunk_rows}: chunks of {site}, {width} wide, would exceed the "
                f"{format_bytes(MAX_CHUNK_BYTES)} that readers take. Lower it, or leave it out"
            )
    return Survey(spec, model_id, skeleton, tokenizer, widths, block_rows, chunk_rows)


def resolve(spec: Spec, storage_options: Mapping[str, Any] | None = None) -> Resolved:
    """Fix what a Spec leaves open: revisions, digests, special tokens, block shape, site globs.

    Reads the corpus's content digest, the model's config and its tokenizer; no weights are loaded
    (a local model's are hashed).

    Raises:
        SpecError: unknown model or site, no tokenizer, context size beyond the model's.
        CorpusError: nothing matches the corpus.
    """
    from . import lm

    found = survey(spec)
    corpus = resolve_corpus(spec.corpus, storage_options)
    _, _, revision = lm.resolve_model(spec.model, spec.model_revision)
    return Resolved(spec, found.identity(revision, corpus), found.widths, corpus, found.tokenizer)


def harvest(
    spec: Spec,
    root: str,
    *,
    workers: int = 1,
    engine: str = "local",
    lm_batch: int = 32,
    device: str = "cpu",
    gpus_per_worker: float = 0,
    attention: str | None = None,
    compile: bool = False,
    buffer_bytes: int = 4 * 2**30,
    placement: Mapping[str, Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> "Dataset":
    """The committed dataset of `spec` under `root`; returns at once when it is already there.

    Only what is missing is computed, so the same call resumes after a crash, and a larger
    `n_tokens` or more sites extend the dataset. A second call for the same dataset, on any machine, waits
    while the first runs, and takes over where it dies. SIGTERM ends it once the blocks in flight are committed.

    Args:
        spec: what to harvest.
        root: a directory or fsspec URL that holds datasets and token stores.
        workers: Harvesters to run; the local engine takes no more than one.
        engine: "ray" (one actor per worker, on the connected or a fresh local cluster) or "local".
        lm_batch: sequences in one forward pass. Never changes which row is where.
        device: of the LM, e.g. "cpu" or "cuda"; "auto" spreads it over the worker's GPUs (accelerate).
        gpus_per_worker: GPUs that Ray reserves for each actor.
        attention: the LM's attention kernel, e.g. "flash_attention_2"; None chooses SDPA where it is right.
        compile: run the LM's blocks through torch.compile. Like the kernel, it perturbs values by rounding.
        buffer_bytes: of rows and codes that a worker may hold; see `Harvester`.
        placement: further options of the Ray actors: `num_cpus`, `memory`, `resources`, `label_selector`.
        storage_options: for fsspec; never stored.
        progress: show bars or lines on standard error.

    Raises:
        SpecError, CorpusError: the request cannot be met as written.
        HarvestError: some blocks failed repeatedly (the newest manifest's provenance lists them), or no
            worker could be started; the rest is committed.
        Drained: SIGTERM came.
        StoreError: the store refused.
    """
    from .reader import open_dataset

    if lm_batch < 1 or buffer_bytes < 1:
        raise SpecError(f"lm_batch is {lm_batch} and buffer_bytes {buffer_bytes}; both must be at least 1")
    engine_of = _engine_of(engine, workers, gpus_per_worker, placement)
    start = time.monotonic()
    resolved = resolve(spec, storage_options)
    base = open_store(root, storage_options)
    found = find_dataset(base, resolved.id)
    name = found or dataset_name(resolved.identity, spec.corpus.shown)
    store = base.sub(name)
    is_there = _is_there(base, store, resolved)
    if not is_there:
        require_conditions(base)  # also shows at once whether the root can be written
    _claim(store, resolved)
    encode = ray_map if engine == "ray" and in_a_cluster() else in_order
    # a hit neither waits for another harvest nor keeps one waiting
    with nullcontext() if is_there else Lease(base, name):
        tokens = tokenise(
            spec,
            resolved.corpus,
            resolved.tokenizer,
            base,
            identity=resolved.identity["tokens"],
            run=encode,
            progress=progress,
        )
        job = resolved.job(
            store.url,
            tokens.store.url,
            storage_options,
            lm_batch=lm_batch,
            device=device,
            attention=attention,
            compile=compile,
            buffer_bytes=buffer_bytes,
        )
        harvest_missing(
            store, resolved, tokens, job, engine_of, start=start, workers=workers, progress=progress
        )
    return open_dataset(store.url, storage_options=storage_options)


def _engine_of(
    engine: str, workers: int, gpus_per_worker: float, placement: Mapping[str, Any] | None
) -> Callable[[Job], Engine]:
    """What makes the engine of that name; nothing is started yet."""
    if engine not in ("ray", "local"):
        raise SpecError(f"engine is {engine!r}; it must be 'ray' or 'local'")
    if workers < 1:
        raise SpecError(f"workers is {workers}; it must be at least 1")
    reserved = {"gpus_per_worker": gpus_per_worker, "num_cpus": (placement or {}).get("num_cpus", 1)}
    for name, amount in reserved.items():
        if not 0 <= amount < math.inf:
            raise SpecError(f"{name} is {amount}; it must be a number of at least 0")
    if engine == "ray":
        return partial(RayEngine, workers=workers, gpus_per_worker=gpus_per_worker, placement=placement)
    if workers > 1:
        raise SpecError(f"workers is {workers}, and the local engine runs one; give engine 'ray' as well")
    return LocalEngine


def _is_there(base: Store, store: Store, resolved: Resolved) -> bool:
    """Whether a version holds all that is asked for."""
    name = token_store_name(resolved.identity["tokens"], resolved.spec.corpus.shown)
    tokens = open_tokens(base.sub(f"tokens/{name}"))
    if tokens is None or not latest_version(store):
        return False
    n_rows = {split: tokens.n_rows(split) for split in SPLITS}
    have, wanted = coverage(read_manifest(store), resolved.spec, resolved.sites, n_rows)
    return have == wanted


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
    source = shown_source(resolved.spec.corpus.shown)
    wanted = blocks_wanted(resolved, tokens)
    state = Committed(store, resolved.identity, source, resolved.widths, wanted)
    missing = state.missing()
    if state.covered():
        assert state.manifest is not None
        if not metadata_is_current(store, state.manifest):
            write_metadata(store, set())  # a driver died between its manifest and the Zarr metadata
        log.info("cache hit: %s holds all that was asked for, nothing to compute", store.url)
        return
    log.info("%s: %d of %d blocks to harvest", store.url, len(missing), sum(wanted.values()))
    with engine_of(job) as pool:
        _run(pool, state, tokens, missing, job, start, workers, progress)


def blocks_wanted(resolved: Resolved, tokens: TokenStore) -> dict[str, int]:
    """Blocks of each split that the Spec asks for and the tokens give."""
    asked = blocks_asked(resolved.spec, resolved.identity["block_rows"])
    return {
        split: min(asked[split], -(-tokens.n_rows(split) // resolved.identity["block_rows"]))
        for split in SPLITS
    }


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
    begun = last_compact = time.monotonic()
    derived: set[str] = set()
    block_rows = state.identity["block_rows"]
    n_rows = sum(min(block_rows, tokens.n_rows(split) - block * block_rows) for split, block, _ in missing)
    n_wanted = sum(state.wanted.values())
    blocks = (n_wanted - len(missing), n_wanted)
    name, metrics = state.store.url.rpartition("/")[2], isinstance(pool, RayEngine)
    with Drain() as drain, Monitor(pool, name, blocks, n_rows, progress, metrics) as monitor:
        for ended in work_off(pool, missing, drain):
            if ended is None:
                monitor.tick()
                continue
            unit, result = ended
            if isinstance(result, BaseException):
                failed.append((unit, result))
                monitor.failed()
                what = str(result) or type(result).__name__
                log.error("block %d of %s set aside: %s", unit[1], unit[0], what)
                continue
            assert result.key == record_key(*unit), f"{result.key} is not the record of {unit}"
            state.add(result)
            monitor.done(result)
            now = time.monotonic()
            if _version_due(now - last_compact, now - begun, state.n_waiting):
                state.commit({}, {})
                write_metadata(state.store, derived)
                last_compact = now
    provenance = {
        **_provenance(job, workers),
        "attention": attention,
        "startup_s": round(begun - start, 3),
        "set_aside": [
            {
                "split": split,
                "block": block,
                "sites": list(sites),
                "error": _shown(error, state.store),
            }
            for (split, block, sites), error in failed
        ],
        **monitor.summary(None if drain.asked else list(state.widths)),
    }
    if missing or state.n_waiting:  # else a run before has committed all, and only losses are missing
        state.commit({}, provenance)  # first: what measuring may meet must not cost what was computed
    write_metadata(state.store, derived)  # always: a run that committed all may have died before this
    if not failed and not drain.asked:
        _measure(pool, state)
    if failed:
        names = ", ".join(f"{u[0]} block {u[1]}" for u, _ in failed[:5])
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise HarvestError(
            f"{len(failed)} of {len(missing)} blocks failed ({names}{more}): {failed[0][1]}. "
            "The rest is committed; run the same command again to retry these"
        ) from failed[0][1]
    if drain.asked and state.missing():
        raise Drained(
            f"stopped by SIGTERM with {len(missing) - len(state.missing())} of {len(missing)} blocks done and "
            "committed; run the same command again for the others"
        )


def _measure(pool: "Engine", state: Committed) -> None:
    """Commit the LM's loss with the stored values of each site that has none yet; warn where it cannot be measured."""
    unmeasured = state.unmeasured()
    if not unmeasured:
        return
    try:
        found = pool.fidelity(unmeasured)
    except Exception as err:
        found = dict.fromkeys(unmeasured, err)
    for site, result in found.items():
        if isinstance(result, Exception):
            log.warning(
                "%s: the LM's loss with stored values could not be measured: %s. All rows are committed; run the same "
                "command again to measure it",
                site,
                " ".join((str(result) or type(result).__name__).split()),
            )
    losses = {site: result for site, result in found.items() if not isinstance(result, Exception)}
    if losses:
        state.commit(losses, {})


def _shown(error: BaseException, store: Store) -> str:
    """The error for the manifest, which travels: without where the store is."""
    return (str(error) or type(error).__name__).replace(f"{store.url}/", "")


def _version_due(waited_s: float, run_s: float, n_waiting: int) -> bool:
    """Whether to commit a version `waited_s` after the last, `run_s` into the run."""
    return n_waiting >= _COMPACT_EVERY_BLOCKS or waited_s > max(
        _COMPACT_EVERY_S, _COMPACT_EVERY_SHARE * run_s
    )


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


def _provenance(job: Job, workers: int) -> dict[str, Any]:
    versions = {}
    for package in ("actcache", "numpy", "torch", "transformers", "zarr", "numcodecs"):
        versions[package] = importlib.metadata.version(package)
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": job.device,
        "compile": job.compile,
        "lm_batch": job.lm_batch,
        "workers": workers,
    }
