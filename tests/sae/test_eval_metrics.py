"""Each metric finds the structure that was planted for it, and equals its definition by brute force."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_dataset import ConstantSAE, IdentitySAE, RandomTopK, tiny_lm, toy_dataset

from actcache.errors import SpecError
from sae import SAE
from sae.evals import evaluate
from sae.evals.batches import BatchSums
from sae.evals.cooccurrence import Cooccurrence
from sae.evals.effects import ablate, steer
from sae.evals.geometry import compare, mean_matched, nearest
from sae.evals.ground_truth import ground_truth_scores
from sae.evals.groups import norm_bucket, position_bucket, position_range
from sae.evals.latents import encode, sparse_codes
from sae.evals.logit_lens import enrichment, logit_weights, moments
from sae.evals.probing import (
    LabelledRows,
    auc,
    best_latents,
    logistic_regression,
    python_labels,
    sparse_probing,
)
from sae.evals.reconstruction import row_values
from sae.evals.rows import RowParts
from sae.evals.spread import Spread
from sae.select import Scratch

SITE = "blocks.0.hook_resid_post"
D_MODEL = 24


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def ds(lm):
    return toy_dataset(lm, n_sequences=60)


def native(architecture="topk", d_in=12, d_sae=30, k=3, seed=0, **extra):
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=g), dim=1)
    cfg = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, "k": k, "site": SITE}
    b_enc, b_dec = torch.randn(d_sae, generator=g) / 4, torch.randn(d_in, generator=g)
    return SAE(cfg, W_dec.T.contiguous(), b_enc, W_dec, b_dec, **extra)


# --- rows -------------------------------------------------------------------------------------


def split_of(lengths, block_rows, seed=0):
    """Rows of sequences of these lengths, shuffled inside blocks as a harvest does."""
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    rng = np.random.default_rng(seed)
    order = np.concatenate(
        [i + rng.permutation(min(block_rows, len(sequence) - i)) for i in range(0, len(sequence), block_rows)]
    )
    sequence, position = sequence[order], position[order]
    return SimpleNamespace(rows=lambda at: SimpleNamespace(sequence=sequence[at], position=position[at]))


@pytest.mark.parametrize("width", [8, 4096])
def test_parts_hold_every_row_once_and_no_batch_is_cut(width):
    lengths = np.random.default_rng(1).integers(1, 257, 600)
    n, block = int(lengths.sum()), 2**14
    parts = RowParts(split_of(lengths, block), n, block, width)
    found = [parts.part(i) for i in range(len(parts))]
    assert sorted(np.concatenate([p.row_N for p in found])) == list(range(n))
    batches = [set(p.batch_N) for p in found]
    assert sum(map(len, batches)) == len(set().union(*batches)) == -(-600 // 16)
    for p in found:
        assert (np.diff(p.sequence_N * 1000 + p.position_N) > 0).all()


def test_buckets():
    assert position_bucket(np.array([0, 1, 2, 3, 4, 7, 8, 255])).tolist() == [0, 1, 2, 2, 3, 3, 4, 8]
    assert [position_range(b) for b in (0, 1, 2, 8)] == [(0, 0), (1, 1), (2, 3), (128, 255)]
    assert norm_bucket(np.array([0, 1, 2, 2.9, 1e9]), 1.0).tolist() == [-8, 0, 2, 3, 8]


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard", "jumprelu"])
def test_codes_and_reconstruction_of_an_sae_are_its_own(architecture):
    extra = {"threshold": torch.full((30,), 0.3)} if architecture in ("jumprelu", "batchtopk") else {}
    s, x = native(architecture, **extra), torch.randn(50, 12) * 3
    codes, recon = encode(s, x, Scratch())
    assert torch.allclose(recon, s(x), atol=1e-5)
    dense = np.zeros((50, 30), np.float32)
    dense[codes.row_C, codes.latent_C] = codes.value_C
    assert np.allclose(dense, s.encode(x), atol=1e-5)
    assert (np.diff(codes.row_C) >= 0).all()


def test_breakdowns_add_up_to_the_whole(ds):
    m = evaluate(RandomTopK(D_MODEL), ds)
    for name in ("position", "norm"):
        groups = m["breakdowns"][name]
        assert sum(g["n_rows"] for g in groups) == m["n_rows"]
        for figure in ("mse", "l0"):
            whole = sum(g[figure] * g["n_rows"] for g in groups) / m["n_rows"]
            assert whole == pytest.approx(m[figure], rel=1e-9)
        scatter = sum(g["mse"] * g["n_rows"] / g["fvu"] for g in groups if g["fvu"])
        assert m["mse"] * m["n_rows"] / scatter == pytest.approx(m["fvu"], rel=1e-9)


def test_the_fvu_error_equals_leaving_each_document_out(ds):
    m, view, s = evaluate(RandomTopK(D_MODEL), ds), ds.split("validation"), RandomTopK(D_MODEL)
    x = view.acts[SITE].astype(np.float64)
    e = x - s(torch.from_numpy(view.acts[SITE])).numpy().astype(np.float64)

    def fvu(keep):
        return (e[keep] ** 2).sum() / ((x[keep] - x[keep].mean(0)) ** 2).sum()

    documents = np.unique(view.row_sequence)
    left = np.array([fvu(view.row_sequence != d) for d in documents])
    expected = np.sqrt((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum())
    assert m["standard_errors"]["fvu"] == pytest.approx(expected, rel=1e-6)


def test_batch_dependent_figures_equal_their_authors_formulas(ds):
    view, s = ds.split("validation"), RandomTopK(D_MODEL)
    m = evaluate(s, ds)
    x = torch.from_numpy(view.acts[SITE]).double()
    y = s(torch.from_numpy(view.acts[SITE])).double()
    batches = [torch.from_numpy(view.row_sequence // 16 == b) for b in range(4)]
    legacy = torch.cat(
        [1 - (x[b] - y[b]).square().sum(1) / (x[b] - x[b].mean(0)).square().sum(1) for b in batches]
    )
    bias = [y[b].square().sum(1).mean() / (x[b] * y[b]).sum(1).mean() for b in batches]
    assert m["explained_variance_legacy"] == pytest.approx(float(legacy.mean()), rel=1e-9)
    assert m["relative_bias_saebench"] == pytest.approx(float(torch.stack(bias).mean()), rel=1e-9)
    assert m["relative_bias"] == pytest.approx(float(y.square().sum() / (x * y).sum()), rel=1e-9)


def test_saebench_gives_credit_for_predicting_the_mean_and_we_do_not():
    x = torch.randn(160, 8, generator=torch.Generator().manual_seed(0)) + 3
    values = row_values(x, x.mean(0).expand_as(x))
    sums = BatchSums(8)
    sums.add(values, np.ones(160), np.arange(160) // 16)
    assert sums.metrics()["explained_variance_saebench_wrong"] > 0.2


def test_a_shrunk_identity_has_the_bias_it_was_given(ds):
    class Shrunk(IdentitySAE):
        def decode(self, latents):
            return 0.8 * super().decode(latents)

    m = evaluate(Shrunk(D_MODEL), ds)
    assert m["relative_bias"] == pytest.approx(0.8, rel=1e-6)
    assert m["shrinkage"] == pytest.approx(0.2, rel=1e-5)
    assert m["l2_ratio"] == pytest.approx(0.8, rel=1e-6)


def test_a_latent_of_position_alone_scores_one_and_ranks_first():
    rng = np.random.default_rng(0)
    position, sequence = np.tile(np.arange(16), 64), np.repeat(np.arange(64), 16)
    latents = rng.random((1024, 6)).astype(np.float32)
    latents[:, 4] = np.sin(position) + 2
    latents[:, 5] = 0
    spread = Spread(6, 16)
    spread.begin(64)
    for here in np.array_split(np.arange(1024), 5):
        spread.update(sparse_codes(torch.from_numpy(latents[here])), sequence[here], position[here])
    spread.end()
    score = spread.positional_score_F()
    assert score[4] == pytest.approx(1)
    assert np.nanargmax(score) == 4
    assert np.abs(score[:4]).max() < 0.1
    assert np.isnan(score[5])
    assert spread.prompts_F.tolist() == [64, 64, 64, 64, 64, 0]


@pytest.mark.parametrize("table", [0, 2**22])  # sorted, counted in a table
def test_pairs_equal_brute_force_and_twins_are_partners(table, monkeypatch):
    monkeypatch.setattr("sae.evals.cooccurrence._TABLE_PAIRS", table)
    rng = np.random.default_rng(1)
    latents = (rng.random((300, 12)) < 0.2).astype(np.float32)
    latents[:, 7] = latents[:, 3]
    latents[:, 11] = 0
    pairs, merged = Cooccurrence(12), Cooccurrence(12)
    for part in np.array_split(np.arange(300), 3):
        own = Cooccurrence(12)
        for acc in (pairs, own):
            acc.update(sparse_codes(torch.from_numpy(latents[part])), len(part))
            acc.end()
        merged.merge(own)
    on = latents > 0
    both = (on.T.astype(int) @ on).astype(float)
    either = on.sum(0)[:, None] + on.sum(0)[None] - both
    overlap = np.divide(both, either, out=np.zeros_like(both), where=(either > 0) & (both >= 2))
    np.fill_diagonal(overlap, -1)
    for acc in (pairs, merged):
        partner, found = acc.partners()
        assert (partner[3], partner[7], partner[11]) == (7, 3, -1)
        assert found[:11] == pytest.approx(overlap[:11].max(1))
        assert found[3] == 1
        assert acc.n_rows == 300


# --- weights ----------------------------------------------------------------------------------


def test_nearest_finds_a_planted_copy_and_mcc_a_permutation():
    a, b = native(d_sae=20), native(d_sae=20, seed=1)
    a.W_dec.data[5] = -a.W_dec.data[2]
    index, cosine = nearest(a.W_dec)
    assert (index[5], index[2]) == (2, 5)
    assert cosine[[2, 5]] == pytest.approx([1, 1], abs=1e-6)
    b.W_dec.data = a.W_dec.data[torch.randperm(20)]
    assert compare(a, b)["mcc"] == pytest.approx(1, abs=1e-6)
    assert compare(a, native(d_sae=20, seed=3))["mcc"] < 0.9
    assert mean_matched(np.array([[0.9, 0.8], [0.85, 0.1]])) == pytest.approx(0.825)
    with pytest.raises(ValueError, match="two SAEs of one d_in"):
        compare(a, native(d_in=11))


def test_logit_weights_are_what_a_direction_adds_to_the_logits(lm, monkeypatch):
    """The last site: adding a decoder row changes logits by its weights over the norm's scale."""
    s = native(d_in=D_MODEL)
    ln, head = lm.model.transformer.ln_f, lm.model.lm_head.weight
    gain = torch.linspace(0.5, 2, D_MODEL)
    monkeypatch.setattr(ln.weight, "data", gain)
    weights = logit_weights(s, lm)
    x = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0)) * 1e3
    step = 1.0
    change = (ln(x + step * s.W_dec[3]) - ln(x)) @ head.T
    # the norm also rescales x itself: take that part out
    centred = x - x.mean()
    scale = centred.norm() / D_MODEL**0.5
    row = s.W_dec[3] - s.W_dec[3].mean()
    row = row - centred * (row @ centred) / centred.square().sum()
    assert torch.allclose(change, (row * ln.weight) @ head.T / scale, atol=1e-2 * float(change.abs().max()))
    assert torch.allclose(weights[3], ((s.W_dec[3] - s.W_dec[3].mean()) * ln.weight) @ head.T, atol=1e-4)


