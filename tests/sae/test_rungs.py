"""Rungs: who stops, what is kept of them, and that nobody else notices; in one process and over ranks."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from hypothesis import given
from hypothesis import strategies as st

import sae
from actcache.errors import Drained
from sae.architectures import Architecture
from sae.checkpoint_folder import Checkpoints
from sae.files import run_files
from sae.rundir import RunDirectory, progress_of
from sae.rungs import Rungs, rivals
from sae.spread import Layout, spread_of
from sae.train import Trainer, run_names

D, N_ROWS, BATCH = 12, 1000, 100
TOPK = sae.TopK(d_sae=32, k=3)
STANDARD = sae.Standard(d_sae=24, l1_coefficient=0.1)


def _at(config: Architecture, **optimiser: Any) -> Architecture:
    return replace(config, optimiser=sae.Optimiser(**optimiser))


CONFIGS = [
    _at(TOPK, lr=1e-6),  # the worst of four
    _at(TOPK, lr=3e-3),
    _at(TOPK, lr=2e-3),
    _at(TOPK, lr=1e-5),
    _at(STANDARD, lr=1e-5),  # the worst of two
    _at(STANDARD, lr=3e-3),
    sae.BatchTopK(d_sae=32, k=3),  # alone
]
NAMES = run_names(CONFIGS)
TRAINING = sae.Training(
    n_rows=1950, seed=1, log_every=3, checkpoint_every_rows=400, rungs=(550, 1200), rung_keep=0.5
)
STOPPED = {0: 550, 3: 550, 4: 550, 2: 1200}
"""At rungs of 550 and 1,200 rows: half of four and of two, then half of the two that are left."""


def _acts() -> np.ndarray:
    rng = np.random.default_rng(0)
    codes = rng.random((N_ROWS, 20)) * (rng.random((N_ROWS, 20)) < 0.15)
    return (codes @ rng.normal(size=(20, D)) + 0.01 * rng.normal(size=(N_ROWS, D))).astype(np.float32)


class Ending(sae.ArrayStream):
    """Dies before a batch, as a killed process does for whoever resumes its run."""

    last: int | None = None

    def __iter__(self) -> Iterator[Any]:
        for i, batch in enumerate(super().__iter__()):
            if i == self.last:
                raise KeyboardInterrupt
            yield batch


def _stream(last: int | None = None) -> Ending:
    stream = Ending(_acts(), batch_size=BATCH, epochs=2)
    stream.last = last
    return stream


def _train(
    out: Path | None, training: sae.Training = TRAINING, configs: Sequence[Architecture] = CONFIGS, **end: int
) -> list[sae.SAE]:
    return sae.train(_stream(**end), configs, training, out=out)


def _lines(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]


def _curves(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Metrics without what the clock decides, nor the layout."""
    timed = ("rows_per_s", "stall_share", "world_size", "spread", "stall_by_rank")
    return {
        name: [{k: v for k, v in line.items() if k not in timed} for line in _lines(out, name)]
        for name in NAMES
    }


def _digests(out: Path) -> list[str]:
    return [sae.load(out / name).digest() for name in NAMES]


