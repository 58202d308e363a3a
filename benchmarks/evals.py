"""Rows per second of an evaluation from shards against encoding the same rows and nothing else.

    python benchmarks/evals.py --data data/NAME --sae runs/x/topk-6144-32 [--rows 131072] [--pairs 5]

The reference is `s.encode` over rows that are already in memory, in chunks of the size evaluation uses.
The evaluation reads, decodes and orders the stored rows and sums every figure that needs no LM. They run in
turns in one process; the ratio is the median over pairs. Target: at least 0.8. One JSON line.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from hardware import report

import actcache
import sae
from sae.evals.evaluation import _references
from sae.evals.row_pass import chunk_rows, empty_sums, rows_tensor
from sae.evals.workers import EvalJob, LocalPool


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="dataset URL")
    parser.add_argument("--sae", required=True, help="SAE directory")
    parser.add_argument("--split", default="train")
    parser.add_argument("--rows", type=int, default=131_072)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    s, ds = sae.load(options.sae).eval(), actcache.open(options.data)
    view = ds.split(options.split)
    n_rows = min(options.rows, view.n_rows)
    rows = rows_tensor(view.read(s.cfg["site"], slice(0, n_rows)))
    job = EvalJob(
        saes=[s],
        ds=ds,
        split=options.split,
        n_rows=n_rows,
        model=None,
        references=_references(ds, [s.cfg["site"]]),
    )
    pairs = [(encode_s(s, rows), evaluate_s(job)) for _ in range(options.pairs + 1)][1:]
    report(
        "evals",
        sae={name: s.cfg.get(name) for name in ("architecture", "d_in", "d_sae", "k")},
        rows=n_rows,
        encode_rows_per_s=round(n_rows / statistics.median(a for a, _ in pairs)),
        evaluate_rows_per_s=round(n_rows / statistics.median(b for _, b in pairs)),
        ratio=round(statistics.median(a / b for a, b in pairs), 3),
        target=0.8,
    )


@torch.no_grad()
def encode_s(s: Any, rows: torch.Tensor) -> float:
    """Seconds to encode all rows."""
    step = chunk_rows(int(s.cfg["d_sae"]))
    start = time.perf_counter()
    for at in range(0, len(rows), step):
        s.encode(rows[at : at + step])
    return time.perf_counter() - start


def evaluate_s(job: EvalJob) -> float:
    """Seconds to sum every figure of the rows."""
    start = time.perf_counter()
    with LocalPool(job) as pool:
        total = empty_sums(job.saes, pool.worker.context_size)
        for sums in pool.run([("rows", (i,)) for i in range(pool.worker.n_parts)]):
            total.merge(sums)
        total.saes[0].figures(total.sites[job.saes[0].cfg["site"]])
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
