"""SAELens and dictionary_learning in a process of their own, in an environment that is made once and kept."""

import os
import subprocess
from pathlib import Path

from s3_servers import environment

ROOT = Path(__file__).parents[2]
SAELENS = "sae-lens==6.54.12"
# actcache and what it reads datasets with come from the working tree
OTHERS = [
    "torch==2.13.0",
    "dictionary-learning==0.1.0",
    "nnsight",
    "wandb",
    "zarr",
    "numcodecs",
    "google-crc32c",
]
READING = ["fsspec", "s3fs", "pyarrow", "click", "rich"]


SAEBENCH = "sae-bench==0.6.0"  # pins numpy below 2 and another sae-lens


def saebench_python() -> Path:
    """The interpreter of an environment with SAEBench; minutes the first time."""
    return environment(SAEBENCH, "torch==2.13.0", without="torchvision") / "python"


def python() -> Path:
    """Their interpreter; minutes the first time."""
    # nothing here needs torchvision, and its wheels do not load beside a CPU-only torch
    return environment(SAELENS, *OTHERS, *READING, without="torchvision") / "python"


def run(script: str, *arguments: object, timeout_s: float = 600, interpreter: Path | None = None) -> str:
    """The script's standard output; what it wrote to standard error is in the message if it fails."""
    settings = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(
        [interpreter or python(), "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=os.environ | settings,
    )
    assert out.returncode == 0, out.stderr[-4000:]
    return out.stdout
