"""A dataset made to harm its reader is refused with a reason: its digests are all right, its numbers lie."""

import contextlib
import copy
import hashlib
import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import textwrap
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs import zstd
from replayed import Recorded
from tiny_harvest import SITES

import actcache
from actcache.errors import ActcacheError, CorruptObject, FormatError
from actcache.hub import dataset_card
from actcache.manifest import manifest_key
from actcache.shard import crc32c, decode_chunk
from actcache.spec import canonical_json, digest
from actcache.store import open_store
from actcache.untrusted import _FREE_BYTES, load_json, read_parquet

MANIFEST = manifest_key(2)  # with the LM's losses


class Objects(dict):
    """Objects by key; Hypothesis shows the arguments of a failing test."""

    def __repr__(self):
        return f"{len(self)} objects"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The objects of a real dataset, by key."""
    store = open_store(f"memory://{tmp_path_factory.mktemp('hostile').name}")
    Recorded(tmp_path_factory.mktemp("recorded")).harvest(store)
    return Objects({o.key: store.read(o.key) for o in store.listing("")})


@pytest.fixture(scope="module")
def rows(template):
    return placed("memory://hostile-original", template).read(SITES[0], slice(None))


def placed(url, objects, **changed):
    """The dataset of these objects, opened."""
    store = open_store(url)
    for o in store.listing(""):
        store.delete(o.key)
    for key, data in (objects | changed).items():
        store.create(key, data)
    return actcache.open(url)


def resealed(value):
    """A manifest's bytes with the digests that an attacker would compute."""
    value = {k: v for k, v in value.items() if k != "digest"}
    with contextlib.suppress(KeyError, ValueError):
        value["id"] = digest(value["identity"])
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    try:
        sealed = {**value, "digest": digest(value)}
        return canonical_json(sealed).encode()
    except ValueError:  # NaN
        return text.encode("utf-8", "surrogatepass")


def edited(template, path, new):
    """The manifest with the field at `path` set, resealed."""
    value = json.loads(template[MANIFEST])
    at_path(value, path[:-1])[path[-1]] = new
    return resealed(value)


def use(dataset):
    """All that a reader does."""
    for split in dataset.manifest.splits:
        view = dataset.split(split)
        if view.n_rows:
            view.rows(slice(None))
            view.documents(slice(None))
            view.sequences(slice(None))
            view.size_bytes()
        for site in dataset.sites:
            if dataset.manifest.sites[site].n_blocks[split]:
                view.read(site, slice(None))
                view.stats(site)
                view.sequence_activations(site, 0)
                for _ in view.stream(site, batch_size=1024, where=actcache.Where(not_token_ids=[0])):
                    pass
    dataset_card(dataset)


