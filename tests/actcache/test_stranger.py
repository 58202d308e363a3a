"""The reader of `stranger.py`, written from docs/format.md alone, agrees bit for bit with ours.

When a test fails, either the code or the page is wrong. Shapes: N rows, D = d_in, S sequences, T = context_size.
"""

import base64
import hashlib
import json
import math
import re
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from stranger import (
    KEYS,
    SPLITS,
    default_window,
    digest,
    newest_manifest,
    permutation,
    read_all,
    read_chunk,
    reading_order,
    section,
    token_rows,
)
from tiny_harvest import tiny_spec

import actcache


@pytest.mark.parametrize("split", SPLITS)
def test_plain_zarr_and_one_line_read_what_our_reader_reads(tiny, directory, split):
    dataset = tiny[0].split(split)
    for site in dataset.sites:
        acts_ND = read_all(directory, split, site)
        assert acts_ND.dtype == np.float32
        assert len(acts_ND) == dataset.n_rows > 0
        assert np.array_equal(acts_ND, dataset.read(site, slice(None)))


def test_every_precision_reads_by_its_recorded_line(lossless):
    for split in lossless.splits:
        for site in lossless.sites:
            ours = lossless.split(split).read(site, slice(None))
            assert np.array_equal(read_all(Path(lossless.url), split, site), ours)


def test_rotated_rows_read_by_their_recorded_line_up_to_the_rounding_of_the_page(rotated):
    for split in rotated.splits:
        for site in rotated.sites:
            group = zarr.open_group(rotated.url, mode="r")[f"{split}/{site}"]
            theirs_ND = read_all(Path(rotated.url), split, site)
            assert theirs_ND.dtype == np.float32
            ours_ND = rotated.split(split).read(site, slice(None))
            norm_N = np.linalg.norm(ours_ND - group["offset"][:], axis=1)
            d = ours_ND.shape[1]
            bound_ND = d * 2.0**-22 * norm_N[:, None] + 2.0**-23 * np.abs(ours_ND)
            assert (np.abs(theirs_ND - ours_ND) <= bound_ND).all()
            batch = next(iter(rotated.split(split).stream(site, batch_size=500)))
            position = {key: i for i, key in enumerate(token_keys(rotated.split(split).rows(slice(None))))}
            rows = [position[key] for key in token_keys(batch)]
            assert (np.abs(batch[site] - ours_ND[rows]) <= bound_ND[rows]).all()


def token_keys(rows):
    return list(zip(rows.sequence.tolist(), rows.position.tolist(), strict=True))


