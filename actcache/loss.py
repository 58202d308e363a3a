"""The LM's next-token loss, counted where rows are: at kept positions that have a next token.

The logits of a batch are many times its activations (Llama 3 at 2,048 tokens and 32 sequences: 34 GB in float32), so they
are made and forgotten in pieces of rows. Shapes: B sequences, T tokens, N rows, D hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

PIECE_VALUES = 2**25
"""Logits that exist at a time: 128 MiB in float32, three times that while their loss is taken."""


def next_token_loss(
    model: Any,
    input_ids_BT: Tensor,
    kept_BT: Tensor,
    length_B: Tensor,
    position_ids_BT: Tensor | None = None,
) -> tuple[float, int]:
    """Sum of cross-entropies in nats, and how many predictions it sums.

    A prediction counts if it is made from a kept position and its label lies inside the sequence.
    Sequences are padded on the right, so a causal model needs no attention mask. Where position ids
    start again, another document begins: its first token is no label. The model's body runs once, by a call of
    the model, so hooks and splices hold.
    """
    positions_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
    inside_BT = positions_T + 1 < length_B.to(input_ids_BT.device)[:, None]
    counted_BT = (kept_BT.to(input_ids_BT.device) & inside_BT)[:, :-1]
    if position_ids_BT is not None:
        counted_BT = counted_BT & (position_ids_BT[:, 1:] > 0)
    label_N = input_ids_BT[:, 1:][counted_BT]
    total = 0.0
    options = {"input_ids": input_ids_BT, "position_ids": position_ids_BT, "use_cache": False}
    for rows, logits_NV in _logits(model, options, counted_BT):
        label = label_N[rows].to(logits_NV.device)
        total += float(cross_entropy(logits_NV.float(), label, reduction="sum"))
    return total, len(label_N)


def _logits(model: Any, options: dict[str, Any], counted_BT: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The logits [n, V] at the counted positions (all but the last of each sequence), some rows at a time."""
    head = model.get_output_embeddings()
    body = getattr(model, model.base_model_prefix, None)
    if head is None or body is None or body is model:
        yield slice(None), model(**options).logits[:, :-1][counted_BT]
        return
    hidden: list[Tensor] = []
    outputs: list[Any] = []

    def first_row(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden.append(args[0])
        return (args[0][:1, :1], *args[1:])

    hooks = [
        head.register_forward_pre_hook(first_row),
        body.register_forward_hook(lambda module, args, output: outputs.append(output)),
    ]
    try:
        model(**options)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(hidden) == len(outputs) == 1, f"{type(model).__name__} calls its head {len(hidden)} times"
    hidden_ND = hidden[0][:, :-1][counted_BT.to(hidden[0].device)]
    n = max(1, PIECE_VALUES // model.config.get_text_config().vocab_size)
    with _returning(body, outputs[0]):
        for start in range(0, len(hidden_ND), n):
            rows = slice(start, start + n)
            hook = head.register_forward_pre_hook(
                lambda module, args, rows=rows: (hidden_ND[rows][None], *args[1:])
            )
            try:
                # not a call of the model, whose hooks would miss what the body does not do again
                yield rows, model.forward(**options).logits[0]
            finally:
                hook.remove()


@contextmanager
def _returning(body: Any, output: Any) -> Iterator[None]:
    """Inside this context a call of `body` returns `output` and computes nothing: what follows it runs again."""
    own = body.__dict__.get("forward")
    body.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own
