"""The generators keep to their description, datasets hold their rows, and our steps are SAELens' where they should be."""

import functools
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sae
from sae.learner import Learner
from sae.select import Scratch
from sae.step import gradients

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "actcache"))

import features
import ground_truth
from ground_truth import Contest

N = 20_000


@pytest.fixture(scope="module")
def small() -> features.Features:
    """SynthSAEBench once more, small."""
    return features.synth(n_features=128, d_in=24, n_roots=1)


def test_toy_features_are_orthogonal_and_fire_independently() -> None:
    toy = features.toy_a()
    acts_NF, x_ND = toy.sample(N, torch.Generator().manual_seed(0))
    assert torch.allclose(toy.vectors_FD @ toy.vectors_FD.T, torch.eye(16), atol=1e-5)
    assert torch.allclose(x_ND @ toy.vectors_FD.T, acts_NF, atol=1e-5)
    on_NF = (acts_NF > 0).double()
    sd = (0.25 * 0.75 / N) ** 0.5
    assert (on_NF.mean(0) - 0.25).abs().max() < 5 * sd
    together = on_NF.T @ on_NF / N - 0.25**2
    assert together.fill_diagonal_(0).abs().max() < 5 * (0.0625 / N) ** 0.5
    assert abs(float(acts_NF[acts_NF > 0].mean()) - 1) < 5 * 0.05 / (N * 4) ** 0.5
    exactly = features.toy_a(exactly=4).sample(500, torch.Generator().manual_seed(0))[0]
    assert ((exactly > 0).sum(1) == 4).all()


def test_children_fire_with_their_parent_and_one_sibling_at_a_time(small: features.Features) -> None:
    acts_NF, x_ND = small.sample(N, torch.Generator().manual_seed(0))
    assert [len(parents) for parents, _ in small.levels] == [1, 4, 16]
    for parents, children in small.levels:
        siblings = acts_NF[:, children] > 0
        assert siblings.any()
        assert siblings.sum(2).max() == 1
        assert not (siblings.any(2) & (acts_NF[:, parents] == 0)).any()
    assert torch.allclose(x_ND, acts_NF @ small.vectors_FD + small.bias_D, atol=1e-4)
    assert abs(float(small.bias_D.norm()) - 0.5) < 1e-6
    assert torch.allclose(small.vectors_FD.norm(dim=1), torch.ones(128), atol=1e-5)


def test_free_features_fire_as_often_as_zipf_says_and_are_correlated(small: features.Features) -> None:
    acts_NF, _ = small.sample(N, torch.Generator().manual_seed(0))
    free = slice(1 + 4 + 16 + 64, None)  # in no tree
    wanted_F = small.probability_F[free]
    zipf_F = torch.arange(1, 129).float() ** -0.5
    share_F = ((zipf_F - zipf_F[-1]) / (zipf_F[0] - zipf_F[-1]))[free]
    assert torch.allclose(wanted_F, 5e-4 + (0.4 - 5e-4) * share_F)
    found_F = (acts_NF[:, free] > 0).float().mean(0)
    assert ((found_F - wanted_F).abs() < 5 * (wanted_F / N).sqrt()).all()
    factor_FR = small.factor_FR
    assert factor_FR is not None
    assert (factor_FR.square().sum(1) <= 0.99 + 1e-6).all()


def test_orthogonalising_lessens_overlap() -> None:
    start = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    plain = torch.nn.functional.normalize(start, dim=1)
    better = features._orthogonalised(start, steps=100, lr=3e-3)
    overlap = [float((v @ v.T).square().sum()) for v in (plain, better)]
    assert overlap[1] < 0.95 * overlap[0]


def test_matching_is_the_best_of_all_permutations() -> None:
    rng = np.random.default_rng(0)
    for shape in ((3, 5), (5, 5), (5, 3)):
        for _ in range(10):
            score = rng.random(shape)
            wide = score if shape[0] <= shape[1] else score.T
            every = itertools.permutations(range(wide.shape[1]), wide.shape[0])
            best = max(float(np.mean([wide[i, j] for i, j in enumerate(p)])) for p in every)
            assert abs(features.mean_matched(score) - best) < 1e-12


