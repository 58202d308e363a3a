"""`python -m cluster.steps JSON`: run the steps of a run in the order of their needs; it is what backends start.

A step is a command line. With a Ray cluster (RAY_ADDRESS) each runs in an actor that reserves its resources, else as a
child of this process on what this machine has. Ranks of a training reserve their own. A step that has ended well is not run again, unless its command or what it
needs has changed; harvests are asked each time, since they know best. Records lie at <root>/_runs/<run>.json: one
process writes them. A failed step keeps what needs it from starting; the others go on. SIGTERM is passed on once.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from . import env_files
from .config import DATA_OF
from .credentials import scrub
from .training import ranks_of, resources, without_ranks

POLL_S = 0.1
STARTS = 3
"""Times that a step is started whose machine is lost."""
STOPPED = 143
"""Exit code after SIGTERM."""
_PR_SET_PDEATHSIG = 1
_PASSED_ON = (
    "RAY_ADDRESS",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
)  # a step's own driver joins the cluster, with the job's env


class StepError(Exception):
    """The run cannot go on; one line."""


class Lost(Exception):
    """The machine that ran a step is gone."""


class Process:
    """A child and what it prints. It gets SIGTERM when the process that made it dies."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the child
        libc = ctypes.CDLL(None, use_errno=True)
        self._child = subprocess.Popen(
            list(command),
            env={**os.environ, **env},
            stdout=self._out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
        )
        self._at = 0

    def poll(self) -> tuple[bytes, int | None]:
        """What it has printed since the last call, and its exit code once it has ended."""
        code = self._child.poll()
        text = os.pread(self._out.fileno(), 2**24, self._at)
        self._at += len(text)
        return text, code if len(text) < 2**24 else None

    def terminate(self) -> None:
        self._child.terminate()


class Running(Protocol):
    """A step under way."""

    def poll(self) -> tuple[bytes, int | None]: ...
    def terminate(self) -> None: ...