def test_moments_are_those_of_known_samples():
    x = np.random.default_rng(0).gamma(2, size=(3, 20_000))
    found = moments(torch.from_numpy(x))
    centred = x - x.mean(1, keepdims=True)
    std = x.std(1)
    assert found["logit_mean"].numpy() == pytest.approx(x.mean(1))
    assert found["logit_std"].numpy() == pytest.approx(std)
    assert found["logit_skew"].numpy() == pytest.approx((centred**3).mean(1) / std**3)
    assert found["logit_skew"].numpy() == pytest.approx(2**0.5, abs=0.15)  # of a gamma of shape 2
    assert found["logit_kurtosis"].numpy() == pytest.approx((centred**4).mean(1) / std**4 - 3)


def test_enrichment_finds_the_planted_set_and_its_side():
    weights = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    ids = np.arange(10, 20)
    weights[0, ids] += 100
    weights[1, ids] -= 100
    score = enrichment(weights, {"planted": ids, "other": np.arange(40, 60)})
    assert score[:, 0].tolist() == pytest.approx([1, -1])
    assert score[:, 1].abs().max() < 0.8


def test_ground_truth_scores_of_the_truth_are_one():
    g = torch.Generator().manual_seed(0)
    features = torch.eye(12)[:8]
    truth = (torch.rand(200, 8, generator=g) < 0.3).float() * 2
    cfg = {"architecture": "standard", "d_in": 12, "d_sae": 8, "site": SITE}
    s = SAE(cfg, features.T.contiguous(), torch.zeros(8), features.flip(0).flip(0), torch.zeros(12))
    scores = ground_truth_scores(s, features, truth, truth @ features)
    assert scores == pytest.approx(dict.fromkeys(scores, 1.0))
    s.W_dec.data[1] = s.W_dec.data[0]
    assert ground_truth_scores(s, features, truth, truth @ features)["uniqueness"] == 7 / 8


