"""How well a stream mixes: rows of one sequence that meet in a batch, blocks in a batch, and what an SAE makes of it.

Three parts, a JSON line for each figure.

- Partners: the mean number of other rows of a row's own sequence in its batch, for the dataset as its
  stream serves it, and for two simulated ones of 16 M and 1 G rows. A simulated dataset is its plan
  alone: sequences of T kept rows, blocks of R, permuted as docs/format.md says. Only the rows of the
  sampled batches are computed. *Uniform* is what a batch drawn from all rows without replacement gives,
  (B - 1) (E - 1) / (N - 1), where E is the mean over rows of their sequence's number of rows.
- Entropy: of the blocks that a batch's rows come from, in bits, beside that of a uniform draw.
- SAEs: trained on (a) the stream, (b) a full shuffle in memory, (c) rows in the order of the text; the
  FVU on the validation split, per seed. Whether (a) and (b) differ by more than seeds do is a t test
  at 5 %.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import report
from rows import open_or_harvest

import actcache
import sae
from actcache.order import DEFAULT_LANES, Order, default_window, permutation
from actcache.stream import Batch, Rows
from sae.streams import ArrayBatch

BATCH = 4096
EXCESS = 0.25
"""DESIGN, section 6: partners beyond uniform, at most."""
T_975 = {2: 4.303, 4: 2.776, 6: 2.447, 8: 2.306, 10: 2.228, 18: 2.101}
"""Quantiles of Student's t, by degrees of freedom."""
BatchRows = tuple[np.ndarray, np.ndarray]
"""Sequence and block of each row of a batch."""


