"""TopK and BatchTopK: the sparse step against autograd, the papers' formulas, and planted truth."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import sae
from sae.architectures import ARCHITECTURES, Config, config_from_dict, config_to_dict
from sae.learner import Learner, Rules
from sae.select import Scratch
from sae.step import Outcome, Parameters, dense_gradients, sparse_gradients

N, D, F, K = 96, 24, 600, 5
RULES = Rules(lr=1e-3, betas=(0.9, 0.999), clip_norm=1.0, dead_after_rows=10**9, step="sparse")
BOTH = [sae.TopK(d_sae=F, k=K, k_aux=8), sae.BatchTopK(d_sae=F, k=K, k_aux=8)]
ids = lambda c: c.architecture  # noqa: E731


def _case(
    config: Config, n_dead: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Parameters, Tensor, Tensor]:
    """Untied weights, biases everywhere, decoder rows not of unit norm: nothing cancels by symmetry."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    p = Parameters(draw(F, D) / D**0.5, draw(F) / 4, draw(F, D) / D**0.5, draw(D))
    dead_A = torch.randperm(F, generator=g)[:n_dead].sort().values
    return p, draw(N, D) + 1, dead_A


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _names(outcome: Outcome) -> dict[str, Tensor]:
    return dict(zip(("W_enc", "b_enc", "W_dec", "b_dec"), outcome.gradients, strict=True))


@pytest.mark.parametrize("n_dead", [0, 3, 40, 200, 400])
@pytest.mark.parametrize("config", BOTH, ids=ids)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_sparse_step_equals_autograd(
    config: Config, n_dead: int, dtype: torch.dtype, tolerance: float
) -> None:
    p, x, dead = _case(config, n_dead, dtype)
    dense, sparse = dense_gradients(config, p, x, dead), sparse_gradients(config, p, x, dead, Scratch())
    for name, wanted in _names(dense).items():
        assert _relative(_names(sparse)[name], wanted) < tolerance, name
    assert sparse.loss == pytest.approx(dense.loss, rel=tolerance)
    assert sparse.mse == pytest.approx(dense.mse, rel=tolerance)
    assert sparse.n_active == dense.n_active
    assert sparse.smallest == pytest.approx(dense.smallest, rel=tolerance)
    assert set(sparse.fired_M.tolist()) == set(dense.fired_M.tolist())


@pytest.mark.parametrize("config", BOTH, ids=ids)
def test_sparse_run_stays_on_the_dense_run_with_short_batches_and_dying_latents(config: Config) -> None:
    rules = replace(RULES, dead_after_rows=150)
    learners = [
        Learner(config, D, 1.0, replace(rules, step=step), seed=3, dtype=torch.float64)
        for step in ("sparse", "dense")
    ]
    g = torch.Generator().manual_seed(1)
    n_dead = []
    for n in [N, N, 17, N, N, 50, N, 1, N, N]:
        x = torch.randn(n, D, generator=g, dtype=torch.float64)
        for learner in learners:
            learner.apply(learner.gradients(x), n, 1.0)
        n_dead.append(learners[0].n_dead)
    assert max(n_dead) > 8  # AuxK took part
    for a, b in zip(learners[0].parameters.tensors(), learners[1].parameters.tensors(), strict=True):
        assert _relative(a, b) < 1e-6  # Adam's first steps divide by gradients near zero
    assert torch.equal(learners[0].rows_since_fired_F, learners[1].rows_since_fired_F)


@pytest.mark.parametrize("config", BOTH, ids=ids)
def test_dense_loss_is_the_papers_formula(config: Config) -> None:
    """Gao et al. 2024, eq. 3 and sec. A.2, in numpy loops over rows."""
    p, x, dead = _case(config, 20, torch.float64)
    W_enc, b_enc, W_dec, b_dec = (t.numpy() for t in p.tensors())
    pre = (x.numpy() - b_dec) @ W_enc.T + b_enc
    if config.architecture == "topk":
        cut_N = np.sort(pre, axis=1)[:, -K]
    else:
        cut_N = np.full(N, np.sort(pre.reshape(-1))[-K * N])
    main = aux = 0.0
    for n in range(N):
        error = x[n].numpy() - b_dec
        for f in np.flatnonzero(pre[n] >= cut_N[n]):
            error -= max(pre[n, f], 0) * W_dec[f]
        main += (error**2).sum() / N
        explained = np.zeros(D)
        for f in sorted(dead.tolist(), key=lambda f: -pre[n, f])[:8]:
            explained += pre[n, f] * W_dec[f]
        aux += ((error - explained) ** 2).sum() / N
    outcome = dense_gradients(config, p, x, dead)
    assert outcome.mse == pytest.approx(main, rel=1e-12)
    assert outcome.loss == pytest.approx(main + aux / 32, rel=1e-12)


