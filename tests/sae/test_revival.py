"""Resampling and ghost grads: their papers' formulas, and dead latents that live again."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import sae
from sae.architectures import Architecture
from sae.learner import Learner
from sae.select import Scratch
from sae.step import gradients
from sae.training import Rules

N, D, F = 64, 16, 40
CONFIGS: list[Architecture] = [
    sae.Standard(d_sae=F, l1_coefficient=0.3),
    sae.Gated(d_sae=F, l1_coefficient=0.3),
    sae.JumpReLU(d_sae=F),
    sae.TopK(d_sae=F, k=4),
    sae.BatchTopK(d_sae=F, k=4),
    sae.Matryoshka(d_sae=F, k=4),
]
every = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.architecture)


def _x(n: int = N, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def test_ghost_grads_are_the_papers_formula() -> None:
    config = sae.TopK(d_sae=F, k=4, revive=sae.GhostGrads())
    learner = Learner(config, D, 1.0, Rules(lr=1e-3), seed=0, dtype=torch.float64)
    dead = torch.tensor([3, 8, 30])
    p, x = learner.parameters, _x().double()
    p["b_enc_F"][dead] = -5.0
    step = lambda c: gradients("dense", c, p, x, dead, _moment(c), Scratch())  # noqa: E731
    plain, ghostly = step(replace(config, revive=None)), step(config)
    assert ghostly.loss == pytest.approx(2 * plain.loss, rel=1e-12)  # as large as the reconstruction error
    # the direction of the gradient: half the error's norm, in the direction of the ghosts' sum
    W_dec, b = p["W_dec_FD"][dead].clone().requires_grad_(), p["b_enc_F"][dead]
    residual = x - _recon(config, p, x)
    ghost = ((x - p["b_dec_D"]) @ p["W_enc_FD"][dead].T + b).exp() @ W_dec
    half = ghost * (residual.norm(dim=1) / ghost.norm(dim=1) / 2).detach()[:, None]
    loss = (residual - half).norm(dim=1).square().mean()
    (wanted,) = torch.autograd.grad(loss * (plain.mse / loss.item()), W_dec)
    found = ghostly.gradients["W_dec_FD"][dead]
    assert (found - wanted).abs().max() < 1e-12 * wanted.abs().max() + 1e-14


def _moment(config: Architecture):  # type: ignore[no-untyped-def]
    return config.moment(1.0, torch.Generator().manual_seed(0))


def _recon(config: Architecture, p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    from sae.views import Dense

    view = Dense(x - p["b_dec_D"], p)
    view.mask_NF = config.keep(view.pre)
    return x + config.loss(view, p, _moment(config)).error_ND


@every
def test_the_scaled_variant_weighs_ghosts_by_the_share_of_the_dead(config: Architecture) -> None:
    learner = Learner(config, D, 1.0, Rules(lr=1e-3), seed=0, dtype=torch.float64)
    dead = torch.arange(10)  # of 40
    loss = {
        revive: gradients(
            "sparse",
            replace(config, revive=revive),
            learner.parameters,
            _x().double(),
            dead,
            _moment(config),
            Scratch(),
        ).loss
        for revive in (None, sae.GhostGrads(), sae.GhostGrads(scale_by_dead_share=True))
    }
    plain, full, scaled = loss.values()
    assert scaled - plain == pytest.approx((full - plain) / 4, rel=1e-10)


@every
def test_resampling_is_the_papers_rule(config: Architecture) -> None:
    revive = sae.Resampling(every_rows=100, times=1, encoder_scale=0.2)
    config = replace(config, revive=revive)
    learner = Learner(config, D, 1.0, Rules(lr=1e-2, dead_after_rows=50), seed=0)
    x = _x()
    x[7] *= 30  # squared loss: nearly all draws take this row
    learner.apply(learner.gradients(x), x)
    learner.parameters["b_enc_F"][10:15] = -100.0
    learner.rows_since_fired_F[:] = 0
    learner.rows_since_fired_F[10:15] = 1000
    outcome = learner.gradients(x)
    before = {name: p.clone() for name, p in learner.parameters.items()}
    assert learner.n_dead == 5
    learner.apply(outcome, x)  # rows 64 to 128: due
    p, dead, live = learner.parameters, slice(10, 15), torch.ones(F, dtype=torch.bool)
    live[dead] = False
    u = x[7] - p["b_dec_D"]
    u = u / u.norm()
    assert ((p["W_dec_FD"][dead] @ u) / p["W_dec_FD"][dead].norm(dim=1) > 0.999).all()
    wanted = p["W_dec_FD"][live].norm(dim=1).mean()
    assert torch.allclose(p["W_dec_FD"][dead].norm(dim=1), wanted)
    assert torch.allclose(p["W_enc_FD"][dead].norm(dim=1), 0.2 * p["W_enc_FD"][live].norm(dim=1).mean())
    assert (p["b_enc_F"][dead] == 0).all()
    for name, values in config.extra_parameters(torch.float32).items():
        assert torch.equal(p[name][dead], values[dead])
    for name in ("W_enc_FD", "b_enc_F", "W_dec_FD"):
        state = learner.optimiser.state[p[name]]
        assert (state["exp_avg"][dead] == 0).all()
        assert (state["exp_avg_sq"][dead] == 0).all()
        assert (p[name][live] - before[name][live]).abs().max() < 0.1  # the living only took a step
    assert learner.n_dead == 0
    learner.rows_since_fired_F[dead] = 1000
    frozen = p["b_enc_F"][dead].clone()
    for _ in range(3):
        learner.apply(learner.gradients(x), x)
    assert learner.n_dead > 0 or not torch.equal(frozen, p["b_enc_F"][dead])  # `times` is over


def test_resampling_is_due_a_number_of_times_whatever_the_batch() -> None:
    revive = sae.Resampling(every_rows=100, times=3)
    for n in (7, 100, 64):
        due = [rows for rows in range(0, 1000, n) if revive.due(rows, n)]
        assert len(due) == 3
        assert all(rows + n >= 100 * (i + 1) > rows for i, rows in enumerate(due))


STANDARD = sae.Standard(d_sae=48, l1_coefficient=0.2, decoder="unit")
RESAMPLING = sae.Resampling(every_rows=5_000)


@pytest.mark.parametrize(
    ("config", "revive"),
    [
        (STANDARD, sae.AuxK()),
        (STANDARD, RESAMPLING),
        (sae.JumpReLU(d_sae=48, l0_coefficient=0.05), sae.AuxK()),
        (sae.JumpReLU(d_sae=48, l0_coefficient=0.05), RESAMPLING),
        (sae.TopK(d_sae=48, k=3), sae.AuxK()),
        (sae.TopK(d_sae=48, k=3), RESAMPLING),
        (sae.TopK(d_sae=48, k=3), sae.GhostGrads()),  # with ReLU it revived 2 of 24 in these 200 steps
    ],
    ids=lambda c: getattr(c, "architecture", None) or c.kind,
)
def test_dead_latents_live_again(config: Architecture, revive: sae.AuxK) -> None:
    """Half of the latents are forced dead; a treatment gets many of them to fire."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((40, 24))
    acts = (rng.random((4000, 40)) < 0.08) * rng.random((4000, 40)) @ truth

    def fewest_dead(c: Architecture) -> int:
        learner = Learner(c, 24, 1.0, Rules(lr=5e-3, dead_after_rows=1000), seed=0)
        learner.parameters["b_enc_F"][24:] = -5.0
        found = []
        for _ in range(200):
            x = torch.from_numpy(acts[rng.integers(0, 4000, 100)].astype(np.float32))
            learner.apply(learner.gradients(x), x)
            found.append(learner.n_dead)
        return min(found[10:])  # nothing counts as dead before 1000 rows

    assert fewest_dead(replace(config, revive=revive)) < fewest_dead(replace(config, revive=None)) - 4
