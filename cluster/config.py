"""A run as RUN.toml describes it: which command, with what resources, environment and code.

Owns the checks of that file. It never reads the environment (backends do, when they send) and
never touches the cluster; an error names the field, never the value, which may be a secret.
"""

import json
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .credentials import place_of_secret
from .tables import ConfigError, check_types, from_table
from .training import Nodes, Ranks, Train, is_training, ranks_as_asked, ranks_of, resources, with_ranks

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")  # fits Kubernetes' 47 with room for -<attempt>
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
BACKENDS = ("local", "ray", "kuberay", "slurm")
_PLACE = re.compile(
    r"\{(root|workers|cpus|gpus)\}"
)  # other braces are a site's: blocks.{4,8}.hook_resid_post
DATA_OF = re.compile(r"\{data:([a-z0-9-]+)\}")
"""In a step's command: the URL of the dataset that another step, `actcache harvest`, makes."""
_AT_LEAST_ONE = {("workers.", "count"), ("workers.", "cpus"), ("workers.", "memory_gib"), ("", "drain_s")}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of a pipeline."""

    name: str
    """Names the step in logs, in `needs` and in {data:NAME}."""
    command: tuple[str, ...]
    """Arguments as a list, no shell."""
    needs: tuple[str, ...] = ()
    """Steps that must have succeeded before."""
    num_cpus: float | None = None
    """CPUs that the step reserves; 0 for `actcache harvest` with Ray, whose actors reserve their own. None: 1, or 0 for
    `sae train` with ranks."""
    num_gpus: float = 0
    """GPUs that the step reserves, e.g. 1 for `sae train --device cuda`; 0 with ranks, which reserve their own."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The machines' share that one worker gets; in a command: {workers}, {cpus}, {gpus}."""

    count: int = 1
    """Workers: harvest's actors, pods of a KubeRay cluster, nodes of a Slurm allocation."""
    cpus: int = 4
    """CPUs of each."""
    gpus: int = 0
    """GPUs of each."""
    memory_gib: int = 16
    """Memory of each."""