# --- through the LM ---------------------------------------------------------------------------


def test_an_error_in_a_random_direction_has_the_size_of_the_saes(ds, lm):
    from sae.evals.language_model import random_error

    s = RandomTopK(D_MODEL)
    x = torch.from_numpy(ds.split("validation").acts[SITE].copy())
    noisy = random_error(s)(x, torch.Generator().manual_seed(3))
    assert torch.allclose((noisy - x).norm(dim=1), (s(x) - x).norm(dim=1), rtol=1e-4)
    m = evaluate(s, ds, lm)
    assert m["kl_ratio"] == pytest.approx(m["kl"] / m["kl_random"])
    assert m["kl_random"] > 0
    assert 0 <= m["top1_agreement"] < 1


def test_perfect_and_useless_saes_agree_and_score_as_they_must(ds, lm):
    perfect, zero = evaluate(IdentitySAE(D_MODEL), ds, lm), evaluate(ConstantSAE(np.zeros(D_MODEL)), ds, lm)
    assert (perfect["top1_agreement"], perfect["kl_score"]) == (1, 1)
    assert zero["kl_score"] == 0
    assert zero["standard_errors"]["ce_recovered_zero"] == pytest.approx(0, abs=1e-12)


def test_losses_by_position_add_up_and_go_beyond_the_context(ds, lm):
    m = evaluate(RandomTopK(D_MODEL), ds, lm)
    groups = m["breakdowns"]["loss_by_position"]
    assert sum(g["n_tokens"] for g in groups) == m["n_tokens"]
    whole = sum(g["ce_spliced"] * g["n_tokens"] for g in groups if g["n_tokens"]) / m["n_tokens"]
    assert whole == pytest.approx(m["ce_spliced"], rel=1e-9)
    assert not any(g["beyond_context"] for g in groups)
    longer = evaluate(RandomTopK(D_MODEL), ds, lm, join=2)
    beyond = [g for g in longer["breakdowns"]["loss_by_position"] if g["beyond_context"]]
    assert [(g["from"], g["to"]) for g in beyond] == [(16, 31)]
    assert beyond[0]["n_tokens"] > 0


