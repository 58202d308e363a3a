"""What a Ray cluster costs the harvest: scaling over actors, the driver's work per block, time to the first block.

Everything runs on one machine, on a cluster of a head and two nodes (`ray.cluster_utils.Cluster`).

- scaling: the forward pass is a sleep that returns recorded activations; all the rest of a Harvester is real
  (plan, quantise, statistics, permute, encode, store, commit). It sleeps 0.5 s for 8,192 tokens, so that the CPU
  work of 4 actors fits into 2 cores. The rate is taken over whole rounds of a block each, from the end of the
  first to one that leaves every actor two more to do.
- driver: 1,000 blocks in flight on actors that sleep and answer with a synthetic record; CPU time and time on
  the clock of the driver for each block, from the first submission to the last version. The actors make their
  records on the same cores, so that the CPU time is the figure.
- first block: `actcache harvest` of the bundled model into an empty root, from the start of the process to
  the first committed record of 32,768 rows; 500,000 tokens of corpus are tokenised on the way.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "actcache"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before tests/, whose folders have the packages' names

import numpy as np
from chaos import Nodes
from hardware import report
from synthetic import LOSSES, Synthetic

import actcache
from actcache.codec import Precision
from actcache.corpus import open_tokens, tokenise
from actcache.driver import Resolved, harvest_missing, resolve
from actcache.engines import Unit
from actcache.harvester import Harvester, Job
from actcache.manifest import read_manifest
from actcache.overlap import Times
from actcache.ray_engine import HarvesterActor, RayEngine
from actcache.segments import RecordRows
from actcache.store import open_store

SITE = "blocks.3.hook_resid_post"
D_IN = 192
CONTEXT = 256
LM_BATCH = 32
_LIGHTS = 4
"""Processes that stand for hundreds of workers."""


class Simulated(Harvester):
    """A Harvester without an LM: each batch of `_forward` sleeps, then returns recorded activations."""

    def __init__(self, job: Job, batch_s: float) -> None:
        self.job, self.batch_s = job, batch_s
        self.store = open_store(job.dataset_url, job.storage_options)
        tokens = open_tokens(open_store(job.tokens_url, job.storage_options))
        assert tokens is not None
        self.tokens = tokens
        self.precision = Precision.parse(job.identity["precision"])
        self.d_in = {SITE: D_IN}
        self._start()
        rng = np.random.default_rng(0)
        scale_D = np.exp(rng.normal(size=D_IN)).astype(np.float32)
        self._acts_BTD = rng.normal(size=(LM_BATCH, CONTEXT, D_IN)).astype(np.float32) * scale_D

    def attention(self) -> str:
        return "simulated"

    def fidelity(self, site: str) -> dict[str, float | None]:
        return dict(LOSSES)

    def bare_tokens_per_s(self, sites: Any, seconds: float) -> float:
        return LM_BATCH * CONTEXT / self.batch_s

    def _forward(
        self, input_ids_ST: np.ndarray, sites: Any, length_S: np.ndarray, position_ids_ST: Any = None
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for start in range(0, len(input_ids_ST), LM_BATCH):
            n = min(LM_BATCH, len(input_ids_ST) - start)
            time.sleep(self.batch_s * n / LM_BATCH)
            yield start, {SITE: self._acts_BTD[:n]}


class Timed(RayEngine):
    """The engine with Simulated Harvesters; notes when each block came."""

    def __init__(self, job: Job, workers: int, batch_s: float, came: list[float]) -> None:
        super().__init__(job, workers, 0)
        self._came = came

        class SimulatedActor(HarvesterActor):
            def start(self, job: Job) -> str:
                self._harvester = Simulated(job, batch_s)
                return "here"

        self.actor_class = SimulatedActor

    def completed(self) -> Iterator[tuple[Unit, RecordRows | BaseException]]:
        for unit, result in super().completed():
            assert isinstance(result, RecordRows), result
            self._came.append(time.perf_counter())
            yield unit, result


def scaling(directory: Path, actors: list[int], blocks_each: int, batch_s: float) -> dict[str, Any]:
    """Rows/s for each number of actors, and its ratio to as many times one actor's."""
    block_rows = 4 * LM_BATCH * CONTEXT
    spec = actcache.Spec(
        model="bundled:stdlib-gpt2",
        corpus=actcache.Corpus(
            "bundled:stdlib", max_tokens=int(1.2 * max(actors) * blocks_each * block_rows)
        ),
        sites=[SITE],
        context_size=CONTEXT,
        n_tokens=block_rows,
        block_rows=block_rows,
        validation_blocks=0,
        test_blocks=0,
    )
    resolved = resolve(spec)
    root = open_store(str(directory / "tokens"))
    tokens = tokenise(spec, resolved.corpus, resolved.tokenizer, root, progress=False)
    rates, busy = {}, {}
    for n in actors:
        asked = replace(resolved, spec=replace(spec, n_tokens=n * blocks_each * block_rows))
        store = open_store(str(directory / f"actors-{n}"))
        job = asked.job(store.url, tokens.store.url, lm_batch=LM_BATCH)
        came: list[float] = []
        engine = partial(Timed, workers=n, batch_s=batch_s, came=came)
        harvest_missing(store, asked, tokens, job, engine, start=time.monotonic(), workers=n, progress=False)
        assert read_manifest(store).complete
        first = n - 1
        last = (
            first + (len(came) - 2 * n - first) // n * n
        )  # whole rounds: actors in step end blocks together
        rates[n] = (last - first) * block_rows / (came[last] - came[first])
        busy[n] = last - first
    return {
        "batch_sleep_s": batch_s,
        "block_rows": block_rows,
        "rows_per_s": {n: round(rate) for n, rate in rates.items()},
        "blocks_timed": busy,
        "ratio_to_linear": {
            n: round(rate / (n * rates[actors[0]] / actors[0]), 4) for n, rate in rates.items()
        },
    }


