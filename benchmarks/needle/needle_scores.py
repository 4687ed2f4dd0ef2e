"""What a model scores on the tasks right after its training, and the table of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from needle_package import tasks


@torch.no_grad()
def evaluate(
    model: Any,
    tokenizer: Any,
    lengths: Sequence[int],
    examples: int,
    seed: int,
    names: Sequence[str] = tuple(tasks.TASKS),
) -> dict[str, dict[str, float]]:
    """task -> {length: mean score}; depths spread evenly, dense attention, greedy decoding."""
    device = next(model.parameters()).device
    scores: dict[str, dict[str, float]] = {name: {} for name in names}
    for length in lengths:
        at_once = max(1, min(examples, 262144 // length))
        for name in names:
            depths = [
                None if name == "common_words" else (i + 0.5) / examples for i in range(examples)
            ]
            made = [
                tasks.make(name, tokenizer, length, seed=seed, index=i, depth=depths[i])
                for i in range(examples)
            ]
            total = 0.0
            for start in range(0, examples, at_once):
                some = made[start : start + at_once]
                ids = torch.tensor([e.input_ids for e in some], device=device)
                new = max(e.max_new_tokens for e in some)
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
                texts = tokenizer.batch_decode(out[:, length:])
                total += sum(tasks.score(e, t) for e, t in zip(some, texts, strict=True))
            scores[name][str(length)] = total / examples
    return scores


def table(scores: dict[str, dict[str, float]]) -> str:
    lengths = list(next(iter(scores.values())))
    rows = ["task".ljust(20) + "".join(f"{int(n):>9}" for n in lengths)]
    for name, found in scores.items():
        rows.append(name.ljust(20) + "".join(f"{100 * found[n]:8.1f}%" for n in lengths))
    return "\n".join(rows)
