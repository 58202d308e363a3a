"""Runs over several ranks: the directory, metrics, checkpoints and SAEs of one process, however they are spread.

Ranks are processes of this machine on gloo. Rows are in memory here; tests/sae/test_distributed.py reads
datasets, and Ray starts the ranks.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch

import sae
from actcache.errors import Drained, RankFailed, SpecError
from sae.group import ALONE
from sae.rundir import progress_of
from sae.spread import Layout, Spread, spread_of
from sae.train import NonFiniteLoss, Trainer

D, N_ROWS, BATCH = 24, 4000, 200
CONFIGS = [
    sae.TopK(d_sae=96, k=6),
    sae.BatchTopK(d_sae=96, k=6),
    sae.JumpReLU(d_sae=96, target_l0=8, optimiser=sae.Optimiser(lr=1e-3)),
    sae.Matryoshka(d_sae=64, k=6, revive=sae.Resampling(every_rows=1100)),
]


def _acts() -> np.ndarray:
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(40, D))
    strength = rng.random((N_ROWS, 40)) * (rng.random((N_ROWS, 40)) < 0.1)
    return (strength @ directions + 0.02 * rng.normal(size=(N_ROWS, D)) + 0.3).astype(np.float32)


def _training(**changes) -> sae.Training:
    wanted = {
        "n_rows": 6150,
        "lr": 2e-3,
        "dead_after_rows": 900,
        "log_every": 5,
        "checkpoint_every_rows": 4000,
    }
    return sae.Training(**{**wanted, **changes})


class Ending(sae.ArrayStream):
    """Dies after some batches, as a killed process does for whoever resumes it; or one holds a NaN."""

    last: int | None = None
    bad: int | None = None

    def __iter__(self):
        for i, batch in enumerate(super().__iter__()):
            if i == self.last:
                raise KeyboardInterrupt
            if i == self.bad:
                batch["activations"][7] = np.nan
            yield batch


def _run(spread: str | None, out: str, last: int | None = None, bad: int | None = None, **changes) -> dict:
    """One rank's part of a run; what it saw."""
    import torch.distributed as dist

    stream = Ending(_acts(), batch_size=BATCH, epochs=2)
    stream.last, stream.bad = last, bad
    world = dist.get_world_size() if dist.is_initialized() else 1
    layout = Layout(spread_of(spread, world, len(CONFIGS)) if world > 1 else None)
    told: list[dict] = []
    asked = changes.pop("asked_after", None)
    trainer = Trainer(
        stream,
        CONFIGS,
        _training(**changes),
        start=[None] * len(CONFIGS),
        out=out,
        layout=layout,
        tell=told.append,
        asked=lambda: asked is not None and layout.rank == world - 1 and trainer.rows >= asked,
    )
    done = trainer.open(True)
    error, saes = None, []
    begun_at = trainer.rows
    with torch.enable_grad():
        try:
            saes = done if done is not None else trainer.run()
        except (KeyboardInterrupt, Drained, NonFiniteLoss, RankFailed) as caught:
            error = f"{type(caught).__name__}: {caught}"
    return {"error": error, "begun_at": begun_at, "told": told, "n_saes": len(saes), "hit": done is not None}


def _weights(out: Path) -> list[dict[str, torch.Tensor]]:
    names = json.loads((out / "run.json").read_text())["saes"]
    return [sae.load(out / name).state_dict() for name in names]


def _close(a: Path, b: Path, tolerance: float) -> None:
    for one, many in zip(_weights(a), _weights(b), strict=True):
        for name, tensor in one.items():
            off = float((tensor - many[name]).norm() / tensor.norm().clamp_min(1e-30))
            assert off <= tolerance, name
    for file in sorted(a.glob("*/metrics.jsonl")):
        left, right = (
            [json.loads(line) for line in (run / file.relative_to(a)).read_text().splitlines()]
            for run in (a, b)
        )
        assert [line["rows"] for line in left] == [line["rows"] for line in right]
        for key in ("loss", "fvu", "l0", "dead"):
            np.testing.assert_allclose(
                [line[key] for line in left], [line[key] for line in right], rtol=1e-4, err_msg=key
            )


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("straight")
    assert _run(None, str(out))["error"] is None
    return out


