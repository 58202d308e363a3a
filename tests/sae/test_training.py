"""When checkpoints are due."""

import pytest

import sae
from sae.training import CheckpointSchedule


def test_a_checkpoint_is_due_after_rows_or_seconds_whichever_comes_first() -> None:
    schedule = CheckpointSchedule(1000, 60.0)
    schedule.begin(rows=500, now_s=7.0)
    assert not schedule.due(1499, 66.9)
    assert schedule.due(1500, 7.0)
    assert schedule.due(500, 67.0)
    schedule.begin(rows=1500, now_s=67.0)
    assert not schedule.due(2499, 126.9)
    assert schedule.due(2500, 67.0)


def test_none_leaves_rows_or_time_out() -> None:
    by_rows, by_time = CheckpointSchedule(1000, None), CheckpointSchedule(None, 60.0)
    assert by_rows.due(1000, 0.0)
    assert not by_rows.due(999, 1e9)
    assert by_time.due(1, 60.0)
    assert not by_time.due(10**12, 59.0)
    assert not CheckpointSchedule(None, None).due(10**12, 1e9)


def test_one_is_due_after_each_multiple_whatever_came_before() -> None:
    schedule = CheckpointSchedule(None, None, multiples_of=1000)
    schedule.begin(rows=0, now_s=0.0)
    assert not schedule.due(999, 1e9)
    assert schedule.due(1096, 0.0)
    schedule.begin(rows=1900, now_s=0.0)  # by time, say
    assert not schedule.due(1999, 0.0)
    assert schedule.due(2000, 0.0)
    schedule.begin(rows=2000, now_s=0.0)
    assert not schedule.due(2999, 0.0)
    assert CheckpointSchedule(300, None, 1000).due(300, 0.0)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_seconds_that_are_no_time_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="checkpoint_every_s is .*; it must be positive, or none for rows"):
        sae.Training(n_rows=1, checkpoint_every_s=seconds)
    with pytest.raises(ValueError, match="checkpoint_every_rows is 0; it must be at least 1"):
        sae.Training(n_rows=1, checkpoint_every_rows=0)
