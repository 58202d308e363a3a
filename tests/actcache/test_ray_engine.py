"""Harvesters as Ray actors: they come late, hang, cannot start; the dataset is that of the local engine."""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from digests import array_digests
from ray_processes import harvester_processes
from tiny_harvest import tiny_spec

import actcache
from actcache.errors import HarvestError
from actcache.metrics import COUNTERS, GAUGES

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A Spec of six blocks and the digests of its dataset."""
    directory = tmp_path_factory.mktemp("undisturbed")
    spec = tiny_spec(directory, n_tokens=6000)
    return spec, array_digests(actcache.harvest(spec, str(directory / "root"), progress=False).url)


def test_workers_that_find_no_place_are_not_waited_for(undisturbed, tmp_path, ray_session):
    """Two workers of three CPUs each on four: the second never comes."""
    spec, wanted = undisturbed
    placement = {"num_cpus": 3}
    dataset = actcache.harvest(
        spec, str(tmp_path), engine="ray", workers=2, placement=placement, progress=False
    )
    assert array_digests(dataset.url) == wanted


def test_a_worker_that_hangs_holds_nothing_up(undisturbed, tmp_path, ray_session):
    """One actor is stopped, not killed, once blocks have been committed: its blocks are done by the other."""
    spec, wanted = undisturbed
    stopped = []

    def stop_one():
        deadline = time.monotonic() + 120
        while not stopped and time.monotonic() < deadline:
            actors = sorted(harvester_processes())
            if len(actors) == 2 and len(list(tmp_path.glob("*/_records/*/*.json"))) >= 1:
                os.kill(actors[0], signal.SIGSTOP)
                stopped.append(actors[0])
            time.sleep(0.005)

    stopper = threading.Thread(target=stop_one)
    stopper.start()
    dataset = actcache.harvest(spec, str(tmp_path), engine="ray", workers=2, progress=False)
    stopper.join()
    assert stopped
    assert array_digests(dataset.url) == wanted


def test_a_worker_that_cannot_start_is_tried_three_times(undisturbed, tmp_path, ray_session, caplog):
    """Every actor is killed as soon as its process is there."""
    spec, _ = undisturbed
    over = threading.Event()

    def kill_all():
        while not over.wait(0.01):
            for pid in harvester_processes():
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with pytest.raises(HarvestError, match="no worker could be started: "):
            actcache.harvest(spec, str(tmp_path), engine="ray", workers=1, progress=False)
    finally:
        over.set()
        killer.join()
    assert caplog.text.count("did not start") == 2
    assert "given up after 3 tries" in caplog.text


def test_metrics_are_exported_under_their_names(undisturbed, tmp_path, ray_session):
    spec, _ = undisturbed
    spec = replace(spec, n_tokens=2000, seed=7)  # a dataset of its own: counters of one go on
    dataset = actcache.harvest(spec, str(tmp_path), engine="ray", workers=1, progress=False)
    port = ray_session.nodes()[0]["MetricsExportPort"]
    wanted = {f"ray_{name}" for name in GAUGES} | {f"ray_{name}_total" for name in COUNTERS}
    deadline, lines = time.monotonic() + 60, []
    while time.monotonic() < deadline and not wanted <= {line.partition("{")[0] for line in lines}:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            found = reply.read().decode()
        lines = [line for line in found.splitlines() if f'dataset="{Path(dataset.url).name}"' in line]
        time.sleep(0.5)
    missing = wanted - {line.partition("{")[0] for line in lines}
    rows = next(line for line in lines if line.startswith("ray_actcache_rows_total{"))
    assert float(rows.rpartition(" ")[2]) == sum(dataset.split(split).n_rows for split in dataset.splits)
    assert missing <= {"ray_actcache_behind_encode_seconds_total", "ray_actcache_behind_store_seconds_total"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus-per-worker", "1"], "a worker needs 1 GPU, and this machine has 0"),
        pytest.param(
            ["--worker-resource", "pool=2"],
            "a worker needs 2 pool, and this machine has 0",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_this_machine_can_never_place_is_refused_at_once(tmp_path, options, message):
    spec = tiny_spec(tmp_path)
    command = [
        sys.executable,
        "-m",
        "actcache",
        "harvest",
        "--model",
        spec.model,
        "--corpus",
        spec.corpus.source,
    ]
    command += ["--site", "blocks.1.hook_resid_post", "--context-size", "16", "--tokens", "1000"]
    command += ["--block-rows", "1024", "--root", str(tmp_path / "root"), "--engine", "ray", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
