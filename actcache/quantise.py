"""The arithmetic of codes: rows to integers and scales, and back, in pieces that stay in a core's cache.

`quantise` is the one lossy step between the LM and the SAE. Its error bound is part of the format
(docs/format.md, "Precision") and is tested, not assumed. `actcache.codec` chooses the step and the
channels' multiples of it.
Shapes: N rows, D = d_in.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from .errors import Conflict, NonFiniteActivation

MAX_CODE = {"fvu": 127, "rotated": 32767}
"""Symmetric: the integer below -127 or -32767 stays unused, so that it marks holes."""
LARGEST = 2.0**127  # distance from the offset at which decoding could overflow float32; less by D if rotated
_EDGE = 2.0**-5  # by which kernels may differ at the edge of a code's range: bf16 rounds to 2^-8
_PIECE_VALUES = 2**17
_PRODUCT_ROWS = 1024  # fewer, and a product with a wide rotation waits for memory
_SAFE_PEAK = 1e15  # squares of what is smaller, and their sums, stay float32 numbers


def quantise(
    acts_ND: np.ndarray,
    offset_D: np.ndarray,
    step: float,
    given_N: np.ndarray | None = None,
    channel_D: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 codes [N, D] and the float32 scale of each row [N].

    A row whose largest code would exceed 127 takes the smallest power-of-two multiple of `step`
    that holds it, so nothing is clipped. Every element is recovered to within scale * channel / 2,
    up to float32 rounding of the element itself.

    `given_N` are scales that another run took for the same rows. Its kernel's rounding may have put
    a value just inside the range that is just outside here: that is clipped. `channel_D` are powers of
    two, the multiples of the step that loud channels take; None: 1 for all.

    Raises:
        NonFiniteActivation: names the first bad row; fp16 capture overflows at 65504.
        Conflict: a value exceeds what its given scale holds by more than rounding does.
    """
    codes_ND, scale_N = np.empty(acts_ND.shape, np.int8), np.empty(len(acts_ND), np.float32)
    pieces = quantised_pieces(acts_ND, offset_D, step, MAX_CODE["fvu"], given_N, channel_D=channel_D)
    for part, scaled_ND, scale in pieces:
        np.copyto(codes_ND[part], scaled_ND, casting="unsafe")
        scale_N[part] = scale
    return codes_ND, scale_N


