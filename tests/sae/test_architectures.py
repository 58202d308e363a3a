"""Every architecture: the sparse step against autograd, the papers' formulas, invariances, planted truth."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import sae
from sae.architectures import (
    ARCHITECTURES,
    Architecture,
    Moment,
    Parameters,
    config_from_dict,
    config_to_dict,
)
from sae.learner import Learner
from sae.select import Scratch
from sae.step import Outcome, gradients
from sae.training import Rules

N, D, F, K = 96, 24, 600, 5
RULES = Rules(lr=1e-3, dead_after_rows=10**9)
ENDS = (7, 60, 61, 300, F)
CONFIGS: list[Architecture] = [
    sae.Standard(d_sae=F, l1_coefficient=0.3),
    sae.Standard(d_sae=F, l1_coefficient=0.3, decoder="unit"),
    sae.Gated(d_sae=F, l1_coefficient=0.3),
    sae.JumpReLU(d_sae=F, l0_coefficient=0.2, bandwidth=0.4),
    sae.JumpReLU(d_sae=F, l0_coefficient=0.2, bandwidth=0.4, target_l0=20),
    sae.JumpReLU(d_sae=F, l0_coefficient=0.2, bandwidth=0.4, frequency_scale=0.1),
    sae.TopK(d_sae=F, k=K, revive=None),
    sae.BatchTopK(d_sae=F, k=K, revive=None),
    sae.Matryoshka(d_sae=F, k=K, prefixes=ENDS[:-1], revive=None),
]
NAMES = ["standard", "standard-unit", "gated", "jumprelu", "jumprelu-target", "jumprelu-frequency"]
NAMES += ["topk", "batchtopk", "matryoshka"]
REVIVALS = [sae.AuxK(k_aux=8), sae.GhostGrads(), sae.GhostGrads(scale_by_dead_share=True)]
every = pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
revived = pytest.mark.parametrize("revive", REVIVALS, ids=["auxk", "ghost", "ghost-scaled"])


def _case(
    config: Architecture, n_dead: int = 0, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Parameters, Tensor, Tensor]:
    """Untied weights, biases everywhere, decoder rows not of unit norm: nothing cancels by symmetry.
    The biases leave about 2 % active where no rank decides, so that the sparse step stays sparse."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    p = {
        "W_enc_FD": draw(F, D) / D**0.5,
        "b_enc_F": draw(F) / 4 - (0 if config.by_rank else 3),
        "W_dec_FD": draw(F, D) / D**0.5,
        "b_dec_D": draw(D),
    }
    for name in config.extra_parameters(dtype):
        p[name] = draw(F) / 4
        if name == "threshold_F":
            p[name] = (p[name] - 1).exp()
    dead_A = torch.randperm(F, generator=g)[:n_dead].sort().values
    return p, draw(N, D) + 1, dead_A


def _step(
    kind: str, config: Architecture, p: Parameters, x: Tensor, dead_A: Tensor, moment: Moment | None = None
) -> Outcome:
    moment = moment or config.moment(0.7, torch.Generator().manual_seed(0))
    return gradients(kind, config, p, x, dead_A, moment, Scratch())  # type: ignore[arg-type]


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def _assert_equal_outcomes(a: Outcome, b: Outcome, tolerance: float) -> None:
    assert a.gradients.keys() == b.gradients.keys()
    for name, wanted in b.gradients.items():
        assert _relative(a.gradients[name], wanted) < tolerance, name
    assert a.loss == pytest.approx(b.loss, rel=tolerance)
    assert a.mse == pytest.approx(b.mse, rel=tolerance)
    assert _relative(a.row_loss_N, b.row_loss_N) < tolerance
    assert a.n_active == b.n_active
    assert (a.smallest is None) == (b.smallest is None)
    if a.smallest is not None:
        assert a.smallest == pytest.approx(b.smallest, rel=tolerance)
    assert set(a.fired_M.tolist()) == set(b.fired_M.tolist())


@every
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_sparse_step_equals_autograd(config: Architecture, dtype: torch.dtype, tolerance: float) -> None:
    case = _case(config, 0, dtype)
    sparse = _step("sparse", config, *case)
    assert sparse.n_active < N * F / 16, "the sparse step would fall back on the dense one"
    _assert_equal_outcomes(sparse, _step("dense", config, *case), tolerance)