def test_few_dead_latents_weigh_in_proportion() -> None:
    config = BOTH[0]
    p, x, dead = _case(config, 2, torch.float64)
    with_aux = dense_gradients(config, p, x, dead)
    doubled = dense_gradients(replace(config, k_aux=16), p, x, dead)
    assert with_aux.loss - with_aux.mse == pytest.approx(2 * (doubled.loss - doubled.mse), rel=1e-9)


@pytest.mark.parametrize("step", [dense_gradients, lambda *a: sparse_gradients(*a, Scratch())])
@pytest.mark.parametrize("config", BOTH, ids=ids)
def test_dead_latents_get_encoder_gradients_even_when_always_negative(config: Config, step) -> None:  # type: ignore[no-untyped-def]
    p, x, dead = _case(config, 6, torch.float64)
    p.b_enc_F[dead] = -100.0  # never active, and below zero in every row
    outcome = step(config, p, x, dead)
    gradient = _names(outcome)
    assert not set(outcome.fired_M.tolist()) & set(dead.tolist())
    assert (gradient["W_enc"][dead].abs().sum(1) > 0).all()
    assert (gradient["b_enc"][dead] != 0).all()
    without = _names(step(replace(config, aux_coefficient=0.0), p, x, dead))
    assert (without["W_enc"][dead] == 0).all()


def test_topk_has_exactly_k_active_in_every_row() -> None:
    config, (_, x, _) = BOTH[0], _case(BOTH[0], 0, torch.float32)
    learner = Learner(config, D, 1.0, RULES, seed=0)
    latents = learner.finished({**config_to_dict(config), "d_in": D}).encode(x)
    assert ((latents > 0).sum(1) == K).all()
    assert learner.gradients(x).n_active == K * N


def test_batchtopk_has_k_active_on_average_in_training() -> None:
    config, (_, x, _) = BOTH[1], _case(BOTH[1], 0, torch.float32)
    learner = Learner(config, D, 1.0, RULES, seed=0)
    assert learner.gradients(x).n_active == K * N
    counts = (config.activate(x @ learner.parameters.W_enc_FD.T) > 0).sum(1)
    assert counts.sum() == K * N
    assert counts.min() < K < counts.max()  # rows differ


@pytest.mark.parametrize("config", BOTH, ids=ids)
def test_permuting_latents_permutes_gradients(config: Config) -> None:
    p, x, dead = _case(config, 30, torch.float64)
    order = torch.randperm(F, generator=torch.Generator().manual_seed(5))
    inverse = torch.argsort(order)
    q = Parameters(p.W_enc_FD[order], p.b_enc_F[order], p.W_dec_FD[order], p.b_dec_D)
    plain = sparse_gradients(config, p, x, dead, Scratch())
    moved = sparse_gradients(config, q, x, inverse[dead].sort().values, Scratch())
    assert moved.loss == pytest.approx(plain.loss, rel=1e-12)
    assert _relative(moved.gradients[0][inverse], plain.gradients[0]) < 1e-11
    assert _relative(moved.gradients[2][inverse], plain.gradients[2]) < 1e-11


@pytest.mark.parametrize("config", BOTH, ids=ids)
def test_rotating_the_activations_rotates_gradients(config: Config) -> None:
    p, x, dead = _case(config, 30, torch.float64)
    g = torch.Generator().manual_seed(7)
    Q = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64)).Q
    q = Parameters(p.W_enc_FD @ Q, p.b_enc_F, p.W_dec_FD @ Q, p.b_dec_D @ Q)
    plain = sparse_gradients(config, p, x, dead, Scratch())
    turned = sparse_gradients(config, q, x @ Q, dead, Scratch())
    assert turned.loss == pytest.approx(plain.loss, rel=1e-11)
    for i in (0, 2, 3):
        assert _relative(turned.gradients[i] @ Q.T, plain.gradients[i]) < 1e-10