def _stops(out: Path) -> dict[int, int]:
    found = {i: sae.load(out / name).cfg.get("stopped_at_rung") for i, name in enumerate(NAMES)}
    return {i: rung for i, rung in found.items() if rung is not None}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rungs")
    _train(out)
    return out


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without rungs."""
    out = tmp_path_factory.mktemp("without")
    _train(out, replace(TRAINING, rungs=()))
    return out


def test_the_worst_of_rivals_stop_and_the_others_equal_a_run_without_rungs_to_the_bit(
    straight: Path, without: Path
) -> None:
    assert _stops(straight) == STOPPED
    for i, (found, wanted) in enumerate(zip(_digests(straight), _digests(without), strict=True)):
        assert (found == wanted) == (i not in STOPPED)


def test_what_stops_is_saved_as_it_is_and_its_metrics_end(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path, replace(TRAINING, rungs=(), checkpoint_every_rows=600), last=8)
    directory = RunDirectory(tmp_path, NAMES, {})
    for i, name in enumerate(NAMES):
        s, lines = sae.load(straight / name), _lines(straight, name)
        stop = {550: 600, 1200: 1200, None: 1950}[STOPPED.get(i)]  # a rung is reached at the end of a batch
        assert (s.cfg["rows"], s.cfg["steps"], lines[-1]["rows"]) == (stop, -(-stop // BATCH), stop)
        assert ("stopped_at_rung" in s.cfg) == (i in STOPPED)
        if stop == 600 and i < 4:  # of unit norm, as the weights are in training
            assert torch.equal(s.W_dec, directory.checkpoint(600)[f"{i}.W_dec_FD"])
    assert progress_of(straight)["rows_done"] == 1950


def test_a_finished_run_gives_all_saes_and_so_does_one_without_a_directory(straight: Path) -> None:
    again, kept = _train(straight), _train(None)
    assert [s.digest() for s in again] == [s.digest() for s in kept] == _digests(straight)
    assert [s.cfg.get("stopped_at_rung") for s in kept] == [STOPPED.get(i) for i in range(len(CONFIGS))]


@pytest.mark.parametrize("last", [5, 6, 11, 14])  # 5 batches end before the rung of 550 rows, 6 after it
def test_a_run_killed_before_and_after_a_rung_ends_in_the_undisturbed_result(
    straight: Path, tmp_path: Path, last: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path, last=last)
    newest = Checkpoints(run_files(tmp_path).store).newest()
    assert newest is not None
    assert newest.rows == {5: 400, 6: 600, 11: 1000, 14: 1200}[last]
    told = {5: 400, 6: 600, 11: 1000, 14: 1300}  # the last line of those that train, every third step
    assert progress_of(tmp_path)["rows_done"] == told[last]
    _train(tmp_path)
    assert _digests(tmp_path) == _digests(straight)
    assert _curves(tmp_path) == _curves(straight)


@pytest.mark.parametrize("method", ["save", "with_metrics", "complete_checkpoint"])
def test_a_run_killed_at_a_rung_ends_in_the_undisturbed_result(
    straight: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first of three is saved; before their checkpoint; and once it is complete."""
    real, calls = getattr(RunDirectory, method), []

    def dying(self: RunDirectory, rows_or_i: Any, *args: Any) -> Any:
        found = real(self, rows_or_i, *args)
        calls.append(rows_or_i)
        # the first checkpoint is at 400 rows, the second at the rung
        if method == "save" or len(calls) == 2:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(RunDirectory, method, dying)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / NAMES[0] / "sae.json").exists(), "killed at the rung"
    _train(tmp_path)
    assert _digests(tmp_path) == _digests(straight)
    assert _curves(tmp_path) == _curves(straight)
    assert _stops(tmp_path) == STOPPED


def _rank(spread: str, out: str, last: int | None = None, asked: int | None = None) -> dict[str, Any]:
    """One rank's part of the run, or one process; what it ended with."""
    import torch.distributed as dist

    world = dist.get_world_size() if dist.is_initialized() else 1
    layout = Layout(spread_of(spread, world, len(CONFIGS)) if world > 1 else None)
    trainer = Trainer(
        _stream(last),
        CONFIGS,
        TRAINING,
        start=[None] * len(CONFIGS),
        out=out,
        layout=layout,
        tell=lambda figures: None,
        asked=lambda: asked is not None and trainer.rows >= asked,
    )
    assert trainer.open(True) is None
    begun_at = trainer.rows
    with torch.enable_grad():
        try:
            trainer.run()
        except (KeyboardInterrupt, Drained) as error:
            return {"begun_at": begun_at, "own": list(trainer.learners), "error": type(error).__name__}
    return {"begun_at": begun_at, "own": list(trainer.learners), "error": None}


def test_whole_saes_are_dealt_anew_to_ranks_and_equal_those_of_one_process_to_the_bit(
    straight: Path, tmp_path: Path
) -> None:
    found = ranks.on_ranks(2, _rank, "saes", str(tmp_path))
    assert [rank["own"] for rank in found] == [[1, 5], [6]], "by width, the widest first"
    assert _digests(tmp_path) == _digests(straight)
    assert _curves(tmp_path) == _curves(straight)
    assert _stops(tmp_path) == STOPPED


@pytest.mark.slow
def test_dealt_saes_go_on_after_a_kill_at_another_world_size(straight: Path, tmp_path: Path) -> None:
    killed = ranks.on_ranks(2, _rank, "saes", str(tmp_path), 8)  # the checkpoint of the rung is the newest
    assert {rank["error"] for rank in killed} == {"KeyboardInterrupt"}
    assert [rank["own"] for rank in killed] == [[1, 6], [2, 5]]
    found = ranks.on_ranks(4, _rank, "saes", str(tmp_path))
    assert {rank["begun_at"] for rank in found} == {600}
    assert [rank["own"] for rank in found] == [[1], [6], [5], []], "one rank is left without"
    assert _digests(tmp_path) == _digests(straight)
    assert _curves(tmp_path) == _curves(straight)


def test_ranks_that_share_saes_decide_alike_and_as_one_process(straight: Path, tmp_path: Path) -> None:
    found = ranks.on_ranks(2, _rank, "latents", str(tmp_path))
    assert [rank["own"] for rank in found] == [[1, 5, 6]] * 2
    _assert_close(straight, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["latents", "rows"])
def test_ranks_that_share_saes_go_on_after_a_stop_between_rungs(
    straight: Path, tmp_path: Path, spread: str
) -> None:
    stopped = ranks.on_ranks(2, _rank, spread, str(tmp_path), None, 700)
    assert {rank["error"] for rank in stopped} == {"Drained"}
    found = ranks.on_ranks(2, _rank, spread, str(tmp_path))
    assert [rank["own"] for rank in found] == [[1, 5, 6]] * 2
    _assert_close(straight, tmp_path)


