"""Row codecs: how activation rows become stored numbers, and what precision that costs.

`quantise` is the one lossy step between the LM and the SAE. Its error bound is part of the
format (docs/format.md, "Precision") and is tested, not assumed.
Shapes: N rows, D = d_in.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from .errors import Conflict, NonFiniteActivation, SpecError

CORE_RADIUS = 16.0
"""A core row lies within this many times the median squared distance from the per-channel median."""

MAX_CODE = {"fvu": 127, "rotated": 32767}
"""Symmetric: the integer below -127 or -32767 stays unused, so that it marks holes."""
_MARGIN = 0.95  # without it "noise <= fvu" is a coin flip; it costs 0.04 bit
_EDGE = 2.0**-5  # by which kernels may differ at the edge of a code's range: bf16 rounds to 2^-8
_PIECE_VALUES = 2**17
_PRODUCT_ROWS = 1024  # fewer, and a product with a wide rotation waits for memory
_SAFE_PEAK = 1e15  # squares of what is smaller, and their sums, stay float32 numbers
LARGEST = 2.0**127  # distance from the offset at which decoding could overflow float32; less by D if rotated
_TINY_STEP = 2.0**-100  # a constant site still gets a positive step


@dataclass(frozen=True)
class Precision:
    """A parsed precision: `kind` is "fvu", "rotated" (with `fvu` the noise fraction), "bf16", "fp16" or "fp32"."""

    kind: str
    fvu: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Precision":
        """Read `fvu:1e-3`, `rotated:1e-3`, `bf16`, `fp16` or `fp32`.

        Raises:
            SpecError: anything else.
        """
        if text in ("bf16", "fp16", "fp32"):
            return cls(text)
        kind, _, number = text.partition(":")
        if kind in MAX_CODE:
            try:
                fvu = float(number)
            except ValueError:
                fvu = -1.0
            if 1e-6 <= fvu <= 0.1:
                return cls(kind, fvu)
        raise SpecError(
            f"precision is {text!r}; it must be fvu:<x> or rotated:<x> with x in 1e-6..0.1 (fvu:1e-3 is usual), "
            "bf16, fp16 or fp32"
        )

    def __str__(self) -> str:
        return f"{self.kind}:{self.fvu:g}" if self.quantised else self.kind

    @property
    def quantised(self) -> bool:
        """Whether rows are stored as integer codes with a scale."""
        return self.kind in MAX_CODE

    @property
    def rotated(self) -> bool:
        """Whether codes are those of principal components."""
        return self.kind == "rotated"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored `codes` array (bf16 as its bits, since Zarr v3 has no core bfloat16)."""
        names = {"fvu": "<i1", "rotated": "<u2", "bf16": "<u2", "fp16": "<f2", "fp32": "<f4"}
        return np.dtype(names[self.kind])

    @property
    def decode_line(self) -> str:
        """The line of numpy that turns the stored arrays into float32, recorded in the dataset."""
        return {
            "fvu": "codes * scale[:, None] + offset",
            "rotated": "(((codes >> 1).astype('<i2') ^ -(codes & 1).astype('<i2')) * scale[:, None]) "
            "@ rotation + offset",
            "bf16": "(codes.astype('<u4') << 16).view('<f4')",
            "fp16": "codes.astype('<f4')",
            "fp32": "codes",
        }[self.kind]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What one site's rows look like, from a fixed prefix of the train split.

    The step follows from the *core* rows: a handful of attention-sink rows at 100 times the
    usual norm would otherwise set a step that drowns everybody else.
    """

    offset_D: np.ndarray
    """float32 [D]: mean of the core rows (zero for lossless precisions)."""

    step: float
    """Quantisation step: noise of a uniform step is step^2 / 12 a channel."""

    median_D: np.ndarray
    """float32 [D]: per-channel median."""

    radius2: float
    """Rows whose squared distance to the median is at most this are core rows."""

    n_rows: int
    n_core: int
    core_variance: float
    """Summed over channels, of the core rows."""

    rotation_DD: np.ndarray | None = None
    """float32, orthogonal: row c is the c-th principal component of the core rows (`rotated` only)."""

    @cached_property
    def rotated_offset_D(self) -> np.ndarray:
        """float32 [D]: the offset in the coordinates of the principal components (`rotated` only)."""
        assert self.rotation_DD is not None
        return (self.rotation_DD.astype(np.float64) @ self.offset_D).astype(np.float32)


def calibrate(acts_ND: np.ndarray, precision: Precision) -> Calibration:
    """Choose offset and step so that the noise is at most `precision.fvu` of the core variance.

    Deterministic; float64 sums.

    Raises:
        NonFiniteActivation: names the first bad row.
    """
    check_finite(acts_ND, "calibration row")
    if precision.quantised:
        _check_range(acts_ND, np.arange(len(acts_ND)), precision)
    median_D = np.median(acts_ND, axis=0).astype(np.float32)
    distance2_N = squared_distance(acts_ND, median_D)
    radius2 = float(CORE_RADIUS * np.median(distance2_N))
    core_MD = acts_ND[distance2_N <= radius2]
    mean_D = core_MD.mean(axis=0, dtype=np.float64)
    core_variance = sum(float(np.square(part_MD - mean_D).sum()) for part_MD in _parts(core_MD)) / len(
        core_MD
    )
    step, offset_D, rotation_DD = 0.0, np.zeros_like(median_D), None
    if precision.quantised:
        offset_D = mean_D.astype(np.float32)
        if precision.rotated:
            rotation_DD = _principal_components(core_MD[::2], mean_D)
            # rows that the rotation was not fitted to: it flatters its own
            held_out_MD = _project(core_MD[1::2], offset_D, rotation_DD)
            step = _widest_step(held_out_MD, core_variance, precision)
        else:
            step = _choose_step(core_MD, offset_D, core_variance, precision)
    return Calibration(
        offset_D=offset_D,
        step=step,
        median_D=median_D,
        radius2=radius2,
        n_rows=len(acts_ND),
        n_core=len(core_MD),
        core_variance=core_variance,
        rotation_DD=rotation_DD,
    )


def _formula_step(core_variance: float, d_in: int, fvu: float) -> float:
    """The uniform step whose noise, a twelfth of its square a channel, is `_MARGIN * fvu`."""
    return max(float(np.sqrt(12 * _MARGIN * fvu * core_variance / d_in)), _TINY_STEP)


def _choose_step(
    core_MD: np.ndarray, offset_D: np.ndarray, core_variance: float, precision: Precision
) -> float:
    """The formula's step; smaller where its noise is more than the formula says: some core rows need a multiple
    of it, or values are so few that their errors are not uniform.

    Raises:
        SpecError: no step keeps the noise, since single values dwarf their rows.
    """
    fvu, least = precision.fvu, np.inf
    widest = _formula_step(core_variance, core_MD.shape[1], fvu)
    n_rescaled = 0
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5):
        step = float(np.float32(widest * shrink))
        noise, rescaled = _noise(core_MD, offset_D, step, precision)
        allowed = (0.98 if rescaled else 1.0) * fvu * core_variance * len(core_MD)
        if noise <= allowed:
            return step
        n_rescaled += rescaled
        least = min(least, noise)
    if not n_rescaled:  # what is left is float32's own rounding of rows far from zero
        return float(np.float32(widest))
    raise SpecError(
        f"int8 codes reach FVU {least / (core_variance * len(core_MD)):.2g} at this site, wanted {fvu:g}: single values dwarf their rows. "
        f"Store it as rotated:{fvu:g} or bf16, or accept a larger fvu"
    )


def _widest_step(rows_MD: np.ndarray, core_variance: float, precision: Precision) -> float:
    """The widest step on a grid, 128 an octave about the formula's, whose measured noise is `_MARGIN * fvu`.

    Components below the step become zero, with less noise than a twelfth of its square (reverse
    water-filling): so it is wider than the formula's.

    Raises:
        SpecError: no step keeps the noise.
    """
    centre_D = np.zeros(rows_MD.shape[1], np.float32)
    formula = _formula_step(core_variance, rows_MD.shape[1], precision.fvu)
    if formula == _TINY_STEP or not len(rows_MD):
        return formula

    def step(k: int) -> float:
        return float(np.float32(formula * 2.0 ** (k / 128)))

    def fvu(k: int) -> float:
        return _noise(rows_MD, centre_D, step(k), precision)[0] / (core_variance * len(rows_MD))

    holds, fails = -128, 128 * 12  # half the formula's step keeps any noise, unless int16 codes are too small
    if fvu(holds) > _MARGIN * precision.fvu:
        raise SpecError(
            f"int16 codes reach FVU {fvu(holds):.2g} at this site, wanted {precision.fvu:g}: single values dwarf "
            "their rows. Store it as bf16 or fp32, or accept a larger fvu"
        )
    while fails - holds > 1:
        k = (holds + fails) // 2
        holds, fails = (k, fails) if fvu(k) <= _MARGIN * precision.fvu else (holds, k)
    return step(holds)


def _noise(
    rows_ND: np.ndarray, offset_D: np.ndarray, step: float, precision: Precision
) -> tuple[float, bool]:
    """Squared error of quantising, summed in float64, and whether any row needed a multiple of the step."""
    noise, rescaled = 0.0, False
    for part, codes_ND, scale_N in _quantised_pieces(rows_ND, offset_D, step, MAX_CODE[precision.kind]):
        error_ND = codes_ND * scale_N[:, None] + offset_D - rows_ND[part]
        noise += float(np.einsum("nd,nd->", error_ND, error_ND, dtype=np.float64))
        rescaled = rescaled or bool((scale_N != np.float32(step)).any())
    return noise, rescaled


def _principal_components(rows_MD: np.ndarray, mean_D: np.ndarray) -> np.ndarray:
    """float32 [D, D]: principal components as rows, by falling variance, largest entry of each positive."""
    d_in = len(mean_D)
    covariance_DD = np.zeros((d_in, d_in))
    for part_MD in _parts(rows_MD):
        centred_MD = part_MD - mean_D
        covariance_DD += centred_MD.T @ centred_MD
    components_DD = np.linalg.eigh(covariance_DD)[1].T[::-1]
    largest_D = components_DD[np.arange(d_in), np.abs(components_DD).argmax(axis=1)]
    return np.ascontiguousarray(components_DD * np.sign(largest_D)[:, None], dtype=np.float32)


def _parts(rows_ND: np.ndarray) -> Iterator[np.ndarray]:
    """Rows in parts: float64 copies of all calibration rows at d 4096 take 2 GiB each."""
    for i in range(0, len(rows_ND), 4096):
        yield rows_ND[i : i + 4096]


def _project(acts_ND: np.ndarray, offset_D: np.ndarray, rotation_DD: np.ndarray) -> np.ndarray:
    """float32 [N, D]: coordinates in the rotated basis."""
    return (acts_ND - offset_D) @ rotation_DD.T


def quantise(
    acts_ND: np.ndarray, offset_D: np.ndarray, step: float, given_N: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 codes [N, D] and the float32 scale of each row [N].

    A row whose largest code would exceed 127 takes the smallest power-of-two multiple of `step`
    that holds it, so nothing is clipped. Every element is recovered to within scale / 2, up to
    float32 rounding of the element itself.

    `given_N` are scales that another run took for the same rows. Its kernel's rounding may have put
    a value just inside the range that is just outside here: that is clipped.

    Raises:
        NonFiniteActivation: names the first bad row; fp16 capture overflows at 65504.
        Conflict: a value exceeds what its given scale holds by more than rounding does.
    """
    codes_ND, scale_N = np.empty(acts_ND.shape, np.int8), np.empty(len(acts_ND), np.float32)
    for part, scaled_ND, scale in _quantised_pieces(acts_ND, offset_D, step, MAX_CODE["fvu"], given_N):
        np.copyto(codes_ND[part], scaled_ND, casting="unsafe")
        scale_N[part] = scale
    return codes_ND, scale_N


