"""Gathering: ranks exchange the rows that each has read, and each then serves the rows of several.

Rows travel as they are stored (codes, scales, metadata), before they are filtered and decoded: a quarter of
the bytes of float32. This file owns the message in which they travel; how it travels is the caller's.
Shapes: N rows, R ranks that are joined.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from .errors import RankFailed, SpecError
from .order import lanes_of, rows_of_lanes

Exchange = Callable[[np.ndarray], Sequence[np.ndarray]]
"""Gives this rank's bytes to the other ranks and returns the bytes of all; see `Gather.channel`."""

_HEADER = struct.Struct("<3q32s456s")
"""Begins a message, 512 bytes: epoch, first row and end of the batch, digest of the stream, error in UTF-8."""
_ALIGNED = 64


class Gather(Protocol):
    """How some ranks of a world exchange rows; `Dataset.stream(gather=...)` uses it.

    A stream calls `channel` once, when it is made; a mix or aligned datasets have a stream for each part.
    All ranks make the same streams in the same order, from the same state, and leave a loop after the same
    batch. A stream exchanges one batch ahead of its consumer, so leaving a loop waits for one exchange more.
    """

    @property
    def ranks(self) -> Sequence[int]:
        """The ranks whose rows are joined, ascending; the stream's own is among them."""

    def channel(self) -> Exchange:
        """An exchange of its own for one stream.

        It is called once a batch, in the same order on all ranks, from one background thread at a time, which
        is not that of another channel. It takes this rank's bytes, a contiguous uint8 [n], the same n on all
        ranks, which nobody writes to afterwards. It returns one uint8 [n] for each of `ranks`, in their order,
        which it does not write to afterwards.

        It must not wait for ever: when a rank is gone, when the group is closed or after a time limit, the
        calls under way and all later ones raise. The error reaches the consumer at the batch that needs the rows.
        """


def check_ranks(ranks: Sequence[int], rank: int, world_size: int) -> None:
    """See that the ranks to be joined are those of a world, and the stream's own among them.

    Raises:
        SpecError: they are not.
    """
    if list(ranks) != sorted(set(ranks)) or not set(ranks) <= set(range(world_size)) or rank not in ranks:
        raise SpecError(
            f"gather joins ranks {list(ranks)} of world_size {world_size} on rank {rank}; wanted ranks below "
            f"{world_size} in ascending order, {rank} among them"
        )


@dataclass(frozen=True, eq=False)
class _Shares:
    """How the rows of a batch lie among the ranks; the same for batches of one size that begin at one lane."""

    n_rows: int
    """Rows of all ranks together."""
    at_R: list[np.ndarray]
    """Where the rows of each rank go among the joined ones: int64 [its rows]."""
    begins: dict[str, int]
    """Where the rows of each array begin in a message."""
    size_bytes: int
    """A whole message, with room for the largest share."""


