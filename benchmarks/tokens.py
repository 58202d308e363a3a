"""Token store: tokens/s and peak memory of packing and globally shuffling a pre-tokenised corpus.

Writes a parquet corpus of token ids (documents of 20-2,000 tokens), then builds its token store in
this process: read, check, hash to a split, pack, spill, shuffle, compress, store. The baseline is the
resident memory with everything imported and the tokenizer loaded; the peak is sampled every 20 ms.
Ids are drawn uniformly from 50,000, which zstd cannot compress: real text stores less.
"""

import argparse
import multiprocessing
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hardware import report

from actcache.corpus import tokenise
from actcache.lm import load_tokenizer
from actcache.sources import resolve_corpus
from actcache.spec import Corpus, Spec
from actcache.store import open_store

_FILE_TOKENS = 50_000_000
_ROW_GROUP_TOKENS = 2_000_000


def write_corpus(directory: Path, n_tokens: int, vocab_size: int) -> None:
    """Parquet files of about 50 M ids, in row groups of about 2 M."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    schema = pa.schema({"input_ids": pa.list_(pa.int32())})
    for number, start in enumerate(range(0, n_tokens, _FILE_TOKENS)):
        with pq.ParquetWriter(directory / f"{number:05d}.parquet", schema, compression="snappy") as writer:
            for at in range(start, min(start + _FILE_TOKENS, n_tokens), _ROW_GROUP_TOKENS):
                n = min(_ROW_GROUP_TOKENS, n_tokens - at)
                cuts = np.cumsum(rng.integers(20, 2_000, n // 20))
                offsets = np.concatenate([[0], cuts[cuts < n], [n]]).astype(np.int32)
                ids = rng.integers(2, vocab_size, n, dtype=np.int32)
                writer.write_table(pa.table([pa.ListArray.from_arrays(offsets, ids)], schema=schema))


def resident_bytes() -> int:
    """Of this process, shared pages included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Peak:
    """The largest resident memory while inside."""

    def __enter__(self) -> "Peak":
        self.size_bytes, self._stop = resident_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.size_bytes = max(self.size_bytes, resident_bytes())

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--context-size", type=int, default=256)
    parser.add_argument("--packing", default="concat", choices=("concat", "isolated", "single"))
    parser.add_argument("--directory", help="where corpus, store and scratch files go; default: TMPDIR")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(dir=options.directory))
    tempfile.tempdir = str(directory)
    tokenizer = load_tokenizer("bundled:stdlib-gpt2")
    arguments = (directory / "corpus", options.tokens, len(tokenizer))
    writer = multiprocessing.get_context("spawn").Process(target=write_corpus, args=arguments)
    writer.start()  # a process of its own, so that its memory is not in the baseline
    writer.join()
    spec = Spec(
        model="bundled:stdlib-gpt2",
        corpus=Corpus(str(directory / "corpus"), token_field="input_ids", revision="benchmark"),
        sites=["unused"],
        context_size=options.context_size,
        packing=options.packing,
        n_tokens=1,
    )
    resolved = resolve_corpus(spec.corpus)
    baseline = resident_bytes()
    start = time.perf_counter()
    with Peak() as peak:
        tokens = tokenise(spec, resolved, tokenizer, open_store(str(directory / "root")), progress=False)
    elapsed = time.perf_counter() - start
    splits = tokens.manifest["splits"].values()
    report(
        "tokens",
        n_tokens=options.tokens,
        context_size=options.context_size,
        packing=options.packing,
        tokens_per_s=round(options.tokens / elapsed),
        baseline_mib=round(baseline / 2**20),
        peak_over_baseline_mib=round((peak.size_bytes - baseline) / 2**20),
        n_sequences=sum(s["n_sequences"] for s in splits),
        n_documents=sum(s["n_documents"] for s in splits),
        n_tokens_cut=sum(s["n_tokens_cut"] for s in splits),
    )
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
