"""Writes tests/golden/<format of manifests>/: small datasets of this format, and what must be read from them.

Run once for a format version, before it is released; later versions of the code must go on reading
what it wrote. Refuses to overwrite.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "actcache")]

from tiny_harvest import SITES, tiny_spec  # noqa: E402

import actcache  # noqa: E402
from actcache.manifest import MANIFEST_FORMAT  # noqa: E402

PRECISIONS = {"fvu": "fvu:1e-3", "rotated": "rotated:1e-3", "bf16": "bf16"}


def sha256(values: np.ndarray) -> str:
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return hashlib.sha256(little.tobytes()).hexdigest()


def expected(dataset: actcache.Dataset) -> dict[str, Any]:
    """Digests of what a reader must get, by split: codes and scales, row metadata, a stream's order."""
    out: dict[str, Any] = {"id": dataset.id}
    for split in dataset.splits:
        part = dataset.split(split)
        rows = np.arange(part.n_rows)
        digests = {name: sha256(part._gather(name, rows)) for name in ("token_id", "sequence", "position")}
        digests["input_ids"] = sha256(part.sequences(slice(None)).input_ids)
        for site in part.sites:
            digests[f"{site}/codes"] = sha256(part._gather(f"{site}/codes", rows))
            if part._shared.precision.quantised:
                digests[f"{site}/scale"] = sha256(part._gather(f"{site}/scale", rows))
            digests[f"{site}/mean of rows"] = part.read(site, slice(None)).astype(np.float64).mean()
        batches = list(part.stream(part.sites[0], batch_size=300, seed=5, epochs=2, lanes=8))
        digests["stream of seed 5: sequence, position"] = [
            sha256(np.concatenate([getattr(b, name) for b in batches])) for name in ("sequence", "position")
        ]
        out[split] = digests
    return out


def main() -> None:
    target = ROOT / "tests" / "golden" / str(MANIFEST_FORMAT)
    if target.exists():
        sys.exit(f"{target.relative_to(ROOT)} is there; golden data of a format is written once. Delete it if "
                 "this format has not been released yet")  # fmt: skip
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, precision in PRECISIONS.items():
            sites = SITES if name == "fvu" else SITES[:1]
            spec = tiny_spec(
                Path(directory),
                precision=precision,
                sites=sites,
                context_size=8,
                block_rows=512,
                n_tokens=900,
                test_blocks=0,
            )
            dataset = actcache.harvest(spec, str(Path(directory) / "root"), progress=False)
            shutil.copytree(dataset.url, target / name)
            found[name] = expected(actcache.open(str(target / name)))
    (target / "expected.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
