"""Capture and splice: read activations out of a language model, and put others in their place.

`run_capture` and `splice` hook the same taps (`actcache.families`), so a harvest and an evaluation
cannot disagree about a site. This file also loads models and tokenizers, and settles which revision
was loaded; it is where `transformers` is imported. It knows nothing of corpora, shards or Ray.
Names and conventions of sites: `actcache.families`.
Shapes: B sequences, T tokens, D width of the site.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SpecError
from .families import Tap, find_tap, resolve_sites, site_names
from .spec import LM_DTYPES

__all__ = [
    "LM",
    "check_harvested",
    "lm_config",
    "load_harvested_lm",
    "load_lm",
    "load_tokenizer",
    "resolve_model",
    "resolve_sites",
    "run_capture",
    "site_names",
    "site_width",
    "skeleton",
    "splice",
]

_LOG = logging.getLogger(__name__)

_HASHED_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt")
_BUNDLED = "bundled:"
_COMMIT = re.compile("[0-9a-f]{40}")


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
) -> dict[str, Tensor]:
    """The activations [B, T, D] at `sites`, by one forward pass that stops once it has them all.

    Nothing deeper than the deepest site is computed, in particular no logits. The tensors are on the
    model's device, in its dtype, detached from autograd; they are the model's own where its family is
    known (no family modifies them in place), so two sites may share memory: do not write into them.
    Under `splice` a site shows the replaced value. One forward at a time per model: hooks belong to
    the model, not to a thread. A module that runs more than once in a pass gives its first value.

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
            acts[site] = acts_BTD.clone() if tap.clone else acts_BTD
            if len(acts) == len(taps):
                raise _Stop

        return see

    with ExitStack() as hooks, torch.no_grad():
        for site, tap in taps.items():
            hooks.callback(_register(model, tap, keep(site, tap)).remove)
        try:
            model(input_ids_BT, **_forward_options(model, attention_mask_BT))
        except _Stop:
            pass
        else:
            missing = ", ".join(site for site in taps if site not in acts)
            raise SpecError(
                f"{type(model).__name__} ran to its end without reaching {missing}; choose another site."
            )
    return {site: acts[site].detach() for site in taps}


