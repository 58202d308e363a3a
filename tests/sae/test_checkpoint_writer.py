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
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from actcache.errors import Conflict, CorruptObject, FormatError, StoreError
from actcache.store import LocalStore, Store, open_store
from sae import checkpoint, checkpoint_writer
from sae.checkpoint import Checkpoints, PartInfo, StoredCheckpoint
from sae.checkpoint_writer import CheckpointWriter, Piece

STATE = {"step": 3, "saes": [{"threshold": 0.1}]}


def _tensors(n_rows: int = 37, seed: int = 0) -> dict[str, Tensor]:
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


def _pieces(tensors: dict[str, Tensor], rank: int, world: int) -> dict[str, Piece]:
    """Tensors of `_tensors` over ranks: rows of those with a row each latent, the others from rank 0."""
    n_rows = len(tensors["W_FD"])
    first, stop = rank * n_rows // world, (rank + 1) * n_rows // world
    sharded = {
        n: Piece(t[first:stop], first, n_rows) for n, t in tensors.items() if n.endswith(("_FD", "_F"))
    }
    alone = {n: Piece(t) for n, t in tensors.items() if n not in sharded}
    return sharded | (alone if rank == 0 else {})


def _write(store: Store, tensors: dict[str, Tensor], rows: int, world: int = 1) -> list[PartInfo]:
    parts = []
    for rank in range(world):
        writer = CheckpointWriter(store, rank, world)
        writer.begin(_pieces(tensors, rank, world), rows)
        part = writer.wait()
        assert part is not None
        parts.append(json.loads(json.dumps(part)))  # as it travels to rank 0
    return parts


