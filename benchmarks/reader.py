"""Shuffled float32 reading of a dataset in one process; medians of passes, one JSON line each.

- local: Mval/s from local disk (page cache warm), with and without row metadata, and the time to the
  first batch; beside it what decompressing the same chunks alone gives, one thread.
- s3: bytes/s of a stream from an S3 server on loopback (rclone), against bare loops of ranged GETs of
  the same client over the same ranges: 32 threads of `cat_file`, and one `cat_ranges`.
- soak: epochs without end for --minutes; memory, descriptors and threads every half minute.
"""

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from hardware import report

import actcache
from actcache.reader import Dataset
from actcache.shard import shard_key


def one_pass(
    dataset: Dataset, site: str, batch_size: int, seed: int, metadata: bool
) -> tuple[int, float, float]:
    """Rows, seconds, seconds to the first batch."""
    start, rows, first = time.perf_counter(), 0, 0.0
    for batch in dataset.stream(site, batch_size=batch_size, seed=seed, metadata=metadata):
        first = first or time.perf_counter() - start
        rows += len(batch)
    return rows, time.perf_counter() - start, first


def local(url: str, passes: int, batch_size: int) -> None:
    dataset = actcache.open(url)
    site = dataset.sites[-1]
    d_in = dataset.d_in(site)
    found: dict[bool, list[tuple[int, float, float]]] = {False: [], True: []}
    alone = []
    for seed in range(passes + 1):  # the first is not counted
        for metadata in found:
            found[metadata].append(one_pass(dataset, site, batch_size, seed, metadata))
        alone.append(decompressing(dataset, f"{site}/codes"))
    for metadata, measured in found.items():
        rates = [rows * d_in / seconds / 1e6 for rows, seconds, _ in measured[1:]]
        report(
            "reader", part="local", metadata=metadata, rows=measured[0][0], d_in=d_in, precision=dataset.spec.precision,
            mval_per_s=round(statistics.median(rates)), passes=[round(r) for r in rates],
            first_batch_s=round(statistics.median(first for *_, first in measured[1:]), 3),
            decompressing_alone_mval_per_s=round(statistics.median(alone[1:])),
        )  # fmt: skip


def decompressing(dataset: Dataset, path: str, n_chunks: int = 200) -> float:
    """Mval/s of fetching, checking and decompressing chunks one after the other, into memory that is reused."""
    array = dataset._layout[path]
    out = np.empty((array["chunk_rows"], *array["row"]), array["dtype"])
    chunks = random.Random(0).sample(
        range(dataset.n_rows // len(out)), min(n_chunks, dataset.n_rows // len(out))
    )
    start = time.perf_counter()
    for chunk in chunks:
        dataset._chunks.read_into(path, chunk, out)
    return len(chunks) * out.size / (time.perf_counter() - start) / 1e6


def ranges(dataset: Dataset, site: str, batch_size: int) -> Iterator[tuple[str, int, int]]:
    """What an epoch of the stream fetches: the chunks of each lane's windows, those at lane ends twice."""
    stream = dataset.stream(site, batch_size=batch_size)
    order = stream._order(0)
    chunks = [s.chunk for lane in range(order.lanes) for w in order.windows(lane) for s in w.spans]
    for path in stream._names:
        table = dataset._tables[f"train/{path}"]
        for chunk in chunks:
            shard, inner = divmod(chunk, table.chunk_nbytes.shape[1])
            if np.isnan(table.constant[shard]):
                key = shard_key(table.path, shard, 2 if path.endswith("codes") else 1)
                start = int(table.chunk_offset[shard, inner])
                yield f"{dataset.url}/{key}", start, start + int(table.chunk_nbytes[shard, inner])


def s3(url: str, passes: int, batch_size: int) -> None:
    sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]
    import s3_servers

    with tempfile.TemporaryDirectory(dir=Path(url).parent) as directory:
        shutil.copytree(url, Path(directory) / "bucket" / "data", copy_function=os.link)
        with s3_servers.rclone(Path(directory)) as options:
            dataset = actcache.open("s3://bucket/data", storage_options=options)
            site = dataset.sites[-1]
            wanted = list(ranges(dataset, site, batch_size))
            random.Random(0).shuffle(wanted)
            fs = dataset._shared.store._fs  # type: ignore[attr-defined]

            def threads() -> None:
                with ThreadPoolExecutor(32) as pool:
                    list(pool.map(lambda r: fs.cat_file(r[0], start=r[1], end=r[2]), wanted))

            def at_once() -> None:
                fs.cat_ranges(*map(list, zip(*wanted, strict=True)))

            def stream() -> None:
                one_pass(dataset, site, batch_size, 0, True)

            ways: dict[str, Callable[[], None]] = {
                "stream": stream,
                "threads": threads,
                "cat_ranges": at_once,
            }
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(passes + 1):
                for name, way in ways.items():
                    start = time.perf_counter()
                    way()
                    seconds[name].append(time.perf_counter() - start)
            size = sum(stop - start for _, start, stop in wanted)
            medians = {name: statistics.median(s[1:]) for name, s in seconds.items()}
            report(
                "reader", part="s3", n_ranges=len(wanted), mbytes=round(size / 1e6),
                mb_per_s={name: round(size / s / 1e6) for name, s in medians.items()},
                stream_over_threads=round(medians["threads"] / medians["stream"], 3),
                stream_over_cat_ranges=round(medians["cat_ranges"] / medians["stream"], 3),
                mval_per_s=round(dataset.n_rows * dataset.d_in(site) / medians["stream"] / 1e6),
            )  # fmt: skip


def soak(url: str, minutes: float, batch_size: int) -> None:
    dataset = actcache.open(url)
    site = dataset.sites[-1]
    start = last = time.monotonic()
    rows, samples = 0, []
    for batch in dataset.stream(site, batch_size=batch_size, epochs=2**31):
        rows += len(batch)
        now = time.monotonic()
        if now - last >= 30 or now - start >= 60 * minutes:
            last = now
            status = Path("/proc/self/status").read_text()
            rss = int(status.split("VmRSS:")[1].split()[0]) / 1024
            samples.append((rss, len(os.listdir("/proc/self/fd")), threading.active_count()))
        if now - start >= 60 * minutes:
            break
    report(
        "reader", part="soak", minutes=round((last - start) / 60, 1), rows=rows, epochs=round(rows / dataset.n_rows, 1),
        mval_per_s=round(rows * dataset.d_in(site) / (last - start) / 1e6),
        rss_mib=[round(rss) for rss, *_ in samples],
        descriptors=sorted({fds for _, fds, _ in samples}), threads=sorted({n for *_, n in samples}),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "url", help="a dataset on local disk, e.g. that of `make demo`: demo-out/datasets/NAME"
    )
    parser.add_argument("--parts", default="local,s3", help="of local, s3, soak")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch-size", type=int, default=4096)
    options = parser.parse_args()
    for part in options.parts.split(","):
        if part == "soak":
            soak(options.url, options.minutes, options.batch_size)
        else:
            {"local": local, "s3": s3}[part](options.url, options.passes, options.batch_size)


if __name__ == "__main__":
    main()
