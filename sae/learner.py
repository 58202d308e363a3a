"""One SAE while it is trained: parameters, Adam, dead counters, and how a step changes them.

Knows nothing of streams, files or other SAEs; `sae.train` feeds it. It works on scaled
activations (`Training.input_scale`); `finished` folds the scale into the weights.

Shapes: N rows, D = d_in, F = d_sae, A dead latents.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from actcache.errors import SpecError

from .architectures import Architecture, Parameters
from .architectures.batch_topk import update_threshold
from .core import SAE
from .revival import Resampling
from .select import Scratch
from .step import Outcome, gradients
from .training import Rules


class Learner:
    """Weights on their way: `gradients` looks at a batch, `apply` takes the step.

    Args:
        config: the architecture.
        d_in: width of the activations.
        scale: what raw activations were multiplied with before they come here.
        rules: learning rate and the like.
        seed: decides the initial weights, alone with `config` and `d_in`: an SAE trained beside
            others equals the same one trained alone.
        device: where weights are, and batches must be.
    """

    def __init__(
        self,
        config: Architecture,
        d_in: int,
        scale: float,
        rules: Rules,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.d_in, self.scale, self.rules = config, d_in, scale, rules
        self.generator = torch.Generator().manual_seed(seed)
        initial = _initial_parameters(config, d_in, self.generator, dtype)
        self.parameters = {name: tensor.to(device) for name, tensor in initial.items()}
        self.average = {n: p.clone() for n, p in self.parameters.items()} if rules.ema_decay else {}
        self.rows_since_fired_F = torch.zeros(config.d_sae, dtype=torch.int64, device=device)
        self.threshold: float | None = None
        self.rows = 0
        self.scratch = Scratch()
        tensors = list(self.parameters.values())
        self.optimiser = torch.optim.Adam(tensors, lr=rules.lr, betas=rules.betas, eps=rules.eps, fused=True)
        for p in tensors:
            self.optimiser.state[p] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    @property
    def dead_A(self) -> Tensor:
        """Latents that have not fired for `dead_after_rows`, ascending."""
        return (self.rows_since_fired_F >= self.rules.dead_after_rows).nonzero()[:, 0]

    @property
    def n_dead(self) -> int:
        return len(self.dead_A)

    def start_from(self, s: SAE) -> None:
        """Take over the weights of a finished SAE; the inverse of `finished`.

        Raises:
            SpecError: its shape or architecture does not fit.
        """
        c, cfg = self.config, s.cfg
        found = (cfg["architecture"], cfg["d_in"], cfg["d_sae"])
        if found[1:] != (self.d_in, c.d_sae) or ("gated" in (found[0], c.architecture)) != (
            found[0] == c.architecture == "gated"
        ):
            raise SpecError(
                f"the SAE to start from is {found[0]} with d_in {found[1]} and d_sae {found[2]}; wanted is "
                f"{c.architecture} with d_in {self.d_in} and d_sae {c.d_sae}. Gated starts from gated only."
            )
        given: dict[str, Tensor | None] = {
            "W_enc_FD": s.W_enc.T,
            "W_dec_FD": s.W_dec,
            "b_dec_D": s.b_dec * self.scale,
        }
        given["b_enc_F"] = (s.b_enc if s.b_gate is None else s.b_gate) * self.scale
        if c.architecture == "gated":
            given |= {"b_mag_F": s.b_enc * self.scale, "r_mag_F": s.r_mag}
        if s.threshold is not None and "threshold_F" in self.parameters:
            given["threshold_F"] = (s.threshold * self.scale).expand(c.d_sae)
        if s.threshold is not None and c.learns_threshold_by_average and s.threshold.numel() == 1:
            self.threshold = float(s.threshold) * self.scale
        for name, tensor in given.items():
            assert tensor is not None, "checked when the SAE was made"
            self.parameters[name].copy_(tensor)
        if c.decoder_norm == "unit":
            self._to_unit_norm()
        for name, average in self.average.items():
            average.copy_(self.parameters[name])

    def set_b_dec(self, b_dec_D: Tensor) -> None:
        """The first decoder bias, once the first batch is known."""
        for p in (self.parameters, self.average):
            if p:
                p["b_dec_D"].copy_(b_dec_D)

    def gradients(self, x_ND: Tensor) -> Outcome:
        """Loss and gradients for one batch of scaled activations; changes no weight or counter."""
        sparsity = self.rules.sparsity_factor(self.rows, len(x_ND))
        moment = self.config.moment(sparsity, self.generator)
        return gradients(
            self.rules.step,
            self.config,
            self.parameters,
            x_ND,
            self.dead_A,
            moment,
            self.scratch,
            self.rules.selection,
        )

    def apply(self, outcome: Outcome, x_ND: Tensor) -> None:
        """Change weights and counters by an outcome of `gradients` on the same batch.

        Where decoder rows are of unit norm, their gradient's part along each row is removed first
        (it would only change norms that are then restored). The whole gradient is clipped, Adam
        steps, and decoder rows return to unit norm.
        """
        p, found, n_rows = self.parameters, outcome.gradients, len(x_ND)
        if self.config.decoder_norm == "unit":
            along_F1 = torch.linalg.vecdot(found["W_dec_FD"], p["W_dec_FD"]).unsqueeze(1)
            found["W_dec_FD"].addcmul_(p["W_dec_FD"], along_F1, value=-1)
        norms = torch.stack([torch.linalg.vector_norm(g) for g in found.values()])
        excess = (torch.linalg.vector_norm(norms) + 1e-6) / self.rules.clip_norm
        # the fused Adam divides by this as it reads: one pass over the gradients less
        self.optimiser.grad_scale = torch.clamp(excess, min=1.0).float()  # type: ignore[attr-defined]
        for name, tensor in p.items():
            tensor.grad = found[name]
        for group in self.optimiser.param_groups:
            group["lr"] = self.rules.lr * self.rules.lr_factor(self.rows, n_rows)
        self.optimiser.step()
        if self.config.decoder_norm == "unit":
            normalise_rows(p["W_dec_FD"])
        if "threshold_F" in p:
            p["threshold_F"].clamp_(min=0)
        self.rows_since_fired_F += n_rows
        self.rows_since_fired_F[outcome.fired_M] = 0
        if self.config.learns_threshold_by_average and outcome.smallest is not None:
            self.threshold = update_threshold(self.threshold, outcome.smallest)
        revive = self.config.revive
        if isinstance(revive, Resampling) and revive.due(self.rows, n_rows):
            self._resample(revive, x_ND, outcome.row_loss_N)
        for name, average in self.average.items():
            average.lerp_(p[name], 1 - self.rules.ema_decay)
        self.rows += n_rows

    def finished(self, cfg: Mapping[str, Any]) -> SAE:
        """The SAE for raw activations: biases and threshold divided by the scale, W unchanged.

        ReLU, TopK and thresholds commute with a positive factor, so this only changes the unit
        of the latents. Decoder rows end at unit norm: norms move into the encoder, which ReLU
        lets pass too.
        """
        p = self.average or self.parameters
        norms_F = torch.linalg.vector_norm(p["W_dec_FD"], dim=1)
        if self.config.decoder_norm == "unit":
            norms_F = torch.ones_like(norms_F)  # they are, but for rounding
        extra = self.config.inference(p, self.threshold)
        for name in ("b_enc", "b_gate", "threshold"):
            if name in extra:
                extra[name] = extra[name] / self.scale
        extra["b_enc"] = extra["b_enc"] * norms_F
        tensors: dict[str, Any] = {
            "W_enc": (p["W_enc_FD"] * norms_F[:, None]).T.clone(),
            "W_dec": p["W_dec_FD"] / norms_F.clamp_min(1e-30)[:, None],
            "b_dec": p["b_dec_D"] / self.scale,
            **{name: tensor.clone() for name, tensor in extra.items()},
        }
        return SAE(cfg, **{name: tensor.cpu() for name, tensor in tensors.items()})

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold, but `state`."""
        found = {"rows_since_fired_F": self.rows_since_fired_F, "generator": self.generator.get_state()}
        for name, p in self.parameters.items():
            found[name] = p
            found |= {f"{name}.{key}": value for key, value in self.optimiser.state[p].items()}
        return found | {f"{name}.average": tensor for name, tensor in self.average.items()}

    def state(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "scale": self.scale, "rows": self.rows}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take over what `tensors` and `state` gave, exactly."""
        self.threshold, self.scale, self.rows = state["threshold"], state["scale"], state["rows"]
        self.generator.set_state(tensors["generator"])
        for name, tensor in self.tensors().items():
            if name != "generator":
                tensor.copy_(tensors[name])

    def _resample(self, revive: Resampling, x_ND: Tensor, row_loss_N: Tensor) -> None:
        dead_A = self.dead_A
        initial = self.config.extra_parameters(x_ND.dtype)
        revive.renew(self.parameters, initial, x_ND, row_loss_N, dead_A, self.generator)
        self._forget(dead_A)
        self.rows_since_fired_F[dead_A] = 0

    def _forget(self, dead_A: Tensor) -> None:
        """Adam's moments of these latents start again."""
        for name, p in self.parameters.items():
            if name != "b_dec_D":
                for key in ("exp_avg", "exp_avg_sq"):
                    self.optimiser.state[p][key][dead_A] = 0

    def _to_unit_norm(self) -> None:
        p = self.parameters
        norms_F = torch.linalg.vector_norm(p["W_dec_FD"], dim=1)
        p["W_enc_FD"] *= norms_F[:, None]
        for name in ("b_enc_F", "b_mag_F", "threshold_F"):
            if name in p:
                p[name] *= norms_F
        normalise_rows(p["W_dec_FD"])


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


def _initial_parameters(
    config: Architecture, d_in: int, generator: torch.Generator, dtype: torch.dtype
) -> Parameters:
    """Random decoder rows of one norm, the encoder its transpose in direction, biases zero (Gao et al. 2024, sec. A.1)."""
    W_dec_FD = torch.randn(config.d_sae, d_in, generator=generator).to(dtype)
    normalise_rows(W_dec_FD)
    return {
        "W_enc_FD": W_dec_FD * config.initial_encoder_norm,
        "b_enc_F": torch.zeros(config.d_sae, dtype=dtype),
        "W_dec_FD": W_dec_FD * config.initial_norm,
        "b_dec_D": torch.zeros(d_in, dtype=dtype),
        **config.extra_parameters(dtype),
    }
