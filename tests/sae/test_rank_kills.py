"""Ranks killed by SIGKILL at any step, and at and between their checkpoints: the run ends in the undisturbed result.

The ranks that are left end by themselves, and the same call goes on from the last complete checkpoint.
Ray's part, which starts them again, is in tests/sae/test_distributed_kills.py.
"""

import os
import random
import signal
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "actcache"))

import ranks
import torch
from test_spread import BATCH, CONFIGS, _acts, _training, _weights
from watched import KilledAt

import sae
from sae.spread import Layout, spread_of
from sae.train import Trainer

STEPS = 31
PLACES = [  # operations of a rank's store, and when
    (r"create .*/part-.*", "before"),
    (r"create .*/part-.*", "after"),
    (r"create .*/done\.json", "before"),
    (r"create .*/done\.json", "after"),
    (r"delete .*/done\.json", "after"),
    (r"delete .*/part-.*", "after"),
]


class Dying(sae.ArrayStream):
    """Kills its process as it is asked for a batch."""

    last: int | None = None

    def __iter__(self):
        for batch in super().__iter__():
            if self._epoch * len(_acts()) + self._row >= (self.last or 10**9) * BATCH:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def _run(spread: str, out: str, victim: int, step: int | None, place: tuple[str, str, int] | None) -> int:
    """Train as a rank; the victim kills itself at a step or at an operation of its store."""
    import torch.distributed as dist

    from actcache import store

    layout = Layout(spread_of(spread, dist.get_world_size(), len(CONFIGS)))
    stream = Dying(_acts(), batch_size=BATCH, epochs=2)
    if layout.rank == victim:
        stream.last = step
        if place is not None:
            pattern, when, n = place
            original = store.open_store
            store.open_store = lambda *args: KilledAt(original(*args), n, pattern, when)
    training = _training(checkpoint_every_rows=1500)
    trainer = Trainer(
        stream, CONFIGS, training, start=[None] * len(CONFIGS), out=out, layout=layout, tell=lambda _: None
    )
    done = trainer.open(True)
    if done is None:
        with torch.enable_grad():
            trainer.run()
    return trainer.rows


def _kills_until_done(spread: str, world: int, out: Path, seed: int, n_kills: int) -> int:
    """Kill the run by seed, then let it end; returns how often it was killed."""
    rng, killed = random.Random(seed), 0
    for _ in range(n_kills):
        victim, place = rng.randrange(world), None
        step = rng.randrange(1, STEPS)
        if rng.random() < 0.5:
            pattern, when = rng.choice(PLACES)
            victim = (
                victim if "part" in pattern and "create" in pattern else 0
            )  # rank 0 completes checkpoints
            step, place = None, (pattern, when, rng.randrange(3))
        ends = ranks.ends_of(world, _run, spread, str(out), victim, step, place)
        if ends[victim][2] == 0:
            break  # it had not so far to go
        assert ends[victim][2] == -signal.SIGKILL, ends[victim][1]
        assert all(code == 1 for rank, (_, _, code) in enumerate(ends) if rank != victim), "the others ended"
        killed += 1
    ranks.on_ranks(world, _run, spread, str(out), 0, None, None)
    return killed


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict[tuple[str, int], list]:
    """Weights of undisturbed runs."""
    found = {}
    for spread, world in (("latents", 2), ("rows", 2), ("saes", 2)):
        out = tmp_path_factory.mktemp("straight")
        ranks.on_ranks(world, _run, spread, str(out), 0, None, None)
        found[spread, world] = _weights(out)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_a_run_whose_ranks_are_killed_by_seed_ends_in_the_undisturbed_result(straight, tmp_path, seed):
    spread = ("latents", "rows", "saes")[seed % 3]
    assert _kills_until_done(spread, 2, tmp_path, seed, 3) > 0
    for one, many in zip(straight[spread, 2], _weights(tmp_path), strict=True):
        assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())
    assert not list((tmp_path / "checkpoints").glob("*/*")), "nothing is left over"


def test_the_ranks_that_are_left_end_when_one_is_killed_and_the_run_goes_on(tmp_path):
    ends = ranks.ends_of(2, _run, "latents", str(tmp_path), 1, 14, None)
    assert [code for _, _, code in ends] == [1, -signal.SIGKILL]
    assert ranks.on_ranks(2, _run, "latents", str(tmp_path), 0, None, None) == [6150, 6150]
