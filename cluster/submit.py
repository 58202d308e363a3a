"""Runs as jobs of a Ray cluster's job server: submit, find, follow, stop.

A run's attempts are the jobs <run>-1, <run>-2, ...; the job server is the only record of them. Ray
runs a job once, so retrying is ours: submitting again makes the next attempt, and the command itself
resumes (harvest and train do). Nothing is written on the submitter's side. On the cluster, Ray 2.60
writes the values of a job's environment variables into its nodes' runtime_env_agent.log (measured).
"""

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .config import ConfigError, Run

STOP_WAIT_S = 30  # Ray kills 3 s after SIGTERM by default: too short for a block to be committed
_POLL_S = 0.5
_SETTLE_S = 15  # the log's last line may come before the job's last state
_EXCLUDES = [".git", ".venv", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis"]
_ID = re.compile(r"(.+)-([1-9]\d*)")


class ClusterError(Exception):
    """The job server refused, is out of reach, or holds something else than was asked for."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One job of a run, as the job server described it a moment ago."""

    run: str
    number: int
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    entrypoint: str
    message: str
    """What Ray says about the status; for FAILED it ends in the log's last lines."""
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


def connect(address: str | None = None) -> Any:
    """A `JobSubmissionClient`, checked to reach its server.

    Ray lets the variables RAY_API_SERVER_ADDRESS and RAY_ADDRESS override `address`; None without
    them means a cluster on this machine. With RAY_AUTH_MODE=token it authenticates by RAY_AUTH_TOKEN.

    Raises:
        ClusterError: no server there, or it does not know us.
    """
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as err:
        raise ClusterError("Ray is not installed here; pip install 'ray[default]'") from err
    with _one_kind_of_error():
        return JobSubmissionClient(address)


def attempts(client: Any, run: str | None = None) -> list[Attempt]:
    """The attempts of one run, or of all, oldest first. Other jobs of the cluster are left out."""
    with _one_kind_of_error():
        jobs = client.list_jobs()
    found = []
    for job in jobs:
        match = _ID.fullmatch(job.submission_id or "")
        if match is None or run not in (None, match[1]):
            continue
        found.append(
            Attempt(
                run=match[1],
                number=int(match[2]),
                status=str(job.status),
                entrypoint=job.entrypoint,
                message=job.message or "",
                started_s=job.start_time / 1000 if job.start_time else None,
                ended_s=job.end_time / 1000 if job.end_time else None,
            )
        )
    return sorted(found, key=lambda a: a.number if run else a.started_s or 0)


def newest(client: Any, run: str) -> Attempt:
    """The last attempt of a run.

    Raises:
        ClusterError: the cluster knows no attempt of it (a restarted cluster has forgotten all).
    """
    found = attempts(client, run)
    if not found:
        raise ClusterError(f"this cluster knows no run {run!r}; see `python -m cluster list`")
    return found[-1]


def request(run: Run, attempt: int | str) -> dict[str, Any]:
    """What is sent: the arguments of `JobSubmissionClient.submit_job`, with the environment's values.

    Raises:
        ConfigError: a variable that the run names is not set here.
    """
    missing = [name for name in run.env if name not in os.environ]
    if missing:
        raise ConfigError(f"env names {', '.join(missing)}, not set here; export it or take it out of env")
    env_vars = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)} | {n: os.environ[n] for n in run.env}
    runtime_env: dict[str, Any] = {"env_vars": env_vars}
    if run.working_dir is not None:
        runtime_env |= {"working_dir": run.working_dir, "excludes": _EXCLUDES}
    return {
        "submission_id": f"{run.name}-{attempt}",
        "entrypoint": run.entrypoint,
        "entrypoint_num_cpus": run.num_cpus,
        "entrypoint_num_gpus": run.num_gpus,
        "runtime_env": runtime_env,
    }


def submit(client: Any, run: Run) -> tuple[Attempt, bool]:
    """The run's newest attempt, and whether this call made it.

    None is made where the same command has succeeded before; a changed command is a next attempt.

    Raises:
        ClusterError: an attempt is pending or running, also when somebody else just submitted it.
        ConfigError: see `request`.
    """
    before = attempts(client, run.name)
    last = before[-1] if before else None
    if last and not last.over:
        raise ClusterError(
            f"{last.id} is {last.status}; `python -m cluster logs -f {run.name}` follows it, stop ends it"
        )
    if last and last.status == "SUCCEEDED" and last.entrypoint == run.entrypoint:
        return last, False
    sent = request(run, last.number + 1 if last else 1)
    with _one_kind_of_error():
        client.submit_job(**sent)
    return newest(client, run.name), True


def logs(client: Any, attempt: Attempt) -> str:
    """All that the attempt has printed so far."""
    with _one_kind_of_error():
        return str(client.get_job_logs(attempt.id))


def follow(client: Any, attempt: Attempt, write: Callable[[str], object]) -> Attempt:
    """Pass the log from its beginning to `write` as it grows; return the attempt once it is over.

    Raises:
        ClusterError: the connection was lost; the attempt itself goes on.
    """

    async def tail(lines: AsyncIterator[str]) -> None:
        async for text in lines:
            write(text)

    with _one_kind_of_error():
        asyncio.run(tail(client.tail_job_logs(attempt.id)))
    return wait(client, attempt, _SETTLE_S)


def stop(client: Any, attempt: Attempt) -> Attempt:
    """Ask the command to end (SIGTERM, SIGKILL after `STOP_WAIT_S`) and wait until it has."""
    with _one_kind_of_error():
        client.stop_job(attempt.id)
    return wait(client, attempt, STOP_WAIT_S + _SETTLE_S)


def wait(client: Any, attempt: Attempt, timeout_s: float) -> Attempt:
    """The attempt once it is over.

    Raises:
        ClusterError: it was not within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        now = next((a for a in attempts(client, attempt.run) if a.number == attempt.number), None)
        if now is None:
            raise ClusterError(f"{attempt.id} has been deleted from the cluster")
        if now.over:
            return now
        if time.monotonic() > deadline:
            raise ClusterError(f"{now.id} is still {now.status} after {timeout_s:.0f} s; look again later")
        time.sleep(_POLL_S)


@contextmanager
def _one_kind_of_error() -> Iterator[None]:
    """Whatever Ray's client raises (its own, requests', aiohttp's), as a ClusterError of one line."""
    from aiohttp import ClientError
    from ray.exceptions import RayError

    try:
        yield
    except (OSError, RuntimeError, ValueError, ClientError, RayError) as err:
        text = " ".join(str(err).split()) or type(err).__name__
        if type(err).__name__ == "AuthenticationError":  # Ray has it since 2.52
            text = "the cluster wants its token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        raise ClusterError(text if len(text) <= 600 else f"{text[:300]} ... {text[-300:]}") from err
