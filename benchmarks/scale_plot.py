"""Draws docs/scale.png from lines of scale_simulation.py: `scale_plot.py SWEEP.jsonl OURS.jsonl BLOCK.jsonl OUT.png`.

SWEEP has the printed lines of runs with several --workers, --driver-s-per-block and --partition; OURS and BLOCK are
--series files of two runs with --partition splits, with --keys array and block.
"""

import json
import sys
from itertools import groupby, pairwise
from pathlib import Path

import matplotlib.pyplot as plt

_PARTITION = {"array": "a partition for each array", "one": "one partition"}


def main() -> None:
    sweep, ours, block, out = map(Path, sys.argv[1:])
    runs = [json.loads(line) for line in sweep.read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    runs.sort(key=lambda r: (r["partition"], r["driver_s_per_block"], r["workers"]))
    for (partition, driver_s), chosen in groupby(runs, lambda r: (r["partition"], r["driver_s_per_block"])):
        points = [(r["workers"], r["steady_blocks_per_s"]) for r in chosen]
        label = f"{1e3 * driver_s:.0f} ms of the driver a block, {_PARTITION[partition]}"
        left.plot(*zip(*points, strict=True), "o-", ms=4, label=label)
    most = max(r["workers"] for r in runs)
    left.plot([0, most], [0, most / runs[0]["block_s"]], color="grey", ls=":", label="what the LMs give")
    left.set(xlabel="workers", ylabel="blocks a second", title="What bends first, 32 sites", ylim=0)
    left.legend(fontsize=7)
    for path, label in ((ours, "array first (ours)"), (block, "block number first")):
        versions = [json.loads(line) for line in path.read_text().splitlines()]
        rates = [
            ((a["now_s"] + b["now_s"]) / 120, (b["blocks"] - a["blocks"]) / (b["now_s"] - a["now_s"]))
            for a, b in pairwise(versions[:-1])  # the last comes when it is done, not after a minute
        ]
        right.plot(*zip(*rates, strict=True), "o-", ms=3, label=label)
    right.set(xlabel="minutes", ylabel="blocks a second", title="Keys, where S3 splits what is hot", ylim=0)
    right.legend(fontsize=7)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