def _assert_close(straight: Path, out: Path) -> None:
    assert _stops(out) == STOPPED
    for name in NAMES:
        one, many = sae.load(straight / name), sae.load(out / name)
        assert one.cfg["rows"] == many.cfg["rows"]
        assert float((one.W_dec - many.W_dec).norm() / one.W_dec.norm()) < 1e-4, name


def test_rivals_share_site_architecture_width_and_all_that_controls_l0() -> None:
    jump = sae.JumpReLU(d_sae=32, target_l0=3)
    configs = [
        TOPK,
        _at(TOPK, seed=3),
        replace(TOPK, encoder_norm=0.1, revive=None),
        replace(TOPK, site="elsewhere"),
        replace(TOPK, k=4),
        replace(TOPK, d_sae=33),
        sae.BatchTopK(d_sae=32, k=3),
        STANDARD,
        replace(STANDARD, decoder="unit"),  # the penalty is of something else
        _at(STANDARD, sparsity_warmup_rows=0),  # the loss has another penalty in the warm-up
        _at(STANDARD, lr=1.0),
        jump,
        replace(jump, bandwidth=0.01),
        replace(jump, l0_coefficient=2.0),
        replace(jump, target_l0=None, l0_coefficient=3.0),
    ]
    groups = rivals(configs, [TRAINING.rules(c) for c in configs])
    assert [group for group in groups if len(group) > 1] == [[0, 1, 2], [7, 10], [11, 12]]


def test_topk_is_ranked_by_fvu_and_penalised_ones_by_their_loss_without_what_revives(tmp_path: Path) -> None:
    ghost = sae.JumpReLU(d_sae=24, target_l0=3, initial_threshold=9.0, revive=sae.GhostGrads())
    training = replace(TRAINING, n_rows=400, rungs=(300,), dead_after_rows=1)
    _train(tmp_path, training, [TOPK, ghost])
    for line in _lines(tmp_path, "topk-32-3"):
        assert line["score"] == line["fvu"]
    last = _lines(tmp_path, "jumprelu-24-3")[-1]
    assert last["dead"] > 0
    assert last["score"] < last["loss"]
    _train(tmp_path / "without", replace(training, rungs=()), [TOPK])
    assert "score" not in _lines(tmp_path / "without", "topk-32-3")[0]


@given(
    scores=st.lists(st.floats(0, 1), min_size=1, max_size=9),
    keep=st.floats(0.01, 0.99),
    times=st.integers(1, 4),
)
def test_at_least_the_share_that_is_kept_goes_on_and_the_best_always_does(
    scores: list[float], keep: float, times: int
) -> None:
    configs = [_at(TOPK, seed=i) for i in range(len(scores))]
    rungs = Rungs((1,), keep, configs, [TRAINING.rules(c) for c in configs])
    for _ in range(times):
        before = len(rungs.running)
        rungs.add({i: {"score": scores[i]} for i in rungs.running})
        again = Rungs((1,), keep, configs, [TRAINING.rules(c) for c in configs])
        again.restore(json.loads(json.dumps(rungs.state())), rungs.stopped)
        worst = rungs.worst()
        assert worst == again.worst()
        rungs.stop(worst, 1)
        assert len(rungs.running) == max(1, int(np.ceil(keep * before - 1e-9)))
        assert min(range(len(scores)), key=scores.__getitem__) in rungs.running


def test_a_step_that_passes_several_rungs_stops_once_and_scores_count_anew() -> None:
    configs = [_at(TOPK, seed=i) for i in range(3)]
    rungs = Rungs((10, 20, 30), 0.5, configs, [TRAINING.rules(c) for c in configs])
    assert [rungs.reached(*step) for step in ((0, 9), (9, 10), (10, 35), (35, 99))] == [None, 10, 30, None]
    rungs.add({0: {"score": 9.0}, 1: {"score": 1.0}, 2: {"score": 1.0}})
    assert rungs.worst() == [0]
    rungs.stop([0], 10)
    rungs.add({1: {"score": 1.0}, 2: {"score": 0.9}})
    assert rungs.worst() == [1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rungs": (200, 100)}, r"rungs are \(200, 100\); they must ascend"),
        ({"rungs": (0,)}, "each at least 1 and below n_rows = 1950"),
        ({"rungs": (1950,)}, "each at least 1 and below n_rows = 1950"),
        ({"rung_keep": 1.0}, r"rung_keep is 1\.0; it is the share that goes on, above 0 and below 1"),
    ],
)
def test_rungs_that_can_not_be_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TRAINING, **wrong)


def test_a_run_of_before_there_were_rungs_is_the_same_run(without: Path) -> None:
    run = json.loads((without / "run.json").read_text())
    assert not {"rungs", "rung_keep"} & run["training"].keys()
    assert _train(without, replace(TRAINING, rungs=()))[0].digest() == _digests(without)[0]