def test_joined_sequences_are_whole_and_fit_the_lm(lm):
    ds = toy_dataset(lm, n_sequences=21)
    found = evaluate(RandomTopK(D_MODEL), ds, lm, join=2)
    assert found["n_sequences"] == 20
    assert evaluate(RandomTopK(D_MODEL), ds, lm, join=2, n_sequences=20)["n_tokens"] == found["n_tokens"]
    with pytest.raises(SpecError, match="joined are longer than the 32 .* --join 2"):
        evaluate(RandomTopK(D_MODEL), ds, lm, join=3)
    with pytest.raises(SpecError, match="1 sequences cannot be joined 2"):
        evaluate(RandomTopK(D_MODEL), ds, lm, join=2, n_sequences=1)


def test_saelens_compat_ablates_everything_and_counts_the_last_position(ds, lm):
    ours, theirs = (evaluate(RandomTopK(D_MODEL), ds, lm, compat=compat) for compat in (None, "saelens"))
    assert theirs["ce_spliced"] == pytest.approx(ours["ce_spliced"])
    assert theirs["ce_clean"] == pytest.approx(ours["ce_clean"])
    assert theirs["ce_zero"] != pytest.approx(ours["ce_zero"], rel=1e-6)
    assert theirs["kl"] != pytest.approx(ours["kl"], rel=1e-6)