@revived
@pytest.mark.parametrize("n_dead", [1, 5, 40, 400])
@pytest.mark.parametrize("config", [CONFIGS[i] for i in (0, 2, 3, 6, 7, 8)], ids=lambda c: c.architecture)
def test_sparse_step_equals_autograd_with_dead_latents(
    config: Architecture, n_dead: int, revive: sae.AuxK | sae.GhostGrads
) -> None:
    config = replace(config, revive=revive)
    case = _case(config, n_dead)
    with_dead = _step("sparse", config, *case)
    assert with_dead.loss > _step("sparse", replace(config, revive=None), *case).loss
    _assert_equal_outcomes(with_dead, _step("dense", config, *case), 1e-11)


def test_bfloat16_selection_with_half_of_the_latents_dead_equals_autograd_where_bfloat16_alone_does_not() -> (
    None
):
    config = sae.TopK(d_sae=F, k=K, revive=sae.AuxK(k_aux=12))
    p, x, dead = _case(config, F // 2, torch.float32)
    fast = gradients("sparse", config, p, x, dead, Moment(), Scratch(), "bfloat16")
    _assert_equal_outcomes(fast, _step("dense", config, p, x, dead, Moment()), 1e-5)
    centred = x - p["b_dec_D"]
    for rows, k in ((slice(None), K), (dead, 12)):  # what is chosen of all, and of the dead
        W, b = p["W_enc_FD"][rows], p["b_enc_F"][rows]
        exact = torch.topk(torch.addmm(b, centred, W.T), k).indices
        rounded = torch.topk(torch.addmm(b.bfloat16(), centred.bfloat16(), W.T.bfloat16()).float(), k).indices
        assert not torch.equal(exact.sort().values, rounded.sort().values)


@pytest.mark.parametrize("config", CONFIGS[:6], ids=NAMES[:6])
def test_a_batch_with_many_active_latents_takes_the_dense_formula(config: Architecture) -> None:
    p, x, dead = _case(config)
    p["b_enc_F"] += 3
    sparse = _step("sparse", config, p, x, dead)
    assert sparse.n_active > N * F / 16
    _assert_equal_outcomes(sparse, _step("dense", config, p, x, dead), 1e-12)


def _heaviside_through(pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """H(pre - theta) whose theta-gradient is the rectangle's, by a linear piece that autograd sees."""
    hard = (pre > theta).double()
    near = ((pre.detach() - theta.detach()).abs() < bandwidth / 2).double()
    return hard - near * (theta - theta.detach()) / bandwidth


def _paper(config: Architecture, p: Parameters, x: Tensor, sparsity: float) -> Tensor:
    """The loss as the papers print it, by other operations than ours."""
    h = torch.einsum("nd,fd->nf", x - p["b_dec_D"], p["W_enc_FD"])
    pre = h + p["b_enc_F"]
    relu = lambda t: t.clamp_min(0)  # noqa: E731
    recon = lambda z: torch.einsum("nf,fd->nd", z, p["W_dec_FD"]) + p["b_dec_D"]  # noqa: E731
    mse = lambda z: torch.linalg.vector_norm(x - recon(z), dim=1).pow(2).mean()  # noqa: E731
    match config:
        case sae.Standard(decoder="free"):  # Anthropic, April 2024 update
            weighted = relu(pre) * torch.linalg.vector_norm(p["W_dec_FD"], dim=1)
            return mse(relu(pre)) + sparsity * config.l1_coefficient * weighted.sum(1).mean()
        case sae.Standard():  # Bricken et al. 2023
            return mse(relu(pre)) + sparsity * config.l1_coefficient * relu(pre).abs().sum(1).mean()
        case sae.Gated():  # Rajamanoharan et al. 2024a, eq. 3-7
            z = (pre > 0) * relu(h * p["r_mag_F"].exp() + p["b_mag_F"])
            frozen = relu(pre) @ p["W_dec_FD"].detach() + p["b_dec_D"].detach()
            # the input of the frozen decoder's error is data: b_dec reaches it through the gate alone
            aux = (x - frozen).pow(2).sum(1).mean()
            return mse(z) + sparsity * config.l1_coefficient * relu(pre).sum(1).mean() + aux
        case sae.JumpReLU():  # Rajamanoharan et al. 2024b, eq. 9-12
            theta = p["threshold_F"]
            on = _heaviside_through(pre, theta, config.bandwidth)
            # through z the rectangle weighs theta, not pre: dz/dtheta = -(theta / bandwidth) K
            z = pre * (pre > theta) + theta.detach() * (on - on.detach())
            l0 = on.sum(1).mean()
            if config.frequency_scale is not None:
                share = on.mean(0)
                return (
                    mse(z)
                    + sparsity * config.l0_coefficient * (share + share**2 / config.frequency_scale).sum()
                )
            if config.target_l0 is not None:
                return mse(z) + sparsity * config.l0_coefficient * (l0 / config.target_l0 - 1) ** 2
            return mse(z) + sparsity * config.l0_coefficient * l0
        case sae.TopK():  # and its kin: Gao et al. 2024, Bussmann et al. 2024, 2025
            if config.architecture == "topk":
                cut = pre.detach().sort(1, descending=True).values[:, K - 1, None]
            else:
                cut = pre.detach().flatten().sort(descending=True).values[K * N - 1]
            z = relu(pre) * (pre >= cut)
            if config.architecture != "matryoshka":
                return mse(z)
            return sum((mse(z * (torch.arange(F) < end)) for end in ENDS), torch.zeros(()))
    raise AssertionError(config)


@every
def test_gradients_are_those_of_the_papers_formula(config: Architecture) -> None:
    p, x, dead = _case(config)
    leaves = {name: t.clone().requires_grad_() for name, t in p.items()}
    loss = _paper(config, leaves, x, sparsity=0.7)
    wanted = torch.autograd.grad(loss, list(leaves.values()))
    for kind in ("sparse", "dense"):
        outcome = _step(kind, config, p, x, dead)
        assert outcome.loss == pytest.approx(loss.item(), rel=1e-11)
        for name, gradient in zip(leaves, wanted, strict=True):
            assert _relative(outcome.gradients[name], gradient) < 1e-10, (kind, name)
            assert outcome.gradients[name].abs().max() > 0


def test_auxk_is_the_papers_formula() -> None:
    """Gao et al. 2024, sec. A.2, in numpy loops over rows."""
    config = sae.TopK(d_sae=F, k=K, revive=sae.AuxK(k_aux=8))
    p, x, dead = _case(config, 20)
    W_enc, b_enc, W_dec, b_dec = (t.numpy() for t in p.values())
    pre = (x.numpy() - b_dec) @ W_enc.T + b_enc
    main = aux = 0.0
    for n in range(N):
        error = x[n].numpy() - b_dec
        for f in np.argsort(-pre[n])[:K]:
            error -= max(pre[n, f], 0) * W_dec[f]
        main += (error**2).sum() / N
        explained = np.zeros(D)
        for f in sorted(dead.tolist(), key=lambda f: -pre[n, f])[:8]:
            explained += pre[n, f] * W_dec[f]
        aux += ((error - explained) ** 2).sum() / N
    outcome = _step("dense", config, p, x, dead)
    assert outcome.mse == pytest.approx(main, rel=1e-12)
    assert outcome.loss == pytest.approx(main + aux / 32, rel=1e-12)


def test_few_dead_latents_weigh_in_proportion_in_auxk() -> None:
    config = sae.TopK(d_sae=F, k=K, revive=sae.AuxK(k_aux=8))
    case = _case(config, 2)
    with_aux = _step("dense", config, *case)
    doubled = _step("dense", replace(config, revive=sae.AuxK(k_aux=16)), *case)
    assert with_aux.loss - with_aux.mse == pytest.approx(2 * (doubled.loss - doubled.mse), rel=1e-9)


@every
@revived
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_dead_latents_get_encoder_gradients_even_when_always_negative(
    config: Architecture, revive: sae.AuxK | sae.GhostGrads, kind: str
) -> None:
    config = replace(config, revive=revive)
    p, x, dead = _case(config, 6)
    p["b_enc_F"][dead] = -30.0  # never active, and below zero in every row
    outcome = _step(kind, config, p, x, dead)
    assert not set(outcome.fired_M.tolist()) & set(dead.tolist())
    assert (outcome.gradients["W_enc_FD"][dead].abs().sum(1) > 0).all()
    assert (outcome.gradients["b_enc_F"][dead] != 0).all()
    without = _step(kind, replace(config, revive=None), p, x, dead)
    assert (without.gradients["W_enc_FD"][dead] == 0).all()


@every
def test_permuting_latents_permutes_gradients(config: Architecture) -> None:
    if config.architecture == "matryoshka":
        config = replace(config, prefixes=(F,))  # the order of latents is what its prefixes mean
    config = replace(config, revive=sae.AuxK(k_aux=8))
    p, x, dead = _case(config, 30)
    order = torch.randperm(F, generator=torch.Generator().manual_seed(5))
    inverse = torch.argsort(order)
    q = {name: t if name == "b_dec_D" else t[order] for name, t in p.items()}
    plain = _step("sparse", config, p, x, dead)
    moved = _step("sparse", config, q, x, inverse[dead].sort().values)
    assert moved.loss == pytest.approx(plain.loss, rel=1e-12)
    for name, gradient in plain.gradients.items():
        back = moved.gradients[name] if name == "b_dec_D" else moved.gradients[name][inverse]
        assert _relative(back, gradient) < 1e-11, name


@every
@revived
def test_rotating_the_activations_rotates_gradients(
    config: Architecture, revive: sae.AuxK | sae.GhostGrads
) -> None:
    config = replace(config, revive=revive)
    p, x, dead = _case(config, 30)
    g = torch.Generator().manual_seed(7)
    Q = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64)).Q
    q = {name: t @ Q if name.endswith("D") else t for name, t in p.items()}
    plain = _step("sparse", config, p, x, dead)
    turned = _step("sparse", config, q, x @ Q, dead)
    assert turned.loss == pytest.approx(plain.loss, rel=1e-11)
    for name, gradient in plain.gradients.items():
        back = turned.gradients[name] @ Q.T if name.endswith("D") else turned.gradients[name]
        assert _relative(back, gradient) < 1e-10, name


