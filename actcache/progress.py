"""Progress of long work: a live bar on a terminal, plain lines when piped to a file.

Everything goes to standard error, so `--json` on standard output stays clean.
"""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

_LINE_EVERY_S = 10.0


def format_duration(seconds: float) -> str:
    """`95.2` -> `1:35`; hours appear when there are any."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


def format_count(n: float) -> str:
    """`2097152` -> `2.10M`: three significant digits with a decimal suffix."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= limit:
            return f"{n / limit:.3g}{suffix}" if abs(n) >= 100 * limit else f"{n / limit:.2f}{suffix}"
    return f"{n:.0f}"


def format_bytes(n: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for suffix in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {suffix}" if suffix == "B" else f"{n:.1f} {suffix}"
        n /= 1024
    return f"{n:.1f} PiB"


class Progress:
    """Share done, rate and ETA of `total` units of work.

    Args:
        label: what is being done, as the person reads it.
        total: how many units there are; None when not known.
        unit: the plural name of a unit, e.g. "rows".
        done: units that were finished before this run; they count to the share, not to the rate.
        show: False counts in silence.
    """

    def __init__(
        self, label: str, total: int | None, unit: str = "rows", done: int = 0, show: bool = True
    ) -> None:
        self.label, self.total, self.unit, self.show = label, total, unit, show
        self._done = self._before = done
        self._fields: dict[str, object] = {}
        self._console = Console(stderr=True, highlight=False)
        self._rich: RichProgress | None = None
        self._task = TaskID(0)
        self._notes: dict[str, TaskID] = {}
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        self._start = self._last_line = time.monotonic()
        if self.show and self._console.is_terminal:
            self._rich = RichProgress(
                SpinnerColumn(),
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[line]}"),
                console=self._console,
                transient=False,
            )
            self._rich.start()
            line = self._line(self._start)
            self._task = self._rich.add_task(self.label, total=self.total, completed=self._done, line=line)
        return self

    def advance(self, n: int = 1, **fields: object) -> None:
        """Count `n` more units and show the given fields (`loss=0.12`) beside the rate; None removes one."""
        self._done += n
        self._fields = {name: x for name, x in {**self._fields, **fields}.items() if x is not None}
        now = time.monotonic()
        if self._rich is not None:
            self._rich.update(self._task, completed=self._done, line=self._line(now))
        elif self.show and now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            self._print(now)

    def note(self, name: str, line: str) -> None:
        """On a terminal, a line of its own under the bar; the latest one of each name stays."""
        if self._rich is None:
            return
        if name not in self._notes:
            self._notes[name] = self._rich.add_task(f"  {name}", total=1, line=line)
        self._rich.update(self._notes[name], line=line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        now = time.monotonic()
        if self._rich is not None:
            self._rich.update(self._task, line=self._line(now))
            self._rich.stop()
        elif self.show and kind is None:
            self._print(now)

    def _line(self, now: float) -> str:
        elapsed = max(now - self._start, 1e-9)
        rate = (self._done - self._before) / elapsed
        parts = []
        if self.total:
            parts.append(f"{min(100.0, 100 * self._done / self.total):3.0f} %")
            parts.append(f"{format_count(self._done)}/{format_count(self.total)} {self.unit}")
        else:
            parts.append(f"{format_count(self._done)} {self.unit}")
        parts.append(f"{format_count(rate)}/s")
        if self.total and rate > 0 and self._done < self.total:
            parts.append(f"ETA {format_duration((self.total - self._done) / rate)}")
        else:
            parts.append(f"in {format_duration(elapsed)}")
        parts += [f"{name} {_short(value)}" for name, value in self._fields.items()]
        return "  ".join(parts)

    def _print(self, now: float) -> None:
        print(f"{self.label}: {self._line(now)}", file=sys.stderr, flush=True)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
