"""Creating shards: ours, an equal one, or a valid one of another writer; never over anybody's bytes.

The store makes an object appear whole or not at all. What it cannot decide is whose bytes hold when
two writers differ (another zstd version, another kernel): the first valid shard does.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import Conflict, CorruptObject
from .shard import Chunks, decode_shard, encode_shard, index_size, parse_index, shard_key
from .store import Store


def create_shard(
    store: Store, path: str, shard: int, values: np.ndarray, array: Mapping[str, Any]
) -> tuple[bytes, Chunks, np.ndarray]:
    """Store one shard of the array at `path`; returns its bytes, chunk table and rows as they are stored.

    Another writer's valid shard is adopted; a torn one, which only damage from outside can leave, is
    removed and written again.

    Args:
        array: an entry of `layout.array_layout` (chunk_rows, shard_rows, fill, by_column).
    """
    fill = np.nan if array["fill"] == "NaN" else array["fill"]
    data, chunks = encode_shard(values, array["chunk_rows"], array["shard_rows"], fill, array["by_column"])
    key = shard_key(path, shard, values.ndim)
    try:
        store.create(key, data)
    except Conflict:
        try:
            return _adopt(store, key, values, array)
        except CorruptObject:
            store.delete(key)
            store.create(key, data)
    return data, chunks, values


def create_exact_shard(
    store: Store, path: str, shard: int, values: np.ndarray, array: Mapping[str, Any]
) -> tuple[bytes, Chunks]:
    """As `create_shard`, for values that do not depend on who computes them.

    Raises:
        Conflict: a valid shard with other values is there; it stays.
    """
    data, chunks, stored = create_shard(store, path, shard, values, array)
    if not np.array_equal(stored, values):
        raise Conflict(
            f"{store.url}/{shard_key(path, shard, values.ndim)} holds other values than this run computes. "
            "It is left as it is: use another root, or delete that object and run again"
        )
    return data, chunks


def _adopt(
    store: Store, key: str, values: np.ndarray, array: Mapping[str, Any]
) -> tuple[bytes, Chunks, np.ndarray]:
    data = store.read(key)
    chunk_shape = (array["chunk_rows"], *values.shape[1:])
    where = f"{store.url}/{key}"
    stored = decode_shard(
        data, len(values), chunk_shape, array["shard_rows"], values.dtype, where, array["by_column"]
    )
    n_chunks = array["shard_rows"] // array["chunk_rows"]
    return data, parse_index(data[-index_size(n_chunks) :], n_chunks, where), stored
