"""What a precision promises holds in whole harvests: with attention sinks, extended, damaged, on a trained LM."""

import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from tiny_harvest import SITES, tiny_spec
from tiny_models import save_tiny_lm, tiny_tokenizer
from transformers import AutoModelForCausalLM

import actcache
from actcache.capture import run_capture
from actcache.codec import Precision, calibrate, decode, encode
from actcache.errors import CorruptObject, SpecError
from actcache.lm import load_lm, load_tokenizer
from actcache.statistics import Statistics
from actcache.store import LocalStore
from actcache.verify import verify

SINK = "|"


def forward(model, input_ids_ST, *sites):
    """float32 [S, T, D] of each site by one plain forward pass."""
    with torch.inference_mode():
        acts = run_capture(model, torch.from_numpy(input_ids_ST.astype(np.int64)), list(sites))
    return [acts[site].numpy() for site in sites]


def spec_with_sinks(directory, norm, precision):
    """A Spec whose token `|`, one in 256, has `norm` times the median norm at block 1's resid_post."""
    path = save_tiny_lm(directory / "tiny-gpt2", "gpt2", vocab_size=104)
    sink = tiny_tokenizer().convert_tokens_to_ids(SINK)
    rng = np.random.default_rng(0)
    model = AutoModelForCausalLM.from_pretrained(path)
    ordinary_NT = rng.integers(3, 90, (64, 16))
    median = np.median(np.linalg.norm(forward(model, ordinary_NT, SITES[0])[0], axis=-1))
    with torch.no_grad():
        row_D = model.transformer.wte.weight[sink]
        row_D *= norm * median / row_D.norm()
    model.save_pretrained(path)
    (directory / "corpus").mkdir()
    for i in range(120):
        letters = rng.choice(list("abcdefghijklmnop"), 100)
        letters[rng.random(100) < 1 / 256] = SINK
        (directory / "corpus" / f"{i:04d}.txt").write_text(f"{i}" + "".join(letters))
    return tiny_spec(directory, precision=precision, n_tokens=8000, sites=SITES[:1])


@pytest.mark.parametrize("precision", ["fvu:1e-3", "rotated:1e-3"])
@pytest.mark.parametrize("norm", [30, 100, 300])
def test_ordinary_rows_beside_attention_sinks_keep_the_stated_noise_in_a_harvest(tmp_path, norm, precision):
    spec = spec_with_sinks(tmp_path, norm, precision)
    dataset = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    model = load_lm(spec.model).model
    rows = dataset.rows(slice(None))
    sequences = dataset.sequences(slice(None)).input_ids
    (acts_STD,) = forward(model, sequences, SITES[0])
    direct_ND = acts_STD[rows.sequence, rows.position].astype(np.float64)
    is_sink_N = rows.token_id == tiny_tokenizer().convert_tokens_to_ids(SINK)
    norm_N = np.linalg.norm(direct_ND, axis=1)
    assert 1 / 512 < is_sink_N.mean() < 1 / 128
    assert 0.5 * norm < np.median(norm_N[is_sink_N]) / np.median(norm_N) < 2 * norm
    stored_ND = dataset.read(SITES[0], slice(None))
    ordinary_ND = direct_ND[~is_sink_N]
    noise = ((stored_ND[~is_sink_N] - ordinary_ND) ** 2).sum()
    assert noise <= 1e-3 * ((ordinary_ND - ordinary_ND.mean(axis=0)) ** 2).sum()
    stats = dataset.stats(SITES[0])
    assert stats["fvu_core"] <= 1e-3
    assert stats["norm_percentiles"][99.9] > 10 * stats["norm_percentiles"][50]
    assert np.abs(stored_ND - direct_ND).max() <= 1.001 * stats["max_error"]


def test_a_site_with_a_loud_channel_is_harvested_and_reads_everywhere_alike(tmp_path):
    """By our reader, plain zarr and torch; verify and replay agree; extended, it keeps its channels."""
    path = save_tiny_lm(tmp_path / "tiny-gpt2", "gpt2", vocab_size=104)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.transformer.wte.weight[:, 7] *= 40
    model.save_pretrained(path)
    spec = tiny_spec(tmp_path, n_tokens=1000, sites=SITES[:1], precision="fvu:1e-4")
    actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    dataset = actcache.harvest(replace(spec, n_tokens=3000), str(tmp_path / "root"), progress=False)
    group = zarr.open_group(dataset.url, mode="r")["train"][SITES[0]]
    codes, scale, channel, offset = (group[name][:] for name in ("codes", "scale", "channel", "offset"))
    assert channel[7] == channel.max() > 1
    rows_ND = dataset.read(SITES[0], slice(None))
    names = {"codes": codes, "scale": scale, "channel": channel, "offset": offset}
    assert np.array_equal(eval(group.attrs["actcache"]["decode"], names), rows_ND)
    batch = next(iter(dataset.stream(batch_size=300, device="cpu")))
    where = {key: i for i, key in enumerate(_tokens(dataset.rows(slice(None))))}
    assert np.array_equal(batch[SITES[0]].numpy(), rows_ND[[where[key] for key in _tokens(batch)]])
    stats, fidelity = dataset.stats(SITES[0]), dataset.manifest.fidelity[SITES[0]]
    assert 3 * stats["fvu_core"] <= 3e-4 < stats["fvu_median_channel"]
    assert fidelity["fvu_median_channel"] == pytest.approx(stats["fvu_median_channel"], rel=1e-12)
    counts = verify(dataset, deep=True, replay=64, model=spec.model, progress=False)
    assert counts["rows beyond the stated error"] == 0


