"""Tasks with one right and one wrong next token: how much of the LM's preference survives the SAE.

A task is a file of JSON lines with `prompt`, `answer` and `wrong`; both answers are single tokens. The
package has `brackets` (which bracket closes; made for the bundled LM's Python) and `ioi` (indirect object
identification, Wang et al. 2023, arXiv:2211.00593; for GPT-2).

Definitions: logit difference = logit of the answer - logit of the wrong token after the prompt;
    accuracy = share of prompts where the clean difference is positive;
    recovered = (mean difference spliced - ablated) / (clean - ablated), ablated by the train mean: clean 1,
    ablated 0. Every position but BOS is replaced. A task is skipped where the clean LM is right on less
    than 75 % of prompts: there is no preference to lose.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache.errors import SpecError

TASKS = ("brackets", "ioi")
MIN_ACCURACY = 0.75


def read_task(name: str) -> list[dict[str, str]]:
    """Pairs of a task of the package, or of a file of JSON lines.

    Raises:
        SpecError: no such task, or a line without prompt, answer and wrong.
    """
    path = Path(__file__).parent / "pairs" / f"{name}.jsonl" if name in TASKS else Path(name)
    if not path.exists():
        raise SpecError(f"no task {name!r}; give {', '.join(TASKS)} or a file of JSON lines.")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            pair = json.loads(line)
            pairs.append({key: str(pair[key]) for key in ("prompt", "answer", "wrong")})
        except (ValueError, KeyError, TypeError) as err:
            raise SpecError(
                f"{path} line {number} needs prompt, answer and wrong as JSON ({err!r})."
            ) from err
    return pairs


@torch.no_grad()
def logit_difference(
    s: Any, lm: Any, tokenizer: Any, pairs: Sequence[dict[str, str]], mean_D: Tensor
) -> dict[str, Any]:
    """The figures defined above, or {"skipped": why} with the accuracy.

    Args:
        s: the SAE.
        lm, tokenizer: the model.
        pairs: of `read_task`.
        mean_D: mean train row of the site, put in its place by the ablation.

    Raises:
        SpecError: an answer is not one token.
    """
    site = s.cfg["site"]

    def reconstruct(acts: Tensor) -> Tensor:
        recon: Tensor = s(acts.float()).to(acts)
        return recon

    def ablate(acts: Tensor) -> Tensor:
        return mean_D.to(acts).expand_as(acts)

    clean = _differences(lm, tokenizer, pairs, site, None)
    accuracy = sum(d > 0 for d in clean) / len(clean)
    found: dict[str, Any] = {"n": len(clean), "accuracy": accuracy}
    if accuracy < MIN_ACCURACY:
        return {
            **found,
            "skipped": f"the clean LM is right on {accuracy:.0%}; a task needs {MIN_ACCURACY:.0%}",
        }
    spliced = _differences(lm, tokenizer, pairs, site, reconstruct)
    ablated = _differences(lm, tokenizer, pairs, site, ablate)
    means = {
        name: sum(values) / len(values)
        for name, values in (("clean", clean), ("spliced", spliced), ("ablated", ablated))
    }
    possible = means["clean"] - means["ablated"]
    recovered = (means["spliced"] - means["ablated"]) / possible if possible else None
    return {
        **found,
        **means,
        "accuracy_spliced": sum(d > 0 for d in spliced) / len(spliced),
        "recovered": recovered,
    }


def _differences(
    lm: Any,
    tokenizer: Any,
    pairs: Sequence[dict[str, str]],
    site: str,
    replace: Callable[[Tensor], Tensor] | None,
) -> list[float]:
    from contextlib import nullcontext

    from actcache.capture import splice

    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def but_bos(acts_BTD: Tensor) -> Tensor:
        assert replace is not None
        return torch.cat([acts_BTD[:, : len(bos)], replace(acts_BTD[:, len(bos) :])], 1)

    found = []
    for pair in pairs:
        right, wrong = (_one_token(tokenizer, pair[key]) for key in ("answer", "wrong"))
        ids = torch.tensor([[*bos, *tokenizer(pair["prompt"], add_special_tokens=False)["input_ids"]]])
        with nullcontext() if replace is None else splice(lm.model, {site: but_bos}):
            logits_V = lm.model(ids.to(lm.device), use_cache=False).logits[0, -1].float()
        found.append(float(logits_V[right] - logits_V[wrong]))
    return found


def _one_token(tokenizer: Any, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise SpecError(
            f"{text!r} is {len(ids)} tokens to this tokenizer; an answer must be one. Take another task."
        )
    return int(ids[0])
