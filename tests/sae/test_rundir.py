"""A run's directory: who may write what, and which settings make it another run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sae
from actcache.errors import Conflict, StoreError
from sae.checkpoint import StoredCheckpoint
from sae.checkpoint_writer import Piece
from sae.rundir import RunDirectory, differences

DESCRIPTION = {"training": {"n_rows": 900, "checkpoint_every_rows": 100}, "saes": {"a": {}, "b": {}}}


def _directory(out: Path | str) -> RunDirectory:
    return RunDirectory(out, ["a", "b"], DESCRIPTION)


def _files(path: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


def _checkpoint(directory: RunDirectory, rows: int, world: int = 1) -> None:
    """A checkpoint of one tensor, in parts, with a line of metrics for each hundred rows."""
    state = directory.with_metrics({"step": rows // 100})
    parts, whole = [], torch.arange(float(rows))
    for rank, tensor in enumerate(whole.chunk(world)):
        writer = directory.checkpoint_writer(rank, world, "a1")
        writer.begin({"w": Piece(tensor, rank * len(whole) // world, rows)}, rows)
        part = writer.wait()
        assert part is not None
        parts.append(part)
    directory.complete_checkpoint(rows, state, parts)


@pytest.mark.parametrize("place", ["local", "memory"])
def test_other_ranks_find_what_the_writer_found_and_change_nothing(tmp_path: Path, place: str) -> None:
    out = tmp_path / "run" if place == "local" else "memory://rundir/ranks"
    with pytest.raises(StoreError, match=r"has no run.json as seen by this rank. Give all ranks one place"):
        _directory(out).open(resume=True, writer=False)
    writing = _directory(out)
    assert writing.open(resume=False) is None
    assert _directory(out).open(resume=False, writer=False) is None
    writing.append_metrics({name: {"rows": 100} for name in "ab"})
    _checkpoint(writing, 100)
    writing.append_metrics({name: {"rows": 200} for name in "ab"})
    before = _files(tmp_path)
    for directory, options in ((_directory(out), {"writer": False}), (_directory(out), {})):
        found = directory.open(resume=True, **options)
        assert isinstance(found, StoredCheckpoint)
        assert (found.rows, found.state["step"]) == (100, 1)
        assert torch.equal(found["w"], torch.arange(100.0))
        if options:
            assert _files(tmp_path) == before
    assert directory.files.read("a/metrics.jsonl") == b'{"rows": 100}\n', "what the checkpoint counts"


def test_a_checkpoint_of_four_ranks_is_taken_up_by_one(tmp_path: Path) -> None:
    directory = _directory(tmp_path)
    directory.open(resume=True)
    _checkpoint(directory, 100, world=4)
    assert directory.checkpoint_rows == 100
    again = _directory(tmp_path)
    found = again.open(resume=True)
    assert isinstance(found, StoredCheckpoint)
    assert torch.equal(found["w"], torch.arange(100.0))
    _checkpoint(again, 200)
    assert again.checkpoint_rows == 200
    assert len(list(tmp_path.glob("checkpoints/*/part-*"))) == 1


def test_a_checkpoint_that_is_held_stays_whole_until_it_is_let_go(tmp_path: Path) -> None:
    directory = _directory(tmp_path)
    directory.open(resume=True)
    _checkpoint(directory, 100)
    directory.checkpoints.held = 100
    for rows in (200, 300):
        _checkpoint(directory, rows)
        assert _stored(tmp_path) == {100, rows}
        assert torch.equal(directory.checkpoints.at(100)["w"], torch.arange(100.0))
    newest = _directory(tmp_path).open(resume=True, writer=False)
    assert isinstance(newest, StoredCheckpoint)
    assert newest.rows == 300
    directory.checkpoints.remove()
    assert _stored(tmp_path) == {100}
    directory.checkpoints.held = None
    _checkpoint(directory, 400)
    assert _stored(tmp_path) == {400}


def _stored(out: Path) -> set[int]:
    return {int(path.parent.name) for path in out.glob("checkpoints/*/done.json")}


@pytest.mark.parametrize("place", ["local", "memory"])
def test_evaluations_are_kept_as_far_as_their_checkpoint_is(tmp_path: Path, place: str) -> None:
    out = tmp_path / "run" if place == "local" else "memory://rundir/evals"
    writing = _directory(out)
    writing.open(resume=True)
    assert writing.evaluated_rows == {"a": 0, "b": 0}
    assert writing.files.read("a/evals.jsonl") is None, "a run without evaluations has no such file"
    for rows in (100, 200):
        writing.append_evals(rows, {key: {"rows": rows, "fvu": 0.5} for key in "ab"})
    _checkpoint(writing, 250)
    writing.append_evals(300, {"a": {"rows": 300, "fvu": 0.5}})
    writing.sync_evals()
    again = _directory(out)
    again.open(resume=True)
    assert again.evaluated_rows == {"a": 200, "b": 200}
    again.append_evals(300, {key: {"rows": 300, "fvu": 0.4} for key in "ab"})
    again.sync_evals()
    for name in "ab":
        lines = (again.files.read(f"{name}/evals.jsonl") or b"").splitlines()
        assert [json.loads(line) for line in lines] == [
            {"rows": 100, "fvu": 0.5}, {"rows": 200, "fvu": 0.5}, {"rows": 300, "fvu": 0.4}
        ]  # fmt: skip


def test_an_evaluation_that_a_kill_has_torn_is_made_again_for_the_saes_without_it(tmp_path: Path) -> None:
    writing = _directory(tmp_path)
    writing.open(resume=True)
    for rows in (100, 200):
        writing.append_evals(rows, {key: {"rows": rows} for key in "ab"})
    _checkpoint(writing, 200)
    whole = b'{"rows": 100}\n{"rows": 200}\n'
    for torn in (whole[:-3], whole[:-1], whole[:14], whole[:14] + b"\0\0\0\n"):
        (tmp_path / "b" / "evals.jsonl").write_bytes(torn)
        again = _directory(tmp_path)
        again.open(resume=True)
        assert again.evaluated_rows == {"a": 200, "b": 100}
        again.append_evals(200, {key: {"rows": 200} for key in "ab"})
        assert {(tmp_path / name / "evals.jsonl").read_bytes() for name in "ab"} == {whole}


def test_two_runs_into_one_directory_meet_at_the_next_checkpoint(tmp_path: Path) -> None:
    one, two = _directory(tmp_path), _directory(tmp_path)
    one.open(resume=True)
    two.open(resume=True)
    _checkpoint(one, 100)
    with pytest.raises(Conflict, match=r"another process, which trains into the same directory; end one"):
        _checkpoint(two, 120)
    _checkpoint(one, 200)
    assert one.checkpoint_rows == 200


def test_how_often_checkpoints_are_made_makes_no_other_run_and_everything_else_does(tmp_path: Path) -> None:
    _directory(tmp_path).open(resume=True)
    often = {"n_rows": 900, "checkpoint_every_rows": None, "checkpoint_every_s": 5.0}
    assert RunDirectory(tmp_path, ["a", "b"], {**DESCRIPTION, "training": often}).open(resume=True) is None
    longer = {**DESCRIPTION, "training": {**often, "n_rows": 901}}
    with pytest.raises(Conflict, match=r"other settings \(training.n_rows: 900 -> 901\)"):
        RunDirectory(tmp_path, ["a", "b"], longer).open(resume=True)


def test_a_checkpoint_without_its_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    directory = _directory(tmp_path)
    directory.open(resume=True)
    _checkpoint(directory, 100)
    (tmp_path / "run.json").unlink()
    before = _files(tmp_path)
    with pytest.raises(
        Conflict, match=r"has a checkpoint but no run.json.*or remove .*/checkpoints/0+100 to"
    ):
        _directory(tmp_path).open(resume=True)
    assert _files(tmp_path) == before


def test_a_run_that_was_killed_as_it_removed_its_checkpoints_is_finished_and_they_go(tmp_path: Path) -> None:
    stream = sae.ArrayStream(np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32))
    training = sae.Training(n_rows=100)
    (s,) = sae.train(stream, sae.TopK(d_sae=9, k=2), training, out=tmp_path)
    left = tmp_path / "checkpoints" / f"{50:016d}" / "part-a1-00000-of-00001-0000.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"part")
    (again,) = sae.train(stream, sae.TopK(d_sae=9, k=2), training, out=tmp_path)
    assert again.digest() == s.digest()
    assert not (tmp_path / "checkpoints").exists()
    assert json.loads((tmp_path / "run.json").read_bytes())["finished"]


def test_differences_name_the_field() -> None:
    found, wanted = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert differences(found, wanted) == ["a.c: 2 -> 4", "d: 3 -> None", "e: None -> 5"]
    assert differences({"a": {"b": 1}}, {"c": {"d": 1}}) == ["a: present -> None", "c: None -> present"]
    assert differences(found, found) == []
