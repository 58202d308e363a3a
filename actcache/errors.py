"""What can go wrong, grouped by what a caller would do about it.

Every message says what was found, what was wanted and what to do. Bad arguments that are
found before anything is touched are `ValueError`s as well, so `except ValueError` works.
"""

from collections.abc import Mapping, Sequence
from typing import Any

RESTORE = "restore it from a copy, or remove the dataset (`actcache rm`) and harvest it again"
"""What helps against damage of what is committed: no harvest writes a committed block again."""


class ActcacheError(Exception):
    """Anything this package raises on purpose; the command line prints it as one line."""


class SpecError(ActcacheError, ValueError):
    """The request cannot be met as written (unknown site, context too long, typo): change it."""


class CorpusError(ActcacheError, ValueError):
    """The corpus is empty, unreadable or malformed: fix the data or its description."""


class NotADataset(ActcacheError, FileNotFoundError):
    """No committed dataset at this URL (or none yet): check the URL, or run the harvest."""


class FormatError(ActcacheError):
    """The stored metadata is not what this version reads (too new, hostile or damaged)."""


class CorruptObject(ActcacheError):
    """A stored object differs from its recorded size or checksum; the message names the key."""


class DamagedDataset(CorruptObject):
    """Verification found differences: `problems` has a line for each, `checked` what was looked at."""

    def __init__(self, url: str, problems: Sequence[str], checked: Mapping[str, Any]) -> None:
        self.problems, self.checked = list(problems), dict(checked)
        more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
        super().__init__(f"{url} is damaged: {self.problems[0]}{more}")


class StoreError(ActcacheError, OSError):
    """The store refused or failed (permissions, disk full, network) after the allowed retries."""


class Conflict(StoreError):
    """An object that must be created exists with other content: somebody else's data is there."""


class BeingWritten(ActcacheError):
    """Somebody seems to write the dataset: wait until they are done, then try again."""


class ForkedProcess(ActcacheError, RuntimeError):
    """A dataset that was opened before a fork is used after it: open it there, or start processes by spawn."""


class RankFailed(ActcacheError, RuntimeError):
    """Another rank of a distributed stream or training failed; its own error says why."""


class NonFiniteActivation(ActcacheError, ArithmeticError):
    """The LM produced inf or NaN; the message names the first bad row (fp16 overflows at 65504)."""

    def __init__(self, message: str, row: int = 0) -> None:
        super().__init__(message)
        self.row = row
        """Its number among the rows that were encoded."""


class WorkerLost(ActcacheError, OSError):
    """A worker died or became unreachable; its blocks are tried again elsewhere."""

    def __init__(self, message: str, *, preempted: bool = False) -> None:
        super().__init__(message)
        self.preempted = preempted
        """Whether its node was taken away: no sign that a block of it did harm."""


class HarvestError(ActcacheError, RuntimeError):
    """Blocks failed again after their retries; everything else is committed. Re-run to finish."""


class Drained(ActcacheError):
    """SIGTERM ended the harvest: blocks in flight were finished and committed. Re-run to go on."""
