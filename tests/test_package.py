"""The rules between the packages: who may import what, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "ray", "transformers", "zarr", "pyarrow", "matplotlib")


def imported_modules(path):
    """Top-level names of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def files_importing(package, name):
    return sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / package).rglob("*.py")
        if any(module.split(".")[0] == name for module in imported_modules(path))
    )


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("actcache", "sae"),
        ("actcache", "cluster"),
        ("sae", "cluster"),
        ("cluster", "actcache"),
        ("cluster", "sae"),
    ],
)
def test_packages_that_must_not_know_each_other(package, forbidden):
    assert files_importing(package, forbidden) == []


def test_heavy_libraries_stay_at_their_edges():
    assert files_importing("actcache", "ray") == [
        "actcache/interop.py",
        "actcache/metrics.py",
        "actcache/ray_engine.py",
    ]
    assert files_importing("actcache", "datasets") == ["actcache/interop.py"]
    assert files_importing("actcache", "transformers") == ["actcache/lm.py"]
    assert files_importing("actcache", "zarr") == []
    assert files_importing("sae", "ray") == [
        "sae/evals/on_ray.py",
        "sae/evals/workers.py",
        "sae/ray_ranks.py",
        "sae/ray_room.py",
        "sae/ray_train.py",
    ]
    assert files_importing("sae", "zarr") == []


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import actcache, sae", ()),
        ("import actcache; actcache.open", ("pyarrow",)),
        ("import actcache; actcache.harvest", ("pyarrow",)),
        ("import actcache.__main__, sae.__main__", ()),
    ],
)
def test_importing_is_light(statement, allowed):
    code = f"{statement}\nimport sys\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert set(ast.literal_eval(out)) <= set(allowed)


def test_public_names_resolve_and_a_typo_says_what_there_is():
    import actcache
    import sae

    for package in (actcache, sae):
        for name in package.__all__:
            assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="it has Corpus, Dataset"):
        _ = actcache.opne


def test_harvest_stays_a_function_whatever_was_imported_before():
    code = "import actcache.driver, actcache.harvester, actcache; print(callable(actcache.harvest))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "True"
