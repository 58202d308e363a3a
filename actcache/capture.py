"""Capture and splice: read activations out of a language model, and put others in their place.

`run_capture` and `splice` hook the same taps (`actcache.families`), so a harvest and an evaluation
cannot disagree about a site. It knows nothing of corpora, shards or Ray; models are loaded in `actcache.lm`.
Names and conventions of sites: `actcache.families`.
Shapes: B sequences, T tokens, D width of the site.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SpecError
from .families import Tap, find_tap, resolve_sites, site_names
from .isolation import LIMITS, Trial, largest_move

__all__ = [
    "check_isolation",
    "compile_around",
    "resolve_sites",
    "run_capture",
    "site_names",
    "site_width",
    "site_widths",
    "splice",
]


class _Stop(BaseException):
    """Leaves a forward pass once every wanted site is in hand.

    A BaseException, so that no `except Exception` inside a model takes it for a failure.
    """


def _value(container: Any) -> Tensor | None:
    """The tensor that a module's return value carries: itself, or its first item."""
    if isinstance(container, Tensor):
        return container
    if isinstance(container, Mapping):
        container = tuple(container.values())
    if isinstance(container, tuple | list) and container and isinstance(container[0], Tensor):
        return container[0]
    return None


def _with_value(container: Any, value: Tensor) -> Any:
    """`container` with the tensor that `_value` finds replaced."""
    if isinstance(container, Mapping):  # a ModelOutput is made afresh by each forward
        container[next(iter(container))] = value  # type: ignore[index]
        return container
    if isinstance(container, list | tuple):
        return type(container)([value, *container[1:]])
    return value


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, Tensor] | None:
    """Key and value of a call's first tensor argument."""
    positional: list[tuple[int | str, Any]] = list(enumerate(args))
    return next(((key, x) for key, x in [*positional, *kwargs.items()] if isinstance(x, Tensor)), None)


def _columns(tap: Tap, x: Tensor) -> slice | Tensor:
    assert tap.columns is not None
    if isinstance(tap.columns, range):
        return slice(tap.columns.start, tap.columns.stop)
    return torch.tensor(tap.columns, device=x.device)


def _acts(tap: Tap, site: str, x: Tensor | None) -> Tensor:
    """The site's value [B, T, D] in the tensor that passed its module; a copy only where columns are taken."""
    if x is None or x.ndim < 3:
        found = "no tensor" if x is None else f"a tensor of shape {list(x.shape)}"
        raise SpecError(
            f"{site} carries {found}; a site needs [batch, tokens, width]. Choose another module."
        )
    if tap.columns is not None:
        return x[..., _columns(tap, x)].contiguous()
    return x.flatten(2)


def _register(model: nn.Module, tap: Tap, see: Callable[[Tensor | None], Tensor | None]) -> Any:
    """Hook `tap` so that `see` gets the tensor that passes there; what it returns, if anything, takes its place."""
    module = model.get_submodule(tap.module)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = _argument(args, kwargs)
        new = see(found[1] if found else None)
        if new is None or found is None:
            return None
        key = found[0]
        if isinstance(key, int):
            return (*args[:key], new, *args[key + 1 :]), kwargs
        return args, kwargs | {key: new}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        new = see(_value(output))
        return None if new is None else _with_value(output, new)

    if tap.side == "in":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def run_capture(
    model: nn.Module,
    input_ids_BT: Tensor,
    sites: Sequence[str],
    attention_mask_BT: Tensor | None = None,
    position_ids_BT: Tensor | None = None,
) -> dict[str, Tensor]:
    """The activations [B, T, D] at `sites`, by one forward pass that stops once it has them all.

    Nothing deeper than the deepest site is computed, in particular no logits. The tensors are on the
    device of `input_ids_BT`, also where the model is spread over several, in its dtype, detached from autograd; they are the model's own where its family is
    known (no family modifies them in place), so two sites may share memory: do not write into them.
    Under `splice` a site shows the replaced value. One forward at a time per model: hooks belong to
    the model, not to a thread. A module that runs more than once in a pass gives its first value.
    Where `position_ids_BT` start again at 0 another document begins, and attention stays inside each
    (transformers makes the mask; `check_isolation` sees whether it does for a model).

    Raises:
        SpecError: an unknown site, one that carries no [B, T, D] tensor, or one that the pass did not reach.
    """
    taps = {site: find_tap(model, site) for site in sites}
    if not taps:
        raise SpecError("no site was asked for; name at least one, such as blocks.0.hook_resid_post.")
    acts: dict[str, Tensor] = {}
    shape = input_ids_BT.shape

    def keep(site: str, tap: Tap) -> Callable[[Tensor | None], None]:
        def see(x: Tensor | None) -> None:
            if site in acts:
                return
            acts_BTD = _acts(tap, site, x)
            if acts_BTD.shape[:2] != shape:
                found, wanted = list(acts_BTD.shape), [*shape, "width"]
                raise SpecError(f"{site} has shape {found}; it must be {wanted}. Choose another module.")
            acts[site] = (acts_BTD.clone() if tap.clone else acts_BTD).to(input_ids_BT.device)
            if len(acts) == len(taps):
                raise _Stop

        return see

    with ExitStack() as hooks, torch.no_grad():
        for site, tap in taps.items():
            hooks.callback(_register(model, tap, keep(site, tap)).remove)
        try:
            model(input_ids_BT, **_forward_options(model, attention_mask_BT, position_ids_BT))
        except _Stop:
            pass
        else:
            missing = ", ".join(site for site in taps if site not in acts)
            raise SpecError(
                f"{type(model).__name__} ran to its end without reaching {missing}; choose another site."
            )
    return {site: acts[site].detach() for site in taps}


