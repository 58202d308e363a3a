"""In a real terminal of 24 x 80: what following a run prints, and that Ctrl-C ends the following, not the run."""

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from cluster import terminal

ROOT = Path(__file__).parents[2]


class Terminal:
    """A command with a terminal; `text` is what it has shown."""

    def __init__(self, environment, *arguments):
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster", *map(str, arguments)],
            cwd=ROOT,
            env={k: v for k, v in environment.items() if k not in ("COLUMNS", "LINES")} | {"PYTHONUTF8": "1"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self.text = ""

    def read_until(self, wanted, timeout_s=30):
        deadline = time.monotonic() + timeout_s
        while wanted not in self.text:
            assert time.monotonic() < deadline, self.text
            if not self._read():
                assert wanted in self.text, self.text

    def type(self, keys):
        os.write(self._ours, keys)

    def end(self):
        """The exit code, after all is read."""
        while self._read():
            pass
        os.close(self._ours)
        return self.process.wait(timeout=30)

    def _read(self):
        ready, _, _ = select.select([self._ours], [], [], 30)
        assert ready, self.text
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # EIO: the other side is closed
            return False
        self.text += data.decode()
        return bool(data)


@pytest.fixture
def environment(tmp_path):
    return os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")}


def write_run(directory, code):
    path = directory / "run.toml"
    path.write_text(f'name = "job"\nbackend = "local"\ncommand = ["python", "-c", {json.dumps(code)}]\n')
    return path


@pytest.mark.parametrize("command", ["submit", "logs"])
def test_ctrl_c_ends_the_following_and_the_run_goes_on(environment, tmp_path, command):
    code = f"import time, pathlib\nprint('begun', flush=True)\nwhile not pathlib.Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.05)\nprint('ended')"
    path = write_run(tmp_path, code)
    if command == "logs":
        Terminal(environment, "submit", path).end()
    shown = Terminal(
        environment, *(["submit", path, "--follow"] if command == "submit" else ["logs", "-f", path])
    )
    shown.read_until("begun\r\n")
    shown.type(b"\x03")
    assert shown.end() == 130
    assert shown.text.endswith("error: interrupted; a submitted run goes on\r\n"), shown.text
    assert "Traceback" not in shown.text
    (tmp_path / "go").touch()
    again = Terminal(environment, "logs", "-f", path)
    assert again.end() == 0
    assert again.text == "begun\r\nended\r\njob-1 SUCCEEDED\r\n"


PROGRESS = """
import time
print("starting 3 Ray workers", flush=True)
for percent in (4, 46, 100):
    time.sleep(0.7)
    print(f"harvest: {percent:3} %  {percent}k/100k rows  4.59k/s  ETA 0:12  blocks {percent}/100  out 598.6 KiB/s  workers 3/3  bits/value 5.33", flush=True)
print("done: 3 %", flush=True)
"""


def test_progress_lines_are_one_bar_on_a_terminal_and_lines_in_a_file(environment, tmp_path):
    path = write_run(tmp_path, PROGRESS)
    shown = Terminal(environment, "submit", path, "--follow")
    assert shown.end() == 0
    _, begun, bar, after, end, _ = shown.text.split("\r\n")
    assert (begun, after, end) == ("starting 3 Ray workers", "done: 3 %", "job-1 SUCCEEDED")
    drawn = bar.split("\r")
    assert [text.split()[2:4] for text in drawn] == [["4", "%"], ["46", "%"], ["100", "%"]]
    assert [text.count("█") for text in drawn] == [1, 9, 20]
    assert {len(text) for text in drawn} == {79}
    command = [sys.executable, "-m", "cluster", "logs", "-f", str(path)]
    lines = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True
    ).stdout.splitlines()
    assert lines[2].startswith("harvest:  46 %  46k/100k rows")
    assert len(lines) == 6


def test_lists_and_status_keep_to_the_width(environment, tmp_path):
    path = write_run(tmp_path, "print('a long command of more than eighty columns')" + " " * 60 + "# end")
    Terminal(environment, "submit", path, "--follow").end()
    for arguments in (["list", "--backend", "local"], ["status", path]):
        shown = Terminal(environment, *arguments)
        assert shown.end() == 0
        first = shown.text.splitlines()[0]
        assert first.startswith("job-1  SUCCEEDED")
        assert first.endswith(" ...")
        assert len(first) < 80


RANKS = {"world_size": 4, "spread": "rows=2,latents=2", "stall_by_rank": [0.01, 0.031, 1.0, 0.3]}
TRAINED = {
    "step": "train-all-of-it",
    "state": "partial",
    "rows_done": 920_000_000,
    "rows_wanted": 2_000_000_000,
    "rate_rows_per_s": 51_234.1,
    "eta_s": 21_080.2,
}


def test_a_training_shows_its_ranks_their_rate_together_and_the_slowest_within_80_columns():
    lines = terminal.of_steps([TRAINED | RANKS])
    assert lines == [
        "train-all-of-it  partial    46% of 2,000,000,000 rows",
        "                 51,234 rows/s, 5:51:20 to go",
        "                 4 ranks by rows=2,latents=2, stall at most 100.0% (rank 2)",
    ]
    assert max(map(len, lines)) < 80
    told = dict.fromkeys(RANKS)  # one process
    assert len(terminal.of_steps([TRAINED | told])) == 2


@pytest.mark.parametrize("command", ["", "submit", "status", "logs", "stop", "list", "preflight"])
def test_each_help_fits_24_lines_of_80_columns(environment, command):
    shown = Terminal(environment, *command.split(), "--help")
    assert shown.end() == 0
    lines = shown.text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