def _stored(store: Store, tensors: dict[str, Tensor], rows: int = 100, world: int = 1) -> StoredCheckpoint:
    Checkpoints(store).complete(rows, STATE, _write(store, tensors, rows, world))
    found = Checkpoints(store).newest()
    assert found is not None
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _names(store: Store) -> list[str]:
    return [o.key.removeprefix("checkpoints/") for o in store.listing("checkpoints")]


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
    store, tensors = open_store("memory://parts/any"), _tensors(n_rows)
    Checkpoints(store).remove()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(checkpoint_writer, "FILE_BYTES", file_bytes)
        m.setattr(checkpoint_writer, "BLOCK_BYTES", block_bytes)
        m.setattr(checkpoint, "BLOCK_BYTES", block_bytes)
        stored = _stored(store, tensors, world=writers)
        assert (stored.rows, stored.state) == (100, STATE)
        assert set(stored) == set(tensors)
        for name, tensor in tensors.items():
            assert stored.shape(name) == tuple(tensor.shape)
            assert _equal(stored[name], tensor), name
            if tensor.ndim == 0:
                continue
            cuts = [i * len(tensor) // readers for i in range(readers + 1)]
            for first, stop in pairwise(cuts):
                assert _equal(stored.read(name, first, stop), tensor[first:stop]), name


def test_a_file_of_a_part_is_a_safetensors_file(tmp_path: Path) -> None:
    tensors = _tensors()
    _stored(LocalStore(tmp_path), tensors)
    (file,) = tmp_path.glob("checkpoints/*/part-*-00000-of-00001-0000.safetensors")
    found = load_file(file)
    assert found.keys() == tensors.keys()
    assert all(_equal(found[name], tensors[name]) for name in tensors)


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

    store, tensors = Waiting(tmp_path), _tensors()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    writer = CheckpointWriter(store)
    assert writer.written() is writer.wait() is None
    writer.begin(_pieces(tensors, 0, 1), 100)
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
    assert all(_equal(stored[name], before[name]) for name in before)


def test_buffers_are_used_again_and_a_part_of_another_size_is_written_too(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    writer, checkpoints = CheckpointWriter(store), Checkpoints(store)
    buffers = []
    for rows, n_rows in ((100, 37), (200, 37), (300, 20)):
        tensors = _tensors(n_rows, seed=rows)
        writer.begin(_pieces(tensors, 0, 1), rows)
        part = writer.wait()
        assert part is not None
        buffers.append([np.frombuffer(b.getvalue(), np.uint8).ctypes.data for b in writer._buffers])
        checkpoints.complete(rows, STATE, [part])
        stored = Checkpoints(store).newest()
        assert stored is not None
        assert stored.rows == rows
        assert all(_equal(stored[name], tensors[name]) for name in tensors)
    assert buffers[0] == buffers[1], "the same memory, which was not copied to be written"


def test_a_rank_that_holds_nothing_writes_nothing_and_counts(tmp_path: Path) -> None:
    store, tensors = LocalStore(tmp_path), _tensors()
    pieces = _pieces(tensors, 0, 1)
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
    assert all(_equal(stored[name], tensors[name]) for name in tensors)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("which", ["part", "done"])
def test_a_flipped_bit_anywhere_is_found_and_named(tmp_path: Path, which: str) -> None:
    store, tensors = LocalStore(tmp_path), _tensors(11)
    _stored(store, tensors, world=2)
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
    assert all(_equal(found[name], tensors[name]) for name in tensors)


def _read_all(store: Store) -> dict[str, Tensor]:
    newest = Checkpoints(store).newest()
    assert newest is not None
    return dict(newest)


def test_a_file_that_is_cut_off_or_missing_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    stored = _stored(store, _tensors())
    (file,) = tmp_path.glob("checkpoints/*/part-*")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptObject, match=rf"{file.name} ends after \d+ of \d+ bytes; restore it"):
        stored.read("generator")
    file.unlink()
    with pytest.raises(CorruptObject, match=rf"{file.name} is missing; restore it from a copy, or remove"):
        stored.read("generator")


def test_rows_and_names_that_a_checkpoint_does_not_have_are_refused(tmp_path: Path) -> None:
    stored = _stored(LocalStore(tmp_path), _tensors())
    with pytest.raises(ValueError, match="rows 3 to 38 of W_FD are asked for; it has 37"):
        stored.read("W_FD", 3, 38)
    with pytest.raises(KeyError, match="W_DF"):
        stored.read("W_DF")
    assert set(stored.under("W_")) == {"FD"}
    assert _equal(stored.under("W_")["FD"], stored["W_FD"])


def test_parts_that_leave_rows_out_or_hold_them_twice_make_no_checkpoint(tmp_path: Path) -> None:
    store, tensors = LocalStore(tmp_path), _tensors()
    for cuts in ((0, 10, 11, 37), (0, 12, 11, 37), (0, 10, 10, 36)):
        parts = []
        for rank, (first, stop) in enumerate((cuts[:2], cuts[2:])):
            writer = CheckpointWriter(store, rank, 2)
            writer.begin({"W_FD": Piece(tensors["W_FD"][first:stop], first, 37)}, 100)
            part = writer.wait()
            assert part is not None
            parts.append(part)
        with pytest.raises(CorruptObject, match=r"W_FD has"):
            Checkpoints(store).complete(100, STATE, parts)
    assert Checkpoints(store).newest() is None


def test_only_a_complete_checkpoint_exists_and_the_one_before_goes_after_it(tmp_path: Path) -> None:
    store, checkpoints = LocalStore(tmp_path), Checkpoints(LocalStore(tmp_path))
    first = _write(store, _tensors(), 100)
    assert checkpoints.newest() is None
    assert checkpoints.rows is None
    checkpoints.complete(100, STATE, first)
    assert checkpoints.rows == 100
    second = _write(store, _tensors(), 200)
    found = Checkpoints(store).newest()
    assert found is not None
    assert found.rows == 100
    checkpoints.complete(200, STATE, second)
    kept = [f"{200:016d}/{n}" for n in ("done.json", second[0]["files"][0]["name"])]
    assert _names(store) == kept
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"{200:016d}"]
    checkpoints.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_dead_attempts_left_goes_with_the_next_checkpoint_and_other_files_stay(tmp_path: Path) -> None:
    store, tensors = LocalStore(tmp_path), _tensors()
    for rows in (50, 100, 900):  # each was killed before its checkpoint was complete
        _write(store, tensors, rows)
    torn = tmp_path / "checkpoints" / f"{100:016d}" / ".actcache-tmp-0123"
    torn.write_bytes(b"half of a part")
    (tmp_path / "checkpoints" / "notes.txt").write_text("of a person")
    (tmp_path / "checkpoints" / f"{50:016d}" / "notes.txt").write_text("of a person")
    parts = _write(store, tensors, 100)
    Checkpoints(store).complete(100, STATE, parts)
    kept = [f"{100:016d}/{n}" for n in ("done.json", parts[0]["files"][0]["name"])]
    assert _names(store) == [f"{50:016d}/notes.txt", *kept, "notes.txt"]
    assert not torn.exists()


def test_a_part_that_a_rank_of_this_run_already_writes_for_the_next_checkpoint_stays(tmp_path: Path) -> None:
    store, tensors = LocalStore(tmp_path), _tensors()
    writer = CheckpointWriter(store)
    writer.begin(_pieces(tensors, 0, 1), 100)
    first = writer.wait()
    writer.begin(_pieces(tensors, 0, 1), 200)
    second = writer.wait()
    assert first is not None
    assert second is not None
    checkpoints = Checkpoints(store)
    checkpoints.complete(100, STATE, [first])
    checkpoints.complete(200, STATE, [second])
    newest = Checkpoints(store).newest()
    assert newest is not None
    assert _equal(newest["W_FD"], tensors["W_FD"])


