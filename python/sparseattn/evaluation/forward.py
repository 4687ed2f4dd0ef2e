"""What a model does in an evaluation: greedy answers, next-token losses, the density of its heads.

All prompts of a batch have the same length. A model has been enabled by ``sparseattn.hf`` before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseattn.config import PatternConfig
from sparseattn.demo_measure import VisitedKeys
from sparseattn.hf_arguments import with_cache
from sparseattn.patterns import Pattern
from sparseattn.search_model import attention_visitor

#: Layers, evenly spaced, that density counts.
DENSITY_LAYERS = 8
_LOSS_ROWS = 256  # rows whose fp32 logits exist at a time


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer; none if neither model nor tokenizer names one."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = getattr(tokenizer, "eos_token_id", None)
    if ends is None:
        return []
    return list(ends) if isinstance(ends, (list, tuple)) else [ends]


def first_tokens(tokenizer: Any, text: str, count: int) -> list[int]:
    """At most ``count`` tokens of the text, of which no more than needed is tokenised."""
    ids = list(tokenizer(text[: 8 * count], verbose=False).input_ids)
    if len(ids) < count and len(text) > 8 * count:
        ids = list(tokenizer(text, verbose=False).input_ids)
    return ids[:count]


@torch.no_grad()
def generate(
    model: Any, ids: Tensor, max_new_tokens: int, cache: Any, ends: list[int]
) -> list[list[int]]:
    """Greedy continuations of ``ids`` int64 [B, L], each up to its first end token."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),  # no token is padding
        generation_config=settings,
        **with_cache(model, cache),
    )
    answers = []
    for row in out[:, ids.shape[1] :].tolist():
        stop = next((n for n, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:stop])
    return answers


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """fp32 [B, n] on the CPU: the negative log likelihoods of ``targets [B, n]``."""
    parts = [
        torch.nn.functional.cross_entropy(
            part.float().flatten(0, 1), wanted.flatten(), reduction="none"
        ).view_as(wanted)
        for part, wanted in zip(
            logits.split(_LOSS_ROWS, dim=1), targets.split(_LOSS_ROWS, dim=1), strict=True
        )
    ]
    return torch.cat(parts, dim=1).cpu()


@torch.no_grad()
def prefill_losses(model: Any, ids: Tensor, count: int) -> Tensor:
    """fp32 [B, count]: losses of the last ``count`` tokens of ``ids [B, L]``, in one forward."""
    logits = model(ids, use_cache=False, logits_to_keep=count + 1).logits[:, :-1]
    return _losses(logits, ids[:, -count:])


@torch.no_grad()
def decode_losses(model: Any, ids: Tensor, count: int, cache: Any) -> Tensor:
    """fp32 [B, count]: the same, where those tokens are fed one by one after the others."""
    first = ids.shape[1] - count
    how = {"logits_to_keep": 1, **with_cache(model, cache)}
    logits = [model(ids[:, :first], **how).logits]
    for at in range(first, ids.shape[1] - 1):
        logits.append(model(ids[:, at : at + 1], **how).logits)
    return _losses(torch.cat(logits, dim=1), ids[:, first:])


def densities(model: Any, ids: Tensor, configs: dict[str, PatternConfig]) -> dict[str, float]:
    """Share of the causal pairs that each config visits on one prompt ``ids [1, L]``: the mean over
    heads of at most DENSITY_LAYERS layers, with the q and k of the dense model.

    The model must not be enabled at the time.
    """
    layers = model.config.num_hidden_layers
    step = max(1, layers / DENSITY_LAYERS)
    counted = {int(n * step) for n in range(min(layers, DENSITY_LAYERS))}
    found: dict[str, list[float]] = {name: [] for name in configs}

    def visit(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: Any, dense: Tensor) -> None:
        if layer not in counted:
            return
        group = q.shape[1] // k.shape[1]
        for head in range(q.shape[1]):
            own: dict[Pattern, float] = {}
            for name, config in configs.items():
                pattern = config.layers[layer][head]
                if pattern not in own:
                    kv = head // group
                    visited = VisitedKeys(pattern, q[:, head : head + 1], k[:, kv : kv + 1])
                    own[pattern] = visited.density()
                found[name].append(own[pattern])

    with attention_visitor(model, visit), torch.no_grad():
        model.base_model(input_ids=ids, use_cache=False)
    return {name: sum(values) / len(values) for name, values in found.items()}