def test_an_sae_made_of_the_features_is_measured_as_perfect() -> None:
    toy = features.toy_a()
    cfg = {"architecture": "jumprelu", "d_in": 32, "d_sae": 16}
    w = toy.vectors_FD
    threshold = torch.full((16,), 0.1)
    s = sae.SAE(cfg, w.T.contiguous(), torch.zeros(16), w.clone(), torch.zeros(32), threshold=threshold)
    found = features.evaluate(s, toy, 5000)
    assert found["dead"] == 0
    assert found["l0"] == found["true_l0"]
    for metric in ("mcc", "f1", "explained_variance"):
        assert abs(found[metric] - 1) < 1e-5, metric
    half = sae.SAE(
        {**cfg, "d_sae": 8},
        w[:8].T.contiguous(),
        torch.zeros(8),
        w[:8].clone(),
        torch.zeros(32),
        threshold[:8],
    )
    found = features.evaluate(half, toy, 5000)
    assert abs(found["l0"] / found["true_l0"] - 0.5) < 0.02
    # what is left of a feature is not centred: 1 - 8 p / (16 p (1 - p)) with p = 1/4
    assert abs(found["explained_variance"] - 1 / 3) < 0.02


def test_a_dataset_holds_the_generators_rows_and_is_made_once(tmp_path: Path) -> None:
    toy = features.toy_a()
    ds = features.write(toy, tmp_path, 3000)
    assert (ds.n_rows, ds.d_in(features.SITE)) == (3000, 32)
    acts_ND = torch.from_numpy(ds.read(features.SITE, slice(None)))
    on_NF = acts_ND @ toy.vectors_FD.T
    assert torch.allclose(on_NF @ toy.vectors_FD, acts_ND, atol=1e-5)  # in the features' span
    assert len(torch.unique(acts_ND, dim=0)) > 2900  # rows differ, but for those in which nothing fires
    again = features.write(toy, tmp_path, 3000)
    assert np.array_equal(again.read(features.SITE, slice(None)), acts_ND.numpy())


# ------------------------------------------------------------------ beside SAELens, in its own process

STEPS = 100
F, K = 16, 4
PARITY = {
    "standard": ground_truth.toy_a()["standard"],
    "topk": Contest(
        ours=sae.TopK(d_sae=F, k=K), theirs="topk", options={"k": K, "rescale_acts_by_decoder_norm": False}
    ),
    "batchtopk": Contest(
        ours=sae.BatchTopK(d_sae=F, k=K),
        theirs="batchtopk",
        options={"k": K, "rescale_acts_by_decoder_norm": False},
    ),
    "matryoshka": Contest(
        ours=sae.Matryoshka(d_sae=F, k=K, prefixes=(4, 8, F)),
        theirs="matryoshka_batchtopk",
        options={"k": K, "rescale_acts_by_decoder_norm": False, "matryoshka_widths": [4, 8, F]},
    ),
    "jumprelu": ground_truth.toy_a()["jumprelu"],
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory):
    """By architecture: the dataset and what SAELens wrote down of its first steps."""
    root = tmp_path_factory.mktemp("parity")
    ds = features.write(features.toy_a(), root / "rows", STEPS * ground_truth.BATCH_SIZE)

    @functools.cache
    def of(name: str):
        path = ground_truth.train_theirs(
            ds, PARITY[name], ds.n_rows, 0, root / name, record=STEPS, norm=_norm(name)
        )
        return ds, load_file(path)

    return of


def _norm(name: str) -> float:
    return 0.1 if name == "standard" else 1.0  # as ours begin


def _batches(ds):
    stream = ds.stream(features.SITE, batch_size=ground_truth.BATCH_SIZE, seed=0, epochs=1, metadata=False)
    for batch in stream:
        yield torch.from_numpy(batch[features.SITE].copy())