def _forward_options(
    model: nn.Module, attention_mask_BT: Tensor | None, position_ids_BT: Tensor | None = None
) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if attention_mask_BT is not None:
        options["attention_mask"] = attention_mask_BT
    if position_ids_BT is not None:
        options["position_ids"] = position_ids_BT
    if "use_cache" in signature(model.forward).parameters:
        # A key-value cache would keep every layer's keys and values alive. On the meta device it must be
        # on: without one transformers reads the values of the position ids to look for packed sequences.
        options["use_cache"] = next(model.parameters()).is_meta
    return options


def check_isolation(
    model: Any,
    sites: Sequence[str],
    *,
    context_size: int = 64,
    lm_batch: int = 4,
    causal: bool = True,
    token_ids: Sequence[int] | None = None,
) -> None:
    """Whether documents side by side in a sequence stay apart in this model, with its attention kernel.

    Four sequences are run as a harvest runs them: a whole document, long ones beside short ones and beside documents
    of one token, padding. Each document must come out the same whatever the others are, and as it does alone. Costs
    the forward passes of some fifteen sequences.

    Args:
        context_size: of the harvest: sliding windows and scaled positions begin to matter at some length.
        lm_batch: of the harvest: flash attention keeps documents apart in a batch of one only.
        causal: False if padding must be masked, which takes transformers' own mask of documents away.
        token_ids: what documents are made of; by default the first thousand ids.

    Raises:
        SpecError: the model takes no position ids, or a document's activations depend on its neighbours.
    """
    name = type(model).__name__
    if "position_ids" not in signature(model.forward).parameters:
        raise SpecError(f"{name} takes no position_ids, so packing 'isolated' cannot be had; use 'single'.")
    embedding = model.get_input_embeddings()
    trial = Trial(
        context_size, token_ids or range(min(1000, embedding.num_embeddings)), embedding.weight.device
    )

    def run(ids_BT: Tensor, mask_BT: Tensor, position_BT: Tensor | None) -> dict[str, Tensor]:
        return run_capture(model, ids_BT, sites, None if causal else mask_BT, position_BT)

    def together(ids_ST: Tensor) -> list[dict[str, Tensor]]:
        """By document: its first and last rows [n, D] at each site."""
        rows: list[dict[str, Tensor]] = []
        for first in range(0, len(ids_ST), lm_batch):
            part = slice(first, first + lm_batch)
            acts = run(ids_ST[part], trial.inside_ST[part], trial.position_ST[part])
            of = [d for d in trial.places if first <= d.sequence < first + lm_batch]
            rows += [{site: acts[site][d.sequence - first, d.edges] for site in sites} for d in of]
        return rows

    packed = together(trial.ids_ST)
    changed = [together(trial.with_others(parity)) for parity in (0, 1)]
    neighbours = [changed[d.number % 2][i] for i, d in enumerate(trial.places)]
    alone = []
    for d in trial.places:
        part = slice(d.sequence, d.sequence + 1), slice(d.start, d.stop)
        acts = run(trial.ids_ST[part], trial.inside_ST[part], None)
        alone.append({site: acts[site][0, d.edges - d.start] for site in sites})
    limits = LIMITS.get(next(model.parameters()).dtype, LIMITS[torch.float32])
    ways = "when the others change", "against the document alone"
    for site in sites:
        for found, limit, how in zip((neighbours, alone), limits, ways, strict=True):
            moved = largest_move([rows[site] for rows in packed], [rows[site] for rows in found])
            if not moved <= limit:
                kernel = getattr(model.config, "_attn_implementation", None)
                raise SpecError(
                    f"{name} (attention kernel {kernel}) does not keep documents in one sequence apart at {site}: rows "
                    f"move by {moved:.2g} of their norm {how}, {limit:g} would be rounding. Use packing 'single' or "
                    "another attention kernel."
                )


