"""Runs of several workers: asked for, started by Ray or torchrun, crashed, stopped, and resumed by the other.

The ranks are those of tests/sae/test_spread.py, here on a real Ray and a dataset on disk. `slow` tests act on a
run while it goes on: they wait for a checkpoint of it, never for a time.
"""

import contextlib
import io
import json
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "actcache"))
sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))

from ray_cluster import RayCluster
from ray_processes import ancestors
from tiny_harvest import SITES, tiny_spec

import actcache
import sae
from actcache.errors import (
    ActcacheError,
    Conflict,
    DamagedDataset,
    Drained,
    NonFiniteActivation,
    RankFailed,
    SpecError,
    StoreError,
    WorkerLost,
)
from sae import ray_train
from sae.distributed import Job, Workers, check_finished, directory_of, run_rank
from sae.ray_ranks import Launch, last_line, portable

SITE = SITES[0]
CONFIGS = [
    sae.TopK(d_sae=64, k=4, site=SITE),
    sae.BatchTopK(d_sae=64, k=4, site=SITE),
    sae.JumpReLU(d_sae=64, target_l0=6, site=SITE, optimiser=sae.Optimiser(lr=1e-3)),
    sae.TopK(d_sae=48, k=6, site=SITES[1]),
]
TRAINING = sae.Training(n_rows=5000, lr=2e-3, dead_after_rows=1500, checkpoint_every_rows=1000)
LONG = replace(TRAINING, n_rows=120_000, checkpoint_every_rows=4000)


@pytest.fixture(scope="module")
def ds(tmp_path_factory):
    directory = tmp_path_factory.mktemp("distributed")
    return actcache.harvest(
        tiny_spec(directory), root=str(directory / "root"), engine="local", progress=False
    )


@pytest.fixture(autouse=True)
def _quick_polls(monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


def stream(ds, epochs=60):
    return ds.stream(list(SITES), batch_size=128, epochs=epochs, metadata=False)


def job(ds, out, **changes):
    wanted = {"stream": stream(ds), "configs": CONFIGS, "training": TRAINING, "start": [None] * len(CONFIGS)}
    return Job(**{**wanted, "out": str(out), **changes})


def largest_difference(saes, others):
    """Over all weights, of SAEs whose decoder rows have norm 1."""
    return max(
        float((a - b).abs().max())
        for s, other in zip(saes, others, strict=True)
        for a, b in zip(s.state_dict().values(), other.state_dict().values(), strict=True)
    )


def lines(out):
    """Step, rows and loss of all logged steps, by SAE."""
    found = {}
    for file in sorted(Path(out).glob("*/metrics.jsonl")):
        told = [json.loads(line) for line in file.read_text().splitlines()]
        found[file.parent.name] = [(m["step"], m["rows"], m["loss"]) for m in told]
    return found


# What is asked for


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [(4, 4, 4), ("4", 4, 4), ((2, 8), 2, 8), ([2, 8], 2, 8), ("2..8", 2, 8), (" 3..3 ", 3, 3)],
)
def test_workers_are_a_number_or_the_least_and_the_most(asked, least, most):
    workers = Workers.of(asked)
    assert (workers.least, workers.most, workers.elastic) == (least, most, least < most)


@pytest.mark.parametrize("asked", ["four", "2-8", "8..", "1..2..3", (2,), (2, 3, 4), (2.0, 8), 2.5, True, ""])
def test_other_workers_are_refused_with_the_two_forms(asked):
    with pytest.raises(SpecError, match=r"give a number, or the least and the most as 2\.\.8"):
        Workers.of(asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "workers is 0 to 0; it must be at least 1"),
        (("8..2",), "workers is 8 to 2; it must be at least 1, the least first"),
        ((2, 0.5), "gpus_per_worker is 0.5; a worker trains on one GPU, so give 0 or 1"),
        ((2, 2), "gpus_per_worker is 2; "),
        ((2, 0, 0), "cpus_per_worker is 0; give a whole number of at least 1"),
        ((2, 0, 1.5), "cpus_per_worker is 1.5; "),
    ],
)
def test_workers_that_can_not_be_are_refused(arguments, message):
    with pytest.raises(SpecError, match=message):
        Workers.of(*arguments)


