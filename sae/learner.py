"""One SAE while it is trained: parameters, Adam, dead counters, and how a step changes them.

Knows nothing of streams, files or other SAEs; `sae.train` feeds it. It works on scaled
activations (`Training.input_scale`); `finished` folds the scale into the weights.

Ranks may share one (sae/group.py). A rank then holds a range of the latents; among ranks that hold the
same range, the islands, each updates a part of it, its own latents, and keeps Adam's moments of that part
alone. So gradients are summed to their owner and updated weights are handed round. One process owns all.

Shapes: N rows, D = d_in, F = d_sae or this rank's latents, A dead latents.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from actcache.errors import SpecError

from .architectures import Architecture, Parameters
from .architectures.batch_topk import update_threshold
from .checkpoint_writer import Piece
from .core import SAE
from .group import ALONE, Group, Share
from .revival import Resampling
from .select import Scratch
from .step import Outcome, gradients
from .training import Rules

Read = Callable[..., Tensor]
"""(name, first=0, stop=None): rows [first, stop) of a stored tensor, or all of it."""


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
        group: the ranks that share it; all of them make it at the same place of the program.

    Raises:
        SpecError: the ranks can not share an SAE of this width or step.
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
        group: Group = ALONE,
    ) -> None:
        _check_shared(config, rules, group)
        self.config, self.d_in, self.scale, self.rules, self.group = config, d_in, scale, rules, group
        self.generator = torch.Generator().manual_seed(seed)
        self.held = group.latents.part(config.d_sae)
        initial = _initial_parameters(config, d_in, self.generator, dtype, self.held)
        self.parameters = {name: tensor.to(device) for name, tensor in initial.items()}
        n_held = self.held.stop - self.held.start
        self._own = group.rows.part(n_held)
        self.updated = {name: self._owned(name, p) for name, p in self.parameters.items()}
        self.average = {n: p.clone() for n, p in self.updated.items()} if rules.ema_decay else {}
        self.rows_since_fired_F = torch.zeros(n_held, dtype=torch.int64, device=device)
        self._n_dead = 0
        self.threshold: float | None = None
        self.rows = 0
        self.scratch = Scratch()
        tensors = list(self.updated.values())
        self.optimiser = torch.optim.Adam(tensors, lr=rules.lr, betas=rules.betas, eps=rules.eps, fused=True)
        for p in tensors:
            self.optimiser.state[p] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    @property
    def dead_A(self) -> Tensor:
        """This rank's latents that have not fired for `dead_after_rows`, ascending."""
        return (self.rows_since_fired_F >= self.rules.dead_after_rows).nonzero()[:, 0]

    @property
    def n_dead(self) -> int:
        """Dead latents, those of all ranks."""
        return len(self.dead_A) if self.group.world == 1 else self._n_dead

    def _owned(self, name: str, p: Tensor) -> Tensor:
        """The part of a parameter, or of its gradient, that this rank updates."""
        return p if name == "b_dec_D" or self.group.rows.world == 1 else p[self._own]

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
            self.parameters[name].copy_(tensor if name == "b_dec_D" else tensor[self.held])
        if c.decoder_norm == "unit":
            self._to_unit_norm()
        for name, average in self.average.items():
            average.copy_(self.updated[name])

    def set_b_dec(self, b_dec_D: Tensor) -> None:
        """The first decoder bias, once the first batch is known."""
        for p in (self.parameters, self.average):
            if p:
                p["b_dec_D"].copy_(b_dec_D)

    def gradients(self, x_ND: Tensor, share: Share | None = None) -> Outcome:
        """Loss and gradients for one batch of scaled activations; changes no weight or counter.

        `share`: this rank's part of the batch; by default `x_ND` are all of its rows.
        """
        share = share or Share(self.group, len(x_ND))
        sparsity = self.rules.sparsity_factor(self.rows, share.n_rows)
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
            share,
            None if self.group.world == 1 else self._n_dead,
        )

    def apply(self, outcome: Outcome, x_ND: Tensor) -> None:
        """Change weights and counters by an outcome of `gradients` on the same batch.

        Where decoder rows are of unit norm, their gradient's part along each row is removed first
        (it would only change norms that are then restored). The whole gradient is clipped, Adam
        steps, and decoder rows return to unit norm.
        """
        p, share = self.updated, outcome.share
        found = self._summed(outcome.gradients)
        if self.config.decoder_norm == "unit":
            along_F1 = torch.linalg.vecdot(found["W_dec_FD"], p["W_dec_FD"]).unsqueeze(1)
            found["W_dec_FD"].addcmul_(p["W_dec_FD"], along_F1, value=-1)
        self._count_fired(outcome)
        excess = (self._norm_and_dead(found) + 1e-6) / self.rules.clip_norm
        # the fused Adam divides by this as it reads: one pass over the gradients less
        self.optimiser.grad_scale = torch.clamp(excess, min=1.0).float()  # type: ignore[attr-defined]
        for name, tensor in p.items():
            tensor.grad = found[name]
        for group in self.optimiser.param_groups:
            group["lr"] = self.rules.lr * self.rules.lr_factor(self.rows, share.n_rows)
        self.optimiser.step()
        if self.config.decoder_norm == "unit":
            normalise_rows(p["W_dec_FD"])
        if "threshold_F" in p:
            p["threshold_F"].clamp_(min=0)
        for name, tensor in self.parameters.items():
            if name != "b_dec_D":
                self.group.rows.share_own_(tensor)
        if self.config.learns_threshold_by_average and outcome.smallest is not None:
            self.threshold = update_threshold(self.threshold, outcome.smallest)
        revive = self.config.revive
        if isinstance(revive, Resampling) and revive.due(self.rows, share.n_rows):
            self._resample(revive, share.whole(x_ND), share.whole(outcome.row_loss_N))
        for name, average in self.average.items():
            average.lerp_(p[name], 1 - self.rules.ema_decay)
        self.rows += share.n_rows

    def _summed(self, found: Parameters) -> Parameters:
        """Gradients of what this rank updates, summed over the islands' rows."""
        rows = self.group.rows
        if rows.world == 1:
            return found
        return {
            name: rows.sum_(g.contiguous()) if name == "b_dec_D" else rows.sum_own(g)
            for name, g in found.items()
        }

    def _count_fired(self, outcome: Outcome) -> None:
        """Rows since each latent fired, in any island."""
        if self.group.rows.world == 1:
            self.rows_since_fired_F += outcome.share.n_rows
            self.rows_since_fired_F[outcome.fired_M] = 0
            return
        fired_F = torch.zeros(
            len(self.rows_since_fired_F), dtype=torch.uint8, device=self.rows_since_fired_F.device
        )
        fired_F[outcome.fired_M] = 1
        silent_F = 1 - self.group.rows.max_(fired_F).long()
        self.rows_since_fired_F.add_(outcome.share.n_rows).mul_(silent_F)

    def _norm_and_dead(self, found: Parameters) -> Tensor:
        """The norm of all ranks' gradients; counts the dead latents of all ranks on the way."""
        norms = torch.stack([torch.linalg.vector_norm(g) for g in found.values()])
        if self.group.world == 1:
            return torch.linalg.vector_norm(norms)
        squares = norms.square()
        at = list(found).index("b_dec_D")  # whole on each rank
        own = torch.stack([squares.sum() - squares[at], self._own_dead().to(squares)])
        total, n_dead = self.group.everyone.sum_(own)
        self._n_dead = int(n_dead)
        return torch.sqrt(total + squares[at])

    def _own_dead(self) -> Tensor:
        """Number of dead latents among those that this rank updates."""
        return (self.rows_since_fired_F[self._own] >= self.rules.dead_after_rows).sum()

    def finished(self, cfg: Mapping[str, Any]) -> SAE | None:
        """The SAE for raw activations, by `folded`.

        Where ranks share it, all of them call this, and rank 0 alone gets the SAE.
        """
        p = self._assembled(self.average or self.updated)
        return None if p is None else folded(self.config, p, self.threshold, self.scale, cfg)

    def pieces(self) -> dict[str, Piece]:
        """Everything that a checkpoint must hold, but `state`; this rank's part of it.

        What ranks hold alike is rank 0's.
        """
        first = self.held.start + self._own.start
        found: dict[str, Piece] = {}

        def add(name: str, tensor: Tensor, divided: bool) -> None:
            if divided:
                found[name] = Piece(tensor, first, self.config.d_sae)
            elif self.group.rank == 0:
                found[name] = Piece(tensor)

        add("generator", self.generator.get_state(), False)
        add("rows_since_fired_F", self.rows_since_fired_F[self._own], True)
        for name, p in self.updated.items():
            add(name, p, name != "b_dec_D")
            for key, value in self.optimiser.state[p].items():
                add(f"{name}.{key}", value, name != "b_dec_D" and value.ndim > 0)
        for name, tensor in self.average.items():
            add(f"{name}.average", tensor, name != "b_dec_D")
        return found

    def state(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "scale": self.scale, "rows": self.rows}

    def restore(self, read: Read, state: Mapping[str, Any]) -> None:
        """Continue from what `pieces` and `state` gave, at any number of ranks; exactly, at the same number.

        Args:
            read: gives rows [first, stop) of a tensor of the checkpoint, or all of it.
        """
        self.threshold, self.scale, self.rows = state["threshold"], state["scale"], state["rows"]
        self.generator.set_state(read("generator"))
        own = slice(self.held.start + self._own.start, self.held.start + self._own.stop)
        for name, p in self.updated.items():
            range_ = (0, None) if name == "b_dec_D" else (own.start, own.stop)
            p.copy_(read(name, *range_))
            for key, value in self.optimiser.state[p].items():
                value.copy_(read(f"{name}.{key}", *(range_ if value.ndim else (0, None))))
            if name in self.average:
                self.average[name].copy_(read(f"{name}.average", *range_))
        for name, tensor in self.parameters.items():
            if name != "b_dec_D":
                self.group.rows.share_own_(tensor)
        self.rows_since_fired_F.copy_(read("rows_since_fired_F", self.held.start, self.held.stop))
        self._n_dead = int(self.group.everyone.sum_(self._own_dead()))

    def _assembled(self, own: Parameters) -> Parameters | None:
        """Whole tensors on the CPU of rank 0, from what each rank updates; None elsewhere."""
        first, whole = self.held.start + self._own.start, self.config.d_sae
        found = {
            name: p.cpu() if name == "b_dec_D" else self.group.assembled(p, first, whole)
            for name, p in own.items()
        }
        if self.group.rank:
            return None
        return {name: p for name, p in found.items() if p is not None}

    def _resample(self, revive: Resampling, x_ND: Tensor, row_loss_N: Tensor) -> None:
        """Rows and losses are those of the whole batch."""
        dead_A = self.dead_A
        initial = {name: t[self.held] for name, t in self.config.extra_parameters(x_ND.dtype).items()}
        revive.renew(self.parameters, initial, x_ND, row_loss_N, dead_A, self.generator, self.group.latents)
        self._forget(dead_A)
        self.rows_since_fired_F[dead_A] = 0
        self._n_dead = 0

    def _forget(self, dead_A: Tensor) -> None:
        """Adam's moments of these latents start again."""
        inside_A = (dead_A >= self._own.start) & (dead_A < self._own.stop)
        own_A = dead_A[inside_A] - self._own.start
        for name, p in self.updated.items():
            if name != "b_dec_D":
                for key in ("exp_avg", "exp_avg_sq"):
                    self.optimiser.state[p][key][own_A] = 0

    def _to_unit_norm(self) -> None:
        p = self.parameters
        norms_F = torch.linalg.vector_norm(p["W_dec_FD"], dim=1)
        p["W_enc_FD"] *= norms_F[:, None]
        for name in ("b_enc_F", "b_mag_F", "threshold_F"):
            if name in p:
                p[name] *= norms_F
        normalise_rows(p["W_dec_FD"])