@pytest.mark.slow
@pytest.mark.parametrize("step", ["sparse", "dense"])
@pytest.mark.parametrize("name", list(PARITY))
def test_gradients_at_saelens_weights_are_saelens_gradients(recorded, name: str, step: str) -> None:
    """The loss within 1e-5 of theirs, and each parameter's gradient within 1e-5 of the whole gradient's norm."""
    ds, theirs = recorded(name)
    config = PARITY[name].ours
    generator, scratch = torch.Generator(), Scratch()
    for i, x_ND in enumerate(_batches(ds)):
        at = {n: theirs[f"{i}.{n}"] for n in ("W_enc", "b_enc", "W_dec", "b_dec")}
        p = {"W_enc_FD": at["W_enc"].T.contiguous(), "b_enc_F": at["b_enc"]}
        p |= {"W_dec_FD": at["W_dec"], "b_dec_D": at["b_dec"]}
        wanted = {n: theirs[f"{i}.{n}.grad"] for n in at}
        if name == "jumprelu":
            p["threshold_F"] = theirs[f"{i}.threshold"]
            wanted["threshold"] = theirs[f"{i}.threshold.grad"]
        none_dead = torch.zeros(0, dtype=torch.int64)
        out = gradients(step, config, p, x_ND, none_dead, config.moment(1.0, generator), scratch)
        assert abs(out.loss / float(theirs["losses"][i]) - 1) < 1e-5, i
        g = out.gradients
        found = {"W_enc": g["W_enc_FD"].T, "b_enc": g["b_enc_F"]}
        found |= {"W_dec": g["W_dec_FD"], "b_dec": g["b_dec_D"]}
        if name == "jumprelu":
            found["threshold"] = g["threshold_F"]
        whole = sum(float(t.double().square().sum()) for t in wanted.values()) ** 0.5
        for n, t in wanted.items():
            assert float((found[n] - t).norm()) < 1e-5 * whole, (i, n)
    assert i == STEPS - 1


@pytest.mark.slow
def test_standard_runs_freely_for_100_steps_with_saelens_losses(recorded) -> None:
    ds, theirs = recorded("standard")
    contest = PARITY["standard"]
    rules = ground_truth.training(contest, ds.n_rows, 0).rules(contest.ours)
    learner = Learner(contest.ours, ds.d_in(features.SITE), 1.0, rules, 0)
    assert torch.allclose(learner.parameters["W_dec_FD"], theirs["0.W_dec"], atol=1e-8)
    for i, x_ND in enumerate(_batches(ds)):
        out = learner.gradients(x_ND)
        assert abs(out.loss / float(theirs["losses"][i]) - 1) < 1e-5, i
        learner.apply(out, x_ND)
    assert float(theirs["losses"][-1]) < 0.95 * float(theirs["losses"][0])


def test_a_run_that_goes_on_keeps_what_is_finished_and_trains_again_with_other_settings(
    tmp_path, monkeypatch
) -> None:
    ds, contest = features.write(features.toy_a(), tmp_path / "rows", 3000), ground_truth.toy_a()["standard"]
    trained = []
    train = ground_truth.train_ours

    def counted(*arguments):
        trained.append(arguments)
        return train(*arguments)

    monkeypatch.setattr(ground_truth, "train_ours", counted)
    for rows in (2048, 2048, 1024):
        ground_truth.keep_ours(ds, contest, rows, 0, tmp_path / "out")
    assert [arguments[2] for arguments in trained] == [2048, 1024]
    job = {"out": str(tmp_path / "theirs"), "lr": 1.0}
    (tmp_path / "theirs").mkdir()
    assert not ground_truth.done(tmp_path / "theirs", job)
    (tmp_path / "theirs" / "done.json").write_text(json.dumps(job))
    assert ground_truth.done(tmp_path / "theirs", job)
    assert not ground_truth.done(tmp_path / "theirs", job | {"lr": 2.0})
