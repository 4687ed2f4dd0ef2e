"""torch's scaled_dot_product_attention: dense by backend, and by an explicit mask where it fits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from sparseattn.bench_tools import SDPA_BACKENDS, sdpa

from .problem import DENSE, TILE, Offer, Problem, own_keys

NAME = "torch SDPA"
LONGEST_MASK = 4096  # tokens


def available(device: torch.device) -> tuple[bool, str]:
    return True, torch.__version__


def offers(problem: Problem) -> Iterator[Offer]:
    q, k, v = problem.q, problem.k, problem.v
    if problem.kind == DENSE:
        for name, backend in SDPA_BACKENDS[q.device.type].items():
            yield Offer(name, partial(sdpa, q, k, v, backend))
    elif problem.tokens <= LONGEST_MASK:
        mask = explicit_mask(problem)
        yield Offer(
            "SDPA, mask",
            lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
            prepared="the mask",
        )


def explicit_mask(problem: Problem) -> torch.Tensor:
    """bool ``[1, heads, tokens, tokens]``."""
    n, device = problem.tokens, problem.q.device
    mask = torch.zeros(1, problem.heads, n, n, dtype=torch.bool, device=device)
    for head in range(problem.heads):
        for tile in range(n // TILE):
            mask[0, head, TILE * tile : TILE * (tile + 1), own_keys(problem, head, tile)] = True
    return mask & torch.ones(n, n, dtype=torch.bool, device=device).tril()
