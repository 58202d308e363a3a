"""Ranks that share an SAE reach what one process reaches: every architecture, revival and layout.

Losses and weights are compared over steps of uneven batches of which a third of the latents is dead. In
float64 they agree to 1e-10, so whatever differs in float32 is rounding.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import ranks
import torch

import sae
from actcache.errors import SpecError
from sae.architectures import Architecture
from sae.group import ALONE, Group, Share
from sae.learner import Learner, geometric_median
from sae.select import Scratch
from sae.select_over_ranks import largest_in_batch, largest_per_row
from sae.training import Rules

D, F, N = 32, 256, 301

CONFIGS: dict[str, Architecture] = {
    "topk": sae.TopK(d_sae=F, k=8),
    "batchtopk": sae.BatchTopK(d_sae=F, k=8),
    "matryoshka": sae.Matryoshka(d_sae=F, k=8, prefixes=(32, 100)),
    "matryoshka, random": sae.Matryoshka(d_sae=F, k=8, n_random_prefixes=4),
    "standard": sae.Standard(d_sae=F, l1_coefficient=2.0),
    "standard, unit": sae.Standard(d_sae=F, l1_coefficient=2.0, decoder="unit"),
    "gated": sae.Gated(d_sae=F, l1_coefficient=1.0),
    "jumprelu, target": sae.JumpReLU(d_sae=F, target_l0=8),
    "jumprelu, frequency": sae.JumpReLU(d_sae=F, frequency_scale=0.1),
}
REVIVALS = {
    "none": None,
    "auxk": sae.AuxK(k_aux=16),
    "ghost": sae.GhostGrads(),
    "resample": sae.Resampling(every_rows=5 * N, times=4),
}
MESHES = {2: [(1, 2), (2, 1)], 3: [(3, 1), (1, 3)], 4: [(4, 1), (1, 4), (2, 2)]}
EACH_WITH_ONE = list(zip(CONFIGS, list(REVIVALS) * len(CONFIGS), strict=False))
EVERY = [(name, revival) for name in CONFIGS for revival in REVIVALS]


def _rows(steps: int, dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(64, D, generator=g), dim=1)
    strength = torch.rand(steps * N, 64, generator=g) * (torch.rand(steps * N, 64, generator=g) < 0.08)
    return (strength @ directions * 4 + 0.02 * torch.randn(steps * N, D, generator=g)).to(dtype)


def _trained(config: Architecture, group: Group, steps: int, dtype: torch.dtype, ema: float) -> dict:
    """Losses of each step and the whole weights, of a training by these ranks."""
    rows = _rows(steps, dtype)
    rules = Rules(lr=1e-3, n_rows=steps * N, dead_after_rows=3 * N, ema_decay=ema)
    learner = Learner(config, D, 1.0, rules, 0, dtype=dtype, group=group)
    islands = group.mesh[0]
    losses = []
    for i in range(steps):
        batch = rows[i * N : (i + 1) * N]
        if i == 0:
            learner.set_b_dec(geometric_median(batch))
            latents = torch.arange(learner.held.start, learner.held.stop)
            learner.parameters["b_enc_F"][latents % 3 == 0] -= 4
        place = torch.arange(group.rows.rank, N, islands)
        own = batch[place]
        outcome = learner.gradients(own, Share(group, N, None if islands == 1 else place))
        learner.apply(outcome, own)
        losses.append((outcome.loss, outcome.mse, outcome.n_active, learner.n_dead))
    finished = learner.finished({"architecture": config.architecture, "d_in": D, "d_sae": F, "k": 8})
    weights = None if finished is None else {n: t.clone() for n, t in finished.state_dict().items()}
    return {"losses": np.array(losses), "weights": weights, "threshold": learner.threshold}


def _all(mesh: tuple[int, int], cases: list, steps: int, dtype: torch.dtype, ema: float = 0.0) -> list[dict]:
    group = Group(mesh)
    return [
        _trained(replace(CONFIGS[name], revive=REVIVALS[revival]), group, steps, dtype, ema)
        for name, revival in cases
    ]


@cache
def _alone(cases: tuple, steps: int, dtype: torch.dtype, ema: float = 0.0) -> list[dict]:
    return _all((1, 1), list(cases), steps, dtype, ema)


def _off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm().clamp_min(1e-30))


def _check(wanted: list[dict], found: list[dict], cases: list, tolerance: float) -> None:
    for case, one, many in zip(cases, wanted, found, strict=True):
        np.testing.assert_allclose(many["losses"], one["losses"], rtol=tolerance, err_msg=str(case))
        assert one["losses"][-1, 3] == many["losses"][-1, 3], f"{case}: dead latents"
        for name, tensor in one["weights"].items():
            limit = tolerance
            if tolerance > 1e-6 and case[0].startswith("jumprelu"):
                # rounding decides whether a pre-activation at the rectangle's edge moves its threshold
                limit = 1e-4
            assert _off(tensor, many["weights"][name]) <= limit, f"{case}: {name}"
        if one["threshold"] is not None:
            assert many["threshold"] == pytest.approx(one["threshold"], rel=tolerance)


@pytest.mark.parametrize("mesh", MESHES[2], ids=str)
def test_two_ranks_train_what_one_process_trains(mesh):
    found = ranks.on_ranks(2, _all, mesh, EACH_WITH_ONE, 12, torch.float64)
    _check(_alone(tuple(EACH_WITH_ONE), 12, torch.float64), found[0], EACH_WITH_ONE, 1e-10)
    assert all(rank["weights"] is None for rank in found[1])  # the SAE is assembled on rank 0 alone


def test_an_average_of_weights_is_kept_by_the_rank_that_updates_them():
    cases = [("topk", "none"), ("gated", "none")]
    found = ranks.on_ranks(2, _all, (2, 1), cases, 8, torch.float64, 0.9)
    _check(_alone(tuple(cases), 8, torch.float64, 0.9), found[0], cases, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("mesh", [m for meshes in MESHES.values() for m in meshes], ids=str)
def test_any_mesh_trains_what_one_process_trains_over_fifty_steps(mesh, dtype, tolerance):
    found = ranks.on_ranks(mesh[0] * mesh[1], _all, mesh, EVERY, 50, dtype)
    _check(_alone(tuple(EVERY), 50, dtype), found[0], EVERY, tolerance)


def _chosen(mesh: tuple[int, int], seed: int) -> list[list[tuple[int, int]]]:
    """(row, latent) pairs chosen by this rank from coarse values, where many are equal."""
    group = Group(mesh)
    g = torch.Generator().manual_seed(seed)
    pre = torch.randint(-3, 4, (37, 96), generator=g).float()
    place = torch.arange(group.rows.rank, len(pre), mesh[0])
    latents = group.latents.part(pre.shape[1])
    own = pre[place][:, latents].contiguous()
    share = Share(group, len(pre), None if mesh[0] == 1 else place)
    scratch = Scratch()
    found = [largest_per_row(own, 5, scratch, share)]
    found += [largest_in_batch(own, n, scratch, share) for n in (5 * len(pre), 5 * len(pre), 3000)]
    return [
        [(int(place[r]), int(c) + latents.start) for r, c in zip(e.rows, e.columns, strict=True)]
        for e in found
    ]


@pytest.mark.parametrize("mesh", [(1, 2), (2, 1)], ids=str)
def test_ties_between_ranks_fall_as_in_one_process(mesh):
    for seed in range(3):
        wanted = _chosen((1, 1), seed)
        parts = ranks.on_ranks(2, _chosen, mesh, seed)
        for i, entries in enumerate(wanted):
            if mesh[0] == 2 and i == 0:
                continue  # rows of another island are not this rank's to rank
            assert sorted(parts[0][i] + parts[1][i]) == sorted(entries), f"seed {seed}, choice {i}"


def _with_an_empty_island() -> list[float]:
    group = Group((2, 1))
    config = replace(CONFIGS["batchtopk"], revive=REVIVALS["auxk"])
    learner = Learner(config, D, 1.0, Rules(lr=1e-3, dead_after_rows=1), 0, torch.float64, group=group)
    rows = _rows(1, torch.float64)
    losses = []
    for batch in (rows[:8], rows[8:9], rows[9:20]):
        place = torch.arange(group.rows.rank, len(batch), 2)
        outcome = learner.gradients(batch[place], Share(group, len(batch), place))
        learner.apply(outcome, batch[place])
        losses.append(outcome.loss)
    return losses


def test_a_batch_of_which_an_island_has_no_row_is_trained_on():
    config = replace(CONFIGS["batchtopk"], revive=REVIVALS["auxk"])
    learner = Learner(config, D, 1.0, Rules(lr=1e-3, dead_after_rows=1), 0, torch.float64)
    rows, wanted = _rows(1, torch.float64), []
    for batch in (rows[:8], rows[8:9], rows[9:20]):
        outcome = learner.gradients(batch)
        learner.apply(outcome, batch)
        wanted.append(outcome.loss)
    assert ranks.on_ranks(2, _with_an_empty_island)[0] == pytest.approx(wanted, rel=1e-10)


def _exchanged() -> dict:
    group = Group((1, 3))
    axis, rank = group.everyone, group.rank
    t = torch.arange(7.0) + 10 * rank
    mine = t[axis.part(7)].clone()
    filled = torch.full((7,), -1.0)
    filled[axis.part(7)] = mine
    axis.share_own_(filled)
    return {
        "sum": axis.sum_own(t.clone()).tolist(),
        "filled": filled.tolist(),
        "objects": group.objects({"rank": rank, "text": "x" * rank}),
        "numbers": group.numbers(rank, 0.5).tolist(),
        "assembled": None if (a := group.assembled(mine, axis.part(7).start, 7)) is None else a.tolist(),
    }


def test_ranks_exchange_ranges_that_do_not_divide_evenly():
    found = ranks.on_ranks(3, _exchanged)
    assert [part for f in found for part in f["sum"]] == [30.0 + 3 * i for i in range(7)]
    whole = [0.0, 1.0, 2.0, 13.0, 14.0, 15.0, 26.0]
    assert [f["filled"] for f in found] == [whole] * 3
    assert [f["assembled"] for f in found] == [whole, None, None]
    assert found[1]["objects"] == [{"rank": r, "text": "x" * r} for r in range(3)]
    assert found[2]["numbers"] == [[0.0, 0.5], [1.0, 0.5], [2.0, 0.5]]


def test_one_process_is_a_group_without_torch_distributed():
    t = torch.ones(3, requires_grad=True)
    assert ALONE.everyone.sum(t) is t
    assert ALONE.numbers(1, 2).tolist() == [[1.0, 2.0]]
    assert ALONE.objects({"a": 1}) == [{"a": 1}]
    assert ALONE.latents.part(10) == slice(0, 10)


def _refused() -> list[str]:
    group, found = Group((1, 2)), []
    for config, rules in (
        (sae.TopK(d_sae=1, k=1), Rules(lr=1e-3)),
        (sae.TopK(d_sae=8, k=1), Rules(lr=1e-3, step="dense")),
    ):
        with pytest.raises(SpecError) as caught:
            Learner(config, D, 1.0, rules, 0, group=group)
        found.append(str(caught.value))
    return found


def test_what_ranks_can_not_share_is_refused_in_a_line():
    narrow, dense = ranks.on_ranks(2, _refused)[1]
    assert "an SAE of 1 latents can not be spread over 2 workers" in narrow
    assert "step is dense" in dense
