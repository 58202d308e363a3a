"""Ranks, nodes and drivers killed by seed on a Ray cluster: the run ends in the undisturbed result.

Kills at and between checkpoints of ranks alone are in tests/sae/test_rank_kills.py. A kill waits for a number of
rows that the seed says, never for a time.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "actcache"))
sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))

from ray_cluster import RayCluster
from test_distributed import by_command, checkpoint, command, ds, largest_difference

import sae

__all__ = ["ds"]  # a fixture

_LIMIT_S = 400


def _rows(out: Path) -> int:
    """Rows of the last line that rank 0 has logged."""
    for file in sorted(out.glob("*/metrics.jsonl")):
        lines = [line for line in file.read_text().splitlines() if line.endswith("}")]
        return json.loads(lines[-1])["rows"] if lines else 0
    return 0


def _reached(out: Path, rows: int, process: subprocess.Popen) -> bool:
    """True once so many rows are logged, a checkpoint is there and ranks run; False if the process ended before."""
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        if checkpoint(out) and _rows(out) >= rows and _ranks():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.05)
    raise AssertionError(f"nothing happened for {_LIMIT_S} s")


def _ranks() -> list[int]:
    """Process ids of the ranks on this machine."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if "ray::RayTrainWorker" in (process / "cmdline").read_text():
                found.append(int(process.name))
        except OSError:  # it has just ended
            continue
    return sorted(found)


@pytest.fixture(scope="module")
def cluster():
    with RayCluster(head_cpus=1) as found:
        found.workers = []
        for _ in range(2):
            _add_worker(found)
        yield found


def _add_worker(cluster) -> None:
    """A node of one CPU, once it has joined: two that start at once may time out on a busy machine."""
    cluster.workers.append(cluster.add_node(1))
    cluster.wait_for_nodes(1 + len(cluster.workers))


@pytest.fixture(scope="module")
def undisturbed(ds, tmp_path_factory) -> list[sae.SAE]:
    stream, configs, training = by_command(ds)
    return sae.train(stream, configs, training, out=tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_by_seed_on_a_cluster_ends_in_the_undisturbed_result(
    ds, undisturbed, tmp_path, cluster, seed
):
    rng, out, kills = random.Random(seed), tmp_path / "run", []
    environment = {**cluster.environment, "RAY_ADDRESS": f"127.0.0.1:{cluster._port}", "OMP_NUM_THREADS": "1"}
    environment["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *command(ds, out, "--workers", "2")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )

    process = start()
    for kind in rng.sample(["rank", "node", "driver"], 2):
        if not _reached(out, _rows(out) + rng.randrange(3_000, 30_000), process):
            break
        kills.append(kind)
        if kind == "rank":
            os.kill(rng.choice(_ranks()), signal.SIGKILL)
        elif kind == "node":
            cluster.kill(cluster.workers.pop(rng.randrange(2)))
            _add_worker(cluster)
        else:
            process.kill()
            process.communicate(timeout=60)
            process = start()
    said, _ = process.communicate(timeout=_LIMIT_S)
    assert process.returncode == 0, said
    assert kills
    saes = [sae.load(out / name) for name in json.loads((out / "run.json").read_text())["saes"]]
    assert largest_difference(saes, undisturbed) == 0, kills
