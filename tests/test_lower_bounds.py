"""The oldest versions that pyproject.toml allows, all at once: they read, and they keep the conditions of writes.

In an environment of its own, with each dependency of the base install at its lower bound.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from venvs import copy_source, make_venv

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "actcache"))

pytestmark = pytest.mark.slow


def lower_bounds():
    """Each dependency of the base install, pinned to the oldest version that is allowed."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = [re.fullmatch(r"([a-z0-9-]+)>=([0-9.]+)(?:,.*)?", text) for text in declared]
    assert all(found), f"a dependency without a lower bound among {declared}"
    return [f"{m[1]}=={m[2]}" for m in found]


@pytest.fixture(scope="module")
def oldest(tmp_path_factory):
    """python of the environment, with this package installed by its own metadata."""
    directory = tmp_path_factory.mktemp("oldest")
    source = copy_source(directory / "source")
    return make_venv(directory / "venv", str(source), *lower_bounds(), constrained=False)


def run(python, script, *arguments, cwd):
    done = subprocess.run(
        [python, "-c", script, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.split("\n")


WRITERS = """
import json, sys
from actcache.errors import Conflict
from actcache.probe import require_conditions
from actcache.store import open_store
store = open_store("s3://bucket/oldest", json.loads(sys.argv[1]))
require_conditions(store)
print(store.create("key", b"ours"))
try:
    store.create("key", b"theirs")
except Conflict:
    print("conflict")
print(store.swap("key", b"other", b"theirs"), store.swap("key", b"ours", b"new"))
large = bytes(120 * 2**20)
print(store.create("large", large))
try:
    store.create("large", large[:-1] + b"1")
except Conflict:
    print("conflict")
print(store.read("key").decode())
"""


def test_no_write_is_lost_on_s3(oldest, s3, tmp_path):
    import json

    lines = run(oldest, WRITERS, json.dumps(s3), cwd=tmp_path)
    assert lines[:6] == ["True", "conflict", "False True", "True", "conflict", "new"]


READER = """
import json, sys
import numpy as np
import actcache
from actcache.verify import verify
url, options = sys.argv[1], json.loads(sys.argv[2])
ds = actcache.open(url, storage_options=options)
rows = np.concatenate([batch.sequence * 1000 + batch.position for batch in ds.stream(batch_size=100)])
verify(ds, deep=True, progress=False)
print(len(np.unique(rows)), ds.n_rows, ds.read(ds.sites[0], slice(None)).sum())
"""


@pytest.mark.parametrize("where", ["directory", "s3"])
def test_a_dataset_reads_and_verifies(oldest, s3, tmp_path, where):
    import json

    from tiny_harvest import tiny_spec

    import actcache

    root, options = (str(tmp_path / "root"), {}) if where == "directory" else ("s3://bucket/old-reader", s3)
    dataset = actcache.harvest(tiny_spec(tmp_path), root, storage_options=options, progress=False)
    distinct, n_rows, total = run(oldest, READER, dataset.url, json.dumps(options), cwd=tmp_path)[0].split()
    assert int(distinct) == int(n_rows) == dataset.n_rows
    assert float(total) == pytest.approx(float(dataset.read(dataset.sites[0], slice(None)).sum()), rel=1e-5)
