"""A reader written from docs/format.md alone agrees bit for bit with ours, and the page with the data.

The functions of the first half import nothing of actcache: they are what a stranger would write.
The second half also holds the page to a real dataset, so that no key, field, array or worked
number on it can go stale.
Shapes: N rows, D = d_in, S sequences, T = context_size.
"""

import ast
import base64
import hashlib
import json
import math
import re
import struct
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from numcodecs import zstd
from tiny_harvest import tiny_spec
from tiny_models import shared_model, tiny_model

import actcache
from actcache import families
from actcache.order import permutation as our_permutation

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "format.md").read_text()
SPLITS = ("train", "validation", "test")
# Permutations, the table of keys: `rows/<seed>/<split>/<block>` becomes KEYS["rows"].format(seed=0, ...)
KEYS = {
    key.split("/")[0]: re.sub(r"<(\w+)>", r"{\1}", key)
    for key in re.findall(r"^\| `(\w+/<seed>.*?)` \|", PAGE, re.M)
}

# The stranger's reader: section names of docs/format.md in the docstrings.


def canonical(value):
    """Identity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value):
    """Identity."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def outputs(n, start):
    """Permutations, step 2, in Python's own integers."""
    mask, out = 2**64 - 1, []
    for k in range(n):
        z = (start + (k + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


def permutation(n, key):
    """Permutations."""
    out = outputs(n, int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
    return np.array(sorted(range(n), key=out.__getitem__), np.int64)


def newest_manifest(directory):
    """Manifest."""
    manifest = json.loads(max((directory / "_manifest").iterdir()).read_text())
    stated = manifest.pop("digest")
    assert manifest["format"] == 1
    assert stated == digest(manifest)
    assert manifest["id"] == digest(manifest["identity"])
    return manifest


# Precision: the recorded line, typed by hand (nothing that is stored is executed)
DECODE = {
    "codes * scale[:, None] + offset": lambda codes, scale, offset, _: codes * scale[:, None] + offset,
    "(((codes >> 1).astype('<i2') ^ -(codes & 1).astype('<i2')) * scale[:, None]) @ rotation + offset": (
        lambda codes, scale, offset, rotation: (
            (((codes >> 1).astype("<i2") ^ -(codes & 1).astype("<i2")) * scale[:, None]) @ rotation + offset
        )
    ),
    "(codes.astype('<u4') << 16).view('<f4')": lambda codes, *_: (codes.astype("<u4") << 16).view("<f4"),
    "codes.astype('<f4')": lambda codes, *_: codes.astype("<f4"),
    "codes": lambda codes, *_: codes,
}


def read_all(directory, split, site):
    """Every row of a site, by plain zarr and the recorded line."""
    group = zarr.open_group(str(directory), mode="r")[f"{split}/{site}"]
    rest = [group[name][:] if name in group else None for name in ("scale", "offset", "rotation")]
    return DECODE[group.attrs["actcache"]["decode"]](group["codes"][:], *rest)


def token_rows(directory, split):
    """Blocks: token_id, sequence and position of every row, from the tokens and the identity alone."""
    manifest = newest_manifest(directory)
    identity, size = manifest["identity"], manifest["splits"][split]
    group = zarr.open_group(str(directory), mode="r")[split]
    input_ids_ST, length_S = group["input_ids"][:], group["length"][:]
    assert len(input_ids_ST) == size["n_sequences"]
    special = identity["tokens"]["special_token_ids"]
    kept = [
        (int(input_ids_ST[s, t]), s, t)
        for s in range(len(input_ids_ST))
        for t in range(length_S[s])
        if input_ids_ST[s, t] not in special
    ]
    kept_N3 = np.array(kept, np.int64).reshape(-1, 3)
    block_rows, parts = identity["block_rows"], []
    for block in range(size["n_blocks"]):
        begin = block * block_rows
        n = min(block_rows, size["n_rows"] - begin)
        parts.append(
            kept_N3[
                begin + permutation(n, KEYS["rows"].format(seed=identity["seed"], split=split, block=block))
            ]
        )
    return np.concatenate(parts).T


def reading_order(n_rows, chunk_rows, seed, epoch, lanes, window):
    """Reading order: the stored row of every global row."""
    chunks = [range(i, min(i + chunk_rows, n_rows)) for i in range(0, n_rows, chunk_rows)]
    placed = [chunks[i] for i in permutation(len(chunks), KEYS["chunks"].format(seed=seed, epoch=epoch))]
    chunk_of = np.repeat(range(len(placed)), [len(c) for c in placed])
    row_of = np.concatenate(placed)
    order, begin = np.full(n_rows, -1), 0
    for lane in range(lanes):
        end = begin + max(0, math.ceil((n_rows - lane) / lanes))
        assert begin == lane * (n_rows // lanes) + min(lane, n_rows % lanes)
        # pieces: runs of one chunk; windows: runs of `window` pieces
        piece = chunk_of[begin:end] - chunk_of[begin] if begin < end else np.zeros(0, int)
        served = []
        for w in range(math.ceil((piece.max(initial=-1) + 1) / window)):
            rows = row_of[begin:end][piece // window == w]
            key = KEYS["window"].format(seed=seed, epoch=epoch, lane=lane, window=w)
            served.append(rows[permutation(len(rows), key)])
        if served:
            order[lane::lanes] = np.concatenate(served)
        begin = end
    return order


def default_window(batch_size, lanes, identity):
    """Reading order, the defaults."""
    sequence_rows = batch_size * identity["tokens"]["context_size"]
    return max(2, math.ceil(4 * sequence_rows / (lanes * identity["block_rows"])))


def read_chunk(directory, path, shard, ndim, entry, inner, shape, dtype):
    """Shards: one chunk by its place in a segment's row, without zarr."""
    key = directory / path / "c" / str(shard) / "/".join("0" * (ndim - 1))
    with open(key, "rb") as file:
        file.seek(entry["chunk_offset"][inner])
        payload = file.read(entry["chunk_nbytes"][inner])
    frame, checksum = payload[:-4], struct.unpack("<I", payload[-4:])[0]
    assert google_crc32c.value(frame) == checksum
    return np.frombuffer(zstd.decompress(frame), dtype).reshape(shape)


# The claims


@pytest.fixture(scope="module")
def directory(tiny):
    return Path(tiny[0].url)


@pytest.fixture(scope="module", params=["bf16", "fp16", "fp32"])
def lossless(request, tmp_path_factory):
    spec = tiny_spec(
        tmp_path_factory.mktemp(request.param), n_tokens=1500, test_blocks=0, precision=request.param
    )
    return actcache.harvest(spec, str(tmp_path_factory.mktemp("root")), progress=False)


@pytest.fixture(scope="module")
def rotated(tmp_path_factory):
    spec = tiny_spec(
        tmp_path_factory.mktemp("rotated"), n_tokens=1500, test_blocks=0, precision="rotated:1e-3"
    )
    return actcache.harvest(spec, str(tmp_path_factory.mktemp("root")), progress=False)


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
            for row in pq.read_table(directory / segment["statistics"]).to_pylist():
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
    [("train", 64, None, 2), ("train", 2, 3, 1), ("validation", 8, None, 4), ("test", 64, 1, 1)],
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
                rows, batch = order[g[g % world_size == rank]], next(batches)
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
        assert (
            hashlib.sha256((directory / segment["objects"]).read_bytes()).hexdigest()
            == (segment["objects_sha256"])
        )
        for entry in pq.read_table(directory / segment["objects"]).to_pylist():
            array = zarr.open_array(str(directory / entry["path"]), mode="r")
            data = (directory / entry["path"] / "c" / str(entry["shard"])).joinpath(*"0" * (array.ndim - 1))
            assert data.stat().st_size == entry["size_bytes"]
            for at, size, checksum in zip(
                entry["chunk_offset"], entry["chunk_nbytes"], entry["chunk_crc32c"], strict=True
            ):
                payload = data.read_bytes()[at : at + size]
                assert (google_crc32c.value(payload[:-4]) if size else 0) == checksum
                assert int.from_bytes(payload[-4:], "little") == checksum
            if not entry["path"].endswith(("/codes", "/scale")):
                continue
            inner = entry["block"] % len(entry["chunk_nbytes"])
            shape = (chunk_rows, *array.shape[1:])
            chunk = read_chunk(
                directory, entry["path"], entry["shard"], array.ndim, entry, inner, shape, array.dtype
            )
            begin = entry["shard"] * block_rows + inner * chunk_rows
            assert np.array_equal(chunk, array[begin : begin + chunk_rows])
            assert entry["constant"] is None or (chunk == entry["constant"]).all()
            read += 1
    assert read == 2 * 2 * (3 + 1 + 1)  # sites, arrays, blocks of the three splits


def test_recorded_statistics_are_those_of_the_stored_values(directory):
    manifest = newest_manifest(directory)
    block_rows = manifest["identity"]["block_rows"]
    for segment in manifest["segments"]:
        for row in pq.read_table(directory / segment["statistics"]).to_pylist():
            acts_ND = read_all(directory, row["split"], row["site"])
            acts_ND = acts_ND[row["block"] * block_rows :][:block_rows].astype(np.float64)
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
        shares = re.search(r"w times ([\d., ]+)", " ".join(section("Calibration").split()))[1].split(", ")
        assert calibration["step"] in [float(np.float32(widest * float(share))) for share in shares]
        offset_D = np.frombuffer(base64.b64decode(calibration["offset"]), "<f4")
        group = zarr.open_group(str(directory), mode="r")[f"train/{site}"]
        assert np.array_equal(group["offset"][:], offset_D)
        power = np.log2(group["scale"][:] / calibration["step"])
        assert ((power >= 0) & (power == np.round(power))).all()
        assert np.abs(group["codes"][:].astype(int)).max() <= 127
        for segment in manifest["segments"]:
            for row in pq.read_table(directory / segment["statistics"]).to_pylist():
                if row["site"] == site:
                    assert row["core_sse"] <= fvu * np.frombuffer(row["core_m2_D"], "<f8").sum()


# The page against a real dataset


def section(title, page=PAGE):
    """The text of one section of the page."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    assert found, f"the page has no section {title!r}"
    return found[1]


def tables(title, page=PAGE):
    """The section's tables by their first header cell: lists of rows, each a list of cells, header first."""
    blocks = re.findall(r"(?:^\|.*\n)+", section(title, page), re.M)
    rows = [[re.split(r" *(?<!\\)\| *", line.strip("| ")) for line in b.strip().split("\n")] for b in blocks]
    return {table[0][0]: [table[0], *table[2:]] for table in rows}


def first_column(title, header):
    return {row[0].strip("`") for row in tables(title)[header][1:]}


def flat(value, prefix=""):
    """Dotted paths of a JSON value's leaves; items of a list of objects as `[]`."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {path for item in value for path in flat(item, f"{prefix}[]")}
    if isinstance(value, dict) and value:
        return {p for k, v in value.items() for p in flat(v, f"{prefix}.{k}" if prefix else k)}
    return {prefix}


def anonymous(paths, names):
    """Paths with a dataset's own names put as the page puts them: `<site>`, `<split>`, ..."""
    out = set()
    for path in paths:
        for pattern, written in names.items():
            path = re.sub(pattern, written, path)
        out.add(path)
    return out


def test_every_field_of_a_manifest_and_its_identity_is_on_the_page_and_no_other(directory):
    manifest = json.loads(next((directory / "_manifest").iterdir()).read_text())
    identity = manifest.pop("identity")
    sites = "|".join(map(re.escape, manifest["sites"]))
    names = {
        rf"^(sites|fidelity)\.(?:{sites})": r"\1.<site>",
        rf"^wanted\.(?:{sites})\.\w+": "wanted.<site>.<split>",
        r"^splits\.\w+": "splits.<split>",
        r"n_blocks\.\w+": "n_blocks.<split>",
        r"versions\.\w+": "versions.<package>",
    }
    assert anonymous(flat(manifest), names) | {"identity"} == first_column("Manifest", "field")
    assert flat(identity) == first_column("Identity", "field")
    assert json.loads((directory / "_identity.json").read_text()) == identity
    assert (directory / "_identity.json").read_text() == canonical(identity)
    assert directory.name.endswith(f"-{digest(identity)[:12]}")


def test_every_field_of_records_calibrations_and_statistics_is_on_the_page_and_no_other(directory):
    records = [json.loads(path.read_text()) for path in sorted((directory / "_records").rglob("*.json"))]
    statistics = {field for r in records for s in r["statistics"].values() for field in s}
    assert statistics == first_column("Statistics", "field")
    assert {"statistics.<site>.<field>"} | {
        path for r in records for path in flat({k: v for k, v in r.items() if k != "statistics"})
    } == first_column("Records", "field")
    for path in (directory / "_calibration").glob("*.json"):
        assert flat(json.loads(path.read_text())) == first_column("Calibration", "field")
    for path in (directory / "_records").rglob("*.json"):
        sites = sorted(json.loads(path.read_text())["statistics"])
        assert path.stem.endswith(f"-{digest(sites)[:12]}")


def test_segments_have_the_columns_of_the_page(directory):
    manifest = newest_manifest(directory)
    for kind in ("objects", "statistics"):
        schema = pq.read_schema(directory / manifest["segments"][0][kind])
        written = {row[0].strip("`"): row[1] for row in tables("Segments")[f"column of {kind}"][1:]}
        found = {f.name: re.sub(r"list<\w+: (\w+)>", r"list<\1>", str(f.type)) for f in schema}
        if kind == "statistics":
            types = {"integer": "int64", "float": "double", "float64 [D]": "binary", "int64 [K]": "binary"}
            rows = tables("Statistics")["field"][1:]
            written |= {row[0].strip("`"): types[row[1]] for row in rows}
        assert list(found.items()) == list(written.items())


def key_patterns(title, header):
    holes = {
        "split": "(?:train|validation|test)", "site": r"blocks[^/]+", "shard": r"\d+", "block": r"\d{8}",
        "version": r"\d{8}", "hex12": "[0-9a-f]{12}", "hex16": "[0-9a-f]{16}", "array": r"(?!blocks)[a-z_]+",
    }  # fmt: skip
    rows = [row[0].strip("`") for row in tables(title)[header][1:]]
    return {
        row: re.compile(re.sub(r"<(\w+)>", lambda m: holes[m[1]], row.replace(".", r"\."))) for row in rows
    }


@pytest.mark.parametrize("precision", ["fvu", "rotated"])
def test_every_key_of_a_dataset_and_its_tokens_is_in_the_layout_and_no_other(directory, rotated, precision):
    if precision == "rotated":
        directory = Path(rotated.url)
    elsewhere = [row[0].strip("`") for row in tables("Layout")["key"][1:] if "`rotated` only" in row[1]]
    elsewhere = [key for key in elsewhere if "rotat" in key and precision != "rotated"]
    (tokens,) = (directory.parent / "tokens").iterdir()
    for root, patterns in (
        (directory, key_patterns("Layout", "key")),
        (tokens, key_patterns("Token store", "key in the token store")),
    ):
        keys = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        matched = {key: [row for row, p in patterns.items() if p.fullmatch(key)] for key in keys}
        assert [key for key, rows in matched.items() if len(rows) != 1] == []
        assert {row for rows in matched.values() for row in rows} == set(patterns) - set(elsewhere)
    manifest = json.loads((tokens / "_manifest" / "00000001.json").read_text())
    assert manifest["digest"] == digest({k: v for k, v in manifest.items() if k != "digest"})
    assert tokens.name.endswith(f"-{digest(manifest.pop('identity'))[:12]}")
    names = {r"^splits\.\w+": "splits.<split>", r"^arrays\.[^.]+": "arrays.<path>"}
    assert anonymous(flat(manifest), names) | {"identity"} == first_column(
        "Token store", "field of its manifest"
    )


def arrays_match_the_page(dataset):
    """Shape, dtype, fill value, shard and chunk rows of every array against the tables Arrays and Precision."""
    directory = Path(dataset.url)
    manifest = newest_manifest(directory)
    identity = manifest["identity"]
    kind = identity["precision"].split(":")[0]
    precision = next(r for r in tables("Precision")["`precision`"][1:] if r[0].strip("`").startswith(kind))
    t, r, c = identity["tokens"]["context_size"], identity["block_rows"], identity["chunk_rows"]
    p = 64 * max(1, r // (64 * t))
    seen = 0
    for split, size in manifest["splits"].items():
        for name, shape, dtype, fill, shard_rows, chunk_rows in tables("Arrays")["array"][1:]:
            for site in dataset.sites if "<site>" in name else [""]:
                path = directory / split / name.strip("`").replace("<site>", site)
                quantised = ("scale", "offset") if kind not in ("fvu", "rotated") else ()
                if path.name in (*quantised, "rotation" if kind != "rotated" else ""):
                    assert not path.exists()
                    continue
                d = manifest["sites"][site]["d_in"] if site else 0
                sizes = {
                    "N": size["n_rows"], "S": size["n_sequences"], "T": t, "D": d, "R": r, "C": c, "P": p, "64": 64,
                }  # fmt: skip
                expected_dtype = {"token": "uint16", "see Precision": precision[1]}.get(dtype, dtype)
                expected_fill = precision[2].strip("`") if fill == "see Precision" else fill
                array = json.loads((path / "zarr.json").read_text())
                (sharding,) = array["codecs"]
                assert array["shape"] == [sizes[x] for x in shape.split(", ")]
                assert array["data_type"] == expected_dtype
                assert str(array["fill_value"]) == expected_fill
                grid = array["chunk_grid"]["configuration"]["chunk_shape"]
                assert grid == [sizes[shard_rows], *array["shape"][1:]]
                assert sharding["configuration"]["chunk_shape"] == [sizes[chunk_rows], *array["shape"][1:]]
                assert sharding["configuration"]["index_location"] == "end"
                columns = kind == "rotated" and path.name == "codes"
                names = ["transpose", "bytes", "blosc", "crc32c"] if columns else ["bytes", "zstd", "crc32c"]
                assert [x["name"] for x in sharding["configuration"]["codecs"]] == names
                seen += 1
    assert precision[3].strip("`") in DECODE
    return seen


def test_arrays_are_as_the_tables_of_the_page_say(tiny):
    assert arrays_match_the_page(tiny[0]) == 3 * (8 + 2 * 3)


def test_arrays_of_lossless_precisions_are_as_the_tables_of_the_page_say(lossless):
    assert arrays_match_the_page(lossless) == 3 * (8 + 2)


def test_arrays_of_rotated_rows_are_as_the_tables_of_the_page_say(rotated):
    assert arrays_match_the_page(rotated) == 3 * (8 + 2 * 4)


def test_the_attributes_are_those_of_the_page(directory):
    root = zarr.open_group(str(directory), mode="r")
    manifest = newest_manifest(directory)
    assert root.attrs["actcache"] == {"format": 1, "id": manifest["id"], "identity": manifest["identity"]}
    site = root[f"train/{next(iter(manifest['sites']))}"].attrs["actcache"]
    assert set(site) == {"site", "precision", "decode"}
    assert site["decode"] in section("Precision")


def test_a_stream_state_has_the_fields_of_the_page_and_resumes_by_epoch_and_row(tiny):
    stream = tiny[0].stream(batch_size=700)
    batches = iter(stream)
    next(batches)
    state = json.loads(json.dumps(stream.state()))
    assert set(state) == first_column("Reading order", "field of the state")
    assert (state["epoch"], state["row"]) == (0, 700)
    site = tiny[0].sites[0]
    other = next(iter(tiny[0].stream([site], batch_size=350, window=state["window"], state=state)))
    assert np.array_equal(other[site], next(batches)[site][:350])


def test_the_worked_permutation_of_the_page_is_right():
    text = section("Permutations")
    n, key = re.search(r"Worked example, `permutation\((\d+), \"(.+?)\"\)`", text).groups()
    cells = {row[0]: row[1] for row in tables("Permutations")[""][1:]}
    first = hashlib.sha256(key.encode()).digest()[:8]
    assert cells["first 8 bytes of sha256"] == f"`{first.hex()}`"
    start = int(cells["start"].strip("`"), 16)
    assert start == int.from_bytes(first, "little")
    assert [int(x.strip("` "), 16) for x in cells["out[0], out[1]"].split(",")] == outputs(2, start)
    perm = ast.literal_eval(cells["perm"].strip("`"))
    assert perm == permutation(int(n), key).tolist()
    assert perm == our_permutation(int(n), *key.split("/")).tolist()


def test_the_worked_reading_order_of_the_page_is_right():
    text = " ".join(section("Reading order").split("Worked example, ")[1].split("The state")[0].split())
    numbers = dict(re.findall(r"\b(N|C|L|W) = (\d+)", text))
    n, c, lanes, w = (int(numbers[k]) for k in "NCLW")
    chunks, served = (ast.literal_eval(x) for x in re.findall(r"`(\[.*?\])`", text))
    assert chunks == permutation(math.ceil(n / c), "chunks/0/0").tolist()
    assert served == reading_order(n, c, 0, 0, lanes, w).tolist()
    windows = re.findall(r"(\d+)-(\d+)", text)  # as sets of rows, in the page's order
    rows = [set(range(int(a), int(b) + 1)) for a, b in windows]
    assert set(served[0::lanes]) == set.union(*rows[:3])
    assert set(served[1::lanes]) == set.union(*rows[3:])


def test_the_worked_digest_of_the_page_is_right():
    value, hexdigest = re.search(r"digest of\s+`(\{.+?\})` is `([0-9a-f]{64})`", section("Identity")).groups()
    assert canonical(json.loads(value)) == value
    assert digest(json.loads(value)) == hexdigest


def test_the_first_snippet_of_the_page_runs(tiny, directory):
    snippet = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
    names = {"url": str(directory)}
    exec(snippet, names)
    assert np.array_equal(names["acts"], tiny[0].read("blocks.1.hook_resid_post", slice(1000)))
    assert np.array_equal(names["position"], tiny[0].rows(slice(1000)).position)


def test_the_sections_that_the_code_refers_to_exist():
    package = Path(actcache.__file__).parent
    named = {
        name
        for path in package.glob("*.py")
        for refs in re.findall(
            r"docs/format\.md\W{1,6}((?:\"[A-Z][a-z ]+\"(?:,? and |, |\s)*)+)", path.read_text()
        )
        for name in re.findall(r'"([^"]+)"', refs)
    }
    assert {"Identity", "Layout", "Shards", "Reading order"} <= named
    for name in named:
        section(name)


def test_the_page_of_sites_has_every_name_family_and_glob_and_no_other():
    page = (DOCS / "sites.md").read_text()
    names = {row[0].strip("`").replace(".N.", ".{}.") for row in tables("Names", page)["name"][1:]}
    gpt2 = families.site_names(shared_model("gpt2"))
    assert {re.sub(r"^blocks\.\d+\.", "blocks.{}.", name) for name in gpt2} == names
    types = re.findall(r"`(\w+)`", " ".join(row[0] for row in tables("Families", page)["`model_type`"][1:]))
    assert sorted(types) == sorted(families._FAMILIES)
    llama = tiny_model("llama", num_hidden_layers=9)
    globs = [row[0].strip("`") for row in tables("Globs", page)["pattern"][1:]]
    counts = [len(families.resolve_sites(llama, [glob])) for glob in globs]
    assert counts == [9, 2, 5 * 5, 4, 13, 9]
