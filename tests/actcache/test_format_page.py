"""docs/format.md and docs/sites.md against real datasets: no key, field, array or worked number can go stale."""

import ast
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from stranger import (
    DECODE,
    DOCS,
    PAGE,
    canonical,
    digest,
    newest_manifest,
    outputs,
    permutation,
    reading_order,
    section,
)
from tiny_models import shared_model, tiny_model

import actcache
from actcache import families
from actcache.order import permutation as our_permutation


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
    manifest = json.loads(max((directory / "_manifest").glob("*.json")).read_text())
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
    for kind in ("records", "statistics", "objects"):
        file = manifest["segments"][0][kind]
        schema = pq.read_schema(directory / (file[0] if kind == "objects" else file)["key"])
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
    only = {row[0].strip("`"): re.findall(r"`(fvu|rotated)`", row[1]) for row in tables("Layout")["key"][1:]}
    elsewhere = [key for key, kinds in only.items() if kinds and precision not in kinds]
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
                others = {"rotated": "rotation", "fvu": "channel"}
                if path.name in quantised or path.name in {v for k, v in others.items() if k != kind}:
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
    assert arrays_match_the_page(tiny[0]) == 3 * (8 + 2 * 4)


def test_arrays_of_lossless_precisions_are_as_the_tables_of_the_page_say(lossless):
    assert arrays_match_the_page(lossless) == 3 * (8 + 2)


def test_arrays_of_rotated_rows_are_as_the_tables_of_the_page_say(rotated):
    assert arrays_match_the_page(rotated) == 3 * (8 + 2 * 4)


def test_the_attributes_are_those_of_the_page(directory):
    root = zarr.open_group(str(directory), mode="r")
    manifest = newest_manifest(directory)
    assert root.attrs["actcache"] == {"format": 2, "id": manifest["id"], "identity": manifest["identity"]}
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
