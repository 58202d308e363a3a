"""A run's attempts, and what every backend can do with them.

An attempt is one submission of a run, called <run>-<n>. A backend runs an attempt once: retrying is
ours. Submitting a failed or stopped run again makes the next attempt, and the commands themselves go on from what
is stored (harvest and train do).
"""

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .config import Run
from .training import Nodes

POLL_S = 0.2
_ID = re.compile(r"(.+)-([1-9]\d*)")


class ClusterError(Exception):
    """The backend refused, is out of reach, or holds something else than was asked for: what was found, and what helps."""

    def __init__(self, found: str, fix: str = "") -> None:
        super().__init__(f"{found}; {fix}" if fix else found)
        self.found, self.fix = found, fix


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One submission of a run, as its backend described it a moment ago."""

    run: str
    number: int
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    entrypoint: str
    message: str
    """What the backend says about the status."""
    started_s: float | None
    """Unix time."""
    ended_s: float | None

    @property
    def id(self) -> str:
        """The submission id."""
        return f"{self.run}-{self.number}"

    @property
    def over(self) -> bool:
        """Whether the status is final."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


def parse_id(text: str) -> tuple[str, int] | None:
    """(run, number) of a submission id; None if it is none of ours."""
    match = _ID.fullmatch(text)
    return (match[1], int(match[2])) if match else None


class Backend(ABC):
    """Where runs run. Everything raises ClusterError when the backend refuses or cannot be reached."""

    @abstractmethod
    def attempts(self, run: str | None = None) -> list[Attempt]:
        """The attempts of one run, or of all, oldest first."""

    @abstractmethod
    def request(self, run: Run, attempt: int | str) -> str:
        """What `start` would send, as text, without a value of any variable in `env`."""

    @abstractmethod
    def start(self, run: Run, attempt: int) -> None:
        """Begin an attempt.

        Raises:
            ConfigError: this backend cannot run it as written.
        """

    @abstractmethod
    def nodes(self, run: Run) -> Nodes:
        """The nodes on which the run would run: those that are there, or that it asks for.

        Raises:
            ConfigError: it asks for nodes that are too small for it.
        """

    @abstractmethod
    def logs(self, attempt: Attempt) -> str:
        """All that the attempt has printed so far."""

    @abstractmethod
    def follow(self, attempt: Attempt, write: Callable[[str], object]) -> Attempt:
        """Pass the log from its beginning to `write` as it grows; return the attempt once it is over."""

    @abstractmethod
    def stop(self, attempt: Attempt) -> Attempt:
        """Ask the attempt to finish what is in flight and end; wait until it has."""

    def newest(self, run: str) -> Attempt:
        """The last attempt of a run.

        Raises:
            ClusterError: the backend knows none (a restarted cluster has forgotten all).
        """
        found = self.attempts(run)
        if not found:
            raise ClusterError(f"this cluster knows no run {run!r}; see `python -m cluster list`")
        return found[-1]

    def submit(self, run: Run) -> tuple[Attempt, bool]:
        """The run's newest attempt, and whether this call made it.

        None is made where the same command has succeeded before; a changed command is a next attempt.

        Raises:
            ClusterError: an attempt is pending or running, also when somebody else just submitted it.
            ConfigError: see `start`.
        """
        self.request(run, "")  # what is wrong with the run is said before anything is asked of the cluster
        before = self.attempts(run.name)
        last = before[-1] if before else None
        if last and not last.over:
            raise ClusterError(
                f"{last.id} is {last.status}; `python -m cluster logs -f {run.name}` follows it, stop ends it"
            )
        if last and last.status == "SUCCEEDED" and last.entrypoint == run.entrypoint:
            return last, False
        self.start(run, last.number + 1 if last else 1)
        return self.newest(run.name), True

    def wait(self, attempt: Attempt, timeout_s: float) -> Attempt:
        """The attempt once it is over.

        Raises:
            ClusterError: it was not within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            now = next((a for a in self.attempts(attempt.run) if a.number == attempt.number), None)
            if now is None:
                raise ClusterError(f"{attempt.id} has been deleted from the cluster")
            if now.over:
                return now
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{now.id} is still {now.status} after {timeout_s:.0f} s; look again later"
                )
            time.sleep(POLL_S)


def backend(name: str, **options: Any) -> Backend:
    """The backend of that name; `address` is Ray's job server, `namespace` KubeRay's."""
    if name == "local":
        from .local import Local

        return Local()
    if name == "kuberay":
        from .kuberay import KubeRayJobs

        return KubeRayJobs(options.get("namespace"))
    if name == "slurm":
        from .slurm import SlurmJobs

        return SlurmJobs()
    from .ray_jobs import RayJobs

    return RayJobs()