class Light:
    """An async actor on which hundreds of blocks are in flight: it sleeps and answers with a record."""

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self._synthetic = Synthetic()

    async def run_block(
        self, split: str, block: int, sites: tuple[str, ...]
    ) -> tuple[bytes, dict[str, float]]:
        """The rows of a block's record, as large as a real one, and times."""
        record = self._synthetic.rows(split, block, sites).pack()
        await asyncio.sleep(self._latency_s)
        return record, Times().snapshot() | {"lm_batch": LM_BATCH}


class _Handle:
    """What the engine takes for an actor."""

    def __init__(self, run_block: Any) -> None:
        self.run_block = run_block


class Crowd(RayEngine):
    """The engine with `workers` handles of a few Light actors in place of as many Harvesters."""

    def __init__(self, job: Job, workers: int, latency_s: float, spent: dict[str, float]) -> None:
        super().__init__(job, workers, 0)
        self._latency_s, self._spent = latency_s, spent

    def prepare(self) -> str:
        light = self._ray.remote(num_cpus=1, max_concurrency=1000)(Light)
        self._lights = [light.remote(self._latency_s) for _ in range(_LIGHTS)]
        self._ray.get([actor.__ray_ready__.remote() for actor in self._lights])
        for worker in self._workers:
            worker.actor = _Handle(self._lights[worker.number % _LIGHTS].run_block)
        self._spent |= {
            "cpu": -time.process_time(),
            "wall": -time.perf_counter(),
            "submit": 0,
            "completed": 0,
        }
        return "simulated"

    def submit(self, unit: Unit) -> None:
        begun = time.thread_time()
        super().submit(unit)
        self._spent["submit"] += time.thread_time() - begun
        self._spent["in_flight"] = max(self._spent.get("in_flight", 0), len(self._running))

    def completed(self) -> Iterator[tuple[Unit, RecordRows | BaseException]]:
        begun = time.thread_time()
        done = list(super().completed())
        self._spent["completed"] += time.thread_time() - begun
        for unit, result in done:
            assert isinstance(result, RecordRows), result
            yield unit, result

    def fidelity(self, sites: Any) -> dict[str, dict[str, float | None]]:
        return {site: dict(LOSSES) for site in sites}

    def __exit__(self, *exc: object) -> None:
        self._spent["cpu"] += time.process_time()
        self._spent["wall"] += time.perf_counter()
        for worker in self._workers:
            worker.actor = None
        for light in self._lights:
            self._ray.kill(light)
        super().__exit__(*exc)


