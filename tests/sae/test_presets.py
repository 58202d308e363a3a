"""Presets hold the values that their sources publish."""

from sae.presets import batchtopk_gpt2, gemma_scope_jumprelu, openai_topk


def test_batchtopk_on_gpt2_is_the_repositorys() -> None:
    preset = batchtopk_gpt2(d_sae=768 * 4, k=16)
    rules = preset.training.rules(preset.config)
    assert (rules.lr, rules.betas, rules.dead_after_rows) == (3e-4, (0.9, 0.99), 5 * 4096)
    assert (preset.batch_size, preset.training.n_rows) == (4096, 1_000_000_000)
    assert (preset.config.d_sae, preset.config.sparsity) == (3072, 16)
    assert preset.config.revive.k_aux == 512  # type: ignore[union-attr]
    assert preset.config.revive.aux_coefficient == 1 / 32  # type: ignore[union-attr]


def test_openai_topk_is_the_papers() -> None:
    preset = openai_topk(d_sae=32768, k=32, n_rows=10**9)
    rules = preset.training.rules(preset.config)
    assert (rules.lr, rules.eps, rules.ema_decay, rules.dead_after_rows) == (
        1e-4,
        6.25e-10,
        0.999,
        10_000_000,
    )
    assert preset.batch_size == 131_072
    assert preset.config.revive.aux_coefficient == 1 / 32  # type: ignore[union-attr]


def test_gemma_scope_is_the_jumprelu_papers() -> None:
    preset = gemma_scope_jumprelu(d_sae=16384, l0_coefficient=1.0, n_rows=10**9)
    rules = preset.training.rules(preset.config)
    assert (rules.lr, rules.betas, preset.training.input_scale) == (7e-5, (0.0, 0.999), "unit")
    assert preset.config.bandwidth == preset.config.initial_threshold == 0.001  # type: ignore[attr-defined]