def quantise_rotated(
    acts_ND: np.ndarray,
    offset_D: np.ndarray,
    step: float,
    rotation_DD: np.ndarray,
    given_N: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return zigzag uint16 codes [N, D] of principal components and the float32 scale of each row [N].

    Zigzag (0, -1, 1, -2, ... as 0, 1, 2, 3, ...) leaves the upper byte of most codes zero. As
    `quantise`, with 32767 in place of 127; a row's error has norm at most sqrt(D) * scale / 2, up to
    float32 rounding of the products.

    Raises:
        NonFiniteActivation: names the first bad row.
    """
    check_finite(acts_ND, "row")
    check_range(acts_ND, np.arange(len(acts_ND)), rotated=True)
    codes_ND, scale_N = np.empty(acts_ND.shape, "<u2"), np.empty(len(acts_ND), np.float32)
    centre_D = np.zeros_like(offset_D)
    for i in range(0, len(acts_ND), _PRODUCT_ROWS):
        rows = slice(i, i + _PRODUCT_ROWS)
        projected_ND = project(acts_ND[rows], offset_D, rotation_DD)
        given = None if given_N is None else given_N[rows]
        pieces = quantised_pieces(projected_ND, centre_D, step, MAX_CODE["rotated"], given, i)
        for part, scaled_ND, scale in pieces:
            signed_ND = scaled_ND.astype(np.int16)
            codes_ND[rows][part] = ((signed_ND << 1) ^ (signed_ND >> 15)).view(np.uint16)
            scale_N[rows][part] = scale
    return codes_ND, scale_N


def project(acts_ND: np.ndarray, offset_D: np.ndarray, rotation_DD: np.ndarray) -> np.ndarray:
    """float32 [N, D]: coordinates in the rotated basis."""
    return (acts_ND - offset_D) @ rotation_DD.T


def quantised_pieces(
    rows_ND: np.ndarray,
    offset_D: np.ndarray,
    step: float,
    max_code: int,
    given_N: np.ndarray | None = None,
    first: int = 0,
    channel_D: np.ndarray | None = None,
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield (rows, codes as integral float32, scale) of pieces; the codes' memory is used again.

    Errors number the rows from `first`.

    Pieces stay in a core's cache: 2.4 times the speed of passes over all rows.
    """
    n_rows = max(1, _PIECE_VALUES // max(1, rows_ND.shape[1]))
    buffer_ND = np.empty((min(n_rows, len(rows_ND)), rows_ND.shape[1]), np.float32)
    limit = max_code + 0.49
    inverse = np.float32(1.0 / step)
    # powers of two: the codes are the same whichever factor comes first
    inverse_D = inverse if channel_D is None else inverse / channel_D
    for i in range(0, len(rows_ND), n_rows):
        piece_ND = rows_ND[i : i + n_rows]
        with np.errstate(over="ignore", invalid="ignore"):
            scaled_ND = np.subtract(piece_ND, offset_D, out=buffer_ND[: len(piece_ND)])
            scaled_ND *= inverse_D
        if given_N is not None:
            scale_N = given_N[i : i + n_rows]
            check_finite(piece_ND, "row", first + i)
            _rescale_as_given(piece_ND, offset_D, step, scale_N, max_code, scaled_ND, first + i, channel_D)
            yield slice(i, i + n_rows), scaled_ND, scale_N
            continue
        scale_N = np.full(len(piece_ND), step, np.float32)
        # one maximum over all took 6 us where one a row took 48, and large rows are rare; NaN fails it too
        if not max(scaled_ND.max(), -scaled_ND.min()) <= limit:
            check_finite(piece_ND, "row", first + i)
            large = np.flatnonzero(~(np.abs(scaled_ND).max(axis=1) <= limit))
            centred_MD = piece_ND[large].astype(np.float64) - offset_D
            check_range(centred_MD, first + i + large)
            if channel_D is not None:
                centred_MD /= channel_D
            # frexp gives peak / (limit * step) = m * 2^e with m in [0.5, 1): 2^e is the multiple that holds it
            fraction_M, power_M = np.frexp(np.abs(centred_MD).max(axis=1) / (limit * step))
            scale_N[large] *= np.exp2(power_M - (fraction_M == 0.5))
            scaled_ND[large] = centred_MD / scale_N[large, None]
        yield slice(i, i + n_rows), np.rint(scaled_ND, out=scaled_ND), scale_N


def _rescale_as_given(
    piece_ND: np.ndarray,
    offset_D: np.ndarray,
    step: float,
    scale_N: np.ndarray,
    max_code: int,
    scaled_ND: np.ndarray,
    first: int,
    channel_D: np.ndarray | None,
) -> None:
    """Make, in place, of rows (`first` and on) over `step` their codes at the scales given."""
    large = np.flatnonzero(scale_N != np.float32(step))
    centred_MD = piece_ND[large].astype(np.float64) - offset_D
    if channel_D is not None:
        centred_MD /= channel_D
    scaled_ND[large] = centred_MD / scale_N[large, None]
    peak_N = np.abs(scaled_ND).max(axis=1, initial=0.0)
    if (peak_N > (max_code + 0.49) * (1 + _EDGE)).any():
        row = int(np.argmax(peak_N))
        raise Conflict(
            f"row {first + row} reaches code {peak_N[row]:.1f} at the scale {scale_N[row]} that is stored for it"
        )
    np.clip(np.rint(scaled_ND, out=scaled_ND), -max_code, max_code, out=scaled_ND)


def decode_plain(
    codes_ND: np.ndarray,
    scale_N: np.ndarray,
    offset_D: np.ndarray,
    out: np.ndarray,
    channel_D: np.ndarray | None = None,
) -> None:
    """codes * scale * channel + offset, into `out`.

    In pieces that stay in a core's cache. numpy is slow over rows that are short, so vectors are
    repeated and equal scales are one number: 3 times the speed at D = 192.
    """
    assert out.flags.c_contiguous
    n_rows = max(1, _PIECE_VALUES // max(1, codes_ND.shape[1]))
    same = len(scale_N) > 0 and bool((scale_N == scale_N[0]).all())
    offset = _repeated(offset_D.astype(np.float32, copy=False).tobytes(), n_rows)
    channel = None if channel_D is None else _repeated(channel_D.astype(np.float32).tobytes(), n_rows)
    for i in range(0, len(codes_ND), n_rows):
        part_ND = out[i : i + n_rows]
        np.copyto(part_ND, codes_ND[i : i + n_rows])
        part_ND *= scale_N[0] if same else scale_N[i : i + n_rows, None]
        flat = part_ND.reshape(-1)
        if channel is not None:
            flat *= channel[: len(flat)]
        flat += offset[: len(flat)]


@lru_cache(maxsize=32)
def _repeated(vector: bytes, times: int) -> np.ndarray:
    """float32 vectors, repeated; kept, since making them takes a quarter of the time of decoding a batch."""
    return np.tile(np.frombuffer(vector, np.float32), times)


def decode_rotated(
    codes_ND: np.ndarray, scale_N: np.ndarray, offset_D: np.ndarray, rotation_DD: np.ndarray, out: np.ndarray
) -> None:
    """Rows of zigzag codes of principal components, into `out`."""
    for i in range(0, len(codes_ND), _PRODUCT_ROWS):
        part = slice(i, i + _PRODUCT_ROWS)
        np.matmul(_signed(codes_ND[part]) * scale_N[part, None], rotation_DD, out=out[part])
        out[part] += offset_D


def decode_rotated_components(
    codes_ND: np.ndarray, scale_N: np.ndarray, rotated_offset_D: np.ndarray, out: np.ndarray
) -> None:
    """The same without the product with the rotation, into `out`."""
    for i in range(0, len(codes_ND), _PRODUCT_ROWS):
        part = slice(i, i + _PRODUCT_ROWS)
        np.multiply(_signed(codes_ND[part]), scale_N[part, None], out=out[part])
        out[part] += rotated_offset_D


def _signed(codes_ND: np.ndarray) -> np.ndarray:
    """int16 [N, D] of zigzag codes."""
    return (codes_ND >> 1).view(np.int16) ^ -(codes_ND & 1).view(np.int16)


def to_bf16_bits(acts_ND: np.ndarray) -> np.ndarray:
    """uint16 [N, D]: the upper half of each float32, rounded to nearest even."""
    bits_ND = np.ascontiguousarray(acts_ND, dtype=np.float32).view(np.uint32)
    rounded_ND = bits_ND + (((bits_ND >> 16) & 1) + np.uint32(0x7FFF))
    return (rounded_ND >> 16).astype("<u2")


def squared_distance(acts_ND: np.ndarray, centre_D: np.ndarray) -> np.ndarray:
    """float64 [N]: squared distance of each row to `centre_D`, by float32 sums where these hold it."""
    if acts_ND.size and not max(acts_ND.max(), -acts_ND.min()) < _SAFE_PEAK:
        acts_ND = acts_ND.astype(np.float64)
    diff_ND = acts_ND - centre_D
    return np.einsum("nd,nd->n", diff_ND, diff_ND).astype(np.float64)


def check_finite(acts_ND: np.ndarray, what: str, first: int = 0) -> None:
    """Raise NonFiniteActivation naming the first row with an inf or NaN; rows are numbered from `first`."""
    if acts_ND.size and np.isfinite(acts_ND.max()) and np.isfinite(acts_ND.min()):
        return
    finite_N = np.isfinite(acts_ND).all(axis=1)
    if not finite_N.all():
        row = int(np.flatnonzero(~finite_N)[0])
        channel = int(np.flatnonzero(~np.isfinite(acts_ND[row]))[0])
        raise NonFiniteActivation(
            f"{what} {first + row} holds {acts_ND[row, channel]} at channel {channel}; wanted finite values. "
            "Run the LM in float32 or bfloat16 (fp16 overflows at 65504), or check its weights",
            row=first + row,
        )


def check_range(centred_MD: np.ndarray, row_M: np.ndarray, rotated: bool = False) -> None:
    """Refuse rows (numbered `row_M`) so large that decoding them could overflow float32."""
    largest = LARGEST / (centred_MD.shape[1] if rotated else 1)
    if not len(centred_MD) or max(centred_MD.max(), -centred_MD.min()) < largest:
        return
    row, channel = np.argwhere(~(np.abs(centred_MD) < largest))[0]
    raise NonFiniteActivation(
        f"row {row_M[row]} holds about {centred_MD[row, channel]:.3g} at channel {channel}; quantised values must "
        f"stay below {largest:.2g}. Store the site as fp32, or check the LM's weights",
        row=int(row_M[row]),
    )
