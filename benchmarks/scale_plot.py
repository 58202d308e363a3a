"""Draws docs/scale.png from lines of scale_simulation.py: `scale_plot.py SWEEP.jsonl OUT.png [OURS.jsonl BLOCK.jsonl]`.

SWEEP has the printed lines of runs with several --workers, --driver-s-per-block and --partition; OURS and BLOCK,
for a second picture, are --series files of two runs with --partition splits, with --keys array and block.
"""

import json
import sys
from itertools import groupby, pairwise
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

_PARTITION = {"array": "a partition for each array", "one": "one partition"}


def main() -> None:
    sweep, out, *series = map(Path, sys.argv[1:])
    n = 1 + bool(series)
    figure, axes = plt.subplots(1, n, figsize=(5.4 * n, 3.6), layout="constrained", squeeze=False)
    draw_workers(axes[0][0], sweep)
    if series:
        draw_keys(axes[0][1], *series)
    figure.savefig(out, dpi=110)


def draw_workers(axes: Axes, sweep: Path) -> None:
    """Blocks a second by workers, a line for each driver and partitioning."""
    runs = [json.loads(line) for line in sweep.read_text().splitlines()]
    runs.sort(key=lambda r: (r["partition"], r["driver_s_per_block"], r["workers"]))
    for (partition, driver_s), chosen in groupby(runs, lambda r: (r["partition"], r["driver_s_per_block"])):
        points = [(r["workers"], r["steady_blocks_per_s"]) for r in chosen]
        label = f"{1e3 * driver_s:.0f} ms of the driver a block, {_PARTITION[partition]}"
        axes.plot(*zip(*points, strict=True), "o-", ms=4, label=label)
    most = max(r["workers"] for r in runs)
    axes.plot([0, most], [0, most / runs[0]["block_s"]], color="grey", ls=":", label="what the LMs give")
    axes.set(xlabel="workers", ylabel="blocks a second", title="What bends first, 32 sites", ylim=0)
    axes.legend(fontsize=7)


def draw_keys(axes: Axes, ours: Path, block: Path) -> None:
    """Blocks a second by minute, with the array or the block first in keys."""
    for path, label in ((ours, "array first (ours)"), (block, "block number first")):
        versions = [json.loads(line) for line in path.read_text().splitlines()]
        rates = [
            ((a["now_s"] + b["now_s"]) / 120, (b["blocks"] - a["blocks"]) / (b["now_s"] - a["now_s"]))
            for a, b in pairwise(versions[:-1])  # the last comes when it is done, not after a minute
        ]
        axes.plot(*zip(*rates, strict=True), "o-", ms=3, label=label)
    axes.set(xlabel="minutes", ylabel="blocks a second", title="Keys, where S3 splits what is hot", ylim=0)
    axes.legend(fontsize=7)


if __name__ == "__main__":
    main()
