"""Draws docs/scale.png from lines of scale_simulation.py: `scale_plot.py SWEEP.jsonl OURS.jsonl BLOCK.jsonl OUT.png`.

SWEEP has the printed lines of runs with --partition one and array; OURS and BLOCK are --series files of two
runs with --partition splits, with --keys array and block.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt


def main() -> None:
    sweep, ours, block, out = map(Path, sys.argv[1:])
    runs = [json.loads(line) for line in sweep.read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for partition, label in (("array", "a partition for each array"), ("one", "one partition")):
        chosen = sorted((r["workers"], r["steady_blocks_per_s"]) for r in runs if r["partition"] == partition)
        left.plot(*zip(*chosen, strict=True), "o-", label=label)
    first = next(r for r in runs if r["partition"] == "one")
    limit = first["put_per_s"] / (first["puts"] / first["blocks"])
    left.axhline(limit, color="grey", ls=":", label=f"{first['put_per_s']:.0f} PUT/s over PUT a block")
    left.set(xlabel="workers", ylabel="blocks a second", title="Where one partition bends", ylim=0)
    left.legend(fontsize=8)
    for path, label in ((ours, "array first (ours)"), (block, "block number first")):
        versions = [json.loads(line) for line in path.read_text().splitlines()]
        rates = [
            ((a["now_s"] + b["now_s"]) / 120, (b["blocks"] - a["blocks"]) / (b["now_s"] - a["now_s"]))
            for a, b in pairwise(versions[:-1])  # the last comes when it is done, not after a minute
        ]
        right.plot(*zip(*rates, strict=True), "o-", ms=3, label=label)
    right.set(xlabel="minutes", ylabel="blocks a second", title="Keys, where S3 splits what is hot", ylim=0)
    right.legend(fontsize=8)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
