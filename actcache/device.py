"""Quantising, encoding and measuring rows on the device that the LM runs on: codes leave it, not floats.

`DeviceCodec` gives what `codec.encode` and `Statistics.of` give. It only queues kernels; `Encoding.finish`
waits once and gets one small transfer. What is rare (values that are not finite, rows whose squares leave
float32, more large rows than there is room for, scales of another run) is found by flags in that transfer,
and numpy does the batch again: so numpy alone decides what is an error, and how it reads.
`fvu` codes and scales, and those of lossless precisions, are numpy's bit for bit; `rotated` ones differ
where the products' rounding does, by one step at most. Sums are float32 within `SUB_ROWS` rows and float64
above, as in `actcache.statistics`.
Shapes: N rows of an LM batch, R rows of a block, D = d_in, K rows with room for a multiple of the step,
P pieces of rows, S sub-blocks; 2: core rows, and the rest.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .codec import Calibration, Precision, decode, encode
from .errors import SpecError
from .quantise import LARGEST, MAX_CODE
from .statistics import SAFE_PEAKS, SUB_ROWS, Statistics, histogram, merge, merge_moments

_PIECE_VALUES = 2**25  # a float32 temporary of a piece takes 128 MiB; about four live at a time
_LARGE_SHARE = 1 / 32  # of a batch's rows have room for a multiple of the step, until more are met
_STORED = {
    "fvu": torch.int8,
    "rotated": torch.int16,  # torch shifts no uint16; the bits are the same
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
_SCALARS = ("refused", "n_large", "unsafe", "n_core", "max_abs", "sse", "core_sse", "max_error", "rescaled")


class DeviceCodec:
    """Encodes rows of one site. One thread at a time; all kernels go to the current stream."""

    def __init__(
        self,
        calibration: Calibration,
        precision: Precision,
        device: str | torch.device,
        compiled: bool = False,
    ) -> None:
        """Copy the calibration to `device`, "cpu" or a CUDA device (float64 is needed).

        `compiled`: by `torch.compile`, which joins most of some 70 kernels; the first call takes a while.
        Lossless precisions never are.

        Raises:
            SpecError: the device rounds float32 products to TF32.
        """
        self.calibration, self.precision, self.device = calibration, precision, torch.device(device)
        self._median_D = torch.as_tensor(calibration.median_D, device=self.device)
        self._offset_D = torch.as_tensor(calibration.offset_D, device=self.device)
        self._channel_D: Tensor | None = None
        if calibration.loud_D is not None:
            self._channel_D = torch.as_tensor(calibration.loud_D, device=self.device)
        self._rotation_DD: Tensor | None = None
        if precision.rotated:
            self._rotation_DD = torch.as_tensor(calibration.rotation_DD, device=self.device)
        self._share = _LARGE_SHARE
        compiled &= precision.quantised  # Inductor would leave out the rounding to 16 bits: errors of zero
        self._run = torch.compile(self._piece, dynamic=True) if compiled else self._piece
        if self.device.type == "cuda":
            _check_products(self.device, len(calibration.median_D))

    @torch.inference_mode()
    def encode(self, acts_ND: Tensor, given_N: np.ndarray | None = None) -> "Encoding":
        """Queue the work on rows in the LM's dtype; nothing is waited for, errors come by `finish`.

        `acts_ND` must stay as it is until then. `given_N`: scales that another run has stored for these rows.
        """
        if given_N is not None or not acts_ND.numel():
            return Encoding(self, acts_ND, given_N)
        n_rows, d_in = acts_ND.shape
        codes_ND = torch.empty(acts_ND.shape, dtype=_STORED[self.precision.kind], device=acts_ND.device)
        scale_N = torch.empty(n_rows, dtype=torch.float32, device=acts_ND.device)
        rows = max(1, _PIECE_VALUES // (SUB_ROWS * d_in)) * SUB_ROWS
        sums, norms = [], []
        for i in range(0, n_rows, rows):
            piece = slice(i, i + rows)
            n = len(scale_N[piece])
            room = min(n, max(64, int(self._share * n)))
            found, norm_N = self._run(acts_ND[piece], codes_ND[piece], scale_N[piece], room)
            sums.append(found)
            norms.append(norm_N)
        encoding = Encoding(self, acts_ND, None)
        encoding.codes_ND = codes_ND.view(torch.int16) if self.precision.kind == "bf16" else codes_ND
        encoding.scale_N = scale_N if self.precision.quantised else None
        encoding.queue(torch.stack(sums), torch.cat(norms), rows)
        return encoding

    def measure(self, acts_ND: Tensor, codes_ND: np.ndarray, scale_N: np.ndarray | None) -> Statistics:
        """Statistics of codes that another run stored, their error against these rows. By numpy: it waits."""
        calibration = self.calibration
        rows_ND = acts_ND.float().cpu().numpy()
        stored_ND = decode(codes_ND, scale_N, calibration, self.precision)
        return Statistics.of(rows_ND, stored_ND, scale_N, calibration)

    def allow_large_rows(self, share: float) -> None:
        """Give later batches room for this share of rows that take a multiple of the step."""
        self._share = min(1.0, max(self._share, share))

    def _piece(self, acts_ND: Tensor, codes_ND: Tensor, scale_N: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """Fill in codes and scales; returns the sums [len(_SCALARS) + 7 D] and the stored rows' norms."""
        if not self.precision.quantised:
            stored_ND = codes_ND.copy_(acts_ND).float()
            refused = ~torch.isfinite(_peaks(stored_ND)).all()
            zero = refused.new_zeros((), dtype=torch.int64)
            return self._sums(acts_ND, stored_ND, [refused, zero], zero)
        inverse = float(np.float32(1.0 / self.calibration.step))
        if self._rotation_DD is None:
            channel_D = self._channel_D
            scaled_ND = (acts_ND - self._offset_D).mul_(inverse)
            if channel_D is not None:
                scaled_ND /= channel_D

            def centred(row_K: Tensor) -> Tensor:
                return acts_ND[row_K].double() - self._offset_D.double()

            flags = self._rescale(scaled_ND, scale_N, centred, room)
            codes_ND.copy_(scaled_ND.round_())
            stored_ND = scaled_ND.mul_(scale_N[:, None])
            if channel_D is not None:
                stored_ND *= channel_D
            stored_ND += self._offset_D
        else:
            projected_ND = (acts_ND - self._offset_D) @ self._rotation_DD.T
            scaled_ND = projected_ND * inverse
            flags = self._rescale(scaled_ND, scale_N, lambda row_K: projected_ND[row_K].double(), room)
            flags[0] = flags[0] | ~(_peaks(acts_ND) < LARGEST / acts_ND.shape[1]).all()
            signed_ND = scaled_ND.round_().to(torch.int16)
            torch.bitwise_xor(signed_ND << 1, signed_ND >> 15, out=codes_ND)
            stored_ND = torch.matmul(scaled_ND.mul_(scale_N[:, None]), self._rotation_DD, out=projected_ND)
            stored_ND += self._offset_D
        rescaled = (scale_N != np.float32(self.calibration.step).item()).sum()
        return self._sums(acts_ND, stored_ND, flags, rescaled)

    def _rescale(
        self, scaled_ND: Tensor, scale_N: Tensor, centred: Callable[[Tensor], Tensor], room: int
    ) -> list[Tensor]:
        """Set scales, and rows too large for the step to their multiple of it; returns refused, n_large.

        As `codec._quantised_pieces`, in float64. Which rows are large is known on the device only: so
        the K = `room` largest are treated, and left as they were if they are not.
        """
        limit, step = MAX_CODE[self.precision.kind] + 0.49, self.calibration.step
        peak_N = _peaks(scaled_ND)
        n_large = (~(peak_N <= limit)).sum()
        peak_K, row_K = torch.topk(peak_N, room, sorted=False)  # NaN counts as largest
        large_K = ~(peak_K <= limit)
        centred_KD = centred(row_K)
        refused = (large_K & ~(centred_KD.abs().amax(dim=1) < LARGEST)).any()
        if self._channel_D is not None:
            centred_KD = centred_KD / self._channel_D
        centred_peak_K = centred_KD.abs().amax(dim=1)
        multiple_K = torch.where(large_K, _power_of_two_above(centred_peak_K / (limit * step)), 1.0)
        scale_K = (multiple_K * float(np.float32(step))).float()
        scale_N.fill_(step)
        scale_N.index_copy_(0, row_K, scale_K)
        exact_KD = (centred_KD / scale_K.double()[:, None]).float()
        rows_KD = torch.where(large_K[:, None], exact_KD, scaled_ND[row_K])
        scaled_ND.index_copy_(0, row_K, rows_KD)
        return [refused, torch.where(n_large > room, n_large, 0)]

    def _sums(
        self, acts_ND: Tensor, stored_ND: Tensor, flags: list[Tensor], rescaled: Tensor
    ) -> tuple[Tensor, Tensor]:
        difference_ND = acts_ND - self._median_D
        core_N = torch.linalg.vector_norm(difference_ND, dim=1).double().square() <= self.calibration.radius2
        error_ND = torch.sub(stored_ND, acts_ND, out=difference_ND)
        sse_N = torch.linalg.vector_norm(error_ND, dim=1).double().square()
        max_error = _peaks(error_ND).amax()
        core_sse_D = _column_sums(core_N.float()[None], error_ND.square_())
        peak_N, norm_N = _peaks(stored_ND), torch.linalg.vector_norm(stored_ND, dim=1)
        max_abs = peak_N.amax()
        # what numpy sums in float64
        unsafe = ~((max_abs > SAFE_PEAKS[0]) & (max_abs < SAFE_PEAKS[1]))
        unsafe |= ((peak_N > 0) & (norm_N < SAFE_PEAKS[0])).any()
        weight_2N = torch.stack([core_N, ~core_N]).float()
        count_2 = weight_2N.sum(dim=1, dtype=torch.float64)
        centre_2D = (_column_sums(weight_2N, stored_ND) / count_2.clamp(min=1)[:, None]).float()
        shifted_ND = torch.sub(stored_ND, centre_2D[(~core_N).long()], out=error_ND)
        total_2D = _column_sums(weight_2N, shifted_ND)
        square_2D = _column_sums(weight_2N, shifted_ND.square_())
        core_sse = (sse_N * core_N).sum()
        scalars = (*flags, unsafe, count_2[0], max_abs, sse_N.sum(), core_sse, max_error, rescaled)
        sums = [torch.stack([x.double() for x in scalars])]
        sums += [x.double().flatten() for x in (centre_2D, total_2D, square_2D, core_sse_D)]
        return torch.cat(sums), norm_N


