"""One SAE while it is trained: parameters, Adam, dead counters, and how a step changes them.

Knows nothing of streams, files or other SAEs; `sae.train` feeds it. It works on scaled
activations (mean norm sqrt(d)); `finished` folds the scale into the weights.

Shapes: N rows, D = d_in, F = d_sae, A dead latents.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .architectures import Config
from .architectures.batch_topk import update_threshold
from .core import SAE
from .select import Scratch
from .step import Outcome, Parameters, StepKind, gradients

_PARAMETER_NAMES = ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D")


@dataclass(frozen=True)
class Rules:
    """The part of `sae.Training` that a step needs, resolved for this SAE."""

    lr: float
    betas: tuple[float, float]
    clip_norm: float
    dead_after_rows: int
    step: StepKind


class Learner:
    """Weights on their way; `step` takes one batch.

    Args:
        config: the architecture.
        d_in: width of the activations.
        scale: what raw activations were multiplied with before they come here.
        rules: learning rate and the like.
        seed: decides the initial weights, alone with `config` and `d_in`: an SAE trained beside
            others equals the same one trained alone.
    """

    def __init__(
        self,
        config: Config,
        d_in: int,
        scale: float,
        rules: Rules,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.d_in, self.scale, self.rules = config, d_in, scale, rules
        self.generator = torch.Generator().manual_seed(seed)
        self.parameters = _initial_parameters(config.d_sae, d_in, self.generator, dtype)
        self.rows_since_fired_F = torch.zeros(config.d_sae, dtype=torch.int64)
        self.threshold: float | None = None
        self.scratch = Scratch()
        self.optimiser = torch.optim.Adam(
            self.parameters.tensors(), lr=rules.lr, betas=rules.betas, fused=True
        )
        for p in self.parameters.tensors():
            self.optimiser.state[p] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    @property
    def n_dead(self) -> int:
        return int((self.rows_since_fired_F >= self.rules.dead_after_rows).sum())

    def gradients(self, x_ND: Tensor) -> Outcome:
        """Loss and gradients for one batch of scaled activations; changes nothing."""
        dead_A = (self.rows_since_fired_F >= self.rules.dead_after_rows).nonzero()[:, 0]
        return gradients(self.rules.step, self.config, self.parameters, x_ND, dead_A, self.scratch)

    def apply(self, outcome: Outcome, n_rows: int, lr_factor: float) -> None:
        """Change weights and counters by an outcome of `gradients`.

        The decoder gradient's part along each row is removed first (it would only change norms
        that are then restored), the whole gradient is clipped, Adam steps, and decoder rows
        return to unit norm.
        """
        p = self.parameters
        W_dec_grad_FD = outcome.gradients[2]
        along_F1 = torch.linalg.vecdot(W_dec_grad_FD, p.W_dec_FD).unsqueeze(1)
        W_dec_grad_FD.addcmul_(p.W_dec_FD, along_F1, value=-1)
        norms = torch.stack([torch.linalg.vector_norm(g) for g in outcome.gradients])
        clip = torch.clamp(self.rules.clip_norm / (torch.linalg.vector_norm(norms) + 1e-6), max=1.0)
        for tensor, gradient in zip(p.tensors(), outcome.gradients, strict=True):
            tensor.grad = gradient.mul_(clip)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rules.lr * lr_factor
        self.optimiser.step()
        normalise_rows(p.W_dec_FD)
        self.rows_since_fired_F += n_rows
        self.rows_since_fired_F[outcome.fired_M] = 0
        if self.config.has_threshold and outcome.smallest is not None:
            self.threshold = update_threshold(self.threshold, outcome.smallest)

    def finished(self, cfg: Mapping[str, Any]) -> SAE:
        """The SAE for raw activations: W unchanged, biases and threshold divided by the scale.

        ReLU, TopK and thresholds commute with a positive factor, so this only changes the unit
        of the latents, and decoder rows stay of unit norm.
        """
        p, s = self.parameters, self.scale
        threshold = None
        if self.config.has_threshold:
            # nothing fired yet: no latent may fire at inference either
            value = math.inf if self.threshold is None else self.threshold / s
            threshold = torch.tensor(value, dtype=p.W_dec_FD.dtype)
        return SAE(
            cfg,
            W_enc=p.W_enc_FD.T.clone(),
            b_enc=p.b_enc_F / s,
            W_dec=p.W_dec_FD.clone(),
            b_dec=p.b_dec_D / s,
            threshold=threshold,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold, but `state`."""
        found = {"rows_since_fired_F": self.rows_since_fired_F, "generator": self.generator.get_state()}
        for name, p in zip(_PARAMETER_NAMES, self.parameters.tensors(), strict=True):
            found[name] = p
            found |= {f"{name}.{key}": value for key, value in self.optimiser.state[p].items()}
        return found

    def state(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "scale": self.scale}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take over what `tensors` and `state` gave, exactly."""
        self.threshold, self.scale = state["threshold"], state["scale"]
        self.rows_since_fired_F.copy_(tensors["rows_since_fired_F"])
        self.generator.set_state(tensors["generator"])
        for name, p in zip(_PARAMETER_NAMES, self.parameters.tensors(), strict=True):
            p.copy_(tensors[name])
            for key, value in self.optimiser.state[p].items():
                value.copy_(tensors[f"{name}.{key}"])


def normalise_rows(W_FD: Tensor) -> None:
    """Every row to unit norm, in place."""
    W_FD /= torch.linalg.vector_norm(W_FD, dim=1, keepdim=True)


def geometric_median(x_ND: Tensor, max_steps: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the least summed distance to the rows, by Weiszfeld's iteration.

    Unlike the mean it ignores a few rows of enormous norm (attention sinks). Steps and tolerance
    are those of dictionary_learning; the initial b_dec of Gao et al. 2024, sec. A.1.
    """
    x = x_ND.double()
    median_D = x.mean(0)
    for _ in range(max_steps):
        weights_N = 1 / torch.linalg.vector_norm(x - median_D, dim=1).clamp_min(1e-12)
        step_D = weights_N @ x / weights_N.sum() - median_D
        median_D = median_D + step_D
        if torch.linalg.vector_norm(step_D) <= tolerance * torch.linalg.vector_norm(median_D):
            break
    return median_D.to(x_ND.dtype)


def _initial_parameters(d_sae: int, d_in: int, generator: torch.Generator, dtype: torch.dtype) -> Parameters:
    """Random unit decoder rows, encoder its transpose, biases zero (Gao et al. 2024, sec. A.1)."""
    W_dec_FD = torch.randn(d_sae, d_in, generator=generator).to(dtype)
    normalise_rows(W_dec_FD)
    return Parameters(
        W_enc_FD=W_dec_FD.clone(),
        b_enc_F=torch.zeros(d_sae, dtype=dtype),
        W_dec_FD=W_dec_FD,
        b_dec_D=torch.zeros(d_in, dtype=dtype),
    )
