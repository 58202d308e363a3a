"""Evaluation during training by actors of a Ray cluster, with what they reserve."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluated
import pytest
from evaluated import Dying, Here, Refusing, job_on
from test_eval_during import CONFIGS, N_ROWS, NAMES, SITE, ds, lines, run, settings, trainer, without_clock

import actcache
import sae
from actcache.errors import SpecError
from sae.evals.during import EvalDuringJob
from sae.evals.on_ray import RayEvaluation

__all__ = ["ds"]  # a fixture

pytestmark = [pytest.mark.ray, pytest.mark.slow]
_TIMEOUT_S = 120.0


@pytest.fixture
def cluster(ray_session: Any) -> Iterator[Any]:
    """The cluster, whose workers get what this test defines by value."""
    ray_session.cloudpickle.register_pickle_by_value(evaluated)
    yield ray_session
    ray_session.cloudpickle.unregister_pickle_by_value(evaluated)


def test_actors_find_the_figures_that_this_process_finds(
    ray_session: Any, ds: actcache.Dataset, tmp_path: Path
) -> None:
    one, other = tmp_path / "here", tmp_path / "ray"
    run(trainer(ds, one, settings(ds, every_rows=6000), Here))
    started = trainer(ds, other, settings(ds, every_rows=6000), RayEvaluation)
    run(started)
    for here, there in zip(without_clock(one), without_clock(other), strict=True):
        assert [line["rows"] for line in there] == [6000]
        for a, b in zip(here, there, strict=True):
            assert a.keys() == b.keys()
            for name, value in a.items():
                assert b[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), (
                    name
                )
    assert lines(other)[0]["seconds"] > 0
    for name in NAMES:
        weights = [(out / name / "weights.safetensors").read_bytes() for out in (one, other)]
        assert weights[0] == weights[1]


def test_a_run_of_workers_is_evaluated_beside_them_and_ends_with_the_weights_of_one_process(
    ray_session: Any, ds: actcache.Dataset, tmp_path: Path
) -> None:
    stream = ds.stream([SITE], batch_size=256, epochs=2, metadata=False)
    training = sae.Training(n_rows=N_ROWS, lr=1e-3, checkpoint_every_rows=None, log_every=4)
    sae.train(stream, CONFIGS, training, out=tmp_path / "ray", workers=2, eval_every=settings(ds))
    run(trainer(ds, tmp_path / "here", None))
    for name in NAMES:
        found = lines(tmp_path / "ray", name)
        assert found[-1]["rows"] == N_ROWS
        assert {line["rows"] for line in found} <= {2048, 4096, N_ROWS}, "slow ones are left out"
        assert found[-1]["ce_recovered_zero"] is not None
        weights = [(tmp_path / out / name / "weights.safetensors").read_bytes() for out in ("ray", "here")]
        assert weights[0] == weights[1]


def test_what_cannot_be_placed_is_waited_for_no_longer_than_it_may(
    ray_session: Any, ds: actcache.Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started = trainer(ds, tmp_path, settings(ds, cpus=1000, wait_s=0.5), RayEvaluation)
    run(started)
    text = caplog.text
    assert "after 2,048 rows still waits for 1000 CPU of the cluster and is given up after 0.5 s" in text
    assert (
        "the checkpoint after 4,096 rows is not evaluated: the evaluation of the one after 2,048 rows still"
        in text
    )
    assert json.loads((tmp_path / "run.json").read_text())["finished"]
    assert not (tmp_path / "checkpoints").exists()


def test_it_is_placed_outside_of_the_group_of_the_trainings_workers(cluster: Any) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([{"CPU": 1}])
    cluster.get(group.ready())
    inside = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)

    def rank() -> str | None:
        place = RayEvaluation(job_on(Refusing()))
        place.begin(10)
        news = place.news(_TIMEOUT_S)
        return None if news is None else news.cause

    try:
        found = cluster.get(cluster.remote(rank).options(scheduling_strategy=inside).remote())
    finally:
        remove_placement_group(group)
    assert found is not None
    assert "no such dataset any more" in found


def test_an_actor_that_dies_is_told_and_the_next_one_is_another(cluster: Any) -> None:
    place = RayEvaluation(job_on(Dying()))
    for _ in range(2):
        place.begin(10)
        news = place.news(_TIMEOUT_S)
        assert news is not None
        assert news.cause is not None
        assert news.cause.startswith("its worker was lost")
        assert place._actor is None


def test_an_lm_may_be_on_the_nodes_alone_unless_no_node_can_have_it(
    ds: actcache.Dataset, tmp_path: Path
) -> None:
    elsewhere = settings(ds, model="/on/the/nodes")
    RayEvaluation(EvalDuringJob(settings=elsewhere, ds=ds, run=str(tmp_path)))
    for model in (None, "bundled:stdlib-gpt2"):
        job = EvalDuringJob(settings=settings(ds, model=model), ds=ds, run=str(tmp_path))
        with pytest.raises(SpecError, match="no LM to evaluate in during training"):
            RayEvaluation(job)


def test_a_device_of_one_machine_is_refused() -> None:
    device = sae.EvalDuring(every_rows=10, device="cuda:1")
    job = replace(job_on(None), settings=device)
    with pytest.raises(
        SpecError, match="eval device is cuda:1.*a run on Ray reserves GPUs instead, so give --eval-gpus"
    ):
        RayEvaluation(job)