class Encoding:
    """Codes of some rows, queued. `codes_ND` and `scale_N`, on the device, hold once `finish` has returned."""

    def __init__(self, codec: DeviceCodec, acts_ND: Tensor, given_N: np.ndarray | None) -> None:
        self._codec, self._acts_ND, self._given_N = codec, acts_ND, given_N
        self.codes_ND: Tensor = acts_ND  # until queued or finished
        self.scale_N: Tensor | None = None
        self._copied: tuple[Tensor, Tensor, Any] | None = None
        self._rows = 0

    def queue(self, sums_P: Tensor, norm_N: Tensor, rows: int) -> None:
        """Queue the copy of sums of pieces of `rows` rows to the host."""
        self._copied = (_to_host(sums_P), _to_host(norm_N), _mark(sums_P.device))
        self._rows = rows

    def finish(self) -> Statistics:
        """Wait for these rows' kernels; call once.

        Raises:
            NonFiniteActivation: a value is not finite, or too large; names the first bad row.
            Conflict: the given scales are of other rows.
        """
        if self._copied is None:
            return self._by_numpy()
        sums_P, norm_N, mark = self._copied
        if mark is not None:
            mark.synchronize()
        sums = sums_P.numpy()
        refused, n_large, unsafe = sums[:, :3].max(axis=0)
        if n_large:
            self._codec.allow_large_rows(4 * float(n_large) / min(self._rows, len(norm_N)))
        if refused or n_large or unsafe or not np.isfinite(sums).all():
            return self._by_numpy()
        norms = [norm_N.numpy()[i : i + self._rows] for i in range(0, len(norm_N), self._rows)]
        self._release()
        return merge([_statistics(*piece) for piece in zip(sums, norms, strict=True)])

    def _by_numpy(self) -> Statistics:
        """The codes again, on the host; its errors are the ones to raise."""
        codec = self._codec
        rows_ND = self._acts_ND.float().cpu().numpy()
        codes_ND, scale_N = encode(rows_ND, codec.calibration, codec.precision, self._given_N)
        statistics = codec.measure(self._acts_ND, codes_ND, scale_N)
        if codec.precision.dtype == np.dtype("<u2"):
            codes_ND = codes_ND.view(np.int16)
        self.codes_ND = to_device(codes_ND, self._acts_ND.device)
        self.scale_N = None if scale_N is None else to_device(scale_N, self._acts_ND.device)
        self._release()
        return statistics

    def _release(self) -> None:
        self._acts_ND, self._copied = self.codes_ND, None


