"""Published settings, as configs. Values only: what a source does not say is left to our defaults.

Where we can not do as the source did, the docstring of the preset says so.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from .architectures import Architecture, BatchTopK, JumpReLU, Optimiser, Standard, TopK
from .revival import AuxK, GhostGrads
from .training import Training


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What to give to `sae.train`, and the batch size to open the stream with."""

    configs: tuple[Architecture, ...]
    """One SAE each; a series is trained on one stream."""
    training: Training
    batch_size: int


def batchtopk_gpt2(d_sae: int = 768 * 16, k: int = 32) -> Preset:
    """BatchTopK on GPT-2 small, layer 8 (Bussmann et al. 2024, arXiv:2412.06410, and its repository).

    Widths 768 x {4, 8, 16, 32}, k {16, 32, 64}, 1e9 tokens, 512 auxiliary latents. The repository
    normalises each activation by its own mean and deviation and has no b_enc; here they are scaled
    to mean norm sqrt(d), and b_enc is trained.
    """
    return Preset(
        configs=(
            BatchTopK(
                d_sae=d_sae,
                k=k,
                revive=AuxK(k_aux=512, aux_coefficient=1 / 32),
                optimiser=Optimiser(lr=3e-4, betas=(0.9, 0.99)),
            ),
        ),
        training=Training(n_rows=10**9, dead_after_rows=5 * 4096, input_scale="sqrt_d"),
        batch_size=4096,
    )


def openai_topk(d_sae: int, k: int, n_rows: int) -> Preset:
    """TopK of Gao et al. 2024, arXiv:2406.04093, as in the published code.

    Learning rate 1e-4, Adam's epsilon 6.25e-10, batches of 131,072, moving average of the weights
    0.999, AuxK 1/32, dead after 10 million tokens. The source normalises each activation by its own
    mean and deviation; here they are scaled to mean norm sqrt(d).
    """
    return Preset(
        configs=(
            TopK(
                d_sae=d_sae,
                k=k,
                revive=AuxK(aux_coefficient=1 / 32),
                optimiser=Optimiser(lr=1e-4, eps=6.25e-10, ema_decay=0.999),
            ),
        ),
        training=Training(n_rows=n_rows, dead_after_rows=10_000_000, input_scale="sqrt_d"),
        batch_size=131_072,
    )


def gemma_scope_jumprelu(d_sae: int, l0_coefficient: float, n_rows: int) -> Preset:
    """JumpReLU as in Gemma Scope (Lieberum et al. 2024, arXiv:2408.05147; Rajamanoharan et al. 2024).

    Learning rate 7e-5, betas (0, 0.999), bandwidth and first threshold 0.001, activations of unit
    mean square norm. Warm-ups, decay and the batch size are our defaults: the sources at hand gave none.
    """
    return Preset(
        configs=(
            JumpReLU(
                d_sae=d_sae,
                l0_coefficient=l0_coefficient,
                bandwidth=0.001,
                initial_threshold=0.001,
                optimiser=Optimiser(lr=7e-5, betas=(0.0, 0.999)),
            ),
        ),
        training=Training(n_rows=n_rows, input_scale="unit"),
        batch_size=4096,
    )


GPT2_SERIES = (768, 1536, 3072, 6144, 12288, 24576, 49152, 98304)
"""Widths of the feature-splitting series: 768 times 1 to 128."""


def gpt2_series(d_sae: tuple[int, ...] = GPT2_SERIES, l1_coefficient: float | None = None) -> Preset:
    """ReLU + L1 at eight widths on GPT-2 small, blocks.8.hook_resid_pre (Bloom 2024).

    The series is SAELens' release gpt2-small-res-jb-feature-splitting; docs/sae.md has its L0 and
    explained variance by width. `d_sae` chooses some of the widths. The settings are those of its
    sister gpt2-small-res-jb (model card and cfg.json): L1 8e-5, learning rate 4e-4 constant after
    5,000 steps, batches of 4,096, 300 million tokens, ghost grads for latents silent in 5,000
    steps, b_dec the geometric median, decoder rows of norm 1. The series' own cfg.json was not at
    hand.

    The source divides each squared error by the norm of the activation less the batch's mean, and
    averages over d_in dimensions; here errors are summed and activations scaled to mean norm
    sqrt(d_in). 8e-5 there is 8e-5 * 768 * sqrt(768) = 1.70 here, times the ratio of the centred norm
    to the norm, which is the data's: give `l1_coefficient` to meet a published L0.
    """
    if l1_coefficient is None:
        l1_coefficient = 8e-5 * 768 * math.sqrt(768)
    return Preset(
        configs=tuple(
            Standard(
                d_sae=width,
                l1_coefficient=l1_coefficient,
                decoder="unit",
                revive=GhostGrads(),
                optimiser=Optimiser(lr=4e-4),
            )
            for width in d_sae
        ),
        training=Training(
            n_rows=300_000_000,
            lr_warmup_rows=5000 * 4096,
            lr_decay=0.0,
            sparsity_warmup_rows=0,
            dead_after_rows=5000 * 4096,
            b_dec_init="geometric_median",
            input_scale="sqrt_d",
        ),
        batch_size=4096,
    )


PRESETS: dict[str, Callable[..., Preset]] = {
    f.__name__: f for f in (batchtopk_gpt2, openai_topk, gemma_scope_jumprelu, gpt2_series)
}
"""Name, as on the command line, to function."""
