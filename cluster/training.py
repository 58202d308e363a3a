"""Distributed training as a run asks for it: the table [train] of RUN.toml, and what the ranks of a command take.

`python -m sae train --workers ...` starts its ranks itself: each reserves its CPUs and GPUs on the Ray cluster, and the
command reserves none. This file adds the options of [train] to such commands, reads them from any command, and counts
how many ranks have room on nodes. It starts nothing. sae/distributed.py has the ranks, sae/spread.py what they divide.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

SPREADS = ("saes", "latents", "rows")
"""What ranks divide; and rows=R,latents=L, of R x L ranks."""
_TRAIN = ["-m", "sae", "train"]
_WORKERS, _SPREAD, _CPUS, _GPUS = "--workers", "--spread", "--cpus-per-worker", "--gpus-per-worker"
_BOTH = re.compile(r"rows=(\d+),latents=(\d+)")

Nodes = Sequence[tuple[float, float]]
"""CPUs and GPUs of each node."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Ranks of each `python -m sae train`, as RUN.toml says it."""

    workers: int | str
    """Ranks: a number, or the least and the most as "2..8"."""
    cpus: int = 1
    """CPUs that each reserves, and threads of its torch."""
    gpus: int = 0
    """GPUs that each reserves: 0 or 1."""
    spread: str | None = None
    """What they divide: saes, latents, rows or rows=R,latents=L; None: as `sae train` chooses."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Ranks of one training: how many, and what each reserves."""

    least: int
    """It waits until there is room for so many."""
    most: int
    """More than `least`: it takes as many as have room."""
    cpus: int
    gpus: int

    def room(self, nodes: Nodes) -> int:
        """How many of them, at most `most`, have room on empty nodes; none is cut in two."""
        return min(self.most, sum(self.on_node(*node) for node in nodes))

    def on_node(self, cpus: float, gpus: float) -> int:
        """How many have room on one empty node."""
        n = int(cpus // self.cpus)
        return min(n, int(gpus // self.gpus)) if self.gpus else n

    def beside(self, nodes: Nodes) -> str:
        """What they take, and for how many there is room."""
        there = resources(sum(cpus for cpus, _ in nodes), sum(gpus for _, gpus in nodes))
        where = f"{len(nodes)} nodes with {there} together" if len(nodes) != 1 else f"1 node with {there}"
        return f"{self}; room for {self.room(nodes)} on {where}"

    def __str__(self) -> str:
        n = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        each = f"{n} rank{'s' if self.most > 1 else ''} of {resources(self.cpus, self.gpus)}"
        if self.most == 1:
            return each
        least = "" if self.least == self.most else "at least "
        return f"{each}, {least}{resources(self.least * self.cpus, self.least * self.gpus)} in all"


def resources(cpus: float, gpus: float) -> str:
    """`1 GPU and 4 CPUs`; GPUs only where there are any."""
    parts = [f"{gpus:g} GPU{'' if gpus == 1 else 's'}"] if gpus else []
    return " and ".join([*parts, f"{cpus:g} CPU{'' if cpus == 1 else 's'}"])


def ranks_as_asked(train: Train) -> Ranks:
    """The ranks of [train].

    Raises:
        ValueError: they cannot be met; the message begins with the field's name.
    """
    return _ranks(train.workers, train.cpus, train.gpus, train.spread, ("workers", "cpus", "gpus", "spread"))


def is_training(command: Sequence[str]) -> bool:
    """True if this is `python -m sae train`."""
    return list(command[1:4]) == _TRAIN


def run_directory(command: Sequence[str]) -> str | None:
    """--out of `python -m sae train`; None if it is another command, or its --config says it."""
    words = list(command)
    if not is_training(words):
        return None
    for i, word in enumerate(words):
        if word == "--out" and i + 1 < len(words):
            return words[i + 1]
        if word.startswith("--out="):
            return word.partition("=")[2]
    return None


def ranks_of(command: Sequence[str]) -> Ranks | None:
    """The ranks that a command starts; None if it trains in its own process, or does something else.

    Raises:
        ValueError: they cannot be met; the message begins with the option.
    """
    said = _options(command) if is_training(command) else {}
    if _WORKERS not in said:
        return None
    cpus, gpus = said.get(_CPUS, "1"), said.get(_GPUS, "0")
    for name, text in ((_CPUS, cpus), (_GPUS, gpus)):
        if not text.isdecimal():
            raise ValueError(f"{name} is no whole number; give one")
    names = (_WORKERS, _CPUS, _GPUS, _SPREAD)
    return _ranks(said[_WORKERS], int(cpus), int(gpus), said.get(_SPREAD), names)


def with_ranks(command: Sequence[str], train: Train | None) -> list[str]:
    """The command, with those options of [train] that it does not give itself if it is a training."""
    words = list(command)
    if train is None or not is_training(words):
        return words
    options = {_WORKERS: train.workers, _GPUS: train.gpus, _CPUS: train.cpus, _SPREAD: train.spread}
    said = _options(words)
    for name, value in options.items():
        if value is not None and name not in said:
            words += [name, str(value)]
    return words


def without_ranks(command: Sequence[str]) -> list[str]:
    """The command without the options of its ranks, which change no result but for rounding."""
    if not is_training(command):
        return list(command)
    words, skip = [], False
    for word in command:
        option = word.partition("=")[0] in (_WORKERS, _SPREAD, _CPUS, _GPUS)
        if not skip and not option:
            words.append(word)
        skip = option and "=" not in word
    return words


def _options(command: Sequence[str]) -> dict[str, str]:
    """Values of the options of ranks, by their names."""
    found = {}
    for word, after in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in (_WORKERS, _SPREAD, _CPUS, _GPUS):
            found[name] = value if equals else after
    return found


def _ranks(workers: int | str, cpus: int, gpus: int, spread: str | None, names: Sequence[str]) -> Ranks:
    """Ranks that can be met; messages repeat no text, which may be a secret."""
    called_workers, called_cpus, called_gpus, called_spread = names
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(workers).strip())
    if found is None:
        raise ValueError(
            f'{called_workers} is no number of ranks; give one, or the least and the most as "2..8"'
        )
    least, most = int(found[1]), int(found[2] or found[1])
    if not 1 <= least <= most:
        raise ValueError(
            f"{called_workers} is {least} to {most}; it must be at least 1, and the least comes first"
        )
    if cpus < 1:
        raise ValueError(f"{called_cpus} is {cpus}; it must be 1 or more")
    if gpus not in (0, 1):
        raise ValueError(f"{called_gpus} is {gpus}; a rank trains on one GPU, so give 0 or 1")
    _check_spread(spread, least, most, called_spread)
    return Ranks(least=least, most=most, cpus=cpus, gpus=gpus)


def _check_spread(spread: str | None, least: int, most: int, called: str) -> None:
    if spread is None or spread in SPREADS:
        return
    both = _BOTH.fullmatch(spread.replace(" ", ""))
    if both is None:
        raise ValueError(f"{called} is none of {', '.join(SPREADS)} and rows=R,latents=L; give one of them")
    n = int(both[1]) * int(both[2])
    if (least, most) != (n, n):
        there = f"{least}" if least == most else f"{least} to {most}"
        raise ValueError(f"{called} is of {n} ranks, and there are {there}; R x L must be all of them")
