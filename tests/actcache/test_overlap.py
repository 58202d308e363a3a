"""Stages side by side: order, errors, early ends and budgets."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from actcache.overlap import Room, Times, ahead


@pytest.fixture
def pool():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def ignored(seconds):
    pass


def test_items_come_in_order_and_at_most_three_exist_at_a_time(pool):
    alive, most, lock = set(), [], threading.Lock()

    def items():
        for i in range(50):
            with lock:
                alive.add(i)
                most.append(len(alive))
            yield i

    found = []
    for i in ahead(items(), pool, ignored):
        time.sleep(0.002)
        found.append(i)
        with lock:
            alive.discard(i)
    assert found == list(range(50))
    assert max(most) == 3


def test_the_producer_works_while_the_consumer_does(pool):
    made = [threading.Event() for _ in range(4)]

    def items():
        for i, event in enumerate(made):
            event.set()
            yield i

    for i in ahead(items(), pool, ignored):
        if i + 1 < len(made):
            assert made[i + 1].wait(10)  # for ever, if the next item were made only when it is asked for


def test_an_error_comes_after_the_items_before_it(pool):
    def items():
        yield 1
        raise ValueError("broken")

    made = ahead(items(), pool, ignored)
    assert next(made) == 1
    with pytest.raises(ValueError, match="broken"):
        next(made)


def test_a_consumer_that_stops_stops_the_producer(pool):
    made, closed = [], threading.Event()

    def items():
        try:
            for i in range(10**9):
                made.append(i)
                yield i
        finally:
            closed.set()

    with closing(ahead(items(), pool, ignored)) as running:
        assert next(running) == 0
    del running
    assert pool.submit(lambda: True).result(5)  # its thread is free
    assert closed.wait(5)
    assert len(made) <= 3


def test_time_spent_waiting_for_the_consumer_is_told(pool):
    waited = []
    for _ in ahead(range(4), pool, waited.append):
        time.sleep(0.1)
    assert sum(waited) > 0.15


def test_room_lets_in_what_fits_and_always_one():
    room, inside, most = Room(10), [], []

    def take(n):
        with room.taken(n):
            inside.append(n)
            most.append(sum(inside))
            time.sleep(0.02)
            inside.remove(n)

    threads = [threading.Thread(target=take, args=(n,)) for n in (4, 5, 6, 3, 25, 5, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(most) == 7
    assert max(m for m in most if m != 25) <= 10


def test_room_is_given_back_by_what_fails():
    room = Room(10)
    with pytest.raises(ValueError, match="x"), room.taken(10):
        raise ValueError("x")
    with room.taken(10):
        pass


def test_times_add_up_over_threads():
    times = Times()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: times.add(rows=1, encode_s=0.5), range(1000)))
    found = times.snapshot()
    assert found["rows"] == 1000
    assert found["encode_s"] == 500
    assert "_lock" not in found
