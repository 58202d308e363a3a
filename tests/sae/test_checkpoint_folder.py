"""Only complete checkpoints exist, one run owns a folder, and what is needless goes."""

from pathlib import Path

import pytest
from checkpoint_parts import STATE, equal, pieces_of, some_tensors, stored_checkpoint, write_parts

from actcache.errors import Conflict, CorruptObject, FormatError, StoreError
from actcache.store import LocalStore, Store, open_store
from sae.checkpoint_folder import Checkpoints
from sae.checkpoint_writer import CheckpointWriter, Piece


def _names(store: Store) -> list[str]:
    return [o.key.removeprefix("checkpoints/") for o in store.listing("checkpoints")]


def test_parts_that_leave_rows_out_or_hold_them_twice_make_no_checkpoint(tmp_path: Path) -> None:
    store, tensors = LocalStore(tmp_path), some_tensors()
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
    first = write_parts(store, some_tensors(), 100)
    assert checkpoints.newest() is None
    assert checkpoints.rows is None
    checkpoints.complete(100, STATE, first)
    assert checkpoints.rows == 100
    second = write_parts(store, some_tensors(), 200)
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
    store, tensors = LocalStore(tmp_path), some_tensors()
    for rows in (50, 100, 900):  # each was killed before its checkpoint was complete
        write_parts(store, tensors, rows)
    torn = tmp_path / "checkpoints" / f"{100:016d}" / ".actcache-tmp-0123"
    torn.write_bytes(b"half of a part")
    (tmp_path / "checkpoints" / "notes.txt").write_text("of a person")
    (tmp_path / "checkpoints" / f"{50:016d}" / "notes.txt").write_text("of a person")
    parts = write_parts(store, tensors, 100)
    Checkpoints(store).complete(100, STATE, parts)
    kept = [f"{100:016d}/{n}" for n in ("done.json", parts[0]["files"][0]["name"])]
    assert _names(store) == [f"{50:016d}/notes.txt", *kept, "notes.txt"]
    assert not torn.exists()


def test_a_part_that_a_rank_of_this_run_already_writes_for_the_next_checkpoint_stays(tmp_path: Path) -> None:
    store, tensors = LocalStore(tmp_path), some_tensors()
    writer = CheckpointWriter(store)
    writer.begin(pieces_of(tensors, 0, 1), 100)
    first = writer.wait()
    writer.begin(pieces_of(tensors, 0, 1), 200)
    second = writer.wait()
    assert first is not None
    assert second is not None
    checkpoints = Checkpoints(store)
    checkpoints.complete(100, STATE, [first])
    checkpoints.complete(200, STATE, [second])
    newest = Checkpoints(store).newest()
    assert newest is not None
    assert equal(newest["W_FD"], tensors["W_FD"])


@pytest.mark.parametrize("others", [100, 150, 999])
def test_a_checkpoint_of_another_process_is_a_conflict_and_stays(tmp_path: Path, others: int) -> None:
    store, tensors = LocalStore(tmp_path), some_tensors()
    mine, theirs = Checkpoints(store), Checkpoints(store)
    theirs.complete(others, STATE, write_parts(store, tensors, others))
    parts = write_parts(store, tensors, 200 if others != 100 else 100)
    with pytest.raises(
        Conflict, match=rf"{others:016d} is a checkpoint of another process.*end one of the two"
    ):
        mine.complete(parts[0]["rows"], STATE, parts)
    newest = Checkpoints(store).newest()
    assert newest is not None
    assert newest.rows == others
    assert equal(newest["W_FD"], tensors["W_FD"])


def test_two_processes_that_complete_at_once_get_one_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other's appears between this one's look and its `done.json`."""
    store, tensors = open_store("memory://parts/race"), some_tensors()
    theirs, mine = write_parts(store, tensors, 100), write_parts(store, tensors, 100)
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
    assert equal(newest["W_FD"], tensors["W_FD"])


def test_a_part_that_rank_0_does_not_see_makes_no_checkpoint(tmp_path: Path) -> None:
    """Two nodes, each with a disk of its own at the same path."""
    tensors = some_tensors()
    stores = [LocalStore(tmp_path / node) for node in ("a", "b")]
    parts = []
    for rank, store in enumerate(stores):
        writer = CheckpointWriter(store, rank, 2)
        writer.begin(pieces_of(tensors, rank, 2), 100)
        part = writer.wait()
        assert part is not None
        parts.append(part)
    with pytest.raises(StoreError, match=r"which rank 1 wrote, is not there.*a shared file system or a URL"):
        Checkpoints(stores[0]).complete(100, STATE, parts)
    assert Checkpoints(stores[0]).newest() is None


def test_another_format_is_one_clear_line(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    stored_checkpoint(store, some_tensors())
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
