"""Harvests on a Ray cluster of several nodes whose processes are killed, from a store with faults.

A seed decides what a `Plan` does: which processes get SIGKILL and when, whether two drivers run at once, where
the dataset lies, and which share of the store's requests meet a fault. The cluster, the store and a process
that forks drivers stay up from run to run; only what was killed is started anew.
"""

import json
import os
import random
import re
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import forks
from fault_proxy import KINDS, FaultProxy
from forks import Forks

SITES = ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out")
KILLED = ("actor", "driver", "raylet")
RUNS_PER_DRIVER = 8
"""A driver is started this often at most."""
RUN_S = 180.0
"""No single run of the command takes longer; else it hangs."""
_WORKER_NODES = 2


class Nodes:
    """A Ray cluster: a head without CPUs, to which drivers connect, and nodes that may die.

    Its files lie apart from those of other clusters on the machine, which would else be taken for it.
    """

    def __init__(self, forks: Forks | None = None) -> None:
        """Start it; with `forks` its workers are forked there."""
        self._forks = forks
        self._directory = tempfile.mkdtemp(prefix="ray-")  # short: sockets have paths of 107 bytes at most
        os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": self._directory}
        from ray.cluster_utils import Cluster

        quick = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 300,
            "health_check_timeout_ms": 3000,
            "health_check_failure_threshold": 3,
            "prestart_worker_first_driver": False,
        }
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": quick},
        )
        self.nodes = [self._new_node() for _ in range(_WORKER_NODES)]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *exc: object) -> None:
        self._cluster.shutdown()
        os.environ.pop("RAY_TMPDIR")
        shutil.rmtree(self._directory, ignore_errors=True)

    def _new_node(self) -> Any:
        forked = {"setup_worker_path": forks.__file__} if self._forks else {}
        return self._cluster.add_node(num_cpus=4, object_store_memory=80 * 1024**2, **forked)

    def kill_raylet(self, i: int) -> None:
        os.kill(_raylet(self.nodes[i]), signal.SIGKILL)

    def replace(self, i: int) -> None:
        """A new node for one whose raylet was killed."""
        self._cluster.remove_node(self.nodes[i], allow_graceful=False)
        self.nodes[i] = self._new_node()

    def actors(self) -> list[int]:
        """Process ids of all Harvesters that were forked."""
        assert self._forks is not None
        return [pid for pid, name in self._forks.running().items() if name.startswith("ray::Harvester")]


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


@dataclass
class Plan:
    """What one seed does."""

    seed: int
    on_s3: bool = field(init=False)
    n_drivers: int = field(init=False)
    rate: float = field(init=False)
    """Share of requests to S3 that meet a fault."""
    kills: list[tuple[float, float, str]] = field(init=False)
    """(share of an undisturbed run's requests or files after which, seconds later, what)."""

    def __post_init__(self) -> None:
        chance = random.Random(f"chaos {self.seed}")
        self.on_s3 = chance.random() < 0.75
        self.n_drivers = chance.choice((1, 1, 1, 2))
        self.rate = chance.choice((0.0, 0.01, 0.02, 0.05)) if self.on_s3 else 0.0
        kinds = chance.choices(KILLED, (5, 4, 3), k=chance.choice((1, 2, 3)))
        self.kills = sorted((chance.random(), chance.choice((0, 0, 0.05, 0.5)), kind) for kind in kinds)

    def fault(self, method: str, target: str, nth: int) -> str | None:
        chance = random.Random(f"{self.seed}/{method}/{target}/{nth}")
        return chance.choice(KINDS) if chance.random() < self.rate else None


