"""Tasks by name, on an SAE and the LM that its dataset came from; the results lie in `tasks.json` beside it.

`probing` takes Python files of the dataset's corpus (half to train on, half to test) and, out of
distribution, of this Python's site-packages. Other names are logit-difference tasks.
"""

import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from actcache.errors import SpecError
from sae.evals.logit_difference import logit_difference, read_task
from sae.evals.probing import corpus_python, labelled_rows, python_files, sparse_probing

PROBING = "probing"
_FILES = 40
_ROWS = 8_000


def run_tasks(
    s: Any, ds: Any, lm: Any, tokenizer: Any, names: Sequence[str], n_rows: int = _ROWS
) -> dict[str, Any]:
    """Results by task; written to `tasks.json` where the SAE has a directory.

    Raises:
        SpecError: no such task, too few Python files, or an answer that is not one token.
    """
    found: dict[str, Any] = {}
    for name in names:
        if name == PROBING:
            found[name] = _probing(s, ds, lm, tokenizer, n_rows)
        else:
            mean_D = torch.as_tensor(ds.stats(s.cfg["site"])["mean"], dtype=torch.float32)
            found[name] = logit_difference(s, lm, tokenizer, read_task(name), mean_D)
    path = getattr(s, "path", None)
    if path is not None:
        file = Path(path) / "tasks.json"
        partial = file.with_name("tasks.json.partial")
        partial.write_text(json.dumps(found, indent=2) + "\n")
        partial.replace(file)
    return found


def _probing(s: Any, ds: Any, lm: Any, tokenizer: Any, n_rows: int) -> dict[str, Any]:
    inside = corpus_python(ds.spec.corpus, _FILES)
    packages = Path(sysconfig.get_paths()["purelib"])
    outside = python_files(sorted(packages.glob("*/**/*.py")), _FILES // 2)
    for where, texts in ((ds.spec.corpus, inside), (str(packages), outside)):
        if len(texts) < 4:
            raise SpecError(f"{where} holds {len(texts)} Python files of 1 to 100 kB; probing needs 4.")
    half = len(inside) // 2
    train, test, ood = (
        labelled_rows(lm, tokenizer, texts, s.cfg["site"], int(ds.spec.context_size), n_rows)
        for texts in (inside[:half], inside[half:], outside)
    )
    return sparse_probing(s, train, test, ood)
