"""Leases: one harvest of a dataset at a time, and none waits for a dead one."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from actcache import lease as lease_module
from actcache.lease import FOLDER, Lease
from actcache.store import open_store

KEY = f"{FOLDER}/name.json"


@pytest.fixture
def base(tmp_path):
    return open_store(str(tmp_path))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease_module, "BEAT_S", 0.05)
    monkeypatch.setattr(lease_module, "DEAD_AFTER_S", 0.5)
    monkeypatch.setattr(lease_module, "_POLL_S", 0.01)


def of_another_host(base, beats=1):
    """A lease that tells nothing about whether its holder lives."""
    data = json.dumps(
        {"run": "x", "host": "elsewhere", "pid": 1, "process": "b/n/1", "beats": beats}
    ).encode()
    assert base.swap(KEY, None, data)
    return data


def test_the_second_waits_for_the_first_and_leaves_nothing_behind(base, quick):
    order = []

    def second():
        with Lease(base, "name"):
            order.append("second")

    with Lease(base, "name"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(1.2)  # over twice DEAD_AFTER_S: the beats are seen
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert not base.listing(FOLDER)


def test_many_that_wait_go_one_by_one(base, quick):
    inside, most = [], []

    def one():
        with Lease(base, "name"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()

    threads = [threading.Thread(target=one) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [1] * 5


def test_a_lease_of_another_host_is_free_once_it_is_not_renewed(base, quick, caplog):
    of_another_host(base)
    start = time.monotonic()
    with Lease(base, "name"):
        assert time.monotonic() - start >= 0.5
        assert json.loads(base.read(KEY))["pid"] == os.getpid()
    assert not base.exists(KEY)


def test_a_killed_process_of_this_host_is_not_waited_for(base):
    """Without the quick times: nothing but its death is a reason to go on within a minute."""
    code = f"""
import sys, time
from actcache.lease import Lease
from actcache.store import open_store
with Lease(open_store({base.url!r}), "name"):
    print("held", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    process.kill()  # not waited for: a zombie until the end of this test
    start = time.monotonic()
    with Lease(base, "name"):
        assert time.monotonic() - start < 20
    process.wait()
    process.stdout.close()


def test_who_stalled_and_lost_its_lease_is_told_and_does_not_take_it_back(base, quick, caplog):
    with Lease(base, "name"):
        ours = base.read(KEY)
        for _ in range(100):  # between two beats
            if base.swap(KEY, ours, b'{"run": "other"}'):
                break
            ours = base.read(KEY)
        time.sleep(0.3)
        assert "taken this harvest over" in caplog.text
    assert base.read(KEY) == b'{"run": "other"}'


@pytest.mark.parametrize("damage", [b"", b"[]", b"\xff", b'{"pid": "x", "process": 3}'])
def test_a_damaged_lease_is_waited_out(base, quick, damage):
    (Path(base.url) / KEY).parent.mkdir()
    (Path(base.url) / KEY).write_bytes(damage)
    with Lease(base, "name"):
        assert json.loads(base.read(KEY))["pid"] == os.getpid()
