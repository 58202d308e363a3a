"""A harvest stores exactly the activations of a plain forward pass, once, whatever happens on the way."""

import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from digests import array_digests
from ray_processes import harvester_processes
from tiny_harvest import SITES, tiny_spec
from tiny_models import FAMILIES, tiny_tokenizer

import actcache
from actcache.errors import ActcacheError, HarvestError, SpecError
from actcache.lm import load_lm
from actcache.store import open_store

ARRAYS = ("token_id", "sequence", "position", "input_ids", "length")


def shard_files(url):
    return {p: p.stat().st_mtime_ns for p in Path(url).rglob("c/*") if p.is_file()}


def direct_residuals(dataset, spec, split):
    """resid_post of block 1 by an unbatched HF forward of each sequence, [S, T, D]."""
    model = load_lm(spec.model).model
    rows = []
    with torch.inference_mode():
        for sequence in range(dataset.split(split).n_sequences):
            input_ids = torch.from_numpy(dataset.split(split).context(sequence).astype(np.int64))[None]
            hidden = model(input_ids, output_hidden_states=True).hidden_states[2][0].numpy()
            rows.append(np.pad(hidden, ((0, spec.context_size - len(hidden)), (0, 0))))
    return np.stack(rows)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_stored_rows_are_those_of_an_unbatched_forward_pass(tiny, split):
    dataset, spec, _ = tiny
    part = dataset.split(split)
    rows = part.rows(slice(None))
    direct = direct_residuals(dataset, spec, split)[rows.sequence, rows.position]
    stored = part.read(SITES[0], slice(None))
    fvu = ((stored - direct) ** 2).sum() / ((direct - direct.mean(0)) ** 2).sum()
    assert fvu <= 1e-3
    assert part.stats(SITES[0])["max_error"] == pytest.approx(np.abs(stored - direct).max(), rel=1e-3)


def test_every_kept_token_is_one_row(tiny):
    dataset, _, _ = tiny
    for split in dataset.splits:
        part = dataset.split(split)
        rows = part.rows(slice(None))
        assert part.n_rows == len(rows.sequence)
        places = set(zip(rows.sequence.tolist(), rows.position.tolist(), strict=True))
        assert len(places) == part.n_rows
        sequences = part.sequences(slice(None))
        kept = set(zip(*(x.tolist() for x in np.nonzero(sequences.kept)), strict=True))
        assert places <= kept
        assert len(kept - places) <= 16  # the last sequence may end in a block that was not asked for
        assert np.array_equal(sequences.input_ids[rows.sequence, rows.position], rows.token_id)


def test_rows_are_permuted_inside_their_block_only(tiny):
    dataset, _, _ = tiny
    rows = dataset.rows(slice(None))
    reading_order = rows.sequence.astype(np.int64) * 16 + rows.position
    blocks = [reading_order[i : i + 1024] for i in range(0, dataset.n_rows, 1024)]
    assert all(a.max() < b.min() for a, b in itertools.pairwise(blocks))
    assert abs(np.corrcoef(blocks[0], np.arange(1024))[0, 1]) < 0.15  # five standard errors


def test_statistics_are_those_of_the_stored_rows(tiny):
    dataset, _, _ = tiny
    for site in SITES:
        stored = dataset.read(site, slice(None)).astype(np.float64)
        stats = dataset.stats(site)
        assert stats["n_rows"] == dataset.n_rows
        assert np.allclose(stats["mean"], stored.mean(0), rtol=1e-6, atol=1e-7)
        assert np.allclose(stats["variance"], stored.var(0), rtol=1e-5)
        assert stats["mean_norm"] == pytest.approx(np.linalg.norm(stored, axis=1).mean(), rel=1e-6)
        assert stats["fvu_core"] <= 1e-3


def test_plain_zarr_and_one_line_of_arithmetic_give_the_rows(tiny):
    dataset, _, _ = tiny
    for split in dataset.splits:
        group = zarr.open_group(dataset.url, mode="r")[split]
        for site in SITES:
            codes, scale, channel, offset = (
                group[site][name][:] for name in ("codes", "scale", "channel", "offset")
            )
            assert group[site].attrs["actcache"]["decode"] == "codes * scale[:, None] * channel + offset"
            acts = codes * scale[:, None] * channel + offset
            assert np.array_equal(acts, dataset.split(split).read(site, slice(None)))
        for name in ARRAYS[:3]:
            assert np.array_equal(group[name][:], getattr(dataset.split(split).rows(slice(None)), name))


