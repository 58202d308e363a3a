"""Row codecs: how activation rows become stored numbers, and what precision that costs.

`quantise` is the one lossy step between the LM and the SAE. Its error bound is part of the
format (docs/format.md, "Precision") and is tested, not assumed.
Shapes: N rows, D = d_in.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import NonFiniteActivation, SpecError

CORE_RADIUS = 16.0
"""A core row lies within this many times the median squared distance from the per-channel median."""

_MAX_CODE = 127  # symmetric: -128 stays unused, so quantise(-x) == -quantise(x), and marks holes
_MARGIN = 0.95  # without it "noise <= fvu" is a coin flip; it costs 0.04 bit
_LIMIT = _MAX_CODE + 0.49
_PIECE_VALUES = 2**17
_SAFE_PEAK = 1e15  # squares of what is smaller, and their sums, stay float32 numbers
_TINY_STEP = 2.0**-100  # a constant site still gets a positive step


@dataclass(frozen=True)
class Precision:
    """A parsed precision: `kind` is "fvu" (with `fvu` the noise fraction), "bf16", "fp16" or "fp32"."""

    kind: str
    fvu: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Precision":
        """Read `fvu:1e-3`, `bf16`, `fp16` or `fp32`.

        Raises:
            SpecError: anything else.
        """
        if text in ("bf16", "fp16", "fp32"):
            return cls(text)
        if text.startswith("fvu:"):
            try:
                fvu = float(text[4:])
            except ValueError:
                fvu = -1.0
            if 1e-6 <= fvu <= 0.1:
                return cls("fvu", fvu)
        raise SpecError(
            f"precision is {text!r}; it must be fvu:<x> with x in 1e-6..0.1 (fvu:1e-3 is usual), bf16, fp16 or fp32"
        )

    def __str__(self) -> str:
        return f"fvu:{self.fvu:g}" if self.kind == "fvu" else self.kind

    @property
    def quantised(self) -> bool:
        """Whether rows are stored as int8 codes with a scale."""
        return self.kind == "fvu"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored `codes` array (bf16 as its bits, since Zarr v3 has no core bfloat16)."""
        return np.dtype({"fvu": "<i1", "bf16": "<u2", "fp16": "<f2", "fp32": "<f4"}[self.kind])

    @property
    def decode_line(self) -> str:
        """The line of numpy that turns the stored arrays into float32, recorded in the dataset."""
        return {
            "fvu": "codes * scale[:, None] + offset",
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


def calibrate(acts_ND: np.ndarray, precision: Precision) -> Calibration:
    """Choose offset and step so that the noise is at most `precision.fvu` of the core variance.

    Deterministic; float64 sums.

    Raises:
        NonFiniteActivation: names the first bad row.
    """
    check_finite(acts_ND, "calibration row")
    median_D = np.median(acts_ND, axis=0).astype(np.float32)
    distance2_N = squared_distance(acts_ND, median_D)
    radius2 = float(CORE_RADIUS * np.median(distance2_N))
    core_MD = acts_ND[distance2_N <= radius2].astype(np.float64)
    mean_D = core_MD.mean(axis=0)
    core_variance = float(core_MD.var(axis=0).sum())
    step, offset_D = 0.0, np.zeros_like(median_D)
    if precision.quantised:
        offset_D = mean_D.astype(np.float32)
        step = _choose_step(core_MD.astype(np.float32), offset_D, core_variance, precision.fvu)
    return Calibration(
        offset_D=offset_D,
        step=step,
        median_D=median_D,
        radius2=radius2,
        n_rows=len(acts_ND),
        n_core=len(core_MD),
        core_variance=core_variance,
    )


def _choose_step(core_MD: np.ndarray, offset_D: np.ndarray, core_variance: float, fvu: float) -> float:
    """The uniform step whose noise is `_MARGIN * fvu`; smaller where some core rows need a multiple of it.

    Raises:
        SpecError: no step keeps the noise, since single values dwarf their rows.
    """
    widest = max(float(np.sqrt(12 * _MARGIN * fvu * core_variance / core_MD.shape[1])), _TINY_STEP)
    reached = np.inf
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5):
        step = float(np.float32(widest * shrink))
        codes_MD, scale_M = quantise(core_MD, offset_D, step)
        if (scale_M == np.float32(step)).all():
            return step
        error_MD = codes_MD * scale_M[:, None] + offset_D - core_MD
        noise = float(np.einsum("nd,nd->", error_MD, error_MD, dtype=np.float64))
        reached = min(reached, noise / (core_variance * len(core_MD)))
        if reached <= 0.98 * fvu:
            return step
    raise SpecError(
        f"int8 codes reach FVU {reached:.2g} at this site, wanted {fvu:g}: single values dwarf their rows. "
        "Store it as bf16, or accept a larger fvu"
    )


