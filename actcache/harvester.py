"""A Harvester: one LM that turns blocks of sequences into committed shards.

An ordinary object that runs in any process; `actcache.driver` drives one or many. A block is a
pure function of (identity, split, block number): which rows it holds, and in which order, is
known from the token store before any forward pass. Activations never leave this process except
as encoded shards.
Shapes: B sequences of an LM batch, T tokens, N rows, D = d_in.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .codec import Calibration, Precision, calibrate, decode, encode
from .commit import OTHER_ROOT, BlockCommit, check_adopted
from .corpus import TokenStore, kept_tokens, open_tokens
from .errors import Conflict, NonFiniteActivation
from .layout import calibration_key, create_calibration, read_calibration
from .order import permutation
from .statistics import Statistics, merge
from .store import Store, open_store

CALIBRATION_SEQUENCES = 256
CALIBRATION_ROWS = 65_536
FIDELITY_SEQUENCES = 32


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a Harvester needs, small enough to send anywhere."""

    identity: Mapping[str, Any]
    dataset_url: str
    tokens_url: str
    storage_options: Mapping[str, Any]
    model: str
    """Hub id, local directory or bundled name, as `capture.load_lm` takes it."""
    model_revision: str | None
    sites: tuple[str, ...]
    lm_batch: int
    """Sequences in one forward pass."""
    device: str
    threads: int
    """CPU threads of the LM; 0 leaves torch's default."""


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
    return BlockPlan(split, block, first, last, chosen_ST, place_N, input_ids_ST)