class Gathering:
    """The rows of several ranks, joined batch by batch for one stream.

    Args:
        gather: who exchanges, and how.
        rank, world_size, lanes: of the stream.
        arrays: "dtype" and shape of a "row" of each array, by name; the same on all ranks.
    """

    def __init__(
        self,
        gather: Gather,
        rank: int,
        world_size: int,
        lanes: int,
        arrays: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._ranks, self._rank, self._n_lanes = list(gather.ranks), rank, lanes
        self._lanes_R = [lanes_of(r, world_size, lanes) for r in self._ranks]
        self.lanes = sorted(lane for lanes in self._lanes_R for lane in lanes)
        self._arrays = {name: (array["dtype"], tuple(array["row"])) for name, array in arrays.items()}
        self._shares = lru_cache(maxsize=8)(self._shares_of)
        self._exchange = gather.channel()

    def rows(
        self,
        epoch: int,
        begin: int,
        end: int,
        stream_digest: str,
        read: Callable[[dict[str, np.ndarray]], None],
    ) -> dict[str, np.ndarray]:
        """The rows of all ranks among global rows [begin, end) of an epoch, in global order, by array.

        Args:
            epoch, begin, end: the batch.
            stream_digest: sha256 in hexadecimal digits of what the stream serves, to be the same on all ranks.
            read: fills arrays, by name, with this rank's rows of the batch.

        Raises:
            RankFailed: another rank could not read its rows.
            SpecError: another rank is at another batch or of another stream.
        """
        shares = self._shares(begin % self._n_lanes, end - begin)
        message = np.empty(shares.size_bytes, np.uint8)
        here = (epoch, begin, end, bytes.fromhex(stream_digest))
        try:
            read(self._views(message, shares, self._ranks.index(self._rank)))
        except Exception as err:  # the others wait for this rank's message
            _HEADER.pack_into(message.data, 0, *here, _cut(f"{type(err).__name__}: {err}"))
            self._received(message)
            raise
        _HEADER.pack_into(message.data, 0, *here, b"")
        messages = self._received(message)
        self._check(messages, here)
        return self._joined(messages, shares)

    def _shares_of(self, first_lane: int, n: int) -> _Shares:
        """Shares of the batch of `n` rows that begins at a lane."""
        end = first_lane + n
        row_N = rows_of_lanes(first_lane, end, self._n_lanes, self.lanes)
        at_R = [
            np.searchsorted(row_N, rows_of_lanes(first_lane, end, self._n_lanes, lanes))
            for lanes in self._lanes_R
        ]
        largest = max(map(len, at_R))
        begins, at = {}, _HEADER.size
        for name, (dtype, row) in self._arrays.items():
            begins[name] = at
            at += _rounded_up(largest * dtype.itemsize * int(np.prod(row, dtype=np.int64)))
        return _Shares(len(row_N), at_R, begins, at)

    def _views(self, message: np.ndarray, shares: _Shares, i: int) -> dict[str, np.ndarray]:
        """The rows of the i-th rank in its message, by array."""
        n, out = len(shares.at_R[i]), {}
        for name, (dtype, row) in self._arrays.items():
            size = n * dtype.itemsize * int(np.prod(row, dtype=np.int64))
            begin = shares.begins[name]
            out[name] = message[begin : begin + size].view(dtype).reshape(n, *row)
        return out

    def _received(self, message: np.ndarray) -> list[np.ndarray]:
        """The messages of all ranks, for this rank's."""
        messages = [np.asarray(m) for m in self._exchange(message)]
        if [(m.dtype, m.shape) for m in messages] != [(message.dtype, message.shape)] * len(self._ranks):
            raise SpecError(
                f"the exchange returned {[f'{m.dtype} {list(m.shape)}' for m in messages]}; wanted uint8 "
                f"[{len(message)}] for each of the ranks {self._ranks}. Mend `Gather.channel`"
            )
        return [np.ascontiguousarray(m) for m in messages]

    def _check(self, messages: Sequence[np.ndarray], here: tuple[int, int, int, bytes]) -> None:
        """See that every rank has read the same batch of the same stream."""
        found = [_HEADER.unpack_from(m.data) for m in messages]
        for rank, (epoch, begin, end, _, error) in zip(self._ranks, found, strict=True):
            if text := error.rstrip(b"\0").decode(errors="replace"):
                raise RankFailed(
                    f"rank {rank} could not read its part of rows {begin} to {end} of epoch {epoch}: {text}"
                )
        for rank, (epoch, begin, end, digest, _) in zip(self._ranks, found, strict=True):
            if (epoch, begin, end, digest) != here:
                what = "another stream" if digest != here[3] else "the same stream"
                raise SpecError(
                    f"rank {rank} reads rows {begin} to {end} of epoch {epoch} of {what}, rank {self._rank} rows "
                    f"{here[1]} to {here[2]} of epoch {here[0]}; open one stream on all ranks, from the same state"
                )

    def _joined(self, messages: Sequence[np.ndarray], shares: _Shares) -> dict[str, np.ndarray]:
        """All ranks' rows in global order, by array."""
        out = {name: np.empty((shares.n_rows, *row), dtype) for name, (dtype, row) in self._arrays.items()}
        for i, message in enumerate(messages):
            for name, part in self._views(message, shares, i).items():
                out[name][shares.at_R[i]] = part
        return out


def _rounded_up(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _cut(text: str) -> bytes:
    """As much of a text as a header has room for, in UTF-8."""
    return text.encode()[:456]
