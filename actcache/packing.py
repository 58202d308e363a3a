"""Packing documents into sequences, and shuffling sequences that do not fit in memory.

A `Packer` cuts one split's documents into fixed-size records, each a sequence with its length and
the documents in it; a `Spill` keeps records on local disk and serves them in another order.
Specified in docs/format.md, "Token store".
Shapes: S sequences, T = context_size, M documents.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_BUCKET_BYTES = 32 * 2**20
"""Records that are gathered, and that are scattered, at a time: two such pieces are held."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """How token ids are stored."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def sequence_dtype(context_size: int, token: np.dtype[Any]) -> np.dtype[Any]:
    """One packed sequence: the arrays of the token store side by side, `document_begins` as bits."""
    return np.dtype(
        [
            ("input_ids", token, (context_size,)),
            ("length", "<u4"),
            ("document", "<i8"),
            ("document_offset", "<u4"),
            ("document_begins", "u1", (-(-context_size // 8),)),
        ]
    )


def position_ids(document_begins_ST: np.ndarray) -> np.ndarray:
    """int64 [S, T]: positions that start again at 0 where a document begins."""
    at_T = np.arange(document_begins_ST.shape[1])
    return at_T - np.maximum.accumulate(np.where(document_begins_ST, at_T, 0), axis=1)


def document_places(
    sequence_N: np.ndarray,
    position_N: np.ndarray,
    document_S: np.ndarray,
    offset_S: np.ndarray,
    begins_ST: np.ndarray,
    tokens_identity: Mapping[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
    """Document number and token offset in it, int64 [N], of the tokens at `position_N` of `sequence_N`.

    The arrays by sequence are those that are stored.
    """
    head = 0 if tokens_identity["bos_token_id"] is None else 1
    inner = head if tokens_identity["packing"] != "concat" else 0  # BOS before each document, or sequence
    at_T = np.arange(begins_ST.shape[1], dtype=np.int32)
    document_N, offset_N = np.empty(len(position_N), np.int64), np.empty(len(position_N), np.int64)
    for start in range(0, len(position_N), step := max(1, 2**22 // len(at_T))):
        part = slice(start, start + step)
        sequence, position = sequence_N[part], position_N[part].astype(np.int64)
        begins_NT = begins_ST[sequence].astype(bool) & (at_T <= position[:, None])
        later = begins_NT.any(axis=1)
        document_N[part] = document_S[sequence] + begins_NT.sum(axis=1)
        last = np.where(begins_NT, at_T, 0).max(axis=1)
        from_first = offset_S[sequence].astype(np.int64) + position - head
        offset_N[part] = np.where(later, position - last - inner, from_first)
    return document_N, offset_N


class Packer:
    """Packs the documents of one split, in order; `take` gives the sequences that are whole.

    A sequence is a run of the split's documents: it names the document of its first own token, that
    token's offset in it, and where others begin.
    """

    def __init__(self, tokens_identity: Mapping[str, Any]) -> None:
        self._packing = tokens_identity["packing"]
        self._context_size = tokens_identity["context_size"]
        self._bos, self._eos = tokens_identity["bos_token_id"], tokens_identity["eos_token_id"]
        self._head = 0 if self._bos is None else 1
        self._width = self._context_size - self._head
        self._token = token_dtype(tokens_identity["vocab_size"])
        self.dtype = sequence_dtype(self._context_size, self._token)
        self.n_documents = 0
        self.n_tokens = 0
        """Own tokens (without BOS) put into sequences."""
        self.n_tokens_cut = 0
        """Tokens past the end of `single` sequences, which are in none."""
        self._offset = 0
        """Of the first pending token in its document (concat)."""
        self._pending: list[np.ndarray] = []
        """Documents of sequences to come (concat), or those of the open sequence."""
        self._waiting = 0
        """Tokens pending (concat); positions used in the open sequence, BOS included (isolated)."""
        self._open = (0, 0)
        """Document and offset of the open sequence's first token."""
        self._closed: list[tuple[tuple[int, int], list[np.ndarray]]] = []

    def add(self, ids_N: np.ndarray) -> None:
        """Pack one document of one token or more."""
        assert len(ids_N)
        ids_N = ids_N.astype(self._token)
        number = self.n_documents
        self.n_documents += 1
        if self._packing == "concat":
            self._pending.append(ids_N)
            self._waiting += len(ids_N)
            self.n_tokens += len(ids_N)
        elif self._packing == "single":
            self._closed.append(((number, 0), [ids_N[: self._width]]))
            self.n_tokens += min(len(ids_N), self._width)
            self.n_tokens_cut += max(0, len(ids_N) - self._width)
        else:
            self.n_tokens += len(ids_N)
            for at in range(0, len(ids_N), self._width):
                piece = ids_N[at : at + self._width]
                if self._waiting + self._head + len(piece) > self._context_size:
                    self._close()
                if not self._pending:
                    self._open = (number, at)
                self._pending.append(piece)
                self._waiting += self._head + len(piece)

    def take(self, last: bool = False) -> np.ndarray:
        """The sequences that are whole by now, as records of `dtype`; the rest too if it is the `last` call."""
        if self._packing == "concat":
            return self._take_runs(last)
        if last and self._pending:
            self._close()
        return self._take_closed()

    def ready(self) -> int:
        """About how many sequences `take` would give."""
        return self._waiting // self._width if self._packing == "concat" else len(self._closed)

    def _close(self) -> None:
        self._closed.append((self._open, self._pending))
        self._pending, self._waiting = [], 0

    def _blank(self, n: int) -> np.ndarray:
        """n records of padding."""
        records_S = np.zeros(n, self.dtype)
        records_S["input_ids"] = 0 if self._eos is None else self._eos
        return records_S

    def _take_runs(self, last: bool) -> np.ndarray:
        """Runs of `width` tokens of the joined documents, behind a BOS where there is one."""
        width, head = self._width, self._head
        n = -(-self._waiting // width) if last else self._waiting // width
        if not n:
            return self._blank(0)
        tokens = np.concatenate(self._pending)
        used = min(n * width, len(tokens))
        start_M = np.cumsum([0, *map(len, self._pending)])
        records_S = self._blank(n)
        body = np.full(n * width, self._eos, self._token)
        body[:used] = tokens[:used]
        records_S["input_ids"][:, head:] = body.reshape(n, width)
        if head:
            records_S["input_ids"][:, 0] = self._bos
        records_S["length"] = self._context_size
        records_S["length"][-1] = used - (n - 1) * width + head
        at_S = np.arange(n) * width
        number_S = np.searchsorted(start_M, at_S, side="right") - 1
        first = self.n_documents - len(self._pending)
        records_S["document"] = first + number_S
        records_S["document_offset"] = at_S - start_M[number_S] + np.where(number_S == 0, self._offset, 0)
        begins = np.zeros(n * width, bool)
        begins[start_M[start_M < used]] = True
        begins_ST = np.zeros((n, self._context_size), bool)
        begins_ST[:, head + 1 :] = begins.reshape(n, width)[:, 1:]  # the first token's is `document`
        records_S["document_begins"] = np.packbits(begins_ST, axis=1)
        # what is left: the rest of one document, then whole ones
        left = int(np.searchsorted(start_M, used, side="right")) - 1
        if left < len(self._pending):
            offset = used - int(start_M[left])
            rest = self._pending[left][offset:]
            self._offset = offset + (self._offset if left == 0 else 0)
            self._pending = [rest, *self._pending[left + 1 :]]
        else:
            self._offset, self._pending = 0, []
        self._waiting -= used
        return records_S

    def _take_closed(self) -> np.ndarray:
        """One record a closed sequence: its documents one after the other, each behind a BOS."""
        records_S = self._blank(len(self._closed))
        begins_ST = np.zeros((len(self._closed), self._context_size), bool)
        for i, ((document, offset), pieces) in enumerate(self._closed):
            ids_T, at = records_S["input_ids"][i], 0
            for number, piece in enumerate(pieces):
                begins_ST[i, at] = number > 0
                if self._head:
                    ids_T[at] = self._bos
                    at += 1
                ids_T[at : at + len(piece)] = piece
                at += len(piece)
            records_S["length"][i] = at
            records_S["document"][i], records_S["document_offset"][i] = document, offset
        records_S["document_begins"] = np.packbits(begins_ST, axis=1)
        self._closed = []
        return records_S


class Spill:
    """Fixed-size records in a file, in the order they came, then served in any other.

    Memory: two pieces of 32 MiB (one shard at least), and while the order is applied 4 bytes a
    record beside the order's own 8. Disk: the records twice while they are scattered.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path, self._dtype = path, dtype
        self.n = 0

    def append(self, records_S: np.ndarray) -> None:
        """Keep records after those that are there."""
        assert records_S.dtype == self._dtype
        with open(self._path, "ab") as file:
            file.write(records_S.view(np.uint8).data)
        self.n += len(records_S)

    def shuffled(self, order_S: np.ndarray, shard_rows: int) -> Iterator[np.ndarray]:
        """Shards of `shard_rows` records: record i of all is the `order_S[i]`-th that came. Once only."""
        size = self._dtype.itemsize
        bucket = max(1, _BUCKET_BYTES // size // shard_rows) * shard_rows
        if self.n > bucket:
            self._scatter(order_S, bucket)
        with open(self._path, "rb") as file:
            for start in range(0, self.n, bucket):
                wanted = order_S[start : start + bucket]
                region = np.fromfile(file, self._dtype, len(wanted))  # in the order they came
                place = np.empty(len(wanted), np.int64)
                place[np.argsort(wanted)] = np.arange(len(wanted))
                for i in range(0, len(wanted), shard_rows):
                    yield region[place[i : i + shard_rows]]
        self._path.unlink()

    def _scatter(self, order_S: np.ndarray, bucket: int) -> None:
        """Rewrite the file so that each bucket's records lie together, in the order they came."""
        size = self._dtype.itemsize
        bucket_S = np.empty(self.n, np.int32)
        for start in range(0, self.n, bucket):
            bucket_S[order_S[start : start + bucket]] = start // bucket
        at_B = np.arange(-(-self.n // bucket)) * bucket
        scattered = self._path.with_suffix(".scattered")
        with open(self._path, "rb") as source, open(scattered, "wb", buffering=0) as target:
            for start in range(0, self.n, bucket):
                piece = np.fromfile(source, self._dtype, min(bucket, self.n - start))
                to_S = bucket_S[start : start + len(piece)]
                by = np.argsort(to_S, kind="stable")
                piece, to_S = piece[by], to_S[by]
                ends = np.flatnonzero(np.diff(to_S, append=-1)) + 1
                for begin, end in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True):
                    to = to_S[begin]
                    target.seek(int(at_B[to]) * size)
                    target.write(piece[begin:end].view(np.uint8).data)
                    at_B[to] += end - begin
        self._path.unlink()
        scattered.rename(self._path)
