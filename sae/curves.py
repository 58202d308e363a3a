"""A line of metrics.jsonl: what it says of an SAE after a step, and how a progress bar shows the lines of all."""

from collections.abc import Mapping, Sequence
from typing import Any

from .learner import Learner
from .rungs import SCORE
from .step import Outcome


def metrics_line(
    learner: Learner, outcome: Outcome, variance: float, rows: int, step: int, scored: bool
) -> dict[str, Any]:
    """The figures of the batch of `outcome`, which is the last.

    Args:
        variance: of the activations, not scaled, summed over dimensions.
        rows, step: so far, with this batch.
        scored: whether rungs will rank the SAEs (sae/rungs.py).
    """
    n, variance = outcome.share.n_rows, variance * learner.scale**2
    found = {
        "step": step,
        "rows": rows,
        "loss": outcome.loss,
        "l0": outcome.n_active / n,
        "fvu": outcome.mse / variance if variance > 0 else 0.0,
        "dead": learner.n_dead,
        "lr": learner.rules.lr * learner.rules.lr_factor(rows - n, n),
    }
    if scored:
        found[SCORE] = found["fvu"] if learner.config.scored_by == "fvu" else outcome.objective
    return found


def bar_figures(lines: Sequence[Mapping[str, Any]], speed: Mapping[str, Any]) -> dict[str, str]:
    """What the progress bar shows beside rows and rate."""
    return {
        "loss": _figures(lines, "loss", ".4g"),
        "fvu": _figures(lines, "fvu", ".3f"),
        "l0": _figures(lines, "l0", ".1f"),
        "dead": _figures(lines, "dead", "d"),
        "stall": f"{speed['stall_share']:.1%}",
    }


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """What a curve can be drawn of."""
    return {name: value for name, value in line.items() if isinstance(value, int | float)}


def _figures(lines: Sequence[Mapping[str, Any]], name: str, form: str) -> str:
    """`0.31/0.28`: of each SAE; `0.28..0.40` of more than four."""
    values = [line[name] for line in lines]
    if len(values) > 4:
        return "..".join(format(value, form) for value in (min(values), max(values)))
    return "/".join(format(value, form) for value in values)
