"""Sequences on which it shows whether an LM keeps the documents of one sequence apart, and how far rows may move.

`capture.check_isolation` runs them. Shapes: S sequences, T tokens, N rows, D width of a site, V ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LIMITS = {torch.float32: (1e-4, 2e-3), torch.float16: (2e-3, 1e-2), torch.bfloat16: (8e-3, 5e-2)}
"""By dtype of the LM: how far a document's rows may move, relative to their norm, when other documents change (same
kernels, same shapes: what is masked adds exact zeros) and when it is run alone (other shapes round otherwise)."""
_EDGE_ROWS = 16


@dataclass(frozen=True, eq=False)
class Document:
    """Where a document lies."""

    sequence: int
    number: int
    """In its sequence, from 0."""
    start: int
    stop: int

    @property
    def edges(self) -> Tensor:
        """Positions of its first and of its last rows, where a neighbour's attention would show; one row is there once."""
        if self.stop - self.start == 1:
            return torch.tensor([self.start])
        n = min(_EDGE_ROWS, self.stop - self.start)
        first, last = torch.arange(self.start, self.start + n), torch.arange(self.stop - n, self.stop)
        return torch.cat([first, last])


class Trial:
    """Four sequences: a whole document, long ones beside short ones and beside documents of one token, padding."""

    def __init__(self, context_size: int, token_ids: Sequence[int], device: Any) -> None:
        third, half, quarter = context_size // 3, context_size // 2, context_size // 4
        lengths = (
            [context_size],
            [third, 1, context_size - third - 1],
            [1, 1, half],
            [quarter, 1, quarter, 1],
        )
        self.places = [d for s, wanted in enumerate(lengths) for d in _side_by_side(s, wanted, context_size)]
        words_V = torch.tensor(list(token_ids))
        shape = (2, len(lengths), context_size)
        drawn = torch.randint(len(words_V), shape, generator=torch.Generator().manual_seed(0))
        self.ids_ST, self._other_ST = words_V[drawn].to(device)
        self.inside_ST = torch.zeros_like(self.ids_ST)
        """1 where there is a document, 0 where there is padding."""
        self.position_ST = torch.zeros_like(self.ids_ST)
        """From 0 in each document; that of padding goes on after the last one, as in a harvest."""
        self._number_ST = torch.zeros_like(self.ids_ST)
        for d in self.places:
            self._number_ST[d.sequence, d.start :] = d.number
            self.position_ST[d.sequence, d.start :] = torch.arange(context_size - d.start)
            self.inside_ST[d.sequence, : d.stop] = 1
        self._number_ST += 1 - self.inside_ST

    def with_others(self, parity: int) -> Tensor:
        """The ids [S, T] with every second document another one: those whose number has this parity stay."""
        return torch.where(self._number_ST % 2 == parity, self.ids_ST, self._other_ST)


def _side_by_side(sequence: int, lengths: Sequence[int], context_size: int) -> list[Document]:
    """Documents of these lengths, one after the other, as far as they fit."""
    at = 0
    places: list[Document] = []
    for n in lengths:
        if 0 < n <= context_size - at:
            places.append(Document(sequence, len(places), at, at + n))
            at += n
    return places


def largest_move(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """How far rows moved relative to their norm: the largest median over a document's first, or last, rows.

    The median, since a mixture of experts may send a row elsewhere for a rounding. Documents of one token count
    together. NaN if a median is.

    Args:
        wanted, found: the edges [N, D] of each document.
    """
    single: list[Tensor] = []
    medians = []
    for wanted_ND, found_ND in zip(wanted, found, strict=True):
        norm_N = wanted_ND.float().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        moved_N = (found_ND.float() - wanted_ND.float()).norm(dim=1) / norm_N
        if len(moved_N) == 1:
            single.append(moved_N)
        else:
            medians += [half_N.median() for half_N in moved_N.chunk(2)]
    if single:
        medians.append(torch.cat(single).median())
    return float(torch.stack(medians).max())
