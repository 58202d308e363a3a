"""A thousand workers on a virtual clock: the real driver, scheduler and commits over a modelled store.

Real: `driver._run`, `dispatch.work_off`, `ray_engine.RayEngine`, `Committed`, segments, manifests and `zarr.json`,
records as a driver gets them from its workers. Modelled: Ray (actors, `wait`), the LM (a time a block), failures,
and an object store with latency and a limit of writes and reads a second for each partition of its keys,
which answers 503 beyond it; workers then wait as `retry.Retry` says. Simulated seconds are the same on any
machine and under any load; the driver's CPU time is this process's own and is not. With `--d-in` records of that
width are measured first, and the clock charges the driver for each block what one of them took.

One JSON line a run; then every block must be in the last version once.
"""

import argparse
import hashlib
import heapq
import itertools
import json
import math
import random
import resource
import sys
import threading
import time
from bisect import bisect_right, insort
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "actcache"))

import numpy as np
import pyarrow as pa
import ray.exceptions
from hardware import report
from synthetic import LOSSES, Synthetic
from watched import DictStore

from actcache import dispatch, driver, ray_engine
from actcache.committed import Committed
from actcache.errors import StoreError
from actcache.layout import array_layout
from actcache.manifest import SPLITS, BlockRecord, Manifest, record_key
from actcache.retry import Retry
from actcache.segment_files import segment_statistics
from actcache.segments import RecordRows, merge_segments
from actcache.store import Conflict, Listed, Store

_THREADS = 16  # of the driver's pools: a request in one of them costs its share of the time
_REJECT_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is simulated."""

    workers: int = 1000
    blocks: int = 1_000_000
    sites: int = 1
    block_s: float = 6.5
    """Of the LM for a block: 131,072 tokens at 20,000 a second."""
    block_bytes: float = 200e6
    """Of a site's codes: 131,072 rows of d 2304 at 5.3 bits a value."""
    failures: float = 0.001
    """Share of attempts at a block that end in a lost worker, a preempted one, or an error of the store."""
    load_s: float = 60.0
    """Until a worker has loaded the LM."""
    partition: str = "array"
    """"one" for the whole dataset, "array" for each array of ours, or "splits": one that splits under load."""
    keys: str = "array"
    """"array": ours, the block's number last. "block": the number first, for comparison."""
    put_per_s: float = 3500.0
    get_per_s: float = 5500.0
    put_s: float = 0.03
    """Median latency of a small write; a read takes two thirds, a page of a listing three times as long."""
    stream_bytes_per_s: float = 100e6
    split_after_s: float = 300.0
    """A partition that refused requests in half the seconds of so long splits in two, where "splits" (an assumption: S3 says
    only that it scales gradually)."""
    driver_s_per_block: float = 0.001
    """Virtual time that the driver takes for a block; its requests come on top. See `--d-in`."""
    seed: int = 0


class Clock:
    """Virtual seconds, and what happens at them. Callers may be threads of the driver's pools."""

    def __init__(self) -> None:
        self.now = 0.0
        self.cpu_s = 0.0
        """CPU time that the simulation itself took."""
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = itertools.count()
        self._lock = threading.RLock()
        self._driver = threading.main_thread()

    def at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self.events, (when, next(self._number), call, args))

    def advance(self, seconds: float) -> None:
        """The driver waits for so long; in a thread of a pool for its share."""
        if threading.current_thread() is not self._driver:
            seconds /= _THREADS
        with self._lock:
            self.run(self.now + seconds, lambda: False)

    def run(self, until: float, over: Callable[[], bool]) -> None:
        """Let events happen until then, or until `over()`."""
        begun = time.process_time()
        events = self.events
        while events and events[0][0] <= until and not over():
            self.now, _, call, args = heapq.heappop(events)
            call(*args)
        if not over():
            self.now = max(self.now, until)
        self.cpu_s += time.process_time() - begun

    def as_time(self) -> Any:
        """In place of the module `time`."""
        return SimpleNamespace(monotonic=lambda: self.now, sleep=self.advance)


