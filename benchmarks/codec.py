"""Bits per value, entropies, error, and encode and decode speed of each precision, one thread, real activations.

One JSON line a site and precision; `--worst` does random matrices made to break codecs instead.
Shapes: N rows, D = d_in.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from hardware import report

from actcache.capture import run_capture
from actcache.codec import Precision, calibrate, decode, encode
from actcache.corpus import kept_tokens, tokenise
from actcache.driver import resolve
from actcache.errors import ActcacheError
from actcache.lm import load_lm
from actcache.shard import decode_chunk, encode_shard
from actcache.sources import resolve_corpus
from actcache.spec import Corpus, Spec
from actcache.statistics import Statistics
from actcache.store import open_store

CHUNK_ROWS, N_ROWS = 4096, 65_536
SITES = [f"blocks.{n}.hook_resid_post" for n in (1, 3, 5)] + ["blocks.3.hook_mlp_out", "blocks.3.attn.hook_z"]
PRECISIONS = [f"{kind}:{x}" for kind in ("fvu", "rotated") for x in ("1e-4", "1e-3", "3e-3")]
PRECISIONS += ["bf16", "fp16", "fp32"]


def activations(sites: list[str]) -> dict[str, np.ndarray]:
    """float32 [N, D] of each site of the bundled LM over its corpus, in a random order."""
    spec = Spec(
        model="bundled:stdlib-gpt2", corpus=Corpus("bundled:stdlib", max_tokens=400_000), sites=sites,
        context_size=256, n_tokens=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = resolve(spec).tokenizer
        tokens = tokenise(spec, resolve_corpus(spec.corpus), tokenizer, open_store(directory), progress=False)
        input_ids_ST, length_S = tokens.sequences("train", 0, 280)
    kept_ST = kept_tokens(input_ids_ST, length_S, tokens.identity["special_token_ids"])
    order = np.random.default_rng(0).permutation(int(kept_ST.sum()))[:N_ROWS]
    model = load_lm(spec.model).model
    parts: dict[str, list[np.ndarray]] = {site: [] for site in sites}
    with torch.inference_mode():
        ids = torch.from_numpy(input_ids_ST.astype(np.int64))
        for i in range(0, len(ids), 32):
            for site, acts_BTD in run_capture(model, ids[i : i + 32], sites).items():
                parts[site].append(acts_BTD.numpy()[kept_ST[i : i + 32]])
    return {site: np.concatenate(found)[order] for site, found in parts.items()}


def worst_cases(n_rows: int = N_ROWS, d_in: int = 192) -> dict[str, np.ndarray]:
    """Random rows with one thing wrong each."""
    rng = np.random.default_rng(0)
    base_ND = (rng.normal(size=(n_rows, d_in)) * rng.uniform(0.5, 2, d_in)).astype(np.float32)
    cases = {name: base_ND.copy() for name in ("gaussian", "huge channel", "huge row", "constant channel")}
    cases["huge channel"][:, 7] *= 1e4
    cases["huge row"][n_rows // 2] *= 1e6
    cases["constant channel"][:, 7] = 1 / 3
    cases["one row in 256 at 100 times"] = base_ND * np.where(rng.random((n_rows, 1)) < 1 / 256, 100, 1)
    cases["a spike of 100 in every row"] = base_ND.copy()
    cases["a spike of 100 in every row"][np.arange(n_rows), rng.integers(0, d_in, n_rows)] = 100
    cases["all zeros"] = np.zeros_like(base_ND)
    cases["denormals"] = base_ND * np.float32(1e-41)
    cases["one NaN"] = base_ND.copy()
    cases["one NaN"][17, 3] = np.nan
    return {name: acts_ND.astype(np.float32) for name, acts_ND in cases.items()}


def entropy(codes: np.ndarray) -> float:
    """Bits per value of the distribution of all codes."""
    counts = np.unique(codes, return_counts=True)[1]
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


def median_s(work: Callable[[], object], repeats: int = 5) -> float:
    """CPU seconds of all threads: the speed of one core, whatever else the machine does."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median_low(times[1:])


def measure(acts_ND: np.ndarray, precision: Precision) -> dict[str, object]:
    """The figures of one precision on these rows."""
    calibration = calibrate(acts_ND, precision)
    codes_ND, scale_N = encode(acts_ND, calibration, precision)
    n_rows, d_in = acts_ND.shape

    def pack() -> tuple[bytes, list[tuple[int, int]]]:
        return encode_shard(codes_ND, CHUNK_ROWS, n_rows, 0, precision.rotated)

    shard, chunks = pack()
    stored = len(shard)
    if scale_N is not None:
        stored += len(encode_shard(scale_N, CHUNK_ROWS, n_rows, np.nan)[0])
    out_ND = np.empty_like(acts_ND)
    chunk_CD = np.empty((CHUNK_ROWS, d_in), codes_ND.dtype)
    payloads = [shard[at : at + size] for at, size in chunks]

    def unpack() -> None:
        for payload in payloads:
            decode_chunk(payload, chunk_CD.shape, chunk_CD.dtype, "k", None, precision.rotated, chunk_CD)

    def read() -> None:
        for i, payload in enumerate(payloads):
            decode_chunk(payload, chunk_CD.shape, chunk_CD.dtype, "k", None, precision.rotated, chunk_CD)
            rows = slice(i * CHUNK_ROWS, (i + 1) * CHUNK_ROWS)
            scale = None if scale_N is None else scale_N[rows]
            decode(chunk_CD, scale, calibration, precision, out_ND[rows])

    read()
    summary = Statistics.of(acts_ND, out_ND, scale_N, calibration).summary()
    million = acts_ND.size / 1e6
    quantise_s, pack_s = median_s(lambda: encode(acts_ND, calibration, precision)), median_s(pack)
    integers = precision.quantised
    return {
        "bits_per_value": round(8 * stored / acts_ND.size, 3),
        "stored_bytes": stored,
        "pooled_entropy": round(entropy(codes_ND), 3) if integers else None,
        "column_entropy": round(float(np.mean([entropy(column) for column in codes_ND.T])), 3) if integers else None,
        "fvu_core": summary["fvu_core"],
        "fvu_all": summary["fvu_all"],
        "max_error": summary["max_error"],
        "rows_rescaled": summary["rows_rescaled"],
        "step": calibration.step,
        "quantise_mval_per_s": round(million / quantise_s),
        "compress_mval_per_s": round(million / pack_s),
        "encode_mval_per_s": round(million / (quantise_s + pack_s)),
        "decompress_mval_per_s": round(million / median_s(unpack)),
        "decode_mval_per_s": round(million / median_s(read)),
        "statistics_mval_per_s": round(
            million / median_s(lambda: Statistics.of(acts_ND, out_ND, scale_N, calibration))
        ),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--site", action="append", help=f"default: {', '.join(SITES)}")
    parser.add_argument("--precision", action="append", help=f"default: {', '.join(PRECISIONS)}")
    parser.add_argument("--worst", action="store_true", help="random matrices made to break codecs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = worst_cases() if args.worst else activations(args.site or SITES)
    for site, acts_ND in rows.items():
        for name in args.precision or PRECISIONS:
            try:
                figures = measure(acts_ND, Precision.parse(name))
            except ActcacheError as err:
                figures = {"refused": str(err)}
            report("codec", site=site, precision=name, **figures)


if __name__ == "__main__":
    main()