def test_workers_read_as_a_person_asks_for_them():
    assert str(Workers.of(4, 1)) == "4 workers of 1 GPU and 1 CPU"
    assert str(Workers.of("2..8", 0, 3)) == "2 to 8 workers of 3 CPU"
    assert str(Workers.of(1)) == "1 worker of 1 CPU"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": None}, "several workers need `out`"),
        ({"out": "memory://runs/x"}, "is in the memory of one process"),
        ({"spread": "experts"}, "spread is 'experts'; it is one of saes, latents, rows"),
        ({"spread": "rows=2,latents=3"}, "is of 6 workers, and there are 2"),
        ({"spread": "rows=2,latents=1", "workers": (2, 4)}, "is of 2 workers, and there are 3"),
        ({"spread": "saes", "workers": "2..9"}, "4 SAEs can not be dealt to 5 workers"),
        ({"device": "cuda"}, "device is cuda, of one process; .* gpus_per_worker=1"),
        ({"workers": None, "spread": "latents"}, "are for several processes, and one trains alone"),
        ({"workers": None, "gpus_per_worker": 1}, "are for several processes, and one trains alone"),
        ({"workers": "many"}, "workers is 'many'"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_before_ray_is_there(ds, tmp_path, changes, message):
    options = {"out": tmp_path / "run", "workers": 2, **changes}
    with pytest.raises(SpecError, match=message):
        sae.train(stream(ds), CONFIGS, TRAINING, **options)
    assert not (tmp_path / "run").exists()


def test_rows_in_memory_are_refused_with_what_to_do(ds, tmp_path):
    rows = sae.ArrayStream(ds.read(SITE, slice(0, 500)), site=SITE)
    with pytest.raises(SpecError, match="take a stream of a dataset .* or start this script with torchrun"):
        sae.train(rows, CONFIGS[0], TRAINING, out=tmp_path / "run", workers=2)


def test_a_dataset_in_memory_is_refused(ds, tmp_path):
    fsspec.filesystem("memory").put(ds.url, "/distributed/ds", recursive=True)
    copy = actcache.open("memory://distributed/ds")
    with pytest.raises(SpecError, match="is in the memory of this process; copy the dataset"):
        sae.train(stream(copy), CONFIGS, TRAINING, out=tmp_path / "run", workers=2)


def test_torchrun_and_workers_exclude_each_other(ds, tmp_path, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SpecError, match="torchrun has started the processes already; leave out workers"):
        sae.train(stream(ds), CONFIGS, TRAINING, out=tmp_path / "run", workers=2)


def test_a_job_holds_no_rows(ds, tmp_path):
    sent = pickle.dumps(job(ds, tmp_path / "run"))
    assert len(sent) < 50_000 < 4 * ds.n_rows * ds.d_in(SITE)


def test_the_driver_makes_no_weights(ds, tmp_path):
    """It looks at settings and directory as the ranks will; these weights have no place on any machine."""
    huge = {"configs": [sae.TopK(d_sae=10**13, k=4, site=SITE)], "start": [None]}
    directory = directory_of(job(ds, tmp_path / "run", **huge))
    assert directory.open(resume=True) is None
    with pytest.raises(SpecError, match="the stream serves 1 x"):
        directory_of(job(ds, tmp_path / "run", **huge, stream=stream(ds, epochs=1)))


# What ranks and driver know of each other


def test_a_rank_that_does_not_see_the_run_refuses(ds, tmp_path):
    """As on a node with another disk: the driver has made the directory elsewhere."""
    with pytest.raises(StoreError, match=r"has no run.json as seen by this rank. Give all ranks one place"):
        run_rank(job(ds, tmp_path / "elsewhere"), prepared=True)


def test_a_driver_that_does_not_see_the_result_says_so(ds, tmp_path):
    directory_of(job(ds, tmp_path / "run")).open(resume=True)
    with pytest.raises(StoreError, match="the workers have finished, but .*run is not finished as seen from"):
        check_finished(job(ds, tmp_path / "run"))


def test_errors_reach_the_driver_as_they_are_or_by_their_message():
    for error in (SpecError("a"), Conflict("b"), NonFiniteActivation("c", 3), sae.NonFiniteLoss("d")):
        sent = pickle.loads(pickle.dumps(portable(error)))
        assert (type(sent), str(sent)) == (type(error), str(error))
    damaged = DamagedDataset("s3://x", ["one", "two"], {})  # made of other arguments than its message
    assert type(portable(damaged)) is ActcacheError
    assert str(portable(damaged)) == str(damaged)


def test_the_first_failure_is_the_own_one_of_the_rank_that_failed():
    launch = Launch()
    assert not launch.failed(0, RankFailed("rank 1: the disk is full"))
    assert launch.failed(1, StoreError("the disk is full"))
    assert launch.failed(0, RankFailed("rank 1: the disk is full"))
    assert [type(error) for _, error in launch.look()[1]] == [RankFailed, StoreError]
    assert isinstance(ray_train._first(launch.look()[1]), StoreError)


def test_a_cause_is_the_last_line_of_a_traceback():
    assert (
        last_line("Traceback ...\n  File x\nRuntimeError: out of memory\n\n") == "RuntimeError: out of memory"
    )
    assert last_line(" \n") == "an error without a message"


def test_what_rays_own_threads_print_stays_out_of_standard_output():
    stdout = io.StringIO()
    aside = ray_train.Aside(stdout)
    by_ray = threading.Thread(
        target=print, args=("(raylet) a worker died",), kwargs={"file": aside}, name="ray_listen"
    )
    by_ray.start()
    by_ray.join()
    print("the table", file=aside)
    assert (stdout.getvalue(), aside.said.getvalue()) == ("the table\n", "(raylet) a worker died\n")


# On Ray


@pytest.fixture(scope="module")
def alone(ds, tmp_path_factory):
    """One process: the SAEs and the directory."""
    out = tmp_path_factory.mktemp("alone") / "run"
    return sae.train(stream(ds), CONFIGS, TRAINING, out=out), out


@pytest.mark.ray
def test_two_workers_train_what_one_process_trains(ds, alone, tmp_path, ray_session, caplog):
    caplog.set_level(logging.INFO)
    out = tmp_path / "run"
    saes = sae.train(stream(ds), CONFIGS, TRAINING, out=out, workers=2, spread="latents")
    assert largest_difference(saes, alone[0]) < 1e-5
    told, wanted = lines(out), lines(alone[1])
    assert told.keys() == wanted.keys()
    for name in told:
        assert [step[:2] for step in told[name]] == [step[:2] for step in wanted[name]]
        assert [loss for *_, loss in told[name]] == pytest.approx(
            [loss for *_, loss in wanted[name]], rel=1e-5
        )
    assert "waiting for 2 workers of 1 CPU" in caplog.text
    assert "2 workers after" in caplog.text
    assert "spread by latents" in caplog.text
    caplog.clear()
    again = sae.train(stream(ds), CONFIGS, TRAINING, out=out, workers=3)
    assert largest_difference(again, saes) == 0
    assert "already holds this finished run" in caplog.text
    assert "waiting" not in caplog.text
    with pytest.raises(Conflict, match=r"holds a run of other settings \(training.lr: 0.002 -> 0.001\)"):
        sae.train(stream(ds), CONFIGS, replace(TRAINING, lr=1e-3), out=out, workers=2)


# On Ray, acted upon


@pytest.fixture(scope="module")
def alone_long(ds, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "long"
    return sae.train(stream(ds), CONFIGS, LONG, out=out), out


def await_(condition, seconds=300):
    """What `condition` gives once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.05)
    return found


def checkpoint(out):
    """Whether a run has one."""
    return any(Path(out).glob("checkpoints/*/done.json"))


def await_checkpoint(out, process):
    """Until the run of a process has one."""
    await_(lambda: checkpoint(out) or process.poll() is not None)
    assert process.poll() is None, process.communicate()


def workers_of(pid):
    """Process ids of the ranks that a Ray under `pid` runs, ascending."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if "ray::RayTrainWorker" in (process / "cmdline").read_text() and pid in ancestors(
                int(process.name)
            ):
                found.append(int(process.name))
        except OSError:  # it has just ended
            continue
    return sorted(found)


@contextlib.contextmanager
def meanwhile(action):
    """`action` in a thread; what it raises is raised at the end."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(action)
        yield
        future.result(timeout=60)


def command(ds, out, *options):
    """A run of LONG in a process of its own."""
    saes = ["topk:d_sae=64,k=4", "batchtopk:d_sae=64,k=4", "jumprelu:d_sae=64,target_l0=6,lr=1e-3"]
    own = [item for text in saes for item in ("--sae", text)]
    of_run = ["--data", ds.url, "--site", SITE, "--out", str(out), "--batch-size", "128", "--epochs", "60"]
    settings = ["--rows", "120000", "--lr", "2e-3", "--checkpoint-every-rows", "4000"]
    return ["-m", "sae", "train", *of_run, *own, *settings, "--dead-after-rows", "1500", *options]


def by_command(ds):
    """Arguments of `sae.train` for the same run."""
    configs = [replace(c, site=SITE) for c in CONFIGS[:3]]
    one_site = ds.stream(SITE, batch_size=128, epochs=60, metadata=False)
    return one_site, configs, LONG


def started(*arguments, environment=None):
    if environment is None:
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "spread", "tolerance"),
    [(2, None, 0.0), (3, "rows", 1e-5), (4, "rows=2,latents=2", 1e-5), (1, None, 0.0)],
)
def test_every_spread_trains_what_one_process_trains(
    ds, alone, tmp_path, ray_session, workers, spread, tolerance
):
    saes = sae.train(stream(ds), CONFIGS, TRAINING, out=tmp_path / "run", workers=workers, spread=spread)
    assert largest_difference(saes, alone[0]) <= tolerance


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_rank_costs_no_row(ds, alone_long, tmp_path, ray_session, caplog):
    """Whole SAEs are dealt, so the result is that of one process to the last bit."""
    caplog.set_level(logging.INFO)
    out = tmp_path / "run"

    def kill():
        await_(lambda: checkpoint(out))
        os.kill(workers_of(os.getpid())[-1], signal.SIGKILL)

    with meanwhile(kill):
        saes = sae.train(stream(ds), CONFIGS, LONG, out=out, workers=2)
    assert "was lost (its process has ended), at row" in caplog.text
    assert "continuing after" in caplog.text
    assert largest_difference(saes, alone_long[0]) == 0
    assert lines(out) == lines(alone_long[1])


@pytest.mark.ray
@pytest.mark.slow
def test_sigterm_saves_and_another_number_of_workers_goes_on(ds, alone_long, tmp_path, ray_session, caplog):
    caplog.set_level(logging.INFO)
    out = tmp_path / "run"

    def stop():
        await_(lambda: checkpoint(out))
        os.kill(os.getpid(), signal.SIGTERM)

    with meanwhile(stop), pytest.raises(Drained, match=r"stopped after [\d,]+ rows, saved in .*run; run the"):
        sae.train(stream(ds), CONFIGS, LONG, out=out, workers=2)
    assert not workers_of(os.getpid())
    saes = sae.train(stream(ds), CONFIGS, LONG, out=out, workers="3")
    assert "continuing after" in caplog.text
    assert largest_difference(saes, alone_long[0]) == 0
    assert lines(out) == lines(alone_long[1])


@pytest.mark.ray
@pytest.mark.slow
def test_three_crashes_at_one_row_end_the_run(ds, tmp_path, ray_session, caplog):
    over = threading.Event()

    def kill_all():
        while not over.wait(0.01):
            for pid in workers_of(os.getpid()):
                os.kill(pid, signal.SIGKILL)

    with meanwhile(kill_all):
        try:
            with pytest.raises(WorkerLost, match="at row 0; that was the third crash in a row") as caught:
                sae.train(stream(ds), CONFIGS, LONG, out=tmp_path / "run", workers=2)
        finally:
            over.set()
    assert caplog.text.count("starting the workers again") == 2
    path = re.search(r"(\S+) has all that is known", str(caught.value))
    assert path is not None
    assert "died" in Path(path[1]).read_text()
    Path(path[1]).unlink()


@pytest.mark.ray
@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_ranks_in_one_line(ds, tmp_path, ray_session):
    """It is the second SAE's, which rank 1 trains alone."""
    configs = [CONFIGS[0], sae.TopK(d_sae=64, k=5, site=SITE, optimiser=sae.Optimiser(lr=1e30))]
    with pytest.raises(sae.NonFiniteLoss, match="^the loss of topk-64-5 is (nan|inf) at step "):
        sae.train(stream(ds), configs, LONG, out=tmp_path / "run", workers=2)
    assert not workers_of(os.getpid())


@pytest.mark.ray
@pytest.mark.slow
def test_the_command_says_one_line_and_prints_only_its_result(ds, tmp_path):
    """A Ray of its own, a rank that is killed, then a loss that is not finite."""
    process = started(*command(ds, tmp_path / "run", "--workers", "2", "--json"))
    await_checkpoint(tmp_path / "run", process)
    os.kill(workers_of(process.pid)[-1], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr
    assert [Path(found["path"]).name for found in json.loads(stdout)] == [
        "topk-64-4",
        "batchtopk-64-4",
        "jumprelu-64-6",
    ]
    assert len(re.findall("warning: rank .* was lost", stderr)) == 1
    assert "Traceback" not in stderr
    process = started(*command(ds, tmp_path / "bad", "--workers", "2", "--sae", "topk:d_sae=64,k=9,lr=1e30"))
    stdout, stderr = process.communicate(timeout=400)
    assert (process.returncode, stdout) == (1, ""), stderr
    assert re.findall("error: .*", stderr) == re.findall(
        "error: the loss of topk-64-9 is .*new directory[.]", stderr
    )
    assert len(stderr.splitlines()) <= 5, stderr


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_driver_takes_its_ranks_along_and_the_same_run_goes_on(ds, tmp_path, ray_session):
    out = tmp_path / "run"
    process = started(*command(ds, out, "--workers", "2"))
    await_checkpoint(out, process)
    ranks = workers_of(process.pid)
    process.kill()
    process.communicate()
    assert len(ranks) == 2
    await_(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks))
    saes = sae.train(*by_command(ds), out=out, workers=2)
    assert largest_difference(saes, sae.train(*by_command(ds))) == 0


@pytest.mark.ray
@pytest.mark.slow
def test_torchrun_goes_on_with_a_run_of_ray_and_ray_with_one_of_torchrun(ds, tmp_path, ray_session):
    wanted = sae.train(*by_command(ds))
    by_torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]

    def stop():
        await_(lambda: checkpoint(tmp_path / "a"))
        os.kill(os.getpid(), signal.SIGTERM)

    with meanwhile(stop), pytest.raises(Drained):
        sae.train(*by_command(ds), out=tmp_path / "a", workers=2, spread="latents")
    process = started(*by_torchrun, *command(ds, tmp_path / "a", "--spread", "rows"))
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr
    assert stdout.count("topk-64-4") == 2  # one table: topk and batchtopk
    process = started(*by_torchrun, *command(ds, tmp_path / "b"))
    await_checkpoint(tmp_path / "b", process)
    process.terminate()
    _, stderr = process.communicate(timeout=120)
    assert stderr.count("error: stopped after") == 1, stderr
    saes = sae.train(*by_command(ds), out=tmp_path / "b", workers=3)
    assert largest_difference(saes, wanted) == 0
    (over,) = [sae.load(tmp_path / "a" / "topk-64-4")]
    assert largest_difference([over], wanted[:1]) < 1e-3


