"""The command line options that say what to harvest, for every command that takes a `Spec`."""

import functools
from collections.abc import Callable
from typing import Any

import click

_DEFAULT_SITE = "blocks.3.hook_resid_post"

_OPTIONS = (
    click.option(
        "--model",
        default="bundled:stdlib-gpt2",
        show_default=True,
        metavar="ID",
        help="Hugging Face causal LM: id or directory.",
    ),
    click.option(
        "--model-revision", metavar="REV", help="Hub commit, branch or tag. Default: the newest commit."
    ),
    click.option(
        "--lm-dtype",
        default="float32",
        show_default=True,
        help="What the LM runs in: float32, bfloat16 or float16. Never taken from the checkpoint.",
    ),
    click.option(
        "--corpus",
        "source",
        default="bundled:stdlib",
        show_default=True,
        metavar="SOURCE",
        help="File, glob, directory or URL of text, .jsonl, .parquet or .arrow files; s3:// and hf:// too.",
    ),
    click.option(
        "--format",
        "corpus_format",
        metavar="FORMAT",
        help="What every file of the corpus is, whatever its name: text, jsonl, parquet or arrow. Default: by the names.",
    ),
    click.option(
        "--text-field",
        default="text",
        show_default=True,
        help="Field (jsonl) or column (parquet) with the text.",
    ),
    click.option(
        "--token-field",
        metavar="NAME",
        help="Field with lists of token ids of the model's tokenizer, in place of text.",
    ),
    click.option(
        "--chat-field",
        metavar="NAME",
        help="Field with messages for the tokenizer's chat template, in place of text.",
    ),
    click.option(
        "--strict", is_flag=True, help="Stop at the first malformed document; default: count and report them."
    ),
    click.option(
        "--max-skipped-share",
        type=float,
        default=0.1,
        show_default=True,
        metavar="SHARE",
        help="Stop if more than this share of the documents (and more than 20) cannot be read; empty ones do not count.",
    ),
    click.option(
        "--max-tokens",
        type=int,
        metavar="N",
        help="Take only the first documents of the corpus, until they have N tokens. Default: all.",
    ),
    click.option(
        "--site",
        "sites",
        multiple=True,
        metavar="SITE",
        help="Where to take activations: a TransformerLens name (globs allowed: 'blocks.*.hook_resid_post') or a "
        f"module path with :in or :out; repeat for several. Default for the bundled model: {_DEFAULT_SITE}.",
    ),
    click.option(
        "--context-size", type=int, default=256, show_default=True, metavar="T", help="Tokens in a sequence."
    ),
    click.option(
        "--tokens",
        "n_tokens",
        type=int,
        default=2_000_000,
        show_default=True,
        metavar="N",
        help="Rows wanted for training, rounded up to whole blocks; raise it later to extend the dataset.",
    ),
    click.option(
        "--precision",
        default="fvu:1e-3",
        show_default=True,
        help="fvu:<x> (int8; noise is at most the fraction x of the variance), rotated:<x> (the same noise on "
        "principal components; fewer bits, slower), bf16, fp16 or fp32.",
    ),
    click.option(
        "--block-rows", type=int, metavar="N", help="Rows in a block, the unit of work. Default: 131072."
    ),
    click.option(
        "--packing",
        default="concat",
        show_default=True,
        help="concat: documents joined by EOS and cut; isolated: whole documents side by side, each apart from "
        "the others; single: one document in a sequence, its rest left out.",
    ),
    click.option(
        "--prepend-bos/--no-prepend-bos",
        default=None,
        help="BOS before each sequence (concat) or document. Default: if the tokenizer has one.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of the shuffles."),
)


def spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: give a command the options of a Spec; it gets them as one argument, `spec`."""

    @functools.wraps(command)
    def with_spec(
        *,
        source: str,
        corpus_format: str | None,
        max_skipped_share: float,
        text_field: str,
        token_field: str | None,
        chat_field: str | None,
        strict: bool,
        max_tokens: int | None,
        sites: tuple[str, ...],
        model: str,
        model_revision: str | None,
        lm_dtype: str,
        context_size: int,
        n_tokens: int,
        precision: str,
        block_rows: int | None,
        packing: str,
        prepend_bos: bool | None,
        seed: int,
        **options: Any,
    ) -> Any:
        from .spec import Corpus, Spec

        if not sites:
            if not model.startswith("bundled:"):
                raise click.UsageError(
                    "--site is required for this model, e.g. --site blocks.6.hook_resid_post"
                )
            sites = (_DEFAULT_SITE,)
        corpus = Corpus(
            source,
            format=corpus_format,
            max_skipped_share=max_skipped_share,
            text_field=text_field,
            token_field=token_field,
            chat_field=chat_field,
            strict=strict,
            max_tokens=max_tokens,
        )
        spec = Spec(
            model=model,
            corpus=corpus,
            sites=sites,
            context_size=context_size,
            n_tokens=n_tokens,
            precision=precision,
            lm_dtype=lm_dtype,
            model_revision=model_revision,
            packing=packing,
            prepend_bos=prepend_bos,
            block_rows=block_rows,
            seed=seed,
        )
        return command(spec=spec, **options)

    decorated: Callable[..., Any] = with_spec
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated
