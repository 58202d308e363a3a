"""One corpus in every kind of file that can hold it."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq


def write_as(directory, kind, field, values):
    """A corpus of `values` as one file (text: several) of the kind; returns its source."""
    directory.mkdir()
    table = pa.table({"other": list(range(len(values))), field: values})
    lines = "".join(json.dumps({"other": 0, field: v}) + "\n" for v in values).encode()
    if kind == "text":
        for i, value in enumerate(values):
            (directory / f"{i:04d}.txt").write_text(value)
        return f"{directory}/*.txt"
    if kind == "saved":
        for i in range(2):
            half = table.slice(2) if i else table.slice(0, 2)
            with pa.ipc.new_stream(directory / f"data-{1 - i}.arrow", half.schema) as stream:
                stream.write_table(half)
        (directory / "cache-1.arrow").write_bytes(b"left by datasets, no part of it")
        files = [{"filename": "data-1.arrow"}, {"filename": "data-0.arrow"}]
        (directory / "state.json").write_text(json.dumps({"_data_files": files, "_split": None}))
        return str(directory)
    path = directory / f"data.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=2)
    elif kind == "feather":
        with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as file:
            file.write_table(table, max_chunksize=2)
    elif kind == "arrow":
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == "jsonl.zst":
        path.write_bytes(_zstd(lines))
    else:
        path.write_bytes(lines)
    return str(path)


def _zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()
