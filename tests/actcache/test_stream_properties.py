"""Exactly-once, order and resume over many shapes; memory, threads and processes that die."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replayed import Recorded
from tiny_harvest import SITES

import actcache
from actcache.errors import CorruptObject, SpecError
from actcache.order import permutation
from actcache.shard import shard_key
from actcache.store import open_store

SITE = SITES[0]
SHAPES = [  # context, block_rows, chunk_rows, n_tokens
    (16, 1024, 64, 3_000),
    (4, 256, 256, 1_000),
    (4, 512, 4, 700),
    (16, 1024, 128, 10**6),  # all there is: the last block is short
]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Datasets of several shapes, harvested through the real code with recorded forward passes."""
    out = []
    for i, (context, block, chunk, n_tokens) in enumerate(SHAPES):
        directory = tmp_path_factory.mktemp(f"shape{i}")
        recorded = Recorded(
            directory,
            context_size=context,
            block_rows=block,
            chunk_rows=chunk,
            n_tokens=n_tokens,
            sites=[SITE],
        )
        store = open_store(str(directory / "data"))
        recorded.harvest(store)
        out.append(actcache.open(store.url))
    assert out[3].n_rows % 1024
    return out


@lru_cache(maxsize=64)
def written_order(n, chunk, seed, epoch, lanes, window):
    """The rule of docs/format.md, "Reading order", in plain loops."""
    chunks = [range(c * chunk, min((c + 1) * chunk, n)) for c in range(-(-n // chunk))]
    flat = [(c, row) for c in permutation(len(chunks), "chunks", seed, epoch) for row in chunks[c]]
    out = np.empty(n, np.int64)
    for lane in range(lanes):
        begin = lane * (n // lanes) + min(lane, n % lanes)
        mine = flat[begin : begin + max(0, -(-(n - lane) // lanes))]
        pieces: list[list[int]] = []
        last = None
        for c, row in mine:
            if c != last:
                pieces.append([])
            last = c
            pieces[-1].append(row)
        served: list[int] = []
        for w in range(0, len(pieces), window):
            rows = [row for piece in pieces[w : w + window] for row in piece]
            served += [rows[p] for p in permutation(len(rows), "window", seed, epoch, lane, w // window)]
        out[lane::lanes] = served
    return out


def least_prefetch(dataset, **options):
    """The bytes that a refusal names."""
    with pytest.raises(SpecError, match="prefetch_bytes is 1; the windows of") as refused:
        next(iter(dataset.stream(SITE, prefetch_bytes=1, **options)))
    return int(re.search(r"take ([\d,]+)\.", str(refused.value))[1].replace(",", ""))


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_rank_serves_its_rows_of_the_written_order_from_any_resume_point(datasets, data):
    def choose(*options):
        return data.draw(st.sampled_from(options))

    dataset = datasets[data.draw(st.integers(0, len(SHAPES) - 1))].split(choose("train", "validation"))
    n, chunk = dataset.n_rows, dataset.manifest.identity["chunk_rows"]
    lanes = choose(1, 8, 64)
    world_size = min(choose(1, 2, 3, 7, 8, 48, 63, 64), lanes)
    batch_size = choose(1 if n < 300 else 97, 64, 100, n // 2, n, n + 5)
    seed, window, epochs = choose(0, 5), choose(1, 2, 7), choose(1, 2)
    epoch, row = data.draw(st.integers(0, epochs - 1)), data.draw(st.integers(0, n - 1))
    order = {"seed": seed, "lanes": lanes, "window": window}
    state = {**dataset.stream(SITE, **order).state(), "epoch": epoch, "row": row}
    rank = data.draw(st.integers(0, world_size - 1))
    least = least_prefetch(dataset, world_size=world_size, **order)
    stream = dataset.stream(
        SITE,
        **order,
        prefetch_bytes=choose(None, least, least + least // 3),
        batch_size=batch_size,
        epochs=epochs,
        rank=rank,
        world_size=world_size,
        state=json.loads(json.dumps(state)),
    )
    stored = dataset.rows(slice(None))
    for batch in stream:
        end = min(row + batch_size, n)
        mine = np.arange(row, end)
        mine = mine[mine % lanes % world_size == rank]
        rows = written_order(n, chunk, seed, epoch, lanes, window)[mine]
        assert np.array_equal(batch.sequence, stored.sequence[rows])
        assert np.array_equal(batch.position, stored.position[rows])
        assert np.array_equal(batch[SITE], dataset.read(SITE, rows))
        assert np.array_equal(batch.place, mine - row)
        epoch, row = (epoch + 1, 0) if end == n else (epoch, end)
        assert (stream.state()["epoch"], stream.state()["row"]) == (epoch, row)
    assert (epoch, row) == (epochs, 0)


def test_the_order_of_a_stream_never_changes(datasets):
    """The places of the rows that a stream serves, against a digest kept here."""
    import hashlib

    rows = [written_order(3072, 64, 3, epoch, 64, 2) for epoch in (0, 1)]
    digest = hashlib.sha256(np.concatenate(rows).astype("<i8").tobytes()).hexdigest()
    assert digest == "ddc4279cd43d95e62ed8f8417cd80a73706e1b37173c8e13850443a51ad29750"
    dataset = datasets[0]
    stored = dataset.rows(slice(None))
    served = list(dataset.stream(SITE, batch_size=128, seed=3, epochs=2, window=2))
    for name in ("token_id", "sequence", "position"):
        ours = np.concatenate([getattr(b, name) for b in served])
        assert np.array_equal(ours, getattr(stored, name)[np.concatenate(rows)])


def test_the_memory_that_is_read_ahead_is_what_was_asked_for(datasets):
    """Slots of a window each: a row of a site, its scale and its metadata."""
    dataset, lanes, window = datasets[0], 8, 2
    layout = dataset._layout
    row = dataset.d_in(SITE) + 4 + layout["token_id"]["dtype"].itemsize + 4 + 4
    slot = row * window * dataset.manifest.identity["chunk_rows"]
    assert least_prefetch(dataset, lanes=lanes, window=window) == lanes * slot
    options = {"lanes": lanes, "window": window, "batch_size": 100}
    want = [b[SITE] for b in dataset.stream(SITE, **options)]
    for asked, slots in ((lanes * slot, 8), (11 * slot + slot // 2, 11), (10**9, 16), (None, 16)):
        stream = dataset.stream(SITE, **options, prefetch_bytes=asked)
        windows = stream._windows(next(stream._steps()))
        try:
            held = sum(pool.nbytes for pool in windows._pool.values())
        finally:
            windows.close()
        assert held == slots * slot
        for a, b in zip(want, stream, strict=True):
            assert np.array_equal(a, b[SITE])


def test_another_split_may_be_named_by_the_stream(datasets):
    dataset = datasets[0]
    a = dataset.stream(SITE, split="validation", batch_size=50)
    b = dataset.split("validation").stream(SITE, batch_size=50)
    assert a.state() == b.state()
    assert [x.sequence.tolist() for x in a] == [x.sequence.tolist() for x in b]
    with pytest.raises(SpecError, match="no split 'valid'"):
        dataset.stream(SITE, split="valid")


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_a_sequence_is_gathered_in_the_order_of_its_tokens(datasets, shape):
    dataset = datasets[shape]
    rows, block_rows = dataset.rows(slice(None)), SHAPES[shape][1]
    firsts = [rows.sequence[at : at + block_rows].min() for at in range(0, dataset.n_rows, block_rows)]
    straddling = 0
    for sequence in {
        *firsts[:8],
        *range(0, dataset.n_sequences, dataset.n_sequences // 8),
        dataset.n_sequences - 1,
    }:
        mine = np.flatnonzero(rows.sequence == sequence)
        mine = mine[np.argsort(rows.position[mine])]
        acts, position = dataset.sequence_activations(SITE, sequence)
        assert np.array_equal(position, rows.position[mine])
        assert np.array_equal(acts, dataset.read(SITE, mine))
        straddling += len(np.unique(mine // block_rows)) > 1
    assert straddling or shape in (1, 2)
    with pytest.raises(IndexError, match="out of range"):
        dataset.sequence_activations(SITE, dataset.n_sequences)


def descriptors():
    return sorted(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("after", [0, 1, 5])
def test_leaving_early_leaves_no_thread_and_no_descriptor(datasets, after):
    gc.collect()
    threads, files = threading.active_count(), descriptors()
    for _ in range(3):
        batches = iter(datasets[0].stream(SITE, batch_size=100))
        for _ in range(after):
            next(batches)
        batches.close()
    assert threading.active_count() == threads
    assert descriptors() == files


def test_an_error_in_a_thread_reaches_the_consumer_and_ends_the_threads(datasets, tmp_path):
    import shutil

    shutil.copytree(datasets[0].url, tmp_path / "copy")
    path = tmp_path / "copy" / shard_key(f"train/{SITE}/codes", 2, 2)
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    threads = threading.active_count()
    dataset = actcache.open(str(tmp_path / "copy"))
    stream = dataset.stream(SITE, batch_size=10, lanes=1, window=1)
    with pytest.raises(CorruptObject, match="c/2/0"):
        list(stream)
    assert 0 < stream.state()["row"] < dataset.n_rows
    assert threading.active_count() == threads


LONG = """
import resource, sys
import actcache
dataset = actcache.open(sys.argv[1])
epochs = int(sys.argv[2])
dataset.read(sys.argv[3], slice(0, 1000))
peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
for epoch, _ in enumerate(range(2)):
    stream = dataset.stream(sys.argv[3], batch_size=1000, lanes=8, epochs=epochs * (1 + 9 * epoch))
    rows = sum(len(b) for b in stream)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(*peaks)
"""


def test_memory_stays_flat_over_a_long_stream(datasets):
    """A stream takes its windows (1 MB here) and 24 MB for threads and batches, and ten times the rows no more:
    4 MB is a twentieth of the rows served meanwhile."""
    assert 2 * least_prefetch(datasets[0], lanes=8) < 2**20
    command = [sys.executable, "-c", LONG, datasets[0].url, "20", SITE]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    before, first, last = map(int, out.split())
    assert first - before < 25 * 1024
    assert last - first < 4 * 1024


ENDLESS = """
import sys
import actcache
stream = actcache.open(sys.argv[1]).stream(sys.argv[2], batch_size=100, epochs=10**6)
for n, batch in enumerate(stream):
    if n == 20:
        print("running", flush=True)
"""


def test_ctrl_c_ends_a_stream(datasets):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, datasets[0].url, SITE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGINT
    assert errors.strip().endswith("KeyboardInterrupt")


RANK = """
import json, os, sys, time
import actcache
url, site, rank, world_size, batch_size, state, out, pause = sys.argv[1:]
stream = actcache.open(url).stream(site, batch_size=int(batch_size), rank=int(rank), world_size=int(world_size),
    lanes=8, window=2, state=json.loads(state) or None)
with open(out, "a") as log:
    for batch in stream:
        line = {"rows": (batch.sequence.astype("int64") * 1000 + batch.position).tolist(), "state": stream.state()}
        log.write(json.dumps(line) + "\\n")
        log.flush()
        time.sleep(float(pause))
"""


def start_rank(dataset, rank, world_size, batch_size, state, out, pause):
    arguments = [dataset.url, SITE, rank, world_size, batch_size, json.dumps(state), out, pause]
    return subprocess.Popen([sys.executable, "-c", RANK, *map(str, arguments)])


def whole_lines(path: Path):
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def test_a_killed_rank_is_resumed_at_another_world_size_with_the_unseen_batches(datasets, tmp_path):
    """Two ranks, one SIGKILLed; three ranks go on from the last batch that both had finished."""
    dataset, batch = datasets[0], 100
    logs = [tmp_path / f"first-{r}" for r in (0, 1)]
    ranks = [start_rank(dataset, r, 2, batch, None, logs[r], 0.05) for r in (0, 1)]
    try:
        deadline = time.monotonic() + 60
        while min(len(whole_lines(log)) for log in logs) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        ranks[1].send_signal(signal.SIGKILL)
        assert ranks[1].wait(timeout=60) == -signal.SIGKILL
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    done = min(len(whole_lines(log)) for log in logs)
    assert 4 <= done < dataset.n_rows // batch
    seen = [whole_lines(log)[:done] for log in logs]
    assert seen[0][-1]["state"] == seen[1][-1]["state"]
    later = [tmp_path / f"second-{r}" for r in range(3)]
    ranks = [start_rank(dataset, r, 3, batch, seen[1][-1]["state"], later[r], 0) for r in range(3)]
    assert [process.wait(timeout=60) for process in ranks] == [0] * 3
    alone = [b.sequence.astype(np.int64) * 1000 + b.position for b in stream_of(dataset, batch)]
    parts = [*(list(zip(*seen, strict=True))), *zip(*map(whole_lines, later), strict=True)]
    assert len(parts) == len(alone)
    for whole, lines in zip(alone, parts, strict=True):
        assert sorted(row for line in lines for row in line["rows"]) == sorted(whole.tolist())


def stream_of(dataset, batch):
    return dataset.stream(SITE, batch_size=batch, lanes=8, window=2)