def test_the_same_spec_again_is_a_hit_that_touches_nothing(tiny):
    dataset, spec, root = tiny
    before = shard_files(dataset.url)
    again = actcache.harvest(spec, root, progress=False, lm_batch=7)
    assert again.url == dataset.url
    assert again.manifest.version == dataset.manifest.version
    assert shard_files(dataset.url) == before
    fewer = actcache.harvest(replace(spec, n_tokens=10), root, progress=False)
    assert fewer.manifest.version == dataset.manifest.version


def test_more_tokens_and_more_sites_extend_the_dataset_and_change_nothing_before(tmp_path):
    spec = tiny_spec(tmp_path, n_tokens=1024, sites=SITES[:1])
    root = str(tmp_path / "root")
    first = actcache.harvest(spec, root, progress=False)
    files = shard_files(first.url)
    rows = first.read(SITES[0], slice(None))
    longer = actcache.harvest(replace(spec, n_tokens=3000), root, progress=False)
    assert (first.n_rows, longer.n_rows) == (1024, 3072)
    assert np.array_equal(longer.read(SITES[0], slice(0, 1024)), rows)
    wider = actcache.harvest(replace(spec, n_tokens=3000, sites=SITES), root, progress=False)
    assert wider.sites == sorted(SITES)
    assert wider.url == first.url
    assert files.items() <= shard_files(first.url).items()
    # a reader pinned to the first version still sees exactly its rows
    pinned = actcache.open(first.url, version=first.manifest.version)
    assert np.array_equal(pinned.read(SITES[0], slice(None)), rows)
    assert pinned.sites == [SITES[0]]
    whole = tiny_spec(tmp_path, n_tokens=3000)
    fresh = actcache.harvest(whole, str(tmp_path / "other"), progress=False)
    assert array_digests(wider.url) == array_digests(fresh.url)


def test_zarr_metadata_that_a_crash_left_behind_is_written_by_the_next_run(tmp_path):
    spec = tiny_spec(tmp_path, n_tokens=1024)
    dataset = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    root, offset = Path(dataset.url, "zarr.json"), Path(dataset.url, "train", SITES[0], "offset", "c", "0")
    before = root.read_bytes()
    root.unlink()
    offset.unlink()
    again = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    assert again.manifest.version == dataset.manifest.version
    assert root.read_bytes() == before
    assert offset.exists()


def test_a_torn_shard_is_written_again_and_a_foreign_one_is_not(tmp_path):
    spec = tiny_spec(tmp_path, n_tokens=3000)
    root = str(tmp_path / "root")
    dataset = actcache.harvest(replace(spec, n_tokens=1024), root, progress=False)
    whole = Path(dataset.url, "train", "token_id", "c", "0").read_bytes()
    torn = Path(dataset.url, "train", "token_id", "c", "1")
    torn.write_bytes(whole[:100])
    Path(dataset.url, "train", "token_id", "c", "2").write_bytes(whole)  # intact, of another block
    with pytest.raises(HarvestError, match=r"token_id/c/2 holds other values"):
        actcache.harvest(spec, root, progress=False)
    Path(dataset.url, "train", "token_id", "c", "2").unlink()
    longer = actcache.harvest(spec, root, progress=False)
    fresh = actcache.harvest(spec, str(tmp_path / "other"), progress=False)
    assert array_digests(longer.url) == array_digests(fresh.url)


def test_codes_of_another_kernel_are_adopted_with_their_own_statistics(tmp_path):
    """A valid shard whose codes differ by rounding stands where a block must go: it holds."""
    from actcache.shard import decode_shard, encode_shard

    spec = tiny_spec(tmp_path, n_tokens=1024, sites=SITES[:1])
    dataset = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    path = Path(dataset.url, "train", SITES[0], "codes", "c", "0", "0")
    codes = decode_shard(path.read_bytes(), 1024, (64, 32), 1024, np.dtype("i1"), "k")
    other = codes.copy()
    other[5, 7] += 1
    foreign, _ = encode_shard(other, 64, 1024, -128)
    fresh = tmp_path / "other" / Path(dataset.url).name / path.relative_to(dataset.url)
    fresh.parent.mkdir(parents=True)
    fresh.write_bytes(foreign)
    adopted = actcache.harvest(spec, str(tmp_path / "other"), progress=False)
    stored = adopted.read(SITES[0], slice(None))
    assert (stored != dataset.read(SITES[0], slice(None))).sum() == 1
    assert np.allclose(adopted.stats(SITES[0])["mean"], stored.astype(np.float64).mean(0), atol=1e-7)


