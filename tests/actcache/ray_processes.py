"""The processes of Harvesters that the Ray of this test session runs."""

import os
from pathlib import Path


def harvester_processes():
    """Process ids of this session's actors."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if "ray::Harvester" in (process / "cmdline").read_text() and os.getpid() in ancestors(
                int(process.name)
            ):
                yield int(process.name)
        except OSError:
            continue


def ancestors(pid):
    """Process ids from the parent of `pid` upwards."""
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        yield pid