class Chaos:
    """Runs plans; `seen` counts what they did."""

    def __init__(self, directory: Path, s3: Mapping[str, Any], nodes: Nodes, forks: Forks) -> None:
        from tiny_harvest import tiny_spec

        self.directory, self.s3, self.nodes, self.forks = directory, dict(s3), nodes, forks
        self.seen: Counter[str] = Counter()
        spec = tiny_spec(directory)
        self._command = ["harvest", "--model", spec.model, "--corpus", spec.corpus.source]
        self._command += ["--context-size", "16", "--block-rows", "1024", "--tokens", "10000"]
        self._command += [word for site in SITES for word in ("--site", site)]
        self._command += ["--engine", "ray", "--workers", "2"]
        self._plans: dict[int, Plan] = {}
        self._requests: Counter[int] = Counter()
        self._proxy = FaultProxy(urlsplit(self.s3["endpoint_url"]).port or 0, self._choose, stall_s=1)

    def __enter__(self) -> "Chaos":
        """Make the dataset that all plans must end in."""
        self._proxy.__enter__()
        undisturbed = Plan(-1)
        undisturbed.on_s3, undisturbed.n_drivers, undisturbed.rate, undisturbed.kills = True, 1, 0.0, []
        self._digests: dict[str, str] | None = None
        self._digests, self._n_files = self._run(undisturbed)
        self._n_requests = self._requests[-1]
        self.seen.clear()
        return self

    def __exit__(self, *exc: object) -> None:
        self._proxy.__exit__(*exc)

    def run(self, seed: int) -> None:
        """Do what the seed says, then hold the dataset to the undisturbed one."""
        plan = Plan(seed)
        try:
            digests, _ = self._run(plan)
            assert digests == self._digests, "the arrays differ from those of an undisturbed run"
        except Exception as err:
            raise AssertionError(f"{plan}: {err!r}; logs in {self._place(plan)}") from err

    def _run(self, plan: Plan) -> tuple[dict[str, str], int]:
        run = _Run(self, plan, self._place(plan))
        self._plans[plan.seed] = plan
        run.drive()
        return run.check()

    def _place(self, plan: Plan) -> Path:
        place = self.directory / f"chaos-{plan.seed}"
        place.mkdir(exist_ok=True)
        return place

    def command(self, plan: Plan) -> list[str]:
        """What each driver of a plan runs, and runs again."""
        out = [*self._command, "--root", self.root(plan)]
        if plan.on_s3:
            retry = {"first_delay_s": 0.005, "longest_delay_s": 0.1}
            options = self.s3 | {
                "endpoint_url": f"http://127.0.0.1:{self._proxy.port}",
                "config_kwargs": {"connect_timeout": 5, "read_timeout": 0.5},
                "actcache_retry": retry,
            }
            for name, value in options.items():
                out += [
                    "--storage-option",
                    f"{name}={value if isinstance(value, str) else json.dumps(value)}",
                ]
        return out

    def root(self, plan: Plan) -> str:
        return f"s3://bucket/chaos-{plan.seed}" if plan.on_s3 else str(self._place(plan) / "root")

    def progress(self, plan: Plan) -> float:
        """Requests or files so far, as a share of an undisturbed run's."""
        if plan.on_s3:
            return self._requests[plan.seed] / self._n_requests
        return sum(len(files) for _, _, files in os.walk(self.root(plan))) / self._n_files

    def _choose(self, method: str, target: str, nth: int) -> str | None:
        match = re.search(r"chaos-(-?\d+)", target)
        if match is None:
            return None
        seed = int(match[1])
        self._requests[seed] += 1
        fault = self._plans[seed].fault(method, target, nth)
        if fault:
            self.seen[f"fault {fault}"] += 1
        return fault