def quantise_rotated(
    acts_ND: np.ndarray, calibration: Calibration, given_N: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return zigzag uint16 codes [N, D] of principal components and the float32 scale of each row [N].

    Zigzag (0, -1, 1, -2, ... as 0, 1, 2, 3, ...) leaves the upper byte of most codes zero. As
    `quantise`, with 32767 in place of 127; a row's error has norm at most sqrt(D) * scale / 2, up to
    float32 rounding of the products.

    Raises:
        NonFiniteActivation: names the first bad row.
    """
    assert calibration.rotation_DD is not None
    check_finite(acts_ND, "row")
    _check_range(acts_ND, np.arange(len(acts_ND)), Precision("rotated"))
    codes_ND, scale_N = np.empty(acts_ND.shape, "<u2"), np.empty(len(acts_ND), np.float32)
    centre_D = np.zeros_like(calibration.offset_D)
    for i in range(0, len(acts_ND), _PRODUCT_ROWS):
        rows = slice(i, i + _PRODUCT_ROWS)
        projected_ND = _project(acts_ND[rows], calibration.offset_D, calibration.rotation_DD)
        given = None if given_N is None else given_N[rows]
        pieces = _quantised_pieces(projected_ND, centre_D, calibration.step, MAX_CODE["rotated"], given, i)
        for part, scaled_ND, scale in pieces:
            signed_ND = scaled_ND.astype(np.int16)
            codes_ND[rows][part] = ((signed_ND << 1) ^ (signed_ND >> 15)).view(np.uint16)
            scale_N[rows][part] = scale
    return codes_ND, scale_N


def _quantised_pieces(
    rows_ND: np.ndarray,
    offset_D: np.ndarray,
    step: float,
    max_code: int,
    given_N: np.ndarray | None = None,
    first: int = 0,
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield (rows, codes as integral float32, scale) of pieces; the codes' memory is used again.

    Errors number the rows from `first`.

    Pieces stay in a core's cache: 2.4 times the speed of passes over all rows.
    """
    n_rows = max(1, _PIECE_VALUES // max(1, rows_ND.shape[1]))
    buffer_ND = np.empty((min(n_rows, len(rows_ND)), rows_ND.shape[1]), np.float32)
    limit = max_code + 0.49
    for i in range(0, len(rows_ND), n_rows):
        piece_ND = rows_ND[i : i + n_rows]
        with np.errstate(over="ignore", invalid="ignore"):
            scaled_ND = np.subtract(piece_ND, offset_D, out=buffer_ND[: len(piece_ND)])
            scaled_ND *= np.float32(1.0 / step)
        if given_N is not None:
            scale_N = given_N[i : i + n_rows]
            check_finite(piece_ND, "row", first + i)
            _rescale_as_given(piece_ND, offset_D, step, scale_N, max_code, scaled_ND, first + i)
            yield slice(i, i + n_rows), scaled_ND, scale_N
            continue
        scale_N = np.full(len(piece_ND), step, np.float32)
        # one maximum over all took 6 us where one a row took 48, and large rows are rare; NaN fails it too
        if not max(scaled_ND.max(), -scaled_ND.min()) <= limit:
            check_finite(piece_ND, "row", first + i)
            large = np.flatnonzero(~(np.abs(scaled_ND).max(axis=1) <= limit))
            centred_MD = piece_ND[large].astype(np.float64) - offset_D
            _check_range(centred_MD, first + i + large, Precision("fvu"))
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
) -> None:
    """Make, in place, of rows (`first` and on) over `step` their codes at the scales given."""
    large = np.flatnonzero(scale_N != np.float32(step))
    scaled_ND[large] = (piece_ND[large].astype(np.float64) - offset_D) / scale_N[large, None]
    peak_N = np.abs(scaled_ND).max(axis=1, initial=0.0)
    if (peak_N > (max_code + 0.49) * (1 + _EDGE)).any():
        row = int(np.argmax(peak_N))
        raise Conflict(
            f"row {first + row} reaches code {peak_N[row]:.1f} at the scale {scale_N[row]} that is stored for it"
        )
    np.clip(np.rint(scaled_ND, out=scaled_ND), -max_code, max_code, out=scaled_ND)


def encode(
    acts_ND: np.ndarray, calibration: Calibration, precision: Precision, scale_N: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Stored `codes` [N, D] in `precision.dtype`, and `scale` [N] where there is one.

    bf16 rounds to nearest even; fp32 keeps every bit. `scale_N`: scales that another run has stored for
    these rows and that therefore hold.

    Raises:
        NonFiniteActivation: a value is not finite, or overflows fp16 or bf16.
        Conflict: the given scales are of other rows.
    """
    if precision.rotated:
        return quantise_rotated(acts_ND, calibration, scale_N)
    if precision.quantised:
        return quantise(acts_ND, calibration.offset_D, calibration.step, scale_N)
    check_finite(acts_ND, "row")
    if precision.kind == "bf16":
        codes_ND = _to_bf16_bits(acts_ND)
        check_finite(decode(codes_ND, None, None, precision), "row rounded to bf16:")
    else:
        with np.errstate(over="ignore"):
            codes_ND = acts_ND.astype(precision.dtype)
        check_finite(codes_ND, f"row in {precision.kind}:")
    return codes_ND, None


def decode(
    codes_ND: np.ndarray,
    scale_N: np.ndarray | None,
    offset_D: np.ndarray | None,
    precision: Precision,
    rotation_DD: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """float32 rows [N, D], in `out` if given; the same arithmetic as the recorded decode line.

    Fresh memory costs as much as the arithmetic: 900 Mval/s without `out`, 2,700 with it (int8 codes).
    """
    if out is None:
        out = np.empty(codes_ND.shape, np.float32)
    if precision.quantised:
        assert scale_N is not None
        assert offset_D is not None
        if precision.rotated:
            assert rotation_DD is not None
            _decode_rotated(codes_ND, scale_N, offset_D, rotation_DD, out)
        else:
            _decode_plain(codes_ND, scale_N, offset_D, out)
    elif precision.kind == "bf16":
        bits_ND = out.view(np.uint32)
        np.copyto(bits_ND, codes_ND)
        bits_ND <<= 16
    else:
        np.copyto(out, codes_ND)
    return out


def _decode_plain(codes_ND: np.ndarray, scale_N: np.ndarray, offset_D: np.ndarray, out: np.ndarray) -> None:
    """Pieces that stay in a core's cache; numpy is slow over rows that are short, so offset is repeated to one
    vector and equal scales are one number: 3 times the speed at D = 192."""
    assert out.flags.c_contiguous
    n_rows = max(1, _PIECE_VALUES // max(1, codes_ND.shape[1]))
    same = len(scale_N) > 0 and bool((scale_N == scale_N[0]).all())
    offset = _repeated(offset_D.astype(np.float32, copy=False).tobytes(), n_rows)
    for i in range(0, len(codes_ND), n_rows):
        part_ND = out[i : i + n_rows]
        np.copyto(part_ND, codes_ND[i : i + n_rows])
        part_ND *= scale_N[0] if same else scale_N[i : i + n_rows, None]
        flat = part_ND.reshape(-1)
        flat += offset[: len(flat)]


@lru_cache(maxsize=16)
def _repeated(offset: bytes, times: int) -> np.ndarray:
    """float32 offsets, repeated; kept, since making them takes a quarter of the time of decoding a batch."""
    return np.tile(np.frombuffer(offset, np.float32), times)


def _decode_rotated(
    codes_ND: np.ndarray, scale_N: np.ndarray, offset_D: np.ndarray, rotation_DD: np.ndarray, out: np.ndarray
) -> None:
    for i in range(0, len(codes_ND), _PRODUCT_ROWS):
        part = slice(i, i + _PRODUCT_ROWS)
        np.matmul(_signed(codes_ND[part]) * scale_N[part, None], rotation_DD, out=out[part])
        out[part] += offset_D


def decode_components(codes_ND: np.ndarray, scale_N: np.ndarray, calibration: Calibration) -> np.ndarray:
    """float32 rows [N, D] in the coordinates of the principal components: `decode`'s rows @ rotation.T.

    Equal to that product up to rounding, without making it.
    """
    out = np.empty(codes_ND.shape, np.float32)
    for i in range(0, len(codes_ND), _PRODUCT_ROWS):
        part = slice(i, i + _PRODUCT_ROWS)
        np.multiply(_signed(codes_ND[part]), scale_N[part, None], out=out[part])
        out[part] += calibration.rotated_offset_D
    return out


def _signed(codes_ND: np.ndarray) -> np.ndarray:
    """int16 [N, D] of zigzag codes."""
    return (codes_ND >> 1).view(np.int16) ^ -(codes_ND & 1).view(np.int16)


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


def _check_range(centred_MD: np.ndarray, row_M: np.ndarray, precision: Precision) -> None:
    """Refuse rows (numbered `row_M`) so large that decoding them could overflow float32."""
    largest = LARGEST / (centred_MD.shape[1] if precision.rotated else 1)
    if not len(centred_MD) or max(centred_MD.max(), -centred_MD.min()) < largest:
        return
    row, channel = np.argwhere(~(np.abs(centred_MD) < largest))[0]
    raise NonFiniteActivation(
        f"row {row_M[row]} holds about {centred_MD[row, channel]:.3g} at channel {channel}; quantised values must "
        f"stay below {largest:.2g}. Store the site as fp32, or check the LM's weights",
        row=int(row_M[row]),
    )


def _to_bf16_bits(acts_ND: np.ndarray) -> np.ndarray:
    bits_ND = np.ascontiguousarray(acts_ND, dtype=np.float32).view(np.uint32)
    rounded_ND = bits_ND + (((bits_ND >> 16) & 1) + np.uint32(0x7FFF))
    return (rounded_ND >> 16).astype("<u2")
