"""How a run is laid over its ranks: whole SAEs, ranges of latents, islands of rows, or the last two together.

`saes` deals whole SAEs to ranks, each of which trains its own on the whole batch; `latents` gives each
rank a range of every SAE's latents and the whole batch; `rows` gives each rank whole SAEs and a part of
the batch. Every rank reads its own lanes of the dataset, and ranks that train on the same rows exchange
what they read (sae/group.py). The batch, its order and the result are those of one process.

Shapes: N rows.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from actcache.errors import SpecError

from .group import ALONE, Group, Mesh, RowGather, Share
from .streams import Batch, Stream

WAYS = "saes, latents, rows or rows=R,latents=L"


@dataclass(frozen=True)
class Spread:
    """What is divided: `mesh` is (islands of rows, ranges of latents); `dealt` gives whole SAEs to ranks."""

    mesh: Mesh = (1, 1)
    dealt: bool = False

    @property
    def world(self) -> int:
        return self.mesh[0] * self.mesh[1]

    def __str__(self) -> str:
        islands, ranges = self.mesh
        if self.dealt:
            return "saes"
        return "latents" if islands == 1 else "rows" if ranges == 1 else f"rows={islands},latents={ranges}"


def spread_of(text: str | None, world: int, n_saes: int) -> Spread:
    """The layout of `world` ranks that `text` names; None takes whole SAEs where there are as many as ranks.

    Raises:
        SpecError: it is no layout, or one of another number of ranks.
    """
    if text is None:
        text = "saes" if n_saes >= world else "latents"
    if text == "saes":
        if n_saes < world:
            raise SpecError(
                f"{n_saes} SAEs can not be dealt to {world} workers; take at most {n_saes} workers, or --spread latents"
            )
        return Spread((1, world), dealt=True)
    if text in ("latents", "rows"):
        return Spread((1, world) if text == "latents" else (world, 1))
    found = re.fullmatch(r"rows=(\d+),latents=(\d+)", text.replace(" ", ""))
    if found is None:
        raise SpecError(f"spread is {text!r}; it is one of {WAYS}")
    mesh = int(found[1]), int(found[2])
    if mesh[0] * mesh[1] != world:
        raise SpecError(
            f"spread {text} is of {mesh[0] * mesh[1]} workers, and there are {world}; R x L must be all of them"
        )
    return Spread(mesh)


class Layout:
    """A rank's place in a run: its SAEs, its rows, and the group it exchanges with.

    Made by every rank at the same place of the program. Without torch.distributed it is one process.
    """

    def __init__(self, spread: Spread | None = None) -> None:
        self.spread = spread or Spread()
        self.group = ALONE if self.spread.world == 1 else Group(self.spread.mesh)
        self.rank, self.world = self.group.rank, self.group.world
        self.learner_group = ALONE if self.spread.dealt else self.group
        """The ranks that share each SAE."""
        self._owners: dict[int, int] = {}

    def deal(self, costs: Mapping[int, int]) -> None:
        """Deal these SAEs to the ranks, where whole SAEs are: the dearest first, to the rank with the least so far.

        Costs alone decide, so that all ranks deal alike; SAEs of one cost go round.
        """
        loads = [0] * self.world
        self._owners.clear()
        for i in sorted(costs, key=lambda i: (-costs[i], i)):
            self._owners[i] = loads.index(min(loads))
            loads[self._owners[i]] += costs[i]

    def owner(self, i: int) -> int | None:
        """The rank that trains the i-th of the SAEs that were dealt; None where all do."""
        return self._owners[i] if self.spread.dealt else None

    def trains(self, i: int) -> bool:
        """True if this rank trains the i-th SAE, or a part of it."""
        return self.owner(i) in (None, self.rank)

    def stream(self, stream: Stream) -> Stream:
        """The stream of this rank's rows: the whole batch, or that of its island.

        Raises:
            SpecError: the stream can not be divided among ranks.
        """
        if self.world == 1:
            return stream
        for_rank = getattr(stream, "for_rank", None)
        if for_rank is None:
            raise SpecError(
                f"a {type(stream).__name__} can not be read by {self.world} workers; take a stream of a dataset "
                "(actcache.open(...).stream(...)) or sae.ArrayStream"
            )
        found: Stream = for_rank(self.rank, self.world, RowGather(self.group))
        return found

    def share(self, batch: Batch, left: int) -> tuple[Share, int]:
        """(this rank's part of the batch, how many of the batch's first rows it trains on); at most `left` in all."""
        n = len(batch)
        if self.group.rows.world == 1:
            taken = min(n, left)
            return Share(self.learner_group, taken), taken
        total = int(self.group.numbers(n)[:: self.group.latents.world].sum())
        place_N = torch.as_tensor(_place(batch))
        if total > left:  # the run ends within this batch
            limit = int(Share(self.group, total, place_N).whole(place_N)[left - 1])
            n, total = int((place_N <= limit).sum()), left
        return Share(self.group, total, place_N[:n]), n


def _place(batch: Any) -> Any:
    place = getattr(batch, "place", None)
    if place is None:
        raise SpecError(
            f"a {type(batch).__name__} does not tell the places of its rows in the batch (`place`), which training "
            "by rows needs; use --spread latents"
        )
    return place
