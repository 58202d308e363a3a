"""All figures of one evaluation, against plain loops over dense arrays that share no code with it.

Shapes: N rows, F latents, D dimensions.
"""

import numpy as np
import pytest
import torch
from toy_dataset import RandomTopK, tiny_lm, toy_dataset

from sae.evals import DEFINITIONS, evaluate
from sae.evals.latents import read_parquet

SITE = "blocks.0.hook_resid_post"
RANDOM = {"ce_random", "kl_random", "kl_ratio"}  # drawn; test_eval_metrics.py has their size


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(dataset, LM, SAE, figures, a dict for each latent)."""
    lm = tiny_lm()
    ds, s = toy_dataset(lm, n_sequences=70), RandomTopK(24)
    s.path = tmp_path_factory.mktemp("sae")
    return ds, lm, s, evaluate(s, ds, lm), read_parquet(s.path / "latents.parquet")


@pytest.fixture(scope="module")
def dense(found):
    """The validation split, float64: rows, latents and reconstructions."""
    ds, _, s, _, _ = found
    acts_ND = torch.from_numpy(ds.split("validation").acts[SITE].copy())
    latents_NF = s.encode(acts_ND)
    return tuple(t.double().numpy() for t in (acts_ND, latents_NF, s.decode(latents_NF)))


def of_rows(split, s, x, z, y):
    error_N, norm_N, recon_N = ((x - y) ** 2).sum(1), np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    dot_N, on_NF, n = (x * y).sum(1), z != 0, len(x)
    density_F = on_NF.mean(0)
    batches = [split.row_sequence // 16 == k for k in np.unique(split.row_sequence // 16)]
    square = np.mean([(norm_N[b] ** 2).mean() for b in batches])
    together_FF = on_NF.T.astype(float) @ on_NF
    either_FF = on_NF.sum(0)[:, None] + on_NF.sum(0) - together_FF
    overlap_FF = np.where(together_FF >= 2, together_FF / np.maximum(either_FF, 1), 0)
    np.fill_diagonal(overlap_FF, 0)
    cosine_FF = np.abs(s.W_dec.double().numpy() @ s.W_dec.double().numpy().T)
    np.fill_diagonal(cosine_FF, 0)
    want = {
        "l0": on_NF.sum(1).mean(),
        "l1": np.abs(z).sum(1).mean(),
        "dead_latents": (density_F == 0).sum(),
        "dead_share": (density_F == 0).mean(),
        "alive_share": (density_F > 0).mean(),
        "fvu": error_N.sum() / ((x - x.mean(0)) ** 2).sum(),
        "mse": error_N.mean(),
        "cosine": (dot_N / (norm_N * recon_N)).mean(),
        "l2_ratio": (recon_N / norm_N).mean(),
        "relative_bias": (recon_N**2).sum() / dot_N.sum(),
        "explained_variance_legacy": np.concatenate(
            [1 - error_N[b] / ((x[b] - x[b].mean(0)) ** 2).sum(1) for b in batches]
        ).mean(),
        "relative_bias_saebench": np.mean([(recon_N[b] ** 2).mean() / dot_N[b].mean() for b in batches]),
        "mse_saebench": sum(error_N[b].sum() / b.sum() for b in batches) / n,
        "explained_variance_saebench_wrong": 1
        - np.mean([error_N[b].mean() for b in batches]) / (square - (square / x.shape[1]) ** 2),
        "partner_overlap": overlap_FF.max(1)[on_NF.any(0)].mean(),
        "positional_latents": (np.nan_to_num(positional_score_F(split, z)) > 0.5).sum(),
        "decoder_max_cosine": cosine_FF.max(1).mean(),
    }
    for limit, name in ((0.01, "1pct"), (0.1, "10pct")):
        want[f"latents_over_{name}"] = (density_F > limit).sum()
        want[f"firings_over_{name}"] = density_F[density_F > limit].sum() / density_F.sum()
    return want | {"explained_variance": 1 - want["fvu"], "shrinkage": 1 - want["relative_bias"]}


def positional_score_F(split, z):
    """Share of each latent's variance between positions, less what chance gives; NaN where it never fires."""
    score_F = np.full(z.shape[1], np.nan)
    positions = np.unique(split.row_position)
    for f, a in enumerate(z.T):
        if (scatter := ((a - a.mean()) ** 2).sum()) > 0:
            here = [a[split.row_position == p] for p in positions]
            between = sum(len(h) * (h.mean() - a.mean()) ** 2 for h in here)
            score_F[f] = 1 - (1 - between / scatter) * (len(a) - 1) / (len(a) - len(positions))
    return score_F


