"""Activations on their way into training: which sites, on which device, scaled as `Training.input_scale` says.

Knows neither SAEs nor files.

Shapes: N rows, D = d_in.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actcache.errors import SpecError

from .learner import geometric_median
from .rotation import rotation_of
from .streams import Batch, Stream
from .training import InputScale, input_factor


class Inputs:
    """The sites of a run: their statistics, and batches of them ready for the learners.

    Args:
        stream: where statistics come from.
        sites: of the run; one may be named twice.
        rule: how activations are scaled.
        device: where learners want them.
    """

    def __init__(self, stream: Stream, sites: Sequence[str], rule: InputScale, device: torch.device) -> None:
        self.stats = {site: stream.stats(site) for site in dict.fromkeys(sites)}
        self.rotations = {site: rotation_of(stream, site) for site in self.stats}
        self.factors = {site: input_factor(stats, rule) for site, stats in self.stats.items()}
        """What activations of a site are multiplied with."""
        self._batch_size, self._device = stream.batch_size, device
        self._buffers: dict[str, Tensor] = {}

    def d_in(self, site: str) -> int:
        """Width of a site's activations."""
        return len(self.stats[site]["mean"])

    @property
    def rotated(self) -> bool:
        """True if rows come in rotated coordinates."""
        return any(rotation_DD is not None for rotation_DD in self.rotations.values())

    def scaled(self, batch: Batch, n: int) -> dict[str, Tensor]:
        """The first `n` rows of each site, scaled, on the device; valid until the next call.

        Raises:
            SpecError: the batch is of another width than the statistics.
        """
        return {site: self._scaled(batch, site, n) for site in self.stats}

    def _scaled(self, batch: Batch, site: str, n: int) -> Tensor:
        acts_ND: Any = batch[site]
        d_in = self.d_in(site)
        if acts_ND.ndim != 2 or acts_ND.shape[1] != d_in:
            raise SpecError(
                f"a batch of {site} has shape {tuple(acts_ND.shape)}; the stream's statistics say d_in {d_in}. "
                "Open the stream of the dataset that the statistics describe."
            )
        scale = np.float32(self.factors[site])
        if isinstance(acts_ND, Tensor):  # of a stream with a device: scaled where it is
            return acts_ND[:n].to(self._device, torch.float32) * float(scale)
        if site not in self._buffers or len(self._buffers[site]) < n:
            self._buffers[site] = torch.empty(
                max(n, self._batch_size), d_in, pin_memory=self._device.type == "cuda"
            )
        x_ND = self._buffers[site][:n]
        np.multiply(acts_ND[:n], scale, out=x_ND.numpy(), casting="same_kind")
        # the copy has ended before the buffer is written again: each step ends by reading its loss
        return x_ND.to(self._device, non_blocking=True)


def centre(x_ND: Tensor, rule: str) -> Tensor:
    """The first decoder bias that `Training.b_dec_init` names, of the first batch."""
    if rule == "geometric_median":
        return geometric_median(x_ND)
    return x_ND.mean(0) if rule == "mean" else torch.zeros(x_ND.shape[1], device=x_ND.device)


def resolve_site(site: str | None, sites: Sequence[str]) -> str:
    """The site of a config among those of the stream.

    Raises:
        SpecError: it is not there, or none is named and there are several.
    """
    if site is None and len(sites) == 1:
        return sites[0]
    if site is None:
        raise SpecError(
            f"the stream has {len(sites)} sites and the config names none; set site to one of {', '.join(sites)}"
        )
    if site not in sites:
        raise SpecError(
            f"site {site} is not in the stream, which has {', '.join(sites)}; open the stream with it"
        )
    return site


def checked_device(device: torch.device | str) -> torch.device:
    """The device, if it is there.

    Raises:
        SpecError: it is not a device's name, or this machine has none such.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise SpecError(
            f"device {device!s} can not be used here ({str(error).splitlines()[0]}); give cpu, or cuda on a machine "
            "with a GPU and a torch built for it"
        ) from error
    return found
