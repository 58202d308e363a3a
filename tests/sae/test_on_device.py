"""The path that a GPU takes, run on the CPU: torch operations alone choose, decode and differentiate."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sae
from actcache.errors import SpecError
from sae import on_device, select
from sae.architectures import Architecture
from sae.encoder import exact_values
from sae.learner import Learner
from sae.select import Scratch, above, largest_in_batch, largest_per_row

N, D, F, K = 40, 12, 256, 5
CONFIGS: list[Architecture] = [
    sae.TopK(d_sae=F, k=K, revive=sae.AuxK(k_aux=6)),
    sae.BatchTopK(d_sae=F, k=K),
    sae.Matryoshka(d_sae=F, k=K, prefixes=(32, 100)),
    sae.Standard(d_sae=F, l1_coefficient=0.1),
    sae.Gated(d_sae=F, l1_coefficient=0.1),
    sae.JumpReLU(d_sae=F, target_l0=4, initial_threshold=0.5),
    sae.TopK(d_sae=F, k=K, revive=sae.Resampling(every_rows=N, encoder_scale=0.2)),
    sae.TopK(d_sae=F, k=K, revive=sae.GhostGrads()),
]


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_elsewhere", lambda pre_NF: True)


@given(st.integers(1, 7), st.integers(1, 40), st.sampled_from([1, 31, 32, 33, 64]), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_top_columns_are_those_of_a_sort(n: int, k: int, groups: int, seed: int) -> None:
    f = groups * 8
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.permutation(n * f).reshape(n, f).astype(np.float32) - n * f / 2)
    k = min(k, f)
    wanted = np.sort(np.argsort(-x.numpy(), axis=1, kind="stable")[:, :k], axis=1)
    assert np.array_equal(on_device.top_columns(x, k).numpy(), wanted)
    flat = np.sort(np.argsort(-x.numpy().reshape(-1), kind="stable")[: n * k])
    assert np.array_equal(on_device.top_places(x, n * k).numpy(), flat)


def test_nan_is_chosen_first() -> None:
    x = torch.randn(3, 2048, generator=torch.Generator().manual_seed(0))
    x[1, 700] = torch.nan
    assert 700 in on_device.top_columns(x, 4)[1]


def _pre() -> torch.Tensor:
    return torch.randn(N, F, generator=torch.Generator().manual_seed(1)) - 1


@pytest.mark.parametrize(
    "choose",
    [
        lambda pre: largest_per_row(pre, K, Scratch()),
        lambda pre: largest_in_batch(pre, K * N, Scratch()),
        lambda pre: above(pre, torch.linspace(0, 1, F), Scratch()),
    ],
    ids=["per-row", "in-batch", "above"],
)
def test_choices_are_those_of_the_cpu(choose, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = choose(_pre())
    monkeypatch.setattr(select, "_elsewhere", lambda pre_NF: True)
    found = choose(_pre())
    for name in ("rows", "columns", "row_starts", "values"):
        assert isinstance(getattr(found, name), torch.Tensor)
        assert np.array_equal(getattr(found, name).numpy(), getattr(wanted, name)), name
    (order, starts), (order_there, starts_there) = wanted.by_column, found.by_column
    assert np.array_equal(order, order_there.numpy())
    assert np.array_equal(starts, starts_there.numpy())


def test_candidates_by_bfloat16_are_ranked_by_their_true_values(as_on_gpu: None) -> None:
    g = torch.Generator().manual_seed(0)
    x_ND, W_FD = torch.randn(64, D, generator=g), torch.randn(F, D, generator=g)
    p = {"W_enc_FD": W_FD, "b_enc_F": torch.zeros(F)}
    true_NF = x_ND @ W_FD.T
    rounded_NF = (x_ND.bfloat16() @ W_FD.bfloat16().T).contiguous()
    found = largest_per_row(rounded_NF, K, Scratch(), exact_values(x_ND, p))
    wanted = torch.topk(true_NF, K).indices.sort(dim=1).values
    assert torch.equal(found.columns.view(64, K), wanted)
    assert torch.allclose(found.values.view(64, K), true_NF.gather(1, wanted), atol=1e-5)


def _learner(config: Architecture, kind: str = "sparse") -> Learner:
    training = sae.Training(n_rows=10**6, lr=1e-3, dead_after_rows=10**5, step=kind)  # type: ignore[arg-type]
    learner = Learner(config, D, 1.0, training.rules(config), seed=3, dtype=torch.float64)
    if not config.by_rank:
        learner.parameters["b_enc_F"] -= 2.5
    learner.rows_since_fired_F[::5] = 10**6  # a fifth is dead: AuxK and its kin act
    return learner


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.architecture}-{type(c.revive).__name__}")
def test_steps_are_those_of_the_dense_oracle(config: Architecture, as_on_gpu: None) -> None:
    g = torch.Generator().manual_seed(2)
    found, wanted = _learner(config), _learner(config, "dense")
    for _ in range(3):
        x_ND = torch.randn(N, D, generator=g, dtype=torch.float64)
        a, b = found.gradients(x_ND), wanted.gradients(x_ND)
        assert a.loss == pytest.approx(b.loss, rel=1e-12)
        assert (a.n_active, a.smallest) == (b.n_active, pytest.approx(b.smallest))
        for name, gradient in b.gradients.items():
            assert torch.allclose(a.gradients[name], gradient, rtol=1e-9, atol=1e-12), name
        found.apply(a, x_ND)
        wanted.apply(b, x_ND)
        assert torch.equal(found.rows_since_fired_F, wanted.rows_since_fired_F)


def test_a_device_that_is_not_there_is_named(tmp_path) -> None:
    stream = sae.ArrayStream(np.ones((10, D), np.float32), batch_size=5)
    for name in ("cuda:7", "gpu"):
        with pytest.raises(SpecError, match=f"device {name} can not be used here"):
            sae.train(stream, sae.TopK(d_sae=F, k=K), sae.Training(n_rows=10), device=name)
