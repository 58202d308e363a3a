"""SAEs are evaluated while they are trained: the same SAEs come out, and each checkpoint's figures are kept once."""

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from evaluated import ByHand, Here, figures

sys.path.insert(0, str(Path(__file__).parents[1] / "actcache"))

from tiny_harvest import tiny_spec

import actcache
import sae
from actcache.errors import SpecError
from sae.evals.elsewhere import News
from sae.evals.monitor import Monitor
from sae.spread import Layout, spread_of
from sae.train import Trainer

SITE = "blocks.1.hook_resid_post"
CONFIGS = [sae.TopK(d_sae=48, k=4), sae.BatchTopK(d_sae=48, k=4)]
NAMES = ["topk-48-4", "batchtopk-48-4"]
N_ROWS = 6000
"""Checkpoints come after 2,048 and 4,096 rows; the run ends at a multiple of 2,000, so its SAEs are evaluated too."""


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def ds(tmp_path_factory: pytest.TempPathFactory) -> actcache.Dataset:
    directory = tmp_path_factory.mktemp("during")
    return actcache.harvest(
        tiny_spec(directory), root=str(directory / "root"), engine="local", progress=False
    )


def settings(ds: actcache.Dataset, **changes: Any) -> sae.EvalDuring:
    model = str(Path(ds.url.removeprefix("file://")).parents[1] / "tiny-gpt2")
    return sae.EvalDuring(**{"every_rows": 2000, "n_sequences": 16, "model": model} | changes)


def trainer(
    ds: actcache.Dataset, out: Path, evals: sae.EvalDuring | None, eval_by: Any = Here, **changes: Any
) -> Trainer:
    stream = ds.stream([SITE], batch_size=256, epochs=2, metadata=False)
    last, layout = changes.pop("last", None), changes.pop("layout", None)
    configs = changes.pop("configs", CONFIGS)
    training = sae.Training(
        **{"n_rows": N_ROWS, "lr": 1e-3, "checkpoint_every_rows": None, "log_every": 4} | changes
    )
    found = Trainer(
        stream,
        configs,
        training,
        start=[None, None],
        out=out,
        evals=evals,
        eval_by=eval_by,
        layout=layout,
        tell=lambda _: None,
    )
    assert found.open(resume=True) is None
    if last is not None:
        found.stream = Ending(found.stream, last)  # type: ignore[assignment]
    return found


class Ending:
    """A stream that fails after some batches, as a killed process does for whoever resumes it."""

    def __init__(self, stream: Any, last: int) -> None:
        self._stream, self._last = stream, last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator:
        for i, batch in enumerate(self._stream):
            if i == self._last:
                raise Interrupted
            yield batch


def run(started: Trainer) -> list[sae.SAE]:
    with torch.enable_grad():
        return started.run()


def lines(out: Path, name: str = NAMES[0]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name / "evals.jsonl").read_text().splitlines()]


def without_clock(out: Path) -> list[list[dict[str, Any]]]:
    return [
        [{k: v for k, v in line.items() if k != "seconds"} for line in lines(out, name)] for name in NAMES
    ]