@pytest.mark.parametrize("config", BOTH, ids=ids)
def test_decoder_rows_stay_of_unit_norm_and_steps_are_orthogonal_to_them(config: Config) -> None:
    learner = Learner(config, D, 1.0, RULES, seed=0)
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(2))
    for _ in range(5):
        before = learner.parameters.W_dec_FD.clone()
        outcome = learner.gradients(x)
        learner.apply(outcome, N, 1.0)
        along = (outcome.gradients[2] * before).sum(1)
        assert along.abs().max() < 1e-6 * outcome.gradients[2].abs().max()
        assert learner.parameters.W_dec_FD.norm(dim=1).sub(1).abs().max() < 1e-6


def _planted(n_rows: int, n_features: int, d: int, active: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are sums of exactly `active` of `n_features` random unit directions, plus a bias."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((n_features, d))
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    chosen = rng.random((n_rows, n_features)).argsort(axis=1)[:, :active]
    codes = np.zeros((n_rows, n_features))
    np.put_along_axis(codes, chosen, 1 + 0.3 * rng.random((n_rows, active)), axis=1)
    return (codes @ truth + 0.5).astype(np.float32), truth


@pytest.mark.parametrize("kind", [sae.TopK, sae.BatchTopK])
def test_a_planted_dictionary_is_recovered(kind) -> None:  # type: ignore[no-untyped-def]
    acts, truth = _planted(30_000, n_features=32, d=48, active=3, seed=0)
    stream = sae.ArrayStream(acts, batch_size=500, seed=0)
    training = sae.Training(n_rows=300_000, lr=3e-3, seed=0, dead_after_rows=10_000)
    (s,) = sae.train(stream, kind(d_sae=48, k=3), training)
    cosine = np.abs(truth @ s.W_dec.T.numpy())
    assert cosine.max(axis=1).min() > 0.96  # not 1: part of each direction can move into b_dec
    assert len(set(cosine.argmax(axis=1))) == 32  # each by a latent of its own
    x = torch.from_numpy(acts[:5000])
    fvu = float((s(x) - x).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu < 0.01
    l0 = float((s.encode(x) > 0).sum(1).float().mean())
    assert l0 == pytest.approx(3, rel=0.05)


def test_inference_threshold_gives_the_trained_l0() -> None:
    """Dense, overlapping activations, where the choice of k really cuts."""
    rng = np.random.default_rng(0)
    acts = rng.standard_t(5, (20_000, 40)).astype(np.float32) @ rng.standard_normal((40, 32)).astype(
        np.float32
    )
    training = sae.Training(n_rows=200_000, seed=0)
    (s,) = sae.train(sae.ArrayStream(acts, batch_size=1000), sae.BatchTopK(d_sae=128, k=12), training)
    l0 = float((s.encode(acts) > 0).sum(1).float().mean())
    assert l0 == pytest.approx(12, rel=0.05)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_sae": 8, "k": 9}, "k is 9; it must be between 1 and d_sae = 8"),
        ({"d_sae": 0, "k": 1}, "d_sae is 0"),
        ({"d_sae": 8, "k": 2, "k_aux": 0}, "k_aux is 0"),
        ({"d_sae": 8, "k": 2, "aux_coefficient": -1.0}, "aux_coefficient is -1.0"),
    ],
)
@pytest.mark.parametrize("kind", ARCHITECTURES.values())
def test_a_config_that_can_not_be_trained_is_refused(kind: type, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        kind(**values)


def test_configs_survive_json_and_a_typo_names_the_nearest_field() -> None:
    for config in BOTH:
        assert config_from_dict(config_to_dict(config)) == config
    with pytest.raises(ValueError, match="TopK has no field 'd_sea'; did you mean d_sae"):
        config_from_dict({"architecture": "topk", "d_sea": 4, "k": 1})
    with pytest.raises(ValueError, match="architecture 'topp' is not known; there are topk, batchtopk"):
        config_from_dict({"architecture": "topp"})
