"""The command line of actcache in tests: as a person starts it, or in this process, which imports nothing again."""

import io
import logging
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

from actcache.__main__ import cli
from actcache.cli import run


def actcache_cli(*arguments, **options):
    """In a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "actcache", *map(str, arguments)], capture_output=True, text=True, **options
    )


def actcache_here(*arguments):
    """The same in this process; messages that are logged go to pytest instead of standard error."""
    out, err = io.StringIO(), io.StringIO()
    levels = {name: logging.getLogger(name).level for name in ("actcache", "sae")}
    with redirect_stdout(out), redirect_stderr(err):
        code = run(cli, "actcache", list(map(str, arguments)), interrupted="stopped")
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def harvest_arguments(spec, root):
    """A harvest of one block and one site of a tiny Spec."""
    return [
        "harvest", "--model", spec.model, "--corpus", spec.corpus.source, "--site", "blocks.1.hook_*_post",
        "--context-size", 16, "--tokens", 1024, "--block-rows", 1024, "--root", root,
    ]  # fmt: skip
