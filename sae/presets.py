"""Published settings, as configs. Values only: what a source does not say is left to our defaults.

Where we can not do as the source did, the docstring of the preset says so.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .architectures import Architecture, BatchTopK, JumpReLU, Optimiser, TopK
from .revival import AuxK
from .training import Training


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What to give to `sae.train`, and the batch size to open the stream with."""

    config: Architecture
    training: Training
    batch_size: int


def batchtopk_gpt2(d_sae: int = 768 * 16, k: int = 32) -> Preset:
    """BatchTopK on GPT-2 small, layer 8 (Bussmann et al. 2024, arXiv:2412.06410, and its repository).

    Widths 768 x {4, 8, 16, 32}, k {16, 32, 64}, 1e9 tokens, 512 auxiliary latents. The repository
    normalises each activation by its own mean and deviation and has no b_enc; here they are scaled
    to mean norm sqrt(d), and b_enc is trained.
    """
    return Preset(
        config=BatchTopK(
            d_sae=d_sae,
            k=k,
            revive=AuxK(k_aux=512, aux_coefficient=1 / 32),
            optimiser=Optimiser(lr=3e-4, betas=(0.9, 0.99)),
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
        config=TopK(
            d_sae=d_sae,
            k=k,
            revive=AuxK(aux_coefficient=1 / 32),
            optimiser=Optimiser(lr=1e-4, eps=6.25e-10, ema_decay=0.999),
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
        config=JumpReLU(
            d_sae=d_sae,
            l0_coefficient=l0_coefficient,
            bandwidth=0.001,
            initial_threshold=0.001,
            optimiser=Optimiser(lr=7e-5, betas=(0.0, 0.999)),
        ),
        training=Training(n_rows=n_rows, input_scale="unit"),
        batch_size=4096,
    )


PRESETS: dict[str, Callable[..., Preset]] = {
    f.__name__: f for f in (batchtopk_gpt2, openai_topk, gemma_scope_jumprelu)
}
"""Name, as on the command line, to function."""