WIDTH, BLOCKS = ("sites", SITES[0], "d_in"), ("splits", "train", "n_blocks")
LIES = [
    (WIDTH, 2**40),
    (WIDTH, 2**24),
    (WIDTH, -1),
    (WIDTH, 0),
    (WIDTH, 16.0),
    (WIDTH, True),
    (WIDTH, "16"),
    (WIDTH, None),
    (WIDTH, 8),
    (WIDTH, 10**4000),
    (("splits", "train", "n_rows"), 2**62),
    (("splits", "train", "n_rows"), -1),
    (("splits", "train", "n_rows"), True),
    (("splits", "train", "n_rows"), 1e300),
    (("splits", "train", "n_sequences"), 2**50),
    (BLOCKS, 2**60),
    (BLOCKS, "3"),
    (("splits", "train"), None),
    (("splits",), []),
    (("splits", "../evil"), {"n_blocks": 1, "n_rows": 1, "n_sequences": 1}),
    (("sites", "../../etc/passwd"), {"d_in": 16, "n_blocks": {}, "calibration_sha256": "0" * 64}),
    (("sites", ".."), {"d_in": 16, "n_blocks": {}, "calibration_sha256": "0" * 64}),
    (("sites", "s3://bucket/x"), {"d_in": 16, "n_blocks": {}, "calibration_sha256": "0" * 64}),
    (("sites", "__class__"), {"d_in": 16, "n_blocks": {}, "calibration_sha256": "0" * 64}),
    (("sites", SITES[0], "n_blocks", "train"), 10**6),
    (("sites", SITES[0], "n_blocks", "train"), -3),
    (("sites", SITES[0], "n_blocks"), {}),
    (("sites", SITES[0], "calibration_sha256"), "zz"),
    (("sites",), {"x": []}),
    (("identity", "block_rows"), 2**62),
    (("identity", "block_rows"), 1000),
    (("identity", "block_rows"), 2**31),
    (("identity", "chunk_rows"), 0),
    (("identity", "chunk_rows"), 1024),
    (("identity", "chunk_rows"), False),
    (("identity", "precision"), "fvu:nan"),
    (("identity", "precision"), "__import__('os')"),
    (("identity", "precision"), "fp32"),
    (("identity", "tokens", "context_size"), 2**62),
    (("identity", "tokens", "context_size"), 0),
    (("identity", "tokens", "vocab_size"), 2**40),
    (("identity", "tokens", "vocab_size"), 2**20),
    (("identity", "tokens", "special_token_ids"), [2**40]),
    (("identity", "tokens", "special_token_ids"), "all"),
    (("identity", "tokens"), []),
    (("identity", "model"), "gpt2"),
    (("identity", "model", "id"), "\x1b]0;owned\x07"),
    (("identity", "seed"), {}),
    (("identity",), None),
    (("segments", 0, "objects", 0, "key"), "_segments/../../../etc/passwd"),
    (("segments", 0, "objects", 0, "key"), "https://evil.example/x.parquet"),
    (("segments", 0, "statistics", "key"), "/etc/passwd"),
    (("segments", 0, "records", "key"), 7),
    (("segments", 0, "objects"), ["a"]),
    (("segments", 0, "objects"), {}),
    (("segments", 0, "objects"), []),
    (("segments", 0, "objects", 0, "sha256"), None),
    (("segments", 0, "objects", 0, "first"), "x"),
    (("segments", 0, "objects", 0, "last"), 7),
    (("segments", 0, "records"), None),
    (("segments", 0, "n_records"), -1),
    (("segments", 0), "x"),
    (("segments",), {"0": {}}),
    (("segments",), []),
    (("version",), 3),
    (("version",), True),
    (("version",), 10**30),
    (("format",), 4),
    (("format",), True),
    (("format",), "1"),
    (("format",), 10**12),
    (("source",), 7),
    (("source",), "\u001b[31m"),
    (("source",), "\ud800"),
    (("complete",), 1),
    (("fidelity",), {"x": {"ce_change": "low"}}),
    (("provenance",), 7),
    (("wanted",), None),
    (("provenance", "note"), float("nan")),
    (("provenance", "note"), float("inf")),
    (("unknown",), 1),
]


@pytest.mark.parametrize(("path", "value"), LIES, ids=lambda x: str(x)[:50])
def test_a_lying_manifest_is_refused_with_a_reason(template, path, value):
    if value == 10**4000:
        data = edited(template, path, 123454321).replace(b"123454321", b"1" * 5000)
    else:
        data = edited(template, path, value)
    tracemalloc.start()
    try:
        with pytest.raises(ActcacheError) as refused:
            use(placed("memory://hostile-manifest", template, **{MANIFEST: data}))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20, f"allocated {peak} bytes before it was refused"
    assert len(str(refused.value)) < 600
    assert re.search("memory://hostile-manifest|(train|validation|test)/", str(refused.value))
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"format":1,"format":1}', "there twice"),
        (b'{"format":NaN}', "NaN is not allowed"),
        (b'{"format":-Infinity}', "Infinity is not allowed"),
        (b'{"format":1e999}', "1e999 is not allowed"),
        (b'{"format":' + b"9" * 10_000 + b"}", "integer"),
        (b"[" * 200_000, "recursion"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "recursion"),
        (b'{"format":"\\ud800"}', "surrogates"),
        (b"\xff\xfe\x00", "decode"),
        (b"", "Expecting value"),
    ],
    ids=lambda x: str(x)[:24],
)
def test_json_that_this_format_never_writes_is_refused(data, reason):
    with pytest.raises(CorruptObject, match=reason) as refused:
        load_json(data, "here", "restore it")
    assert str(refused.value).startswith("here ")


def test_an_endless_manifest_is_not_read_to_its_end(template):
    data = b" " * 2**24 + template[MANIFEST]
    with pytest.raises(FormatError, match="more than 16777216 bytes"):
        placed("memory://hostile-long", template, **{MANIFEST: data})