@pytest.fixture(scope="module")
def straight(ds: actcache.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight")
    run(trainer(ds, out, settings(ds)))
    return out


def test_weights_and_metrics_are_to_the_bit_those_without_it(
    ds: actcache.Dataset, straight: Path, tmp_path: Path
) -> None:
    run(trainer(ds, tmp_path, None))
    for name in NAMES:
        one, other = (
            [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
            for out in (straight, tmp_path)
        )
        assert (straight / name / "weights.safetensors").read_bytes() == (
            tmp_path / name / "weights.safetensors"
        ).read_bytes()
        for a, b in zip(one, other, strict=True):
            assert {k: v for k, v in a.items() if k not in ("rows_per_s", "stall_share")} == {
                k: v for k, v in b.items() if k not in ("rows_per_s", "stall_share")
            }
        assert not (tmp_path / name / "evals.jsonl").exists()


def test_each_checkpoint_has_the_figures_that_an_evaluation_of_its_saes_gives(
    ds: actcache.Dataset, straight: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        run(trainer(ds, tmp_path, settings(ds), ByHand, last=10))
    for i, name in enumerate(NAMES):
        found = lines(straight, name)
        assert [(line["rows"], line["step"]) for line in found] == [(2048, 8), (4096, 16), (6000, 24)]
        chosen = settings(ds)
        for s, line in (
            (sae.load_checkpoint(tmp_path, name), found[0]),
            (sae.load(straight / name), found[-1]),
        ):
            s.path = None
            result = sae.evaluate(s, ds, chosen.model, n_sequences=16, reuse=False)
            for figure in ("fvu", "l0", "dead_latents", "ce_recovered_zero", "kl", "n_rows", "n_sequences"):
                assert line[figure] == result[figure], (i, figure)
            assert line["seconds"] >= 0
        assert not (straight / name / "eval.json").exists(), (
            "the SAE's own evaluation is the user's to ask for"
        )


def test_a_process_beside_the_training_finds_the_same_figures(
    ds: actcache.Dataset, straight: Path, tmp_path: Path
) -> None:
    stream = ds.stream([SITE], batch_size=256, epochs=2, metadata=False)
    training = sae.Training(n_rows=N_ROWS, lr=1e-3, checkpoint_every_rows=None, log_every=4)
    sae.train(
        stream, CONFIGS, training, out=tmp_path, eval_every=settings(ds, every_rows=N_ROWS, n_sequences=0)
    )
    for name in NAMES:
        (line,) = lines(tmp_path, name)
        wanted = lines(straight, name)[-1]
        assert wanted["rows"] == line["rows"] == N_ROWS
        assert "ce_recovered_zero" in wanted
        assert "ce_recovered_zero" not in line
        for figure in ("fvu", "l0", "dead_latents", "cosine"):
            assert line[figure] == pytest.approx(wanted[figure], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["latents", "saes"])
def test_of_several_ranks_the_first_has_it_evaluated_and_the_weights_are_those_without_it(
    ds: actcache.Dataset, straight: Path, tmp_path: Path, spread: str
) -> None:
    with_it, without = tmp_path / "with", tmp_path / "without"
    assert ranks.on_ranks(2, _rank, spread, ds, with_it, settings(ds)) == [True, False]
    assert ranks.on_ranks(2, _rank, spread, ds, without, None) == [False, False]
    for name in NAMES:
        weights = [(out / name / "weights.safetensors").read_bytes() for out in (with_it, without)]
        assert weights[0] == weights[1]
        found, wanted = lines(with_it, name), lines(straight, name)
        assert [line["rows"] for line in found] == [2048, 4096, 6000]
        for one, other in zip(found, wanted, strict=True):
            assert one["fvu"] == pytest.approx(other["fvu"], rel=1e-3)


def _rank(spread: str, ds: actcache.Dataset, out: Path, evals: sae.EvalDuring | None) -> bool:
    """A rank's part of the run; whether it has checkpoints evaluated."""
    started = trainer(ds, out, evals, layout=Layout(spread_of(spread, 2, len(CONFIGS))))
    run(started)
    return started.monitor is not None


def test_a_run_that_was_killed_keeps_one_line_for_each_evaluation(
    ds: actcache.Dataset, straight: Path, tmp_path: Path
) -> None:
    for last in (9, 2, 10):  # as an evaluation begins, then from there on again, after the next checkpoint
        with pytest.raises(Interrupted):
            run(trainer(ds, tmp_path, settings(ds), last=last))
    run(trainer(ds, tmp_path, settings(ds)))
    assert without_clock(tmp_path) == without_clock(straight)
    assert not (tmp_path / "checkpoints").exists()


def test_an_evaluation_that_a_kill_has_cut_off_is_made_when_the_run_goes_on(
    ds: actcache.Dataset, straight: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        run(trainer(ds, tmp_path, settings(ds), ByHand, last=14))
    assert not (tmp_path / NAMES[0] / "evals.jsonl").exists()
    run(trainer(ds, tmp_path, settings(ds)))
    assert without_clock(tmp_path) == without_clock(straight)


def test_an_sae_that_stopped_at_a_rung_is_evaluated_no_more(ds: actcache.Dataset, tmp_path: Path) -> None:
    rivals = [sae.TopK(d_sae=48, k=4, optimiser=sae.Optimiser(lr=lr)) for lr in (1e-3, 1e-9)]
    for last in (10, None):  # the second time it goes on from the checkpoint after the rung
        changes = {"configs": rivals, "rungs": (2500,), "last": last}
        with pytest.raises(Interrupted) if last else contextlib.nullcontext():
            run(trainer(ds, tmp_path, settings(ds), **changes))
        if last:
            assert sae.load_checkpoint(tmp_path, "topk-48-4-lr1e-09").cfg["rows"] == 2560
            assert sae.load_checkpoint(tmp_path, "topk-48-4-lr0.001").cfg["rows"] == 2560
    assert [line["rows"] for line in lines(tmp_path, "topk-48-4-lr0.001")] == [2048, 4096, 6000]
    assert [line["rows"] for line in lines(tmp_path, "topk-48-4-lr1e-09")] == [2048]


def test_a_slow_evaluation_holds_its_checkpoint_and_the_next_one_is_left_out(
    ds: actcache.Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started = trainer(ds, tmp_path, settings(ds, every_rows=1000, wait_s=0), ByHand, last=23)
    place = by_hand(started)
    with pytest.raises(Interrupted):
        run(started)
    assert place.asked == [1024]
    skipped = "the checkpoint after 2,048 rows is not evaluated: the evaluation of the one after 1,024 rows is still"
    assert skipped in caplog.text
    assert caplog.text.count("is not evaluated") == 4
    assert sae.load_checkpoint(tmp_path, NAMES[0], 1024).cfg["rows"] == 1024
    assert sae.load_checkpoint(tmp_path, NAMES[0]).cfg["rows"] == 5120
    assert place.closed, "a run that ends by an error waits for nothing"


def by_hand(started: Trainer) -> ByHand:
    monitor = started.monitor
    assert isinstance(monitor, Monitor)
    place = monitor._elsewhere
    assert isinstance(place, ByHand)
    return place


def test_a_loaded_checkpoint_is_let_go_though_its_evaluation_goes_on(
    ds: actcache.Dataset, tmp_path: Path
) -> None:
    started = trainer(ds, tmp_path, settings(ds), ByHand, last=20)
    by_hand(started).told = [News()]
    with pytest.raises(Interrupted):
        run(started)
    assert [int(p.name) for p in (tmp_path / "checkpoints").iterdir()] == [4096]


def test_the_end_of_the_run_waits_no_longer_than_it_may_and_says_so(
    ds: actcache.Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    started = trainer(ds, tmp_path, settings(ds, wait_s=0), ByHand)
    saes = run(started)
    assert [s.cfg["rows"] for s in saes] == [N_ROWS, N_ROWS]
    assert by_hand(started).asked == [2048, 6000]
    assert "waiting for the evaluation after 2,048 rows, at most 0 s" in caplog.text
    assert (
        f"is still going on and is given up after 0 s; python -m sae eval {tmp_path} evaluates" in caplog.text
    )
    assert by_hand(started).closed
    assert not (tmp_path / "checkpoints").exists()


def test_what_goes_wrong_in_an_evaluation_is_a_line_and_the_next_one_is_made(
    ds: actcache.Dataset, straight: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started = trainer(ds, tmp_path, settings(ds, wait_s=0), ByHand)
    done = figures(topk_48_4={"fvu": 0.25, "ce_recovered_zero": None}, batchtopk_48_4={"fvu": 0.5})
    by_hand(started).told = [News(cause="no memory is left"), News(), done]
    run(started)
    assert (
        "the checkpoint after 2,048 rows could not be evaluated: no memory is left; this does not touch the training"
        in caplog.text
    )
    assert [line["rows"] for line in lines(tmp_path)] == [4096]
    assert started.monitor is not None
    assert started.monitor.shown == {"eval fvu": "0.250/0.500", "ce recovered": "?/?"}
    for name in NAMES:
        assert (straight / name / "weights.safetensors").read_bytes() == (
            tmp_path / name / "weights.safetensors"
        ).read_bytes()


def test_a_checkpoint_that_has_vanished_is_a_line(
    ds: actcache.Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started = trainer(ds, tmp_path, settings(ds))
    assert started.monitor is not None
    started.monitor.completed(2048, 8)
    started.monitor.look()
    assert "the checkpoint after 2,048 rows could not be evaluated" in caplog.text
    assert "has no checkpoint after 2,048 rows, or not any more" in caplog.text


def test_the_progress_bar_shows_the_newest_evaluation(ds: actcache.Dataset, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    started = trainer(ds, tmp_path, settings(ds))
    started._tell = told.append
    run(started)
    assert "eval fvu" not in told[0]["shown"]
    by_rows = [
        f"{one['fvu']:.3f}/{other['fvu']:.3f}"
        for one, other in zip(*(lines(tmp_path, name) for name in NAMES), strict=True)
    ]
    assert told[-1]["shown"]["eval fvu"] in by_rows[:2]
    assert started.monitor is not None
    assert started.monitor.shown["eval fvu"] == by_rows[2]
    assert f"{lines(tmp_path)[2]['ce_recovered_zero']:.3f}/" in started.monitor.shown["ce recovered"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "valid"}, r"no split 'valid' in .*; it has test, train, validation"),
        ({"model": None}, r"no LM to evaluate in.*came from a local directory.*--eval-sequences 0"),
        ({"model": "/nowhere/at-all"}, r"no LM to evaluate in.*no model directory '/nowhere/at-all'"),
        (
            {"model": "bundled:stdlib-gpt2"},
            r"no LM to evaluate in.*holds activations of tiny-gpt2 at revision",
        ),
        ({"gpus": 1}, r"eval gpus is 1, which a run on Ray reserves.*name its device, e.g. cuda:1"),
        ({"device": "cuda:77"}, r"eval device is cuda:77, and this machine has \d+ GPUs"),
        ({"device": "gpu"}, r"eval device is 'gpu'; give cpu, or cuda:1"),
    ],
)
def test_an_evaluation_that_cannot_be_done_is_refused_before_anything_is_made(
    ds: actcache.Dataset, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    stream = ds.stream([SITE], batch_size=256, metadata=False)
    out = tmp_path / "run"
    with pytest.raises(SpecError, match=message):
        sae.train(stream, CONFIGS, sae.Training(n_rows=2000), out=out, eval_every=settings(ds, **changes))
    assert not out.exists()


def test_a_run_that_other_processes_cannot_read_is_refused(ds: actcache.Dataset, tmp_path: Path) -> None:
    stream, training = ds.stream([SITE], batch_size=256, metadata=False), sae.Training(n_rows=2000)
    for out in (None, "memory://during/run"):
        with pytest.raises(
            SpecError, match="from stored checkpoints, and out is .*; give a directory or a URL"
        ):
            sae.train(stream, CONFIGS, training, out=out, eval_every=settings(ds))
    rows = sae.ArrayStream(ds.read(SITE, slice(0, 2000)), batch_size=256, site=SITE)
    with pytest.raises(SpecError, match="a ArrayStream is not a stored dataset with held-out rows"):
        sae.train(rows, CONFIGS, training, out=tmp_path / "run", eval_every=1000)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_returned_though_no_evaluation_could_be_done(
    ds: actcache.Dataset, straight: Path
) -> None:
    stream = ds.stream([SITE], batch_size=256, epochs=2, metadata=False)
    training = sae.Training(n_rows=N_ROWS, lr=1e-3, checkpoint_every_rows=None, log_every=4)
    evals = settings(ds, model="/nowhere/at-all")
    saes = sae.train(stream, CONFIGS, training, out=straight, eval_every=evals)
    assert [s.cfg["rows"] for s in saes] == [N_ROWS, N_ROWS]


def test_settings_that_make_no_sense_are_refused() -> None:
    for name, value in {
        "every_rows": 0,
        "n_sequences": -1,
        "cpus": 0,
        "gpus": -0.5,
        "n_rows": 0,
        "wait_s": -1,
    }.items():
        with pytest.raises(ValueError, match=f"eval {name} is {value}; it must be"):
            sae.EvalDuring(**{"every_rows": 10, name: value})
    assert sae.EvalDuring.of(500) == sae.EvalDuring(every_rows=500)
    assert sae.EvalDuring.of(None) is None
