"""What every architecture has and the trainer asks of it.

A config is frozen data; its methods are the formulas. `loss` is written once and evaluated over a
view (sae/views.py): over all latents with plain autograd (the oracle), or over the chosen ones.

Shapes: N rows, D = d_in, F = d_sae. Parameters are a dict: W_enc_FD, b_enc_F, W_dec_FD, b_dec_D
and what `extra_parameters` adds. W_enc is kept as [F, D], so that one row is one latent and the
field's `W_enc` [D, F] is a view of it.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..group import Share
from ..views import Parameters, View

if TYPE_CHECKING:
    from ..revival import Revival
    from ..select import Entries, Scratch

__all__ = ["Architecture", "Moment", "Optimiser", "Parameters", "Terms"]


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """How one SAE's weights move. What is None is the run's (`Training`), else the architecture's."""

    lr: float | None = None
    """Peak learning rate of Adam, e.g. 3e-4."""

    betas: tuple[float, float] | None = None
    """Adam's moving-average factors."""

    eps: float | None = None
    """Adam's epsilon."""

    clip_norm: float | None = None
    """Gradients with a larger norm (of all parameters together) are scaled down to it."""

    lr_warmup_rows: int | None = None
    """Rows over which the learning rate rises linearly from 0."""

    lr_decay: float | None = None
    """Share of the run, at its end, over which the learning rate falls linearly to 0."""

    sparsity_warmup_rows: int | None = None
    """Rows over which the sparsity penalty's weight rises linearly from 0."""

    ema_decay: float | None = None
    """The saved weights are a moving average that keeps this share of itself at each step, e.g.
    0.999. 0: the last weights themselves."""

    seed: int | None = None
    """Decides the initial weights, and what is drawn in training; the order of rows is the stream's."""

    def __post_init__(self) -> None:
        for name in ("lr", "clip_norm", "eps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be positive")
        for name in ("lr_warmup_rows", "sparsity_warmup_rows"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; it must not be negative")
        if self.lr_decay is not None and not 0 <= self.lr_decay <= 1:
            raise ValueError(f"lr_decay is {self.lr_decay}; it is a share of the run, between 0 and 1")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; each must be at least 0 and below 1")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be at least 0 and below 1")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must fit 64 bits")


@dataclass(frozen=True)
class Moment:
    """Where in the run a step is, and what was drawn for it."""

    sparsity: float = 1.0
    """Share of the sparsity penalty that applies (its warm-up)."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka's prefix lengths in this step."""


@dataclass(frozen=True)
class Terms:
    """One batch's loss, differentiable, and what the trainer reports of it."""

    loss: Tensor
    """Everything but what revives dead latents."""
    error_ND: Tensor
    """x^ - x."""
    latents: Tensor
    """[N, F] or one value for each entry, as the view is."""


@dataclass(frozen=True, kw_only=True)
class Architecture(ABC):
    """The fields that all have."""

    architecture: ClassVar[str]
    """Its name on the command line and in `sae.json`."""
    learns_threshold_by_average: ClassVar[bool] = False
    """Inference needs a threshold that is estimated while training (BatchTopK and its kin)."""
    by_rank: ClassVar[bool] = False
    """Which latents are active is decided by rank (`keep`), not by each value alone."""
    scored_by: ClassVar[Literal["fvu", "loss"]] = "loss"
    """What ranks SAEs of one `l0_control`: the FVU where that fixes L0, else the loss, which says what L0 costs."""
    published: ClassVar[Optimiser] = Optimiser()
    """The source's own settings, where neither the config nor the run says otherwise."""

    d_sae: int
    """Number of latents (the SAE's width), e.g. 8 to 64 times d_in."""

    site: str | None = None
    """Where in the model the activations come from, e.g. blocks.3.hook_resid_post. None: the
    stream's only site."""

    revive: "Revival | None" = None
    """What is done about dead latents: `sae.AuxK()`, `sae.GhostGrads()`, `sae.Resampling(...)` or
    None for nothing."""

    optimiser: Optimiser = Optimiser()
    """Settings of this SAE alone, before those of the run."""

    def __post_init__(self) -> None:
        if self.d_sae < 1:
            raise ValueError(f"d_sae is {self.d_sae}; it must be at least 1")

    @property
    @abstractmethod
    def sparsity(self) -> float:
        """What controls L0, for the name of the SAE."""

    @property
    def l0_control(self) -> tuple[object, ...]:
        """All that controls L0: SAEs of one width that are alike in it are compared (sae/rungs.py)."""
        return (self.sparsity,)

    @property
    def decoder_norm(self) -> Literal["unit", "free"]:
        """Whether decoder rows return to unit norm after each step."""
        return "unit"

    @property
    def initial_norm(self) -> float:
        """Norm of each decoder row at the start."""
        return 1.0

    @property
    def initial_encoder_norm(self) -> float:
        """Norm of each latent's encoder weights at the start; their direction is the decoder row's."""
        return self.initial_norm

    def extra_parameters(self, dtype: torch.dtype) -> Parameters:
        """Parameters beside the four that all have, one value a latent, as they start."""
        return {}

    def moment(self, sparsity: float, generator: torch.Generator) -> Moment:
        """What the step at hand needs to know; draws from `generator` where chance is part of it."""
        return Moment(sparsity=sparsity)

    @property
    def k_per_row(self) -> int | None:
        """k where each row's active latents are its k largest, so that rounded pre-activations can
        name candidates (`Training.selection`); else None."""
        return None

    def keep(self, pre_NF: Tensor) -> Tensor | None:
        """Dense mask of the latents that may be active, where that is a matter of rank; else None."""
        return None

    @abstractmethod
    def choose(self, pre_NF: Tensor, p: Parameters, scratch: "Scratch", share: Share) -> "Entries":
        """The entries outside which every value and every gradient of `loss` is zero: this rank's, of a choice
        that the whole batch and all latents decide."""

    @abstractmethod
    def loss(self, view: View, p: Parameters, moment: Moment) -> Terms:
        """The formula of the module's docstring."""

    def inference(self, p: Parameters, threshold: float | None) -> dict[str, Tensor]:
        """Tensors of the finished SAE beside W_enc, W_dec and b_dec; in the units of training."""
        return {"b_enc": p["b_enc_F"]}


def squared_error(error_ND: Tensor, share: Share) -> Tensor:
    """mean_N |x - x^|^2 over the whole batch, summed over dimensions."""
    found: Tensor = _SquaredError.apply(error_ND, share.n_rows)
    return share.over_rows(found)


class _SquaredError(torch.autograd.Function):
    """Differentiated in one pass; autograd multiplies both sides of a dot product and adds them."""

    @staticmethod
    def forward(ctx: Any, error_ND: Tensor, n_rows: int) -> Tensor:
        ctx.save_for_backward(error_ND)
        ctx.n_rows = n_rows
        flat = error_ND.reshape(-1)
        return torch.dot(flat, flat) / n_rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (error_ND,) = ctx.saved_tensors
        return error_ND * (grads[0] * (2 / ctx.n_rows)), None


def check_coefficient(name: str, value: float) -> None:
    """Raise `ValueError` unless it is finite and not negative."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}; it must be finite and not negative")


def check_k(k: int, d_sae: int) -> None:
    """Raise `ValueError` for a k that can not be trained."""
    if not 1 <= k <= d_sae:
        raise ValueError(f"k is {k}; it must be between 1 and d_sae = {d_sae}")