VALUES = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**62, -(2**63), 2**1000, 0.5, 1.0, 1e300, float("nan"), float("inf"),
    "", "x", "../x", "/etc/passwd", "train", "\ud800", "\x1b[2J", "0" * 64, [], {}, [0], [[]], {"": None}, {"a": {"b": 1}},
)  # fmt: skip


def paths_of(value, at=()):
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_of(inner, (*at, key))


def read_as_before_or_refused(template, rows, manifest):
    try:
        dataset = placed("memory://hostile-mutated", template, **{MANIFEST: resealed(manifest)})
        found = dataset.read(SITES[0], slice(None))
        use(dataset)
    except ActcacheError:
        return
    assert found.shape[1] == rows.shape[1]
    assert np.array_equal(found, rows[: len(found)])


def at_path(value, path):
    for part in path:
        value = value[part]
    return value


def test_a_manifest_without_any_one_of_its_fields_reads_the_same_or_is_refused(template, rows):
    for path in paths_of(json.loads(template[MANIFEST])):
        if path and path[0] != "provenance":
            value = json.loads(template[MANIFEST])
            del at_path(value, path[:-1])[path[-1]]
            read_as_before_or_refused(template, rows, value)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_mutated_manifest_reads_the_same_or_is_refused(template, rows, seed):
    rng = random.Random(seed)
    value = json.loads(template[MANIFEST])
    for _ in range(rng.randint(1, 3)):
        path = rng.choice([p for p in paths_of(value) if p])
        at = at_path(value, path[:-1])
        action = rng.choice(["set", "set", "remove", "rename"])
        if action == "set":
            at[path[-1]] = copy.deepcopy(rng.choice(VALUES))
        elif action == "remove" or isinstance(at, list):
            del at[path[-1]]
        else:
            at[rng.choice(["", "x", "train", "d_in", "../x"])] = at.pop(path[-1])
    read_as_before_or_refused(template, rows, value)


# Segments


def with_segment(template, kind, data):
    """The dataset's objects with another file in place of a segment's, all digests right."""
    value = json.loads(template[MANIFEST])
    sha256 = hashlib.sha256(data).hexdigest()
    file = {"key": f"_segments/{sha256[:16]}-{kind}.parquet", "sha256": sha256}
    entry = value["segments"][0][kind]
    value["segments"][0][kind] = [entry[0] | file] if kind == "objects" else file
    return template | {file["key"]: data, MANIFEST: resealed(value)}


def file_of(template, kind):
    """Key of a segment's file."""
    entry = json.loads(template[MANIFEST])["segments"][0][kind]
    return (entry[0] if kind == "objects" else entry)["key"]


def table_of(template, kind):
    return pq.read_table(io.BytesIO(template[file_of(template, kind)]))


def parquet(table, **options):
    sink = io.BytesIO()
    pq.write_table(table, sink, **({"compression": "zstd"} | options))
    return sink.getvalue()


def changed_rows(table, column, change):
    values = [change(row) for row in table.to_pylist()]
    return table.set_column(
        table.schema.get_field_index(column), column, pa.array(values, table.schema.field(column).type)
    )


