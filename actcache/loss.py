"""The LM's next-token loss, counted where rows are: at kept positions that have a next token.

Shapes: B sequences, T tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


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
    start again, another document begins: its first token is no label.
    """
    logits_BTV = model(input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False).logits
    positions_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
    inside_BT = positions_T + 1 < length_B.to(input_ids_BT.device)[:, None]
    counted_BT = (kept_BT.to(input_ids_BT.device) & inside_BT)[:, :-1]
    if position_ids_BT is not None:
        counted_BT = counted_BT & (position_ids_BT[:, 1:] > 0)
    loss = cross_entropy(
        logits_BTV[:, :-1][counted_BT].float(), input_ids_BT[:, 1:][counted_BT], reduction="sum"
    )
    return float(loss), int(counted_BT.sum())
