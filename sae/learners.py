"""The SAEs of a run that a rank trains: made, dealt to ranks, restored, finished.

Knows neither rows nor when anything happens; sae/train.py does.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .architectures import Architecture
from .checkpoint import StoredCheckpoint
from .checkpoint_writer import Piece
from .core import SAE
from .inputs import Inputs
from .learner import Learner
from .rotation import turned
from .spread import Layout
from .training import Rules


class Learners(Mapping[int, Learner]):
    """Those that this rank trains, or a part of, by the number of their config; none before the first `deal`.

    Args:
        configs, rules, start: of all SAEs of the run; each starts from a finished SAE, or None.
        inputs: the run's sites.
        layout: who trains what.
        device: where weights are.
    """

    def __init__(
        self,
        configs: Sequence[Architecture],
        rules: Sequence[Rules],
        start: Sequence[SAE | None],
        inputs: Inputs,
        layout: Layout,
        device: torch.device,
    ) -> None:
        self._configs, self._rules, self._start = configs, rules, start
        self._inputs, self._layout, self._device = inputs, layout, device
        self._own: dict[int, Learner] = {}

    def __getitem__(self, i: int) -> Learner:
        return self._own[i]

    def __iter__(self) -> Iterator[int]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)

    def drop(self, numbers: Sequence[int]) -> None:
        """Free these, where this rank has them."""
        self._own = {i: learner for i, learner in self._own.items() if i not in numbers}

    def deal(self, running: Sequence[int]) -> list[int]:
        """Deal the SAEs that train to the ranks; returns the numbers of those that are new here, which start afresh."""
        self._layout.deal({i: self._d_in(i) * self._configs[i].d_sae for i in running})
        own = [i for i in running if self._layout.trains(i)]
        self.drop([i for i in self._own if i not in own])
        new = [i for i in own if i not in self._own]
        self._own |= {i: self._made(i) for i in new}
        self._own = {i: self._own[i] for i in own}
        return new

    def restore(self, stored: StoredCheckpoint, numbers: Sequence[int]) -> None:
        """Continue these from a checkpoint, whoever had them."""
        for i in numbers:
            self._own[i].restore(partial(_read, stored, f"{i}."), stored.state["saes"][i])

    def pieces(self) -> dict[str, Piece]:
        """Everything that a checkpoint must hold of them, but their states."""
        return {
            f"{i}.{name}": piece
            for i, learner in self._own.items()
            for name, piece in learner.pieces().items()
        }

    def told(self, own: Mapping[int, dict[str, Any]] | None) -> dict[int, dict[str, Any]]:
        """JSON of every SAE that trains, in order, of each rank's own; empty once a rank gave None.

        Where ranks share the SAEs, each has all of it.
        """
        parts = [own]
        if self._layout.spread.dealt:
            sent = None if own is None else {str(i): value for i, value in own.items()}
            parts = self._layout.group.objects(sent)
        found = {int(i): value for part in parts if part is not None for i, value in part.items()}
        return {} if None in parts else dict(sorted(found.items()))

    def finished(self, i: int, cfg: Mapping[str, Any]) -> SAE | None:
        """The SAE for the model's activations, as it is; None on a rank that holds only a part of it."""
        s, rotation_DD = self._own[i].finished(cfg), self._inputs.rotations[self._site(i)]
        return s if s is None or rotation_DD is None else turned(s, rotation_DD)

    def _made(self, i: int) -> Learner:
        learner = Learner(
            self._configs[i],
            self._d_in(i),
            self._inputs.factors[self._site(i)],
            self._rules[i],
            self._rules[i].seed,
            device=self._device,
            group=self._layout.learner_group,
        )
        start, rotation_DD = self._start[i], self._inputs.rotations[self._site(i)]
        if start is not None:
            learner.start_from(start if rotation_DD is None else turned(start, rotation_DD.T))
        return learner

    def _site(self, i: int) -> str:
        return str(self._configs[i].site)

    def _d_in(self, i: int) -> int:
        return self._inputs.d_in(self._site(i))


def _read(
    stored: StoredCheckpoint, prefix: str, name: str, first: int = 0, stop: int | None = None
) -> Tensor:
    return stored.read(prefix + name, first, stop)