@pytest.mark.parametrize(
    ("kind", "column", "change"),
    [
        ("objects", "size_bytes", lambda r: 2**62),
        ("objects", "size_bytes", lambda r: -1),
        ("objects", "size_bytes", lambda r: None),
        ("objects", "shard", lambda r: -1 - r["shard"]),
        ("objects", "shard", lambda r: r["shard"] + 2**40),
        ("objects", "path", lambda r: "../" + r["path"]),
        ("objects", "path", lambda r: "https://evil.example/x"),
        ("objects", "path", lambda r: None),
        ("objects", "path", lambda r: "tra\x1bin/" + r["path"]),
        ("objects", "chunk_nbytes", lambda r: [2**62] * len(r["chunk_nbytes"])),
        ("objects", "chunk_nbytes", lambda r: [-1] * len(r["chunk_nbytes"])),
        ("objects", "chunk_nbytes", lambda r: [None] * len(r["chunk_nbytes"])),
        ("objects", "chunk_nbytes", lambda r: [0] * len(r["chunk_nbytes"])),
        ("objects", "chunk_nbytes", lambda r: r["chunk_nbytes"][:-1]),
        ("objects", "chunk_offset", lambda r: [2**63 - 1] * len(r["chunk_offset"])),
        ("objects", "chunk_offset", lambda r: []),
        ("objects", "chunk_offset", lambda r: r["chunk_offset"] * 2),
        ("objects", "chunk_crc32c", lambda r: [7] * len(r["chunk_crc32c"])),
        ("statistics", "block", lambda r: r["block"] + 1),
        ("statistics", "n_rows", lambda r: None),
        ("statistics", "mean_D", lambda r: b"\0" * 7),
        ("statistics", "mean_D", lambda r: b"\0" * 8),
        ("statistics", "m2_D", lambda r: None),
        ("statistics", "site", lambda r: "elsewhere"),
        ("statistics", "n_blocks", lambda r: r["n_blocks"] + 1),
        ("statistics", "n_blocks", lambda r: 0),
        ("statistics", "n_blocks", lambda r: 2**62),
        ("statistics", "n_blocks", lambda r: -(2**63)),
        ("records", "block", lambda r: None),
        ("records", "block", lambda r: r["block"] + 1),
        ("records", "n_sequences", lambda r: r["n_sequences"] + 1),
        ("records", "split", lambda r: "elsewhere"),
        ("records", "n_sequences", lambda r: None),
    ],
)
def test_a_lying_segment_is_refused_with_a_reason(template, kind, column, change):
    data = parquet(changed_rows(table_of(template, kind), column, change))
    tracemalloc.start()
    try:
        with pytest.raises(ActcacheError):
            use(placed("memory://hostile-segment", with_segment(template, kind, data)))
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_a_huge_size_with_a_chunk_of_any_size_is_refused(template):
    table = changed_rows(table_of(template, "objects"), "size_bytes", lambda r: 2**62)
    table = changed_rows(table, "chunk_nbytes", lambda r: [2**61] * len(r["chunk_nbytes"]))
    with pytest.raises(FormatError, match="is the most that it can"):
        use(placed("memory://hostile-huge", with_segment(template, "objects", parquet(table))))


def test_other_columns_and_other_files_are_refused(template):
    objects = table_of(template, "objects")
    bad = [
        parquet(objects.drop_columns(["shard"])),
        parquet(objects.append_column("code", pa.array(["import os"] * len(objects)))),
        parquet(objects.set_column(1, "shard", objects["shard"].cast(pa.float64()))),
        b"PAR1" + b"\xff" * 100 + b"PAR1",
        b"",
    ]
    for data in bad:
        with pytest.raises(FormatError):
            use(placed("memory://hostile-columns", with_segment(template, "objects", data)))


def bombs(objects):
    """Small files that decode to gigabytes."""
    n = 2**22
    one = {
        name: pa.array([v] * 1, objects.schema.field(name).type)
        for name, v in objects.slice(0, 1).to_pylist()[0].items()
    }
    single = pa.table(one, schema=objects.schema)
    many = pa.table({name: pa.concat_arrays([c.chunk(0)]).take(pa.array(np.zeros(n, np.int32))) for name, c in zip(single.schema.names, single.columns, strict=True) if not pa.types.is_list(c.type)} | {name: pa.array([[]], single.schema.field(name).type).take(pa.array(np.zeros(n, np.int32))) for name in single.schema.names if pa.types.is_list(single.schema.field(name).type)}, schema=objects.schema)  # fmt: skip
    yield "rows", parquet(many)
    long = pa.array([[0] * 2**25], objects.schema.field("chunk_offset").type)
    yield "list", parquet(single.set_column(3, "chunk_offset", long))
    text = pa.array(["x" * 2**16], pa.string()).take(pa.array(np.zeros(2**14, np.int32)))
    few = many.slice(0, 2**14)
    yield "text", parquet(few.set_column(0, "path", text))


@pytest.mark.slow
def test_parquet_bombs_are_refused_before_they_are_decoded(template):
    for name, data in bombs(table_of(template, "objects")):
        assert len(data) < 2**20, name
        pa.default_memory_pool().release_unused()
        before = pa.total_allocated_bytes()
        with pytest.raises(FormatError, match="decode"):
            read_parquet(data, table_of(template, "objects").schema, "bomb")
        assert pa.total_allocated_bytes() - before < _FREE_BYTES, name


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_segment_with_changed_bytes_parses_or_is_refused(template, data):
    """Footers, page headers and levels are the attacker's: whatever they say, one kind of error."""
    key = file_of(template, "objects")
    raw = bytearray(template[key])
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(4, len(raw) - 5))] = data.draw(st.integers(0, 255))
    schema = table_of(template, "objects").schema
    try:
        table = read_parquet(bytes(raw), schema, "segment")
    except ActcacheError:
        return
    assert table.schema.equals(schema)


