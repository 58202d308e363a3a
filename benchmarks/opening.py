"""From opening a large dataset to its first batch: time, requests and memory of a fresh process.

One JSON line for each number of blocks: two sites, default sizes, on a local directory; the stream is of
one site, with row metadata. The manifest, segments, statistics and calibrations are real and written by
the project's own code. Shards hold the chunks that the first batch needs, encoded as a harvest would,
and holes for the rest. 83,334 blocks have 10^6 objects. Each figure is the median over `--runs`
processes; what is imported is no part of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "actcache"))

from hardware import report
from synthetic import LOSSES, SITES, Synthetic
from watched import Watched

from actcache.layout import array_layout
from actcache.manifest import BlockRecord, read_manifest
from actcache.opened import Opened
from actcache.order import DEFAULT_LANES, Order, default_window
from actcache.reader import Dataset
from actcache.segments import RecordRows
from actcache.shard import crc32c, encode_chunk, shard_key
from actcache.store import open_store

_BATCH, _SEED = 4096, 0
_PER_COMMIT = 1000
_POOL = 4
"""Chunks of each array that are encoded; those that are read are copies of them."""
_CODES_STD = 9.5
"""A normal distribution of that width has 5.3 bits, as codes at FVU 1e-3 have."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[100, 10_000, 83_334])
    parser.add_argument("--d-in", type=int, default=192)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--open", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        print(json.dumps(measure(args.open)))
        return
    for n_blocks in args.blocks:
        with tempfile.TemporaryDirectory() as directory:
            written = write(directory, n_blocks, args.d_in)
            command = [sys.executable, __file__, "--open", directory]
            runs = [json.loads(subprocess.check_output(command)) for _ in range(args.runs)]
            figures = {name: median(run[name] for run in runs) for name in runs[0]}
            report("opening", blocks=n_blocks, d_in=args.d_in, runs=args.runs, **written, **figures)


def write(directory: str, n_blocks: int, d_in: int) -> dict[str, Any]:
    """A complete dataset of `n_blocks` train blocks."""
    store, synthetic = open_store(directory), Synthetic(d_in)
    synthetic.calibrate(store)
    needed, pool = _needed(synthetic, n_blocks), _pool(synthetic)
    state = synthetic.committed(store, train=n_blocks)
    for block in range(n_blocks):
        record = synthetic.record("train", block)
        if block in needed:
            record = _with_chunks(directory, record, needed[block], pool)
        state.add(RecordRows.of(record))
        if state.n_waiting == _PER_COMMIT:
            state.commit({}, {})
    manifest = state.commit(dict.fromkeys(SITES, LOSSES), {})
    assert manifest.complete
    size = {
        kind: sum(len(store.read(f.key)) for s in manifest.segments for f in s.files if f"-{kind}." in f.key)
        for kind in ("objects", "statistics")
    }
    return {
        "objects": n_blocks * len(record.objects),
        "segments": len(manifest.segments),
        "objects_MB": round(size["objects"] / 1e6, 2),
        "statistics_MB": round(size["statistics"] / 1e6, 2),
    }


def _needed(synthetic: Synthetic, n_blocks: int) -> dict[int, set[int]]:
    """By block, the chunks in it that a stream reads up to its first batch: two windows of each lane."""
    rows, chunk_rows = synthetic.identity["block_rows"], synthetic.identity["chunk_rows"]
    context_size = synthetic.identity["tokens"]["context_size"]
    window = default_window(_BATCH, DEFAULT_LANES, context_size, rows)
    order = Order(n_blocks * rows, chunk_rows, _SEED, 0, DEFAULT_LANES, window)
    needed: dict[int, set[int]] = {}
    for lane in range(DEFAULT_LANES):
        for _, found in zip(range(2), order.windows(lane, 0), strict=False):
            for span in found.spans:
                block, chunk = divmod(span.chunk, rows // chunk_rows)
                needed.setdefault(block, set()).add(chunk)
    return needed


def _pool(synthetic: Synthetic) -> dict[str, list[bytes]]:
    """Some encoded chunks of each array that the stream reads, by its path in the split."""
    layout = array_layout(synthetic.identity, {SITES[0]: synthetic.d_in})
    return {
        path: [_chunk(path, array, seed) for seed in range(_POOL)]
        for path, array in layout.items()
        if path in ("token_id", "sequence", "position") or path.endswith("/codes")
    }


def _chunk(path: str, array: Mapping[str, Any], seed: int) -> bytes:
    rng, shape = np.random.default_rng(seed), (array["chunk_rows"], *array["row"])
    if path.endswith("/codes"):
        values = np.clip(np.rint(rng.normal(size=shape) * _CODES_STD), -127, 127)
    else:
        values = rng.integers(0, 50_000, shape)
    return encode_chunk(values.astype(array["dtype"]))


def _with_chunks(
    directory: str, record: BlockRecord, chunks: set[int], pool: Mapping[str, list[bytes]]
) -> BlockRecord:
    """The record with real chunks in place of some, and sparse files that hold them."""
    objects = []
    for o in record.objects:
        payloads = pool.get(o.path.removeprefix("train/"))
        if payloads is not None:
            nbytes, crc = list(o.chunk_nbytes), list(o.chunk_crc32c)
            for chunk in chunks:
                payload = payloads[chunk % _POOL]
                nbytes[chunk], crc[chunk] = len(payload), int.from_bytes(payload[-4:], "little")
                assert crc32c(payload[:-4]) == crc[chunk]
            offset = [sum(nbytes[:i]) for i in range(len(nbytes))]
            size = sum(nbytes) + 16 * len(nbytes) + 4
            key = shard_key(o.path, o.shard, 2 if o.path.endswith("/codes") else 1)
            path = Path(directory, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for chunk in chunks:
                    file.seek(offset[chunk])
                    file.write(payloads[chunk % _POOL])
                file.truncate(size)
            o = replace(
                o,
                size_bytes=size,
                chunk_offset=tuple(offset),
                chunk_nbytes=tuple(nbytes),
                chunk_crc32c=tuple(crc),
            )
        objects.append(o)
    return replace(record, objects=tuple(objects))


def measure(directory: str) -> dict[str, Any]:
    """What the reader of this process takes."""
    store: Any = Watched(open_store(directory))
    baseline, begun = _peak_bytes(), time.perf_counter()
    dataset = Dataset(Opened(store, read_manifest(store)), "train")
    opened = time.perf_counter()
    stream = dataset.stream(SITES[0], batch_size=_BATCH, seed=_SEED)
    for name in stream._names:
        assert len(dataset._tables[f"train/{name}"].size_bytes)
    dataset._shared.calibration(SITES[0])
    tables = time.perf_counter()
    requests, peak = store.requests.total(), _peak_bytes()
    batch = next(iter(stream))
    done = time.perf_counter()
    assert len(batch) == _BATCH
    return {
        "open_ms": round(1e3 * (opened - begun), 1),
        "tables_ms": round(1e3 * (tables - opened), 1),
        "first_batch_ms": round(1e3 * (done - begun), 1),
        "requests_before_first_chunk": requests,
        "peak_MB_of_tables": round((peak - baseline) / 1e6, 1),
        "peak_MB": round((_peak_bytes() - baseline) / 1e6, 1),
    }


def _peak_bytes() -> int:
    # not ru_maxrss: that of the process which started this one counts there
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    main()