class Partition:
    """A range of keys: requests a second it takes, with a tenth of a second's burst."""

    def __init__(self, rate: float) -> None:
        self.rate, self.burst, self.last = rate, max(1.0, rate / 10), 0.0
        self.tokens = self.burst
        self.seconds: Counter[int] = Counter()
        self.refusing: deque[int] = deque()
        """The seconds in which it refused a request, of the last while."""
        self.recent: deque[str] = deque(maxlen=64)

    def take(self, now: float) -> bool:
        """Whether a request at `now` is served."""
        self.tokens = min(self.burst, self.tokens + (now - self.last) * self.rate)
        self.last = now
        if self.tokens < 1:
            if not self.refusing or self.refusing[-1] < int(now):
                self.refusing.append(int(now))
            return False
        self.tokens -= 1
        self.seconds[int(now)] += 1
        return True

    def hot(self, now: float, window_s: float) -> bool:
        """Whether it refused requests in half the seconds of the last window."""
        while self.refusing and self.refusing[0] < now - window_s:
            self.refusing.popleft()
        return len(self.refusing) > window_s / 2


class Limits:
    """Which partition a key belongs to."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.puts: dict[str, Partition] = {"": Partition(setting.put_per_s)}
        self.gets = Partition(setting.get_per_s)
        self._bounds = [""]
        self.refused = self.served = 0

    def put(self, key: str, now: float) -> bool:
        if self._setting.partition == "array":
            name = key.rpartition("/c/")[0] or key.partition("/")[0]
            found = self.puts.get(name) or self.puts.setdefault(name, Partition(self._setting.put_per_s))
        elif self._setting.partition == "one":
            found = self.puts[""]
        else:
            found = self._range(key, now)
        served = found.take(now)
        self.served += served
        self.refused += not served
        return served

    def get(self, now: float) -> bool:
        return self.gets.take(now)

    def _range(self, key: str, now: float) -> Partition:
        name = self._bounds[bisect_right(self._bounds, key) - 1]
        found = self.puts[name]
        found.recent.append(key)
        if found.hot(now, self._setting.split_after_s):
            middle = sorted(found.recent)[len(found.recent) // 2]
            found.refusing.clear()
            if middle > name:
                insort(self._bounds, middle)
                self.puts[middle] = Partition(self._setting.put_per_s)
        return found

    def busiest(self) -> int:
        """Writes served by one partition in one second, at most."""
        return max(max(p.seconds.values(), default=0) for p in self.puts.values())


class ModelledStore(Store):
    """A dict for what the driver writes; of workers' shards only the requests exist, of records their numbers."""

    def __init__(self, setting: Setting, clock: Clock, records: "Records") -> None:
        super().__init__("s3://modelled/dataset")
        self._setting, self._clock, self._records = setting, clock, records
        self._folders: dict[str, dict[str, bytes]] = {}
        self.limits = Limits(setting)
        self.rng = random.Random(setting.seed)
        self.requests: Counter[str] = Counter()
        self.waited_s = 0.0
        """Time that the driver spent on requests."""
        self._lock = threading.Lock()

    def latency(self, size_bytes: float = 0) -> float:
        s = self._setting
        return s.put_s * self.rng.lognormvariate(0, 0.5) + size_bytes / s.stream_bytes_per_s

    def _of(self, key: str) -> dict[str, bytes]:
        return self._folders.setdefault(key.partition("/")[0] if "/" in key else "", {})

    def _request(self, kind: str, key: str, size_bytes: int = 0, pages: int = 1) -> None:
        with self._lock:
            begun = self._clock.now
            self.requests[kind] += pages
            bound, put = Retry().first_delay_s, kind == "put"
            while not (self.limits.put(key, self._clock.now) if put else self.limits.get(self._clock.now)):
                self._clock.advance(_REJECT_S + bound / 2)
                bound = min(2 * bound, Retry().longest_delay_s)
            # no chance here: in which order threads of a pool come is not the simulation's to say
            factor = {"put": 1, "get": 2 / 3, "list": 3}[kind]
            transfer_s = size_bytes / self._setting.stream_bytes_per_s
            self._clock.advance(factor * pages * self._setting.put_s + transfer_s)
            self.waited_s += self._clock.now - begun

    def create(self, key: str, data: bytes) -> bool:
        self._request("put", key, len(data))
        created = key not in (folder := self._of(key))
        if folder.setdefault(key, data) != data:
            raise Conflict(f"{key} exists with other content")
        return created

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        if key.startswith("_records/"):
            split, name = key.split("/")[1:]
            data = self._records.of(split, int(name[:8]))
        else:
            data = self._of(key).get(key, b"")
        self._request("get", key, len(data[start:stop]))
        if not data:
            raise FileNotFoundError(key)
        return data[start:stop]

    def listing(self, prefix: str) -> list[Listed]:
        if prefix == "_records":
            keys = sorted(record_key(*unit) for unit in self._records.there)
            self._request("list", prefix, pages=1 + len(keys) // 1000)
            return [Listed(key, 1, 0.0) for key in keys]
        found = sorted(k for k in self._of(f"{prefix}/") if k.startswith(f"{prefix}/"))
        self._request("list", prefix, pages=1 + len(found) // 1000)
        return [Listed(key, len(self._of(key)[key]), 0.0) for key in found]

    def swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        if expected is not None:
            self._request("get", key, len(expected))
        if self._of(key).get(key) not in (expected, data):
            return False
        self._request("put", key, len(data))
        self._of(key)[key] = data
        return True

    def folders(self, prefix: str = "") -> list[str]:
        raise NotImplementedError("neither the driver nor a commit asks for it")

    def delete(self, key: str) -> None:
        raise NotImplementedError("neither the driver nor a commit asks for it")

    def sub(self, name: str) -> "Store":
        raise NotImplementedError("neither the driver nor a commit asks for it")


class Records:
    """Any block's record, without keeping it: one template, its numbers put in."""

    def __init__(self, synthetic: Synthetic) -> None:
        mark = 10_987_654
        self.sites = tuple(sorted(synthetic.sites))
        record = replace(synthetic.record("train", mark), n_sequences=mark + 1)
        text = record.to_json().decode()
        head, _, tail = text.partition('"digest":"')
        self._head, self._tail = (
            part.replace(str(mark + 1), "@n@").replace(str(mark), "@b@") for part in (head, tail[66:])
        )
        rows, context_size = (
            synthetic.identity["block_rows"],
            synthetic.identity["tokens"]["context_size"],
        )
        self._per_block = rows // context_size
        self._rows = RecordRows.of(record)
        self.there: set[tuple[str, int, tuple[str, ...]]] = set()

    def rows(self, block: int) -> bytes:
        """Of train, as a worker sends it."""
        record = _filled(self._rows.record, "block", block)
        record = _filled(record, "n_sequences", (block + 1) * self._per_block)
        statistics = _filled(self._rows.statistics, "block", block)
        return RecordRows(record, statistics, _filled(self._rows.objects, "shard", block)).pack()

    def of(self, split: str, block: int) -> bytes:
        """As it is stored."""
        head, tail = (
            part.replace("@b@", str(block))
            .replace("@n@", str((block + 1) * self._per_block))
            .replace('"train', f'"{split}')
            for part in (self._head, self._tail)
        )
        found = hashlib.sha256((head + tail).encode()).hexdigest()
        return f'{head}"digest":"{found}",{tail}'.encode()


def _filled(batch: pa.RecordBatch, name: str, value: int) -> pa.RecordBatch:
    """The batch with one number in a column."""
    column = pa.array(np.full(len(batch), value))
    return batch.set_column(batch.schema.get_field_index(name), name, column)


class Reference:
    """A result that comes later."""

    __slots__ = ("block", "done", "value")

    def __init__(self, block: bool = False) -> None:
        self.done, self.value, self.block = False, None, block

    def resolve(self, value: Any) -> None:
        if not self.done:
            self.done, self.value = True, value


class Actor:
    """A worker: its LM takes one block at a time, and writes the one before meanwhile."""

    def __init__(self, cloud: "Cloud") -> None:
        self.cloud, self.alive, self.lm_free = cloud, True, 0.0
        self.pending: list[Reference] = []
        self.times = {"blocks": 0.0, "rows": 0.0, "tokens": 0.0, "forward_s": 0.0, "store_s": 0.0}
        self.times["lm_batch"] = 32.0

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: self._call(name, *args))

    def _call(self, name: str, *args: Any) -> Reference:
        reference = Reference(name == "run_block")
        self.pending.append(reference)
        clock, setting = self.cloud.clock, self.cloud.setting
        if name == "run_block":
            self.cloud.run_block(self, args, reference)
        elif name == "start":
            clock.at(clock.now + setting.load_s * self.cloud.rng.uniform(1, 1.5), reference.resolve, "node")
        else:
            answers = {"calibrate": "sdpa", "fidelity": LOSSES, "bare_tokens_per_s": 20_000.0}
            clock.at(clock.now + 10, reference.resolve, answers[name])
        return reference

    def die(self, *, preempted: bool = False) -> None:
        """What a lost node or a SIGKILL does."""
        self.alive = False
        error = ray.exceptions.RayActorError(error_msg="lost", preempted=preempted)
        for reference in self.pending:
            reference.resolve(error)


class Upload:
    """A block's objects on their way: scales, then codes and row metadata, then the record; 8 at a time."""

    def __init__(self, actor: Actor, unit: Any, reference: Reference, cloud: "Cloud") -> None:
        self.actor, self.unit, self.reference, self.cloud = actor, unit, reference, cloud
        self.phases = deque(cloud.phases)
        self.queue: deque[tuple[str, float]] = deque()
        self.running, self.begun = 0, cloud.clock.now
        self._pump()

    def _pump(self) -> None:
        while self.running < 8:
            if not self.queue:
                if self.running:
                    return
                if not self.phases:
                    self.cloud.committed(self)
                    return
                self.queue.extend(self.phases.popleft())
            self.running += 1
            path, size_bytes = self.queue.popleft()
            self._put(self.cloud.key(path, self.unit[1]), size_bytes, 0, self.cloud.clock.now)

    def _put(self, key: str, size_bytes: float, attempt: int, begun: float) -> None:
        if not self.actor.alive:
            return
        cloud, retry = self.cloud, Retry()
        now, store = cloud.clock.now, cloud.store
        if store.limits.put(key, now):
            cloud.clock.at(now + store.latency(size_bytes), self._stored)
            return
        delay = store.rng.uniform(0, min(retry.longest_delay_s, retry.first_delay_s * 2.0**attempt))
        if now + delay - begun > retry.deadline_s:
            self.reference.resolve(StoreError(f"{key}: gave up: 503"))
            self.running = 99  # its other requests end in nothing
            return
        cloud.clock.at(now + _REJECT_S + delay, self._put, key, size_bytes, attempt + 1, begun)

    def _stored(self) -> None:
        if self.actor.alive and self.running < 99:
            self.running -= 1
            self._pump()


class Cloud:
    """Ray as the engine sees it, the workers, and what befalls them."""

    exceptions = ray.exceptions

    def __init__(self, setting: Setting, clock: Clock, store: ModelledStore, synthetic: Synthetic) -> None:
        self.setting, self.clock, self.store, self.records = setting, clock, store, store._records
        self.rng = random.Random(setting.seed + 1)
        self.phases = self._phases(
            array_layout(synthetic.identity, dict.fromkeys(synthetic.sites, synthetic.d_in))
        )
        self.n_rows = synthetic.identity["block_rows"]
        self.computed: Counter[Any] = Counter()
        self.when_s: list[float] = []
        """When each record was written."""
        self.fates: Counter[str] = Counter()

    def _phases(self, layout: Sequence[str]) -> list[list[tuple[str, float]]]:
        scales = [(path, 1300.0) for path in layout if path.endswith("/scale")]
        codes = [(path, self.setting.block_bytes) for path in layout if path.endswith("/codes")]
        others = [(path, 200e3) for path in layout if "/" not in path]
        return [phase for phase in (scales, codes + others, [("_records", 20e3)]) if phase]

    def key(self, path: str, block: int) -> str:
        if path == "_records":
            return f"_records/train/{block:08d}"
        if self.setting.keys == "block":
            return f"train/{block:08d}/{path}"
        return f"train/{path}/c/{block}"

    # of ray

    def remote(self, actor_class: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: Actor(self)))

    def wait(
        self, references: Sequence[Reference], *, num_returns: int, timeout: float
    ) -> tuple[list[Reference], None]:
        begun = time.process_time()
        watched = [r for r in references if not r.done]
        done = [r for r in references if r.done]
        self.clock.cpu_s += time.process_time() - begun
        if not done and timeout:
            # an event resolves a reference or two: looking at all of them at each would take a minute
            count = itertools.count()
            self.clock.run(
                self.clock.now + timeout, lambda: next(count) % 8 == 0 and any(r.done for r in watched)
            )
            begun = time.process_time()
            done = [r for r in references if r.done]
            self.clock.cpu_s += time.process_time() - begun
        return done[:num_returns], None

    def get(self, reference: Reference) -> Any:
        if not reference.done:
            self.clock.run(math.inf, lambda: reference.done)
        if reference.block:
            self.clock.advance(self.setting.driver_s_per_block)
        if isinstance(reference.value, BaseException):
            raise reference.value
        return reference.value

    def kill(self, actor: Actor) -> None:
        actor.die()

    def available_resources(self) -> dict[str, float]:
        return {}

    # of the workers

    def run_block(self, actor: Actor, unit: Any, reference: Reference) -> None:
        clock, setting = self.clock, self.setting
        took = setting.block_s * self.rng.lognormvariate(0, 0.05)
        begin = max(clock.now, actor.lm_free)
        actor.lm_free = begin + took
        actor.times["forward_s"] += took
        fate = "none"
        if self.rng.random() < setting.failures:
            fate = self.rng.choice(("lost", "preempted", "store", "answer lost"))
            self.fates[fate] += 1
        if fate in ("lost", "preempted"):
            when = begin + self.rng.random() * took
            clock.at(when, lambda: actor.die(preempted=fate == "preempted"))
        elif fate == "store":
            error = StoreError("an error of the store that outlasted its retries")
            clock.at(actor.lm_free, reference.resolve, error)
            return
        clock.at(actor.lm_free, self._upload, actor, unit, reference, fate)

    def _upload(self, actor: Actor, unit: Any, reference: Reference, fate: str) -> None:
        if actor.alive:
            Upload(actor, (*unit, fate), reference, self)

    def committed(self, upload: Upload) -> None:
        """The record of a block is there."""
        actor, (split, block, sites, fate) = upload.actor, upload.unit
        self.computed[block] += 1
        self.when_s.append(self.clock.now)
        self.records.there.add((split, block, tuple(sites)))
        if fate == "answer lost":
            actor.die()
            return
        times = actor.times
        times["blocks"] += 1
        times["rows"] += self.n_rows
        times["tokens"] += self.n_rows
        times["store_s"] += self.clock.now - upload.begun
        actor.pending = [r for r in actor.pending if not r.done and r is not upload.reference]
        upload.reference.resolve((self.records.rows(block), dict(times)))


