"""A harvest on a Ray cluster ends in the exact dataset, whatever is killed and whatever the store does."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "actcache"))

from chaos import KILLED, Chaos, Nodes
from fault_proxy import KINDS
from forks import Forks

pytestmark = pytest.mark.ray

FEW = (9, 11, 12)
"""Actors, drivers and raylets are killed; two drivers, S3 with faults and a local disk."""
N_RUNS = 100


@pytest.fixture(scope="module")
def chaos(s3, tmp_path_factory):
    with (
        Forks() as forks,
        Nodes(forks) as nodes,
        Chaos(tmp_path_factory.mktemp("chaos"), s3, nodes, forks) as chaos,
    ):
        yield chaos


@pytest.mark.parametrize("seed", FEW)
def test_harvest_with_killed_processes_ends_in_the_dataset_of_an_undisturbed_one(chaos, seed):
    chaos.run(seed)


@pytest.mark.slow
def test_a_hundred_harvests_with_killed_processes_end_in_the_dataset_of_an_undisturbed_one(chaos):
    chaos.seen.clear()
    failures = []
    for seed in range(N_RUNS):
        try:
            chaos.run(seed)
        except AssertionError as err:
            failures.append(str(err))
    print(f"\n{N_RUNS} runs: {dict(sorted(chaos.seen.items()))}")
    assert not failures, f"{len(failures)} of {N_RUNS} runs failed:\n" + "\n\n".join(failures)
    for kind in KILLED:
        assert chaos.seen[f"{kind} killed"] >= N_RUNS // 5, kind
    for fault in KINDS:
        assert chaos.seen[f"fault {fault}"] >= N_RUNS // 2, fault
    assert chaos.seen["runs with two drivers"] >= N_RUNS // 8
    assert chaos.seen["runs on disk"] >= N_RUNS // 8
    assert chaos.seen["reruns"] >= N_RUNS // 5
