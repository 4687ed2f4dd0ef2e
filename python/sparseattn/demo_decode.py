"""Generation after the demo's prompt: dense with torch's cache, and with a ShadowKVCache."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from sparseattn import hf
from sparseattn.hf_arguments import with_cache
from sparseattn.patterns import Pattern
from sparseattn.shadow_cache import ShadowKVCache

TOKENS = 32  # generated
RANK = 160


def measure_decode(model: Any, ids: Tensor, patterns: list[list[Pattern]]) -> dict[str, Any]:
    """Prompt and TOKENS greedy tokens, both ways: tokens a second, bytes of the cache.

    ShadowKV's prompt runs sparse, with the patterns, and both generate the same tokens, those of
    the dense model, so that ``same_top_token`` compares single steps.
    """
    from transformers import DynamicCache

    hf.enable(model)  # dense: torch's own choice of a backend may take 40 ms for each new length
    dense_cache = DynamicCache(config=model.config)
    first = _prefill(model, ids, dense_cache)
    before = _bytes(dense_cache)
    dense_s, dense_tokens, _ = _decode(model, first, dense_cache, None)
    hf.enable(model, patterns, min_length=0)
    budget = max(64, ids.shape[1] // 32 // 8 * 8)
    cache = ShadowKVCache(model.config, rank=RANK, sparse_budget=budget, outlier_chunks=16)
    sparse_first = _prefill(model, ids, cache)
    memory = cache.memory()
    shadow_s, _, picked = _decode(model, first, cache, dense_tokens)
    hf.disable(model)
    pairs = zip([sparse_first, *picked], dense_tokens, strict=True)
    same = [float(a == b) for a, b in pairs]
    counters = cache.counters()
    read = counters["hits"] + counters["misses"]
    return {
        "tokens": TOKENS,
        "rank": RANK,
        "sparse_budget": budget,
        "dense_tokens_per_s": TOKENS / dense_s,
        "shadow_tokens_per_s": TOKENS / shadow_s,
        "dense_cache_bytes": before,
        "shadow_cache_bytes": memory,
        "hit_rate": counters["hits"] / read if read else None,
        "same_top_token": sum(same) / len(same),
    }


def _prefill(model: Any, ids: Tensor, cache: Any) -> int:
    """The most likely token after the prompt."""
    return int(model(ids, logits_to_keep=1, **with_cache(model, cache)).logits[0, -1].argmax())


def _decode(
    model: Any, first: int, cache: Any, given: list[int] | None
) -> tuple[float, list[int], list[int]]:
    """(seconds, tokens fed, most likely tokens) of TOKENS steps: greedy, or along ``given``."""
    fed, picked = [first], []
    start = time.perf_counter()
    for step in range(TOKENS):
        token = torch.tensor([[fed[-1]]], device=model.device)
        logits = model(token, logits_to_keep=1, **with_cache(model, cache)).logits
        picked.append(int(logits[0, -1].argmax()))
        fed.append(picked[-1] if given is None else given[step + 1])
    return time.perf_counter() - start, fed, picked


def _bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def lines(decode: dict[str, Any] | None) -> list[str]:
    """The part of the report as text."""
    if decode is None:
        return ["Generation with ShadowKV was left out: it does not run on this device"]
    memory = decode["shadow_cache_bytes"]
    parts = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in memory.items())
    return [
        f"Generation, {decode['tokens']} tokens: dense {decode['dense_tokens_per_s']:.1f} tokens "
        f"a second, ShadowKV {decode['shadow_tokens_per_s']:.1f} (rank {decode['rank']}, budget "
        f"{decode['sparse_budget']} tokens)",
        f"Cache: dense {decode['dense_cache_bytes'] / 2**20:.1f} MiB, ShadowKV "
        f"{sum(memory.values()) / 2**20:.1f} MiB ({parts})",
        f"Same most likely token in {decode['same_top_token']:.1%} of the steps",
    ]
