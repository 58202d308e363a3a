"""JumpReLU: a learned threshold for each latent and a penalty on L0 itself (Rajamanoharan et al. 2024, arXiv:2407.14435).

    z = pre * H(pre - threshold),    pre = (x - b_dec) W_enc + b_enc,    x^ = z W_dec + b_dec
    loss = mean_N |x - x^|^2 + l0_coefficient * S,    |W_dec_f| = 1, and S one of
      L0                          mean_N sum_f H(pre_f - threshold_f)                (eq. 9)
      (L0 / target_l0 - 1)^2      where `target_l0` is given (as dictionary_learning)
      sum_f w_f (1 + w_f / w_0)   where `frequency_scale` w_0 is given; w_f is the share of the
                                  batch's rows in which latent f is active

H is the step function. Its derivative with respect to the threshold is estimated straight through
with a rectangle of width `bandwidth` (eq. 11 and 12):
    dz/dthreshold = -(threshold / bandwidth) K,    dH/dthreshold = -(1 / bandwidth) K,
    K = 1 where |pre - threshold| < bandwidth / 2, else 0;  nothing flows to pre through H.
The threshold itself is trained and kept at 0 or above, as SAELens does. The paper's code trains its
logarithm: Adam moves a parameter by about the learning rate a step, so 3,000 steps of 1e-3 took a
threshold of 0.01 to 0.2 at most, whatever the penalty (docs/benchmarks.md, "Known features").

The frequency penalty (Smith et al. 2025, the second progress update of Google DeepMind's
interpretability team, on removing high-frequency latents; w_0 0.1 and 0.01 there) is L0 for rare
latents, and grows quadratically for those active in more than a share w_0 of all rows.

`l0_coefficient` controls L0 indirectly, `target_l0` directly. Defaults: bandwidth 0.05, first
threshold 0.01 and coefficient 1 as SAELens, for activations of mean norm sqrt(d) (the trainer's
default); the paper's 0.001 and 0.001 belong to unit mean square norm (`input_scale="unit"`).
Learning rate 7e-5 and betas (0, 0.999) from the paper, through dictionary_learning. Neither the
paper nor we do anything for dead latents by default.

Shapes: N rows, F = d_sae.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..group import Share
from ..select import Entries, Scratch, above
from ..views import View
from .base import Architecture, Moment, Optimiser, Parameters, Terms, check_coefficient, squared_error


@dataclass(frozen=True, kw_only=True)
class JumpReLU(Architecture):
    """A learned threshold for each latent, trained straight through."""

    architecture: ClassVar[str] = "jumprelu"
    published: ClassVar[Optimiser] = Optimiser(lr=7e-5, betas=(0.0, 0.999))

    l0_coefficient: float = 1.0
    """jumprelu: weight of the L0 penalty; larger gives fewer active latents."""

    target_l0: float | None = None
    """jumprelu: active latents a row to aim for, e.g. 32. None: L0 itself is the penalty."""

    frequency_scale: float | None = None
    """jumprelu: share of rows above which a latent is penalised as too frequent, e.g. 0.1. None:
    frequent latents cost as much as rare ones."""

    bandwidth: float = 0.05
    """jumprelu: width of the rectangle by which the threshold's gradient is estimated, in units of
    scaled activations."""

    initial_threshold: float = 0.01
    """jumprelu: threshold of every latent at the start, in units of scaled activations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_coefficient("l0_coefficient", self.l0_coefficient)
        for name in ("target_l0", "frequency_scale", "bandwidth", "initial_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.target_l0 is not None and self.frequency_scale is not None:
            raise ValueError("target_l0 and frequency_scale are both set; give one of them")

    @property
    def sparsity(self) -> float:
        return self.l0_coefficient if self.target_l0 is None else self.target_l0

    @property
    def l0_control(self) -> tuple[object, ...]:
        return self.l0_coefficient, self.target_l0, self.frequency_scale

    def extra_parameters(self, dtype: torch.dtype) -> Parameters:
        return {"threshold_F": torch.full((self.d_sae,), self.initial_threshold, dtype=dtype)}

    def choose(self, pre_NF: Tensor, p: Parameters, scratch: Scratch, share: Share) -> Entries:
        return above(pre_NF, p["threshold_F"].detach() - self.bandwidth / 2, scratch)

    def loss(self, view: View, p: Parameters, moment: Moment) -> Terms:
        threshold = view.per_entry(p["threshold_F"])
        latents: Tensor = _Jump.apply(view.pre, threshold, self.bandwidth)
        error_ND = view.error(latents, p["W_dec_FD"])
        active: Tensor = _Step.apply(view.pre, threshold, self.bandwidth)
        penalty = self.l0_coefficient * moment.sparsity * self._penalty(view, active)
        return Terms(squared_error(error_ND, view.share) + penalty, error_ND, latents)

    def _penalty(self, view: View, active: Tensor) -> Tensor:
        if self.frequency_scale is not None:
            rate_F = view.share.over_rows(view.per_latent(active)) / view.n_rows
            return view.share.over_latents((rate_F * (1 + rate_F / self.frequency_scale)).sum())
        l0 = view.share.total(active.sum()) / view.n_rows
        return l0 if self.target_l0 is None else (l0 / self.target_l0 - 1).square()

    def inference(self, p: Parameters, threshold: float | None) -> dict[str, Tensor]:
        return {"b_enc": p["b_enc_F"], "threshold": p["threshold_F"]}


class _Jump(torch.autograd.Function):
    """pre where it exceeds the threshold, else 0."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (pre, threshold) = grads, ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return grad * (pre > threshold), grad * near * (-threshold / ctx.bandwidth), None


class _Step(torch.autograd.Function):
    """1 where pre exceeds the threshold, else 0."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (pre, threshold) = grads, ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return None, grad * near * (-1 / ctx.bandwidth), None
