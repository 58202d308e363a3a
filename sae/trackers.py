"""Curves for TensorBoard and Weights & Biases, beside metrics.jsonl, which is always written.

Each library is imported only when asked for. What they show is what metrics.jsonl has, and evals.jsonl, with
the name of the SAE before the name of the figure. They decide no number and are part of no run's identity.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

from actcache.errors import SpecError

from .files import is_url, local_path

Lines = Mapping[str, Mapping[str, Any]]
"""Figures of each SAE, by its name."""


class Tracker(ABC):
    """Takes what metrics.jsonl takes. `directory` is local."""

    package: str

    def __init__(self, directory: str) -> None:
        self.directory = directory

    @abstractmethod
    def start(self, description: Mapping[str, Any], step: int) -> None:
        """Begin, or continue after `step` steps, the run of this description."""

    @abstractmethod
    def log(self, lines: Lines, step: int) -> None:
        """The figures of one step."""

    @abstractmethod
    def log_evals(self, lines: Lines, step: int) -> None:
        """The figures of an evaluation under NAME/eval/; of a step that may lie behind the last one logged."""

    @abstractmethod
    def close(self) -> None:
        """Write what is held back."""


class TensorBoard(Tracker):
    """Event files in DIR/tensorboard."""

    package = "tensorboard"

    def start(self, description: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what an interrupted run showed after its last checkpoint comes again
        self._writer = SummaryWriter(os.path.join(self.directory, "tensorboard"), purge_step=step + 1)
        self._writer.add_text("run", f"```json\n{json.dumps(description, indent=2)}\n```", step)

    def log(self, lines: Lines, step: int) -> None:
        for name, line in lines.items():
            for figure, value in line.items():
                self._writer.add_scalar(f"{name}/{figure}", value, step)

    def log_evals(self, lines: Lines, step: int) -> None:
        for name, value in _of_evals(lines).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Tracker):
    """A run in DIR/wandb, offline unless WANDB_MODE says otherwise; `wandb sync` uploads it."""

    package = "wandb"

    def start(self, description: Mapping[str, Any], step: int) -> None:
        import wandb

        text = json.dumps(description, sort_keys=True)
        self._run = wandb.init(
            dir=self.directory,
            mode=os.environ.get("WANDB_MODE", "offline"),
            project=os.environ.get("WANDB_PROJECT", "sae"),
            id=hashlib.sha256(f"{self.directory} {text}".encode()).hexdigest()[:16],
            resume="allow",
            config=dict(description),
        )
        self._step = step
        for name in description[
            "saes"
        ]:  # wandb takes no line behind its last, so evaluations have their own axis
            self._run.define_metric(f"{name}/eval/*", step_metric=f"{name}/eval/step")

    def log(self, lines: Lines, step: int) -> None:
        figures = {f"{name}/{key}": value for name, line in lines.items() for key, value in line.items()}
        self._run.log(figures, step=step)
        self._step = step

    def log_evals(self, lines: Lines, step: int) -> None:
        self._run.log(_of_evals(lines), step=self._step)

    def close(self) -> None:
        self._run.finish()


def _of_evals(lines: Lines) -> dict[str, float]:
    """The numbers of an evaluation, by NAME/eval/FIGURE."""
    return {
        f"{name}/eval/{figure}": value
        for name, line in lines.items()
        for figure, value in line.items()
        if isinstance(value, int | float)
    }


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""Name, as on the command line, to class."""


def make_trackers(names: Sequence[str], out: str | os.PathLike[str] | None) -> list[Tracker]:
    """The trackers of these names, not started.

    Raises:
        SpecError: a name that is not known, a library that is not installed, or no local directory.
    """
    made = []
    for name in dict.fromkeys(names):
        if name not in TRACKERS:
            near = get_close_matches(name, TRACKERS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TRACKERS)}"
            raise SpecError(f"log {name!r} is not known; {hint} metrics.jsonl is always written.")
        if find_spec(TRACKERS[name].package) is None:
            raise SpecError(
                f"log {name} needs the package {TRACKERS[name].package}, which is not installed: "
                f"pip install {TRACKERS[name].package}, or leave it out; metrics.jsonl is always written"
            )
        if out is None or is_url(out):
            raise SpecError(
                f"log {name} writes into a local run directory, and out is {out}; give a local one, "
                "or read metrics.jsonl there"
            )
        made.append(TRACKERS[name](str(local_path(out))))
    return made
