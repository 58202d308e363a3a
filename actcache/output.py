"""What a stream's batches are made of: numpy or torch, dtype, device, centring and scaling.

A batch is made in two steps. `stage` runs in a background thread: it decodes, or for an accelerator
copies the codes to pinned memory. `finish` runs in the consumer's thread: it starts the copy to the
device and the decoding there, so codes cross the bus and not floats. Both ways give the same bits.
Shapes: N rows, D = d_in.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .codec import Precision
from .errors import SpecError

if TYPE_CHECKING:
    from .reader import Dataset

_DTYPES = ("float32", "float16", "bfloat16")
_METADATA = ("token_id", "sequence", "position")
_FLOAT16_MAX = 65504.0
TrainStats = Callable[[str], Mapping[str, Any]]
"""Statistics of a site, as `Dataset.stats` gives them."""


@dataclass(frozen=True, eq=False)
class _Transform:
    """rows = (rows - shift) * factor, in float32."""

    shift_D: np.ndarray | None
    factor: np.float32 | None

    def in_place(self, acts_ND: Any) -> Any:
        """Of a numpy array; a torch tensor goes through `_finish_site`."""
        if self.shift_D is not None:
            acts_ND -= self.shift_D
        if self.factor is not None:
            acts_ND *= self.factor
        return acts_ND


class Output:
    """Makes batches of some sites of a dataset.

    Args:
        dataset, sites, metadata: what is served.
        dtype: "float32", "float16" or "bfloat16", or numpy's or torch's object of that name.
        device: None for numpy, else torch's name of the device ("cpu", "cuda:1").
        centre: subtract the mean of the `train` rows.
        unit_norm: divide by the mean norm of the `train` rows; where they are centred, by the root of
            their variance (the root mean square norm of centred rows, which the statistics hold).
        train_stats: the statistics to centre and scale by, of a site; those of `train` by default.
        rotated: rows in the coordinates of the stored principal components, rows @ rotation.T.

    Raises:
        SpecError: an unknown dtype, one that numpy lacks, or one that cannot hold the values; `rotated`
            of rows that are not stored so, or with another change of the rows.
    """

    def __init__(
        self,
        dataset: "Dataset",
        sites: list[str],
        metadata: bool,
        dtype: Any = "float32",
        device: Any = None,
        centre: bool = False,
        unit_norm: bool = False,
        train_stats: TrainStats | None = None,
        rotated: bool = False,
    ) -> None:
        self.sites, self.metadata, self._dataset = sites, metadata, dataset
        self.rotated = rotated
        if rotated:
            _check_rotated(dataset, centre or unit_norm)
        self.dtype = _dtype_name(dtype)
        self._transform: dict[str, _Transform] = {}
        if centre or unit_norm:
            known = train_stats or dataset.split("train").stats
            self._transform = {site: _transform(known(site), site, centre, unit_norm) for site in sites}
        self._torch: Any = None
        self._on_accelerator = False
        if device is not None:
            self._torch = _import_torch()
            self.device = self._torch.device(device)
            self._on_accelerator = self.device.type != "cpu"
        elif self.dtype == "bfloat16":
            raise SpecError('numpy has no bfloat16; give device="cpu" for torch tensors, or use float32')
        if self.dtype == "float16":
            self._check_float16()

    def stage(self, parts: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Everything that can be done before the consumer asks; call it in any thread."""
        staged: dict[str, Any] = {}
        for site in self.sites:
            codes_ND, scale_N = parts[f"{site}/codes"], parts.get(f"{site}/scale")
            staged[site] = self._stage_site(site, codes_ND, scale_N)
        if self.metadata:
            for name in _METADATA:
                staged[name] = parts[name]
                if self._torch is not None:
                    staged[name] = self._tensor(parts[name].astype(np.int64))
        return staged

    def _stage_site(self, site: str, codes_ND: np.ndarray, scale_N: np.ndarray | None) -> Any:
        shared = self._dataset._shared
        if self._on_accelerator and shared.precision.kind in ("fvu", "bf16", "fp16", "fp32"):
            bits_ND = codes_ND.view(np.int16) if shared.precision.kind == "bf16" else codes_ND
            return self._tensor(bits_ND), None if scale_N is None else self._tensor(scale_N)
        decode = shared.decode_components if self.rotated else shared.decode
        acts_ND = decode(site, codes_ND, scale_N)
        if site in self._transform:
            acts_ND = self._transform[site].in_place(acts_ND)
        if self._torch is None:
            return acts_ND.astype(self.dtype, copy=False)
        acts = self._tensor(acts_ND)
        return acts if self._on_accelerator else acts.to(getattr(self._torch, self.dtype))

    def _tensor(self, values: np.ndarray) -> Any:
        """A tensor on the host, in pinned memory where the device copies faster from it."""
        tensor = self._torch.from_numpy(values if values.flags.writeable else values.copy())
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def finish(self, staged: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Activations by site and the row metadata, on the device; call it where they are used."""
        if self._on_accelerator:
            for site in self.sites:
                staged[site] = self._finish_site(site, staged[site])
            if self.metadata:
                staged |= {name: self._to_device(staged[name]) for name in _METADATA}
        rows = {name: staged[name] for name in _METADATA} if self.metadata else None
        return {site: staged[site] for site in self.sites}, rows

    def _finish_site(self, site: str, staged: Any) -> Any:
        torch, shared = self._torch, self._dataset._shared
        if isinstance(staged, tuple):
            codes, scale = self._to_device(staged[0]), staged[1]
            calibration = shared.calibration(site) if shared.precision.quantised else None
            acts = decode_on_device(
                torch,
                codes,
                None if scale is None else self._to_device(scale),
                self._constant(site, "offset", None if calibration is None else calibration.offset_D),
                shared.precision,
                self._constant(site, "channel", None if calibration is None else calibration.loud_D),
            )
            if site in self._transform:
                transform = self._transform[site]
                if transform.shift_D is not None:
                    acts = acts.sub_(self._constant(site, "shift", transform.shift_D))
                if transform.factor is not None:
                    acts = acts.mul_(float(transform.factor))
        else:
            acts = self._to_device(staged)
        return acts.to(getattr(torch, self.dtype))

    def _to_device(self, tensor: Any) -> Any:
        return tensor.to(self.device, non_blocking=True)

    def _constant(self, site: str, name: str, values: np.ndarray | None) -> Any:
        """A vector that stays on the device."""
        if values is None:
            return None
        kept = self.__dict__.setdefault("_constants", {})
        if (site, name) not in kept:
            kept[site, name] = self._torch.from_numpy(values.copy()).to(self.device)
        return kept[site, name]

    def stats(self, stats: Mapping[str, Any], site: str) -> dict[str, Any]:
        """`ds.stats(site)` of the rows as served: mean, variance, mean_norm, max_abs follow the transform.

        Of centred rows `mean_norm` is the root mean square norm. `max_abs` is then an upper bound.
        Of rotated rows `mean` is rotated, and norms are the same. `max_abs` and `max_error` are upper
        bounds. The variance of each component is not known: "total_variance" takes its place, summed
        over them.
        """
        out = dict(stats)
        if self.rotated:
            rotation_DD = self._dataset._shared.calibration(site).rotation_DD
            assert rotation_DD is not None
            out["mean"] = rotation_DD.astype(np.float64) @ out["mean"]
            out["total_variance"] = float(out.pop("variance").sum())
            for name in ("max_abs", "max_error"):
                out[name] *= float(np.sqrt(len(rotation_DD)))
            return out
        if site not in self._transform:
            return out
        transform = self._transform[site]
        factor = 1.0 if transform.factor is None else float(transform.factor)
        out.pop("norm_percentiles", None)
        if transform.shift_D is not None:
            out["mean"] = out["mean"] - transform.shift_D
            out["mean_norm"] = float(np.sqrt(out["variance"].sum() + np.square(out["mean"]).sum()))
            out["max_abs"] = out["max_abs"] + float(np.abs(transform.shift_D).max())
        out["mean"], out["variance"] = out["mean"] * factor, out["variance"] * factor**2
        for name in ("mean_norm", "max_abs", "max_error"):
            out[name] *= factor
        return out

    def _check_float16(self) -> None:
        for site in self.sites:
            largest = self.stats(self._dataset.stats(site), site)["max_abs"]
            if largest > _FLOAT16_MAX:
                raise SpecError(
                    f"{site} reaches {largest:.4g} and float16 holds {_FLOAT16_MAX:g}; "
                    "use dtype bfloat16 or float32, or unit_norm=True"
                )


def decode_on_device(
    torch: Any, codes: Any, scale: Any, offset: Any, precision: Precision, channel: Any = None
) -> Any:
    """float32 rows from stored values on any torch device; the operations, and the bits, of `codec.decode`."""
    if precision.kind == "bf16":
        return codes.view(torch.bfloat16).to(torch.float32)
    acts = codes.to(torch.float32, copy=True)
    if not precision.quantised:
        return acts
    acts = acts.mul_(scale[:, None])
    return (acts if channel is None else acts.mul_(channel)).add_(offset)


def _check_rotated(dataset: "Dataset", changed: bool) -> None:
    precision = dataset._shared.precision
    if not precision.rotated:
        raise SpecError(
            f"{dataset.url} is stored as {precision}, and rotated=True is for rotated:<x>; leave it out"
        )
    if changed:
        raise SpecError("rotated=True goes with neither centre nor unit_norm; sae.train scales by itself")


def _transform(stats: Mapping[str, Any], site: str, centre: bool, unit_norm: bool) -> _Transform:
    norm = float(np.sqrt(stats["variance"].sum())) if centre else stats["mean_norm"]
    if unit_norm and not 0 < norm < np.inf:
        raise SpecError(f"the rows of {site} have norm {norm:g} and cannot be scaled; check the dataset")
    return _Transform(
        stats["mean"].astype(np.float32) if centre else None, np.float32(1 / norm) if unit_norm else None
    )


def _dtype_name(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        try:
            name = np.dtype(dtype).name
        except TypeError:
            name = str(dtype)
    if name not in _DTYPES:
        raise SpecError(f"dtype is {dtype!r}; wanted {', '.join(_DTYPES)}")
    return name


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as err:
        raise SpecError("device= asks for torch tensors; pip install 'actcache[torch]'") from err
    return torch