def test_the_loss_of_standard_does_not_depend_on_decoder_norms_that_the_encoder_undoes() -> None:
    """Why the penalty is weighted: shrinking latents and growing the decoder gains nothing."""
    config = CONFIGS[0]
    p, x, dead = _case(config)
    norms = 0.1 + torch.rand(F, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q = p | {
        "W_enc_FD": p["W_enc_FD"] / norms[:, None],
        "b_enc_F": p["b_enc_F"] / norms,
        "W_dec_FD": p["W_dec_FD"] * norms[:, None],
    }
    assert _step("sparse", config, q, x, dead).loss == pytest.approx(
        _step("sparse", config, p, x, dead).loss, rel=1e-12
    )
    unit = CONFIGS[1]
    assert _step("sparse", unit, q, x, dead).loss > 1.01 * _step("sparse", unit, p, x, dead).loss


def test_the_gates_terms_do_not_reach_the_decoder() -> None:
    config = CONFIGS[2]
    p, x, dead = _case(config)
    p["b_mag_F"][:] = -100.0  # nothing is reconstructed: only the gate's own terms are left
    found = _step("sparse", config, p, x, dead).gradients
    assert (found["W_dec_FD"] == 0).all()
    assert found["W_enc_FD"].abs().max() > 0


def test_the_frequency_penalty_is_l0_for_rare_latents_and_more_for_frequent_ones() -> None:
    l0, frequency = CONFIGS[3], replace(CONFIGS[3], frequency_scale=1e9)
    case = _case(l0)
    assert _step("dense", frequency, *case).loss == pytest.approx(_step("dense", l0, *case).loss, rel=1e-8)
    assert _step("dense", CONFIGS[5], *case).loss > _step("dense", l0, *case).loss


@every
def test_sparse_run_stays_on_the_dense_run_with_short_batches_and_dying_latents(config: Architecture) -> None:
    config = replace(config, revive=sae.AuxK(k_aux=8))
    rules = replace(RULES, dead_after_rows=150, sparsity_warmup_rows=200)
    learners = [
        Learner(config, D, 1.0, replace(rules, step=step), seed=3, dtype=torch.float64)
        for step in ("sparse", "dense")
    ]
    g = torch.Generator().manual_seed(1)
    for learner in learners:
        if not config.by_rank:
            learner.parameters["b_enc_F"] -= 0.5 if config.architecture == "standard" else 3
            learner.parameters["b_enc_F"][::3] -= 9
    n_dead = []
    for n in [N, N, 17, N, N, 50, N, 1, N, N]:
        x = torch.randn(n, D, generator=g, dtype=torch.float64)
        for learner in learners:
            learner.apply(learner.gradients(x), x)
        n_dead.append(learners[0].n_dead)
    assert max(n_dead) > 8  # AuxK took part
    for name, wanted in learners[1].parameters.items():
        assert _relative(learners[0].parameters[name], wanted) < 1e-6  # Adam divides by gradients near zero
    assert torch.equal(learners[0].rows_since_fired_F, learners[1].rows_since_fired_F)


def test_topk_has_exactly_k_active_in_every_row() -> None:
    config = CONFIGS[6]
    _, x, _ = _case(config, 0, torch.float32)
    learner = Learner(config, D, 1.0, RULES, seed=0)
    latents = learner.finished({**config_to_dict(config), "d_in": D}).encode(x)
    assert ((latents > 0).sum(1) == K).all()
    assert learner.gradients(x).n_active == K * N


@pytest.mark.parametrize("config", CONFIGS[7:], ids=NAMES[7:])
def test_batchtopk_has_k_active_on_average_in_training(config: Architecture) -> None:
    _, x, _ = _case(config, 0, torch.float32)
    learner = Learner(config, D, 1.0, RULES, seed=0)
    assert learner.gradients(x).n_active == K * N
    mask = config.keep(x @ learner.parameters["W_enc_FD"].T)
    assert mask is not None
    counts = mask.sum(1)
    assert counts.sum() == K * N
    assert counts.min() < K < counts.max()  # rows differ


def test_matryoshka_prefixes_are_the_papers_or_drawn_anew_with_short_ones_more_often() -> None:
    g = torch.Generator().manual_seed(0)
    assert sae.Matryoshka(d_sae=65536, k=32).moment(1, g).prefixes == (2048, 6144, 14336, 30720, 65536)
    assert sae.Matryoshka(d_sae=8, k=1, prefixes=(2, 8)).moment(1, g).prefixes == (2, 8)
    config = sae.Matryoshka(d_sae=1024, k=4, n_random_prefixes=10)
    draws = [config.moment(1, g).prefixes for _ in range(400)]
    assert all(len(ends) == 11 and ends[-1] == 1024 and list(ends) == sorted(set(ends)) for ends in draws)
    assert len(set(draws)) > 390
    first = np.array([ends[:-1] for ends in draws]).ravel()
    # without replacement the law flattens a little: P(length >= 64) would be 1/8 - 1/32 of the rest
    assert 0.10 < (first >= 64).mean() < 0.25


def test_a_random_matryoshka_step_is_the_same_sparse_and_dense() -> None:
    config = sae.Matryoshka(d_sae=F, k=K, n_random_prefixes=6, revive=None)
    case = _case(config)
    _assert_equal_outcomes(_step("sparse", config, *case), _step("dense", config, *case), 1e-11)


@every
def test_decoder_rows_stay_of_unit_norm_and_steps_are_orthogonal_to_them(config: Architecture) -> None:
    learner = Learner(config, D, 1.0, RULES, seed=0)
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(2))
    for _ in range(5):
        before = learner.parameters["W_dec_FD"].clone()
        outcome = learner.gradients(x)
        learner.apply(outcome, x)
        norms = learner.parameters["W_dec_FD"].norm(dim=1)
        if config.decoder_norm == "free":
            assert norms.sub(0.1).abs().max() > 1e-6  # it started at 0.1 and may move
            continue
        along = (outcome.gradients["W_dec_FD"] * before).sum(1)
        assert along.abs().max() < 1e-6 * outcome.gradients["W_dec_FD"].abs().max()
        assert norms.sub(1).abs().max() < 1e-6