@dataclass(frozen=True)
class Plan:
    """A dataset as its layout: nothing of it exists."""

    n_rows: int
    context_size: int
    """Rows of a sequence, T; all tokens are kept."""
    block_rows: int = 131_072
    chunk_rows: int = 4096
    seed: int = 0

    def sequences(self, rows_N: np.ndarray) -> np.ndarray:
        """The sequence of each stored row."""
        out_N = np.empty_like(rows_N)
        for block in np.unique(rows_N // self.block_rows).tolist():
            here_N = rows_N // self.block_rows == block
            start = block * self.block_rows
            kept_R = self._kept(block)
            out_N[here_N] = (start + kept_R[rows_N[here_N] - start]) // self.context_size
        return out_N

    def _kept(self, block: int) -> np.ndarray:
        n = min(self.block_rows, self.n_rows - block * self.block_rows)
        return permutation(n, f"rows/{self.seed}/train/{block}")

    def batches(self, seed: int, n_batches: int) -> Iterator[BatchRows]:
        """Some batches of an epoch, evenly spread; each costs its lanes' windows and blocks, whatever N is."""
        window = default_window(BATCH, DEFAULT_LANES, self.context_size, self.block_rows)
        order = Order(
            n_rows=self.n_rows,
            chunk_rows=self.chunk_rows,
            seed=seed,
            epoch=0,
            lanes=DEFAULT_LANES,
            window=window,
        )
        whole = self.n_rows // BATCH
        for t in np.linspace(0, whole - 1, min(n_batches, whole)).astype(int).tolist():
            rows_N = rows_of_batch(order, t)
            yield self.sequences(rows_N), rows_N // self.block_rows


def rows_of_batch(order: Order, t: int) -> np.ndarray:
    """Stored rows of batch t, lane by lane."""
    begin, end = t * BATCH, (t + 1) * BATCH
    parts = []
    for lane in range(order.lanes):
        first = -(-(begin - lane) // order.lanes)
        last = min(-(-(end - lane) // order.lanes), order.lane_rows(lane))
        for window in order.windows(lane, first) if first < last else ():
            if window.start >= last:
                break
            stored_N = order.stored_rows(window)
            parts.append(stored_N[max(first - window.start, 0) : last - window.start])
    rows_N = np.concatenate(parts)
    assert len(rows_N) == end - begin
    return rows_N


def mixing_of(batches: Iterator[BatchRows], uniform: float, n_rows: int, block_rows: int) -> dict[str, Any]:
    """Partners and entropy of some batches, with the standard error of the mean over batches."""
    partners, bits, sizes = [], [], []
    for sequence_N, block_N in batches:
        partners.append(partners_in(sequence_N))
        bits.append(entropy_bits(block_N))
        sizes.append(len(sequence_N))
    mean = float(np.average(partners, weights=sizes))
    error = float(np.std(partners, ddof=1) / np.sqrt(len(partners))) if len(partners) > 1 else 0.0
    rng = np.random.default_rng(0)
    drawn = [entropy_bits(rng.choice(n_rows, BATCH, replace=False) // block_rows) for _ in range(8)]
    return {
        "rows": n_rows,
        "batches": len(partners),
        "partners": round(mean, 4),
        "uniform": round(uniform, 4),
        "excess": round(mean - uniform, 4),
        "standard_error": round(error, 4),
        "wanted_excess": EXCESS,
        "blocks": -(-n_rows // block_rows),
        "block_entropy_bits": round(float(np.mean(bits)), 2),
        "uniform_entropy_bits": round(float(np.mean(drawn)), 2),
    }


def partners_in(sequence_N: np.ndarray) -> float:
    """Mean over rows of the other rows of their sequence."""
    counts = np.unique(sequence_N, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / len(sequence_N))


def entropy_bits(block_N: np.ndarray) -> float:
    """Shannon entropy of the blocks' shares."""
    share = np.unique(block_N, return_counts=True)[1] / len(block_N)
    return float(-(share * np.log2(share)).sum())


def report_partners(dataset: actcache.Dataset, options: argparse.Namespace) -> None:
    """The dataset, as its stream serves it, and the plans."""
    site = dataset.sites[-1]
    rows = dataset.rows(slice(0, dataset.n_rows))
    block_rows = dataset.manifest.identity["block_rows"]
    kept_N = np.sort(_token(rows))  # block b holds the kept tokens [b R, (b + 1) R)

    def served() -> Iterator[BatchRows]:
        for batch in dataset.stream(site, batch_size=BATCH, seed=options.seed):
            yield batch.sequence, np.searchsorted(kept_N, _token(batch)) // block_rows

    lengths = np.bincount(rows.sequence).astype(np.float64)
    own = float((lengths**2).sum() / dataset.n_rows)
    uniform = (BATCH - 1) * (own - 1) / (dataset.n_rows - 1)
    figures = mixing_of(served(), uniform, dataset.n_rows, block_rows)
    report("mixing", part="partners", dataset=dataset.url.rsplit("/", 1)[-1], **figures)
    for n_rows in options.simulated:
        for context_size in options.contexts:
            plan = Plan(n_rows, context_size)
            uniform = (BATCH - 1) * (context_size - 1) / (n_rows - 1)
            batches = plan.batches(options.seed, options.batches)
            figures = mixing_of(batches, uniform, n_rows, plan.block_rows)
            report("mixing", part="partners", dataset="simulated", context_size=context_size, **figures)


def _token(rows: Rows | Batch) -> np.ndarray:
    """One number for each token, in the order of sequences and positions; int64 [N]."""
    return rows.sequence.astype(np.int64) << 32 | rows.position


class InOrder:
    """Rows in memory in a given order, the same every epoch: what reading without a shuffle is."""

    def __init__(self, acts_ND: np.ndarray, order_N: np.ndarray, site: str, stats: Mapping[str, Any]) -> None:
        self.acts_ND, self.order_N, self.sites, self._stats = acts_ND, order_N, [site], stats
        self.n_rows, self.batch_size = len(acts_ND), BATCH

    def stats(self, site: str) -> Mapping[str, Any]:
        return self._stats

    def state(self) -> dict[str, Any]:
        return {}

    def __iter__(self) -> Iterator[ArrayBatch]:
        while True:
            for i in range(0, self.n_rows, BATCH):
                rows = self.order_N[i : i + BATCH]
                yield ArrayBatch({self.sites[0]: self.acts_ND[rows]})


def report_training(dataset: actcache.Dataset, options: argparse.Namespace) -> None:
    """FVU of SAEs of the three arms, by seed."""
    site = dataset.sites[-1]
    rows = dataset.rows(slice(0, dataset.n_rows))
    text_N = np.lexsort((rows.position, rows.sequence))
    acts_ND = dataset.read(site, slice(0, dataset.n_rows))
    held_out = dataset.split("validation")
    held_ND = held_out.read(site, slice(0, min(held_out.n_rows, 65_536)))
    stats = dataset.stats(site)

    def streamed(seed: int) -> Any:
        return dataset.stream(site, batch_size=BATCH, seed=seed, epochs=options.epochs, metadata=False)

    arms: dict[str, Callable[[int], Any]] = {
        "stream": streamed,
        "full_shuffle": lambda seed: sae.ArrayStream(acts_ND, batch_size=BATCH, seed=seed, site=site),
        "unshuffled": lambda seed: InOrder(acts_ND, text_N, site, stats),
    }
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    n_rows = options.epochs * dataset.n_rows
    training = {"n_rows": min(n_rows, options.train_rows or n_rows), "lr": options.lr}
    config = (sae.BatchTopK if options.arch == "batchtopk" else sae.TopK)(d_sae=options.d_sae, k=options.k)
    for seed in range(options.seeds):  # the arms take turns
        for arm, stream in arms.items():
            trained = sae.train(stream(seed), config, sae.Training(seed=seed, **training))[0]
            found[arm].append(fvu(trained, held_ND))
    shared = {"arch": options.arch, "d_sae": options.d_sae, "k": options.k, **training}
    for arm, values in found.items():
        report("mixing", part="training", arm=arm, **shared, **spread(values))
    report("mixing", part="training", arm="stream against full_shuffle", **shared, **compared(found))


@torch.no_grad()
def fvu(trained: sae.SAE, acts_ND: np.ndarray) -> float:
    """Squared error of the reconstructions over the variance of the rows."""
    error = 0.0
    for i in range(0, len(acts_ND), BATCH):
        x_ND = torch.from_numpy(acts_ND[i : i + BATCH])
        error += float((trained(x_ND) - x_ND).double().square().sum())
    return error / float(((acts_ND - acts_ND.mean(0, dtype=np.float64)) ** 2).sum())


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {
        "fvu_mean": round(statistics.fmean(values), 6),
        "fvu_sd": round(sd, 6),
        "fvu": [round(v, 6) for v in values],
    }


def compared(found: Mapping[str, list[float]]) -> dict[str, Any]:
    """Whether stream and full shuffle differ by more than seeds do; nothing to say of one seed."""
    a, b = found["stream"], found["full_shuffle"]
    n = len(a)
    if n < 2:
        return {"within_seed_noise": None, "why": "one seed has no spread; give --seeds 2 or more"}
    error = ((statistics.variance(a) + statistics.variance(b)) / n) ** 0.5
    t = (statistics.fmean(a) - statistics.fmean(b)) / error
    return {
        "difference": round(statistics.fmean(a) - statistics.fmean(b), 6),
        "standard_error": round(error, 6),
        "t": round(t, 2),
        "within_seed_noise": abs(t) <= T_975.get(2 * n - 2, 2.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", help="URL, e.g. demo-out/datasets/NAME; one is harvested by default")
    parser.add_argument("--work", type=Path, default=Path("mixing-data"), help="where it is harvested to")
    parser.add_argument("--rows", type=int, default=2_000_000, help="rows to harvest")
    parser.add_argument("--part", choices=("partners", "training"), help="both by default")
    parser.add_argument("--seed", type=int, default=0, help="of the order, in partners")
    parser.add_argument("--simulated", type=int, nargs="*", default=[2**24, 10**9], help="rows of the plans")
    parser.add_argument("--contexts", type=int, nargs="*", default=[256, 2048], help="rows of a sequence")
    parser.add_argument("--batches", type=int, default=64, help="sampled of each plan")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--train-rows", type=int, help="stop each SAE after so many; all epochs by default")
    parser.add_argument("--arch", choices=("topk", "batchtopk"), default="batchtopk")
    parser.add_argument("--d-sae", type=int, default=1536)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    options = parser.parse_args()
    dataset = open_or_harvest(options.dataset, options.work, options.rows)
    if options.part != "training":
        report_partners(dataset, options)
    if options.part != "partners":
        report_training(dataset, options)


if __name__ == "__main__":
    main()