class BlockRows:
    """Codes and scales of one site's rows of a block, gathered in stored order on the device."""

    @torch.inference_mode()
    def __init__(self, codec: DeviceCodec, n_rows: int, d_in: int) -> None:
        self._precision = codec.precision
        dtype = torch.int16 if codec.precision.kind == "bf16" else _STORED[codec.precision.kind]
        self._device: list[Tensor] = [torch.empty((n_rows, d_in), dtype=dtype, device=codec.device)]
        if codec.precision.quantised:
            self._device.append(torch.empty(n_rows, dtype=torch.float32, device=codec.device))
        self._host: list[Tensor] = []
        self._mark: Any = None

    @torch.inference_mode()
    def put(self, place_N: Tensor, encoding: Encoding) -> None:
        """Queue the scatter of finished rows to their places (int64, on the device)."""
        self._device[0].index_copy_(0, place_N, encoding.codes_ND)
        if encoding.scale_N is not None:
            self._device[1].index_copy_(0, place_N, encoding.scale_N)

    @torch.inference_mode()
    def start_copy(self) -> None:
        """Queue the copy to pinned host memory, beside the kernels that are queued after it."""
        device = self._device[0].device
        if device.type != "cuda":
            self._host = self._device
            return
        beside = torch.cuda.Stream(device)
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            self._host = [_to_host(x) for x in self._device]
            self._mark = _mark(device)

    def wait(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Codes [R, D] in `precision.dtype` and scale [R] on the host, when the copy is there; any thread may."""
        if self._mark is not None:
            self._mark.synchronize()
        self._device = []
        codes_RD, *scale = (x.numpy() for x in self._host)
        return codes_RD.view(self._precision.dtype), scale[0] if scale else None


def to_device(array: np.ndarray, device: str | torch.device) -> Tensor:
    """A copy of a host array on the device, queued: through pinned memory, so that nothing waits."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _mark(device: torch.device) -> Any:
    """An event that passes once all that is queued on the current stream is done; None where nothing is queued."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _statistics(sums: np.ndarray, norm_N: np.ndarray) -> Statistics:
    """Of one piece, from its sums."""
    n_scalars = len(_SCALARS)
    scalar = dict(zip(_SCALARS, sums[:n_scalars].tolist(), strict=True))
    *arrays, core_sse_D = sums[n_scalars:].reshape(7, -1)
    centre_2D, total_2D, square_2D = np.reshape(arrays, (3, 2, -1))
    n_rows, n_core = len(norm_N), int(scalar["n_core"])
    counts = np.array([n_core, n_rows - n_core])
    mean_2D = total_2D / np.maximum(counts, 1)[:, None]
    m2_2D = np.maximum(square_2D - total_2D * mean_2D, 0.0)
    mean_2D += centre_2D
    mean_D, m2_D = merge_moments([(int(counts[k]), mean_2D[k], m2_2D[k]) for k in (0, 1)])
    exact_N = norm_N.astype(np.float64)
    bins_K, counts_K = histogram(np.square(exact_N))
    return Statistics(
        n_rows=n_rows,
        mean_D=mean_D,
        m2_D=m2_D,
        norm_sum=float(exact_N.sum()),
        norm_bins_K=bins_K,
        norm_counts_K=counts_K,
        max_abs=scalar["max_abs"],
        n_core=n_core,
        core_mean_D=mean_2D[0],
        core_m2_D=m2_2D[0],
        sse=scalar["sse"],
        core_sse=scalar["core_sse"],
        core_sse_D=core_sse_D,
        max_error=scalar["max_error"],
        rows_rescaled=int(scalar["rescaled"]),
    )


def _peaks(rows_ND: Tensor) -> Tensor:
    """Largest absolute value of each row [N]; NaN where there is one."""
    low_N, high_N = torch.aminmax(rows_ND, dim=1)
    return torch.maximum(high_N, -low_N)


def _column_sums(weight_2N: Tensor, rows_ND: Tensor) -> Tensor:
    """float64 [2, D]: sums over the rows of each weight (there may be one), float32 within `SUB_ROWS` rows."""
    n_rows, d_in = rows_ND.shape
    whole = n_rows - n_rows % SUB_ROWS
    sums_2D = (weight_2N[:, whole:] @ rows_ND[whole:]).double()
    if whole:
        weight_S2N = weight_2N[:, :whole].reshape(len(weight_2N), -1, SUB_ROWS).transpose(0, 1)
        rows_SND = rows_ND[:whole].view(-1, SUB_ROWS, d_in)
        sums_2D += torch.bmm(weight_S2N, rows_SND).sum(dim=0, dtype=torch.float64)
    return sums_2D


def _power_of_two_above(ratio_K: Tensor) -> Tensor:
    """The smallest power of two that is not less, float64; by its bits, since a device's `exp2` may be off."""
    bits_K = ratio_K.view(torch.int64) + (2**52 - 1)
    return ((bits_K >> 52) << 52).view(torch.float64)


def _check_products(device: torch.device, d_in: int) -> None:
    """Refuse TF32, which keeps 10 bits of a factor: codes and variances need all of them."""
    factor = 1 + 2.0**-20
    product = torch.full((256, d_in), factor, device=device) @ torch.eye(d_in, device=device)
    if not bool((product == factor).all()):
        raise SpecError(
            f"{device} rounds float32 products to TF32, which costs more than the codes may; "
            "leave torch.set_float32_matmul_precision at 'highest'"
        )
