"""Working off blocks: attempts, stragglers, preemption, draining; engines here are scripts, blocks are words."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from digests import array_digests
from tiny_harvest import SITES, tiny_spec

import actcache
from actcache.dispatch import ATTEMPTS, Drain, _share, work_off
from actcache.errors import HarvestError, NonFiniteActivation, StoreError, WorkerLost
from actcache.manifest import BlockRecord
from actcache.progress import Progress


class Scripted:
    """An engine whose answers are given: `script(unit, attempt)` returns a result, or None for never."""

    def __init__(self, script, slots=2, straggler=None):
        self.script, self.slots, self.slow = script, slots, straggler
        self.flying, self.tries, self.submitted = [], Counter(), []

    def free(self):
        return len(self.flying) < self.slots

    def busy(self):
        return bool(self.flying)

    def running(self, unit):
        return unit in self.flying

    def submit(self, unit):
        self.flying.append(unit)
        self.submitted.append(unit)

    def straggler(self, wanted):
        """Once nothing else is left to do, always the same one, while it is wanted and in flight once."""
        wanted = self.slow in wanted and self.flying.count(self.slow) == 1
        return self.slow if wanted else None

    def completed(self):
        for unit in list(self.flying):
            self.tries[unit] += 1
            result = self.script(unit, self.tries[unit])
            if result is not None:
                self.flying.remove(unit)
                yield unit, result


UNITS = [("train", block, ("site",)) for block in range(5)]


def worked(engine, drain=None):
    return [ended for ended in work_off(engine, UNITS, drain or Drain()) if ended is not None]


def test_each_block_ends_once_with_its_record():
    assert sorted(worked(Scripted(lambda unit, attempt: b"record"))) == [(unit, b"record") for unit in UNITS]


def test_what_may_pass_is_tried_again_and_then_set_aside_while_the_rest_is_finished():
    engine = Scripted(lambda unit, attempt: StoreError("503") if unit[1] == 2 else b"record")
    ended = dict(worked(engine))
    assert isinstance(ended[UNITS[2]], StoreError)
    assert engine.submitted.count(UNITS[2]) == ATTEMPTS
    assert sum(result == b"record" for result in ended.values()) == 4


def test_what_cannot_pass_is_tried_once():
    engine = Scripted(lambda unit, attempt: NonFiniteActivation("nan") if unit[1] == 0 else b"record")
    assert isinstance(dict(worked(engine))[UNITS[0]], NonFiniteActivation)
    assert engine.submitted.count(UNITS[0]) == 1


def test_a_block_on_preempted_nodes_is_never_set_aside_and_one_that_kills_workers_is():
    def script(preempted):
        return lambda unit, attempt: (
            WorkerLost("gone", preempted=preempted) if unit[1] == 1 and attempt <= 20 else b"record"
        )

    engine = Scripted(script(True))
    assert dict(worked(engine))[UNITS[1]] == b"record"
    assert engine.submitted.count(UNITS[1]) == 21
    assert isinstance(dict(worked(Scripted(script(False))))[UNITS[1]], WorkerLost)


def test_a_slow_block_is_taken_over_by_a_copy_and_never_waited_for():
    """The copy of block 4 answers; the first try never does."""
    engine = Scripted(None, slots=3, straggler=UNITS[4])
    engine.script = lambda unit, attempt: (
        None if unit == UNITS[4] and engine.submitted.count(UNITS[4]) < 2 else b"record"
    )
    assert sorted(worked(engine)) == [(unit, b"record") for unit in UNITS]
    assert engine.submitted.count(UNITS[4]) == 2


def test_the_error_of_a_copy_counts_for_nothing_while_the_other_goes_on():
    answers = iter([None, NonFiniteActivation("only here")])
    engine = Scripted(None, slots=3, straggler=UNITS[4])
    engine.script = lambda unit, attempt: next(answers, b"record") if unit == UNITS[4] else b"record"
    assert dict(worked(engine))[UNITS[4]] == b"record"


def test_once_asked_to_drain_nothing_more_is_begun_and_what_flies_is_finished():
    drain = Drain()

    def script(unit, attempt):
        drain.asked = True
        return b"record"

    engine = Scripted(script)
    assert [unit for unit, _ in worked(engine, drain)] == UNITS[:2]
    assert engine.submitted == UNITS[:2]


def test_a_drain_answers_sigterm_once_and_leaves_the_process_as_it_was():
    before = signal.getsignal(signal.SIGTERM)
    with Drain() as drain:
        os.kill(os.getpid(), signal.SIGTERM)
        assert drain.asked
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_commits_the_blocks_in_flight_and_the_same_call_finishes(tmp_path):
    spec = tiny_spec(tmp_path, n_tokens=6000)
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from tiny_harvest import tiny_spec
import torch
import actcache
from actcache.errors import Drained
from actcache.harvester import Harvester
torch.set_num_threads(1)  # two are several times slower on a tiny model
run_block = Harvester.run_block
def slow(self, *unit):
    time.sleep(1)
    return run_block(self, *unit)
Harvester.run_block = slow
try:
    actcache.harvest(tiny_spec(Path({str(tmp_path)!r}), n_tokens=6000), {str(tmp_path / "root")!r}, lm_batch=8,
                     progress=False)
except Drained as err:
    print(err)
    sys.exit(7)
"""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True
    )
    root, deadline = tmp_path / "root", time.monotonic() + 120
    while not list(root.glob("*/_records/train/*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 7, output
    assert "stopped by SIGTERM with" in output
    committed = {
        (record.block, site)
        for path in root.glob("*/_records/train/*.json")
        for record in [BlockRecord.from_json(path.read_bytes(), f"_records/train/{path.name}")]
        for site in record.statistics
    }
    stored = {(int(p.parent.name), p.parents[3].name) for p in root.glob("*/train/*/codes/c/*/0")}
    assert 0 < len(stored) < 12
    assert stored == committed, "a block was left half written"
    finished = actcache.harvest(spec, str(root), progress=False)
    undisturbed = actcache.harvest(spec, str(tmp_path / "other"), progress=False)
    assert array_digests(finished.url) == array_digests(undisturbed.url)


def test_a_device_without_memory_halves_the_batch_and_goes_on(tmp_path, monkeypatch, caplog):
    """The LM's own error class is raised by any pass of more than 3 sequences: 32, 16, 8, 4 fail."""
    import torch

    from actcache import capture

    run_capture, sizes = capture.run_capture, []

    def small_device(model, input_ids_BT, *rest):
        if len(input_ids_BT) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore lines")
        sizes.append(len(input_ids_BT))
        return run_capture(model, input_ids_BT, *rest)

    spec = tiny_spec(tmp_path, n_tokens=1024)
    usual = actcache.harvest(spec, str(tmp_path / "usual"), progress=False)
    monkeypatch.setattr(capture, "run_capture", small_device)
    small = actcache.harvest(spec, str(tmp_path / "small"), progress=False)
    assert max(sizes) == 2
    assert caplog.text.count("no memory for this LM batch") == 4
    assert small.manifest.provenance["lm_batch_used"] == 2
    for site in SITES:
        scale = usual.stats(site)["max_error"] * 2  # one quantisation step
        assert np.abs(small.read(site, slice(None)) - usual.read(site, slice(None))).max() <= 1.01 * scale


def test_a_device_without_memory_for_one_sequence_is_one_clear_error(tmp_path, monkeypatch):
    import torch

    from actcache import capture

    def no_memory(model, input_ids_BT, *rest):
        if input_ids_BT.shape[1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore lines")
        return run_capture(model, input_ids_BT, *rest)

    run_capture = capture.run_capture
    monkeypatch.setattr(capture, "run_capture", no_memory)
    with pytest.raises(HarvestError, match="no memory for one sequence of 16 tokens"):
        actcache.harvest(tiny_spec(tmp_path, n_tokens=1024), str(tmp_path / "root"), progress=False)


def test_the_budget_of_bytes_holds_one_block_at_a_time_and_uploads_side_by_side_change_nothing(tmp_path):
    spec = tiny_spec(tmp_path, n_tokens=6000)
    usual = actcache.harvest(spec, str(tmp_path / "usual"), progress=False)
    tight = actcache.harvest(spec, str(tmp_path / "tight"), buffer_bytes=1, progress=False)
    assert array_digests(tight.url) == array_digests(usual.url)
    assert tight.manifest.provenance["behind_store_s"] > 0


def test_what_was_waited_for_is_shown_while_it_is_so(capsys):
    """Not in the first second, whose shares mean nothing, and not once it is over."""
    assert _share({"forward_s": 0.0, "behind_store_s": 1e-6}, "behind_store_s") == 0
    assert _share({"forward_s": 1.0, "behind_encode_s": 2.0, "behind_store_s": 1.0}, "behind_store_s") == 0.25
    bar = Progress("harvest", 10)
    bar.advance(1, store="25%", blocks="1/2")
    assert "store 25%" in bar._line(time.monotonic())
    bar.advance(1, store=None)
    assert bar._line(time.monotonic()).endswith("blocks 1/2")