class Harvester:
    """Runs blocks of one dataset. `run_block` may be called from several threads: their forward
    passes take turns, while encoding and uploading of one block overlap the next one's forward."""

    def __init__(self, job: Job) -> None:
        from .capture import load_lm, site_width

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
        )
        self.d_in = {site: site_width(self.lm.model, site) for site in job.sites}
        self._calibrations: dict[str, Calibration] = {}
        self._lm_lock = threading.Lock()

    def calibrate(self) -> None:
        """Create the calibration of every site that has none, from a fixed prefix of the train split."""
        missing = [s for s in self.job.sites if not self.store.exists(calibration_key(s))]
        if not missing:
            return
        row_start = self.tokens.row_start("train")
        n = max(CALIBRATION_SEQUENCES, int(np.searchsorted(row_start, CALIBRATION_ROWS, side="left")))
        n = min(n, self.tokens.n_sequences("train"))
        input_ids_ST, length_S = self.tokens.sequences("train", 0, n)
        kept_ST = kept_tokens(input_ids_ST, length_S, self.tokens.identity["special_token_ids"])
        parts: dict[str, list[np.ndarray]] = {site: [] for site in missing}
        for start, acts in self._forward(input_ids_ST, missing):
            kept = kept_ST[start : start + self.job.lm_batch]
            for site in missing:
                parts[site].append(acts[site][kept])
        for site in missing:
            try:
                calibration = calibrate(np.concatenate(parts.pop(site)), self.precision)
            except NonFiniteActivation as err:
                raise NonFiniteActivation(f"{site}: {err}") from None
            try:
                create_calibration(self.store, calibration, site)
            except Conflict:
                continue  # another harvester was first with another kernel: its calibration holds for all

    def run_block(self, split: str, block: int, sites: Sequence[str]) -> bytes:
        """Compute, store and commit one block for `sites`; returns the record's JSON.

        Raises:
            NonFiniteActivation: names site, sequence and position.
            StoreError: the store refused; nothing of the block is visible.
        """
        plan = plan_block(self.tokens, self.job.identity, split, block)
        widths = {site: self.d_in[site] for site in sites}
        commit = BlockCommit(self.store, self.job.identity, plan, widths)
        codes, scales, statistics = self._encode(plan, sites, {})
        if self.precision.quantised:
            theirs = {}
            for site in sites:
                stored_N = commit.scale(site, scales[site], self.calibration(site).step)
                if not np.array_equal(stored_N, scales[site]):
                    theirs[site] = stored_N
            if theirs:
                theirs_codes, theirs_scales, theirs_statistics = self._encode(plan, list(theirs), theirs)
                codes, scales, statistics = (
                    codes | theirs_codes,
                    scales | theirs_scales,
                    statistics | theirs_statistics,
                )
        stored = {site: commit.codes(site, codes[site]) for site in sites}
        adopted = {site: stored_ND for site, stored_ND in stored.items() if stored_ND is not codes[site]}
        if adopted:
            statistics |= self._measure(plan, adopted, scales)
        commit.tokens(self.tokens)
        return commit.record(statistics)

    def _encode(
        self, plan: BlockPlan, sites: Sequence[str], given: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Statistics]]:
        """Codes, scales and statistics of a block in stored order, by site; at the `given` scales, if any."""
        codes = {s: np.empty((plan.n_rows, self.d_in[s]), self.precision.dtype) for s in sites}
        scales = {s: np.empty(plan.n_rows, np.float32) for s in sites}
        parts: dict[str, list[Statistics]] = {s: [] for s in sites}
        with self._lm_lock:
            for start, chosen, place_N, acts in self._rows(plan, sites):
                for site in sites:
                    calibration = self.calibration(site)
                    rows_ND = acts[site][chosen]
                    given_N = given[site][place_N] if site in given else None
                    try:
                        codes_ND, scale_N = encode(rows_ND, calibration, self.precision, given_N)
                    except NonFiniteActivation as err:
                        raise NonFiniteActivation(_bad_row(err, site, plan, start, chosen, rows_ND)) from None
                    except Conflict as err:
                        raise Conflict(
                            f"{site}, {plan.split} block {plan.block}: {err}; {OTHER_ROOT}"
                        ) from None
                    codes[site][place_N] = codes_ND
                    if scale_N is not None:
                        scales[site][place_N] = scale_N
                    if len(place_N):
                        stored_ND = self._decode(codes_ND, scale_N, calibration)
                        parts[site].append(Statistics.of(rows_ND, stored_ND, scale_N, calibration))
        return codes, scales, {site: merge(parts[site]) for site in sites}

    def _measure(
        self, plan: BlockPlan, codes: Mapping[str, np.ndarray], scales: Mapping[str, np.ndarray]
    ) -> dict[str, Statistics]:
        """Statistics of codes that another run stored, their error that against this run's rows.

        Raises:
            Conflict: they are not of these rows.
        """
        parts: dict[str, list[Statistics]] = {s: [] for s in codes}
        with self._lm_lock:
            for _, chosen, place_N, acts in self._rows(plan, list(codes)):
                for site in codes if len(place_N) else ():
                    calibration = self.calibration(site)
                    scale_N = scales[site][place_N] if self.precision.quantised else None
                    stored_ND = self._decode(codes[site][place_N], scale_N, calibration)
                    parts[site].append(Statistics.of(acts[site][chosen], stored_ND, scale_N, calibration))
        statistics = {site: merge(parts[site]) for site in codes}
        for site, found in statistics.items():
            check_adopted(found, self.calibration(site), f"{site}, {plan.split} block {plan.block}")
        return statistics

    def _rows(
        self, plan: BlockPlan, sites: Sequence[str]
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
        """Yield (first sequence, chosen [B, T], place [n], {site: [B, T, D]}) of each LM batch of a block."""
        done = 0
        for start, acts in self._forward(plan.input_ids_ST, sites):
            chosen = plan.chosen_ST[start : start + self.job.lm_batch]
            count = int(chosen.sum())
            yield start, chosen, plan.place_N[done : done + count], acts
            done += count

    def attention(self) -> str:
        """The attention kernel that the LM runs: provenance."""
        return self.lm.attn_implementation

    def fidelity(self, site: str) -> dict[str, float]:
        """CE of the LM on held-out sequences, clean and with the stored values spliced in at `site`."""
        import torch

        from .capture import splice
        from .loss import next_token_loss

        split = "validation" if self.tokens.n_sequences("validation") else "train"
        n = min(FIDELITY_SEQUENCES, self.tokens.n_sequences(split))
        input_ids_ST, length_S = self.tokens.sequences(split, 0, n)
        kept_ST = kept_tokens(input_ids_ST, length_S, self.tokens.identity["special_token_ids"])
        calibration = self.calibration(site)
        totals = np.zeros(3)
        for i in range(0, n, self.job.lm_batch):
            part = slice(i, i + self.job.lm_batch)
            input_ids_BT = torch.from_numpy(input_ids_ST[part].astype(np.int64)).to(self.job.device)
            kept_BT, length_B = (
                torch.from_numpy(kept_ST[part]),
                torch.from_numpy(length_S[part].astype(np.int64)),
            )

            def stored(acts_BTD: torch.Tensor, kept_BT: torch.Tensor = kept_BT) -> torch.Tensor:
                rows_ND = acts_BTD[kept_BT].float().cpu().numpy()
                codes_ND, scale_N = encode(rows_ND, calibration, self.precision)
                decoded_ND = self._decode(codes_ND, scale_N, calibration)
                out_BTD = acts_BTD.clone()
                out_BTD[kept_BT] = torch.from_numpy(decoded_ND).to(acts_BTD)
                return out_BTD

            with self._lm_lock, torch.inference_mode():
                clean, count = next_token_loss(self.lm.model, input_ids_BT, kept_BT, length_B)
                with splice(self.lm.model, {site: stored}):
                    spliced, _ = next_token_loss(self.lm.model, input_ids_BT, kept_BT, length_B)
            totals += (clean, spliced, count)
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
        return decode(codes_ND, scale_N, calibration.offset_D, self.precision, calibration.rotation_DD)

    def calibration(self, site: str) -> Calibration:
        """The committed calibration of a site."""
        if site not in self._calibrations:
            self._calibrations[site] = read_calibration(self.store, site)
        return self._calibrations[site]

    def _forward(
        self, input_ids_ST: np.ndarray, sites: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yield (first sequence, {site: float32 [B, T, D] numpy}) of each LM batch."""
        import torch

        from .capture import run_capture

        for start in range(0, len(input_ids_ST), self.job.lm_batch):
            batch = input_ids_ST[start : start + self.job.lm_batch].astype(np.int64)
            with torch.inference_mode():
                acts = run_capture(self.lm.model, torch.from_numpy(batch).to(self.job.device), list(sites))
                rows = {site: acts[site].float().cpu().numpy() for site in sites}
            yield start, rows


def _bad_row(
    err: NonFiniteActivation, site: str, plan: BlockPlan, start: int, chosen: np.ndarray, rows_ND: np.ndarray
) -> str:
    """The error again, with the sequence and position of the bad row in place of its number."""
    row = int(np.flatnonzero(~np.isfinite(rows_ND).all(axis=1))[0]) if not np.isfinite(rows_ND).all() else 0
    sequence, position = (int(x[row]) for x in np.nonzero(chosen))
    place = f"{plan.split} sequence {plan.first_sequence + start + sequence}, position {position}"
    return f"{site}, {place}: {err}"
