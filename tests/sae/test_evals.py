"""The figures of an evaluation equal their definitions, and planted SAEs score what they must."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from toy_dataset import ConstantSAE, IdentitySAE, RandomTopK, tiny_lm, toy_dataset

from actcache.errors import NonFiniteActivation, SpecError
from sae.evals import DEFINITIONS, digest, evaluate, evaluate_many
from sae.evals.groups import Grouped, Grouping
from sae.evals.language_model import Losses, lm_metrics
from sae.evals.latents import LatentStats, read_parquet, sparse_codes, write_parquet
from sae.evals.reconstruction import Reconstruction, row_values
from sae.evals.row_pass import SiteRows

SITE = "blocks.0.hook_resid_post"
D_MODEL = 24


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def ds(lm):
    return toy_dataset(lm)


def random_latents(n_rows, d_sae, seed, density=0.2):
    """Sparse latents with many equal values, one latent dead and one always on."""
    rng = np.random.default_rng(seed)
    latents = rng.integers(1, 6, (n_rows, d_sae)) * (rng.random((n_rows, d_sae)) < density)
    latents[:, 0] = 0
    latents[:, 1] = 1 + latents[:, 1]
    return latents.astype(np.float32)


def latent_stats(latents_NF, sequence_N, position_N, top_k=3):
    stats = LatentStats(latents_NF.shape[1], top_k)
    stats.update(sparse_codes(torch.from_numpy(latents_NF)), sequence_N, position_N)
    return stats


# --- reconstruction ---------------------------------------------------------------------------


class Rebuilt:
    """Rows and what an SAE made of them, in parts."""

    def __init__(self, x=None, y=None):
        self.sums, self.site = Reconstruction(), SiteRows()
        if x is not None:
            self.sums.update(row_values(x, y))
            groups = {name: Grouping.of(np.zeros(len(x), np.int64)) for name in self.site.groups}
            self.site = SiteRows.of(x.double() - 1, groups)  # around what is not their mean

    def merge(self, other):
        self.sums.merge(other.sums)
        self.site.merge(other.site)

    def metrics(self):
        return self.sums.metrics(self.site.fvu_denominators()[0])


def test_fvu_and_its_kin_equal_their_definitions():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(300, 7)) * 3 + 50).astype(np.float32)  # a mean far larger than the spread
    y = (x + rng.normal(size=x.shape)).astype(np.float32)
    acc = Rebuilt()
    for part in np.array_split(np.arange(300), 7):
        acc.merge(Rebuilt(torch.from_numpy(x[part]), torch.from_numpy(y[part])))
    m = acc.metrics()
    x, y = x.astype(np.float64), y.astype(np.float64)
    error = ((x - y) ** 2).sum()
    norms = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    assert m["fvu"] == pytest.approx(error / ((x - x.mean(0)) ** 2).sum(), rel=1e-10)
    assert m["explained_variance"] == 1 - m["fvu"]
    assert m["mse"] == pytest.approx(error / 300, rel=1e-12)
    assert m["cosine"] == pytest.approx(((x * y).sum(1) / norms[0] / norms[1]).mean(), rel=1e-12)
    assert m["l2_ratio"] == pytest.approx((norms[1] / norms[0]).mean(), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_parts_merged_in_any_order_equal_one_pass(seed):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(257, 9)) * 10 + 5)
    y = x + torch.from_numpy(rng.normal(size=(257, 9)))
    whole = Rebuilt(x, y)
    parts = [Rebuilt(x[index], y[index]) for index in np.array_split(rng.permutation(257), 6)]
    merged = Rebuilt()
    for i in rng.permutation(6):
        merged.merge(parts[i])
    for name, value in whole.metrics().items():
        assert merged.metrics()[name] == pytest.approx(value, rel=1e-12), name


def test_undefined_figures_are_none_and_a_zero_row_is_left_out_of_the_ratios():
    assert set(Reconstruction().metrics(0.0).values()) == {None}
    acc = Rebuilt(torch.full((2, 3), 0.1), torch.full((2, 3), 1.1))
    assert acc.metrics()["fvu"] is None  # rows that are all equal, but for rounding
    acc = Rebuilt(torch.zeros(2, 3), torch.ones(2, 3))
    assert {name: value for name, value in acc.metrics().items() if value is not None} == {"mse": 3.0}
    acc.merge(Rebuilt(torch.ones(1, 3), torch.full((1, 3), 0.5)))
    assert acc.metrics()["l2_ratio"] == pytest.approx(0.5)
    assert acc.metrics()["cosine"] == pytest.approx(1.0)


# --- latents ----------------------------------------------------------------------------------


def test_densities_maxima_and_l0_equal_brute_force():
    latents = random_latents(200, 12, seed=1)
    stats = latent_stats(latents, np.arange(200), np.zeros(200, np.int64))
    active = latents != 0
    assert np.array_equal(stats.fires_F, active.sum(0))
    assert np.array_equal(stats.density_F, active.mean(0))
    assert np.array_equal(stats.max_F, latents.max(0))
    m = stats.metrics()
    assert m["l0"] == pytest.approx(active.sum(1).mean(), rel=1e-12)
    assert m["l1"] == pytest.approx(latents.sum(1).mean(), rel=1e-12)
    assert m["dead_latents"] == 1
    assert m["dead_share"] == 1 / 12
    assert m["latents_over_10pct"] == (active.mean(0) > 0.1).sum()


def test_top_places_equal_brute_force_with_ties_in_stored_order():
    latents = random_latents(150, 10, seed=2)
    rng = np.random.default_rng(3)
    sequence, position = rng.integers(0, 20, 150), rng.permutation(150)
    stats = latent_stats(latents, sequence, position, top_k=5)
    for latent in range(10):
        places = [
            (int(sequence[i]), int(position[i]), float(latents[i, latent]))
            for i in np.flatnonzero(latents[:, latent])
        ]
        assert stats.top(latent) == sorted(places, key=lambda p: (-p[2], p[0], p[1]))[:5]


@pytest.mark.parametrize("n_parts", [1, 2, 9])
def test_latent_statistics_do_not_depend_on_chunks_or_merges(n_parts):
    latents = random_latents(180, 8, seed=4)
    sequence, position = np.arange(180) % 17, np.arange(180)
    whole = latent_stats(latents, sequence, position)
    chunked, merged = LatentStats(8, 3), LatentStats(8, 3)
    for index in np.array_split(np.random.default_rng(n_parts).permutation(180), n_parts):
        chunked.update(sparse_codes(torch.from_numpy(latents[index])), sequence[index], position[index])
        merged.merge(latent_stats(latents[index], sequence[index], position[index]))
    for other in (chunked, merged):
        assert [other.top(i) for i in range(8)] == [whole.top(i) for i in range(8)]
        assert np.array_equal(other.fires_F, whole.fires_F)
        assert np.array_equal(other.max_F, whole.max_F)
        assert np.allclose(other.sum_F, whole.sum_F, rtol=1e-12, atol=0)
        assert other.histograms() == whole.histograms()
        assert other.metrics() == pytest.approx(whole.metrics(), rel=1e-12)


def test_statistics_of_different_shapes_do_not_merge():
    with pytest.raises(ValueError, match="cannot merge"):
        LatentStats(4).merge(LatentStats(5))


def test_histograms_hold_every_row_and_every_living_latent():
    latents = random_latents(400, 130, seed=5, density=0.5)
    stats = latent_stats(latents, np.arange(400), np.zeros(400, np.int64))
    h = stats.histograms()
    l0 = (latents != 0).sum(1)
    expected, _ = np.histogram(l0, np.array(h["l0_per_row"]["edges"]) - 0.5)
    assert h["l0_per_row"]["counts"] == expected.tolist()
    assert sum(h["l0_per_row"]["counts"]) == 400
    assert sum(h["log10_density"]["counts"]) == 129
    assert h["log10_density"]["counts"][-1] >= 1  # density 1 lies in the last bin


def test_parquet_gives_back_what_the_pass_kept(tmp_path):
    latents = random_latents(90, 6, seed=6)
    stats = latent_stats(latents, np.arange(90), np.arange(90) % 5)
    write_parquet(tmp_path / "latents.parquet", stats.columns())
    rows = read_parquet(tmp_path / "latents.parquet")
    assert [r["fires"] for r in rows] == stats.fires_F.tolist()
    for latent, row in enumerate(rows):
        places = zip(row["top_sequence"], row["top_position"], row["top_value"], strict=True)
        assert list(places) == stats.top(latent)
    assert [p.name for p in tmp_path.iterdir()] == ["latents.parquet"]


def test_identity_sae_is_perfect(ds, lm):
    m = evaluate(IdentitySAE(D_MODEL), ds, lm)
    assert m["fvu"] == 0
    assert m["explained_variance"] == 1
    assert m["cosine"] == pytest.approx(1, abs=1e-12)
    assert m["ce_spliced"] == m["ce_clean"]
    assert m["ce_recovered_zero"] == m["ce_recovered_mean"] == 1
    assert m["kl"] == 0
    assert m["l0"] == D_MODEL


def test_zero_sae_recovers_nothing_against_zero_ablation(ds, lm):
    m = evaluate(ConstantSAE(np.zeros(D_MODEL)), ds, lm)
    assert m["ce_recovered_zero"] == 0
    assert m["ce_spliced"] == m["ce_zero"]
    assert abs(m["ce_zero"] - m["ce_clean"]) > 0.1  # the planted model does lose by it
    assert m["kl"] == m["kl_zero"] > 0.1
    assert m["fvu"] >= 1
    assert (m["l0"], m["dead_latents"], m["cosine"], m["l2_ratio"]) == (0, 5, 0, 0)


def test_mean_sae_recovers_nothing_against_mean_ablation(ds, lm):
    m = evaluate(ConstantSAE(ds.stats(SITE)["mean"]), ds, lm)
    assert m["ce_recovered_mean"] == pytest.approx(0, abs=1e-6)
    # around the mean of the validation rows themselves: 1 + ||difference of means||^2 / variance
    x = ds.split("validation").acts[SITE].astype(np.float64)
    shift = np.square(x.mean(0) - ds.stats(SITE)["mean"]).sum() / x.var(0).sum()
    assert m["fvu"] == pytest.approx(1 + shift, rel=1e-6)
    assert 1 <= m["fvu"] < 1.1


def test_losses_are_those_predicted_from_kept_positions(ds, lm):
    view = ds.split("validation")
    m = evaluate(RandomTopK(D_MODEL), ds, lm, n_sequences=7)
    total, n = 0.0, 0
    for q in range(7):
        ids = torch.from_numpy(view.context(q))
        logp = lm.model(ids[None]).logits[0].double().log_softmax(-1)
        for t in range(len(ids) - 1):
            if view.kept[q, t]:
                total, n = total - float(logp[t, ids[t + 1]]), n + 1
    assert m["n_tokens"] == n
    assert m["ce_clean"] == pytest.approx(total / n, rel=1e-5)
    assert m["n_sequences"] == 7


def test_the_clean_loss_is_the_one_that_harvest_measures_fidelity_with(ds, lm):
    from actcache.loss import next_token_loss

    view = ds.split("validation")
    arrays = (torch.from_numpy(a) for a in (view.input_ids, view.kept, view.length))
    total, n = next_token_loss(lm.model, *arrays)
    m = evaluate(RandomTopK(D_MODEL), ds, lm)
    assert m["n_tokens"] == n
    assert m["ce_clean"] == pytest.approx(total / n, rel=1e-6)


def test_the_command_line_needs_no_torch_until_it_works():
    code = "import sae.evals.cli, sae.report, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_lm_other_than_the_harvested_one_is_refused(ds, lm):
    other = dataclasses.replace(lm, revision="1")
    with pytest.raises(SpecError, match="at revision 0.*at 1"):
        evaluate(RandomTopK(D_MODEL), ds, other)


def test_spliced_loss_and_kl_equal_a_hand_written_hook(ds, lm):
    s = RandomTopK(D_MODEL)
    view = ds.split("validation")
    m = evaluate(s, ds, lm, n_sequences=4)
    ce = kl = n = 0.0
    for q in range(4):
        ids, kept = torch.from_numpy(view.context(q)), torch.from_numpy(view.kept[q, : view.length[q]])
        clean = lm.model(ids[None]).logits[0].double().log_softmax(-1)

        def replace(module, args, output, kept=kept):
            acts = output[0] if isinstance(output, tuple) else output
            acts = torch.where(kept[:, None], s(acts), acts)
            return (acts, *output[1:]) if isinstance(output, tuple) else acts

        handle = lm.model.transformer.h[0].register_forward_hook(replace)
        spliced = lm.model(ids[None]).logits[0].double().log_softmax(-1)
        handle.remove()
        for t in torch.nonzero(kept[:-1]).flatten():
            ce -= float(spliced[t, ids[t + 1]])
            kl += float((clean[t].exp() * (clean[t] - spliced[t])).sum())
            n += 1
    assert m["ce_spliced"] == pytest.approx(ce / n, rel=1e-4)
    assert m["kl"] == pytest.approx(kl / n, rel=1e-3)
    assert m["kl"] > 0


def planted_losses(ce_N, document_N):
    found = Losses()
    one = np.ones_like(ce_N)
    found.by_document = Grouped.of(document_N, {"n": one, "n_kl": one, "ce": ce_N, "kl": ce_N, "top1": one})
    return found


def test_the_jackknife_equals_leaving_each_document_out():
    rng = np.random.default_rng(0)
    document = rng.integers(0, 9, 50)
    ce = [rng.uniform(a, a + 1, 50) for a in (2, 3, 8)]
    clean, spliced, zero = (planted_losses(x, document) for x in ce)
    metrics, errors = lm_metrics(clean, spliced, zero, zero, zero)

    def recovered(keep):
        c, s, z = (x[keep].sum() for x in ce)
        return (z - s) / (z - c)

    left_out = np.array([recovered(document != i) for i in range(9)])
    assert metrics["ce_recovered_zero"] == pytest.approx(recovered(document >= 0))
    expected = np.sqrt(8 / 9 * ((left_out - left_out.mean()) ** 2).sum())
    assert errors["ce_recovered_zero"] == pytest.approx(expected, rel=1e-9)


def test_batches_of_sequences_add_up_to_the_whole(lm):
    ds = toy_dataset(lm, n_sequences=37)  # 16 + 16 + 5
    m = evaluate(RandomTopK(D_MODEL), ds, lm, n_sequences=100)
    assert m["n_sequences"] == 37
    view = ds.split("validation")
    counted = view.kept[:, :-1] & (np.arange(1, 16) < view.length[:, None])
    assert m["n_tokens"] == counted.sum()


# --- the result -------------------------------------------------------------------------------


def test_rows_alone_need_no_language_model(ds):
    m = evaluate(RandomTopK(D_MODEL), ds)
    assert m["model"] is None
    assert m["n_sequences"] == 0
    assert not any(name.startswith("ce_") for name in m)
    assert m["n_rows"] == ds.split("validation").n_rows
    assert m["dataset"] == "toy-dataset"
    assert m["split"] == "validation"
    assert json.loads(json.dumps(m)) == m


def test_many_saes_in_one_pass_score_as_each_alone(lm):
    sites = ("blocks.0.hook_resid_post",)
    ds = toy_dataset(lm, sites)
    saes = [RandomTopK(D_MODEL, k=2), IdentitySAE(D_MODEL), RandomTopK(D_MODEL, k=6, seed=1)]
    together = evaluate_many(saes, ds, lm)
    assert together == [evaluate(s, ds, lm) for s in saes]


def test_every_figure_has_a_definition(ds, lm):
    m = evaluate(RandomTopK(D_MODEL), ds, lm)
    about = {"eval_version", "n_rows", "n_sequences", "n_tokens", "eval_batch_sequences"}
    figures = {name for name, value in m.items() if isinstance(value, int | float)} - about
    assert figures == set(DEFINITIONS)


def test_a_repeated_evaluation_is_a_hit_until_anything_changes(ds, lm, tmp_path, monkeypatch):
    import sae.evals.evaluation as evaluation

    passes = []
    run = evaluation._evaluate
    monkeypatch.setattr(evaluation, "_evaluate", lambda *a: passes.append(1) or run(*a))
    s = RandomTopK(D_MODEL)
    s.path = tmp_path
    first = evaluate(s, ds, lm)
    assert json.loads((tmp_path / "eval.json").read_text()) == first
    assert evaluate(s, ds, lm) == first
    assert len(passes) == 1
    evaluate(s, ds, lm, n_sequences=3)
    evaluate(s, ds, lm, reuse=False)
    s.W_dec.data[0, 0] += 1
    changed = evaluate(s, ds, lm, reuse=True)
    assert len(passes) == 4
    assert changed["sae"]["digest"] != first["sae"]["digest"] == digest(RandomTopK(D_MODEL))
    (tmp_path / "eval.json").write_text("{ torn")
    assert evaluate(s, ds, lm) == changed


def test_training_mode_is_left_as_it_was(ds):
    s = RandomTopK(D_MODEL).train()
    evaluate(s, ds)
    assert s.training


def test_an_sae_of_another_site_is_refused_by_name(ds):
    s = RandomTopK(D_MODEL, site="blocks.7.hook_mlp_out")
    with pytest.raises(SpecError, match=r"blocks\.7\.hook_mlp_out.*blocks\.0\.hook_resid_post"):
        evaluate(s, ds)


def test_an_sae_that_gives_nan_is_an_error_and_stores_nothing(ds, tmp_path):
    s = ConstantSAE([np.nan] * D_MODEL)
    s.path = tmp_path
    with pytest.raises(NonFiniteActivation, match="fvu"):
        evaluate(s, ds)
    assert list(tmp_path.iterdir()) == []
