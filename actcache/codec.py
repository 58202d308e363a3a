"""Row codecs: how activation rows become stored numbers, and what precision that costs.

`calibrate` chooses, from a sample of a site's rows, the offset, the step and the multiples of it that loud
channels take, so that the noise stays below a stated share of the variance; `encode` and `decode` apply them.
The rule is in docs/format.md, "Calibration"; the arithmetic in `actcache.quantise`.
Shapes: N rows, M core rows, D = d_in.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .errors import SpecError
from .quantise import (
    MAX_CODE,
    check_finite,
    check_range,
    decode_plain,
    decode_rotated,
    decode_rotated_components,
    project,
    quantise,
    quantise_rotated,
    quantised_pieces,
    squared_distance,
    to_bf16_bits,
)

CORE_RADIUS = 16.0
"""A core row lies within this many times the median squared distance from the per-channel median."""

_MARGIN = 0.95  # without it "noise <= fvu" is a coin flip; it costs 0.04 bit
_TINY_STEP = 2.0**-100  # a constant site still gets a positive step
_SAMPLE_ROWS = 8192  # for medians and for which channels are loud: a median takes 30 ns a value
_PART_VALUES = 2**22  # 16 MiB: what is looked at, or sorted, at a time
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
_MOST_NOISE = 4.0  # by which the channels' multiples may raise the noise of a step: then it halves
_MOST_POWER = 64  # of a row's multiple, in that choice


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
            "fvu": "codes * scale[:, None] * channel + offset",
            "rotated": "(((codes >> 1).astype('<i2') ^ -(codes & 1).astype('<i2')) * scale[:, None]) "
            "@ rotation + offset",
            "bf16": "(codes.astype('<u4') << 16).view('<f4')",
            "fp16": "codes.astype('<f4')",
            "fp32": "codes",
        }[self.kind]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What one site's rows look like, from a fixed sample of the train split.

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

    channel_D: np.ndarray | None = None
    """float32 [D]: the multiple of the step that each channel takes, a power of two (`fvu` only; None
    in datasets of format 1, where it is 1)."""

    @cached_property
    def loud_D(self) -> np.ndarray | None:
        """`channel_D` where some channel's multiple is not 1, else None: the usual arithmetic leaves it out."""
        return None if self.channel_D is None or (self.channel_D == 1).all() else self.channel_D

    @cached_property
    def rotated_offset_D(self) -> np.ndarray:
        """float32 [D]: the offset in the coordinates of the principal components (`rotated` only)."""
        assert self.rotation_DD is not None
        return (self.rotation_DD.astype(np.float64) @ self.offset_D).astype(np.float32)

    @property
    def step2_D(self) -> np.ndarray | float:
        """Square of each channel's step."""
        return (
            self.step**2 if self.channel_D is None else (self.step * self.channel_D.astype(np.float64)) ** 2
        )


