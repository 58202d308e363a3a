"""How runs look: lines that keep to the terminal's width, and a bar in place of progress lines. No state of runs."""

import json
import re
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any

from .attempts import Attempt

_PROGRESS = re.compile(r"(?P<label>[^:]{1,60}):\s+(?P<percent>\d{1,3}) %  (?P<rest>.*)")
_BAR = 20
_PIPED = 200  # columns where no terminal says


class Bars:
    """Passes a log on; of progress lines (`LABEL:  46 %  ...`) that follow each other only the newest stays, with a bar."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._drawn: str | None = None

    def __call__(self, text: str) -> None:
        for line in text.splitlines(keepends=True):
            progress = _PROGRESS.fullmatch(line.rstrip("\r\n"))
            if progress is None:
                self.close()
                self._write(line)
                continue
            if self._drawn == progress["label"]:
                self._write("\r")
            else:
                self.close()
            width = columns() - 1  # a full line would move the cursor on
            self._write(_bar(progress)[:width].ljust(width))
            self._drawn = progress["label"]

    def close(self) -> None:
        """Leave the bar as it is; what comes next begins a line."""
        if self._drawn is not None:
            self._write("\n")
            self._drawn = None


def _bar(progress: re.Match[str]) -> str:
    done = round(_BAR * min(int(progress["percent"]), 100) / 100)
    full, rest = ("█", "░") if (sys.stdout.encoding or "").lower().startswith("utf") else ("#", "-")
    return f"{progress['label']} {full * done}{rest * (_BAR - done)} {progress['percent']:>3} %  {progress['rest']}"


def columns() -> int:
    """Of the terminal; many where there is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _PIPED


def wrapped(text: str, indent: int) -> str:
    """The text in lines of the terminal's width, all but the first indented; one line where there is no terminal."""
    if not sys.stdout.isatty():
        return text
    more = " " * indent
    return textwrap.fill(
        text, columns() - 1, subsequent_indent=more, break_long_words=False, break_on_hyphens=False
    )


def run_of(attempt: Attempt) -> dict[str, Any]:
    """What an attempt runs, as `Run.as_json` gives it, from its command line."""
    words = shlex.split(attempt.entrypoint)
    if words[1:3] == ["-m", "cluster.env_files"]:
        words = words[3:]
    if words[1:3] == ["-m", "cluster.steps"]:
        found: dict[str, Any] = json.loads(words[3])
        return found
    return {
        "name": attempt.run,
        "root": None,
        "steps": [{"name": attempt.run, "command": words, "needs": []}],
    }


def reason(attempt: Attempt) -> str:
    """What the backend says of the status, in a line, without the log that Ray adds."""
    lines = attempt.message.partition(", last available logs")[0].strip().splitlines()
    return lines[0].strip() if lines else ""


def table(attempts: Sequence[Attempt]) -> list[str]:
    """A line for each attempt: id, status, start, how long, what."""
    width = max((len(attempt.id) for attempt in attempts), default=0)
    return [_line(attempt, width) for attempt in attempts]


def _line(attempt: Attempt, width: int) -> str:
    started, lasted = "not started", ""
    if attempt.started_s:
        started = time.strftime("%Y-%m-%d %H:%MZ", time.gmtime(attempt.started_s))
        lasted = _duration((attempt.ended_s or time.time()) - attempt.started_s)
    words = attempt.entrypoint
    if "cluster.steps" in words:
        words = "steps " + ", ".join(step["name"] for step in run_of(attempt)["steps"])
    line = f"{attempt.id:{width}}  {attempt.status:9}  {started:17}  {lasted:>7}  {words}"
    return line if len(line) < columns() else f"{line[: columns() - 5]} ..."


def of_steps(steps: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each step with how far it is, and under it what belongs to it: rate, ranks, errors, blocks set aside."""
    width = max(len(step["step"]) for step in steps)
    lines = []
    for step in steps:
        first, *more = _of_step(step)
        lines += [f"{step['step']:{width}}  {first}".rstrip(), *(f"{'':{width}}  {line}" for line in more)]
    return lines


def _of_step(step: dict[str, Any]) -> list[str]:
    parts, more = [f"{step['state']:8}"], []
    if step.get("rows_done") is not None:
        share = step["rows_done"] / step["rows_wanted"] if step["rows_wanted"] else 1.0
        parts.append(f"{share:4.0%} of {step['rows_wanted']:,} rows")
    if step.get("blocks_wanted") is not None:
        parts.append(
            f"blocks {step['blocks_done']}/{step['blocks_wanted']}, {step['blocks_missing']} missing"
        )
        if step["quarantined"]:
            parts.append(f"{len(step['quarantined'])} set aside")
    if step["state"] == "partial" and step.get("rate_rows_per_s"):
        more.append(f"{step['rate_rows_per_s']:,.0f} rows/s, {_duration(step['eta_s'])} to go")
    if step.get("world_size"):
        more.append(_ranks(step))
    if step.get("error"):
        more.append(step["error"])
    if step.get("url"):
        more.append(step["url"])
    more += [
        f"set aside: {b['split']} block {b['block']}: {b['error']}" for b in step.get("quarantined") or ()
    ]
    return ["  ".join(parts), *more]


def _ranks(step: dict[str, Any]) -> str:
    """Ranks of a training, and the one that waits for rows the largest share of its time."""
    stalls = step["stall_by_rank"]
    line = f"{step['world_size']} rank{'' if step['world_size'] == 1 else 's'} by {step['spread']}"
    if not stalls:
        return line
    slowest = stalls.index(max(stalls))
    return f"{line}, stall at most {stalls[slowest]:.1%} (rank {slowest})"


def _duration(seconds: float) -> str:
    """`95.2` -> `1:35`; hours appear when there are any."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"
