"""The line that every benchmark prints: its figures with the hardware and versions they were taken on."""

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path


def report(name: str, **figures: object) -> None:
    """Print one JSON line."""
    versions = {p: _version(p) for p in ("actcache", "numpy", "torch", "numcodecs")}
    print(json.dumps({"benchmark": name, **figures, "hardware": _cpu(), "versions": versions}), flush=True)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # run from a checkout by PYTHONPATH


def _cpu() -> str:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return f"{model}, {os.cpu_count()} cores, Python {sys.version.split()[0]}"
