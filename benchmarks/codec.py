"""Bits per value, entropies, and encode and decode speed of each precision, one thread, real activations."""

import argparse
import statistics
import time

import numpy as np
import torch
from hardware import report

from actcache.capture import load_lm, run_capture
from actcache.codec import Precision, calibrate, decode, encode
from actcache.driver import resolve
from actcache.errors import SpecError
from actcache.shard import decode_shard, encode_shard
from actcache.spec import Corpus, Spec

CHUNK_ROWS, N_ROWS = 4096, 65_536


def activations(site: str) -> np.ndarray:
    """float32 [N, D] of the bundled LM over its tokenised corpus, in a random order."""
    import tempfile

    from actcache.corpus import kept_tokens, resolve_corpus, tokenise
    from actcache.store import open_store

    spec = Spec(
        model="bundled:stdlib-gpt2", corpus=Corpus("bundled:stdlib", max_tokens=400_000), sites=[site],
        context_size=256, n_tokens=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = resolve(spec).tokenizer
        tokens = tokenise(spec, resolve_corpus(spec.corpus), tokenizer, open_store(directory), progress=False)
        input_ids_ST, length_S = tokens.sequences("train", 0, 280)
    kept_ST = kept_tokens(input_ids_ST, length_S, tokens.identity["special_token_ids"])
    model = load_lm(spec.model).model
    with torch.inference_mode():
        ids = torch.from_numpy(input_ids_ST.astype(np.int64))
        parts = [run_capture(model, ids[i : i + 32], [site])[site] for i in range(0, len(ids), 32)]
    acts_ND = torch.cat(parts).numpy()[kept_ST]
    return np.ascontiguousarray(np.random.default_rng(0).permutation(acts_ND)[:N_ROWS])


def entropy(codes: np.ndarray) -> float:
    """Bits per value of the pooled distribution."""
    p = np.bincount(codes.ravel().astype(np.int64) + 128) / codes.size
    return float(-(p[p > 0] * np.log2(p[p > 0])).sum())


def median_s(work: object, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--site", action="append", help="default: resid_post of blocks 1, 3 and 5")
    sites = parser.parse_args().site or [f"blocks.{n}.hook_resid_post" for n in (1, 3, 5)]
    torch.set_num_threads(1)
    for site in sites:
        acts_ND = activations(site)
        for name in ("fvu:1e-4", "fvu:1e-3", "fvu:3e-3", "bf16", "fp32"):
            try:
                figures = measure(acts_ND, Precision.parse(name))
            except SpecError as err:
                figures = {"unreachable": str(err)}
            report("codec", site=site, precision=name, **figures)


def measure(acts_ND: np.ndarray, precision: Precision) -> dict[str, object]:
    """The figures of one precision on these rows."""
    calibration = calibrate(acts_ND, precision)
    codes_ND, scale_N = encode(acts_ND, calibration, precision)
    fill = -128 if precision.quantised else 0
    shard, _ = encode_shard(codes_ND, CHUNK_ROWS, N_ROWS, fill)
    stored = len(shard)
    if scale_N is not None:
        stored += len(encode_shard(scale_N, CHUNK_ROWS, N_ROWS, np.nan)[0])
    error_ND = decode(codes_ND, scale_N, calibration.offset_D, precision) - acts_ND
    shape = (CHUNK_ROWS, acts_ND.shape[1])
    encode_s = median_s(lambda: encode(acts_ND, calibration, precision))
    pack_s = median_s(lambda: encode_shard(codes_ND, CHUNK_ROWS, N_ROWS, fill))
    unpack_s = median_s(lambda: decode_shard(shard, N_ROWS, shape, N_ROWS, codes_ND.dtype, "k"))
    million = acts_ND.size / 1e6
    return {
        "bits_per_value": round(8 * stored / acts_ND.size, 3),
        "pooled_entropy": round(entropy(codes_ND), 3) if precision.quantised else None,
        "fvu": float((error_ND**2).sum() / ((acts_ND - acts_ND.mean(0)) ** 2).sum()),
        "quantise_mval_per_s": round(million / encode_s),
        "compress_mval_per_s": round(million / pack_s),
        "encode_mval_per_s": round(million / (encode_s + pack_s)),
        "decompress_mval_per_s": round(million / unpack_s),
    }


if __name__ == "__main__":
    main()
