"""Other libraries get the rows, tokens and order that `Dataset` gives."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_harvest import SITES
from torch.utils.data import DataLoader

from actcache import interop
from actcache.errors import Conflict, ForkedProcess, SpecError
from actcache.torch_data import ActivationProvider, TorchStream

SITE = SITES[0]


def stored(dataset, site=SITE):
    return dataset.read(site, slice(None)), dataset.rows(slice(None))


def check_table(dataset, table, sites=SITES):
    """An Arrow table holds exactly the split, in stored order."""
    for site in sites:
        acts_ND, rows = stored(dataset, site)
        column = table[site].combine_chunks()
        flat = column.flatten() if isinstance(column, pa.FixedSizeListArray) else column
        assert np.array_equal(np.asarray(flat).reshape(acts_ND.shape), acts_ND)
    for name in ("token_id", "sequence", "position"):
        assert np.array_equal(table[name].to_numpy(), getattr(rows, name))


@pytest.mark.parametrize("batch_rows", [None, 100, 64, 10_000])
def test_arrow_batches_hold_every_row_once_in_stored_order(tiny, batch_rows):
    reader = interop.record_batch_reader(tiny[0], batch_rows=batch_rows)
    assert reader.schema.field(SITE).type == pa.list_(pa.float32(), tiny[0].d_in(SITE))
    assert reader.schema.metadata[b"actcache.id"].decode() == tiny[0].id
    check_table(tiny[0], reader.read_all())
    some = pa.Table.from_batches(interop.to_batches(tiny[0], SITE, start=70, stop=200, batch_rows=batch_rows))
    assert np.array_equal(np.asarray(some["position"]), tiny[0].rows(slice(70, 200)).position)
    assert some.column_names == ["token_id", "sequence", "position", SITE]


@pytest.mark.parametrize("parts", [1, 2, 7, 48, 1000])
def test_ranges_cover_the_rows_once_in_whole_chunks(tiny, parts):
    ranges = list(interop._ranges(tiny[0], tiny[0].n_rows, parts))
    assert len(ranges) <= parts
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(tiny[0].n_rows))
    assert all(start % 64 == 0 and start < stop for start, stop in ranges)


def test_an_exported_file_is_the_rows_memory_mapped(tiny, tmp_path):
    acts_ND, _ = stored(tiny[0])
    mapped = interop.export_npy(tiny[0], SITE, tmp_path / "acts.npy")
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, acts_ND)
    half = interop.export_npy(tiny[0], SITE, tmp_path / "half.npy", start=100, stop=400, dtype="float16")
    assert np.array_equal(half, acts_ND[100:400].astype(np.float16))
    with pytest.raises(Conflict, match="exists"):
        interop.export_npy(tiny[0], SITE, tmp_path / "acts.npy")
    with pytest.raises(SpecError, match="float32 or float16"):
        interop.export_npy(tiny[0], SITE, tmp_path / "x.npy", dtype="int8")
    assert sorted(os.listdir(tmp_path)) == ["acts.npy", "half.npy"]


def test_a_provider_gives_tensors_epoch_after_epoch_and_resumes(tiny):
    dataset = tiny[0]
    before = threading.active_count()
    provider = ActivationProvider(dataset, SITE, batch_size=500, lanes=8)
    per_epoch = -(-dataset.n_rows // 500)
    stream = dataset.stream(SITE, batch_size=500, lanes=8, epochs=3, metadata=False)
    wanted = [batch[SITE] for batch in stream]
    got, states = [], []
    for _ in range(2 * per_epoch + 2):
        got.append(next(provider))
        states.append(json.loads(json.dumps(provider.state())))
    assert all(np.array_equal(a.numpy(), b) for a, b in zip(got, wanted, strict=False))
    again = ActivationProvider(dataset, SITE, batch_size=500, lanes=8, state=states[4])
    assert torch.equal(again.next_batch(), got[5])
    assert iter(again) is again
    assert again.config["d_submodule"] == got[0].shape[1]
    provider.close()
    again.close()
    assert threading.active_count() == before


def loaded(loader):
    return [{name: value.numpy().copy() for name, value in batch.items()} for batch in loader]


def test_a_torch_loader_serves_the_stream(tiny):
    dataset = tiny[0]
    data = TorchStream(dataset, SITE, batch_size=500, lanes=8, seed=3)
    batches = loaded(DataLoader(data, batch_size=None))
    for ours, theirs in zip(batches, dataset.stream(SITE, batch_size=500, lanes=8, seed=3), strict=True):
        assert np.array_equal(ours[SITE], theirs[SITE])
        assert np.array_equal(ours["position"], theirs.position)
    iterator = iter(data)
    next(iterator)
    state = json.loads(json.dumps(data.state_dict()))
    fresh = TorchStream(dataset, SITE, batch_size=500, lanes=8, seed=3)
    fresh.load_state_dict(state)
    rest = loaded(DataLoader(fresh, batch_size=None))
    assert all(np.array_equal(a[SITE], b[SITE]) for a, b in zip(rest, batches[1:], strict=True))
    assert len(loaded(fresh)) == len(batches)


@pytest.mark.slow
def test_spawned_loader_workers_serve_each_row_once(tiny):
    data = TorchStream(tiny[0], SITE, batch_size=500, lanes=8)
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    batches = loaded(loader)
    served = np.concatenate([b["sequence"] * 1000 + b["position"] for b in batches])
    _, rows = stored(tiny[0])
    assert np.array_equal(np.sort(served), np.sort(rows.sequence.astype(np.int64) * 1000 + rows.position))
    assert {len(b[SITE]) for b in batches[:-2]} == {500}


FORKED = """
import sys, warnings
warnings.simplefilter("ignore")  # newer Pythons warn of forks in threaded processes
import actcache, os
from actcache.errors import ForkedProcess
dataset = actcache.open(sys.argv[1])
stream = dataset.stream(batch_size=100)
batches = iter(stream)
next(batches)
child = os.fork()
if not child:
    for use in (lambda: next(batches), lambda: next(iter(dataset.stream())), lambda: dataset.rows(0)):
        try:
            use()
        except ForkedProcess as err:
            assert "spawn" in str(err)
        else:
            os._exit(1)
    assert actcache.open(sys.argv[1]).rows(0).position.shape == (1,)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print(sum(len(b) for b in batches))
"""


def test_a_fork_is_told_to_open_again_and_the_parent_goes_on(tiny):
    command = [sys.executable, "-c", FORKED, tiny[0].url]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) == tiny[0].n_rows - 100


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_loader_workers_are_refused_with_the_way_out(tiny):
    loader = DataLoader(
        TorchStream(tiny[0], SITE), batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    with pytest.raises(ForkedProcess, match="multiprocessing_context=.spawn"):
        next(iter(loader))


def test_a_pickled_dataset_is_opened_again_elsewhere(tiny):
    import pickle

    held_out = pickle.loads(pickle.dumps(tiny[0].split("validation")))
    assert held_out.split_name == "validation"
    assert held_out.manifest == tiny[0].manifest
    assert np.array_equal(held_out.read(SITE, [3]), tiny[0].split("validation").read(SITE, [3]))
