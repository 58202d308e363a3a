"""Processes killed by SIGKILL at chosen moments of a checkpoint: the run ends in the undisturbed result."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from killed_runs import Nursery
from test_checkpoint import CONFIGS, NAMES, TRAINING, Breaking, _acts, _bits, _curves

import sae
from actcache.store import Store, open_store
from sae.checkpoint_folder import Checkpoints
from sae.files import run_files

PLACES = [
    (r"create .*/part-.*", "before"),
    (r"create .*/part-.*-0002\.safetensors", "before"),  # in the middle of a part
    (r"create .*/part-.*-0001\.safetensors", "inside"),  # of a file of it; a local write leaves a torn one
    (r"create .*/part-.*", "after"),
    (r"create .*/done\.json", "before"),  # between the parts and the file that makes them count
    (r"create .*/done\.json", "inside"),
    (r"create .*/done\.json", "after"),
    (r"delete .*/done\.json", "before"),  # as the one before is removed, or all at the end
    (r"delete .*/done\.json", "after"),
    (r"delete .*/part-.*", "before"),
    (r"delete .*/part-.*", "after"),
]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as found:
        yield found


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight")
    sae.train(Breaking(_acts()), CONFIGS, TRAINING, out=out)
    return out


def _rows(store: Store) -> int:
    """Rows of the newest checkpoint, each byte of which is read; 0 if there is none."""
    keys = {o.key for o in store.listing("checkpoints")}
    for key in keys:
        folder, _, name = key.rpartition("/")
        if name == "done.json":
            files = json.loads(store.read(key))["files"]
            assert {f"{folder}/{file['name']}" for file in files} <= keys, "its parts went first"
    newest = Checkpoints(store).newest()
    return newest.rows if newest is not None and len(dict(newest)) == len(newest) else 0


def _killed_until_done(
    nursery: Nursery, out: str, kills: list[tuple[str, str, int]], options: dict[str, Any] | None = None
) -> None:
    """Kill a training at each of these places, those that it still meets; then let it end."""
    store, rows, met = open_store(out, options), 0, 0
    for pattern, when, n in kills:
        status = nursery.train(out, pattern, when, n, options)
        assert status in (-9, 0), "it neither ended nor was killed"
        met += status == -9
        if status == 0:
            break
        assert _rows(store) >= rows or b'"finished": true' in store.read("run.json")
        rows = _rows(store)
    assert met, "no kill took place"
    sae.train(Breaking(_acts()), CONFIGS, TRAINING, out=out, storage_options=options)
    assert store.listing("checkpoints") == []
    assert [o for o in store.leftovers() if "checkpoints" in o.key] == []


def test_a_run_killed_around_its_checkpoints_ends_in_the_undisturbed_result(
    nursery: Nursery, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    kills = [
        (*PLACES[1], 1),
        (*PLACES[8], 0),
    ]  # in the middle of a part; between the old one's end and its parts'
    _killed_until_done(nursery, str(out), kills)
    assert _bits(out) == _bits(straight)
    assert _curves(out) == _curves(straight)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[1]} {place[0]}")
def test_a_run_killed_at_each_place_again_and_again_ends_in_the_undisturbed_result(
    nursery: Nursery, straight: Path, tmp_path: Path, place: tuple[str, str]
) -> None:
    rng = random.Random(f"{place}")
    kills = [(*place, rng.randrange(3)), (*rng.choice(PLACES), rng.randrange(2)), (*place, rng.randrange(3))]
    _killed_until_done(nursery, str(tmp_path / "run"), kills)
    assert _bits(tmp_path / "run") == _bits(straight)
    assert _curves(tmp_path / "run") == _curves(straight)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_run_on_s3_killed_at_places_drawn_by_seed_ends_in_the_undisturbed_result(
    nursery: Nursery, straight: Path, s3: dict, seed: int
) -> None:
    rng, url = random.Random(seed), f"s3://bucket/sae/killed/{seed}"
    places = [place for place in PLACES if place[1] != "inside"]  # an upload is whole or absent
    kills = [(*rng.choice(places), rng.randrange(2)) for _ in range(3)]
    _killed_until_done(nursery, url, kills, s3)
    files = run_files(url, s3)
    assert {name: files.read(f"{name}/weights.safetensors") for name in NAMES} == _bits(straight)