@pytest.mark.parametrize("others", [100, 150, 999])
def test_a_checkpoint_of_another_process_is_a_conflict_and_stays(tmp_path: Path, others: int) -> None:
    store, tensors = LocalStore(tmp_path), _tensors()
    mine, theirs = Checkpoints(store), Checkpoints(store)
    theirs.complete(others, STATE, _write(store, tensors, others))
    parts = _write(store, tensors, 200 if others != 100 else 100)
    with pytest.raises(
        Conflict, match=rf"{others:016d} is a checkpoint of another process.*end one of the two"
    ):
        mine.complete(parts[0]["rows"], STATE, parts)
    newest = Checkpoints(store).newest()
    assert newest is not None
    assert newest.rows == others
    assert _equal(newest["W_FD"], tensors["W_FD"])


def test_two_processes_that_complete_at_once_get_one_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other's appears between this one's look and its `done.json`."""
    store, tensors = open_store("memory://parts/race"), _tensors()
    theirs, mine = _write(store, tensors, 100), _write(store, tensors, 100)
    original = store.create

    def create(key: str, data: bytes) -> bool:
        monkeypatch.setattr(store, "create", original)
        Checkpoints(store).complete(100, STATE, theirs)
        return original(key, data)

    monkeypatch.setattr(store, "create", create)
    with pytest.raises(Conflict, match="another process"):
        Checkpoints(store).complete(100, STATE, mine)
    newest = Checkpoints(store).newest()
    assert newest is not None
    assert _equal(newest["W_FD"], tensors["W_FD"])


def test_a_part_that_rank_0_does_not_see_makes_no_checkpoint(tmp_path: Path) -> None:
    """Two nodes, each with a disk of its own at the same path."""
    tensors = _tensors()
    stores = [LocalStore(tmp_path / node) for node in ("a", "b")]
    parts = []
    for rank, store in enumerate(stores):
        writer = CheckpointWriter(store, rank, 2)
        writer.begin(_pieces(tensors, rank, 2), 100)
        part = writer.wait()
        assert part is not None
        parts.append(part)
    with pytest.raises(StoreError, match=r"which rank 1 wrote, is not there.*a shared file system or a URL"):
        Checkpoints(stores[0]).complete(100, STATE, parts)
    assert Checkpoints(stores[0]).newest() is None


def test_a_store_that_refuses_a_part_leaves_the_checkpoint_before(monkeypatch: pytest.MonkeyPatch) -> None:
    store, tensors = open_store("memory://parts/refuses"), _tensors()
    _stored(store, tensors)
    writer = CheckpointWriter(store)

    def refuse(key: str, data: bytes) -> bool:
        raise StoreError("refused")

    monkeypatch.setattr(store, "create", refuse)
    writer.begin(_pieces(_tensors(seed=1), 0, 1), 200)
    with pytest.raises(
        StoreError, match=r"a checkpoint could not be written: refused. The one before is intact"
    ):
        writer.wait()
    newest = Checkpoints(store).newest()
    assert newest is not None
    assert newest.rows == 100
    assert _equal(newest["W_FD"], tensors["W_FD"])


HOSTILE = {
    "name": ("../../x.safetensors", "file name"),
    "crc32c": ([], "has 0 checksums"),
    "size_bytes": (3, "can not be at"),
    "tensors": ({"W": {"dtype": "F32", "shape": [-1], "start": 0, "first": 0, "whole": 1}}, "can not be at"),
}


@pytest.mark.parametrize("field", HOSTILE)
def test_a_done_json_that_says_what_can_not_be_is_refused(tmp_path: Path, field: str) -> None:
    store = LocalStore(tmp_path)
    _stored(store, _tensors())
    (file,) = tmp_path.glob("checkpoints/*/done.json")
    found = json.loads(file.read_bytes())
    value, reason = HOSTILE[field]
    found["files"][0][field] = value
    file.write_bytes(checkpoint._done_bytes(found["rows"], found["state"], found["files"]))
    with pytest.raises(CorruptObject, match=rf"done\.json is not a checkpoint's .*{reason}"):
        Checkpoints(store).newest()


def test_another_format_is_one_clear_line(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    _stored(store, _tensors())
    (file,) = tmp_path.glob("checkpoints/*/done.json")
    file.write_text('{"format": 99}')
    with pytest.raises(
        FormatError, match=r"done\.json holds format 99; this version reads format 3\. Upgrade"
    ):
        Checkpoints(store).newest()
    for old in ("checkpoint.safetensors", f"checkpoints/{100:016d}.safetensors"):
        other = open_store(f"memory://parts/old/{len(old)}")
        other.create(old, b"of a version that was never released")
        with pytest.raises(
            FormatError, match=rf"an older format \({old}\); this version reads format 3\. Train"
        ):
            Checkpoints(other).newest()


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