@pytest.mark.slow
def test_memory_stays_bounded_whatever_the_numbers_say(template, tmp_path):
    """The whole of a hostile reading in a process that may not have more than 1 GiB above what it started with."""
    store = open_store(str(tmp_path))
    for i, (path, value) in enumerate(LIES):
        if value == 10**4000:
            continue
        store.create(f"{i}/{MANIFEST}", edited(template, path, value))
        for key, data in template.items():
            if key != MANIFEST and key.startswith(("_segments", "_calibration")):
                store.create(f"{i}/{key}", data)
    for name, data in bombs(table_of(template, "objects")):
        for key, content in with_segment(template, "objects", data).items():
            if key.startswith("_"):
                store.create(f"bomb-{name}/{key}", content)
    code = textwrap.dedent(
        f"""
        import pathlib, resource
        import numpy, pyarrow.parquet, actcache, actcache.reader
        used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
        for folder in sorted(pathlib.Path({str(tmp_path)!r}).iterdir()):
            try:
                dataset = actcache.open(str(folder))
                for site in dataset.sites:
                    dataset.stats(site)
                    dataset.read(site, slice(None))
                raise SystemExit(f"{{folder}} was taken")
            except actcache.errors.ActcacheError as err:
                assert "MemoryError" not in str(err) and "malloc" not in str(err), err
        print("all refused")
        """
    )
    # Arrow's own allocators and glibc reserve address space by the GiB
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "2"}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == "all refused\n", done.stdout + done.stderr[-2000:]


# Chunks


def frame(payload):
    return payload + struct.pack("<I", crc32c(payload))


@pytest.mark.parametrize(
    "payload",
    [
        bytes(zstd.compress(b"\0" * 2**26, 1)),  # a bomb that states its size
        b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**62) + b"\x01\x00\x00",  # a frame that states 4 EiB
        b"\x28\xb5\x2f\xfd\x00\x58" + b"\x01\x00\x00",  # one that states nothing
        b"\x28\xb5\x2f\xfd\x60\x00\x0f" + b"\xff" * 20,  # the right size, nonsense inside
        bytes(zstd.compress(b"\0" * 4096, 1)) + bytes(zstd.compress(b"\0" * 2**24, 1)),  # two frames
        b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd",  # a skippable frame
        b"",
        b"\0" * 200,
    ],
)
def test_a_hostile_chunk_is_refused_within_its_size(payload):
    tracemalloc.start()
    try:
        with pytest.raises(CorruptObject, match="^key: "):
            decode_chunk(frame(payload), (64, 64), np.dtype("i1"), "key")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# Calibrations and zarr.json


@pytest.mark.parametrize(
    "change",
    [
        {"offset": ""},
        {"offset": "AAAA"},
        {"offset": "AAAAAAAA" * 1000},
        {"offset": 7},
        {"median": None},
        {"channel": None},
        {"channel": "AACAPw=="},
        {"channel": 7},
        {"format": 9},
    ],
)
def test_a_lying_calibration_is_refused(template, change):
    key = f"_calibration/{SITES[0]}.json"
    data = json.dumps(json.loads(template[key]) | change).encode()
    sha256 = hashlib.sha256(data).hexdigest()
    manifest = edited(template, ("sites", SITES[0], "calibration_sha256"), sha256)
    with pytest.raises(ActcacheError, match="calibration"):
        use(placed("memory://hostile-calibration", template, **{key: data, MANIFEST: manifest}))


def test_zarr_metadata_is_never_believed(template, rows):
    """Shapes and codecs come from the manifest: a hostile `zarr.json` changes nothing for our reader."""
    hostile = (
        b'{"zarr_format":3,"node_type":"array","shape":[4611686018427387904],"codecs":[{"name":"evil"}]}'
    )
    changed = {key: hostile for key in template if key.endswith("zarr.json")}
    dataset = placed("memory://hostile-zarr", template, **changed)
    assert np.array_equal(dataset.read(SITES[0], slice(None)), rows)