def _forward_options(model: nn.Module, attention_mask_BT: Tensor | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if attention_mask_BT is not None:
        options["attention_mask"] = attention_mask_BT
    if "use_cache" in signature(model.forward).parameters:
        # A key-value cache would keep every layer's keys and values alive. On the meta device it must be
        # on: without one transformers reads the values of the position ids to look for packed sequences.
        options["use_cache"] = next(model.parameters()).is_meta
    return options


@contextmanager
def splice(model: nn.Module, replacements: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside this context every forward pass of `model` goes on with `fn(acts_BTD)` at each site.

    `fn` gets [B, T, D] on the model's device and returns the same shape, dtype and device; it must not
    write into its argument. Replacing a residual site replaces the residual stream, not only what the
    next norm reads. Autograd goes through. The hooks are gone afterwards, whatever happened inside.

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


def site_width(model: nn.Module, site: str) -> int:
    """Width D of a site, found by a forward pass over one token (works on a `skeleton` too)."""
    parameter = next(model.parameters())
    token_BT = torch.zeros(1, 1, dtype=torch.long, device=parameter.device)
    return run_capture(model, token_BT, [site])[site].shape[-1]


@dataclass(frozen=True)
class LM:
    """A loaded language model (eval mode, no gradients) and what is needed to say which one it is."""

    model: Any
    """The Hugging Face `PreTrainedModel`."""
    model_id: str
    """Hub id, `bundled:NAME`, or the name of a local directory (never its path)."""
    revision: str
    """Commit hash on the hub, or `sha256:...` over a local directory's files."""
    device: str
    lm_dtype: str

    @property
    def n_layers(self) -> int:
        return self._config.num_hidden_layers

    @property
    def d_model(self) -> int:
        return self._config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    @property
    def max_context(self) -> int | None:
        """Longest sequence the model's positions allow, in tokens; None when nothing bounds it."""
        return getattr(self._config, "max_position_embeddings", None)

    @property
    def attn_implementation(self) -> str:
        """The attention kernel that runs: provenance, not identity."""
        return self._config._attn_implementation

    @property
    def _config(self) -> Any:
        return self.model.config.get_text_config()


def load_lm(
    model: str,
    *,
    revision: str | None = None,
    lm_dtype: str = "float32",
    device: str = "cpu",
    attn_implementation: str | None = None,
) -> LM:
    """Load a causal LM from a local directory, the hub, or the package (`bundled:stdlib-gpt2`).

    The dtype is always explicit: "auto" would give fp16 for a 16-bit checkpoint without a word. Attention
    is SDPA where the class supports it and eager elsewhere, and eager for models with attention
    softcapping (Gemma 2), which SDPA leaves out. For a local directory `revision` is checked, not chosen.

    Raises:
        SpecError: no such model, revision, dtype or device; weights that are missing or do not fit.
    """
    if lm_dtype not in LM_DTYPES:
        raise SpecError(f"lm_dtype is {lm_dtype!r}; it must be one of {', '.join(LM_DTYPES)}.")
    _, model_id, revision = resolve_model(model, revision)
    config = lm_config(model, revision)
    source, options = _source(model, revision)
    options |= {
        "config": config,
        "dtype": getattr(torch, lm_dtype),
        "attn_implementation": attn_implementation or _attention(config),
        "output_loading_info": True,
    }
    with _quiet(), _one_line(f"the model {model!r} cannot be loaded"):
        from transformers import AutoModelForCausalLM

        hf_model, info = AutoModelForCausalLM.from_pretrained(source, **options)
    _check_loaded(model, info)
    # Padding is known by length here; by id, GPT-2 warns about (and waits for the GPU over) every
    # batch that starts or ends with EOS.
    hf_model.config.get_text_config().pad_token_id = None
    hf_model.requires_grad_(False).eval()
    try:
        hf_model.to(device)
    except (RuntimeError, AssertionError) as err:
        raise SpecError(
            f"the model {model!r} cannot be put on device {device!r}: {_first_line(err)}"
        ) from err
    return LM(hf_model, model_id, revision, device, lm_dtype)


def load_harvested_lm(
    harvested: Mapping[str, Any],
    model: str | None = None,
    *,
    device: str = "cpu",
    attn_implementation: str | None = None,
) -> LM:
    """The LM that a dataset came from: `harvested` is `model` of its identity.

    Args:
        harvested: `id`, `revision` and `lm_dtype`.
        model: where it is, if not at its id: a directory, or another hub id with the same commit.
        device: of the LM.
        attn_implementation: the kernel to run; default: as `load_lm` chooses.

    Raises:
        SpecError: no such model, or another revision than the one that was harvested.
    """
    source, revision = model or harvested["id"], None
    if _local_directory(source) is None:  # a hub has every revision
        revision = harvested["revision"]
        if not _COMMIT.fullmatch(revision):
            raise SpecError(
                f"the dataset came from a local directory {harvested['id']!r} ({revision[:20]}...), not from a hub "
                "model; give that directory as the model."
            )
    dtype = harvested["lm_dtype"]
    lm = load_lm(
        source, revision=revision, lm_dtype=dtype, device=device, attn_implementation=attn_implementation
    )
    check_harvested(lm, harvested)
    return lm


def check_harvested(lm: LM, harvested: Mapping[str, Any]) -> None:
    """Refuse an LM that is not the one of a dataset's identity.

    Raises:
        SpecError: its revision is another.
    """
    wanted = harvested["revision"]
    if lm.revision != wanted:
        raise SpecError(
            f"the dataset holds activations of {harvested['id']} at revision {wanted[:20]}, but {lm.model_id} "
            f"is at {lm.revision[:20]}. Give the model that was harvested."
        )


def _attention(config: Any) -> str | None:
    """Attention kernel to ask for; None leaves it to transformers (SDPA where the class supports it)."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def _check_loaded(model: str, info: Mapping[str, Any]) -> None:
    """Transformers fills weights that it does not find with random numbers and only logs it; refuse that."""
    for what, keys in (
        ("lacks weights for", info["missing_keys"]),
        ("has other shapes for", info["mismatched_keys"]),
    ):
        if keys:
            some = ", ".join(sorted(str(key) for key in keys)[:3])
            raise SpecError(
                f"the checkpoint {model!r} {what} {len(keys)} tensors ({some}); it is not a whole causal LM."
            )
    if info["unexpected_keys"]:
        _LOG.info("%s: weights not used: %s", model, sorted(info["unexpected_keys"]))


def skeleton(model: str, revision: str | None = None) -> Any:
    """The model's modules on the meta device, from its config alone: no weights are read or allocated.

    Enough for `site_names`, `resolve_sites` and `site_width`.
    """
    config = lm_config(model, revision)
    with _quiet(), _one_line(f"the model {model!r} cannot be built"), torch.device("meta"):
        from transformers import AutoModelForCausalLM

        hf_model = AutoModelForCausalLM.from_config(config, attn_implementation=_attention(config))
    return hf_model.requires_grad_(False).eval()


def lm_config(model: str, revision: str | None = None) -> Any:
    """The model's Hugging Face config, without its weights."""
    source, options = _source(model, revision)
    with _quiet(), _one_line(f"the config of {model!r} cannot be read"):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(source, **options)


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """The model's tokenizer.

    Raises:
        SpecError: the model comes without one. (Transformers then makes up an empty tokenizer for
            several families, which turns any text into no tokens.)
    """
    source, options = _source(model, revision)
    missing = f"{model!r} is a model without the tokenizer; save it (tokenizer.json and its config) beside the weights"
    with _quiet(), _one_line(missing):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    words = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens)
    if not words:
        raise SpecError(missing)
    return tokenizer


def resolve_model(model: str, revision: str | None = None) -> tuple[str, str, str]:
    """(directory or hub id to load from, model id, exact revision) of what `model` names.

    A hub id resolves to its commit hash (from the local cache when offline). A local directory
    resolves to `sha256:` over its files, each read once in full, so a moved directory is the same
    model and an edited one is not.

    Raises:
        SpecError: nothing there, or a local directory whose content is not `revision`.
    """
    directory = _local_directory(model)
    if directory is None:
        return model, model, _hub_commit(model, revision)
    found = _directory_digest(directory)
    if revision is not None and revision != found:
        raise SpecError(
            f"{model!r} holds revision {found}, wanted {revision}; point to the directory that has it, or drop the revision."
        )
    return str(directory), model if model.startswith(_BUNDLED) else directory.resolve().name, found


def _source(model: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """Arguments of every `from_pretrained`: an exact revision where there is a hub, never the model's own code."""
    directory = _local_directory(model)
    if directory is not None:
        return str(directory), {"trust_remote_code": False}
    return model, {"trust_remote_code": False, "revision": _hub_commit(model, revision)}


def _local_directory(model: str) -> Path | None:
    """The directory that `model` names, or None for a hub id."""
    if model.startswith(_BUNDLED):
        shelf = Path(__file__).parent / "bundled"
        directory = shelf / model.removeprefix(_BUNDLED)
        have = sorted(f"{_BUNDLED}{path.name}" for path in shelf.glob("*") if path.is_dir())
        if f"{_BUNDLED}{directory.name}" not in have or directory.parent != shelf:
            raise SpecError(f"no model {model!r} in this package; it has {', '.join(have) or 'none'}.")
        return directory
    directory = Path(model).expanduser()
    if model and directory.is_dir():
        return directory
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or not model:
        raise SpecError(f"no model directory {model!r}; give a directory with config.json, or a hub id.")
    return None


def _directory_digest(directory: Path) -> str:
    """`sha256:` over the sorted (name, sha256) of the config, weight and tokenizer files."""
    total = hashlib.sha256()
    for path in sorted(directory.iterdir(), key=lambda path: path.name):
        if path.is_file() and path.name.endswith(_HASHED_SUFFIXES):
            with path.open("rb") as file:
                total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _hub_commit(model: str, revision: str | None) -> str:
    """Commit hash of a hub model's branch or tag; from the local cache when the hub cannot be reached."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    where = f"no directory {model!r}, and no such model"
    try:
        validate_repo_id(model)
    except HFValidationError as err:
        raise SpecError(f"no directory {model!r}, and it is no hub id either ({_first_line(err)})") from err
    try:
        url = hf_hub_url(model, "config.json", revision=revision)
        commit = get_hf_file_metadata(url).commit_hash
    except HfHubHTTPError as err:
        raise SpecError(f"{where} on the hub, or no access to it ({_first_line(err)})") from err
    except Exception as err:  # no network; what it raises depends on the hub library's HTTP client
        # The cache keeps a file under snapshots/<commit>/, whatever branch or tag was asked for.
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
        commit = Path(cached).parent.name if isinstance(cached, str) else None
        if commit is None:
            raise SpecError(
                f"{where} in the hub's cache; the hub cannot be reached ({_first_line(err)})"
            ) from err
    if commit is None:
        raise SpecError(f"the hub names no commit for {model!r}; give its revision as a full commit hash.")
    return commit


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn what transformers and the hub raise about a model into one line that says `what`."""
    try:
        yield
    except SpecError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as err:
        raise SpecError(f"{what} ({_first_line(err)})") from err


def _first_line(err: BaseException) -> str:
    lines = str(err).strip().splitlines()
    return lines[0].strip(" :.") if lines else type(err).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or advice from transformers inside; its settings are put back afterwards."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
