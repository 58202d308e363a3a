"""How SAEs are trained, whatever their architecture: `Training`, and what it means for one SAE.

Owns the settings of a run, their defaults, the schedules and the scale of the input. Knows neither
streams nor files.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from actcache.errors import SpecError

from .architectures import Architecture, Optimiser
from .encoder import Selection
from .step import StepKind

InputScale = Literal["sqrt_d", "unit", "none"]


@dataclass(frozen=True)
class Rules:
    """What one SAE's steps follow: every setting, with the defaults filled in."""

    lr: float
    n_rows: int = 1
    """Rows of the whole run."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float = 1.0
    lr_warmup_rows: int = 0
    lr_decay: float = 0.0
    sparsity_warmup_rows: int = 0
    ema_decay: float = 0.0
    seed: int = 0
    dead_after_rows: int = 10_000_000
    step: StepKind = "sparse"
    selection: Selection = "float32"

    def lr_factor(self, rows_before: int, n_rows: int) -> float:
        """Share of the peak learning rate for a step of `n_rows` after `rows_before`."""
        decay_rows = self.lr_decay * self.n_rows
        fall = min(1.0, (self.n_rows - rows_before) / decay_rows) if decay_rows else 1.0
        return _risen(rows_before + n_rows, self.lr_warmup_rows) * fall

    def sparsity_factor(self, rows_before: int, n_rows: int) -> float:
        """Share of the sparsity penalty for a step of `n_rows` after `rows_before`."""
        return _risen(rows_before + n_rows, self.sparsity_warmup_rows)


def _risen(rows: int, over: int) -> float:
    return min(1.0, rows / over) if over else 1.0


@dataclass(frozen=True, kw_only=True)
class Training:
    """How SAEs are trained, whatever their architecture. Rows are activations of one token."""

    n_rows: int
    """Rows to train on, e.g. 2_000_000; a stream may serve a row in several epochs."""

    lr: float | None = None
    """Peak learning rate of Adam, e.g. 3e-4. None: the architecture's published one, else
    2e-4 / sqrt(d_sae / 16384) for each SAE (the scaling of Gao et al. 2024, sec. A.3, with
    dictionary_learning's constant)."""

    seed: int = 0
    """Decides the initial weights of SAEs without a seed of their own. The order of rows is the stream's."""

    lr_warmup_rows: int | None = None
    """Rows over which the learning rate rises linearly from 0. None: a twentieth of the run, at
    most 2,048,000 (1000 steps of 2048, as dictionary_learning)."""

    lr_decay: float = 0.2
    """Share of the run, at its end, over which the learning rate falls linearly to 0: the last
    fifth, as in SAELens' tutorials and Anthropic's April 2024 update."""

    sparsity_warmup_rows: int | None = None
    """Rows over which the sparsity penalty of standard, gated and jumprelu rises linearly from 0.
    None: a twentieth of the run (Anthropic's April 2024 update)."""

    betas: tuple[float, float] | None = None
    """Adam's moving-average factors. None: the architecture's published ones, else 0.9 0.999."""

    clip_norm: float = 1.0
    """Gradients with a larger norm (of all parameters together) are scaled down to it."""

    ema_decay: float = 0.0
    """The saved weights are a moving average that keeps this share of itself at each step, e.g.
    0.999 (Gao et al. 2024, sec. A). 0: the last weights themselves."""

    dead_after_rows: int | None = None
    """A latent that was not active for this many rows is dead, and is worked on by `revive`. None:
    10 million (Gao et al. 2024, sec. A.2), but at most a tenth of the run."""

    b_dec_init: Literal["geometric_median", "mean", "zero"] = "geometric_median"
    """Initial decoder bias, taken from the first batch (Gao et al. 2024, sec. A.1)."""

    input_scale: InputScale = "sqrt_d"
    """`sqrt_d` multiplies activations so that their mean norm is sqrt(d_in), as SAELens and
    Anthropic; `unit` so that their mean squared norm is 1, as Gemma Scope and dictionary_learning.
    Coefficients, bandwidths and the clip norm are in these units, and learning rates carry over
    between models. The saved SAE takes raw activations either way."""

    step: StepKind = "sparse"
    """`sparse` touches only the chosen latents; `dense` is the slow plain formula it must equal."""

    selection: Selection = "float32"
    """`bfloat16` finds the latents of topk by a bfloat16 matmul: k + 8 candidates a row, which are
    then ranked by their exact values. Meant for wide SAEs on processors with bfloat16 units. A row
    may rarely get another k-th latent. Values and gradients are float32 either way."""

    log_every: int = 20
    """Steps between lines of metrics.jsonl."""

    checkpoint_every_rows: int | None = 1_000_000
    """Rows between checkpoints, when the run has a directory; if it is None, time alone decides."""

    checkpoint_every_s: float | None = 600.0
    """Seconds between checkpoints, where those rows take longer; if it is None, rows alone decide."""

    rungs: tuple[int, ...] = ()
    """Rows at which the worst of rivals stop (successive halving), e.g. 1_000_000 and 2_000_000; on the
    command line once for each. Rivals are SAEs that share site, architecture, width and what controls L0."""

    rung_keep: float = 0.5
    """Share of each group of rivals that goes on at a rung, rounded up: at least one does."""

    def __post_init__(self) -> None:
        for name in ("n_rows", "log_every", "checkpoint_every_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.checkpoint_every_s is not None and not 0 < self.checkpoint_every_s < math.inf:
            raise ValueError(
                f"checkpoint_every_s is {self.checkpoint_every_s}; it must be positive, or none for rows alone"
            )
        if self.dead_after_rows is not None and self.dead_after_rows < 1:
            raise ValueError(f"dead_after_rows is {self.dead_after_rows}; it must be at least 1")
        if any(not 1 <= rung < self.n_rows for rung in self.rungs) or list(self.rungs) != sorted(
            set(self.rungs)
        ):
            raise ValueError(
                f"rungs are {self.rungs}; they must ascend, each at least 1 and below n_rows = {self.n_rows}"
            )
        if not 0 < self.rung_keep < 1:
            raise ValueError(
                f"rung_keep is {self.rung_keep}; it is the share that goes on, above 0 and below 1"
            )
        self._optimiser()  # checks what it shares with an SAE's own settings
        for name, kind in (
            ("b_dec_init", None),
            ("input_scale", InputScale),
            ("step", StepKind),
            ("selection", Selection),
        ):
            choices = get_args(kind or type(self).__annotations__[name])
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")

    def rules(self, config: Architecture) -> Rules:
        """What the steps of this SAE follow: its own settings, else the run's, else the published ones."""
        fallback = {
            "lr": 2e-4 / math.sqrt(config.d_sae / 16384),
            "lr_warmup_rows": min(2_048_000, self.n_rows // 20),
            "sparsity_warmup_rows": self.n_rows // 20,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
        }
        sources = (config.optimiser, self._optimiser(), config.published)
        found: dict[str, Any] = {}
        for name in Optimiser.__dataclass_fields__:
            given = [getattr(s, name) for s in sources if getattr(s, name) is not None]
            found[name] = given[0] if given else fallback[name]
        dead_after = self.dead_after_rows
        if self.selection == "bfloat16" and config.k_per_row is None:
            raise ValueError(
                f"selection is bfloat16, which is for topk alone, but an SAE is {config.architecture}; "
                "train it in a run with selection float32"
            )
        return Rules(
            **found,
            n_rows=self.n_rows,
            dead_after_rows=max(1, min(10_000_000, self.n_rows // 10)) if dead_after is None else dead_after,
            step=self.step,
            selection=self.selection,
        )

    def _optimiser(self) -> Optimiser:
        shared = {name: getattr(self, name) for name in Optimiser.__dataclass_fields__ if name != "eps"}
        return Optimiser(**shared)


class CheckpointSchedule:
    """When a checkpoint is due: so many rows or so many seconds after the one before, whichever is first.

    None for either leaves it out. In a distributed run the clock of one rank decides for all.

    Args:
        multiples_of: another is due after each multiple of this many rows; None for none.
    """

    def __init__(
        self, every_rows: int | None, every_s: float | None, multiples_of: int | None = None
    ) -> None:
        self.every_rows, self.every_s, self.multiples_of = every_rows, every_s, multiples_of
        self._rows, self._begun_s = 0, 0.0

    def begin(self, rows: int, now_s: float) -> None:
        """Count from here: the run starts or goes on, or a checkpoint was begun."""
        self._rows, self._begun_s = rows, now_s

    def due(self, rows: int, now_s: float) -> bool:
        """Whether a checkpoint should begin after `rows` rows, at `now_s` seconds of the clock of `begin`."""
        return (
            (self.every_rows is not None and rows - self._rows >= self.every_rows)
            or (self.every_s is not None and now_s - self._begun_s >= self.every_s)
            or (self.multiples_of is not None and rows // self.multiples_of > self._rows // self.multiples_of)
        )


def input_factor(stats: Mapping[str, Any], rule: InputScale) -> float:
    """What activations with these statistics are multiplied with.

    Raises:
        SpecError: they are all zero or not finite.
    """
    if rule == "none":
        return 1.0
    mean_D = np.asarray(stats["mean"], np.float64)
    if rule == "sqrt_d":
        norm, wanted = float(stats["mean_norm"]), math.sqrt(len(mean_D))
    else:
        norm, wanted = math.sqrt(float(np.sum(mean_D**2)) + total_variance(stats)), 1.0
    if not 0 < norm < math.inf:
        raise SpecError(f"the activations' mean norm is {norm}, so they can not be scaled; check the dataset")
    return wanted / norm


def total_variance(stats: Mapping[str, Any]) -> float:
    """Summed over dimensions; of rotated rows only this sum is known."""
    return float(stats["total_variance"] if "total_variance" in stats else np.sum(stats["variance"]))