def test_a_source_is_written_down_without_credentials_or_local_directories(tmp_path):
    from actcache.spec import shown_source

    assert shown_source("https://user:pass@host/a/b.jsonl?token=x") == "https://host/a/b.jsonl"
    assert shown_source("s3://bucket/pile/*.jsonl.gz") == "s3://bucket/pile/*.jsonl.gz"
    assert shown_source("/home/someone/secret/corpus/*.txt") == "corpus/*.txt"
    assert shown_source("bundled:stdlib") == "bundled:stdlib"
    dataset = actcache.harvest(tiny_spec(tmp_path, n_tokens=1024), str(tmp_path / "root"), progress=False)
    for path in Path(dataset.url).rglob("*.json"):
        assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_lossless_precisions_store_the_forward_pass_itself(tmp_path, precision):
    spec = tiny_spec(tmp_path, precision=precision, n_tokens=1024, sites=SITES[:1])
    dataset = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    rows = dataset.rows(slice(None))
    direct = direct_residuals(dataset, spec, "train")[rows.sequence, rows.position]
    stored = dataset.read(SITES[0], slice(None))
    relative = {"bf16": 2**-8, "fp16": 2**-10, "fp32": 2**-20}[precision]
    assert np.allclose(stored, direct, rtol=relative, atol=1e-5)
    if precision == "bf16":
        codes = zarr.open_group(dataset.url, mode="r")["train"][SITES[0]]["codes"][:]
        assert np.array_equal((codes.astype("<u4") << 16).view("<f4"), stored)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_harvests(tmp_path, family):
    spec = tiny_spec(tmp_path, family, sites=["blocks.1.hook_resid_post"], n_tokens=1024)
    dataset = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    stats = dataset.stats("blocks.1.hook_resid_post")
    assert stats["n_rows"] == 1024
    assert stats["fvu_core"] <= 1e-3


def test_two_models_with_one_tokenizer_are_row_aligned(tmp_path):
    a = actcache.harvest(tiny_spec(tmp_path, "gpt2", n_tokens=1024), str(tmp_path / "root"), progress=False)
    b = actcache.harvest(tiny_spec(tmp_path, "llama", n_tokens=1024), str(tmp_path / "root"), progress=False)
    assert a.id != b.id
    for name in ("token_id", "sequence", "position"):
        assert np.array_equal(getattr(a.rows(slice(None)), name), getattr(b.rows(slice(None)), name))
    assert len(open_store(str(tmp_path / "root" / "tokens")).folders()) == 1


def test_identity_depends_on_what_decides_values_and_on_nothing_else(tmp_path):
    from actcache.driver import resolve

    spec = tiny_spec(tmp_path)
    base = resolve(spec).id
    for change in ({"n_tokens": 10}, {"sites": SITES[:1]}, {"validation_blocks": 0}):
        assert resolve(replace(spec, **change)).id == base
    for change in ({"seed": 1}, {"precision": "bf16"}, {"context_size": 15}, {"lm_dtype": "bfloat16"}):
        assert resolve(replace(spec, **change)).id != base
    moved = tmp_path / "moved"
    (tmp_path / "corpus").rename(moved)
    assert resolve(replace(spec, corpus=replace(spec.corpus, source=str(moved / "*.txt")))).id == base


def run_in_subprocess(tmp_path):
    """A harvest in a process of its own that can be killed."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from tiny_harvest import tiny_spec
import actcache
actcache.harvest(tiny_spec(Path({str(tmp_path)!r}), n_tokens=6000), {str(tmp_path / "root")!r}, progress=False)
"""
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], start_new_session=True)


def committed_blocks(tmp_path):
    return {p: p.stat().st_mtime_ns for p in (tmp_path / "root").glob("*/_records/*/*.json")}


@pytest.mark.parametrize("after_blocks", [1, 3])
def test_killed_harvest_resumes_to_the_same_rows_and_repeats_no_committed_block(tmp_path, after_blocks):
    tiny_spec(tmp_path)
    process = run_in_subprocess(tmp_path)
    deadline = time.monotonic() + 60
    while len(committed_blocks(tmp_path)) < after_blocks and time.monotonic() < deadline:
        assert process.poll() is None or len(committed_blocks(tmp_path)) >= after_blocks
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = committed_blocks(tmp_path)
    assert len(before) >= after_blocks
    spec = tiny_spec(tmp_path, n_tokens=6000)
    dataset = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    assert before.items() <= committed_blocks(tmp_path).items()
    undisturbed = actcache.harvest(spec, str(tmp_path / "other"), progress=False)
    assert array_digests(dataset.url) == array_digests(undisturbed.url)