def test_the_rotation_is_that_of_the_calibration_orthonormal_and_by_falling_variance(rotated):
    directory = Path(rotated.url)
    manifest = newest_manifest(directory)
    fvu = float(manifest["identity"]["precision"].removeprefix("rotated:"))
    for site, extent in manifest["sites"].items():
        data = (directory / "_calibration" / f"{site}.json").read_bytes()
        assert hashlib.sha256(data).hexdigest() == extent["calibration_sha256"]
        calibration = json.loads(data)
        assert calibration.pop("digest") == digest(calibration)
        sha256 = calibration["rotation_sha256"]
        stored = (directory / "_calibration" / f"{site}-{sha256[:16]}.rotation").read_bytes()
        assert hashlib.sha256(stored).hexdigest() == sha256
        d = extent["d_in"]
        rotation_DD = np.frombuffer(stored, "<f4").reshape(d, d)
        assert np.abs(rotation_DD.astype(np.float64) @ rotation_DD.T - np.eye(d)).max() <= 2.0**-22 * d
        largest_D = np.take_along_axis(rotation_DD, np.abs(rotation_DD).argmax(axis=1)[:, None], axis=1)
        assert (largest_D > 0).all()
        k = 128 * math.log2(
            calibration["step"] / math.sqrt(12 * 0.95 * fvu * calibration["core_variance"] / d)
        )
        assert k == pytest.approx(round(k), abs=1e-4)
        assert k >= -128
        group = zarr.open_group(str(directory), mode="r")[f"train/{site}"]
        assert np.array_equal(group["rotation"][:], rotation_DD)
        codes_ND = group["codes"][:].astype(int)
        assert codes_ND.max() < 65535
        signed_ND = np.where(codes_ND % 2, -(codes_ND + 1) // 2, codes_ND // 2)
        variance_D = signed_ND.var(axis=0)
        assert (np.diff(variance_D[: d // 4]) < 0.25 * variance_D[: d // 4 - 1]).all()
        power = np.log2(group["scale"][:] / calibration["step"])
        assert ((power >= 0) & (power == np.round(power))).all()
        for segment in manifest["segments"]:
            for row in pq.read_table(directory / segment["statistics"]["key"]).to_pylist():
                if row["site"] == site and row["split"] == "train":
                    assert row["core_sse"] <= fvu * np.frombuffer(row["core_m2_D"], "<f8").sum()


def token_streams(spec, identity):
    """Token store, steps 1-3: the token ids of each split, from the corpus's files."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    rule = identity["corpus"]["split_rule"]
    streams = {split: [] for split in SPLITS}
    for path in sorted(Path(spec.corpus.source).parent.glob("*.txt")):
        text = path.read_text()
        u = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        v = rule["validation_share"]
        split = "validation" if u < v else "test" if u < v + rule["test_share"] else "train"
        streams[split] += [*tokenizer(text, add_special_tokens=False)["input_ids"], identity["eos_token_id"]]
    return streams


def test_the_token_store_follows_from_the_text(tiny, directory):
    dataset, spec, _ = tiny
    (store,) = (directory.parent / "tokens").iterdir()
    identity = newest_manifest(store)["identity"]
    assert identity == dataset.manifest.identity["tokens"]
    t, bos = identity["context_size"], identity["bos_token_id"]
    for split, stream in token_streams(spec, identity).items():
        group = zarr.open_group(str(store), mode="r")[split]
        input_ids_ST, length_S, row_start = (group[k][:] for k in ("input_ids", "length", "row_start"))
        perm = permutation(len(length_S), KEYS["sequences"].format(seed=identity["seed"], split=split))
        packed_ST = np.empty_like(input_ids_ST)
        packed_ST[perm] = input_ids_ST
        runs = [[bos, *stream[i : i + t - 1]] for i in range(0, len(stream), t - 1)]
        padded = [run + [identity["eos_token_id"]] * (t - len(run)) for run in runs]
        assert np.array_equal(packed_ST, padded)
        assert np.array_equal(length_S, np.array([len(run) for run in runs])[perm])
        kept_ST = (np.arange(t) < length_S[:, None]) & ~np.isin(input_ids_ST, identity["special_token_ids"])
        assert np.array_equal(row_start, [0, *np.cumsum(kept_ST.sum(axis=1))])
        copied = zarr.open_group(str(directory), mode="r")[split]["input_ids"][:]
        assert np.array_equal(copied, input_ids_ST[: len(copied)])


def document_of(group, s, p, identity):
    """Token store, Documents: number and own token of position p of sequence s."""
    begins = group["document_begins"][s][: p + 1]
    b = int(identity["bos_token_id"] is not None)
    if not begins.sum():
        return int(group["document"][s]), int(group["document_offset"][s]) + p - b
    q = int(np.flatnonzero(begins)[-1])
    return int(group["document"][s] + begins.sum()), p - q - b * (identity["packing"] == "isolated")


@pytest.mark.parametrize("packing", ["concat", "isolated", "single"])
def test_a_row_is_led_back_to_its_file_and_token_by_the_page(tmp_path, packing):
    from transformers import AutoTokenizer

    spec = tiny_spec(tmp_path, packing=packing, context_size=12, n_tokens=1, test_blocks=0)
    dataset = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    (store,) = (tmp_path / "root" / "tokens").iterdir()
    manifest = newest_manifest(store)
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    for split in dataset.splits:
        ours = dataset.split(split).documents(slice(None))
        group = zarr.open_group(dataset.url, mode="r")[split]
        stored = zarr.open_group(str(store), mode="r")[split]
        for row in range(0, len(ours.document), 97):
            s, p = int(group["sequence"][row]), int(group["position"][row])
            d, o = document_of(group, s, p, manifest["identity"])
            assert (d, o) == (ours.document[row], ours.offset[row])
            file = manifest["files"][stored["document_file"][d]]
            ids = tokenizer((tmp_path / "corpus" / file).read_text(), add_special_tokens=False)["input_ids"]
            assert ids[o] == group["token_id"][row]
            assert stored["document_record"][d] == 0
            n_own = len(ids) + (packing == "concat")
            assert stored["document_start"][d + 1] - stored["document_start"][d] == n_own


@pytest.mark.parametrize("split", SPLITS)
def test_which_token_a_row_is_follows_from_the_tokens_alone(tiny, directory, split):
    token_id, sequence, position = token_rows(directory, split)
    group = zarr.open_group(str(directory), mode="r")[split]
    for name, expected in (("token_id", token_id), ("sequence", sequence), ("position", position)):
        assert np.array_equal(group[name][:], expected), name
    ours = tiny[0].split(split).rows(slice(None))
    assert np.array_equal(ours.token_id, token_id)
    assert np.array_equal(ours.sequence, sequence)
    assert np.array_equal(ours.position, position)


@pytest.mark.parametrize(
    ("split", "lanes", "window", "world_size"),
    [("train", 64, None, 3), ("train", 2, 3, 1), ("validation", 8, None, 4), ("test", 64, 1, 5)],
)
def test_a_stream_serves_the_reading_order_of_the_page(tiny, directory, split, lanes, window, world_size):
    batch_size, seed, epochs = 700, 5, 2
    dataset = tiny[0].split(split)
    site = dataset.sites[0]
    acts_ND = read_all(directory, split, site)
    token_id, sequence, position = token_rows(directory, split)
    identity = newest_manifest(directory)["identity"]
    w = window or default_window(batch_size, lanes, identity)
    for rank in range(world_size):
        stream = dataset.stream(
            site, batch_size=batch_size, seed=seed, epochs=epochs, rank=rank, world_size=world_size,
            lanes=lanes, window=window,
        )  # fmt: skip
        batches = iter(stream)
        for epoch in range(epochs):
            order = reading_order(len(acts_ND), identity["chunk_rows"], seed, epoch, lanes, w)
            assert np.array_equal(np.sort(order), np.arange(len(acts_ND)))
            for begin in range(0, len(order), batch_size):
                g = np.arange(begin, min(begin + batch_size, len(order)))
                mine, batch = g[g % lanes % world_size == rank], next(batches)
                rows = order[mine]
                assert np.array_equal(batch.place, mine - begin)
                assert np.array_equal(batch[site], acts_ND[rows])
                assert np.array_equal(batch.token_id, token_id[rows])
                assert np.array_equal(batch.sequence, sequence[rows])
                assert np.array_equal(batch.position, position[rows])
        assert next(batches, None) is None


def test_a_chunk_is_one_ranged_read_by_the_segment_and_ends_in_its_checksum(directory):
    manifest = newest_manifest(directory)
    chunk_rows, block_rows = manifest["identity"]["chunk_rows"], manifest["identity"]["block_rows"]
    read = 0
    for segment in manifest["segments"]:
        entries = []
        for part in segment["objects"]:
            assert hashlib.sha256((directory / part["key"]).read_bytes()).hexdigest() == part["sha256"]
            found = pq.read_table(directory / part["key"]).to_pylist()
            assert all(part["first"] <= entry["path"] <= part["last"] for entry in found)
            entries += found
        for entry in entries:
            array = zarr.open_array(str(directory / entry["path"]), mode="r")
            data = (directory / entry["path"] / "c" / str(entry["shard"])).joinpath(*"0" * (array.ndim - 1))
            assert data.stat().st_size == entry["size_bytes"]
            if entry["constant"] is not None:
                assert entry["chunk_offset"] == entry["chunk_nbytes"] == entry["chunk_crc32c"] == []
                begin = entry["shard"] * block_rows
                assert (array[begin : begin + block_rows] == np.float32(entry["constant"])).all()
                read += 1
                continue
            for at, size, checksum in zip(
                entry["chunk_offset"], entry["chunk_nbytes"], entry["chunk_crc32c"], strict=True
            ):
                payload = data.read_bytes()[at : at + size]
                assert (google_crc32c.value(payload[:-4]) if size else 0) == checksum
                assert int.from_bytes(payload[-4:], "little") == checksum
            if not entry["path"].endswith(("/codes", "/scale")):
                continue
            inner = entry["shard"] % len(entry["chunk_nbytes"])
            shape = (chunk_rows, *array.shape[1:])
            chunk = read_chunk(
                directory, entry["path"], entry["shard"], array.ndim, entry, inner, shape, array.dtype
            )
            begin = entry["shard"] * block_rows + inner * chunk_rows
            assert np.array_equal(chunk, array[begin : begin + chunk_rows])
            read += 1
    assert read == 2 * 2 * (3 + 1 + 1)  # sites, arrays, blocks of the three splits


def test_recorded_statistics_are_those_of_the_stored_values(directory):
    manifest = newest_manifest(directory)
    block_rows = manifest["identity"]["block_rows"]
    for segment in manifest["segments"]:
        for row in pq.read_table(directory / segment["statistics"]["key"]).to_pylist():
            acts_ND = read_all(directory, row["split"], row["site"])
            n = row["n_blocks"] * block_rows
            acts_ND = acts_ND[row["block"] * block_rows :][:n].astype(np.float64)
            spread_D = np.abs(acts_ND).max(axis=0)
            mean_D, m2_D = (np.frombuffer(row[k], "<f8") for k in ("mean_D", "m2_D"))
            assert row["n_rows"] == len(acts_ND)
            assert (np.abs(mean_D - acts_ND.mean(axis=0)) <= 1e-6 * spread_D).all()
            exact_D = ((acts_ND - acts_ND.mean(axis=0)) ** 2).sum(axis=0)
            assert (np.abs(m2_D - exact_D) <= 1e-6 * exact_D).all()
            assert row["max_abs"] == spread_D.max()
            norms_N = np.linalg.norm(acts_ND, axis=1)
            assert row["norm_sum"] == pytest.approx(norms_N.sum(), rel=acts_ND.shape[1] * 2.0**-24)
            bins_K, counts_K = (np.frombuffer(row[k], "<i8") for k in ("norm_bins_K", "norm_counts_K"))
            bins_N = np.sort(np.floor(32 * np.log2(norms_N)))
            assert (np.abs(np.repeat(bins_K, counts_K) - bins_N) <= 1).all()
            assert (np.repeat(bins_K, counts_K) == bins_N).mean() > 0.99  # not at an edge
            middle = 2 ** ((bins_K[np.searchsorted(np.cumsum(counts_K), len(norms_N) / 2)] + 0.5) / 32)
            median = np.percentile(norms_N, 50, method="inverted_cdf")
            assert middle == pytest.approx(median, rel=0.0111)


def test_core_rows_keep_the_stated_noise_by_the_formulas_of_the_page(directory):
    manifest = newest_manifest(directory)
    fvu = float(manifest["identity"]["precision"].removeprefix("fvu:"))
    for site, extent in manifest["sites"].items():
        data = (directory / "_calibration" / f"{site}.json").read_bytes()
        assert hashlib.sha256(data).hexdigest() == extent["calibration_sha256"]
        calibration = json.loads(data)
        widest = math.sqrt(12 * 0.95 * fvu * calibration["core_variance"] / extent["d_in"])
        shares = re.search(r"w times ([\d., ]+)\.", " ".join(section("Calibration").split()))[1].split(", ")
        channel_D = np.frombuffer(base64.b64decode(calibration["channel"]), "<f4")
        power_D = np.log2(channel_D)
        assert ((power_D >= 0) & (power_D == np.round(power_D))).all()
        widest /= math.sqrt(np.mean(np.square(channel_D, dtype=np.float64)))
        assert calibration["step"] in [float(np.float32(widest * float(share))) for share in shares]
        offset_D = np.frombuffer(base64.b64decode(calibration["offset"]), "<f4")
        group = zarr.open_group(str(directory), mode="r")[f"train/{site}"]
        assert np.array_equal(group["offset"][:], offset_D)
        assert np.array_equal(group["channel"][:], channel_D)
        power = np.log2(group["scale"][:] / calibration["step"])
        assert ((power >= 0) & (power == np.round(power))).all()
        assert np.abs(group["codes"][:].astype(int)).max() <= 127
        for segment in manifest["segments"]:
            for row in pq.read_table(directory / segment["statistics"]["key"]).to_pylist():
                if row["site"] == site:
                    assert row["core_sse"] <= fvu * np.frombuffer(row["core_m2_D"], "<f8").sum()
