"""Room for workers on a Ray cluster: whether they can be placed, and how many, as Ray's scheduler says.

Ray Train asks for a number of workers and waits in silence. So the driver first reserves their place by a
placement group, says what is missing while that is pending, and gives it back as it starts that many. An elastic
run also reserves a place for each worker that it may have more. Pending places are what an autoscaler sees.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from .distributed import Workers


class Room:
    """Places for `least` workers, all or none, so that two runs never wait for each other; and for more, one by one."""

    def __init__(self, workers: Workers, least: int) -> None:
        self._workers = workers
        self._groups: list[Any] = []
        if least:
            self._reserve(least)

    @property
    def placed(self) -> int:
        """Workers that have a place by now."""
        from ray.util import placement_group_table

        made = [g for g in self._groups if placement_group_table(g)["state"] == "CREATED"]
        return sum(g.bundle_count for g in made)

    def reserve_more(self, n: int) -> None:
        """Ask for a place for each of `n` more."""
        for _ in range(n):
            self._reserve(1)

    def give_back(self) -> None:
        from ray.util import remove_placement_group

        while self._groups:
            remove_placement_group(self._groups.pop())

    def _reserve(self, n: int) -> None:
        from ray.util import placement_group

        self._groups.append(placement_group([self._workers.resources] * n))


@contextlib.contextmanager
def room_for(workers: Workers, least: int) -> Iterator[Room]:
    """Places that are given back at the end."""
    room = Room(workers, least)
    try:
        yield room
    finally:
        room.give_back()


def shortage(workers: Workers) -> str:
    """What the cluster has of what the least number of workers need, and lacks."""
    import ray

    wanted = {name: n * workers.least for name, n in workers.resources.items()}
    there, free = ray.cluster_resources(), ray.available_resources()
    has = ", ".join(f"{there.get(k, 0):g} {k} ({free.get(k, 0):g} free)" for k in wanted)
    lacks = [f"{n - there.get(k, 0):g} {k}" for k, n in wanted.items() if n > there.get(k, 0)]
    why = f"it lacks {', '.join(lacks)}" if lacks else "others hold it, or no node has enough"
    return f"the cluster has {has}; {why}"
