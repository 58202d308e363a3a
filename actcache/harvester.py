"""A Harvester: one LM that turns blocks of sequences into committed shards.

An ordinary object that runs in any process; `actcache.driver` drives one or many. A block is a
pure function of (identity, split, block number): which rows it holds, and in which order, is
known from the token store before any forward pass. Activations never leave this process except
as encoded shards.
Shapes: B sequences of an LM batch, T tokens, N rows, D = d_in.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from . import calibrating
from .codec import Calibration, Precision, calibrate, decode, encode
from .commit import OTHER_ROOT, BlockCommit, check_adopted
from .corpus import TokenStore, kept_tokens, open_tokens
from .errors import Conflict, HarvestError, NonFiniteActivation, SpecError
from .layout import (
    calibration_json,
    calibration_key,
    create_calibration,
    read_calibration,
    rotation_bytes,
    rotation_key,
)
from .manifest import BlockRecord
from .order import permutation
from .overlap import Room, Times, ahead
from .statistics import Statistics, merge
from .store import Store, open_store

if TYPE_CHECKING:
    from .device import DeviceCodec

T = TypeVar("T")

log = logging.getLogger(__name__)

FIDELITY_SEQUENCES = 32
LM_BATCH_TOKENS = 65_536
"""The most of one forward pass: no LM gains by more, and its own temporaries grow with them."""
_BATCH_SHARE = 4  # the rows of three LM batches take at most this part of the buffer


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a Harvester needs, small enough to send anywhere."""

    identity: Mapping[str, Any]
    dataset_url: str
    tokens_url: str
    storage_options: Mapping[str, Any]
    model: str
    """Hub id, local directory or bundled name, as `lm.load_lm` takes it."""
    model_revision: str | None
    sites: tuple[str, ...]
    lm_batch: int
    """Sequences in one forward pass, at most: see `Harvester.batch_of`."""
    device: str = "cpu"
    """Of the LM, as torch names it; "auto" spreads it over the GPUs."""
    threads: int = 0
    """CPU threads of the LM; 0 leaves torch's default."""
    attention: str | None = None
    """Attention kernel, such as flash_attention_2; None: as `lm.load_lm` chooses."""
    compile: bool = False
    """Run the LM's blocks through `torch.compile`; values change by rounding."""
    buffer_bytes: int = 4 * 2**30
    """Rows and codes of blocks under way that this Harvester may hold; one block always goes."""
    uploads: int = 8
    """Objects that this Harvester compresses and writes at a time; 1 writes them one after the other."""


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Which rows a block holds, from tokens alone, in stored order."""

    split: str
    block: int
    first_sequence: int
    last_sequence: int
    """One past the block's last sequence."""
    chosen_ST: np.ndarray
    """bool [S, T] over its sequences: the tokens that are this block's rows."""
    place_N: np.ndarray
    """int64 [N]: stored row of each chosen token, in reading order."""
    input_ids_ST: np.ndarray
    position_ids_ST: np.ndarray | None
    """Where documents of one sequence are kept apart (packing `isolated`)."""
    length_S: np.ndarray

    @property
    def n_rows(self) -> int:
        return len(self.place_N)


def plan_block(tokens: TokenStore, identity: Mapping[str, Any], split: str, block: int) -> BlockPlan:
    """The rows [b*R, (b+1)*R) of a split's kept tokens, and their places after the permutation."""
    block_rows = identity["block_rows"]
    row_start = tokens.row_start(split)
    begin, end = block * block_rows, min((block + 1) * block_rows, int(row_start[-1]))
    assert begin < end, f"block {block} of {split} lies past the last row"
    first = int(np.searchsorted(row_start, begin, side="right")) - 1
    last = int(np.searchsorted(row_start, end, side="left"))
    input_ids_ST, length_S = tokens.sequences(split, first, last)
    chosen_ST = kept_tokens(input_ids_ST, length_S, tokens.identity["special_token_ids"])
    row_N = row_start[first] + np.arange(int(chosen_ST.sum()))
    chosen_ST[chosen_ST] = (row_N >= begin) & (row_N < end)
    order_N = permutation(end - begin, "rows", identity["seed"], split, block)
    place_N = np.empty_like(order_N)
    place_N[order_N] = np.arange(len(order_N))
    position_ids_ST = tokens.position_ids(split, first, last)
    return BlockPlan(split, block, first, last, chosen_ST, place_N, input_ids_ST, position_ids_ST, length_S)


