"""SAEs inside a running language model: see latents, edit them, with or without the error term.

The way of HookedSAETransformer (Bloom 2024, SAELens) for Hugging Face models, through the taps that harvest
and evaluation use (`actcache.capture.splice`). Evaluation has its own splicing, of kept rows alone.

Shapes: B sequences, T tokens, D d_in, F d_sae.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from actcache.errors import SpecError

Edit = Callable[[Tensor], Tensor]
"""Latents [B, T, F] to those that are decoded instead; must not write into its argument."""


class Spliced:
    """What `splice` gives: the latents of the last forward pass, and the edits that apply to the next.

    with sae.splice(model, {site: s}, use_error_term=True) as spliced:
        spliced.edits[site] = lambda latents: latents * (torch.arange(s.cfg["d_sae"]) != 17)
        logits = model(input_ids).logits
        spliced.latents[site]  # [B, T, F], as encoded, before the edit
    """

    def __init__(self, sites: Mapping[str, Any], edits: Mapping[str, Edit]) -> None:
        self.saes = dict(sites)
        self.edits = dict(edits)
        """By site; change it between forward passes."""
        self.latents: dict[str, Tensor] = {}
        """By site, [B, T, F]; part of the graph where autograd is on."""


@contextmanager
def splice(
    model: Any,
    saes: Mapping[str, Any],
    use_error_term: bool = True,
    *,
    edits: Mapping[str, Edit] | None = None,
    where_BT: Tensor | None = None,
) -> Iterator[Spliced]:
    """Inside this context every forward pass of `model` goes through the SAEs.

    With the error term the site carries x + decode(edited) - decode(latents): what it did before until a
    latent is edited. Without it, decode(edited). Several sites at once: a later one sees what the earlier
    ones changed. Gradients flow through the SAEs, and through the error term with the value x alone.

    Args:
        model: a Hugging Face model or an `actcache.lm.LM`.
        saes: by site, e.g. {"blocks.3.hook_resid_post": s}.
        use_error_term: add what the SAE leaves out.
        edits: by site; may also be set on what is yielded.
        where_BT: bool; positions that are replaced. Default all, BOS included, which an SAE trained
            without BOS reconstructs badly.

    Raises:
        SpecError: an unknown site, an SAE of another width, an edit of a site without SAE, or an edit or
            mask of a wrong shape (these during the forward pass).
    """
    from actcache.capture import splice as splice_values

    hf_model = getattr(model, "model", model) if hasattr(model, "lm_dtype") else model
    spliced = Spliced(saes, edits or {})

    def through(site: str) -> Callable[[Tensor], Tensor]:
        s = saes[site]

        def replace(acts_BTD: Tensor) -> Tensor:
            _check_edits(spliced)
            wanted = int(s.cfg["d_in"])
            if acts_BTD.shape[-1] != wanted:
                raise SpecError(
                    f"{site} is {acts_BTD.shape[-1]} wide, its SAE {wanted}; give the SAE trained at that site."
                )
            latents_BTF = s.encode(acts_BTD)
            spliced.latents[site] = latents_BTF
            edit = spliced.edits.get(site)
            edited_BTF = latents_BTF if edit is None else edit(latents_BTF)
            if edited_BTF.shape != latents_BTF.shape:
                raise SpecError(
                    f"the edit at {site} gives {list(edited_BTF.shape)}; it must be {list(latents_BTF.shape)}."
                )
            new_BTD = s.decode(edited_BTF)
            if use_error_term:
                new_BTD = acts_BTD.to(new_BTD) + (new_BTD - s.decode(latents_BTF))
            new_BTD = new_BTD.to(acts_BTD)
            if where_BT is None:
                return new_BTD
            if where_BT.shape != acts_BTD.shape[:2]:
                raise SpecError(
                    f"where_BT has shape {list(where_BT.shape)}; the pass has {list(acts_BTD.shape[:2])}."
                )
            return new_BTD.where(where_BT.to(acts_BTD.device)[..., None], acts_BTD)

        return replace

    _check_edits(spliced)
    with splice_values(hf_model, {site: through(site) for site in saes}):
        yield spliced


def _check_edits(spliced: Spliced) -> None:
    unknown = spliced.edits.keys() - spliced.saes.keys()
    if unknown:
        raise SpecError(
            f"an edit is for {', '.join(sorted(unknown))}, where no SAE is; SAEs are at {', '.join(spliced.saes)}."
        )
