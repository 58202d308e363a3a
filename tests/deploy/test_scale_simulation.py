"""The driver at scale, on a virtual clock: no request over the store's limit, each block once, whatever fails."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

pytest.importorskip("ray")
from scale_simulation import Setting, blocks_committed, simulate

# a twentieth of the workers at a twentieth of S3's limits, and failures ten times as frequent
SMALL = Setting(workers=50, blocks=2000, failures=0.01, put_per_s=175, get_per_s=275)


@pytest.fixture(scope="module")
def small():
    return simulate(SMALL)


def test_every_block_is_committed_once_although_workers_answers_and_requests_are_lost(small):
    figures, store, state = small
    assert set(figures["fates"]) == {"lost", "preempted", "store", "answer lost"}
    assert state.manifest.sites[next(iter(state.widths))].n_blocks["train"] == SMALL.blocks
    assert sorted(blocks_committed(store, state.manifest)) == list(range(SMALL.blocks))


def test_a_block_is_computed_again_only_where_its_answer_was_lost(small):
    figures, _, _ = small
    # not each that is drawn: the worker may be lost before, by the fate of its other block
    assert 0 < figures["computed_twice"] <= figures["fates"]["answer lost"]


def test_the_rate_of_requests_stays_below_the_limit_of_each_prefix(small):
    figures, _, _ = small
    assert figures["refused"] == 0
    assert 0 < figures["busiest_partition_puts_in_a_second"] <= SMALL.put_per_s


def test_a_store_that_refuses_most_requests_slows_the_harvest_and_loses_nothing():
    """One partition for all keys, at half of what the workers would write."""
    setting = Setting(workers=50, blocks=300, failures=0, partition="one", put_per_s=30, get_per_s=800)
    figures, store, state = simulate(setting)
    assert figures["refused"] > setting.blocks
    assert figures["busiest_partition_puts_in_a_second"] <= 1.1 * setting.put_per_s + 1
    assert sorted(blocks_committed(store, state.manifest)) == list(range(setting.blocks))


def test_versions_do_not_hold_the_workers_up(small):
    """Requests of the driver, made one by one, were a third of the time with 32 sites."""
    figures, _, _ = small
    assert figures["driver_waited_s"] < 0.02 * figures["simulated_s"]