@every
def test_the_finished_sae_computes_what_was_trained(config: Architecture) -> None:
    """Scale, decoder norms and the architecture's own parameters are folded into raw units."""
    learner = Learner(config, D, 3.0, RULES, seed=0, dtype=torch.float64)
    p, x, _dead = _case(config)
    if config.decoder_norm == "unit":
        p["W_dec_FD"] /= p["W_dec_FD"].norm(dim=1, keepdim=True)
    for name, tensor in p.items():
        learner.parameters[name].copy_(tensor)
    terms = config.loss(_dense_view(config, p, x), p, config.moment(1.0, learner.generator))
    learner.threshold = float(terms.latents[terms.latents > 0].min()) * (1 - 1e-12)  # dividing rounds
    s = learner.finished({**config_to_dict(config), "d_in": D})
    assert s.W_dec.norm(dim=1).sub(1).abs().max() < 1e-12
    assert (s(x / 3) * 3 - (x + terms.error_ND)).abs().max() < 1e-9
    if config.decoder_norm == "unit":
        assert (s.encode(x / 3) * 3 - terms.latents).abs().max() < 1e-10


def _dense_view(config: Architecture, p: Parameters, x: Tensor):  # type: ignore[no-untyped-def]
    from sae.views import Dense

    centred = x - p["b_dec_D"]
    return Dense(centred, p, config.keep(Dense(centred, p).pre))


