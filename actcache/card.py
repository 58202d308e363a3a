"""The README.md of a dataset that was copied somewhere: what Hugging Face shows of it."""

import json

from .reader import Dataset

_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")
_LARGE = ("10B<n<100B", "100B<n<1T", "n>1T")


def dataset_card(dataset: Dataset) -> str:
    """The README.md of a dataset: a YAML header as Hugging Face reads it, then what is stored and how to read it."""
    manifest, spec = dataset.manifest, dataset.spec
    n_rows = sum(size["n_rows"] for size in manifest.splits.values())
    size = (*_SIZES, *_LARGE)[min(max(0, len(str(n_rows)) - 3), 10)]
    header = {
        "pretty_name": f"Activations of {spec.model}",
        "size_categories": [size],
        "tags": ["activations", "sparse-autoencoder", "interpretability", "actcache", "zarr"],
        "viewer": False,
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", ""]
    lines += [f"# Activations of {spec.model}", ""]
    lines += [
        f"Activations of `{spec.model}` (revision `{spec.model_revision}`, run in "
        f"{manifest.identity['model']['lm_dtype']}) on `{spec.corpus}`, context {spec.context_size}, one row a "
        f"token, globally shuffled. Stored as `{spec.precision}` in plain Zarr v3 by actcache; dataset "
        f"`{dataset.id[:12]}`, version {manifest.version}.",
        "",
        "| split | rows | sequences |",
        "|---|---|---|",
    ]
    lines += [f"| {s} | {n['n_rows']:,} | {n['n_sequences']:,} |" for s, n in manifest.splits.items()]
    lines += ["", "| site | width | mean norm | FVU of storing | bits per value |", "|---|---|---|---|---|"]
    for site, extent in manifest.sites.items():
        if not extent.n_blocks["train"]:
            continue
        stats = dataset.split("train").stats(site)
        lines.append(
            f"| {site} | {dataset.d_in(site)} | {stats['mean_norm']:.4g} | {stats['fvu_core']:.2e} | "
            f"{stats['bits_per_value']:.2f} |"
        )
    site = dataset.sites[0]
    lines += [
        "",
        "```python",
        "import actcache",
        "",
        'ds = actcache.open("hf://datasets/USER/NAME")  # or wherever this directory is',
        f'for batch in ds.stream("{site}", batch_size=4096):',
        f'    acts = batch["{site}"]',
        "```",
        "",
        "Or with `zarr` alone; the group's attributes have the line that decodes it:",
        "",
        "```python",
        "import zarr",
        "",
        f'site = zarr.open_group(path, mode="r")["train"]["{site}"]',
        'print(site.attrs["actcache"]["decode"])',
        "```",
        "",
    ]
    return "\n".join(lines)
