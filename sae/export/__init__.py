"""SAEs in other projects' formats; the only package that knows foreign names.

    saelens.py              SAELens 6: a directory with cfg.json and sae_weights.safetensors
    dictionary_learning.py  a directory with ae.pt and config.json
    saebench.py             no files: `for_saebench` makes the object that its evaluations take
    weights.py              what the same function looks like with other weights

Nothing that is read here is executed.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actcache.errors import ActcacheError, FormatError

from ..core import SAE
from . import dictionary_learning, saelens
from .saebench import for_saebench

FORMATS = ("saelens", "dictionary_learning")

__all__ = ["FORMATS", "export", "for_saebench", "foreign_below", "load_foreign"]


def export(s: SAE, format: str, out: str | os.PathLike[str], **metadata: Any) -> Path:
    """Write `s` into the directory `out` for another project; returns the directory.

    Args:
        s: the SAE.
        format: "saelens" or "dictionary_learning", whose weights are float32 whatever `s` has.
        out: the directory; files of the same names in it are replaced.
        metadata: facts that readers of the format look for and that take precedence over what
            `s.cfg` knows: model_name, hook_name, context_size, prepend_bos, neuronpedia_id.

    Raises:
        ValueError: an unknown format.
        StoreError: the disk refused.
    """
    writers = {"saelens": saelens.write, "dictionary_learning": dictionary_learning.write}
    if format not in writers:
        raise ValueError(f"format {format!r} is not known; there are {', '.join(FORMATS)}")
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    writers[format](s, directory, metadata)
    return directory


def load_foreign(path: str | os.PathLike[str]) -> SAE | None:
    """The SAE in a directory of another project, for inference; None if no format is recognised.

    Raises:
        FormatError: the format, or something in it, is known but can not be represented here.
        CorruptObject: a file is damaged, or holds anything but tensors.
    """
    directory = Path(path)
    for marker, what in _UNREAD.items():
        if (directory / marker).exists():
            raise FormatError(
                f"{directory} holds {what} ({marker}); this version reads {' and '.join(FORMATS)}. "
                "Load it there and save it in one of these."
            )
    for marker, read in _readers().items():
        if (directory / marker).exists():
            try:
                return read(directory)
            except ActcacheError as error:
                if str(directory) in str(error):
                    raise
                raise type(error)(f"{directory}: {error}") from error
    return None


def foreign_below(path: str | os.PathLike[str]) -> list[str]:
    """Names of the directories in this one that look like an SAE of another project."""
    return sorted({p.parent.name for marker in _readers() for p in Path(path).glob(f"*/{marker}")})


def _readers() -> dict[str, Callable[[Path], SAE]]:
    """By the file that tells the format."""
    return {saelens.CONFIG_FILE: saelens.read, dictionary_learning.WEIGHTS_FILE: dictionary_learning.read}


_UNREAD = {
    "sae.safetensors": "a sparsify SAE",
    "params.npz": "a Gemma Scope SAE",
    "cc_weights.pt": "a crosscoder",
}
"""Files by which formats are told that are not read."""
