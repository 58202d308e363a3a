"""Language models: found, loaded and told apart.

Which files a model name means and their exact revision, its config, weights and tokenizer. This is
where `transformers` is imported. It hooks nothing: see `actcache.capture`.
"""

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .errors import SpecError
from .spec import LM_DTYPES

_LOG = logging.getLogger(__name__)

_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_HASHED_SUFFIXES = (".json", *_WEIGHT_SUFFIXES, ".model", ".txt")
_BUNDLED = "bundled:"
_COMMIT = re.compile("[0-9a-f]{40}")

# Auto class of transformers and its table {model type: class}; the first that fits the checkpoint loads it.
_CAUSAL, _MASKED, _BODY = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel"
_TABLES = {
    _CAUSAL: "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    _MASKED: "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    _BODY: "MODEL_MAPPING_NAMES",
}
_BIDIRECTIONAL = ("xlnet",)  # filed under causal LMs, but every position reads every other


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
    """Where token ids go in: the device of the first block, where the model is spread over several."""
    lm_dtype: str

    @property
    def is_causal(self) -> bool:
        """Whether no position is known to read a later one. Where it is not, padding needs an attention mask."""
        return is_causal(self.model.config)

    @property
    def predicts_next_token(self) -> bool:
        """Whether a next-token loss means anything: it is causal and has an unembedding."""
        return self.is_causal and self.model.get_output_embeddings() is not None

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
    """Load a model of token ids from a local directory, the hub, or the package (`bundled:stdlib-gpt2`).

    A checkpoint of a causal or masked LM is loaded with its head; of any other, the body alone, so that
    module paths start inside it.

    The dtype is always explicit: "auto" would give fp16 for a 16-bit checkpoint without a word. Attention
    is SDPA where the class supports it and eager elsewhere, and eager for models with attention
    softcapping (Gemma 2), which SDPA leaves out. For a local directory `revision` is checked, not chosen.
    Device "auto" spreads the blocks over all GPUs that this process sees, by accelerate.

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
    if device == "meta":
        raise SpecError("device is 'meta', where nothing is computed; give cpu, cuda or auto.")
    if device == "auto":
        if find_spec("accelerate") is None:
            raise SpecError(
                "device 'auto' spreads a model over GPUs by accelerate, which is not installed; "
                "pip install accelerate, or name one device."
            )
        options["device_map"] = "auto"
    with _quiet(), _one_line(f"the model {model!r} cannot be loaded"):
        hf_model, info = _auto_class(model, config).from_pretrained(source, **options)
    _check_loaded(model, type(hf_model).__name__, info)
    _check_input(model, hf_model)
    # Padding is known by length here; by id, GPT-2 warns about (and waits for the GPU over) every
    # batch that starts or ends with EOS.
    hf_model.config.get_text_config().pad_token_id = None
    hf_model.requires_grad_(False).eval()
    if device == "auto":
        return LM(hf_model, model_id, revision, _spread_over(model, hf_model), lm_dtype)
    try:
        hf_model.to(device)
    except (RuntimeError, AssertionError) as err:
        raise SpecError(
            f"the model {model!r} cannot be put on device {device!r}: {_first_line(err)}"
        ) from err
    return LM(hf_model, model_id, revision, device, lm_dtype)


def _spread_over(model: str, hf_model: Any) -> str:
    """The device where token ids go in; refuses weights left behind on CPU or disk."""
    places = set(getattr(hf_model, "hf_device_map", {}).values())  # absent where one device holds it all
    if len(places) > 1 and places & {"cpu", "disk"}:
        raise SpecError(
            f"the model {model!r} does not fit on the GPUs that this process sees "
            f"({torch.cuda.device_count()}); give each worker more of them."
        )
    return str(hf_model.get_input_embeddings().weight.device)


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
    source, revision = _harvested_source(harvested, model)
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
    _check_revision(harvested, lm.model_id, lm.revision)


def check_at_hand(harvested: Mapping[str, Any], model: str | None, most_bytes: int) -> None:
    """Refuse what `load_harvested_lm` would refuse, as far as that is known without loading the weights.

    The revision of a local directory is compared if its files have at most `most_bytes`; they are read once.

    Raises:
        SpecError: no such model, or another revision than the one that was harvested.
    """
    source, revision = _harvested_source(harvested, model)
    if revision is None:
        found = cheap_revision(source, None, most_bytes)
        if found is not None:
            _check_revision(harvested, model_name(source), found)
    lm_config(source, revision)


def _harvested_source(harvested: Mapping[str, Any], model: str | None) -> tuple[str, str | None]:
    """Where the LM of a dataset is, and its revision if that is a hub."""
    source = model or harvested["id"]
    if _local_directory(source) is not None:
        return source, None
    revision = harvested["revision"]  # a hub has every revision
    if not _COMMIT.fullmatch(revision):
        raise SpecError(
            f"the dataset came from a local directory {harvested['id']!r} ({revision[:20]}...), not from a hub "
            "model; give that directory as the model."
        )
    return source, revision


def _check_revision(harvested: Mapping[str, Any], model_id: str, revision: str) -> None:
    wanted = harvested["revision"]
    if revision != wanted:
        raise SpecError(
            f"the dataset holds activations of {harvested['id']} at revision {wanted[:20]}, but {model_id} "
            f"is at {revision[:20]}. Give the model that was harvested."
        )


def _attention(config: Any) -> str | None:
    """Attention kernel to ask for; None leaves it to transformers (SDPA where the class supports it)."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def _auto_class(model: str, config: Any) -> Any:
    """The Auto class that loads a checkpoint: by the class that wrote it, else by its model type."""
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        raise SpecError(
            f"{model!r} is an encoder-decoder ({config.model_type}); only models that read one sequence of "
            "token ids can be harvested."
        )
    known = {auto: _table(auto)[config.model_type] for auto in _TABLES if config.model_type in _table(auto)}
    if not known:
        raise SpecError(
            f"{model!r} has model type {config.model_type}, of which transformers {transformers.__version__} "
            "has no model that reads token ids."
        )
    written_by = (config.architectures or [None])[0]
    for auto, name in known.items():
        if written_by == name:
            return getattr(transformers, auto)
    if written_by is not None and hasattr(transformers, written_by) and _BODY in known:
        return getattr(transformers, _BODY)  # a classifier, say: its head is of no use here
    if _MASKED in known and not getattr(config, "is_decoder", False):
        return getattr(transformers, _MASKED)
    return getattr(transformers, next(iter(known)))


