"""The steps of a run: in order, once, and on after anything died."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def step(name, code, *needs, **fields):
    """A step that runs a line of Python."""
    command = [sys.executable, "-c", code]
    return {"name": name, "command": command, "needs": needs, "num_cpus": 0, "num_gpus": 0} | fields


def start(directory, *steps, root=True):
    run = {"name": "run", "root": str(directory) if root else None, "steps": steps}
    command = [sys.executable, "-m", "cluster.steps", "--here", json.dumps(run)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(directory, *steps, root=True):
    """(exit code, what was printed)"""
    process = start(directory, *steps, root=root)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


def states(directory):
    stored = json.loads((directory / "_runs/run.json").read_text())["steps"]
    return {name: record["state"] for name, record in stored.items()}


def wait_for(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def append(path, text):
    return f"open({str(path)!r}, 'a').write({text!r})"


def test_steps_run_once_in_the_order_of_their_needs_and_a_changed_one_again_with_what_needs_it(tmp_path):
    log = tmp_path / "log"
    a, b, c = step("a", append(log, "a")), step("b", append(log, "b"), "a"), step("c", append(log, "c"))
    code, out = finish(tmp_path, b, a, c)
    assert code == 0
    assert sorted(log.read_text()) == ["a", "b", "c"]
    assert log.read_text().index("a") < log.read_text().index("b")
    assert states(tmp_path) == dict.fromkeys("abc", "done")
    code, out = finish(tmp_path, a, b, c)
    assert (code, out.count("done before"), len(log.read_text())) == (0, 3, 3)
    finish(tmp_path, step("a", append(log, "A")), b, c)
    assert log.read_text()[3:] == "Ab"


def test_a_failed_step_keeps_back_what_needs_it_and_only_that(tmp_path):
    log = tmp_path / "log"
    bad = step("bad", "print('why'); raise SystemExit(3)")
    code, out = finish(tmp_path, bad, step("after", append(log, "x"), "bad"), step("other", append(log, "o")))
    assert code == 1
    assert "[bad] why\n" in out
    assert out.endswith("error: step bad: exit code 3; not started: after\n")
    assert log.read_text() == "o"
    assert states(tmp_path) == {"bad": "failed", "other": "done"}
    code, _ = finish(
        tmp_path, step("bad", "pass"), step("after", append(log, "x"), "bad"), step("other", append(log, "o"))
    )
    assert (code, log.read_text()) == (0, "ox")


def test_a_single_command_keeps_its_output_and_exit_code(tmp_path):
    assert finish(tmp_path, step("one", "print('plain'); raise SystemExit(7)"), root=False) == (
        7,
        "plain\nerror: step one: exit code 7\n",
    )
    assert not list(tmp_path.iterdir())


def test_sigterm_is_passed_on_once_and_nothing_more_is_started(tmp_path):
    """As `actcache harvest`: the first one drains, a second one would kill."""
    drain = (
        "import pathlib, signal, sys, time\n"
        "def drain(*_):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
        f"    time.sleep(1); pathlib.Path({str(tmp_path / 'drained')!r}).touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, drain)\n"
        f"pathlib.Path({str(tmp_path / 'started')!r}).touch()\n"
        "time.sleep(60)\n"
    )
    process = start(tmp_path, step("a", drain), step("b", append(tmp_path / "b", "b"), "a"))
    wait_for((tmp_path / "started").exists)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 143, out
    assert (tmp_path / "drained").exists()
    assert not (tmp_path / "b").exists()
    assert states(tmp_path) == {"a": "stopped"}


def test_a_killed_runner_leaves_no_step_behind(tmp_path):
    pid = tmp_path / "pid"
    code = (
        f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    process = start(tmp_path, step("a", code))
    wait_for(lambda: pid.exists() and pid.read_text())
    process.kill()
    process.wait()
    process.stdout.close()

    def gone():
        try:
            return Path(f"/proc/{pid.read_text()}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    wait_for(gone, 10)


@pytest.mark.parametrize("fields", [{"num_gpus": 4096}, {"num_cpus": 4096}])
def test_what_the_machine_cannot_hold_is_said_at_once(tmp_path, fields):
    code, out = finish(tmp_path, step("big", "pass", **fields))
    assert code == 1
    assert out.startswith("error: step big: step big reserves ")
    assert "Lower num_cpus and num_gpus" in out


def test_steps_that_do_not_fit_together_wait_for_each_other(tmp_path):
    log = tmp_path / "log"
    code = f"import time\nf = open({str(log)!r}, 'a')\nf.write('('); f.flush(); time.sleep(0.5); f.write(')')"
    n = os.cpu_count()
    assert finish(tmp_path, *(step(name, code, num_cpus=n) for name in "abc"))[0] == 0
    assert log.read_text() == "()()()"


@pytest.fixture
def training(tmp_path):
    """A step `PYTHON -m sae train ...`, whose PYTHON writes down its arguments and GPUs, and trains nothing."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" GPUs $CUDA_VISIBLE_DEVICES >> {tmp_path}/log\n')
    python.chmod(0o755)

    def training(*options, name="train"):
        command = [str(python), "-m", "sae", "train", "--out", "x", *options]
        return {"name": name, "command": command, "needs": [], "num_cpus": 0, "num_gpus": 0}

    return training


def test_another_number_of_ranks_is_no_reason_to_train_again(tmp_path, training):
    after = step("after", append(tmp_path / "log", "evaluated\n"), "train")
    for ranks in ((), ("--workers", "2"), ("--workers", "1..3", "--spread=rows", "--cpus-per-worker", "4")):
        assert finish(tmp_path, training(*ranks), after)[0] == 0
    assert (tmp_path / "log").read_text() == "-m sae train --out x GPUs\nevaluated\n"
    assert finish(tmp_path, training("--workers", "2", "--lr", "1"), after)[0] == 0
    assert (tmp_path / "log").read_text().count("evaluated") == 2


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (("--workers", "2", "--gpus-per-worker", "1"), "GPUs 5,7\n"),
        (("--workers", "2..9", "--gpus-per-worker=1"), "GPUs 5,7,9\n"),
        (("--workers", "64", "--cpus-per-worker", "64"), "GPUs 5,7,9\n"),  # ranks may share CPUs
    ],
)
def test_ranks_on_this_machine_get_gpus_of_their_own(tmp_path, training, monkeypatch, options, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,9")
    assert finish(tmp_path, training(*options))[0] == 0
    assert (tmp_path / "log").read_text().endswith(found)


def test_more_gpus_than_the_machine_has_are_refused_before_the_training_starts(
    tmp_path, training, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,9")
    code, out = finish(tmp_path, training("--workers", "4..8", "--gpus-per-worker", "1"))
    assert code == 1
    assert (
        "step train trains on 4 to 8 ranks of 1 GPU and 1 CPU, at least 4 GPUs and 4 CPUs in all; this machine"
        in out
    )
    assert not (tmp_path / "log").exists()


def test_the_url_of_what_is_no_harvest_is_an_error(tmp_path):
    wrong = step("b", "pass", "a")
    wrong["command"] = [*wrong["command"], "{data:a}"]
    code, out = finish(tmp_path, step("a", "raise SystemExit(bool(__import__('sys').argv[1:]))"), wrong)
    assert code == 1
    assert "step b: {data:a} is not known: it is no `actcache harvest`" in out
