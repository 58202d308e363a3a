"""Storing blocks: ours, an equal one, or a valid one of another writer; never over anybody's bytes.

The store makes an object appear whole or not at all. What it cannot decide is whose bytes hold when
two writers differ (another zstd version, another kernel): the first valid shard does, and who comes
later quantises and measures against it. Specified in docs/format.md, "Commit protocol".
Shapes: N rows, D = d_in.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .codec import Calibration
from .errors import Conflict, CorruptObject
from .layout import array_layout, sequences_per_shard
from .manifest import BlockRecord, ObjectRecord
from .shard import Chunks, chunk_checksums, decode_shard, encode_shard, index_size, parse_index, shard_key
from .statistics import Statistics
from .store import Store

if TYPE_CHECKING:
    from .corpus import TokenStore
    from .harvester import BlockPlan

log = logging.getLogger(__name__)

OTHER_ROOT = "use another root, or delete that object and run again"


@dataclass(frozen=True, eq=False)
class Shard:
    """A shard as it is stored."""

    key: str
    data: bytes
    chunks: Chunks
    rows: np.ndarray
    ours: bool
    """Whether this call created it; if not, equal or adopted bytes were there."""


def create_shard(store: Store, path: str, shard: int, values: np.ndarray, array: Mapping[str, Any]) -> Shard:
    """Store one shard of the array at `path`; returns what is stored then.

    Another writer's valid shard is adopted; a torn one, which only damage from outside can leave, is
    replaced, unless it has changed since it was read.

    Args:
        array: an entry of `layout.array_layout` (chunk_rows, shard_rows, fill, by_column).
    """
    data, chunks = _encode(values, array)
    key = shard_key(path, shard, values.ndim)
    try:
        created = store.create(key, data)
    except Conflict:
        found = store.read(key)
        try:
            return _adopt(store, key, found, values, array)
        except CorruptObject as err:
            log.warning("%s; writing it again", err)
            if not store.swap(key, found, data):  # another writer was first to repair it: look again
                return create_shard(store, path, shard, values, array)
            created = True
    return Shard(key, data, chunks, values, created)


def _encode(values: np.ndarray, array: Mapping[str, Any]) -> tuple[bytes, Chunks]:
    fill = np.nan if array["fill"] == "NaN" else array["fill"]
    return encode_shard(values, array["chunk_rows"], array["shard_rows"], fill, array["by_column"])


def _encoded(values: np.ndarray, array: Mapping[str, Any]) -> bytes:
    return _encode(values, array)[0]


def _in_turn(work: Callable[[str], None], keys: Sequence[str]) -> None:
    for key in keys:
        work(key)


def create_exact_shard(
    store: Store, path: str, shard: int, values: np.ndarray, array: Mapping[str, Any]
) -> Shard:
    """As `create_shard`, for values that do not depend on who computes them.

    Raises:
        Conflict: a valid shard with other values is there; it stays.
    """
    stored = create_shard(store, path, shard, values, array)
    if not np.array_equal(stored.rows, values):
        raise Conflict(
            f"{store.url}/{stored.key} holds other values than this run computes. "
            f"It is left as it is: {OTHER_ROOT}"
        )
    return stored


def _adopt(store: Store, key: str, data: bytes, values: np.ndarray, array: Mapping[str, Any]) -> Shard:
    where = f"{store.url}/{key}"
    chunk_shape = (array["chunk_rows"], *values.shape[1:])
    stored = decode_shard(
        data, len(values), chunk_shape, array["shard_rows"], values.dtype, where, array["by_column"]
    )
    n_chunks = array["shard_rows"] // array["chunk_rows"]
    chunks = parse_index(data[-index_size(n_chunks) :], n_chunks, where)
    return Shard(key, data, chunks, stored, ours=False)


class BlockCommit:
    """One block on its way into the store: `scale` of every site, `codes`, `tokens`, then `record`.

    A site's scale is stored before its codes are, and holds from then on for every writer of the block:
    so codes belong to the scales beside them, whoever stored either. Sites, and the writes of `tokens`,
    may go in several threads.
    """

    def __init__(
        self,
        store: Store,
        identity: Mapping[str, Any],
        plan: "BlockPlan",
        widths: Mapping[str, int],
        each: Callable[[Callable[[str], None], Sequence[str]], Any] | None = None,
    ) -> None:
        """Args:
        each: calls a function on each of some keys, side by side; one after the other if None.
        """
        self._each = each or _in_turn
        self._store, self._identity, self._plan = store, identity, plan
        self._layout = array_layout(identity, widths)
        self._objects: list[ObjectRecord] = []
        self._stored: dict[str, Callable[[], bytes]] = {}
        """By key: what gives the bytes again of each object of the block."""

    def scale(self, site: str, scale_N: np.ndarray, step: float) -> np.ndarray:
        """Store the scales of a site's rows; returns those that hold.

        Raises:
            Conflict: others are there that no kernel's rounding explains.
        """
        path = f"{site}/scale"
        stored = create_shard(self._store, self._path(path), self._plan.block, scale_N, self._layout[path])
        if stored.rows is not scale_N:
            _check_scales(stored.rows, scale_N, step, f"{self._store.url}/{stored.key}")
        self._note(path, self._plan.block, stored)
        return stored.rows

    @property
    def size_bytes(self) -> int:
        """Of the objects so far."""
        return sum(o.size_bytes for o in self._objects)

    def codes(self, site: str, codes_ND: np.ndarray) -> np.ndarray:
        """Store a site's codes; returns those that hold: these, or what another run stored."""
        path = f"{site}/codes"
        stored = create_shard(self._store, self._path(path), self._plan.block, codes_ND, self._layout[path])
        self._note(path, self._plan.block, stored)
        return codes_ND if np.array_equal(stored.rows, codes_ND) else stored.rows

    def tokens(self, tokens: "TokenStore") -> list[Callable[[], None]]:
        """What stores which token each row is, and the `input_ids` that this block brings, array by array."""
        plan, layout = self._plan, self._layout
        writes: list[Callable[[], None]] = []
        sequence_N, position_N = np.nonzero(plan.chosen_ST)
        for name, natural in (
            ("token_id", plan.input_ids_ST[plan.chosen_ST]),
            ("sequence", sequence_N + plan.first_sequence),
            ("position", position_N),
        ):
            values = np.empty(plan.n_rows, layout[name]["dtype"])
            values[plan.place_N] = natural
            writes.append(partial(self._exact, name, plan.block, values))
        for shard, arrays in self._sequence_shards(tokens):
            for name, values in arrays.items():
                writes.append(partial(self._exact, name, shard, values.astype(layout[name]["dtype"])))
        return writes

    def record(self, statistics: Mapping[str, Statistics]) -> BlockRecord:
        """Commit the block; returns the record that holds: this one, or that of who was first.

        Then every object of the block is looked for once more and written again if it is gone: a collector that saw no
        record of it may have removed it meanwhile, however long the block took.
        """
        plan, place = self._plan, {self._path(path): i for i, path in enumerate(self._layout)}
        objects = tuple(sorted(self._objects, key=lambda o: (place[o.path], o.shard)))
        record = BlockRecord(plan.split, plan.block, plan.n_rows, plan.last_sequence, objects, statistics)
        data = record.to_json()
        try:
            self._store.create(record.key, data)
        except Conflict:
            record = self._other_record(record, data)
        self._each(self._look_again, list(self._stored))
        return record

    def _look_again(self, key: str) -> None:
        if not self._store.exists(key):
            log.warning(
                "%s/%s vanished while its block was committed; writing it again", self._store.url, key
            )
            self._store.create(key, self._stored[key]())

    def _other_record(self, ours: BlockRecord, data: bytes) -> BlockRecord:
        """What another harvester committed; ours (`data`) in place of a damaged record."""
        found = self._store.read(ours.key)
        try:
            return BlockRecord.from_json(found, ours.key)
        except CorruptObject as err:
            log.warning("%s/%s", self._store.url, err)
            if not self._store.swap(ours.key, found, data):  # another writer was first to repair it
                return self._other_record(ours, data)
            return ours

    def _path(self, path: str) -> str:
        return f"{self._plan.split}/{path}"

    def _exact(self, path: str, shard: int, values: np.ndarray) -> None:
        stored = create_exact_shard(self._store, self._path(path), shard, values, self._layout[path])
        self._note(path, shard, stored)

    def _note(self, path: str, number: int, shard: Shard) -> None:
        offsets, sizes = zip(*shard.chunks, strict=True)
        checksums = tuple(chunk_checksums(shard.data, shard.chunks))
        rows = shard.rows
        constant = float(rows[0]) if path.endswith("/scale") and (rows == rows[0]).all() else None
        self._objects.append(
            ObjectRecord(self._path(path), number, len(shard.data), offsets, sizes, checksums, constant)
        )
        # bytes that another writer encoded may not come out again; ours do, and need not be kept meanwhile
        array = self._layout[path]
        again = partial(_encoded, rows, array) if shard.ours else partial(bytes, shard.data)
        self._stored[shard.key] = again

    def _sequence_shards(self, tokens: "TokenStore") -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """The shards by sequence that this block writes: those whose first sequence has its first row here."""
        plan, per_shard = self._plan, sequences_per_shard(self._identity)
        row_start = tokens.row_start(plan.split)
        begin = int(np.searchsorted(row_start, plan.block * self._identity["block_rows"], side="left"))
        for shard in range(-(-begin // per_shard), -(-plan.last_sequence // per_shard)):
            first = shard * per_shard
            last = min(first + per_shard, tokens.n_sequences(plan.split))
            input_ids_ST, length_S = tokens.sequences(plan.split, first, last)
            documents = tokens.documents(plan.split, first, last)
            yield shard, {"input_ids": input_ids_ST, "length": length_S, **documents}


def check_adopted(statistics: Statistics, calibration: Calibration, what: str) -> None:
    """Refuse codes that are of other rows: kernels differ by rounding, other rows by their variance.

    Raises:
        Conflict: the squared error exceeds a quarter of the variance (other rows give twice it).
    """
    step2 = float(np.sum(np.broadcast_to(calibration.step2_D, statistics.mean_D.shape)))
    allowed = 0.25 * float(statistics.m2_D.sum()) + statistics.n_rows * step2
    if statistics.sse > allowed:
        raise Conflict(
            f"{what}: the codes that are stored are of other rows (squared error {statistics.sse:.3g}, at most "
            f"{allowed:.3g} by rounding). They are left as they are: {OTHER_ROOT}"
        )


def _check_scales(stored_N: np.ndarray, ours_N: np.ndarray, step: float, where: str) -> None:
    """Another kernel's rounding moves a row at the edge of int8 by one power of two, no more.

    Raises:
        Conflict: a scale is not `step` times a power of two, or not within a factor 2 of ours.
    """
    with np.errstate(all="ignore"):
        mantissa_N, exponent_N = np.frexp(stored_N / np.float32(step))
    good_N = (mantissa_N == 0.5) & (exponent_N >= 1) & (stored_N <= 2 * ours_N) & (ours_N <= 2 * stored_N)
    if not good_N.all():
        row = int(np.flatnonzero(~good_N)[0])
        raise Conflict(
            f"{where} holds the scale {stored_N[row]} for row {row}; this run takes {ours_N[row]} (step {step}) "
            f"and rounding makes that twice or half of it at most. It is left as it is: {OTHER_ROOT}"
        )