def folded(
    config: Architecture, p: Parameters, threshold: float | None, scale: float, cfg: Mapping[str, Any]
) -> SAE:
    """The SAE for raw activations: biases and threshold divided by the scale, W unchanged.

    ReLU, TopK and thresholds commute with a positive factor, so this only changes the unit
    of the latents. Decoder rows end at unit norm: norms move into the encoder, which ReLU
    lets pass too.

    Args:
        p: whole parameters, or their averages, in training's units.
        threshold: the average that inference needs, where the architecture learns one.
        scale: what raw activations were multiplied with.
        cfg: of the SAE.
    """
    norms_F = torch.linalg.vector_norm(p["W_dec_FD"], dim=1)
    if config.decoder_norm == "unit":
        norms_F = torch.ones_like(norms_F)  # they are, but for rounding
    extra = config.inference(p, threshold)
    for name in ("b_enc", "b_gate", "threshold"):
        if name in extra:
            extra[name] = extra[name] / scale
    extra["b_enc"] = extra["b_enc"] * norms_F
    tensors: dict[str, Any] = {
        "W_enc": (p["W_enc_FD"] * norms_F[:, None]).T.clone(),
        "W_dec": p["W_dec_FD"] / norms_F.clamp_min(1e-30)[:, None],
        "b_dec": p["b_dec_D"] / scale,
        **{name: tensor.clone() for name, tensor in extra.items()},
    }
    return SAE(cfg, **{name: tensor.cpu() for name, tensor in tensors.items()})


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