def _planted(n_rows: int, n_features: int, d: int, active: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are sums of exactly `active` of `n_features` random unit directions, plus a bias."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((n_features, d))
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    chosen = rng.random((n_rows, n_features)).argsort(axis=1)[:, :active]
    codes = np.zeros((n_rows, n_features))
    np.put_along_axis(codes, chosen, 1 + 0.3 * rng.random((n_rows, active)), axis=1)
    return (codes @ truth + 0.5).astype(np.float32), truth


PLANTED: list[Architecture] = [
    sae.Standard(d_sae=48, l1_coefficient=0.5),
    sae.Gated(d_sae=48, l1_coefficient=3.0, optimiser=sae.Optimiser(clip_norm=100.0)),
    sae.JumpReLU(d_sae=48, l0_coefficient=20.0, target_l0=3, bandwidth=0.5, initial_threshold=0.5),
    sae.TopK(d_sae=48, k=3),
    sae.BatchTopK(d_sae=48, k=3),
    sae.Matryoshka(d_sae=48, k=3, prefixes=(40,)),
]


@every
def test_first_weights_are_one_direction_a_latent_with_the_norms_asked_for(config: Architecture) -> None:
    p = Learner(config, D, 1.0, sae.Training(n_rows=100).rules(config), seed=0).parameters
    encoder_F, decoder_F = (torch.linalg.vector_norm(p[name], dim=1) for name in ("W_enc_FD", "W_dec_FD"))
    assert encoder_F.numpy() == pytest.approx(config.initial_encoder_norm)
    assert decoder_F.numpy() == pytest.approx(0.1 if config.decoder_norm == "free" else 1)
    assert torch.cosine_similarity(p["W_enc_FD"], p["W_dec_FD"]).numpy() == pytest.approx(1)


@pytest.mark.parametrize("config", PLANTED, ids=lambda c: c.architecture)
def test_a_planted_dictionary_is_recovered(config: Architecture) -> None:
    acts, truth = _planted(30_000, n_features=32, d=48, active=3, seed=0)
    shrunk = config.architecture == "standard"  # L1 shrinks values, which leaves room for small ones
    stream = sae.ArrayStream(acts, batch_size=100 if shrunk else 500, seed=0)
    training = sae.Training(n_rows=300_000, lr=2e-3 if shrunk else 3e-3, seed=0, dead_after_rows=10_000)
    (s,) = sae.train(stream, config, training)
    cosine = np.abs(truth @ s.W_dec.T.numpy())
    # not 1: with exactly 3 active, a part common to all directions can move into b_dec
    assert cosine.max(axis=1).min() > (0.85 if config.architecture == "matryoshka" else 0.96)
    assert len(set(cosine.argmax(axis=1))) == 32  # each by a latent of its own
    x = torch.from_numpy(acts[:5000])
    fvu = float((s(x) - x).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu < (0.03 if shrunk else 0.01)
    l0 = float((s.encode(x) > 0).sum(1).float().mean())
    assert l0 == pytest.approx(3, rel=0.5 if shrunk else 0.05)


@pytest.mark.parametrize("kind", [sae.BatchTopK, sae.Matryoshka])
def test_inference_threshold_gives_the_trained_l0(kind: type) -> None:
    """Dense, overlapping activations, where the choice of k really cuts."""
    rng = np.random.default_rng(0)
    acts = rng.standard_t(5, (20_000, 40)).astype(np.float32) @ rng.standard_normal((40, 32)).astype(
        np.float32
    )
    training = sae.Training(n_rows=200_000, seed=0)
    (s,) = sae.train(sae.ArrayStream(acts, batch_size=1000), kind(d_sae=128, k=12), training)
    l0 = float((s.encode(acts) > 0).sum(1).float().mean())
    assert l0 == pytest.approx(12, rel=0.05)


def test_jumprelu_reaches_its_target_l0() -> None:
    rng = np.random.default_rng(0)
    acts = rng.standard_t(5, (20_000, 40)).astype(np.float32) @ rng.standard_normal((40, 32)).astype(
        np.float32
    )
    config = sae.JumpReLU(d_sae=128, target_l0=12, l0_coefficient=30.0, bandwidth=1.0, initial_threshold=1.0)
    (s,) = sae.train(sae.ArrayStream(acts, batch_size=1000), config, sae.Training(n_rows=300_000, lr=2e-3))
    l0 = float((s.encode(acts) > 0).sum(1).float().mean())
    assert l0 == pytest.approx(12, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (sae.TopK, {"d_sae": 8, "k": 9}, "k is 9; it must be between 1 and d_sae = 8"),
        (sae.BatchTopK, {"d_sae": 8, "k": 0}, "k is 0; it must be between 1"),
        (sae.TopK, {"d_sae": 0, "k": 1}, "d_sae is 0"),
        (sae.AuxK, {"k_aux": 0}, "k_aux is 0"),
        (sae.AuxK, {"aux_coefficient": -1.0}, "aux_coefficient is -1.0"),
        (sae.Standard, {"d_sae": 8, "l1_coefficient": -1.0}, "l1_coefficient is -1.0"),
        (sae.Standard, {"d_sae": 8, "l1_coefficient": 1.0, "decoder": "x"}, "decoder is 'x'"),
        (sae.Gated, {"d_sae": 8, "l1_coefficient": float("nan")}, "l1_coefficient is nan"),
        (sae.JumpReLU, {"d_sae": 8, "bandwidth": 0.0}, "bandwidth is 0.0; it must be positive"),
        (sae.JumpReLU, {"d_sae": 8, "target_l0": 3.0, "frequency_scale": 0.1}, "give one of them"),
        (sae.Matryoshka, {"d_sae": 8, "k": 2, "prefixes": (4, 2)}, "prefixes are (4, 2); they must ascend"),
        (sae.Matryoshka, {"d_sae": 8, "k": 2, "prefixes": (4, 9)}, "each between 1 and d_sae = 8"),
        (sae.Matryoshka, {"d_sae": 8, "k": 2, "n_random_prefixes": 8}, "n_random_prefixes is 8"),
        (sae.Resampling, {"every_rows": 0}, "every_rows is 0"),
        (sae.Optimiser, {"ema_decay": 1.0}, "ema_decay is 1.0"),
    ],
)
def test_a_config_that_can_not_be_trained_is_refused(kind: type, values: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        kind(**values)
    assert message in str(caught.value)


def test_configs_survive_json_and_a_typo_names_the_nearest_field() -> None:
    import json

    own = sae.Optimiser(lr=1e-3, betas=(0.5, 0.9))
    for config in [
        *CONFIGS,
        *(replace(CONFIGS[0], revive=r, optimiser=own) for r in [*REVIVALS, sae.Resampling()]),
    ]:
        assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    assert {type(c) for c in CONFIGS} == set(ARCHITECTURES.values())
    with pytest.raises(ValueError, match="TopK has no field 'd_sea'; did you mean d_sae"):
        config_from_dict({"architecture": "topk", "d_sea": 4, "k": 1})
    with pytest.raises(ValueError, match="TopK needs k; give a value"):
        config_from_dict({"architecture": "topk", "d_sae": 4})
    with pytest.raises(ValueError, match="architecture 'topp' is not known; there are standard, gated"):
        config_from_dict({"architecture": "topp"})
    with pytest.raises(ValueError, match=r"revive\.kind 'aux' is not known; there are auxk, ghost, resample"):
        config_from_dict({"architecture": "topk", "d_sae": 4, "k": 1, "revive": {"kind": "aux"}})
