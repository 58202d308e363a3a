"""An SAE read from a checkpoint is the one that a restored run would finish with at that moment."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import sae
from actcache.errors import CorruptObject
from sae import snapshots
from sae.checkpoint import StoredCheckpoint
from sae.checkpoint_writer import Piece
from sae.snapshots import load_checkpoint
from sae.train import Trainer

CONFIGS = [
    sae.Standard(d_sae=32, l1_coefficient=1.0),  # decoder rows of any norm
    sae.Gated(d_sae=32, l1_coefficient=0.5),
    sae.JumpReLU(d_sae=32, target_l0=4),
    sae.TopK(d_sae=32, k=4, optimiser=sae.Optimiser(ema_decay=0.9)),
    sae.BatchTopK(d_sae=32, k=4),
    sae.Matryoshka(d_sae=32, k=4),
]
TRAINING = sae.Training(n_rows=3000, checkpoint_every_rows=1000, dead_after_rows=500)


class Interrupted(Exception):
    pass


class Breaking(sae.ArrayStream):
    """Ends its run by an error in the batch after these rows."""

    after = 1200

    def __iter__(self) -> Iterator:
        served = 0
        for batch in super().__iter__():
            if served >= self.after:
                raise Interrupted
            served += len(batch)
            yield batch


def _stream() -> Breaking:
    rng = np.random.default_rng(0)
    rows = rng.standard_t(4, (1000, 12)) @ rng.standard_normal((12, 12))
    return Breaking(rows.astype(np.float32), batch_size=200, epochs=3)


def _trainer(out: Path | str) -> Trainer:
    return Trainer(_stream(), CONFIGS, TRAINING, start=[None] * len(CONFIGS), out=out)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("snapshots") / "run"
    with pytest.raises(Interrupted):
        sae.train(_stream(), CONFIGS, TRAINING, out=out)
    return out


def test_it_is_to_the_bit_what_the_restored_run_would_save(interrupted: Path) -> None:
    trainer = _trainer(interrupted)
    assert trainer.open(resume=True) is None
    for i, name in enumerate(trainer.names):
        wanted = trainer._finished(i)
        found = load_checkpoint(interrupted, name)
        assert wanted is not None
        assert found.cfg["rows"] == 1000
        assert found.cfg == wanted.cfg
        assert found.state_dict().keys() == wanted.state_dict().keys()
        for key, tensor in wanted.state_dict().items():
            assert torch.equal(found.state_dict()[key], tensor), (name, key)
        assert load_checkpoint(interrupted, name, 1000).digest() == wanted.digest()


def test_reading_one_leaves_the_run_as_it_is(interrupted: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in interrupted.rglob("*")}
    load_checkpoint(interrupted, "gated-32-0.5")
    assert {p: p.stat().st_mtime_ns for p in interrupted.rglob("*")} == before


def test_it_may_lie_in_parts_of_several_ranks(interrupted: Path, tmp_path: Path) -> None:
    trainer, other = _trainer(interrupted), _trainer(tmp_path)
    trainer.open(resume=True)
    other.open(resume=True)
    assert other.directory is not None
    parts = []
    for rank in range(2):
        writer = other.directory.checkpoint_writer(rank, 2, "a1")
        writer.begin(_half(trainer.learners.pieces(), rank), trainer.rows)
        part = writer.wait()
        assert part is not None
        parts.append(part)
    other.directory.complete_checkpoint(1000, trainer._state(), parts)
    for name in trainer.names:
        assert load_checkpoint(tmp_path, name).digest() == load_checkpoint(interrupted, name).digest()


def _half(pieces: dict[str, Piece], rank: int) -> dict[str, Piece]:
    """What one of two ranks would write of these."""
    found = {}
    for name, piece in pieces.items():
        n = piece.whole
        if n is not None:
            own = slice(rank * n // 2, (rank + 1) * n // 2)
            found[name] = Piece(piece.tensor[own], own.start, n)
        elif rank == 0:
            found[name] = piece
    return found


def test_of_a_finished_run_it_is_the_sae_itself(tmp_path: Path) -> None:
    training = dataclasses.replace(TRAINING, n_rows=1000)
    (s,) = sae.train(_stream(), CONFIGS[:1], training, out=tmp_path)
    assert load_checkpoint(tmp_path, "standard-32-1").digest() == s.digest()
    assert load_checkpoint(tmp_path, "standard-32-1", 1000).digest() == s.digest()
    with pytest.raises(
        FileNotFoundError, match="has no checkpoint after 600 rows, or not any more; try again"
    ):
        load_checkpoint(tmp_path, "standard-32-1", 600)


def test_what_is_not_there_is_said(interrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no run.json; give the directory of a run"):
        load_checkpoint(tmp_path, "topk-32-4")
    with pytest.raises(FileNotFoundError, match="trains no SAE 'topk-9-9'; it trains standard-32-1, gated"):
        load_checkpoint(interrupted, "topk-9-9")
    with pytest.raises(FileNotFoundError, match="has no checkpoint after 2,000 rows, or not any more"):
        load_checkpoint(interrupted, "topk-32-4", 2000)
    trainer = _trainer(tmp_path / "new")
    trainer.open(resume=True)
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet; try again once it has one"):
        load_checkpoint(tmp_path / "new", "topk-32-4")


def test_a_checkpoint_that_is_replaced_as_it_is_read_is_gone_and_a_damaged_one_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted):
        sae.train(_stream(), CONFIGS[:1], TRAINING, out=tmp_path)
    (part,) = tmp_path.glob("checkpoints/*/part-*")
    part.unlink()
    with pytest.raises(CorruptObject, match="is missing"):
        load_checkpoint(tmp_path, "standard-32-1")

    class Replaced(snapshots.Checkpoints):
        """The checkpoint goes once its description is read."""

        def newest(self) -> StoredCheckpoint | None:
            found = super().newest()
            for done in tmp_path.glob("checkpoints/*/done.json"):
                done.unlink()
            return found

    monkeypatch.setattr(snapshots, "Checkpoints", Replaced)
    with pytest.raises(FileNotFoundError, match="has no checkpoint after 1,000 rows, or not any more"):
        load_checkpoint(tmp_path, "standard-32-1")
