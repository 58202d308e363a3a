"""What a harvest would take, before it is run: rows, bytes, objects, requests, GPU hours, cost, break-even.

Nothing is written, no weights are loaded, and little is read: what would take long to read is estimated and
marked so. Counts are exact where the token store is there already. The words are those of docs/planning.md.
"""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import calibrating
from .catalog import Entry, blocks_asked, find_dataset, read_entries
from .corpus import TokenStore, open_tokens
from .driver import Survey, survey
from .errors import SpecError
from .expected import Extent, SiteSize, Stored, expected_sizes, extents
from .manifest import SPLITS, Manifest
from .needs import Needs, worker_needs
from .prices import DEFAULT_GPU, Prices, read_prices
from .progress import format_bytes
from .sampling import SplitSize, estimate_corpus
from .sources import ResolvedCorpus, is_local, locate_corpus, with_revision
from .spec import Spec, dataset_name, digest, shown_source, slug, token_store_name
from .store import Store, open_store

_HASHED_BYTES = 2**29
"""Of weights, and of a local corpus, that are read for a digest: half a second or so."""
_LISTED_FILES = 256  # of a remote corpus, whose ETags may take a request each
_READ_MANIFESTS = 64


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The corpus as sequences."""

    exact: bool
    """Whether they were counted; else they are estimated from a sample."""
    how: str
    """Where the numbers are from."""
    n_tokens: int
    """Put into sequences, BOS left out."""
    splits: dict[str, SplitSize]


@dataclass(frozen=True, kw_only=True)
class Existing:
    """What the root holds of it already."""

    name: str
    certain: bool
    """Found by its identity. False: a digest was not taken, and all else of the identity is the same."""
    version: int
    n_blocks: dict[str, dict[str, int]]
    """By site and split: blocks of the committed prefix."""
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Forward passes of what is missing, and of one pass over all of train without a cache."""

    flops_per_token: float
    parameters: int
    """Weights that a token passes, embeddings left out."""
    blocks: int
    of_blocks: int
    n_tokens: int
    """To be run for what is missing: whole sequences, those in two blocks twice, and the calibration."""
    flops: float
    rate: float | None
    """Tokens a second of one worker; None where nothing is computed."""
    rate_how: str
    gpu: str | None
    """Whose price and peak are assumed; None for a rate measured on CPUs, which has no price here."""
    worker_hours: float
    wall_hours: float
    gpu_hours: float | None
    pass_n_tokens: int
    """Tokens of one pass over the train split without a cache."""
    pass_hours: float
    """Worker hours of that."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Dollars, at assumed prices; None where the rate is of CPUs."""

    harvest: float | None
    write_requests: float
    storage_per_month: float
    months: float
    read_pass: float
    """Requests and egress of one pass over train."""
    recompute_pass: float | None
    break_even_hours: int | None
    """Passes from which on the cache took fewer worker hours than recomputing."""
    break_even_dollars: int | None
    """The same of dollars, with storage for `months`; None: never, or not known."""
    prices: str
    as_of: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan` gives; `as_json` is all of it as plain data."""

    model: str
    corpus: str
    context_size: int
    precision: str
    block_rows: int
    chunk_rows: int
    root: str | None
    name: str | None
    """The dataset's name; None where a digest that enters it was not taken."""
    existing: Existing | None
    tokens: Tokens
    extent: dict[str, Extent]
    sites: dict[str, SiteSize]
    stored: Stored
    compute: Compute
    cost: Cost
    needs: Needs
    """Memory of one worker."""
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return asdict(self)


def plan(
    spec: Spec,
    root: str | None = None,
    *,
    rate: float | None = None,
    gpu: str | None = None,
    mfu: float = 0.4,
    prices: str | os.PathLike[str] | None = None,
    months: float = 1.0,
    workers: int = 1,
    gpus_per_worker: float = 1,
    lm_batch: int = 32,
    buffer_bytes: int = 4 * 2**30,
    storage_options: Mapping[str, Any] | None = None,
) -> Plan:
    """What harvesting `spec` under `root` would take; nothing is written and no weights are loaded.

    Args:
        spec: what would be harvested.
        root: where; what it holds already is taken into account. None: as if it were empty.
        rate: tokens a second of one worker. None: that of a harvest of the same model under `root`, scaled
            by operations; without one, operations over the GPU's peak times `mfu`.
        gpu: a name in the price table. None: `h100`, or none where the rate was measured on CPUs.
        mfu: the share of its peak that the GPU is assumed to reach.
        prices: a TOML file in place of figures of `prices.toml`.
        months: how long the dataset is kept.
        workers: that run side by side; they shorten the time, not the work.
        gpus_per_worker: GPUs that one worker takes.
        lm_batch, buffer_bytes: as of `harvest`; they decide what a worker needs in memory.
        storage_options: for fsspec.

    Raises:
        SpecError, CorpusError: the request cannot be met as written.
        StoreError: the store refused.
    """
    _check(rate, mfu, months, workers, gpus_per_worker)
    table = read_prices(prices)
    table.named(gpu or DEFAULT_GPU)
    found = survey(spec)
    base = None if root is None else open_store(root, storage_options)
    notes: list[str] = []
    corpus = locate_corpus(spec.corpus, storage_options)
    identity = _identity(found, corpus, base is not None, notes)
    entries = [] if base is None else _same_model(base, identity)
    dataset, certain = (None, True) if base is None else _find_dataset(base, identity, entries)
    store = None if base is None else _find_tokens(base, identity, spec.corpus.shown)
    tokens = _tokens(spec, corpus, identity, found, store)
    manifest = dataset.manifest if dataset else None
    extent = extents(
        identity, blocks_asked(spec, found.block_rows), tokens.splits, list(found.widths), manifest, store
    )
    groups = calibrating.site_groups(found.widths, calibrating.ROWS, buffer_bytes)
    train_sequences = tokens.splits["train"].n_sequences
    rates = _Rate(found, table, rate, gpu, mfu, gpus_per_worker, workers, train_sequences, len(groups))
    compute = rates.compute(extent, _to_calibrate(found, manifest), entries, identity, notes)
    sites, stored = expected_sizes(
        identity,
        found.widths,
        tokens.splits,
        extent,
        manifest,
        token_store_there=store is not None,
        wall_s=3600 * compute.wall_hours,
    )
    bits = max(size.bits_per_value[1] for size in sites.values())
    needs = worker_needs(
        found.skeleton, identity, found.widths, bits, lm_batch=lm_batch, buffer_bytes=buffer_bytes
    )
    _note_extent(spec, found, tokens, notes)
    _note_needs(needs, buffer_bytes, lm_batch, notes)
    return Plan(
        model=found.model_id,
        corpus=shown_source(spec.corpus.shown),
        context_size=spec.context_size,
        precision=identity["precision"],
        block_rows=found.block_rows,
        chunk_rows=found.chunk_rows,
        root=root,
        name=None if _unknown(identity) else dataset_name(identity, spec.corpus.shown),
        existing=_existing(dataset, certain),
        tokens=tokens,
        extent=extent,
        sites=sites,
        stored=stored,
        compute=compute,
        cost=_cost(compute, stored, table, months, gpus_per_worker),
        needs=needs,
        notes=tuple(notes),
    )


def _check(rate: float | None, mfu: float, months: float, workers: int, gpus_per_worker: float) -> None:
    if rate is not None and not 1e-3 <= rate < math.inf:
        raise SpecError(f"rate is {rate}; it is in tokens a second and must be at least 0.001")
    if not 1e-3 <= mfu <= 1:
        raise SpecError(f"mfu is {mfu}; it is a share, and must be between 0.001 and 1")
    if not 0 <= months < math.inf or workers < 1 or not 0 < gpus_per_worker < math.inf:
        raise SpecError(
            f"months is {months}, workers {workers} and gpus_per_worker {gpus_per_worker}; "
            "months cannot be negative, workers and GPUs must be positive"
        )


# What there is


def _identity(found: Survey, corpus: ResolvedCorpus, wanted: bool, notes: list[str]) -> dict[str, Any]:
    """The identity; revisions that would take long to find, or that nothing would use, are None."""
    from . import lm

    revision = None
    if wanted:
        revision = lm.cheap_revision(found.spec.model, found.spec.model_revision, _HASHED_BYTES)
        if revision is None:
            notes.append(
                "the model's weights were not hashed: what is there already is matched by all else of the "
                "identity (--model-revision settles it)"
            )
        if corpus.revision is None and _cheap_to_fix(corpus):
            corpus = with_revision(corpus)
        if corpus.revision is None:
            notes.append(
                "the corpus was not read for its digest: what is there already is matched by all else of the identity"
            )
    return found.identity(revision, corpus)


def _cheap_to_fix(corpus: ResolvedCorpus) -> bool:
    """Whether the digest of a corpus's content takes little reading."""
    if is_local(corpus.files[0], corpus.storage_options):
        return sum(os.path.getsize(file.removeprefix("file://")) for file in corpus.files) <= _HASHED_BYTES
    return len(corpus.files) <= _LISTED_FILES


def _unknown(identity: Mapping[str, Any]) -> bool:
    return None in (identity["model"]["revision"], identity["tokens"]["corpus"]["revision"])


def _same(found: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether an identity is ours, as far as ours is known."""
    found = copy.deepcopy(dict(found))
    for part, ours in (
        (found.get("model"), identity.get("model")),
        (found.get("tokens", found).get("corpus"), identity.get("tokens", identity)["corpus"]),
    ):
        if part and ours and ours["revision"] is None:
            part["revision"] = None
    return found == dict(identity)


def _same_model(base: Store, identity: Mapping[str, Any]) -> list[Entry]:
    """Readable datasets of the model, by the beginning of their names; 64 at most."""
    prefix = slug(identity["model"]["id"].replace(":", "/").split("/")[-1])
    names = [name for name in base.folders() if name.startswith(prefix)][:_READ_MANIFESTS]
    entries = [e for e in read_entries(base, names) if e.manifest]
    return [
        e for e in entries if e.manifest and e.manifest.identity["model"]["id"] == identity["model"]["id"]
    ]


def _find_dataset(
    base: Store, identity: Mapping[str, Any], entries: Sequence[Entry]
) -> tuple[Entry | None, bool]:
    """The committed dataset, and whether it is certainly ours."""
    if _unknown(identity):
        return next((e for e in entries if e.manifest and _same(e.manifest.identity, identity)), None), False
    name = find_dataset(base, digest(identity))
    return next((e for e in read_entries(base, [name] if name else []) if e.manifest), None), True


def _find_tokens(base: Store, identity: Mapping[str, Any], source: str) -> TokenStore | None:
    """The token store of this corpus and tokenizer; where the corpus was not read, one that else is the same."""
    wanted = identity["tokens"]
    name = token_store_name(wanted, source)
    names = [name]
    if wanted["corpus"]["revision"] is None:
        names = [n for n in base.folders("tokens") if n[:-12] == name[:-12]][:_READ_MANIFESTS]
    for name in names:
        store = open_tokens(base.sub(f"tokens/{name}"))
        if store is not None and _same(store.identity, wanted):
            return store
    return None


def _existing(entry: Entry | None, certain: bool) -> Existing | None:
    if entry is None or entry.manifest is None:
        return None
    manifest = entry.manifest
    return Existing(
        name=entry.name,
        certain=certain,
        version=manifest.version,
        n_blocks={site: dict(e.n_blocks) for site, e in manifest.sites.items()},
        size_bytes=sum(size.get("size_bytes", 0) for size in manifest.splits.values()),
    )


def _tokens(
    spec: Spec, corpus: ResolvedCorpus, identity: Mapping[str, Any], found: Survey, store: TokenStore | None
) -> Tokens:
    if store is not None:
        return Tokens(
            exact=True,
            how=f"counted in tokens/{store.store.url.rsplit('/', 1)[-1]}",
            n_tokens=sum(split["n_tokens"] for split in store.manifest["splits"].values()),
            splits={
                split: SplitSize(
                    n_documents=store.n_documents(split),
                    n_sequences=store.n_sequences(split),
                    n_rows=store.n_rows(split),
                )
                for split in SPLITS
            },
        )
    sample = estimate_corpus(corpus, identity["tokens"], found.tokenizer)
    share = 100 * sample.sampled_bytes / max(1, sample.total_bytes)
    how = (
        f"estimated from a sample of {sample.n_documents:,} documents of {sample.n_files:,} files "
        f"({share:.2g} % of the bytes)"
    )
    return Tokens(exact=False, how=how, n_tokens=sample.n_tokens, splits=sample.splits)


def _to_calibrate(found: Survey, manifest: Manifest | None) -> bool:
    return any(manifest is None or site not in manifest.sites for site in found.widths)


def _note_extent(spec: Spec, found: Survey, tokens: Tokens, notes: list[str]) -> None:
    rows = tokens.splits["train"].n_rows
    if rows < spec.n_tokens:
        about = "" if tokens.exact else "about "
        notes.append(f"{spec.n_tokens:,} rows were asked for; the corpus gives {about}{rows:,} for training")


def _note_needs(needs: Needs, buffer_bytes: int, lm_batch: int, notes: list[str]) -> None:
    if needs.block_bytes > buffer_bytes:
        notes.append(
            f"one block takes {format_bytes(needs.block_bytes)} in memory, more than the buffer of "
            f"{format_bytes(buffer_bytes)}: lower --block-rows, harvest fewer sites at a time, or give workers the memory"
        )
    if needs.lm_batch < lm_batch:
        notes.append(
            f"a forward pass takes {needs.lm_batch} sequences in place of {lm_batch}: more tokens, or rows of more sites, "
            "than are held at a time (--buffer)"
        )


# Time and money


@dataclass(frozen=True)
class _Rate:
    """How fast a worker is, and what follows."""

    found: Survey
    table: Prices
    given: float | None
    gpu: str | None
    mfu: float
    gpus_per_worker: float
    workers: int
    train_sequences: int
    """That the corpus gives."""
    calibrations: int
    """Passes over the sequences that calibrate: one for each group of sites."""

    def compute(
        self,
        extent: Mapping[str, Extent],
        calibrate: bool,
        entries: Sequence[Entry],
        identity: Mapping[str, Any],
        notes: list[str],
    ) -> Compute:
        """The forward passes of what is to do."""
        from .flops import forward_cost

        T = self.found.spec.context_size
        forward = forward_cost(self.found.skeleton, list(self.found.widths), T)
        if forward.note:
            notes.append(forward.note)
        sequences = sum(e.sequences_to_run for e in extent.values())
        if calibrate and sequences:
            train = extent["train"]
            per_sequence = train.n_rows / max(1, train.n_sequences)
            enough = math.ceil(calibrating.ROWS / max(1.0, per_sequence))
            each = min(self.train_sequences, max(calibrating.sequences_wanted(T), enough))
            sequences += self.calibrations * each
        n_tokens, pass_tokens = sequences * T, extent["train"].n_sequences * T
        rate, how, gpu = self._rate(forward.per_token, entries, identity, notes)
        hours = n_tokens / rate / 3600 if rate else 0.0
        return Compute(
            flops_per_token=forward.per_token,
            parameters=forward.parameters,
            blocks=forward.blocks,
            of_blocks=forward.of_blocks,
            n_tokens=n_tokens,
            flops=n_tokens * forward.per_token,
            rate=rate,
            rate_how=how,
            gpu=gpu,
            worker_hours=hours,
            wall_hours=hours / self.workers,
            gpu_hours=None if gpu is None else hours * self.gpus_per_worker,
            pass_n_tokens=pass_tokens,
            pass_hours=pass_tokens / rate / 3600 if rate else 0.0,
        )

    def _rate(
        self, flops: float, entries: Sequence[Entry], identity: Mapping[str, Any], notes: list[str]
    ) -> tuple[float | None, str, str | None]:
        """Tokens a second of a worker, where that is from, and the GPU."""
        gpu = self.gpu or DEFAULT_GPU
        if self.given is not None:
            return self.given, "given", gpu
        if not flops:
            return None, "nothing is computed before these sites", gpu
        measured = self._measured(flops, entries, identity)
        if measured is not None:
            return measured
        if self.found.spec.lm_dtype == "float32":
            notes.append(
                f"the LM would run in float32, far below the bf16 peak of {gpu}: give --rate, or --lm-dtype bfloat16"
            )
        peak = self.table.named(gpu).peak_tflops * 1e12 * self.mfu * self.gpus_per_worker
        return peak / flops, f"{self.mfu:g} of the bf16 peak of {gpu}, assumed", gpu

    def _measured(
        self, flops: float, entries: Sequence[Entry], identity: Mapping[str, Any]
    ) -> tuple[float, str, str | None] | None:
        """The rate of the longest harvest of this model that the root knows, scaled by operations a token.

        One on CPUs says nothing of a GPU that was named.
        """
        from .flops import forward_cost

        best: tuple[int, float, str, str] | None = None
        for entry in entries:
            manifest = entry.manifest
            assert manifest is not None
            run, model = manifest.provenance, manifest.identity["model"]
            if model["lm_dtype"] != identity["model"]["lm_dtype"] or not run.get("rows_per_s"):
                continue
            device = str(run["device"])
            if device.startswith("cpu") and self.gpu is not None:
                continue
            size = [
                sum(split[name] for split in manifest.splits.values()) for name in ("n_sequences", "n_rows")
            ]
            T = manifest.identity["tokens"]["context_size"]
            theirs = forward_cost(self.found.skeleton, list(manifest.sites), T).per_token
            rate = run["rows_per_s"] / run["workers"] * size[0] * T / size[1] * theirs / flops
            best = max(best or (0, 0.0, "", ""), (run["rows"], rate, device, entry.name))
        if best is None or not best[1]:
            return None
        _, rate, device, name = best
        return (
            rate,
            f"measured on {device} by {name}",
            None if device.startswith("cpu") else self.gpu or DEFAULT_GPU,
        )


def _cost(compute: Compute, stored: Stored, table: Prices, months: float, gpus_per_worker: float) -> Cost:
    """Dollars, and from which pass on the cache has paid."""
    prices = table.storage
    per_hour = None if compute.gpu is None else table.named(compute.gpu).price_per_hour * gpus_per_worker
    write = stored.put_requests / 1000 * prices.put_per_1000
    month = stored.total_bytes / 1e9 * prices.per_gb_month
    read = (
        stored.get_requests_per_pass / 1000 * prices.get_per_1000
        + stored.pass_bytes / 1e9 * prices.egress_per_gb
    )
    harvest = recompute = None
    if per_hour is not None:
        harvest, recompute = compute.worker_hours * per_hour, compute.pass_hours * per_hour
    return Cost(
        harvest=harvest,
        write_requests=write,
        storage_per_month=month,
        months=months,
        read_pass=read,
        recompute_pass=recompute,
        break_even_hours=_passes(compute.worker_hours, compute.pass_hours),
        break_even_dollars=None
        if harvest is None or recompute is None
        else _passes(harvest + write + month * months, recompute - read),
        prices=table.source,
        as_of=table.as_of,
    )


def _passes(once: float, saved_by_each: float) -> int | None:
    """The first pass that brings the savings to what was spent once; None if none does."""
    return max(1, math.ceil(once / saved_by_each)) if saved_by_each > 0 else None
