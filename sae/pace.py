"""How fast a training goes and how long it waits for data, by the clock; decides no number of it."""

import time


class Pace:
    """Rows a second since the last line of metrics, and the share of the time that was spent waiting for data.

    Lines and meetings of ranks are counted apart.
    """

    def __init__(self) -> None:
        self.start(0)

    def start(self, rows: int) -> None:
        """The run starts, or goes on, after `rows` rows."""
        self._rows, self._waited_s, self._met_waited_s = rows, 0.0, 0.0
        self._line_s = self._met_s = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Data came after so long."""
        self._waited_s, self._met_waited_s = self._waited_s + seconds, self._met_waited_s + seconds

    def line(self, rows: int) -> tuple[float, float]:
        """Rows a second, and the share that was waited, since the line before."""
        now = time.perf_counter()
        elapsed = max(now - self._line_s, 1e-9)
        found = round((rows - self._rows) / elapsed, 1), round(self._waited_s / elapsed, 4)
        self._rows, self._line_s, self._waited_s = rows, now, 0.0
        return found

    def meeting(self) -> float:
        """The share that was waited since the meeting before."""
        now = time.perf_counter()
        found = self._met_waited_s / max(now - self._met_s, 1e-9)
        self._met_s, self._met_waited_s = now, 0.0
        return found
