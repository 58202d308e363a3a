"""Runs as jobs of a Ray cluster's job server.

The job server is the only record of attempts; nothing is written on the submitter's side. Ray 2.60 keeps the values of a
job's variables in clear in its job table, and writes them into the runtime_env_agent.log of its nodes (measured): those
that look like credentials are refused unless the run says `env_in_clear`. `env_files` sends paths only.
"""

import asyncio
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from . import env_files
from .attempts import Attempt, Backend, ClusterError, parse_id
from .config import ConfigError, Run
from .credentials import secret_variables
from .training import Nodes

_CONNECT_S, _ANSWER_S = 10.0, 30.0  # Ray's client would wait for ever
_REACH = "give --address http://HOST:8265 of the head, forward that port, or start one: ray start --head"
_SETTLE_S = 15  # the log's last line may come before the job's last state
_LONGEST_DRAIN_S = 900  # of runs of which we know no drain_s: `stop NAME`; who is done sooner ends sooner
_VERSION = "/api/version"
_NODES = "/api/v0/nodes?detail=1&limit=10000"  # what `ray list nodes` asks
_EXCLUDES = [".git", ".venv", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis"]


class RayJobs(Backend):
    """The job server of one Ray cluster."""

    def __init__(self, address: str | None = None) -> None:
        """`address` as in `_connect`; it is reached when it is first asked for something."""
        self._address, self._connected = address, None

    @property
    def client(self) -> Any:
        """The `JobSubmissionClient`, checked to reach its server.

        Ray lets the variables RAY_API_SERVER_ADDRESS and RAY_ADDRESS override the address; None without them means
        a cluster on this machine. A server that wants a token gets that of RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH
        or ~/.ray/auth_token; others never see it.

        Raises:
            ClusterError: no server there, or it does not know us.
        """
        if self._connected is None:
            self._connected = _connect(self._address)
        return self._connected

    def attempts(self, run: str | None = None) -> list[Attempt]:
        """See `Backend`. Other jobs of the cluster are left out."""
        client = self.client
        with _one_kind_of_error():
            jobs = client.list_jobs()
        found = []
        for job in jobs:
            parsed = parse_id(job.submission_id or "")
            if parsed is None or run not in (None, parsed[0]):
                continue
            found.append(
                Attempt(
                    run=parsed[0],
                    number=parsed[1],
                    status=str(job.status),
                    entrypoint=job.entrypoint,
                    message=job.message or "",
                    started_s=job.start_time / 1000 if job.start_time else None,
                    ended_s=job.end_time / 1000 if job.end_time else None,
                )
            )
        return sorted(found, key=lambda a: a.number if run else a.started_s or 0)

    def request(self, run: Run, attempt: int | str) -> str:
        """The arguments of `JobSubmissionClient.submit_job`."""
        sent = self._arguments(run, attempt)
        sent["runtime_env"]["env_vars"] |= dict.fromkeys(run.env, "<from the environment>")
        return json.dumps(sent, indent=2)

    def nodes(self, run: Run) -> Nodes:
        """Nodes that are there now; an autoscaler may add others."""
        client = self.client
        with _one_kind_of_error():
            listed = client._do_request("GET", _NODES).json()["data"]["result"]["result"]
        resources = [node["resources_total"] for node in listed if node["state"] == "ALIVE"]
        return [(total.get("CPU", 0), total.get("GPU", 0)) for total in resources]

    def start(self, run: Run, attempt: int) -> None:
        """See `Backend`.

        Raises:
            ConfigError: a variable that the run names is not set here, or is a credential.
        """
        client, sent = self.client, self._arguments(run, attempt)
        with _one_kind_of_error():
            client.submit_job(**sent)

    @staticmethod
    def _arguments(run: Run, attempt: int | str) -> dict[str, Any]:
        require_env(run)
        if not run.env_in_clear and (found := secret_variables(run.env)):
            raise ConfigError(
                f"env would send {', '.join(found)}, and Ray keeps it in clear, in its job table and the logs of its nodes; "
                f'take it from a file of the nodes, env_files = {{ {found[0]} = "/run/secrets/..." }}, or let the nodes '
                "have it in their own environment, or accept it by env_in_clear = true"
            )
        env_vars = {"RAY_JOB_STOP_WAIT_TIME_S": str(run.drain_s)} | {n: os.environ[n] for n in run.env}
        runtime_env: dict[str, Any] = {"env_vars": env_vars | env_files.variable(run.env_files)}
        if run.env_files:
            runtime_env["worker_process_setup_hook"] = env_files.HOOK
        if run.working_dir is not None:
            runtime_env |= {"working_dir": run.working_dir, "excludes": _EXCLUDES}
        own = not run.steps  # a pipeline's steps reserve their own
        return {
            "submission_id": f"{run.name}-{attempt}",
            "entrypoint": run.entrypoint,
            "entrypoint_num_cpus": run.num_cpus if own else 0,
            "entrypoint_num_gpus": run.num_gpus if own else 0,
            "runtime_env": runtime_env,
        }

    def logs(self, attempt: Attempt) -> str:
        """See `Backend`."""
        client = self.client
        with _one_kind_of_error():
            return str(client.get_job_logs(attempt.id))

    def follow(self, attempt: Attempt, write: Callable[[str], object]) -> Attempt:
        """See `Backend`.

        Raises:
            ClusterError: the connection was lost, or the server answers no more; the attempt itself goes on.
        """
        client = self.client

        async def tail(lines: AsyncIterator[str]) -> None:
            while True:
                line = asyncio.ensure_future(anext(lines, None))
                while not (await asyncio.wait([line], timeout=_ANSWER_S))[0]:
                    await asyncio.to_thread(client.get_job_status, attempt.id)  # is the server still there?
                if (text := await line) is None:
                    return
                write(text)

        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # "WebSocket closed"
        with _one_kind_of_error():
            asyncio.run(tail(client.tail_job_logs(attempt.id)))
        return self.wait(attempt, _SETTLE_S)

    def stop(self, attempt: Attempt) -> Attempt:
        """SIGTERM to the command and its children; SIGKILL after the run's `drain_s`."""
        client = self.client
        with _one_kind_of_error():
            client.stop_job(attempt.id)
        return self.wait(attempt, _LONGEST_DRAIN_S)

    def versions(self) -> str:
        """Ray's version on the cluster."""
        client = self.client
        with _one_kind_of_error():
            return str(client._do_request("GET", _VERSION).json()["ray_version"])


def require_env(run: Run) -> None:
    """Refuse a run that names variables which are not set here.

    Raises:
        ConfigError: names them.
    """
    missing = [name for name in run.env if name not in os.environ]
    if missing:
        raise ConfigError(f"env names {', '.join(missing)}, not set here; export it or take it out of env")


def _connect(address: str | None) -> Any:
    try:
        import aiohttp  # noqa: F401 - Ray does without until a log is followed
        import requests
        from ray.job_submission import JobSubmissionClient
    except ImportError as err:
        raise ClusterError(
            f"Ray's client is not installed here ({err})", "pip install 'ray[default]'"
        ) from err
    from ray.exceptions import RayError

    class Client(JobSubmissionClient):  # type: ignore[misc, unused-ignore]
        """Ray's, which waits for ever, and takes any web server for Ray's until it stumbles over the answer."""

        def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:
            try:
                answer = super()._do_request(method, endpoint, timeout=(_CONNECT_S, _ANSWER_S), **more)
            except requests.ConnectionError as err:
                raise ClusterError(f"no job server is reached at {self._address}", _REACH) from err
            except requests.Timeout as err:
                found = f"{self._address} has not answered within {_ANSWER_S:g} s"
                raise ClusterError(found, "wait, or look at dashboard.log of the head") from err
            if endpoint == _VERSION:
                try:
                    str(answer.json()["ray_version"])
                except (ValueError, LookupError, TypeError) as err:
                    found = (
                        f"{self._address} answers ({answer.status_code}), but not as Ray's job server does"
                    )
                    raise ClusterError(found, _REACH) from err
            return answer

    _check_address(address)
    with _one_kind_of_error():
        try:
            return Client(address)
        except (RayError, RuntimeError) as err:
            token = _token()
            if type(err).__name__ != "AuthenticationError" or token is None:
                raise
            return Client(address, headers={"Authorization": f"Bearer {token}"})


def is_job_server(url: str) -> bool:
    """Whether this is http://HOST, with a port or without."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port beyond 65535
        return False


def _check_address(address: str | None) -> None:
    """Refuse what Ray would look for in vain for most of a minute, with warnings of its own.

    Raises:
        ClusterError: it is no URL, or nothing listens at HOST:PORT, which Ray asks for the job server.
    """
    name = next((n for n in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if os.environ.get(n)), None)
    address = os.environ[name] if name else address
    if address is None or address == "auto" or is_job_server(address):
        return
    found = f"{name or 'the address'} is {address}, which is no http://HOST:PORT"
    try:
        where = urlsplit(address if "://" in address else f"ray://{address}")
        if where.scheme not in ("http", "https", "ray"):
            return  # a module that Ray asks
        if where.scheme == "ray" and where.hostname and where.port:
            socket.create_connection((where.hostname, where.port), timeout=_CONNECT_S).close()
            return
    except ValueError:  # a port beyond 65535
        pass
    except OSError as err:
        found = f"nothing is reached at {address}, from {name or 'the address'}: {err.strerror or err}"
    raise ClusterError(found, _REACH)


def _token() -> str | None:
    """The token that Ray would use, wherever Ray looks for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


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
            fix = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that has it"
            raise ClusterError("the cluster wants its token", fix) from err
        raise ClusterError(text if len(text) <= 600 else f"{text[:300]} ... {text[-300:]}") from err