def test_two_drivers_at_once_make_one_dataset(tmp_path):
    tiny_spec(tmp_path)
    processes = [run_in_subprocess(tmp_path) for _ in range(2)]
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    spec = tiny_spec(tmp_path, n_tokens=6000)
    dataset = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    undisturbed = actcache.harvest(spec, str(tmp_path / "other"), progress=False)
    assert array_digests(dataset.url) == array_digests(undisturbed.url)
    assert dataset.manifest.complete


@pytest.mark.ray
def test_ray_actors_and_the_local_engine_store_the_same_bytes(tiny, tmp_path, ray_session):
    dataset, spec, _ = tiny
    by_ray = actcache.harvest(spec, str(tmp_path / "root"), engine="ray", workers=2, progress=False)
    assert by_ray.id == dataset.id
    assert array_digests(by_ray.url) == array_digests(dataset.url)


@pytest.mark.ray
def test_a_killed_actor_costs_nothing_but_time(tiny, tmp_path, ray_session):
    """An actor is killed with SIGKILL as soon as it has committed its first block."""
    import threading

    _, spec, _ = tiny
    longer = replace(spec, n_tokens=6000)
    root = tmp_path / "root"
    killed = []

    def kill_one():
        deadline = time.monotonic() + 120
        while not list(root.glob("*/_records/*/*.json")) and time.monotonic() < deadline:
            time.sleep(0.005)
        for pid in harvester_processes():
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            return

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    by_ray = actcache.harvest(longer, str(root), engine="ray", workers=2, progress=False)
    killer.join()
    assert killed
    undisturbed = actcache.harvest(longer, str(tmp_path / "other"), progress=False)
    assert array_digests(by_ray.url) == array_digests(undisturbed.url)


def test_nan_activations_stop_the_block_and_name_the_place(tmp_path):
    from safetensors.torch import load_file, save_file

    spec = tiny_spec(tmp_path)
    weights = Path(spec.model) / "model.safetensors"
    state = load_file(weights)
    token = tiny_tokenizer().convert_tokens_to_ids("%")
    state["transformer.wte.weight"][token] = float("nan")
    save_file(state, weights, metadata={"format": "pt"})
    corpus = tmp_path / "corpus"
    (corpus / "9999.txt").write_text("x % y")
    with pytest.raises(ActcacheError, match=r"blocks\.1\.hook_\w+.*holds nan.*"):
        actcache.harvest(replace(spec, n_tokens=10**6), str(tmp_path / "root"), progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": ["blocks.1.hook_resid_pots"]}, "blocks.1.hook_resid_post"),
        ({"context_size": 65, "block_rows": 65 * 64}, "at most 64 tokens"),
        ({"model": "no/such-model-here"}, "no/such-model-here"),
        ({"block_rows": 1000}, "multiple of chunk_rows"),
        ({"block_rows": 512}, "must be >= 1024"),
        ({"chunk_rows": 48, "block_rows": 4800}, "power of two"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_anything_is_written(tmp_path, change, message):
    spec = tiny_spec(tmp_path)
    with pytest.raises(SpecError, match=message):
        actcache.harvest(replace(spec, **change), str(tmp_path / "root"), progress=False)
    assert not (tmp_path / "root").exists()


def test_a_model_without_its_tokenizer_is_one_clear_error(tmp_path):
    spec = tiny_spec(tmp_path)
    for file in Path(spec.model).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(SpecError, match="tokenizer"):
        actcache.harvest(spec, str(tmp_path / "root"), progress=False)


def test_blocks_that_fail_are_listed_after_the_rest_is_committed(tmp_path):
    """A directory stands where one shard must go; every other block is committed, then the error names it."""
    spec = tiny_spec(tmp_path, n_tokens=3000)
    root = tmp_path / "root"
    first = actcache.harvest(replace(spec, n_tokens=1024), str(root), progress=False)
    blocker = Path(first.url) / "train" / SITES[0] / "codes" / "c" / "1" / "0"
    blocker.mkdir(parents=True)
    with pytest.raises(HarvestError, match=r"1 of 2 blocks failed \(train block 1\)"):
        actcache.harvest(spec, str(root), progress=False)
    partial = actcache.open(first.url)
    assert partial.n_rows == 1024
    assert not partial.manifest.complete
    (aside,) = partial.manifest.provenance["set_aside"]
    assert (aside["split"], aside["block"]) == ("train", 1)
    assert f"train/{SITES[0]}/codes/c/1/0" in aside["error"]
    assert str(root) not in aside["error"]  # the manifest travels, this machine's paths stay
    blocker.rmdir()
    assert actcache.harvest(spec, str(root), progress=False).n_rows == 3072
