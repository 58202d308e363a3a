"""Rungs: rows of a run after which the worst of rivals stop, so that their time goes to the others.

This is successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943) over SAEs that share a stream. It only
decides: saving, checkpoints and who trains what are the trainer's. An SAE that goes on is not touched: its
weights, its schedule and its batches are those of a run without rungs.

Rivals are SAEs of one site, architecture, width and control of L0 (`Architecture.l0_control`). They are ranked by
the mean of their scores on the lines of metrics since the rung before. A score is the FVU where k fixes L0, and
elsewhere the loss less what revives dead latents: there an SAE could buy a lower FVU with more active latents, and
the penalty says what these cost. Rivals that are scored by their loss also have one warm-up of the penalty.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from .architectures import Architecture
from .training import Rules

SCORE = "score"
"""Key of the score in a line of metrics; the lower, the better."""


class Rungs:
    """Which SAEs of a run still train, and how they have done since the last rung.

    Every rank of a run keeps one and is told the same.

    Args:
        rungs: rows, ascending.
        keep: share of each group of rivals that goes on; rounded up, so that one always does.
        configs, rules: of the SAEs, by their number.
    """

    def __init__(
        self, rungs: Sequence[int], keep: float, configs: Sequence[Architecture], rules: Sequence[Rules]
    ) -> None:
        self._rungs, self._keep = tuple(rungs), keep
        self.stopped: dict[int, int] = {}
        """The rung at which each SAE that has stopped did so, by its number."""
        self.running = list(range(len(configs)))
        """Numbers of the others, ascending."""
        self.groups = rivals(configs, rules)
        self._scores: dict[int, float] = defaultdict(float)

    def __bool__(self) -> bool:
        return bool(self._rungs)

    def reached(self, before: int, rows: int) -> int | None:
        """The rung that a step from `before` to `rows` rows reaches, the last of several; None if there is none."""
        return max((rung for rung in self._rungs if before < rung <= rows), default=None)

    def add(self, lines: Mapping[int, Mapping[str, Any]]) -> None:
        """Count a line of metrics of each SAE that trains."""
        if self:
            for i, line in lines.items():
                self._scores[i] += line[SCORE]

    def worst(self) -> list[int]:
        """Numbers of the SAEs to stop; of equals the first listed goes on."""
        found = []
        for group in self.groups:
            left = sorted((i for i in group if i in self.running), key=lambda i: (self._scores[i], i))
            found += left[math.ceil(self._keep * len(left) - 1e-9) :]
        return sorted(found)

    def stop(self, numbers: Sequence[int], rung: int) -> None:
        """These stop here; for the others scores count anew."""
        self.stopped |= dict.fromkeys(numbers, rung)
        self.running = [i for i in self.running if i not in self.stopped]
        self._scores.clear()

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON-able. Empty without rungs."""
        return {"scores": {str(i): score for i, score in self._scores.items()}} if self else {}

    def restore(self, state: Mapping[str, Any], stopped: Mapping[int, int]) -> None:
        """Go on from what `state` gave, and from the SAEs that had stopped."""
        self.stop(list(stopped), 0)
        self.stopped = dict(stopped)
        self._scores.update({int(i): score for i, score in state.get("scores", {}).items()})


def rivals(configs: Sequence[Architecture], rules: Sequence[Rules]) -> list[list[int]]:
    """Numbers of the SAEs in groups that a rung compares, in the order of their first."""
    groups: dict[Any, list[int]] = {}
    for i, (c, rule) in enumerate(zip(configs, rules, strict=True)):
        key: tuple[Any, ...] = (c.site, c.architecture, c.d_sae, c.l0_control)
        if c.scored_by == "loss":
            key += (rule.sparsity_warmup_rows,)
        groups.setdefault(key, []).append(i)
    return list(groups.values())
