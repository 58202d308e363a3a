"""Virtual environments of what a test needs beside, or instead of, its own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def make_venv(directory, *packages):
    """A fresh virtual environment with these packages; returns its python."""
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    python = directory / "bin" / "python"
    constraints = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([python, "-m", "pip", "install", "-q", *constraints, *packages], check=True)
    return python