def _tokens(rows):
    return list(zip(rows.sequence.tolist(), rows.position.tolist(), strict=True))


@pytest.fixture
def created(monkeypatch):
    """Keys that the store was asked to create."""
    keys = []
    create = LocalStore.create

    def noting(self, key, data):
        keys.append(key)
        return create(self, key, data)

    monkeypatch.setattr(LocalStore, "create", noting)
    return keys


def test_extending_writes_no_rotation_or_offset_again(tmp_path, created):
    spec = tiny_spec(tmp_path, precision="rotated:1e-3", n_tokens=1000)
    root = str(tmp_path / "root")
    first = actcache.harvest(spec, root, progress=False)
    derived = [key for key in created if "/rotation/" in key or "/offset/" in key]
    assert len(derived) == len(set(derived)) == 3 * 2 * 2
    before = first.read(SITES[0], slice(None))
    created.clear()
    more = actcache.harvest(
        tiny_spec(tmp_path, precision="rotated:1e-3", n_tokens=2000), root, progress=False
    )
    assert more.n_rows > len(before)
    assert not [key for key in created if "rotation" in key or "/offset/" in key]
    assert np.abs(more.read(SITES[0], slice(len(before))) - before).max() < 1e-5
    verify(more, deep=True, progress=False)


@pytest.mark.parametrize("damage", ["flipped", "short", "missing", "calibration"])
def test_a_damaged_rotation_is_named_when_it_is_read(tmp_path, damage):
    spec = tiny_spec(tmp_path, precision="rotated:1e-3", n_tokens=1000)
    dataset = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    (path,) = (tmp_path / "root" / dataset.url.rsplit("/", 1)[1] / "_calibration").glob(
        f"{SITES[0]}*.rotation"
    )
    data = path.read_bytes()
    if damage == "calibration":
        path = path.with_name(f"{SITES[0]}.json")
        path.write_bytes(path.read_bytes().replace(b'"n_core":', b'"n_core":1'))
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-4] if damage == "short" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptObject, match=path.name):
        actcache.open(dataset.url).read(SITES[0], [0])
    with pytest.raises(CorruptObject, match=path.name):
        verify(dataset, progress=False)


def test_a_lossy_copy_of_the_rotation_is_seen_by_verify(tmp_path):
    spec = tiny_spec(tmp_path, precision="rotated:1e-3", n_tokens=1000)
    dataset = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    (tmp_path / "root" / dataset.url.rsplit("/", 1)[1] / "train" / SITES[0] / "rotation/c/0/0").unlink()
    with pytest.raises(CorruptObject, match=r"rotation/c/0/0 is missing"):
        verify(dataset, progress=False)


@pytest.fixture(scope="module")
def bundled_rows():
    """float32 [N, D] of the bundled LM at resid_post of blocks 1 and 5, over the standard library, shuffled."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:30]
    text = "".join(path.read_text(errors="ignore")[:4000] for path in paths)
    ids = load_tokenizer("bundled:stdlib-gpt2")(text)["input_ids"]
    input_ids_ST = np.array(ids[: len(ids) // 256 * 256]).reshape(-1, 256)
    model = load_lm("bundled:stdlib-gpt2").model
    shuffled = np.random.default_rng(0).permutation(input_ids_ST.size)
    sites = [f"blocks.{n}.hook_resid_post" for n in (1, 5)]
    acts = forward(model, input_ids_ST, *sites)
    return {site: a.reshape(-1, 192)[shuffled] for site, a in zip(sites, acts, strict=True)}


@pytest.mark.parametrize("block", [1, 5])
def test_rotated_codes_hold_fvu_1e_4_where_int8_is_refused(bundled_rows, block):
    acts_ND = bundled_rows[f"blocks.{block}.hook_resid_post"]
    half = len(acts_ND) // 2
    with pytest.raises(SpecError, match=r"rotated:0\.0001 or bf16"):
        calibrate(acts_ND[:half], Precision.parse("fvu:1e-4"))
    precision = Precision.parse("rotated:1e-4")
    calibration = calibrate(acts_ND[:half], precision)
    held_out_ND = acts_ND[half:]
    codes_ND, scale_N = encode(held_out_ND, calibration, precision)
    stored_ND = decode(codes_ND, scale_N, calibration, precision)
    summary = Statistics.of(held_out_ND, stored_ND, scale_N, calibration).summary()
    assert 0.8e-4 < summary["fvu_core"] <= 1e-4
    assert summary["rows_rescaled"] == 0