@pytest.mark.ray
@pytest.mark.slow
def test_elastic_workers_take_what_there_is_and_grow(
    ds, alone_long, tmp_path, ray_session, caplog, monkeypatch
):
    """Another has two of the four CPUs until the first checkpoint."""
    monkeypatch.setattr(ray_train, "_GROW_S", 0.5)
    caplog.set_level(logging.INFO)
    out = tmp_path / "run"
    held = ray_session.util.placement_group([{"CPU": 2}])
    assert held.wait(60)

    def release():
        await_(lambda: checkpoint(out))
        ray_session.util.remove_placement_group(held)

    with meanwhile(release):
        saes = sae.train(stream(ds), CONFIGS, LONG, out=out, workers=(2, 3))
    begun = re.findall(r"(\d) workers after", caplog.text)
    assert begun == ["2", "3"]
    assert "there is room for more than 2 workers: saving" in caplog.text
    assert largest_difference(saes, alone_long[0]) == 0
    assert lines(out) == lines(alone_long[1])


@pytest.mark.ray
@pytest.mark.slow
def test_who_waits_is_told_for_what_and_may_stop(ds, tmp_path, ray_session, caplog, monkeypatch):
    monkeypatch.setattr(ray_train, "_REMIND_S", 1.0)
    caplog.set_level(logging.INFO)

    def stop():
        await_(lambda: "still waiting" in caplog.text)
        os.kill(os.getpid(), signal.SIGINT)

    with meanwhile(stop), pytest.raises(Drained, match="stopped before the workers began; run the same"):
        sae.train(stream(ds), CONFIGS, TRAINING, out=tmp_path / "run", workers=9, spread="latents")
    assert re.search(r"still waiting for 9 workers of 1 CPU, for \d+ s: the cluster has 4 CPU", caplog.text)
    assert "it lacks 5 CPU" in caplog.text


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.ray
@pytest.mark.slow
def test_ranks_of_a_node_that_is_about_to_go_save_and_go_on_elsewhere(ds, tmp_path):
    """Ray drains one of two nodes, as on a notice of preemption; an elastic run goes on with the other."""
    out = tmp_path / "run"
    with RayCluster(head_cpus=0) as cluster:
        cluster.add_node(1)
        cluster.add_node(1)
        cluster.wait_for_nodes(3)
        address = f"127.0.0.1:{cluster._port}"
        environment = cluster.environment | {
            "RAY_ADDRESS": address,
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        }
        longer = ["--rows", "400000", "--epochs", "200", "--workers", "1..2"]
        process = started(*command(ds, out, *longer), environment=environment)
        await_checkpoint(out, process)
        going = cluster.node_ids()["127.0.0.2"]
        notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        notice += ["--deadline-remaining-seconds", "3600"]
        drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address]
        subprocess.run(
            [*drain, "--node-id", going, *notice], check=True, env=environment, capture_output=True
        )
        _, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr
    assert "a node is taken away: the run is saved" in stderr
    assert re.findall(r"(\d) workers? after", stderr) == ["2", "1"]
    assert "warning" not in stderr