def quantise(acts_ND: np.ndarray, offset_D: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 codes [N, D] and the float32 scale of each row [N].

    A row whose largest code would exceed 127 takes the smallest power-of-two multiple of `step`
    that holds it, so nothing is clipped. Every element is recovered to within scale / 2, up to
    float32 rounding of the element itself.

    Raises:
        NonFiniteActivation: names the first bad row; fp16 capture overflows at 65504.
    """
    codes_ND = np.empty(acts_ND.shape, np.int8)
    scale_N = np.full(len(acts_ND), step, np.float32)
    rows = _piece_rows(acts_ND)
    buffer_ND = np.empty((rows, acts_ND.shape[1]), np.float32)
    for i in range(0, len(acts_ND), rows):
        piece_ND = acts_ND[i : i + rows]
        scaled_ND = np.subtract(piece_ND, offset_D, out=buffer_ND[: len(piece_ND)])
        scaled_ND *= np.float32(1.0 / step)
        # one maximum over all took 6 us where one a row took 48, and large rows are rare; NaN fails it too
        if not max(scaled_ND.max(), -scaled_ND.min()) <= _LIMIT:
            if not np.isfinite(scaled_ND).all():
                check_finite(acts_ND, "row")
            _rescale_large_rows(scaled_ND, scale_N[i : i + rows])
        np.copyto(codes_ND[i : i + rows], np.rint(scaled_ND, out=scaled_ND), casting="unsafe")
    return codes_ND, scale_N


def _rescale_large_rows(scaled_ND: np.ndarray, scale_N: np.ndarray) -> None:
    """Divide, in place, each row that int8 cannot hold by a power of two and multiply its scale by it."""
    peak_N = np.abs(scaled_ND).max(axis=1)
    large = np.flatnonzero(peak_N > _LIMIT)
    # frexp gives peak = m * 2^e with m in [0.5, 1): 2^(e-7) brings the peak to at most 128
    shrink_M = np.ldexp(np.float32(1), np.frexp(peak_N[large])[1] - 7).astype(np.float32)
    shrink_M[peak_N[large] / shrink_M > _LIMIT] *= 2
    scale_N[large] *= shrink_M
    scaled_ND[large] /= shrink_M[:, None]


def _piece_rows(acts_ND: np.ndarray) -> int:
    """Rows whose float32 values stay in a core's cache: 2.4 times the speed of passes over all rows."""
    return max(1, _PIECE_VALUES // max(1, acts_ND.shape[1]))


def encode(
    acts_ND: np.ndarray, calibration: Calibration, precision: Precision
) -> tuple[np.ndarray, np.ndarray | None]:
    """Stored `codes` [N, D] in `precision.dtype`, and `scale` [N] where there is one.

    bf16 rounds to nearest even; fp32 keeps every bit.

    Raises:
        NonFiniteActivation: a value is not finite, or overflows fp16 or bf16.
    """
    if precision.quantised:
        return quantise(acts_ND, calibration.offset_D, calibration.step)
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
    codes_ND: np.ndarray, scale_N: np.ndarray | None, offset_D: np.ndarray | None, precision: Precision
) -> np.ndarray:
    """float32 rows [N, D]; the same arithmetic as the recorded decode line."""
    if precision.quantised:
        assert scale_N is not None
        assert offset_D is not None
        acts_ND = np.multiply(codes_ND, scale_N[:, None], dtype=np.float32)
        acts_ND += offset_D
        return acts_ND
    if precision.kind == "bf16":
        return (codes_ND.astype("<u4") << 16).view("<f4")
    return codes_ND.astype(np.float32, copy=False)


def squared_distance(acts_ND: np.ndarray, centre_D: np.ndarray) -> np.ndarray:
    """float64 [N]: squared distance of each row to `centre_D`, by float32 sums where these hold it."""
    if acts_ND.size and not max(acts_ND.max(), -acts_ND.min()) < _SAFE_PEAK:
        acts_ND = acts_ND.astype(np.float64)
    diff_ND = acts_ND - centre_D
    return np.einsum("nd,nd->n", diff_ND, diff_ND).astype(np.float64)


def check_finite(acts_ND: np.ndarray, what: str) -> None:
    """Raise NonFiniteActivation naming the first row with an inf or NaN."""
    finite_N = np.isfinite(acts_ND).all(axis=1)
    if not finite_N.all():
        row = int(np.flatnonzero(~finite_N)[0])
        channel = int(np.flatnonzero(~np.isfinite(acts_ND[row]))[0])
        raise NonFiniteActivation(
            f"{what} {row} holds {acts_ND[row, channel]} at channel {channel}; wanted finite values. "
            "Run the LM in float32 or bfloat16 (fp16 overflows at 65504), or check its weights"
        )


def _to_bf16_bits(acts_ND: np.ndarray) -> np.ndarray:
    bits_ND = np.ascontiguousarray(acts_ND, dtype=np.float32).view(np.uint32)
    rounded_ND = bits_ND + (((bits_ND >> 16) & 1) + np.uint32(0x7FFF))
    return (rounded_ND >> 16).astype("<u2")