@dataclass(frozen=True, kw_only=True)
class KubeRay:
    """What only a RayJob needs."""

    namespace: str = "default"
    """Where the RayJob is created."""
    service_account: str | None = None
    """Service account of the pods, for access to the bucket (IRSA, workload identity)."""
    secret: str | None = None
    """Kubernetes secret whose keys are the names in `env`."""
    queue: str | None = None
    """Kueue's local queue."""
    retries: int = 3
    """New clusters that KubeRay tries after a failure; each goes on from what is stored."""
    spot: bool = False
    """Let workers run on nodes with the taint `spot`."""
    token_auth: bool = True
    """Ray's token authentication, by a token that KubeRay makes."""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """What only an sbatch script needs."""

    partition: str | None = None
    """Partition; None: the default one."""
    account: str | None = None
    """Account that is charged."""
    time: str = "24:00:00"
    """Time limit, as sbatch reads it."""
    setup: str | None = None
    """One shell line before anything else, e.g. `source /shared/venv/bin/activate`."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One command, or a pipeline of them, and what it needs where it runs."""

    name: str
    """Names the run; its attempts are NAME-1, NAME-2, ..."""
    command: tuple[str, ...] = ()
    """Arguments as a list, no shell: ["actcache", ...] or ["python", "-m", "sae", ...]."""
    steps: tuple[Step, ...] = ()
    """Or several commands, in order of what they need."""
    backend: str = "ray"
    """local, ray, kuberay or slurm."""
    root: str | None = None
    """Where results are stored, a directory or URL; {root} in a command. A pipeline keeps its steps' records there."""
    image: str | None = None
    """Container image with ray, actcache and sae, for kuberay."""
    python: str = "python"
    """What `python` and `actcache` in the command run with there; it must have ray, actcache and sae."""
    num_cpus: float = 0
    """CPUs that the command itself reserves; the actors it starts reserve their own."""
    num_gpus: float = 0
    """GPUs that the command itself reserves, e.g. 1 for `sae train`; harvest's actors reserve their own."""
    env: tuple[str, ...] = ()
    """Names of environment variables to pass on; the values come from whoever submits, or from kuberay.secret."""
    env_files: Mapping[str, str] = field(default_factory=dict)
    """Variables whose values are read from files of the machines that run it; no value travels."""
    env_in_clear: bool = False
    """Let Ray have secrets of `env`, which it keeps in clear in its job table and in logs of its nodes."""
    working_dir: str | None = None
    """Directory of code to upload and run in; None: the code of the cluster's image."""
    drain_s: int = 60
    """Seconds that a stopped run has to finish the blocks in flight before it is killed."""
    workers: Workers = Workers()
    """Resources per worker."""
    train: Train | None = None
    """Ranks of each `python -m sae train`; None: as its own command says."""
    kuberay: KubeRay = KubeRay()
    """For the backend kuberay."""
    slurm: Slurm = Slurm()
    """For the backend slurm."""

    def __post_init__(self) -> None:
        for of, place in self._tables():
            check_types(of, place)
        if not _NAME.fullmatch(self.name):
            raise ConfigError("name must be at most 40 of a-z, 0-9 and '-', without '-' at the ends")
        if not self.steps and (not self.command or not self.command[0]):
            raise ConfigError('command is empty; it must be a list, e.g. ["actcache", "harvest", ...]')
        if self.steps and self.command:
            raise ConfigError("command and [[steps]] each say what to run; keep one of them")
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend is not one of {', '.join(BACKENDS)}")
        for i, name in enumerate(self.env):
            if not _ENV_NAME.fullmatch(name):
                raise ConfigError(f"env[{i}] is not a variable's name; list names only, never NAME=value")
        for name, path in self.env_files.items():
            if not _ENV_NAME.fullmatch(name) or name in self.env:
                raise ConfigError(f"env_files.{name} must be a variable's name that env has not")
            if not path.startswith("/"):
                raise ConfigError(f"env_files.{name} must be the full path of a file where the run runs")
        for of, place in self._tables():
            for f in fields(of):
                value = getattr(of, f.name)
                if isinstance(value, int | float) and not isinstance(value, bool):
                    least = 1 if (place, f.name) in _AT_LEAST_ONE else 0
                    if not least <= value < float("inf"):
                        raise ConfigError(f"{place}{f.name} is {value}; it must be {least} or more")
        _check_steps(self)
        _check_trainings(self)
        for of, place in self._tables():
            values = {place + f.name: getattr(of, f.name) for f in fields(of) if f.name != "steps"}
            found = place_of_secret(values) or place_of_secret({"a name in env_files": list(self.env_files)})
            if found:
                raise ConfigError(
                    f"{found} looks like a secret, and files are kept and shared; "
                    "read it from a file where the run runs (env_files), or pass a variable on by its name (env)"
                )

    def _tables(self) -> list[tuple[Any, str]]:
        """Every dataclass in it, and what its fields are called in messages."""
        own = [(self, ""), (self.workers, "workers."), (self.kuberay, "kuberay."), (self.slurm, "slurm.")]
        own += [(self.train, "train.")] if self.train is not None else []
        return own + [(step, f"steps[{i}].") for i, step in enumerate(self.steps)]

    def filled(self, command: Sequence[str]) -> list[str]:
        """A command with {root}, {workers}, {cpus} and {gpus} filled in; {data:STEP} stays."""
        values = {"root": self.root or "", "workers": self.workers.count}
        values |= {"cpus": self.workers.cpus, "gpus": self.workers.gpus}
        return [_PLACE.sub(lambda m: str(values[m[1]]), word) for word in command]

    def program(self, command: Sequence[str]) -> list[str]:
        """A command's arguments: `python` and `actcache` by the run's own interpreter, a training's with its ranks."""
        program, *arguments = self.filled(command)
        known = {"python": [self.python], "actcache": [self.python, "-m", "actcache"]}
        return with_ranks([*known.get(program, [program]), *arguments], self.train)

    def trainings(self) -> dict[str, Ranks]:
        """Ranks of each step that trains with ranks, by its name."""
        found = {step.name: ranks_of(self.program(step.command)) for step in self.all_steps}
        return {name: ranks for name, ranks in found.items() if ranks is not None}

    def nodes(self) -> Nodes:
        """Pods or machines of the size of [workers]: `count`, or more where a training's ranks need them.

        Raises:
            ConfigError: one has no room for a rank.
        """
        cpus, gpus, n = self.workers.cpus, self.workers.gpus, self.workers.count
        for name, ranks in self.trainings().items():
            on_one = ranks.on_node(cpus, gpus)
            if on_one == 0:
                raise ConfigError(
                    f"a rank of {name} takes {resources(ranks.cpus, ranks.gpus)}, and one of [workers] has "
                    f"{resources(cpus, gpus)}; raise cpus or gpus of [workers], or lower those of [train]"
                )
            n = max(n, -(-ranks.most // on_one))
        return [(cpus, gpus)] * n

    @property
    def entrypoint(self) -> str:
        """The shell command that the backend runs: the command itself, or the one that runs the steps."""
        if self.steps:
            return shlex.join([self.python, "-m", "cluster.steps", self.as_json()])
        words = self.program(self.command)
        if self.env_files and self.backend == "ray":
            words = [self.python, "-m", "cluster.env_files", *words]
        return shlex.join(words)

    def as_json(self) -> str:
        """What `cluster.steps` is told: name, root and the steps as they are run."""
        with_ranks = self.trainings()
        steps = []
        for step in self.all_steps:
            told = asdict(step) | {"command": self.program(step.command)}
            if step.num_cpus is None:
                told["num_cpus"] = 0 if step.name in with_ranks else 1
            steps.append(told)
        return json.dumps({"name": self.name, "root": self.root, "steps": steps})

    @property
    def all_steps(self) -> tuple[Step, ...]:
        """Its steps; a single command is one."""
        one = Step(name=self.name, command=self.command, num_cpus=self.num_cpus, num_gpus=self.num_gpus)
        return self.steps or (one,)


def read_run(path: str | Path) -> Run:
    """The run in a TOML file; a relative `working_dir` or `root` is taken from the file's own directory.

    Raises:
        ConfigError: the file is missing, is not TOML, or has an unknown, missing or unusable field.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        run = _from_values(values)
    except OSError as err:
        raise ConfigError(f"{path} cannot be read: {err.strerror}") from err
    except ConfigError as err:
        raise ConfigError(f"{path}: {err}") from err
    except ValueError as err:  # TOMLDecodeError, UnicodeDecodeError
        raise ConfigError(f"{path} is not TOML: {err}; correct it there") from err
    if run.root is not None and "://" not in run.root:
        run = replace(run, root=str((path.parent / Path(run.root).expanduser()).resolve()))
    if run.working_dir is None:
        return run
    directory = (path.parent / run.working_dir).resolve()
    if not directory.is_dir():
        raise ConfigError(f"{path}: working_dir {directory} is not a directory")
    return replace(run, working_dir=str(directory))


def _from_values(values: dict[str, Any]) -> Run:
    tables = {"workers": Workers, "train": Train, "kuberay": KubeRay, "slurm": Slurm}
    for key, kind in tables.items():
        if key in values:
            values[key] = from_table(kind, values[key], f"{key}.")
    if "steps" in values:
        if not isinstance(values["steps"], list):
            raise ConfigError("steps must be tables: [[steps]]")
        if not values["steps"]:
            raise ConfigError("steps is empty; put in a [[steps]], or a command instead")
        values["steps"] = [from_table(Step, step, f"steps[{i}].") for i, step in enumerate(values["steps"])]
    run: Run = from_table(Run, values, "", required=() if "steps" in values else ("command",))
    return run


def _others(names: Sequence[str], i: int) -> str:
    return ", ".join([*names[:i], *names[i + 1 :]]) or "none"


def _check_steps(run: Run) -> None:
    names = [step.name for step in run.steps]
    commands = [(f"steps[{i}].", step.command) for i, step in enumerate(run.steps)] or [("", run.command)]
    for i, step in enumerate(run.steps):
        if not _NAME.fullmatch(step.name) or step.name in names[:i]:
            raise ConfigError(f"steps[{i}].name must be one of a kind, of a-z, 0-9 and '-'")
        if not step.command or not step.command[0]:
            raise ConfigError(f"steps[{i}].command is empty; it must be a list of arguments")
        for need in step.needs:
            if need not in names:
                raise ConfigError(
                    f"steps[{i}] needs a step that is not there; the others are {_others(names, i)}"
                )
            if need not in names[:i]:
                raise ConfigError(
                    f"steps[{i}] needs {need!r}, which does not come before it; "
                    "put it before, and let no two steps need each other"
                )
        for word in step.command:
            for wanted in DATA_OF.findall(word):
                if wanted not in step.needs:
                    raise ConfigError(f"steps[{i}] reads {{data:{wanted}}}; put {wanted!r} in its needs")
    if run.steps and run.root is None:
        raise ConfigError("root is missing: a pipeline keeps its steps' records there")
    for place, command in commands:
        if run.root is None and any("{root}" in word for word in command):
            raise ConfigError(f"{place}command has {{root}}, and root is missing")
        if not run.steps and any(DATA_OF.search(word) for word in command):
            raise ConfigError("{data:STEP} is for [[steps]]; give the dataset's URL")


def _check_trainings(run: Run) -> None:
    if run.train is not None:
        try:
            ranks_as_asked(run.train)
        except ValueError as err:
            raise ConfigError(f"train.{err}") from err
    trains = False
    for i, step in enumerate(run.all_steps):
        place = f"steps[{i}]." if run.steps else ""
        command = run.program(step.command)
        trains |= is_training(command)
        try:
            ranks = ranks_of(command)
        except ValueError as err:
            raise ConfigError(f"{place}command: {err}") from err
        for name in ("num_gpus", "num_cpus"):
            if ranks and (reserved := getattr(step, name)):
                raise ConfigError(
                    f"{place}{name} is {reserved:g}, but this training's ranks reserve their own "
                    f"({ranks}); take {name} out"
                )
    if run.train is not None and not trains:
        raise ConfigError("[train] is for `python -m sae train`, and no command here is that; take it out")
