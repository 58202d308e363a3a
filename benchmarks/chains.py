"""Codec chains side by side on the same codes: bits per value, encode and decode speed, one thread.

The codes are those of one site of the bundled LM, plain (int8) and rotated (int16, uint16 zigzag), and its
bf16 bits. `readers` says whether every Zarr v3 reader decodes the chain: `numcodecs.*` codecs and offset-binary
int8 are outside of the specification or would change the decode line. pcodec takes part if it is installed
(`pip install pcodec`).
Shapes: N rows, D = d_in.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator

import numcodecs
import numpy as np
import torch
from codec import CHUNK_ROWS, activations, entropy, median_s
from hardware import report
from numcodecs import blosc, lz4, zstd

from actcache.codec import Precision, calibrate, encode

SHUFFLES = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}

Coder = tuple[Callable[[np.ndarray], bytes], Callable[[bytes, np.ndarray], object], str]
"""(compress, decompress into an array, who reads it)."""


def coders() -> Iterator[tuple[str, Coder]]:
    """Compressors of one contiguous chunk."""
    for level in (1, 3, 9, 19):
        yield f"zstd-{level}", (lambda x, k=level: zstd.compress(x, k), zstd.decompress, "any Zarr v3 reader")
    for name, cname, level in (
        ("blosc-zstd", b"zstd", 1),
        ("blosc-zstd-5", b"zstd", 5),
        ("blosc-lz4", b"lz4", 5),
    ):
        for shuffle, code in SHUFFLES.items():
            yield (
                f"{name} {shuffle}",
                (
                    lambda x, c=cname, k=level, s=code: blosc.compress(x, c, k, s, 0),
                    blosc.decompress,
                    "any Zarr v3 reader",
                ),
            )
    yield "lz4", (lz4.compress, lz4.decompress, "numcodecs.* only")
    if importlib.util.find_spec("pcodec"):
        from numcodecs.pcodec import PCodec

        pcodec = PCodec(level=4)
        yield "pcodec-4", (lambda x: pcodec.encode(x.ravel()), pcodec.decode, "numcodecs.* only")


def codes_of(acts_ND: np.ndarray, fvu: str) -> dict[str, np.ndarray]:
    """The same rows as different integers."""
    plain, rotated = Precision.parse(f"fvu:{fvu}"), Precision.parse(f"rotated:{fvu}")
    int8_ND, _ = encode(acts_ND, calibrate(acts_ND, plain), plain)
    zigzag_ND, _ = encode(acts_ND, calibrate(acts_ND, rotated), rotated)
    int16_ND = ((zigzag_ND >> 1) ^ -(zigzag_ND & 1)).astype(np.int16)
    bf16_ND, _ = encode(acts_ND, calibrate(acts_ND, Precision("bf16")), Precision("bf16"))
    wide_ND = int8_ND.astype(np.int16)
    return {
        "int8": int8_ND,
        "int8 zigzag": ((wide_ND << 1) ^ (wide_ND >> 15)).astype(np.uint8),
        "int8 offset-binary": (wide_ND + 128).astype(np.uint8),
        "rotated int16": int16_ND,
        "rotated zigzag": zigzag_ND,
        "bf16": bf16_ND,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--site", default="blocks.3.hook_resid_post")
    parser.add_argument("--fvu", default="1e-3")
    parser.add_argument("--rows", type=int, default=16_384)
    args = parser.parse_args()
    torch.set_num_threads(1)
    blosc.use_threads = False
    acts_ND = activations([args.site])[args.site][: args.rows]
    for name, codes_ND in codes_of(acts_ND, args.fvu).items():
        entropies = {"pooled_entropy": round(entropy(codes_ND), 3)}
        entropies["column_entropy"] = round(float(np.mean([entropy(column) for column in codes_ND.T])), 3)
        for by_column in (False, True):
            for chain, (compress, decompress, readers) in coders():
                if chain.startswith("pcodec") and codes_ND.itemsize == 1:
                    continue  # pco refuses 8-bit types
                figures = measure(codes_ND, by_column, compress, decompress)
                if name == "int8 offset-binary":
                    readers = f"{readers}; other decode line"
                report(
                    "chains", site=args.site, fvu=args.fvu, codes=name, transposed=by_column, chain=chain,
                    readers=readers, numcodecs=numcodecs.__version__, **entropies, **figures,
                )  # fmt: skip


def measure(
    codes_ND: np.ndarray, by_column: bool, compress: Callable, decompress: Callable
) -> dict[str, float]:
    """Bits and speeds of one chain over all chunks; transposing counts."""
    chunks = [codes_ND[i : i + CHUNK_ROWS] for i in range(0, len(codes_ND), CHUNK_ROWS)]

    def packed() -> list[bytes]:
        return [bytes(compress(np.ascontiguousarray(c.T) if by_column else c)) for c in chunks]

    stored = packed()
    shape = chunks[0].shape[::-1] if by_column else chunks[0].shape
    buffer = np.empty(shape, codes_ND.dtype)

    def unpacked() -> None:
        for payload in stored:
            decompress(payload, buffer)
            if by_column:
                np.ascontiguousarray(buffer.T)

    unpacked()
    assert np.array_equal(buffer.T if by_column else buffer, chunks[-1])
    million = codes_ND.size / 1e6
    return {
        "bits_per_value": round(8 * sum(map(len, stored)) / codes_ND.size, 3),
        "encode_mval_per_s": round(million / median_s(packed, 3)),
        "decode_mval_per_s": round(million / median_s(unpacked, 3)),
    }


if __name__ == "__main__":
    main()