def _table(auto: str) -> Mapping[str, Any]:
    from transformers.models.auto import modeling_auto

    table: Mapping[str, Any] = getattr(modeling_auto, _TABLES[auto])
    return table


def is_causal(config: Any) -> bool:
    """Whether a model of this config is known to let no position read a later one."""
    text = config.get_text_config()
    if text.model_type in _BIDIRECTIONAL or getattr(text, "is_causal", True) is False:
        return False
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return False
    if config.model_type in _table(_MASKED):
        return bool(getattr(text, "is_decoder", False))
    return any(kind in _table(_CAUSAL) for kind in (config.model_type, text.model_type))


def _check_input(model: str, hf_model: Any) -> None:
    if hf_model.main_input_name != "input_ids":
        raise SpecError(
            f"{model!r} is a {type(hf_model).__name__}, which reads {hf_model.main_input_name}; only models "
            "that read token ids can be harvested."
        )


def _check_loaded(model: str, kind: str, info: Mapping[str, Any]) -> None:
    """Transformers fills weights that it does not find with random numbers and only logs it; refuse that."""
    for what, keys in (
        ("lacks weights for", info["missing_keys"]),
        ("has other shapes for", info["mismatched_keys"]),
    ):
        if keys:
            some = ", ".join(sorted(str(key) for key in keys)[:3])
            raise SpecError(
                f"the checkpoint {model!r} {what} {len(keys)} tensors ({some}); it is not a whole {kind}."
            )
    if info["unexpected_keys"]:
        _LOG.info("%s: weights not used: %s", model, sorted(info["unexpected_keys"]))


def skeleton(model: str, revision: str | None = None) -> Any:
    """The model's modules on the meta device, from its config alone: no weights are read or allocated.

    Enough for `site_names`, `resolve_sites` and `site_width`.
    """
    config = lm_config(model, revision)
    with _quiet(), _one_line(f"the model {model!r} cannot be built"), torch.device("meta"):
        hf_model = _auto_class(model, config).from_config(config, attn_implementation=_attention(config))
    _check_input(model, hf_model)
    return hf_model.requires_grad_(False).eval()


def n_embeddings(model: Any) -> int:
    """How many token ids a model takes: the rows of its embedding (works on a `skeleton` too)."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    config = model.config.get_text_config()
    return int(config.vocab_size if weight is None else weight.shape[0])


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
    name = model_name(model)
    if directory is None:
        return model, name, _hub_commit(model, revision)
    found = _directory_digest(directory)
    if revision is not None and revision != found:
        raise SpecError(
            f"{model!r} holds revision {found}, wanted {revision}; point to the directory that has it, or drop the revision."
        )
    return str(directory), name, found


def model_name(model: str) -> str:
    """The model id that `resolve_model` gives; nothing is read."""
    directory = _local_directory(model)
    return model if directory is None or model.startswith(_BUNDLED) else directory.resolve().name


def cheap_revision(model: str, revision: str | None, most_bytes: int) -> str | None:
    """The revision that `resolve_model` gives, or None where that takes reading more than `most_bytes`.

    A revision that is given for a local directory is believed. None too for a directory without weights:
    its digest is not that of the whole model.
    """
    directory = _local_directory(model)
    if directory is not None:
        if revision is not None:
            return revision
        files = _hashed_files(directory)
        whole = any(path.name.endswith(_WEIGHT_SUFFIXES) for path in files)
        if not whole or sum(path.stat().st_size for path in files) > most_bytes:
            return None
    return resolve_model(model, revision)[2]


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
    for path in _hashed_files(directory):
        with path.open("rb") as file:
            total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _hashed_files(directory: Path) -> list[Path]:
    """The config, weight and tokenizer files of a model, by name."""
    files = (path for path in directory.iterdir() if path.name.endswith(_HASHED_SUFFIXES) and path.is_file())
    return sorted(files, key=lambda path: path.name)


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
    from safetensors import SafetensorError

    try:
        yield
    except SpecError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as err:
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