class Versions(Committed):
    """The real one, which notes what each commit costs."""

    def __init__(self, *args: Any, clock: Clock, file: TextIO | None) -> None:
        self._clock, self._file = clock, file
        self.series: list[dict[str, float]] = []
        super().__init__(*args)

    def cpu_s(self) -> float:
        """This process's, without what the simulation takes."""
        return time.process_time() - self._clock.cpu_s

    def commit(self, *args: Any) -> Manifest:
        cpu_s, now = self.cpu_s(), self._clock.now
        manifest = super().commit(*args)
        self.series.append(
            {
                "blocks": sum(sum(map(len, runs.ranges)) for runs in self._runs.values()) // len(self.widths),
                "now_s": round(self._clock.now, 1),
                "cpu_s": round(self.cpu_s(), 3),
                "commit_cpu_s": round(self.cpu_s() - cpu_s, 3),
                "commit_waited_s": round(self._clock.now - now, 3),
            }
        )
        if self._file is not None:
            self._file.write(json.dumps(self.series[-1]) + "\n")
            self._file.flush()
        return manifest


class Engine(ray_engine.RayEngine):
    """The real one over a modelled Ray."""

    def __init__(self, cloud: Cloud) -> None:
        super().__init__(Job(), cloud.setting.workers, 1.0)  # type: ignore[arg-type]
        self._ray, self._started = cloud, False