def batch_size(lm_batch: int, context_size: int, width: int, buffer_bytes: int) -> int:
    """Sequences in a forward pass: at most `lm_batch`, 65,536 tokens, and three batches of float32 rows (all that
    exist at a time, `width` values a token) in a quarter of the buffer; at least one."""
    by_bytes = buffer_bytes // (_BATCH_SHARE * 3 * 4 * context_size * width)
    return max(1, min(lm_batch, LM_BATCH_TOKENS // context_size, by_bytes))


class Harvester:
    """Runs blocks of one dataset. `run_block` may be called from several threads: their forward
    passes take turns, while encoding and uploading of one block overlap the next one's forward.

    Memory: the LM, and per block under way its codes and three LM batches of float32 rows, within
    `Job.buffer_bytes` in all.
    """

    on_device = False
    """Whether rows are quantised where the LM runs; `_forward` then yields tensors."""

    def __init__(self, job: Job) -> None:
        from .capture import compile_around, site_width
        from .lm import load_lm

        self.job = job
        if job.threads:
            import torch

            torch.set_num_threads(job.threads)
        self.store: Store = open_store(job.dataset_url, job.storage_options)
        tokens = open_tokens(open_store(job.tokens_url, job.storage_options))
        assert tokens is not None, "the driver opens or builds the token store first"
        self.tokens = tokens
        self.precision = Precision.parse(job.identity["precision"])
        self.lm = load_lm(
            job.model,
            revision=job.model_revision,
            lm_dtype=job.identity["model"]["lm_dtype"],
            device=job.device,
            attn_implementation=job.attention,
        )
        self.on_device = self.lm.device.startswith("cuda")
        self.d_in = {site: site_width(self.lm.model, site) for site in job.sites}
        self._start()
        self._check_isolation()
        if job.compile:
            compile_around(self.lm.model, job.sites)

    def _start(self) -> None:
        """What changes while it runs."""
        self.lm_batch = self.job.lm_batch
        """Sequences in a forward pass from now on: halved whenever the device has no memory for them."""
        self.times = Times()
        self._calibrations: dict[str, Calibration] = {}
        self._codecs: dict[str, DeviceCodec] = {}
        self._held: dict[str, tuple[bytes, str | None]] = {}
        """Bytes of the calibrations in use, and the key of the rotation if they have one."""
        self._lm_lock = threading.Lock()
        self._lm_thread = ThreadPoolExecutor(1, thread_name_prefix="lm")
        self._uploads = ThreadPoolExecutor(self.job.uploads, thread_name_prefix="upload")
        self._room = Room(self.job.buffer_bytes)

    def _check_isolation(self) -> None:
        """Refuse a kernel that mixes documents of one sequence, if they are to stay apart.

        Each worker does so when it starts: the calibration, which is made once, says nothing of the kernels, GPUs and
        versions of those who come later.
        """
        if self.tokens.identity["packing"] != "isolated":
            return
        from .capture import check_isolation

        n = min(64, self.tokens.n_sequences("train"))
        input_ids_ST, length_S = self.tokens.sequences("train", 0, n)
        kept_ST = kept_tokens(input_ids_ST, length_S, self.tokens.identity["special_token_ids"])
        sites = self.job.sites  # in forward order; what mixes somewhere shows in all that comes after it
        chosen = dict.fromkeys((sites[0], sites[len(sites) // 2], sites[-1]))

        def check(lm_batch: int) -> None:
            check_isolation(
                self.lm.model,
                list(chosen),
                context_size=self.tokens.context_size,
                lm_batch=lm_batch,
                causal=self.lm.is_causal,
                token_ids=np.unique(input_ids_ST[kept_ST]).tolist(),
            )

        self._fitting(check)

    def close(self) -> None:
        """End the threads."""
        self._lm_thread.shutdown()
        self._uploads.shutdown()

    def calibrate(self) -> None:
        """Create the calibration of every site that has none, from rows drawn over the first sequences of train.

        The rows of as many sites at a time as the buffer holds; each group of sites is a pass over these
        sequences.
        """
        missing = [s for s in self.job.sites if not self.store.exists(calibration_key(s))]
        if not missing:
            return
        n = calibrating.n_sequences(self.tokens.row_start("train"), self.tokens.context_size)
        input_ids_ST, length_S = self.tokens.sequences("train", 0, n)
        position_ids_ST = self.tokens.position_ids("train", 0, n)
        kept_ST = kept_tokens(input_ids_ST, length_S, self.tokens.identity["special_token_ids"])
        drawn_ST = calibrating.draw(kept_ST, self.tokens.identity["seed"])
        widths = {site: self.d_in[site] for site in missing}
        for sites in calibrating.site_groups(widths, int(drawn_ST.sum()), self.job.buffer_bytes):
            gathered = calibrating.Gathered(sites, widths, drawn_ST)
            for start, acts in self._forward(input_ids_ST, sites, length_S, position_ids_ST):
                gathered.add(start, acts)
            self._at_once(partial(self._calibrate, gathered), sites)

    def _calibrate(self, gathered: calibrating.Gathered, site: str) -> None:
        """Create the calibration of a site from its rows."""
        try:
            calibration = calibrate(gathered.pop(site), self.precision)
        except NonFiniteActivation as err:
            raise NonFiniteActivation(f"{site}: {err}") from None
        except SpecError as err:
            raise SpecError(f"{site}: {err}") from None
        with suppress(Conflict):  # another harvester was first with another kernel: its own holds for all
            create_calibration(self.store, calibration, site)

    def run_block(self, split: str, block: int, sites: Sequence[str]) -> BlockRecord:
        """Compute, store and commit one block for `sites`; returns the record that holds.

        Raises:
            NonFiniteActivation: names site, sequence and position.
            StoreError: the store refused; nothing of the block is visible.
        """
        plan = plan_block(self.tokens, self.job.identity, split, block)
        start = time.perf_counter()
        with self._room.taken(self._block_bytes(plan, sites)):
            self.times.add(behind_store_s=time.perf_counter() - start)
            return self._run_block(plan, sites)

    def _block_bytes(self, plan: BlockPlan, sites: Sequence[str]) -> int:
        """Of a block's codes and of the three LM batches of float32 rows that exist at a time."""
        width = sum(self.d_in[site] for site in sites)
        in_batches = 3 * min(self.batch_of(sites), len(plan.length_S)) * plan.input_ids_ST.shape[1] * 4
        return width * (plan.n_rows * self.precision.dtype.itemsize + in_batches)

    def batch_of(self, sites: Sequence[str]) -> int:
        """Sequences in a forward pass for these sites: `lm_batch`, fewer where these are long or the sites many."""
        width = sum(self.d_in[site] for site in sites)
        return batch_size(self.lm_batch, self.tokens.context_size, width, self.job.buffer_bytes)

    def _run_block(self, plan: BlockPlan, sites: Sequence[str]) -> BlockRecord:
        widths = {site: self.d_in[site] for site in sites}
        commit = BlockCommit(self.store, self.job.identity, plan, widths, self._at_once)
        codes, scales, statistics = self._encode(plan, sites, {})
        with self.times.taking("store_s"):
            if self.precision.quantised:
                stored = self._at_once(
                    lambda site: commit.scale(site, scales[site], self.calibration(site).step), sites
                )
                theirs = {
                    site: stored_N
                    for site, stored_N in zip(sites, stored, strict=True)
                    if not np.array_equal(stored_N, scales[site])
                }
                if theirs:
                    again = self._encode(plan, list(theirs), theirs)
                    codes, scales, statistics = codes | again[0], scales | again[1], statistics | again[2]
            stored = self._at_once(lambda site: commit.codes(site, codes[site]), sites)
            adopted = {
                site: stored_ND
                for site, stored_ND in zip(sites, stored, strict=True)
                if stored_ND is not codes[site]
            }
            if adopted:
                statistics |= self._measure(plan, adopted, scales)
            self._at_once(lambda write: write(), commit.tokens(self.tokens))
            self._at_once(self._hold_calibration, sites)
            record = commit.record(statistics)
            self._at_once(self._hold_calibration, sites)
        self.times.add(blocks=1, rows=plan.n_rows, bytes=commit.size_bytes)
        return record

    def _hold_calibration(self, site: str) -> None:
        """The calibration that the block was encoded with is there: a collector may have removed it meanwhile.

        Raises:
            Conflict: another one was made since; the block's codes would be read by it.
        """
        calibration = self.calibration(site)
        if site not in self._held:
            rotation = rotation_bytes(calibration)
            sha256 = None if rotation is None else hashlib.sha256(rotation).hexdigest()
            self._held[site] = calibration_json(calibration, site), sha256 and rotation_key(site, sha256)
        key, (ours, rotation_at) = calibration_key(site), self._held[site]
        try:
            there = self.store.read(key)
        except FileNotFoundError:
            there = None
        if there is None or (rotation_at and not self.store.exists(rotation_at)):
            log.warning("%s/%s vanished while it was in use; writing it again", self.store.url, key)
            with suppress(Conflict):  # another writer was first: looked at below
                create_calibration(self.store, calibration, site)
            there = self.store.read(key)
        if there != ours:
            for known in (self._calibrations, self._codecs, self._held):
                known.pop(site, None)
            raise Conflict(
                f"{self.store.url}/{key} is not the one that this block was encoded with: it was removed and made anew. "
                "The block is computed again"
            )

    def _at_once(self, work: Callable[[T], Any], items: Sequence[T]) -> list[Any]:
        """`work` on each, in the upload threads; every one has ended before the first error is raised."""
        if self.job.uploads == 1:
            return [work(item) for item in items]
        running = [self._uploads.submit(work, item) for item in items]
        errors = [future.exception() for future in running]
        for error in errors:
            if error is not None:
                raise error
        return [future.result() for future in running]

    def _encode(
        self, plan: BlockPlan, sites: Sequence[str], given: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Statistics]]:
        """Codes, scales and statistics of a block in stored order, by site; at the `given` scales, if any."""
        if self.on_device:
            return self._encode_on_device(plan, sites, given)
        codes = {s: np.empty((plan.n_rows, self.d_in[s]), self.precision.dtype) for s in sites}
        scales = {s: np.empty(plan.n_rows, np.float32) for s in sites}
        parts: dict[str, list[Statistics]] = {s: [] for s in sites}
        with closing(self._rows(plan, sites)) as batches:
            for start, chosen, place_N, acts in batches:
                for site in sites if len(place_N) else ():
                    given_N = given[site][place_N] if site in given else None
                    with self.times.taking("encode_s"), _naming(site, plan, start, chosen):
                        codes_ND, scale_N, found = self._encode_rows(site, acts[site][chosen], given_N)
                        codes[site][place_N] = codes_ND
                        if scale_N is not None:
                            scales[site][place_N] = scale_N
                        parts[site].append(found)
        return codes, scales, {site: merge(parts[site]) for site in sites}

    def _encode_on_device(
        self, plan: BlockPlan, sites: Sequence[str], given: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Statistics]]:
        """As `_encode`; rows stay where the LM made them. A batch is waited for once the next is queued."""
        from .device import BlockRows, DeviceCodec, to_device

        for site in sites:
            if site not in self._codecs:
                self._codecs[site] = DeviceCodec(self.calibration(site), self.precision, self.lm.device)
        blocks = {s: BlockRows(self._codecs[s], plan.n_rows, self.d_in[s]) for s in sites}
        parts: dict[str, list[Statistics]] = {s: [] for s in sites}

        def finish(start: int, chosen: np.ndarray, place_N: np.ndarray, queued: Mapping[str, Any]) -> None:
            place = to_device(place_N, self.lm.device)
            for site, encoding in queued.items():
                with _naming(site, plan, start, chosen):
                    parts[site].append(encoding.finish())
                blocks[site].put(place, encoding)

        before = None
        with closing(self._rows(plan, sites)) as batches:
            for start, chosen, place_N, acts in batches:
                if not len(place_N):
                    continue
                with self.times.taking("encode_s"):
                    row_N = to_device(np.flatnonzero(chosen), self.lm.device)
                    queued = {
                        s: self._codecs[s].encode(
                            acts[s].flatten(0, 1).index_select(0, row_N),
                            given[s][place_N] if s in given else None,
                        )
                        for s in sites
                    }
                    if before is not None:
                        finish(*before)
                    before = start, chosen, place_N, queued
        assert before is not None, "a block has rows"
        finish(*before)
        for block in blocks.values():
            block.start_copy()
        stored = {site: blocks[site].wait() for site in sites}
        codes = {site: codes_ND for site, (codes_ND, _) in stored.items()}
        scales = {site: scale_N for site, (_, scale_N) in stored.items() if scale_N is not None}
        return codes, scales, {site: merge(parts[site]) for site in sites}

    def _encode_rows(
        self, site: str, rows_ND: np.ndarray, given_N: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None, Statistics]:
        """Codes, scales and statistics of rows in reading order."""
        calibration = self.calibration(site)
        codes_ND, scale_N = encode(rows_ND, calibration, self.precision, given_N)
        stored_ND = self._decode(codes_ND, scale_N, calibration)
        return codes_ND, scale_N, Statistics.of(rows_ND, stored_ND, scale_N, calibration)

    def _measure(
        self, plan: BlockPlan, codes: Mapping[str, np.ndarray], scales: Mapping[str, np.ndarray]
    ) -> dict[str, Statistics]:
        """Statistics of codes that another run stored, their error that against this run's rows.

        Raises:
            Conflict: they are not of these rows.
        """
        parts: dict[str, list[Statistics]] = {s: [] for s in codes}
        with closing(self._rows(plan, list(codes))) as batches:
            for _, chosen, place_N, acts in batches:
                for site in codes if len(place_N) else ():
                    calibration = self.calibration(site)
                    scale_N = scales[site][place_N] if self.precision.quantised else None
                    stored_ND = self._decode(codes[site][place_N], scale_N, calibration)
                    rows_ND = _on_host(acts[site])[chosen]
                    parts[site].append(Statistics.of(rows_ND, stored_ND, scale_N, calibration))
        statistics = {site: merge(parts[site]) for site in codes}
        for site, found in statistics.items():
            check_adopted(found, self.calibration(site), f"{site}, {plan.split} block {plan.block}")
        return statistics

    def _rows(
        self, plan: BlockPlan, sites: Sequence[str]
    ) -> Generator[tuple[int, np.ndarray, np.ndarray, dict[str, Any]], None, None]:
        """Yield (first sequence, chosen [B, T], place [n], {site: [B, T, D]}) of each LM batch of a block.

        The LM is one batch ahead, in a thread of its own.
        """
        batches = self._forward(plan.input_ids_ST, sites, plan.length_S, plan.position_ids_ST)
        done = 0

        def waited(seconds: float) -> None:
            self.times.add(behind_encode_s=seconds)

        with closing(ahead(self._timed(batches), self._lm_thread, waited)) as made:
            for start, acts in made:
                chosen = plan.chosen_ST[start : start + len(acts[sites[0]])]
                count = int(chosen.sum())
                yield start, chosen, plan.place_N[done : done + count], acts
                done += count

    def _timed(self, batches: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The same; the LM is nobody else's meanwhile, and its time is counted."""
        with self._lm_lock:
            while True:
                with self.times.taking("forward_s"):
                    batch = next(batches, None)
                if batch is None:
                    return
                first = next(iter(batch[1].values()))
                self.times.add(tokens=first.shape[0] * first.shape[1])
                yield batch

    def attention(self) -> str:
        """The attention kernel that the LM runs: provenance."""
        return self.lm.attn_implementation

    def fidelity(self, site: str) -> dict[str, float | None]:
        """CE of the LM on held-out sequences, clean and with the stored values spliced in at `site`.

        The losses of an LM that predicts no next token (an encoder, a body without unembedding) are None, and so are
        losses that are no number and those of sequences without a next token.
        """
        unknown: dict[str, float | None] = {
            "ce_clean": None,
            "ce_stored": None,
            "ce_change": None,
            "n_tokens": 0,
        }
        if not self.lm.predicts_next_token:
            return unknown
        import torch

        from .capture import splice
        from .loss import next_token_loss

        split = "validation" if self.tokens.n_sequences("validation") else "train"
        n = min(FIDELITY_SEQUENCES, self.tokens.n_sequences(split))
        input_ids_ST, length_S = self.tokens.sequences(split, 0, n)
        kept_ST = kept_tokens(input_ids_ST, length_S, self.tokens.identity["special_token_ids"])
        position_ids_ST = self.tokens.position_ids(split, 0, n)
        calibration = self.calibration(site)

        def stored(kept_BT: torch.Tensor, acts_BTD: torch.Tensor) -> torch.Tensor:
            rows_ND = acts_BTD[kept_BT].float().cpu().numpy()
            codes_ND, scale_N = encode(rows_ND, calibration, self.precision)
            out_BTD = acts_BTD.clone()
            out_BTD[kept_BT] = torch.from_numpy(self._decode(codes_ND, scale_N, calibration)).to(acts_BTD)
            return out_BTD

        def losses(start: int, size: int) -> tuple[int, float, float, int]:
            part = slice(start, start + size)
            input_ids_BT = torch.from_numpy(input_ids_ST[part].astype(np.int64)).to(self.lm.device)
            kept_BT = torch.from_numpy(kept_ST[part])
            length_B = torch.from_numpy(length_S[part].astype(np.int64))
            positions_BT = None
            if position_ids_ST is not None:
                positions_BT = torch.from_numpy(position_ids_ST[part]).to(self.lm.device)
            batch = (input_ids_BT, kept_BT, length_B, positions_BT)
            with self._lm_lock, torch.inference_mode():
                clean, count = next_token_loss(self.lm.model, *batch)
                with splice(self.lm.model, {site: partial(stored, kept_BT)}):
                    spliced, _ = next_token_loss(self.lm.model, *batch)
            return len(input_ids_BT), clean, spliced, count

        totals, start = np.zeros(3), 0
        while start < n:
            done, *sums = self._fitting(partial(losses, start))
            totals += sums
            start += done
        if not totals[2] or not np.isfinite(totals).all():
            log.warning(
                "%s: the LM's loss on %d tokens is %s; it is noted as unknown", site, totals[2], totals[:2]
            )
            return unknown
        clean_ce, stored_ce = totals[:2] / totals[2]
        return {
            "ce_clean": float(clean_ce),
            "ce_stored": float(stored_ce),
            "ce_change": float(stored_ce - clean_ce),
            "n_tokens": float(totals[2]),
        }

    def _decode(
        self, codes_ND: np.ndarray, scale_N: np.ndarray | None, calibration: Calibration
    ) -> np.ndarray:
        """The rows that readers will see."""
        return decode(codes_ND, scale_N, calibration, self.precision)

    def calibration(self, site: str) -> Calibration:
        """The committed calibration of a site."""
        if site not in self._calibrations:
            self._calibrations[site] = read_calibration(self.store, site)
        return self._calibrations[site]

    def _forward(
        self,
        input_ids_ST: np.ndarray,
        sites: Sequence[str],
        length_S: np.ndarray,
        position_ids_ST: np.ndarray | None = None,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (first sequence, {site: [B, T, D]}) of each LM batch: float32 numpy, tensors if `on_device`.

        Padding is on the right: a causal LM's rows cannot see it, from any other it is masked.
        """
        import torch

        from .capture import run_capture

        def run(start: int, n: int) -> dict[str, Any]:
            part = slice(start, start + n)
            ids_BT = torch.from_numpy(input_ids_ST[part].astype(np.int64)).to(self.lm.device)
            inside_BT = None
            if not self.lm.is_causal:
                inside_BT = torch.from_numpy(np.arange(ids_BT.shape[1]) < length_S[part, None]).long()
                inside_BT = inside_BT.to(self.lm.device)
            positions_BT = None
            if position_ids_ST is not None:
                positions_BT = torch.from_numpy(position_ids_ST[part]).to(self.lm.device)
            with torch.inference_mode():
                acts = run_capture(self.lm.model, ids_BT, list(sites), inside_BT, positions_BT)
                return acts if self.on_device else {s: _on_host(acts[s]) for s in sites}

        start = 0
        while start < len(input_ids_ST):
            rows = self._fitting(partial(run, start), self.batch_of(sites))
            yield start, rows
            start += len(rows[sites[0]])

    def _fitting(self, run: Callable[[int], T], most: int | None = None) -> T:
        """`run(lm_batch)`, or `run(most)` if that is less; halved as often as the device runs out of memory.

        Raises:
            HarvestError: it has no memory for one sequence.
        """
        import torch

        while True:
            batch = min(self.lm_batch, most or self.lm_batch)
            try:
                return run(batch)
            except torch.OutOfMemoryError as err:
                if batch == 1:
                    raise HarvestError(
                        f"{self.job.device} has no memory for one sequence of {self.tokens.identity['context_size']} "
                        f"tokens ({str(err).splitlines()[0]}). Use a smaller context_size or lm_dtype, or more GPUs "
                        "a worker with device 'auto'"
                    ) from err
            # outside the handler: the error's traceback holds the tensors of the pass that failed
            self.lm_batch = batch // 2
            log.warning(
                "the device has no memory for this LM batch; going on with %d sequences", self.lm_batch
            )
            torch.cuda.empty_cache()

    def bare_tokens_per_s(self, sites: Sequence[str], seconds: float) -> float:
        """Tokens/s of forward passes that stop where a harvest's do and keep nothing; for about `seconds`."""
        import torch

        from .capture import run_capture

        n = min(self.batch_of(sites), self.tokens.n_sequences("train"))
        input_ids_ST, _ = self.tokens.sequences("train", 0, n)
        ids_BT = torch.from_numpy(input_ids_ST.astype(np.int64)).to(self.lm.device)

        def passed() -> float:
            start = time.perf_counter()
            run_capture(self.lm.model, ids_BT, list(sites))
            if ids_BT.is_cuda:
                torch.cuda.synchronize()
            return time.perf_counter() - start

        with self._lm_lock, torch.inference_mode():
            passed()  # warm
            taken = [passed()]
            while sum(taken) < seconds:
                taken.append(passed())
        return ids_BT.numel() / float(np.median(taken))


def _on_host(acts: Any) -> np.ndarray:
    """float32 numpy of a tensor; a 16-bit LM's rows leave the device in two bytes a value."""
    return acts if isinstance(acts, np.ndarray) else acts.cpu().float().numpy()


@contextmanager
def _naming(site: str, plan: BlockPlan, start: int, chosen: np.ndarray) -> Iterator[None]:
    """Errors inside tell of which site, sequence and position, or block, they are."""
    try:
        yield
    except NonFiniteActivation as err:
        sequence, position = (int(x[err.row]) for x in np.nonzero(chosen))
        place = f"{plan.split} sequence {plan.first_sequence + start + sequence}, position {position}"
        raise NonFiniteActivation(f"{site}, {place}: {err}") from None
    except Conflict as err:
        raise Conflict(f"{site}, {plan.split} block {plan.block}: {err}; {OTHER_ROOT}") from None