class Here:
    """Steps as children of this process, as many at a time as the machine has room for."""

    def __init__(self) -> None:
        self._cpus = float(os.cpu_count() or 1)
        self._gpus = gpus_here()
        self._held: dict[str, tuple[float, list[str]]] = {}

    def start(self, step: Mapping[str, Any]) -> Running | None:
        """The step under way; None if there is no room now.

        Raises:
            StepError: there will never be room.
        """
        cpus, n_gpus = self._taken(step)
        if n_gpus > len(self._gpus) or cpus > self._cpus:
            return None
        gpus = self._gpus[:n_gpus]
        process = Process(step["command"], {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})
        del self._gpus[:n_gpus]
        self._cpus -= cpus
        self._held[step["name"]] = (cpus, gpus)
        return process

    def _taken(self, step: Mapping[str, Any]) -> tuple[float, int]:
        """CPUs and GPUs that the step takes from this machine.

        Ranks, which a Ray of their own starts here, get as many GPUs as there are; they may share CPUs.
        """
        gpus = len(self._gpus) + sum(len(gpus) for _, gpus in self._held.values())
        cpus = self._cpus + sum(cpus for cpus, _ in self._held.values())
        ranks = ranks_of(step["command"])
        if ranks is None:
            n_cpus, n_gpus = step["num_cpus"], -int(-step["num_gpus"] // 1)
            if n_gpus > gpus or n_cpus > cpus:
                raise StepError(
                    f"step {step['name']} reserves {n_cpus:g} CPUs and {n_gpus} GPUs; this machine has "
                    f"{cpus:g} and {gpus}. Lower num_cpus and num_gpus"
                )
            return n_cpus, n_gpus
        if ranks.least * ranks.gpus > gpus:
            raise StepError(
                f"step {step['name']} trains on {ranks}; this machine has {resources(cpus, gpus)}. Lower workers or gpus"
            )
        n = min(ranks.most, gpus) if ranks.gpus else ranks.most
        return min(n * ranks.cpus, cpus), n * ranks.gpus

    def release(self, name: str) -> None:
        cpus, gpus = self._held.pop(name)
        self._cpus += cpus
        self._gpus += gpus


def gpus_here() -> list[str]:
    """Names of this machine's GPUs, as CUDA_VISIBLE_DEVICES has them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    listed = subprocess.run([program, "-L"], capture_output=True, text=True).stdout
    return [str(i) for i, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


class OnRay:
    """Steps in actors. Ray finds them room; on a stop it signals our own children itself, but not theirs."""

    def __init__(self) -> None:
        import ray

        ray.init(log_to_driver=False)
        self._env = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        self._env["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address

    def start(self, step: Mapping[str, Any]) -> Running | None:
        return _InActor(step, self._env)

    def release(self, name: str) -> None:
        pass


class _InActor:
    def __init__(self, step: Mapping[str, Any], env: Mapping[str, str]) -> None:
        import ray

        self._program = step["command"][0]
        options = {"num_cpus": step["num_cpus"], "num_gpus": step["num_gpus"]}
        self._actor = ray.remote(Process).options(**options).remote(step["command"], env)
        self._asked: Any = None

    def poll(self) -> tuple[bytes, int | None]:
        import ray
        from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

        if self._asked is None:
            self._asked = self._actor.poll.remote()
        ready, _ = ray.wait([self._asked], timeout=0)
        if not ready:
            return b"", None
        asked, self._asked = self._asked, None
        try:
            text, code = ray.get(asked)
        except (RayActorError, RayTaskError) as err:
            cause = getattr(err, "cause", None)
            if isinstance(err, ActorDiedError) and "FileNotFoundError" in str(err):
                raise StepError(
                    f"{self._program}: No such file or directory on the cluster; correct its command, or python"
                ) from err
            raise Lost(" ".join(str(cause or err).split())[:300]) from err
        if code is not None:
            ray.kill(self._actor)
        return text, code

    def terminate(self) -> None:
        self._actor.terminate.remote()


class Records:
    """What the steps of a run have come to, at <root>/_runs/<run>.json."""

    def __init__(self, root: str, run: str) -> None:
        """Raises StepError where they cannot be read, as `put` does where they cannot be written."""
        self._root = root
        with self._within_root("read"):
            self._fs, self._path = _place(root, run)
            self.steps = read_records(root, run)

    def put(self, step: str, **record: Any) -> None:
        self.steps[step] = record
        with self._within_root("written"):
            self._fs.makedirs(self._path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(self._path, json.dumps({"steps": self.steps}, indent=1).encode())

    @contextlib.contextmanager
    def _within_root(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as err:  # whatever a file system raises
            found = " ".join(str(err).split()) or type(err).__name__
            raise StepError(
                f"the steps' records under {self._root} cannot be {what}: {found}; correct root, or what keeps it from here"
            ) from err


def read_records(root: str, run: str, quick: bool = False) -> dict[str, dict[str, Any]]:
    """The records of a run by step; empty where there are none. `quick`: a person waits."""
    fs, path = _place(root, run, quick)
    with contextlib.suppress(FileNotFoundError):
        found: dict[str, dict[str, Any]] = json.loads(fs.cat_file(path))["steps"]
        return found
    return {}


def _place(root: str, run: str, quick: bool = False) -> tuple[Any, str]:
    """(file system, path) of a run's records."""
    from fsspec.core import url_to_fs

    options = {}
    if quick and root.startswith(
        "s3://"
    ):  # s3fs tries five times; with botocore's own it gives up after 75 s
        options["config_kwargs"] = {"connect_timeout": 5, "read_timeout": 15, "retries": {"max_attempts": 1}}
    fs, path = url_to_fs(root, **options)
    return fs, f"{path.rstrip('/')}/_runs/{run}.json"


class Runner:
    """Runs the steps of one run to their end."""

    def __init__(self, run: Mapping[str, Any], place: Here | OnRay) -> None:
        self._steps = {step["name"]: step for step in run["steps"]}
        self._many = len(self._steps) > 1
        self._place = place
        self._records = Records(run["root"], run["name"]) if run["root"] and self._many else None
        self._running: dict[str, Running] = {}
        self._starts = dict.fromkeys(self._steps, 0)
        self._digests: dict[str, str] = {}
        self._urls: dict[str, str] = {}
        self._done: set[str] = set()
        self._failed: dict[str, str] = {}
        self._unfinished_line: dict[str, bytes] = {}
        self._stopping = False

    def run(self) -> int:
        """0 if all went well, the step's own code if there is one step, else 1; 143 after SIGTERM."""
        signal.signal(signal.SIGTERM, self._stop)
        code = 0
        told = False
        while self._running or (not self._stopping and self._startable()):
            if self._stopping and not told:
                told = True
                for running in self._running.values():
                    running.terminate()
            for name in () if self._stopping else self._startable():
                self._start(name)
            for name in list(self._running):
                code = self._look_after(name) or code
            time.sleep(POLL_S)
        left = [name for name in self._steps if name not in self._done and name not in self._failed]
        if self._stopping and (left or self._failed):
            self._say("stopped; submit it again to go on")
            return STOPPED
        if not self._failed:
            return 0
        waited = f"; not started: {', '.join(left)}" if left else ""
        self._say(f"error: {'; '.join(f'step {n}: {why}' for n, why in self._failed.items())}{waited}")
        return 1 if self._many else code or 1

    def _stop(self, *_: object) -> None:
        self._stopping = True  # the loop tells the steps: Ray's calls are not for signal handlers

    def _startable(self) -> list[str]:
        known = self._done | set(self._failed) | set(self._running)
        return [n for n, s in self._steps.items() if n not in known and self._done.issuperset(s["needs"])]

    def _start(self, name: str) -> None:
        step = self._steps[name]
        try:
            command = [DATA_OF.sub(lambda m: self._url(m[1]), word) for word in step["command"]]
            what = [without_ranks(command), [self._digests[need] for need in step["needs"]]]
            self._digests[name] = hashlib.sha256(json.dumps(what).encode()).hexdigest()
            record = self._records.steps.get(name, {}) if self._records else {}
            if (record.get("state"), record.get("digest")) == (
                "done",
                self._digests[name],
            ) and not is_harvest(command):
                self._done.add(name)
                self._say(f"{name}: done before")
                return
            running = self._place.start(step | {"command": command})
        except StepError as err:
            self._fail(name, str(err))
            return
        except OSError as err:
            self._fail(name, f"{command[0]}: {err.strerror} on this machine; correct its command, or python")
            return
        if running is None:
            return
        self._starts[name] += 1
        self._running[name] = running
        self._unfinished_line[name] = b""
        self._record(name, "running")
        if self._many:
            self._say(f"{name}: started")

    def _url(self, harvest: str) -> str:
        """Where the dataset of a harvest step is; `actcache` knows."""
        if harvest not in self._urls:
            asked = [*self._steps[harvest]["command"], "--progress", "--json"]
            done = subprocess.run(asked, capture_output=True, text=True)
            if done.returncode:
                reason = done.stderr.strip().splitlines() or ["it is no `actcache harvest`"]
                raise StepError(f"{{data:{harvest}}} is not known: {reason[-1]}")
            self._urls[harvest] = json.loads(done.stdout)["url"]
        return self._urls[harvest]

    def _look_after(self, name: str) -> int:
        try:
            text, code = self._running[name].poll()
        except Lost as err:
            self._end(name)
            if self._stopping or self._starts[name] >= STARTS:
                self._fail(name, f"lost {self._starts[name]} times: {err}")
            else:
                self._say(f"{name}: lost ({err}); starting it again")
            return 0
        except StepError as err:
            self._end(name)
            self._fail(name, str(err))
            return 0
        self._show(name, text, whole=code is not None)
        if code is None:
            return 0
        self._end(name)
        if code:
            self._fail(name, f"exit code {code}" if code > 0 else signal.Signals(-code).name, code)
        else:
            self._done.add(name)
            self._record(name, "done")
            if self._many:
                self._say(f"{name}: done")
        return code

    def _end(self, name: str) -> None:
        del self._running[name]
        self._place.release(name)

    def _fail(self, name: str, why: str, code: int | None = None) -> None:
        self._failed[name] = why = scrub(why)
        self._record(name, "stopped" if self._stopping else "failed", error=why)

    def _record(self, name: str, state: str, **more: Any) -> None:
        if self._records:
            self._records.put(
                name, digest=self._digests.get(name), state=state, at_s=round(time.time(), 1), **more
            )

    def _show(self, name: str, text: bytes, whole: bool) -> None:
        *lines, rest = (self._unfinished_line[name] + text).split(b"\n")
        if whole and rest:
            lines, rest = [*lines, rest], b""
        self._unfinished_line[name] = rest
        if not lines:
            return
        shown = scrub(b"\n".join(lines).decode(errors="replace")).split("\n")
        prefix = f"[{name}] " if self._many else ""
        sys.stdout.write("".join(f"{prefix}{line}\n" for line in shown))
        sys.stdout.flush()

    def _say(self, line: str) -> None:
        print(line, flush=True)


def is_harvest(command: Sequence[str]) -> bool:
    """Whether this is `actcache harvest`, however it is spelled."""
    return command[1:4] == ["-m", "actcache", "harvest"] or list(command[:2]) == ["actcache", "harvest"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the JSON says; write the exit code to --exit-file, if any."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.steps", description=__doc__.partition(":")[2].partition(".")[0]
    )
    parser.add_argument("run", help="the run as JSON, see cluster/config.py")
    parser.add_argument("--here", action="store_true", help="on this machine, whatever RAY_ADDRESS says")
    parser.add_argument("--exit-file", type=Path, help="where the exit code is written")
    options = parser.parse_args(arguments)
    code = 1
    try:
        if not env_files.loaded():
            return code
        place: Here | OnRay = Here() if options.here or "RAY_ADDRESS" not in os.environ else OnRay()
        code = Runner(json.loads(options.run), place).run()
    except StepError as err:
        print(f"error: {scrub(str(err))}", flush=True)
    finally:
        if options.exit_file:
            partial = options.exit_file.with_suffix(".partial")
            partial.write_text(f"{code}\n")
            partial.rename(options.exit_file)
    return code


if __name__ == "__main__":
    sys.exit(main())
