"""SAE training rows/s: the sparse step against the dense autograd step, from memory and from a dataset.

Pairs of short runs alternate in one process; medians. d_in 192, as the bundled LM.
"""

import argparse
import statistics
import time

import numpy as np
from hardware import report

import actcache
import sae


class Timed:
    """A stream that notes when its 5th and last batches are taken: start-up is left out of the rate."""

    def __init__(self, stream: object) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def __iter__(self) -> object:
        self.rows = 0
        for i, batch in enumerate(self.stream):
            if i == 5:
                self.start, self.rows = time.perf_counter(), 0
            yield batch
            self.rows += len(batch)
            self.stop = time.perf_counter()

    @property
    def rate(self) -> float:
        return self.rows / (self.stop - self.start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a dataset; random rows in memory by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=2048)
    options = parser.parse_args()
    acts_ND = np.random.default_rng(0).normal(size=(200_000, 192)).astype(np.float32)
    if options.data:
        dataset = actcache.open(options.data)
        site = dataset.sites[-1]
        acts_ND = dataset.read(site, slice(0, 200_000))
    for d_sae, k in ((1536, 16), (6144, 16)):
        for arch in (sae.TopK, sae.BatchTopK):
            rates: dict[str, list[float]] = {}
            for _ in range(options.repeats):
                for step, n in (("sparse", 100_000), ("dense", 16_384 if d_sae > 2000 else 40_000)):
                    stream = Timed(sae.ArrayStream(acts_ND, batch_size=options.batch_size))
                    training = sae.Training(n_rows=n, lr=1e-3, step=step, dead_after_rows=10**9)
                    sae.train(stream, arch(d_sae=d_sae, k=k), training)
                    rates.setdefault(step, []).append(stream.rate)
                if options.data:
                    stream = Timed(dataset.stream(site, batch_size=options.batch_size, metadata=False))
                    training = sae.Training(n_rows=100_000, lr=1e-3, dead_after_rows=10**9)
                    sae.train(stream, arch(d_sae=d_sae, k=k), training)
                    rates.setdefault("sparse_streamed", []).append(stream.rate)
            medians = {step: round(statistics.median(r)) for step, r in rates.items()}
            report(
                "training", arch=arch.__name__, d_in=192, d_sae=d_sae, k=k, batch_size=options.batch_size,
                rows_per_s=medians, sparse_over_dense=round(medians["sparse"] / medians["dense"], 2),
            )  # fmt: skip


if __name__ == "__main__":
    main()
