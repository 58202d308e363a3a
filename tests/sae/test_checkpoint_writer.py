"""Parts of checkpoints: any ranks write them, any ranks read them, and every byte that is read is checked.

Shapes: F rows of a tensor, D numbers a row.
"""

import json
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_parts import STATE, equal, pieces_of, some_tensors, stored_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from actcache.errors import CorruptObject, FormatError, StoreError
from actcache.store import LocalStore, Store, open_store
from sae import checkpoint, checkpoint_writer
from sae.checkpoint_folder import Checkpoints
from sae.checkpoint_writer import CheckpointWriter, Piece


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a kilobyte has several files, and each several blocks and reads."""
    monkeypatch.setattr(checkpoint_writer, "FILE_BYTES", 300)
    monkeypatch.setattr(checkpoint_writer, "BLOCK_BYTES", 64)
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 64)


@settings(max_examples=15, deadline=None)
@given(
    writers=st.integers(1, 5),
    readers=st.integers(1, 7),
    n_rows=st.integers(1, 20),
    file_bytes=st.integers(1, 2000),
    block_bytes=st.integers(1, 999),
)
def test_what_any_ranks_wrote_any_other_ranks_read_to_the_bit(
    writers: int, readers: int, n_rows: int, file_bytes: int, block_bytes: int
) -> None:
    store, tensors = open_store("memory://parts/any"), some_tensors(n_rows)
    Checkpoints(store).remove()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(checkpoint_writer, "FILE_BYTES", file_bytes)
        m.setattr(checkpoint_writer, "BLOCK_BYTES", block_bytes)
        m.setattr(checkpoint, "BLOCK_BYTES", block_bytes)
        stored = stored_checkpoint(store, tensors, world=writers)
        assert (stored.rows, stored.state) == (100, STATE)
        assert set(stored) == set(tensors)
        for name, tensor in tensors.items():
            assert stored.shape(name) == tuple(tensor.shape)
            assert equal(stored[name], tensor), name
            if tensor.ndim == 0:
                continue
            cuts = [i * len(tensor) // readers for i in range(readers + 1)]
            for first, stop in pairwise(cuts):
                assert equal(stored.read(name, first, stop), tensor[first:stop]), name


def test_a_file_of_a_part_is_a_safetensors_file(tmp_path: Path) -> None:
    tensors = some_tensors()
    stored_checkpoint(LocalStore(tmp_path), tensors)
    (file,) = tmp_path.glob("checkpoints/*/part-*-00000-of-00001-0000.safetensors")
    found = load_file(file)
    assert found.keys() == tensors.keys()
    assert all(equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.usefixtures("small_files")
def test_files_of_a_part_hold_no_more_than_they_should_and_each_is_a_safetensors_file(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(1000.0).reshape(100, 10), "b": torch.arange(5)}
    writer = CheckpointWriter(LocalStore(tmp_path))
    writer.begin({name: Piece(t) for name, t in tensors.items()}, 100)
    writer.wait()
    files = sorted(tmp_path.glob("checkpoints/*/part-*"))
    found = [load_file(file) for file in files]
    assert len(files) > 10
    assert all(sum(t.nbytes for t in held.values()) <= 300 for held in found)
    assert torch.equal(torch.cat([held["a"] for held in found if "a" in held]), tensors["a"])


def test_tensors_may_change_as_soon_as_a_checkpoint_was_begun(tmp_path: Path) -> None:
    held = threading.Event()

    class Waiting(LocalStore):
        def create(self, key: str, data: bytes) -> bool:
            held.wait(30)
            return super().create(key, data)

    store, tensors = Waiting(tmp_path), some_tensors()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    writer = CheckpointWriter(store)
    assert writer.written() is writer.wait() is None
    writer.begin(pieces_of(tensors, 0, 1), 100)
    for tensor in tensors.values():
        tensor.zero_()
    assert writer.busy
    assert writer.written() is None, "the store has not answered"
    held.set()
    part = writer.wait()
    assert part is not None
    assert not writer.busy
    assert writer.written() is None, "a part is given once"
    Checkpoints(store).complete(100, STATE, [part])
    stored = Checkpoints(store).newest()
    assert stored is not None
    assert all(equal(stored[name], before[name]) for name in before)


def test_buffers_are_used_again_and_a_part_of_another_size_is_written_too(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    writer, checkpoints = CheckpointWriter(store), Checkpoints(store)
    buffers = []
    for rows, n_rows in ((100, 37), (200, 37), (300, 20)):
        tensors = some_tensors(n_rows, seed=rows)
        writer.begin(pieces_of(tensors, 0, 1), rows)
        part = writer.wait()
        assert part is not None
        buffers.append([np.frombuffer(b.getvalue(), np.uint8).ctypes.data for b in writer._buffers])
        checkpoints.complete(rows, STATE, [part])
        stored = Checkpoints(store).newest()
        assert stored is not None
        assert stored.rows == rows
        assert all(equal(stored[name], tensors[name]) for name in tensors)
    assert buffers[0] == buffers[1], "the same memory, which was not copied to be written"


def test_a_rank_that_holds_nothing_writes_nothing_and_counts(tmp_path: Path) -> None:
    store, tensors = LocalStore(tmp_path), some_tensors()
    pieces = pieces_of(tensors, 0, 1)
    parts = []
    for rank, given_pieces in enumerate((pieces, {})):
        writer = CheckpointWriter(store, rank, 2)
        writer.begin(given_pieces, 100)
        part = writer.wait()
        assert part is not None
        parts.append(part)
    Checkpoints(store).complete(100, STATE, parts)
    stored = Checkpoints(store).newest()
    assert stored is not None
    assert all(equal(stored[name], tensors[name]) for name in tensors)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("which", ["part", "done"])
def test_a_flipped_bit_anywhere_is_found_and_named(tmp_path: Path, which: str) -> None:
    store, tensors = LocalStore(tmp_path), some_tensors(11)
    stored_checkpoint(store, tensors, world=2)
    rng = np.random.default_rng(0)
    for file in sorted(tmp_path.glob(f"checkpoints/*/{which}*")):
        whole = file.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little") if which == "part" else 0
        for at in rng.choice(np.arange(start, len(whole) - 1), 2, replace=False):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << rng.integers(8)
            file.write_bytes(damaged)
            with pytest.raises((CorruptObject, FormatError)) as caught:
                _read_all(store)
            assert file.name in str(caught.value)
            assert "\n" not in str(caught.value)
            if isinstance(caught.value, CorruptObject):
                assert "restore it from a copy, or remove" in str(caught.value)
        file.write_bytes(whole)
    found = _read_all(store)
    assert all(equal(found[name], tensors[name]) for name in tensors)


def _read_all(store: Store) -> dict[str, Tensor]:
    newest = Checkpoints(store).newest()
    assert newest is not None
    return dict(newest)


def test_a_file_that_is_cut_off_or_missing_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    stored = stored_checkpoint(store, some_tensors())
    (file,) = tmp_path.glob("checkpoints/*/part-*")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptObject, match=rf"{file.name} ends after \d+ of \d+ bytes; restore it"):
        stored.read("generator")
    file.unlink()
    with pytest.raises(CorruptObject, match=rf"{file.name} is missing; restore it from a copy, or remove"):
        stored.read("generator")


def test_rows_and_names_that_a_checkpoint_does_not_have_are_refused(tmp_path: Path) -> None:
    stored = stored_checkpoint(LocalStore(tmp_path), some_tensors())
    with pytest.raises(ValueError, match="rows 3 to 38 of W_FD are asked for; it has 37"):
        stored.read("W_FD", 3, 38)
    with pytest.raises(KeyError, match="W_DF"):
        stored.read("W_DF")
    assert set(stored.under("W_")) == {"FD"}
    assert equal(stored.under("W_")["FD"], stored["W_FD"])


def test_a_store_that_refuses_a_part_leaves_the_checkpoint_before(monkeypatch: pytest.MonkeyPatch) -> None:
    store, tensors = open_store("memory://parts/refuses"), some_tensors()
    stored_checkpoint(store, tensors)
    writer = CheckpointWriter(store)

    def refuse(key: str, data: bytes) -> bool:
        raise StoreError("refused")

    monkeypatch.setattr(store, "create", refuse)
    writer.begin(pieces_of(some_tensors(seed=1), 0, 1), 200)
    with pytest.raises(
        StoreError, match=r"a checkpoint could not be written: refused. The one before is intact"
    ):
        writer.wait()
    newest = Checkpoints(store).newest()
    assert newest is not None
    assert newest.rows == 100
    assert equal(newest["W_FD"], tensors["W_FD"])


HOSTILE = {
    "name": ("../../x.safetensors", "file name"),
    "crc32c": ([], "has 0 checksums"),
    "size_bytes": (3, "can not be at"),
    "tensors": ({"W": {"dtype": "F32", "shape": [-1], "start": 0, "first": 0, "whole": 1}}, "can not be at"),
}


@pytest.mark.parametrize("field", HOSTILE)
def test_a_done_json_that_says_what_can_not_be_is_refused(tmp_path: Path, field: str) -> None:
    store = LocalStore(tmp_path)
    stored_checkpoint(store, some_tensors())
    (file,) = tmp_path.glob("checkpoints/*/done.json")
    found = json.loads(file.read_bytes())
    value, reason = HOSTILE[field]
    found["files"][0][field] = value
    file.write_bytes(checkpoint.done_bytes(found["rows"], found["state"], found["files"]))
    with pytest.raises(CorruptObject, match=rf"done\.json is not a checkpoint's .*{reason}"):
        Checkpoints(store).newest()


def test_an_attempt_whose_name_could_not_be_told_from_a_file_is_refused() -> None:
    with pytest.raises(ValueError, match="attempt is 'a-b'; it must be lower-case letters and digits"):
        CheckpointWriter(open_store("memory://parts/attempt"), attempt="a-b")


@pytest.mark.slow
def test_a_file_that_s3_takes_in_several_requests_comes_back_to_the_bit(s3: dict) -> None:
    store = open_store("s3://bucket/sae/large", s3)
    tensor = torch.arange(28_000_000, dtype=torch.int32).reshape(-1, 7)  # 112 MB; s3fs cuts from 100 MB
    writer = CheckpointWriter(store)
    writer.begin({"w": Piece(tensor)}, 100)
    part = writer.wait()
    assert part is not None
    assert len(part["files"]) == 1
    Checkpoints(store).complete(100, STATE, [part])
    stored = Checkpoints(store).newest()
    assert stored is not None
    assert torch.equal(stored.read("w", 1_234_567, 1_300_001), tensor[1_234_567:1_300_001])
    assert torch.equal(stored["w"], tensor)
    Checkpoints(store).remove()
