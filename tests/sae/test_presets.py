"""Presets hold the values that their sources publish."""

import numpy as np
import pytest

import sae
from sae.options import preset_of_text
from sae.presets import GPT2_SERIES, batchtopk_gpt2, gemma_scope_jumprelu, gpt2_series, openai_topk
from sae.train import run_names


def test_batchtopk_on_gpt2_is_the_repositorys() -> None:
    preset = batchtopk_gpt2(d_sae=768 * 4, k=16)
    rules = preset.training.rules(preset.configs[0])
    assert (rules.lr, rules.betas, rules.dead_after_rows) == (3e-4, (0.9, 0.99), 5 * 4096)
    assert (preset.batch_size, preset.training.n_rows) == (4096, 1_000_000_000)
    assert (preset.configs[0].d_sae, preset.configs[0].sparsity) == (3072, 16)
    assert preset.configs[0].revive.k_aux == 512  # type: ignore[union-attr]
    assert preset.configs[0].revive.aux_coefficient == 1 / 32  # type: ignore[union-attr]


def test_openai_topk_is_the_papers() -> None:
    preset = openai_topk(d_sae=32768, k=32, n_rows=10**9)
    rules = preset.training.rules(preset.configs[0])
    assert (rules.lr, rules.eps, rules.ema_decay, rules.dead_after_rows) == (
        1e-4,
        6.25e-10,
        0.999,
        10_000_000,
    )
    assert preset.batch_size == 131_072
    assert preset.configs[0].initial_encoder_norm == 1  # the decoder's transpose
    assert preset.configs[0].revive.aux_coefficient == 1 / 32  # type: ignore[union-attr]


def test_gemma_scope_is_the_jumprelu_papers() -> None:
    preset = gemma_scope_jumprelu(d_sae=16384, l0_coefficient=1.0, n_rows=10**9)
    rules = preset.training.rules(preset.configs[0])
    assert (rules.lr, rules.betas, preset.training.input_scale) == (7e-5, (0.0, 0.999), "unit")
    assert preset.configs[0].bandwidth == preset.configs[0].initial_threshold == 0.001  # type: ignore[attr-defined]


def test_the_gpt2_series_is_eight_saes_with_the_settings_of_res_jb() -> None:
    preset = gpt2_series()
    widths = [c.d_sae for c in preset.configs]
    assert widths == [768, 1536, 3072, 6144, 12288, 24576, 49152, 98304] == [768 * 2**i for i in range(8)]
    assert len(set(run_names(preset.configs))) == 8
    for c in preset.configs:
        rules = preset.training.rules(c)
        assert (rules.lr, rules.betas, rules.clip_norm) == (4e-4, (0.9, 0.999), 1.0)
        assert (rules.lr_warmup_rows, rules.dead_after_rows) == (20_480_000, 20_480_000)
        assert rules.lr_factor(299_990_000, 4096) == rules.sparsity_factor(0, 4096) == 1.0
        assert (c.decoder_norm, c.revive) == ("unit", sae.GhostGrads())
    assert (preset.batch_size, preset.training.n_rows) == (4096, 300_000_000)
    assert preset.training.b_dec_init == "geometric_median"


def test_the_gpt2_series_weighs_l1_as_its_source_does() -> None:
    """Its loss on rows whose centred norm is their norm, times a factor: ours with the preset's coefficient."""
    d, rows = 768, 5
    rng = np.random.default_rng(0)
    x_ND = rng.standard_normal((rows, d))
    x_ND -= x_ND.mean(0)
    x_ND *= 50 / np.linalg.norm(x_ND, axis=1, keepdims=True)
    error_ND, l1_N = rng.standard_normal((rows, d)), rng.random(rows)
    source = (error_ND**2 / np.linalg.norm(x_ND, axis=1, keepdims=True)).mean() + 8e-5 * l1_N.mean()
    scale = np.sqrt(d) / 50
    coefficient = gpt2_series().configs[0].sparsity
    ours = ((scale * error_ND) ** 2).sum(1).mean() + coefficient * (scale * l1_N).mean()
    assert ours == pytest.approx(source * scale**2 * d * 50, rel=1e-12)


def test_a_part_of_the_series_by_text() -> None:
    some = preset_of_text("gpt2_series:d_sae=768+3072,l1_coefficient=1.2", 1)
    assert [(c.d_sae, c.sparsity) for c in some.configs] == [(768, 1.2), (3072, 1.2)]
    assert [c.d_sae for c in preset_of_text("gpt2_series:d_sae=6144", 1).configs] == [6144]
    assert preset_of_text("gpt2_series", 1) == gpt2_series(GPT2_SERIES)
