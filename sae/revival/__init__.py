"""What is done about latents that never fire, one file each; any of them with any architecture.

AuxK and ghost grads add a loss over the dead latents; resampling replaces their weights.
"""

from .auxk import AuxK
from .dead import Dead
from .ghost import GhostGrads
from .resampling import Resampling

Revival = AuxK | GhostGrads | Resampling

REVIVALS: dict[str, type[Revival]] = {r.kind: r for r in (AuxK, GhostGrads, Resampling)}
"""Name, as on the command line and in `sae.json`, to class."""

__all__ = ["REVIVALS", "AuxK", "Dead", "GhostGrads", "Resampling", "Revival"]