_DRAWN_LATENTS = (
    1024  # at a time: a block of a multiple of 16 numbers leaves torch's stream of normals as it is
)


def _initial_parameters(
    config: Architecture, d_in: int, generator: torch.Generator, dtype: torch.dtype, held: slice
) -> Parameters:
    """Random decoder rows of one norm, the encoder its transpose in direction, biases zero (Gao et al. 2024, sec. A.1).

    All latents are drawn, block by block, and those of `held` kept: any number of ranks starts from one SAE.
    """
    n = held.stop - held.start
    W_dec_FD = torch.empty(n, d_in, dtype=dtype)
    for start in range(0, config.d_sae, _DRAWN_LATENTS):
        size = min(_DRAWN_LATENTS, config.d_sae - start)
        block_FD = torch.randn(size, d_in, generator=generator)
        first, stop = max(start, held.start), min(start + size, held.stop)
        if first < stop:
            W_dec_FD[first - held.start : stop - held.start] = block_FD[first - start : stop - start]
    normalise_rows(W_dec_FD)
    return {
        "W_enc_FD": W_dec_FD * config.initial_encoder_norm,
        "b_enc_F": torch.zeros(n, dtype=dtype),
        "W_dec_FD": W_dec_FD * config.initial_norm,
        "b_dec_D": torch.zeros(d_in, dtype=dtype),
        **{name: tensor[held].clone() for name, tensor in config.extra_parameters(dtype).items()},
    }


def _check_shared(config: Architecture, rules: Rules, group: Group) -> None:
    if rules.step == "dense" and config.by_rank and group.world > 1:
        raise SpecError(
            f"step is dense, which a {config.architecture} SAE takes in one process alone; train it with step sparse, "
            "or whole SAEs on each worker (spread saes)"
        )
    islands, ranges = group.mesh
    sizes = [s.stop - s.start for s in group.latents.parts(config.d_sae)]
    if min(sizes) < islands:
        raise SpecError(
            f"an SAE of {config.d_sae} latents can not be spread over {islands * ranges} workers; take fewer workers"
        )
