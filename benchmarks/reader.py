"""Shuffled float32 reading of a dataset from local disk in one process, Mval/s; median of passes."""

import argparse
import statistics
import time

from hardware import report

import actcache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="a dataset, e.g. that of `make demo`: demo-out/datasets/NAME")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4096)
    options = parser.parse_args()
    dataset = actcache.open(options.url)
    site = dataset.sites[-1]
    for metadata in (False, True):
        rates, first = [], []
        for epoch in range(options.passes + 1):
            start = time.perf_counter()
            rows = 0
            for batch in dataset.stream(site, batch_size=options.batch_size, seed=epoch, metadata=metadata):
                if not rows:
                    first.append(time.perf_counter() - start)
                rows += len(batch)
            rates.append(rows / (time.perf_counter() - start))
        rate = statistics.median(rates[1:])
        report(
            "reader",
            metadata=metadata,
            rows=rows,
            d_in=dataset.d_in(site),
            rows_per_s=round(rate),
            mval_per_s=round(rate * dataset.d_in(site) / 1e6),
            first_batch_s=round(statistics.median(first[1:]), 3),
        )


if __name__ == "__main__":
    main()
