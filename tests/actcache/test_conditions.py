"""No harvest begins where one writer could overwrite another's bytes."""

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tiny_harvest import tiny_spec

import actcache
from actcache import lm
from actcache.errors import StoreError
from actcache.probe import require_conditions, run_checks
from actcache.store import open_store


class Careless(MemoryFileSystem):
    """Objects in memory; like S3 servers of old it takes no notice of a condition."""

    protocol = "careless"
    store: dict = {}  # noqa: RUF012 - shared, as fsspec's own is
    pseudo_dirs = [""]  # noqa: RUF012

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        return super().pipe_file(path, value, mode="overwrite", **kwargs)


@pytest.fixture
def careless(monkeypatch):
    monkeypatch.setattr(Careless, "store", {})
    fsspec.register_implementation("careless", Careless, clobber=True)
    return "careless://root"


@pytest.fixture
def no_lm(monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("the LM was loaded")

    monkeypatch.setattr(lm, "load_lm", load)


def test_a_harvest_is_refused_in_one_line_before_anything_is_written_or_loaded(careless, no_lm, tmp_path):
    with pytest.raises(
        StoreError, match="root replaces an object that had to be absent.*Nothing was written"
    ) as err:
        actcache.harvest(tiny_spec(tmp_path), careless, progress=False)
    assert "\n" not in str(err.value)
    assert Careless.store == {}


def test_a_store_that_cannot_be_written_says_so_itself(no_lm, tmp_path):
    (tmp_path / "file").write_text("in the way of a directory")
    with pytest.raises(StoreError, match=r"(?i)not a directory|file exists"):
        actcache.harvest(tiny_spec(tmp_path), str(tmp_path / "file"), progress=False)


@pytest.mark.parametrize("scheme", ["memory", "directory"])
def test_a_good_store_passes_and_nothing_is_left(tmp_path, scheme):
    store = open_store(f"memory://{tmp_path.name}" if scheme == "memory" else str(tmp_path))
    require_conditions(store)
    assert store.listing("") == []


def test_a_check_finds_it_too(careless):
    [failed] = [c for c in run_checks(careless) if not c["ok"]]
    assert failed["check"] == "conditional put"
    assert "honours If-None-Match" in failed["fix"]


def test_a_cache_hit_asks_nothing_of_the_store(tiny, monkeypatch):
    from actcache import driver

    monkeypatch.setattr(driver, "require_conditions", lambda store: pytest.fail("a hit writes nothing"))
    _, spec, root = tiny
    assert actcache.harvest(spec, root, progress=False).n_rows == tiny[0].n_rows
