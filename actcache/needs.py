"""The memory that one worker of a harvest needs, before it is started: arithmetic over what a Harvester holds.

What a forward pass takes inside the LM is left out, and so is the LM's loss at the end. Used by `actcache plan`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import calibrating
from .codec import Precision
from .harvester import batch_size

_UPLOADS = 8  # objects that are compressed at a time
_LM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes of one worker."""

    lm_bytes: int
    """Weights, on the LM's device."""
    lm_batch: int
    """Sequences in a forward pass for all sites: what was asked for, or what the buffer holds."""
    block_bytes: int
    """One block: codes of all sites, and three LM batches of float32 rows."""
    under_way_bytes: int
    """Blocks under way: the buffer, or one block if that is larger."""
    upload_bytes: int
    """Objects while they are compressed and written: the largest, some at a time, twice each."""
    calibration_bytes: int
    """Rows that calibrate, of as many sites at a time as the buffer holds; before the first block."""

    @property
    def host_bytes(self) -> int:
        """In main memory, the LM left out."""
        return max(self.under_way_bytes + self.upload_bytes, self.calibration_bytes)


def worker_needs(
    skeleton: nn.Module,
    identity: Mapping[str, Any],
    widths: Mapping[str, int],
    bits_per_value: float,
    *,
    lm_batch: int,
    buffer_bytes: int,
) -> Needs:
    """What a worker needs that harvests all these sites at once."""
    precision, block_rows = Precision.parse(identity["precision"]), identity["block_rows"]
    context_size = identity["tokens"]["context_size"]
    width = sum(widths.values())
    batch = batch_size(lm_batch, context_size, width, buffer_bytes)
    block = width * (block_rows * precision.dtype.itemsize + 3 * 4 * batch * context_size)
    groups = calibrating.site_groups(widths, calibrating.ROWS, buffer_bytes)
    gathered = max(sum(calibrating.row_bytes(calibrating.ROWS, widths[s]) for s in sites) for sites in groups)
    shard = int(block_rows * max(widths.values()) * bits_per_value / 8)
    weights = sum(parameter.numel() for parameter in skeleton.parameters())
    return Needs(
        lm_bytes=weights * _LM_BYTES[identity["model"]["lm_dtype"]],
        lm_batch=batch,
        block_bytes=block,
        under_way_bytes=max(block, buffer_bytes),
        upload_bytes=2 * shard * min(_UPLOADS, len(widths)),
        calibration_bytes=gathered,
    )