class _Rows:
    """Some rows of a matrix in parts, which are copies where rows between them are left out."""

    def __init__(self, acts_ND: np.ndarray, row_M: np.ndarray) -> None:
        self._acts_ND, self._row_M = acts_ND, row_M
        self._all = len(row_M) == len(acts_ND)

    def __len__(self) -> int:
        return len(self._row_M)

    def __iter__(self) -> Iterator[np.ndarray]:
        n_rows = max(1, _PART_VALUES // max(1, self._acts_ND.shape[1]))
        for i in range(0, len(self), n_rows):
            part = slice(i, i + n_rows)
            yield self._acts_ND[part] if self._all else self._acts_ND[self._row_M[part]]

    def every(self, n: int, first: int = 0) -> "_Rows":
        """Every n-th of them from `first` on."""
        return _Rows(self._acts_ND, self._row_M[first::n])


def calibrate(acts_ND: np.ndarray, precision: Precision) -> Calibration:
    """Choose offset, step and channels' multiples so that the noise is at most `precision.fvu` of the core variance.

    Deterministic; float64 sums. Beside the rows it takes memory for some thousand of them; 65,536 rows
    of d 4096 take some seconds of one core (`rotated`: minutes, for the rotation).

    Raises:
        NonFiniteActivation: names the first bad row.
        SpecError: no step keeps the noise.
    """
    check_finite(acts_ND, "calibration row")
    if precision.quantised:
        check_range(acts_ND, np.arange(len(acts_ND)), precision.rotated)
    median_D = _medians(acts_ND[:: max(1, -(-len(acts_ND) // _SAMPLE_ROWS))])
    all_rows = _Rows(acts_ND, np.arange(len(acts_ND)))
    distance2_N = np.concatenate([squared_distance(part_ND, median_D) for part_ND in all_rows])
    radius2 = float(CORE_RADIUS * np.median(distance2_N))
    core = _Rows(acts_ND, np.flatnonzero(distance2_N <= radius2))
    mean_D = sum(part_MD.sum(axis=0, dtype=np.float64) for part_MD in core) / len(core)
    offset_D = mean_D.astype(np.float32)
    core_variance = sum(_sum_of_squares(part_MD - offset_D) for part_MD in core) / len(core)
    step, rotation_DD, channel_D = 0.0, None, None
    if precision.quantised:
        if precision.rotated:
            rotation_DD = _principal_components(core.every(2), mean_D)
            # rows that the rotation was not fitted to: it flatters its own
            held_out = core.every(2, first=1)
            projected_MD = np.empty((len(held_out), len(offset_D)), np.float32)
            at = 0
            for part_MD in held_out:
                projected_MD[at : at + len(part_MD)] = project(part_MD, offset_D, rotation_DD)
                at += len(part_MD)
            step = _widest_step(projected_MD, core_variance, precision)
        else:
            step, channel_D = _choose_step(core, offset_D, core_variance, precision)
    return Calibration(
        offset_D=offset_D if precision.quantised else np.zeros_like(offset_D),
        step=step,
        median_D=median_D,
        radius2=radius2,
        n_rows=len(acts_ND),
        n_core=len(core),
        core_variance=core_variance,
        rotation_DD=rotation_DD,
        channel_D=channel_D,
    )


def _medians(acts_ND: np.ndarray) -> np.ndarray:
    """float32 [D]: of each channel."""
    n = max(1, _PART_VALUES // max(1, len(acts_ND)))
    return np.concatenate(
        [np.median(acts_ND[:, i : i + n], axis=0).astype(np.float32) for i in range(0, acts_ND.shape[1], n)]
    )


def _sum_of_squares(values_ND: np.ndarray) -> float:
    return float(np.einsum("nd,nd->", values_ND, values_ND, dtype=np.float64))


def _formula_step(core_variance: float, d_in: int, fvu: float) -> float:
    """The uniform step whose noise, a twelfth of its square a channel, is `_MARGIN * fvu`."""
    return max(float(np.sqrt(12 * _MARGIN * fvu * core_variance / d_in)), _TINY_STEP)


def _choose_step(
    core: _Rows, offset_D: np.ndarray, core_variance: float, precision: Precision
) -> tuple[float, np.ndarray]:
    """The formula's step, and the multiples of it that loud channels take.

    A smaller step where the noise is more than the formula says: some core rows need a multiple of it, or
    values are so few that their errors are not uniform. The multiples of channels come first: where a channel
    is ten times as loud as the others, most rows would need a multiple.

    Raises:
        SpecError: no step keeps the noise, since single values dwarf their rows.
    """
    fvu, least = precision.fvu, np.inf
    formula = _formula_step(core_variance, len(offset_D), fvu)
    sample = core.every(max(1, -(-len(core) // _SAMPLE_ROWS)))
    n_rescaled = 0
    for shrink in _SHRINKS:
        for step, channel_D in _candidates(sample, offset_D, formula * shrink):
            noise, rescaled = _noise(core, offset_D, step, precision, channel_D)
            allowed = (0.98 if rescaled else 1.0) * fvu * core_variance * len(core)
            if noise <= allowed:
                return step, channel_D
            n_rescaled += rescaled
            least = min(least, noise)
    if not n_rescaled:  # what is left is float32's own rounding of rows far from zero
        return float(np.float32(formula)), np.ones_like(offset_D)
    raise SpecError(
        f"int8 codes reach FVU {least / (core_variance * len(core)):.2g} at this site, wanted {fvu:g}: single values "
        f"dwarf their rows. Store it as rotated:{fvu:g} or bf16, or accept a larger fvu"
    )


def _candidates(sample: _Rows, offset_D: np.ndarray, uniform: float) -> Iterator[tuple[float, np.ndarray]]:
    """Steps with multiples of channels, all of the noise that the step `uniform` has alone; it comes last."""
    plain_D = np.ones_like(offset_D)
    step, channel_D = uniform, plain_D
    while True:
        raised_D = _loud_channels(sample, offset_D, step, channel_D)
        if (raised_D == channel_D).all():
            break
        channel_D = raised_D
        step = uniform / float(np.sqrt(np.mean(np.square(channel_D, dtype=np.float64))))
    if channel_D is not plain_D:
        yield float(np.float32(step)), channel_D
    yield float(np.float32(uniform)), plain_D


def _loud_channels(sample: _Rows, offset_D: np.ndarray, step: float, channel_D: np.ndarray) -> np.ndarray:
    """`channel_D`, or more where too many rows would need a multiple of the step because of one channel.

    A row's multiple raises the noise of all its channels, a channel's that of all its rows. With M the sum of
    all squared multiples, doubling m adds 3 m^2 to the noise of each row; where it keeps a share s of the rows
    from being doubled, it takes away 3 s M. So the two are even at s = m^2 / M; a quarter of that is enough
    here, for rows without a multiple.
    """
    channels, powers, n_rows = [], [], 0
    factor = np.float32(1 / (step * (MAX_CODE["fvu"] + 0.49)))
    for part_MD in sample:
        with np.errstate(over="ignore"):
            ratio_MD = np.abs(part_MD - offset_D) * factor
        row, channel = np.nonzero(ratio_MD > channel_D)
        channels.append(channel)
        powers.append(np.ceil(np.log2(ratio_MD[row, channel], dtype=np.float64)))
        n_rows += len(part_MD)
    channel_K, power_K = np.concatenate(channels), np.minimum(np.concatenate(powers), _MOST_POWER)
    power_D = np.log2(channel_D, dtype=np.float64)
    while True:
        over_K = power_K > power_D[channel_K]
        excess_K = 4.0 ** (power_K - power_D[channel_K])[over_K]
        excess_D = np.bincount(channel_K[over_K], excess_K, minlength=len(power_D)) / n_rows
        raised_D = power_D + (excess_D > 4.0**power_D / np.sum(4.0**power_D))
        if (raised_D == power_D).all() or np.mean(4.0**raised_D) > _MOST_NOISE:
            return np.exp2(power_D).astype(np.float32)
        power_D = raised_D


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
        return _noise([rows_MD], centre_D, step(k), precision)[0] / (core_variance * len(rows_MD))

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
    parts: Iterable[np.ndarray],
    offset_D: np.ndarray,
    step: float,
    precision: Precision,
    channel_D: np.ndarray | None = None,
) -> tuple[float, bool]:
    """Squared error of quantising, summed in float64, and whether any row needed a multiple of the step."""
    noise, rescaled, max_code = 0.0, False, MAX_CODE[precision.kind]
    if channel_D is not None and (channel_D == 1).all():
        channel_D = None
    for rows_ND in parts:
        for part, codes_ND, scale_N in quantised_pieces(
            rows_ND, offset_D, step, max_code, channel_D=channel_D
        ):
            error_ND = codes_ND * scale_N[:, None]
            if channel_D is not None:
                error_ND *= channel_D
            error_ND += offset_D
            error_ND -= rows_ND[part]
            noise += _sum_of_squares(error_ND)
            rescaled = rescaled or bool((scale_N != np.float32(step)).any())
    return noise, rescaled


def _principal_components(rows: _Rows, mean_D: np.ndarray) -> np.ndarray:
    """float32 [D, D]: principal components as rows, by falling variance, largest entry of each positive."""
    d_in = len(mean_D)
    covariance_DD = np.zeros((d_in, d_in))
    for part_MD in rows:
        centred_MD = part_MD - mean_D
        covariance_DD += centred_MD.T @ centred_MD
    components_DD = np.linalg.eigh(covariance_DD)[1].T[::-1]
    largest_D = components_DD[np.arange(d_in), np.abs(components_DD).argmax(axis=1)]
    return np.ascontiguousarray(components_DD * np.sign(largest_D)[:, None], dtype=np.float32)


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
    c = calibration
    if precision.rotated:
        assert c.rotation_DD is not None
        return quantise_rotated(acts_ND, c.offset_D, c.step, c.rotation_DD, scale_N)
    if precision.quantised:
        return quantise(acts_ND, c.offset_D, c.step, scale_N, c.loud_D)
    check_finite(acts_ND, "row")
    if precision.kind == "bf16":
        codes_ND = to_bf16_bits(acts_ND)
        check_finite(decode(codes_ND, None, None, precision), "row rounded to bf16:")
    else:
        with np.errstate(over="ignore"):
            codes_ND = acts_ND.astype(precision.dtype)
        check_finite(codes_ND, f"row in {precision.kind}:")
    return codes_ND, None


def decode(
    codes_ND: np.ndarray,
    scale_N: np.ndarray | None,
    calibration: Calibration | None,
    precision: Precision,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """float32 rows [N, D], in `out` if given; the same arithmetic as the recorded decode line.

    `calibration` may be None for lossless precisions. Fresh memory costs as much as the arithmetic: 900
    Mval/s without `out`, 2,700 with it (int8 codes).
    """
    if out is None:
        out = np.empty(codes_ND.shape, np.float32)
    if precision.quantised:
        assert scale_N is not None
        assert calibration is not None
        if precision.rotated:
            assert calibration.rotation_DD is not None
            decode_rotated(codes_ND, scale_N, calibration.offset_D, calibration.rotation_DD, out)
        else:
            decode_plain(codes_ND, scale_N, calibration.offset_D, out, calibration.loud_D)
    elif precision.kind == "bf16":
        bits_ND = out.view(np.uint32)
        np.copyto(bits_ND, codes_ND)
        bits_ND <<= 16
    else:
        np.copyto(out, codes_ND)
    return out


def decode_components(codes_ND: np.ndarray, scale_N: np.ndarray, calibration: Calibration) -> np.ndarray:
    """float32 rows [N, D] in the coordinates of the principal components: `decode`'s rows @ rotation.T.

    Equal to that product up to rounding, without making it.
    """
    out = np.empty(codes_ND.shape, np.float32)
    decode_rotated_components(codes_ND, scale_N, calibration.rotated_offset_D, out)
    return out
