"""Whether two datasets hold the same rows, as plain zarr reads them."""

import hashlib

import numpy as np
import zarr


def array_digests(url):
    """sha256 of every array as plain zarr reads it."""
    out = {}
    for split, group in zarr.open_group(url, mode="r").groups():
        for path, node in group.members(max_depth=None):
            if isinstance(node, zarr.Array):
                out[f"{split}/{path}"] = hashlib.sha256(np.ascontiguousarray(node[:]).tobytes()).hexdigest()
    return out