def in_the_lm(ds, lm, s):
    mean_D = torch.from_numpy(ds.stats(SITE)["mean"]).float()
    replace = {"spliced": s, "zero": torch.zeros_like, "mean": lambda acts: mean_D.expand_as(acts)}
    total = {name: np.zeros(4) for name in ("clean", *replace)}  # loss, KL, equal best guesses, tokens
    split = ds.split("validation")
    for sequence in range(split.n_sequences):
        ids = torch.from_numpy(split.context(sequence))
        kept = torch.from_numpy(split.kept[sequence, : len(ids)])
        clean = lm.model(ids[None]).logits[0].double().log_softmax(-1)
        for name, sums in total.items():
            changed = clean if name == "clean" else with_hook(lm.model, ids, kept, replace[name])
            for t in range(len(ids) - 1):
                if kept[t]:
                    kl = (clean[t].exp() * (clean[t] - changed[t])).sum()
                    same = changed[t].argmax() == clean[t].argmax()
                    sums += [-float(changed[t, ids[t + 1]]), float(kl), float(same), 1]
    ce, kl, same = ({name: sums[i] / sums[3] for name, sums in total.items()} for i in range(3))
    want = {f"ce_{name}": value for name, value in ce.items()}
    want |= {f"kl_{name}": kl[name] for name in ("zero", "mean")}
    for name in ("zero", "mean"):
        want[f"ce_recovered_{name}"] = (ce[name] - ce["spliced"]) / (ce[name] - ce["clean"])
    return want | {
        "kl": kl["spliced"],
        "kl_score": 1 - kl["spliced"] / kl["zero"],
        "top1_agreement": same["spliced"],
    }


def with_hook(model, ids, kept, replacement):
    def replaced(module, arguments, output):
        acts = output[0] if isinstance(output, tuple) else output
        changed = torch.where(kept[:, None], replacement(acts), acts)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = model.transformer.h[0].register_forward_hook(replaced)
    try:
        return model(ids[None]).logits[0].double().log_softmax(-1)
    finally:
        handle.remove()


def test_every_figure_is_what_plain_loops_give(found, dense):
    ds, lm, s, figures, latents = found
    want = of_rows(ds.split("validation"), s, *dense)
    for name, value in want.items():
        assert figures[name] == pytest.approx(value, rel=1e-6), name
    through_lm = in_the_lm(ds, lm, s)
    for name, value in through_lm.items():
        assert figures[name] == pytest.approx(value, abs=1e-4), name
    kurtosis = float(np.median([row["logit_kurtosis"] for row in latents]))  # of a latent: test_moments_...
    assert figures["logit_kurtosis"] == pytest.approx(kurtosis)
    assert figures["kl_ratio"] == pytest.approx(figures["kl"] / figures["kl_random"])
    assert {*want, *through_lm, "logit_kurtosis", *RANDOM} == set(DEFINITIONS)


def test_every_latent_has_the_figures_that_plain_loops_give(found, dense):
    ds, _, _, _, latents = found
    split, (_, z, _) = ds.split("validation"), dense
    score_F = positional_score_F(split, z)
    for f, row in enumerate(latents):
        on_N = z[:, f] != 0
        assert row["prompts"] == len(np.unique(split.row_sequence[on_N])), f
        score = np.nan if row["positional_score"] is None else row["positional_score"]
        assert score == pytest.approx(score_F[f], abs=1e-12, nan_ok=True), f
