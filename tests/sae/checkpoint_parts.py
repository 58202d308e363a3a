"""Parts of checkpoints of a few small tensors, written by any number of ranks.

Shapes: F rows of a tensor, D numbers a row.
"""

import json

import torch
from torch import Tensor

from actcache.store import Store
from sae.checkpoint import PartInfo, StoredCheckpoint
from sae.checkpoint_folder import Checkpoints
from sae.checkpoint_writer import CheckpointWriter, Piece

STATE = {"step": 3, "saes": [{"threshold": 0.1}]}


def some_tensors(n_rows: int = 37, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "W_FD": torch.randn(n_rows, 5, generator=g),
        "half_FD": torch.randn(n_rows, 3, generator=g).bfloat16(),
        "fired_F": torch.randint(0, 99, (n_rows,), generator=g),
        "flags_F": torch.rand(n_rows, generator=g) > 0.5,
        "step": torch.tensor(7.0),
        "generator": torch.arange(9, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
    }


def pieces_of(tensors: dict[str, Tensor], rank: int, world: int) -> dict[str, Piece]:
    """Tensors of `_tensors` over ranks: rows of those with a row each latent, the others from rank 0."""
    n_rows = len(tensors["W_FD"])
    first, stop = rank * n_rows // world, (rank + 1) * n_rows // world
    sharded = {
        n: Piece(t[first:stop], first, n_rows) for n, t in tensors.items() if n.endswith(("_FD", "_F"))
    }
    alone = {n: Piece(t) for n, t in tensors.items() if n not in sharded}
    return sharded | (alone if rank == 0 else {})


def write_parts(store: Store, tensors: dict[str, Tensor], rows: int, world: int = 1) -> list[PartInfo]:
    parts = []
    for rank in range(world):
        writer = CheckpointWriter(store, rank, world)
        writer.begin(pieces_of(tensors, rank, world), rows)
        part = writer.wait()
        assert part is not None
        parts.append(json.loads(json.dumps(part)))  # as it travels to rank 0
    return parts


def stored_checkpoint(
    store: Store, tensors: dict[str, Tensor], rows: int = 100, world: int = 1
) -> StoredCheckpoint:
    Checkpoints(store).complete(rows, STATE, write_parts(store, tensors, rows, world))
    found = Checkpoints(store).newest()
    assert found is not None
    return found


def equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