def test_a_target_error_takes_more_sequences_the_smaller_it_is(lm):
    ds = toy_dataset(lm, n_sequences=200)
    loose, tight = (evaluate(RandomTopK(D_MODEL), ds, lm, target_error=e) for e in (0.5, 1e-6))
    assert loose["n_sequences"] == 64
    assert tight["n_sequences"] == 200


def test_ablation_and_steering_have_the_effect_of_a_hand_written_hook(ds, lm):
    s, view = RandomTopK(D_MODEL), ds.split("validation")
    latent = int(s.encode(torch.from_numpy(view.acts[SITE].copy())).gt(0).sum(0).argmax())
    nothing = steer(s, lm, view, latent, 0.0, 8)
    assert nothing.kl == 0
    assert not nothing.logit_change_V.any()
    effect = ablate(s, lm, view, latent, 8)
    total, n = np.zeros(64), 0
    for q in range(8):
        ids, kept = torch.from_numpy(view.context(q)), torch.from_numpy(view.kept[q, : view.length[q]])
        seen = []

        def hook(module, args, output, kept=kept, seen=seen):
            acts = output[0] if isinstance(output, tuple) else output
            f = s.encode(acts)[..., latent] * kept
            seen.append(f[0] != 0)
            acts = acts - f[..., None] * s.W_dec[latent]
            return (acts, *output[1:]) if isinstance(output, tuple) else acts

        clean = lm.model(ids[None]).logits[0].double()
        handle = lm.model.transformer.h[0].register_forward_hook(hook)
        changed = lm.model(ids[None]).logits[0].double()
        handle.remove()
        total += (changed - clean)[seen[0]].sum(0).numpy()
        n += int(seen[0].sum())
    assert effect.n_tokens == n > 0
    assert effect.logit_change_V == pytest.approx(total / n, rel=1e-3, abs=1e-4)
    assert effect.kl > 0
    up, down = effect.top(3)
    assert effect.logit_change_V[up[0]] == effect.logit_change_V.max()
    assert effect.logit_change_V[down[0]] == effect.logit_change_V.min()
    with pytest.raises(ValueError, match="latents 0 to 39"):
        ablate(s, lm, view, 40)


# --- probing ----------------------------------------------------------------------------------


def test_python_tokens_get_their_labels():
    text = 'def f(x):  # why\n    return "é" + 12\n'
    found = {(text[a:b], label) for a, b, label in python_labels(text)}
    assert found == {
        ("def", "keyword"), ("f", "definition name"), ("# why", "comment"),
        ("return", "keyword"), ('"é"', "string"), ("12", "number"),
    }  # fmt: skip


def test_auc_counts_ties_half_and_the_probe_separates():
    assert auc(np.array([1.0, 2, 2, 3]), np.array([False, False, True, True])) == pytest.approx(3.5 / 4)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 3))
    y = x @ [1, -2, 0] > 0.3
    w, b = logistic_regression(x, y)
    assert auc(x @ w + b, y) > 0.999
    assert w[1] / w[0] == pytest.approx(-2, rel=0.1)


def test_a_planted_latent_is_chosen_and_told_apart_in_and_out_of_distribution():
    s = native("standard", d_in=12, d_sae=30)
    rng = np.random.default_rng(0)

    def rows(noise):
        y = rng.random(400) < 0.3
        x = rng.normal(size=(400, 12)).astype(np.float32) * noise
        x[y] += 8 * s.W_dec[17].numpy()
        return LabelledRows(x.astype(np.float32), {"planted": y, "rare": np.arange(400) == 3})

    found = sparse_probing(s, rows(0.3), rows(0.3), rows(3.0))
    assert found["planted"]["latents"][0] == 17
    assert found["planted"]["k1"]["auc"] > 0.99
    assert found["planted"]["k1"]["auc_ood"] < found["planted"]["k1"]["auc"]
    assert found["planted"]["dense"]["auc"] > 0.99
    assert "fewer than 20" in found["rare"]["skipped"]
    assert best_latents(np.eye(3), np.array([False, True, False]), 1).tolist() == [1]