class _Run:
    """One plan."""

    def __init__(self, chaos: Chaos, plan: Plan, place: Path) -> None:
        from actcache.store import open_store

        self._chaos, self._plan, self._place = chaos, plan, place
        self._chance = random.Random(f"victims {plan.seed}")
        self._store = open_store(chaos.root(plan), chaos.s3 if plan.on_s3 else {})
        self._records: dict[str, bytes] = {}
        self._alive: set[int] = set()
        self._doomed: set[int] = set()
        self._drivers: list[Future[None]] = []
        self._lock = threading.Lock()

    def drive(self) -> None:
        """Run the drivers, each again until it exits with 0, while processes are killed."""
        n = self._plan.n_drivers
        self._chaos.seen["runs with two drivers"] += n == 2
        self._chaos.seen[f"runs on {'S3' if self._plan.on_s3 else 'disk'}"] += 1
        with ThreadPoolExecutor(n) as pool:
            self._drivers = [pool.submit(self._until_done, i) for i in range(n)]
            self._kill()  # in this thread: Ray sets signal handlers where it starts a node
            for driver in self._drivers:
                driver.result()

    def _over(self) -> bool:
        return all(driver.done() for driver in self._drivers)

    def _until_done(self, i: int) -> None:
        log = self._place / f"driver-{i}.log"
        for attempt in range(RUNS_PER_DRIVER):
            begin = log.stat().st_size if log.exists() else 0
            pid = self._chaos.forks.start(
                self._chaos.command(self._plan), log, RAY_ADDRESS=self._chaos.nodes.address
            )
            self._alive.add(pid)
            try:
                status = self._chaos.forks.status(pid, RUN_S)
            except TimeoutError as err:
                os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"{err}: {log.read_text()[begin:][-2000:]}") from None
            finally:
                self._alive.discard(pid)
            self._check_records()
            self._chaos.seen["reruns"] += attempt > 0
            if status == 0:
                return
            if pid in self._doomed:
                continue
            said = log.read_text()[begin:]
            assert status == 1, f"exit {status}: {said[-2000:]}"
            assert "Traceback" not in said, f"not one clear line but:\n{said[-4000:]}"
            self._chaos.seen["drivers that gave up"] += 1
        raise AssertionError(f"not done after {RUNS_PER_DRIVER} runs: {log.read_text()[-2000:]}")

    def _kill(self) -> None:
        for share, delay_s, kind in self._plan.kills:
            while self._chaos.progress(self._plan) < share and not self._over():
                time.sleep(0.01)
            time.sleep(delay_s)
            kill = {"actor": self._kill_actor, "driver": self._kill_driver, "raylet": self._kill_raylet}
            hit = kill[kind]()
            self._chaos.seen[f"{kind} killed" if hit else f"{kind} missed"] += 1

    def _victim(self, candidates: Callable[[], list[int]]) -> int | None:
        """One of them, as soon as there is one."""
        while not self._over():
            found = sorted(candidates())
            if found:
                return self._chance.choice(found)
            time.sleep(0.02)
        return None

    def _kill_actor(self) -> bool:
        pid = self._victim(self._chaos.nodes.actors)
        return pid is not None and _kill(pid)

    def _kill_driver(self) -> bool:
        pid = self._victim(lambda: list(self._alive))
        if pid is None:
            return False
        self._doomed.add(pid)
        return _kill(pid)

    def _kill_raylet(self) -> bool:
        if self._over():
            return False
        i = self._chance.randrange(_WORKER_NODES)
        self._chaos.nodes.kill_raylet(i)
        time.sleep(self._chance.random())
        self._chaos.nodes.replace(i)
        return True

    def _check_records(self) -> None:
        """A committed record stays as it is."""
        with self._lock:
            found = {}
            for name in self._store.folders():
                if name != "tokens":
                    dataset = self._store.sub(name)
                    found |= {f"{name}/{o.key}": dataset.read(o.key) for o in dataset.listing("_records")}
            assert self._records.items() <= found.items(), "a committed record changed"
            self._records = found

    def check(self) -> tuple[dict[str, str], int]:
        """(digests of all arrays as plain zarr reads them, number of objects) of a dataset found sound."""
        from schedules import check_leftovers
        from test_harvest import array_digests

        import actcache
        from actcache.verify import verify

        [name] = [name for name in self._store.folders() if name != "tokens" and not name.startswith("_")]
        dataset = actcache.open(
            f"{self._store.url}/{name}", storage_options=self._chaos.s3 if self._plan.on_s3 else {}
        )
        assert dataset.manifest.complete
        counts = verify(dataset, deep=True, progress=False)
        check_leftovers(self._store.sub(name), counts["unreferenced objects"])
        copy = self._place / "copy"
        with ThreadPoolExecutor(4) as pool:
            keys = [o.key for o in self._store.listing("")]
            for key, data in zip(keys, pool.map(self._store.read, keys), strict=True):
                (copy / key).parent.mkdir(parents=True, exist_ok=True)
                (copy / key).write_bytes(data)
        digests = array_digests(str(copy / name))
        shutil.rmtree(copy)
        return digests, len(keys)


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