def test_whole_saes_dealt_to_ranks_equal_those_of_one_process_to_the_bit(straight, tmp_path):
    found = ranks.on_ranks(2, _run, "saes", str(tmp_path))
    assert [rank["n_saes"] for rank in found] == [len(CONFIGS), 0]
    for one, many in zip(_weights(straight), _weights(tmp_path), strict=True):
        assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())
    _close(straight, tmp_path, 0)
    last = json.loads((tmp_path / "topk-96-6" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["world_size"] == 2
    assert len(last["stall_by_rank"]) == 2
    assert found[0]["told"][-1]["rows"] == 6150
    assert found[1]["told"] == []  # one line for the run, not one a rank


@pytest.mark.parametrize("spread", ["latents", "rows"])
def test_a_run_spread_over_ranks_equals_that_of_one_process(straight, tmp_path, spread):
    found = ranks.on_ranks(2, _run, spread, str(tmp_path))
    assert [rank["error"] for rank in found] == [None, None]
    _close(straight, tmp_path, 1e-4)
    assert ranks.on_ranks(2, _run, spread, str(tmp_path))[0]["hit"]


def test_a_run_goes_on_at_another_world_size_and_layout_from_the_last_checkpoint(straight, tmp_path):
    killed = ranks.on_ranks(2, _run, "latents", str(tmp_path), 27)
    assert [rank["error"] for rank in killed] == ["KeyboardInterrupt: "] * 2
    for spread, world, last in (("rows", 3, 5), ("saes", 2, 6), (None, 1, None)):
        found = ranks.on_ranks(world, _run, spread, str(tmp_path), last)
        assert {rank["begun_at"] for rank in found} == {4000}, "the checkpoint before"
    assert found[0]["error"] is None
    _close(straight, tmp_path, 1e-4)


def test_at_the_same_world_size_a_resumed_run_equals_the_straight_one_to_the_bit(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    ranks.on_ranks(2, _run, "latents", str(whole))
    ranks.on_ranks(2, _run, "latents", str(resumed), 27)
    ranks.on_ranks(2, _run, "latents", str(resumed))
    for one, many in zip(_weights(whole), _weights(resumed), strict=True):
        assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())


def test_one_rank_that_is_asked_to_stop_saves_the_run_on_all(straight, tmp_path):
    stopped = ranks.on_ranks(2, _run_asked, "latents", str(tmp_path), 3500)
    assert all(rank["error"].startswith("Drained: stopped after 4,000 rows, saved in") for rank in stopped)
    far = progress_of(tmp_path)
    assert (far["state"], far["rows_wanted"], far["world_size"], far["spread"]) == (
        "partial",
        6150,
        2,
        "latents",
    )
    assert far["rows_done"] <= 4000
    assert len(far["stall_by_rank"]) == 2
    resumed = ranks.on_ranks(2, _run, "latents", str(tmp_path))
    assert resumed[0]["begun_at"] == 4000
    _close(straight, tmp_path, 1e-4)


def _run_asked(spread: str, out: str, after: int) -> dict:
    return _run(spread, out, asked_after=after, checkpoint_every_rows=None)


@pytest.mark.parametrize("spread", ["saes", "latents"])
def test_a_loss_that_is_not_finite_ends_every_rank_with_the_cause(tmp_path, spread):
    found = ranks.on_ranks(2, _run, spread, str(tmp_path), None, 23)
    for rank in found:
        assert "is nan at step" in rank["error"], rank["error"]
        assert "1 of its 200 rows hold inf or NaN" in rank["error"]


def test_layouts_are_named_or_refused_in_a_line():
    assert spread_of(None, 4, 8) == Spread((1, 4), dealt=True)
    assert spread_of(None, 4, 3) == Spread((1, 4))
    assert spread_of("rows", 4, 1) == Spread((4, 1))
    assert str(spread_of("rows=2,latents=4", 8, 1)) == "rows=2,latents=4"
    for text, message in {
        "saes": "1 SAEs can not be dealt to 4 workers",
        "columns": "it is one of saes, latents, rows or rows=R,latents=L",
        "rows=3,latents=2": "is of 6 workers, and there are 4",
    }.items():
        with pytest.raises(SpecError, match=message):
            spread_of(text, 4, 1)


def test_one_process_needs_no_layout():
    layout = Layout()
    assert layout.group is ALONE
    stream = sae.ArrayStream(_acts())
    assert layout.stream(stream) is stream


def test_a_stream_that_can_not_be_divided_is_refused():
    assert ranks.on_ranks(2, _undivided)[0].startswith("a _Plain can not be read by 2 workers")


class _Plain:
    sites, batch_size, n_rows = ["x"], 10, 100


def _undivided() -> str:
    with pytest.raises(SpecError) as caught:
        Layout(Spread((1, 2))).stream(_Plain())  # type: ignore[arg-type]
    return str(caught.value)