def driver(directory: Path, blocks: int, in_flight: int, latency_s: float) -> dict[str, Any]:
    """What a block costs the driver."""
    synthetic = Synthetic(D_IN)
    rows = synthetic.identity["block_rows"]
    store = open_store(str(directory / "driver"))
    synthetic.calibrate(store)
    spec = actcache.Spec(
        model="synthetic", corpus=actcache.Corpus("synthetic"), sites=list(synthetic.sites),
        context_size=CONTEXT, n_tokens=blocks * rows, validation_blocks=0, test_blocks=0,
    )  # fmt: skip
    corpus: Any = None
    asked = Resolved(spec, synthetic.identity, dict.fromkeys(synthetic.sites, D_IN), corpus, None)
    tokens: Any = SimpleNamespace(n_rows=lambda split: blocks * rows if split == "train" else 0)
    spent: dict[str, float] = {}
    engine = partial(Crowd, workers=in_flight // 2, latency_s=latency_s, spent=spent)
    harvest_missing(
        store,
        asked,
        tokens,
        asked.job(store.url, "", lm_batch=LM_BATCH),
        engine,
        start=time.monotonic(),
        progress=False,
    )
    assert read_manifest(store).complete
    return {
        "driver_blocks": blocks,
        "driver_in_flight": int(spent["in_flight"]),
        "driver_cpu_ms_per_block": round(1e3 * spent["cpu"] / blocks, 3),
        "driver_wall_ms_per_block": round(1e3 * spent["wall"] / blocks, 3),
        "of_which_submit_ms": round(1e3 * spent["submit"] / blocks, 3),
        "of_which_wait_and_get_ms": round(1e3 * spent["completed"] / blocks, 3),
    }


def first_block(directory: Path, address: str) -> dict[str, Any]:
    """Seconds from the start of the command to its first committed record."""
    root = directory / "first"
    command = [sys.executable, "-W", "ignore", "-m", "actcache", "harvest", "--root", str(root)]
    command += ["--max-tokens", "500000", "--tokens", "65536", "--block-rows", "32768"]
    command += ["--engine", "ray", "--workers", "2"]
    begun = time.perf_counter()
    with subprocess.Popen(
        command,
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            while not list(root.glob("*/_records/*/*.json")) and process.poll() is None:
                time.sleep(0.01)
            first_s = time.perf_counter() - begun
            status = process.wait()
        finally:
            process.kill()
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}; run it by hand to see why")
    return {"first_block_s": round(first_s, 1), "command_s": round(time.perf_counter() - begun, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--blocks-each", type=int, default=12, help="blocks per actor of the scaling runs")
    parser.add_argument("--batch-s", type=float, default=0.5, help="sleep for each LM batch of 8,192 tokens")
    parser.add_argument("--blocks", type=int, default=4000, help="blocks of the driver's run")
    parser.add_argument("--in-flight", type=int, default=1000)
    parser.add_argument("--latency-s", type=float, default=4.0, help="what a simulated block takes")
    parser.add_argument("--parts", nargs="+", default=["scaling", "driver", "first-block"])
    args = parser.parse_args()
    import ray

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary, Nodes() as nodes:
        directory = Path(temporary)
        if "first-block" in args.parts:
            figures |= first_block(directory, nodes.address)
        ray.init(
            nodes.address,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
        )
        if "scaling" in args.parts:
            figures |= scaling(directory, args.actors, args.blocks_each, args.batch_s)
        if "driver" in args.parts:
            figures |= driver(directory, args.blocks, args.in_flight, args.latency_s)
        ray.shutdown()
    report("scaling", **figures)


if __name__ == "__main__":
    main()