@dataclass(frozen=True)
class Job:
    """The fields of a `harvester.Job` that reach the provenance."""

    device: str = "modelled"
    compile: bool = False
    lm_batch: int = 32
    threads: int = 1


@contextmanager
def virtual_time(clock: Clock) -> Iterator[None]:
    """The driver's modules see `clock` in place of the module `time`."""
    modules: tuple[Any, ...] = (driver, dispatch, ray_engine)
    before = [m.time for m in modules]
    for module in modules:
        module.time = clock.as_time()
    try:
        yield
    finally:
        for module, real in zip(modules, before, strict=True):
            module.time = real


def simulate(
    setting: Setting, series: TextIO | None = None
) -> tuple[dict[str, Any], ModelledStore, Versions]:
    """Run one harvest; figures, and what is left to look into."""
    names = [f"blocks.{i}.hook_resid_post" for i in range(setting.sites)]
    # 4 channels and a chunk a shard: what a record says of them is arithmetic in docs/scale.md
    synthetic = Synthetic(4, names, block_rows=16_384, chunk_rows=16_384)
    clock = Clock()
    store = ModelledStore(setting, clock, Records(synthetic))
    synthetic.calibrate(store)
    cloud = Cloud(setting, clock, store, synthetic)
    wanted = dict.fromkeys(SPLITS, 0) | {"train": setting.blocks}
    begun_cpu = time.process_time()
    with virtual_time(clock):
        state = Versions(
            store, synthetic.identity, "synthetic", dict.fromkeys(names, 4), wanted, clock=clock, file=series
        )
        n_rows = setting.blocks * synthetic.identity["block_rows"]
        tokens: Any = SimpleNamespace(n_rows=lambda split: n_rows if split == "train" else 0)
        missing = state.missing()
        engine: Any = Engine(cloud)
        job: Any = Job()
        waited, begun = store.waited_s, clock.now
        driver._run(engine, state, tokens, missing, job, begun, setting.workers, False)
    cpu_s = time.process_time() - begun_cpu - clock.cpu_s
    assert state.manifest is not None
    seconds = clock.now - begun
    limits = store.limits
    ideal_s = setting.load_s * 1.25 + setting.blocks * setting.block_s / setting.workers
    figures = {
        **asdict(setting),
        "simulated_s": round(seconds, 1),
        "of_ideal": round(ideal_s / seconds, 4),
        "blocks_per_s": round(setting.blocks / seconds, 2),
        "steady_blocks_per_s": round(_steady(cloud.when_s), 2),
        "puts": limits.served,
        "puts_per_s": round(limits.served / seconds, 1),
        "refused": limits.refused,
        "busiest_partition_puts_in_a_second": limits.busiest(),
        "partitions": len(limits.puts),
        "fates": dict(cloud.fates),
        "computed_twice": sum(n - 1 for n in cloud.computed.values()),
        "manifest_versions": state.manifest.version,
        "segments": len(state.manifest.segments),
        "manifest_bytes": len(state.manifest.to_json()),
        "driver_requests": dict(store.requests),
        "driver_waited_s": round(store.waited_s - waited, 1),
        "driver_cpu_ms_per_block": round(1e3 * cpu_s / setting.blocks, 3),
        "commit_cpu_s_median": median(v["commit_cpu_s"] for v in state.series),
        "commit_cpu_s_dearest": max(v["commit_cpu_s"] for v in state.series),
        "commit_waited_s_median": median(v["commit_waited_s"] for v in state.series),
        "commit_waited_s_dearest": max(v["commit_waited_s"] for v in state.series),
        "simulation_cpu_s": round(clock.cpu_s, 1),
        "peak_MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }
    return figures, store, state


def _steady(when_s: Sequence[float]) -> float:
    """Blocks a second between the first and the last quarter of them: without start and end."""
    quarter = len(when_s) // 4
    return (len(when_s) - 2 * quarter - 1) / (when_s[-1 - quarter] - when_s[quarter])


def blocks_committed(store: ModelledStore, manifest: Manifest) -> list[int]:
    """The blocks of train whose statistics a version's segments state, a number for each time and site."""
    runs = [segment_statistics(store, s).select(["block", "n_blocks"]).to_pylist() for s in manifest.segments]
    return [run["block"] + i for some in runs for run in some for i in range(run["n_blocks"])]


def record_cost(sites: int, d_in: int, blocks: int = 8, rounds: int = 5) -> dict[str, Any]:
    """CPU time and bytes of what the driver does with a block's record at its true size: medians of rounds.

    A round commits `blocks` blocks. The first of a process takes several times as long: its memory is new.
    """
    names = [f"blocks.{i}.hook_resid_post" for i in range(sites)]
    chunk_rows = 2 ** math.floor(math.log2(2**20 / d_in))
    synthetic = Synthetic(d_in, names, chunk_rows=chunk_rows)
    store = DictStore()
    synthetic.calibrate(store)
    state = synthetic.committed(store, train=10**6)
    taken: dict[str, list[float]] = {}

    @contextmanager
    def taking(name: str) -> Iterator[None]:
        begun = time.process_time()
        yield
        taken.setdefault(name, []).append(1e3 * (time.process_time() - begun) / blocks)

    for first in range(0, rounds * blocks, blocks):
        records = [synthetic.record("train", block) for block in range(first, first + blocks)]
        data = [record.to_json() for record in records]
        packed = [RecordRows.of(record).pack() for record in records]
        with taking("receive_and_add"):
            for rows in packed:
                state.add(RecordRows.unpack(rows))
        with taking("commit"):
            state.commit({}, {})
        assert state.manifest is not None
        segment = state.manifest.segments[-1]
        with taking("merge_once_a_tier"):
            merge_segments(store, [segment])
        with taking("parse_when_resuming"):
            for one, record in zip(data, records, strict=True):
                RecordRows.of(BlockRecord.from_json(one, record.key))
    sizes = dict.fromkeys(("records", "statistics", "objects"), 0)
    for file in segment.files:
        sizes[file.kind] += len(store.read(file.key)) // blocks
    return {
        "sites": sites,
        "d_in": d_in,
        "chunks_per_shard": synthetic.identity["block_rows"] // chunk_rows,
        "record_bytes": len(data[0]),
        "packed_bytes": len(packed[0]),
        "segment_bytes_per_block": sizes,
        "cpu_ms_per_block": {name: round(median(some), 2) for name, some in taken.items()},
        "cpu_ms_per_block_of_rounds": {name: [round(x, 2) for x in some] for name, some in taken.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--series", type=argparse.FileType("w"), help="a file for what each version cost")
    parser.add_argument(
        "--record-cost", action="store_true", help="of a record at its true size; no simulation"
    )
    parser.add_argument("--d-in", type=int, help="of the records that are measured; see above")
    args = vars(parser.parse_args())
    series = args.pop("series")
    d_in = args.pop("d_in")
    if args.pop("record_cost"):
        report("scale_record_cost", **record_cost(args["sites"], d_in or 3584))
        return
    setting = Setting(**args)
    if d_in:
        took = record_cost(setting.sites, d_in)["cpu_ms_per_block"]
        charged = took["receive_and_add"] + took["commit"]
        setting = replace(setting, driver_s_per_block=setting.driver_s_per_block + charged / 1e3)
    figures, store, state = simulate(setting, series)
    assert state.manifest is not None
    report("scale_simulation", **figures)
    found = sorted(blocks_committed(store, state.manifest))
    assert found == [block for block in range(setting.blocks) for _ in range(setting.sites)]


if __name__ == "__main__":
    main()