@contextmanager
def splice(model: nn.Module, replacements: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside this context every forward pass of `model` goes on with `fn(acts_BTD)` at each site.

    `fn` gets [B, T, D] on the site's device and returns the same shape, dtype and device; it must not
    write into its argument. Replacing a residual site replaces the residual stream, not only what the
    next norm reads. Autograd goes through. Of two splices at one site the inner gets what the outer put
    there. The hooks are gone afterwards, whatever happened inside. They belong to the model: a forward
    pass in another thread is spliced too, so one thread at a time may use a model.

    Raises:
        SpecError: an unknown site; a replacement of another shape, dtype or device; or a forward pass
            that ended without reaching a site, and so ran without its replacement.
    """
    taps = {site: find_tap(model, site) for site in replacements}
    reached: set[str] = set()

    def replace_at(site: str, tap: Tap) -> Callable[[Tensor | None], Tensor]:
        fn = replacements[site]

        def see(x: Tensor | None) -> Tensor:
            # The caller's tensor is overwritten below; fn's argument must not change under it.
            acts_BTD = _acts(tap, site, x.clone() if tap.kept_by_caller and x is not None else x)
            assert x is not None
            new_BTD = fn(acts_BTD)
            _check_replacement(site, acts_BTD, new_BTD)
            reached.add(site)
            return _put(tap, x, new_BTD)

        return see

    def finished(module: nn.Module, args: Any, output: Any) -> None:
        missed = ", ".join(site for site in taps if site not in reached)
        if missed:
            raise SpecError(
                f"{type(model).__name__} ran without reaching {missed}; nothing was spliced there."
            )

    with ExitStack() as hooks:
        for site, tap in taps.items():
            hooks.callback(_register(model, tap, replace_at(site, tap)).remove)
        hooks.callback(model.register_forward_pre_hook(lambda module, args: reached.clear()).remove)
        hooks.callback(model.register_forward_hook(finished).remove)
        yield


def _check_replacement(site: str, old_BTD: Tensor, new_BTD: Any) -> None:
    def describe(x: Any) -> str:
        return f"{list(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__

    if describe(old_BTD) != describe(new_BTD):
        raise SpecError(f"the replacement at {site} is {describe(new_BTD)}; it must be {describe(old_BTD)}.")


def _put(tap: Tap, x: Tensor, new_BTD: Tensor) -> Tensor:
    """The tensor that takes the place of `x` in the forward pass."""
    if tap.columns is not None:
        x = x.clone()
        x[..., _columns(tap, x)] = new_BTD
        return x
    if tap.kept_by_caller:
        return x.copy_(new_BTD)
    return new_BTD.reshape(x.shape)


def compile_around(model: nn.Module, sites: Sequence[str]) -> int:
    """Compile the blocks of `model` by `torch.compile`, in place; returns how many modules were compiled.

    Compiled code runs no hooks inside it, so a block that holds one of `sites` is left as it is and its
    parts are compiled instead, down to the site; only these sites can be captured and spliced from then
    on. Values change by rounding. The first pass of each shape compiles, for seconds to minutes.

    Raises:
        SpecError: the model has no list of blocks.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise SpecError(f"{type(model).__name__} has no list of blocks to compile; run it without compile.")
    blocks = max(lists, key=len)
    tapped = [model.get_submodule(find_tap(model, site).module) for site in sites]

    def compiled(module: nn.Module) -> int:
        inner = set(module.modules()) - {module}
        if not inner:
            return 0  # one kernel already
        if inner.isdisjoint(tapped):
            module.forward = torch.compile(module.forward)  # its own hooks stay outside
            return 1
        return sum(compiled(child) for child in module.children())

    return sum(compiled(block) for block in blocks)


def site_width(model: nn.Module, site: str) -> int:
    """Width D of a site, found by a forward pass over one token (works on a `skeleton` too)."""
    return site_widths(model, [site])[site]


def site_widths(model: nn.Module, sites: Sequence[str]) -> dict[str, int]:
    """As `site_width`, of several sites by one pass."""
    parameter = next(model.parameters())
    token_BT = torch.zeros(1, 1, dtype=torch.long, device=parameter.device)
    acts = run_capture(model, token_BT, sites)
    return {site: acts[site].shape[-1] for site in sites}
