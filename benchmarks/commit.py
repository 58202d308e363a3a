"""What a commit costs as a dataset grows, and opening it: synthetic records, no LM, a local directory.

One JSON line for each number of blocks. Commits of `--per-commit` blocks each: the last 64 are timed, and
the dearest of all (the one that merges most segments) is given apart. Then a complete version, a second
driver's opening, and a reader's: manifest and chunk table of one site. Requests and bytes are
those of the store's verbs. The files of the last run stay under a temporary directory while it runs.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "actcache"))

from hardware import report
from synthetic import LOSSES, Synthetic
from watched import Watched

from actcache.manifest import read_manifest
from actcache.opened import Opened
from actcache.reader import Dataset
from actcache.store import open_store

_TIMED = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[100, 1_000, 10_000, 100_000])
    parser.add_argument(
        "--per-commit", type=int, default=20, help="blocks a commit; a minute of a large harvest"
    )
    parser.add_argument("--d-in", type=int, default=192)
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--chunk-rows", type=int, default=4096)
    args = parser.parse_args()
    for n_blocks in args.blocks:
        with tempfile.TemporaryDirectory() as directory:
            report("commit", **measure(directory, n_blocks, args))


def measure(directory: str, n_blocks: int, args: argparse.Namespace) -> dict[str, Any]:
    """All figures at one size."""
    store: Any = Watched(open_store(directory))
    sites, per_commit = [f"blocks.{i}.hook_resid_post" for i in range(args.sites)], args.per_commit
    synthetic = Synthetic(args.d_in, sites, chunk_rows=args.chunk_rows)
    synthetic.calibrate(store)
    state = synthetic.committed(store, train=n_blocks)
    costs = []
    for first in range(0, n_blocks, per_commit):
        for block in range(first, min(first + per_commit, n_blocks)):
            state.add(synthetic.rows("train", block))
        before = store.requests.total(), store.n_bytes.total()
        begun = time.perf_counter()
        state.commit({}, {})
        took = time.perf_counter() - begun
        costs.append((took, store.requests.total() - before[0], store.n_bytes.total() - before[1]))
    segments = len(state.manifest.segments) if state.manifest else 0
    begun = time.perf_counter()
    complete = state.commit(dict.fromkeys(sites, LOSSES), {})
    final_s = time.perf_counter() - begun
    assert complete.complete
    last = costs[-_TIMED:]
    out: dict[str, Any] = {
        "blocks": n_blocks,
        "per_commit": per_commit,
        "d_in": args.d_in,
        "sites": len(sites),
        "commit_ms_median": round(1e3 * median(c[0] for c in last), 2),
        "commit_requests_median": median(c[1] for c in last),
        "commit_kB_median": round(median(c[2] for c in last) / 1e3, 1),
        "commit_ms_mean_of_all": round(1e3 * sum(c[0] for c in costs) / len(costs), 2),
        "commit_requests_mean_of_all": round(sum(c[1] for c in costs) / len(costs), 2),
        "commit_kB_mean_of_all": round(sum(c[2] for c in costs) / len(costs) / 1e3, 1),
        "commit_s_dearest": round(max(c[0] for c in costs), 3),
        "segments_before_complete": segments,
        "complete_commit_s": round(final_s, 3),
        "segments": len(complete.segments),
        "segments_MB": {kind: round(n / 1e6, 2) for kind, n in _segments_bytes(store, complete).items()},
        "parts_of_objects": sum(len(s.objects) for s in complete.segments),
    }
    del state
    for name, opening in (
        ("driver", lambda: synthetic.committed(store, train=n_blocks)),
        ("reader", lambda: _read(store)),
    ):
        store.requests.clear()
        rss, begun = _rss_bytes(), time.perf_counter()
        opened = opening()
        out[f"open_{name}_s"] = round(time.perf_counter() - begun, 3)
        out[f"open_{name}_requests"] = store.requests.total()
        out[f"open_{name}_MB"] = round((_rss_bytes() - rss) / 1e6, 1)
        del opened
    return out | {"peak_MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)}


def _read(store: Any) -> Dataset:
    """A reader with the chunk tables of all arrays and one site's offset: before its first chunk."""
    dataset = Dataset(Opened(store, read_manifest(store)), "train")
    site = dataset.sites[0]
    dataset._shared.calibration(site)
    assert len(dataset._tables[f"train/{site}/codes"].size_bytes)
    return dataset


def _segments_bytes(store: Any, manifest: Any) -> dict[str, int]:
    found = dict.fromkeys(("records", "statistics", "objects"), 0)
    for file in (file for s in manifest.segments for file in s.files):
        found[file.kind] += len(store.read(file.key))
    return found


def _rss_bytes() -> int:
    fields = Path("/proc/self/status").read_text().split()
    return 1024 * int(fields[fields.index("VmRSS:") + 1])


if __name__ == "__main__":
    main()
