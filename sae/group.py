"""The processes that train together: who holds which latents, who reads which rows, and how they exchange.

The only file that calls torch.distributed. `ALONE` is one process: every operation is the identity,
and torch.distributed is not imported. W ranks form a mesh of R x L: a rank holds one of L ranges of
latents and sees the rows of one of R islands. Latents are sharded where R is 1; the training is data
parallel where L is 1. Ranks that share an island's rows are neighbours (rank = island * L + range), so
that they lie on one machine where they can.

Sums over ranks follow one rule: they are the same number everywhere, and their gradient reaches each
rank's own part unchanged. So a rank differentiates its own part of the global loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Mesh = tuple[int, int]
"""(islands of rows, ranges of latents)."""


class Axis:
    """Ranks that exchange: `rank` of `world` among them, in the order of their global ranks."""

    def __init__(self, ranks: Sequence[int], own: int, process_group: Any = None) -> None:
        self.ranks, self.rank, self.world = list(ranks), list(ranks).index(own), len(ranks)
        self._process_group = process_group

    def sum(self, t: Tensor) -> Tensor:
        """Sum over the ranks; its gradient passes to each rank unchanged."""
        if self.world == 1:
            return t
        found: Tensor = _Sum.apply(t, self)
        return found

    def sum_(self, t: Tensor) -> Tensor:
        """Sum over the ranks, in place; `t` is contiguous and not differentiated."""
        return self._reduce(t, "SUM")

    def max_(self, t: Tensor) -> Tensor:
        """Largest of the ranks' values, in place."""
        return self._reduce(t, "MAX")

    def gather(self, t: Tensor) -> Tensor:
        """[world, ...]: every rank's tensor; all of one shape."""
        if self.world == 1:
            return t[None]
        import torch.distributed as dist

        out = t.new_empty((self.world, *t.shape))
        dist.all_gather(list(out), t.contiguous(), group=self._process_group)
        return out

    def part(self, n: int) -> slice:
        """This rank's range of n: ceil(n / world) each, the last ones fewer or none."""
        return self.parts(n)[self.rank]

    def parts(self, n: int) -> list[slice]:
        """The ranges of all ranks, ascending."""
        size = -(-n // self.world)
        return [slice(min(i * size, n), min((i + 1) * size, n)) for i in range(self.world)]

    def sum_own(self, t: Tensor) -> Tensor:
        """This rank's range (`part`) of the sum of all ranks' [n, ...]; may overwrite `t`."""
        if self.world == 1:
            return t
        import torch.distributed as dist

        if len(t) % self.world:
            return self.sum_(t.contiguous())[self.part(len(t))]
        out = t.new_empty((len(t) // self.world, *t.shape[1:]))
        dist.reduce_scatter(out, list(t.contiguous().chunk(self.world)), group=self._process_group)
        return out

    def share_own_(self, t: Tensor) -> None:
        """Fill [n, ...], of which this rank has its own range, from the other ranks' ranges."""
        if self.world == 1:
            return
        import torch.distributed as dist

        if len(t) % self.world == 0:
            own = t[self.part(len(t))].clone()
            dist.all_gather(list(t.chunk(self.world)), own, group=self._process_group)
            return
        for rank, rows in zip(self.ranks, self.parts(len(t)), strict=True):
            if rows.start < rows.stop:
                dist.broadcast(t[rows], rank, group=self._process_group)

    def _reduce(self, t: Tensor, operation: str) -> Tensor:
        if self.world > 1:
            import torch.distributed as dist

            dist.all_reduce(t, op=getattr(dist.ReduceOp, operation), group=self._process_group)
        return t


class Group:
    """The ranks of a run, as a mesh of islands of rows and ranges of latents.

    Made by every rank at the same place of the program; `ALONE` needs no torch.distributed.
    """

    def __init__(self, mesh: Mesh = (1, 1)) -> None:
        self.mesh = mesh
        islands, ranges = mesh
        self.rank = self.world = 0
        if islands * ranges == 1:
            self.rank, self.world = 0, 1
            self.rows = self.latents = self.everyone = self.control = Axis([0], 0)
            return
        import torch.distributed as dist

        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if islands * ranges != self.world:
            raise ValueError(
                f"a mesh of {islands} x {ranges} needs {islands * ranges} ranks; there are {self.world}"
            )
        everyone = list(range(self.world))
        self.everyone = Axis(everyone, self.rank, dist.group.WORLD)
        self.latents = self._axis([everyone[i * ranges : (i + 1) * ranges] for i in range(islands)])
        self.rows = self._axis([everyone[i::ranges] for i in range(ranges)])
        self.control = Axis(everyone, self.rank, dist.new_group(everyone, backend="gloo"))
        """Numbers and JSON on the host: an exchange that no device waits for."""

    def _axis(self, parts: list[list[int]]) -> Axis:
        """This rank's part; all parts are made on every rank, as torch.distributed wants."""
        import torch.distributed as dist

        if len(parts) == 1:
            return self.everyone
        found = None
        for ranks in parts:
            made = dist.new_group(ranks) if len(ranks) > 1 else None
            if self.rank in ranks:
                found = Axis(ranks, self.rank, made)
        assert found is not None, "every rank is in one part"
        return found

    def numbers(self, *values: float) -> np.ndarray:
        """float64 [world, n]: every rank's numbers, exchanged on the host."""
        found: np.ndarray = self.control.gather(torch.tensor(values, dtype=torch.float64)).numpy()
        return found

    def objects(self, value: Any) -> list[Any]:
        """Every rank's JSON-able value."""
        if self.world == 1:
            return [value]
        import json

        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.numbers(len(data))[:, 0].astype(int)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: len(data)] = data
        out = self.control.gather(padded)
        return [json.loads(bytes(row[:size].numpy())) for row, size in zip(out, sizes, strict=True)]

    def assembled(self, own: Tensor, first: int, whole: int) -> Tensor | None:
        """[whole, ...] on the CPU of rank 0, from every rank's rows [first, first + len(own)); None elsewhere.

        Ranks may hold the same rows; one rank after the other sends, so that rank 0 holds one part beside the whole.
        """
        if self.world == 1:
            return own.cpu()
        import torch.distributed as dist

        places = self.numbers(first, len(own))[:, :2].astype(int)
        out = torch.empty((whole, *own.shape[1:]), dtype=own.dtype) if self.rank == 0 else None
        for rank, (start, n) in enumerate(places):
            if rank == 0:
                part = own
            elif self.rank == 0:
                part = own.new_empty((int(n), *own.shape[1:]))
                dist.recv(part, rank)
            elif self.rank == rank:
                dist.send(own.contiguous(), 0)
            if out is not None:
                out[start : start + n] = part.cpu()
        return out


ALONE = Group()


class RowGather:
    """Joins the rows that the ranks of an island read: `gather` of a dataset's stream (actcache/gathering.py).

    Bytes go through gloo on the host, from the stream's own thread, so that the exchange of a batch
    runs beside the step before it.
    """

    def __init__(self, group: Group, *, everyone: bool = False) -> None:
        """`everyone`: all ranks are one island, whatever the mesh (whole SAEs dealt to ranks)."""
        axis = group.everyone if everyone else group.latents
        ranges = axis.world
        self._islands = [list(range(i, i + ranges)) for i in range(0, group.world, ranges)]
        self._rank, self.ranks = group.rank, axis.ranks

    def channel(self) -> Callable[[np.ndarray], Sequence[np.ndarray]]:
        """An exchange for one stream, with connections of its own; made on all ranks in one order."""
        if len(self.ranks) == 1:
            return lambda own: [own]
        import torch.distributed as dist

        found: Any = None
        for ranks in self._islands:
            made = dist.new_group(ranks, backend="gloo")
            if self._rank in ranks:
                found = made

        def exchange(own: np.ndarray) -> Sequence[np.ndarray]:
            out = torch.empty((len(self.ranks), len(own)), dtype=torch.uint8)
            dist.all_gather(list(out), torch.from_numpy(own), group=found)
            return list(out.numpy())

        return exchange


@dataclass(frozen=True)
class Share:
    """A rank's part of the batch at hand."""

    group: Group
    n_rows: int
    """Rows of the whole batch, of all islands."""
    place_N: Tensor | None = None
    """int64: place of each of this rank's rows in the whole batch, on the CPU; None: it has all of them, in order."""

    def total(self, t: Tensor) -> Tensor:
        """Sum over all rows and latents, of this rank's sum over its own."""
        return self.group.everyone.sum(t)

    def over_rows(self, t: Tensor) -> Tensor:
        """Sum over the islands' rows."""
        return self.group.rows.sum(t)

    def over_latents(self, t: Tensor) -> Tensor:
        """Sum over the ranges of latents."""
        return self.group.latents.sum(t)

    def whole(self, rows_N: Tensor) -> Tensor:
        """[n_rows, ...]: this rank's rows and those of the other islands, in the order of the batch."""
        if self.place_N is None:
            return rows_N
        axis, place_N = self.group.rows, self.place_N
        sizes = self.group.rows.gather(torch.tensor([len(rows_N)], device=rows_N.device)).flatten().tolist()
        padded = rows_N.new_zeros((max(sizes), *rows_N.shape[1:]))
        padded[: len(rows_N)] = rows_N
        places = torch.full((max(sizes),), -1, device=rows_N.device)
        places[: len(place_N)] = place_N.to(rows_N.device)
        all_places, all_rows = axis.gather(places).flatten(), axis.gather(padded).flatten(0, 1)
        order = torch.argsort(all_places)[-sum(sizes) :]
        return all_rows[order]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, axis: Axis) -> Tensor:
        return axis.sum_(t.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None
