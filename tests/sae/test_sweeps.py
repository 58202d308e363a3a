"""Sweeps over a dataset: it is read once for all SAEs, each chunk by one rank; on Ray they end as in one process."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "actcache"))

from tiny_harvest import SITES, tiny_spec

import actcache
import sae
from actcache.chunks import ChunkReader
from sae.spread import Layout, spread_of
from sae.train import Trainer

SITE, LANES, WORLD = SITES[0], 4, 2
CONFIGS = [sae.TopK(d_sae=32, k=3, optimiser=sae.Optimiser(seed=seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("sweep")
    spec = tiny_spec(directory, n_tokens=4000, chunk_rows=32)
    return str(actcache.harvest(spec, root=str(directory / "root"), engine="local", progress=False).url)


def _swept(url: str, spread: str | None) -> dict[str, Any]:
    """One rank's part of a sweep over one epoch: the chunks that it read, how often, and the SAEs that it has."""
    read: Counter[tuple[str, int]] = Counter()
    original = ChunkReader.read_into

    def counted(self: ChunkReader, path: str, chunk: int, *args: Any) -> None:
        read[path, chunk] += 1
        original(self, path, chunk, *args)

    ChunkReader.read_into = counted  # type: ignore[method-assign]
    try:
        ds = actcache.open(url)
        stream = ds.stream([SITE], batch_size=200, lanes=LANES, metadata=False)
        layout = Layout(spread_of(spread, WORLD, len(CONFIGS)) if spread else None)
        training = sae.Training(n_rows=ds.n_rows, lr=1e-3)
        trainer = Trainer(stream, CONFIGS, training, start=[None] * 3, layout=layout, tell=lambda told: None)
        with torch.enable_grad():
            saes = trainer.run()
        return {"read": read, "saes": {s.cfg["optimiser"]["seed"]: s.digest() for s in saes}}
    finally:
        ChunkReader.read_into = original  # type: ignore[method-assign]


def test_two_ranks_of_a_sweep_read_together_what_one_process_reads_and_no_chunk_twice(url: str) -> None:
    alone = _swept(url, None)
    found = ranks.on_ranks(WORLD, _swept, url, "saes")
    read = sum((rank["read"] for rank in found), Counter())
    assert read == alone["read"]
    # a chunk in which one lane ends and the next begins is read for both
    twice = [chunk for chunk, n in read.items() if n > 1]
    n_arrays = len({path for path, _ in read})
    assert len(twice) <= (LANES - 1) * n_arrays
    assert len(read) > 4 * LANES * n_arrays, "lanes are of several chunks"
    shares = [rank["read"].total() / read.total() for rank in found]
    assert min(shares) > 0.4, "each reads its own half"
    assert found[0]["saes"] | found[1]["saes"] == alone["saes"]
    assert len(alone["saes"]) == 3


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_with_rungs_over_workers_equals_that_of_one_process_to_the_bit(
    url: str, tmp_path: Path, ray_session: Any
) -> None:
    ds = actcache.open(url)
    training = sae.Training(n_rows=3 * ds.n_rows, lr=1e-3, log_every=5, rungs=(1500, 4000))
    configs = [*CONFIGS, sae.TopK(d_sae=32, k=3, optimiser=sae.Optimiser(lr=1e-6))]
    found = []
    for out, options in (("alone", {}), ("workers", {"workers": 2, "spread": "saes"})):
        stream = ds.stream([SITE], batch_size=200, epochs=3, metadata=False)
        found.append(sae.train(stream, configs, training, out=tmp_path / out, **options))  # type: ignore[arg-type]
    alone, workers = found
    assert [s.digest() for s in workers] == [s.digest() for s in alone]
    assert [s.cfg.get("stopped_at_rung") for s in workers] == [s.cfg.get("stopped_at_rung") for s in alone]
    assert sorted(s.cfg.get("stopped_at_rung", 0) for s in alone) == [0, 1500, 1500, 4000]
