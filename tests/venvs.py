"""Virtual environments of what a test needs beside, or instead of, its own."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def make_venv(directory, *packages, constrained=True):
    """A fresh virtual environment with these packages, of the tested versions if `constrained`; returns its python."""
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    python = directory / "bin" / "python"
    constraints = ["-c", str(ROOT / "constraints.txt")] if constrained else []
    subprocess.run([python, "-m", "pip", "install", "-q", *constraints, *packages], check=True)
    return python


def copy_source(directory):
    """A copy of what is installed, since building leaves its files in the tree; returns `directory`."""
    for name in ("actcache", "sae", "cluster"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory)
    return directory
