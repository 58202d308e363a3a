"""The activations that benchmarks read when no dataset is named: the bundled LM over installed Python code."""

import sysconfig
from pathlib import Path

import actcache

SITE = "blocks.3.hook_resid_post"
CORPUS = str(Path(sysconfig.get_paths()["purelib"]) / "transformers" / "**" / "*.py")
"""The bundled corpus holds 3 M tokens; this one, which the LM needs anyway, holds more than 10 M."""


def open_or_harvest(url: str | None, root: Path, n_rows: int) -> actcache.Dataset:
    """The dataset at `url`, or one of at least `n_rows` rows at d 192 under `root`, a hit the second time."""
    if url is not None:
        return actcache.open(url)
    spec = actcache.Spec(
        model="bundled:stdlib-gpt2",
        corpus=actcache.Corpus(CORPUS),
        sites=[SITE],
        context_size=256,
        n_tokens=n_rows,
    )
    return actcache.harvest(spec, str(root), engine="local")
