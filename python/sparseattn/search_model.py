"""The model's side of a search: its attention calls, its prompts, its identity."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_NAME = "sparseattn_search"


@contextmanager
def attention_visitor(model: Any, visit: Any) -> Iterator[None]:
    """Within it the model's attention is SDPA, and ``visit`` sees each layer's call."""
    from transformers import AttentionInterface

    interface = AttentionInterface()
    dense_attention = interface["sdpa"]

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        window = kwargs.get("sliding_window")
        if window is not None and window < key.shape[2]:
            raise ValueError(
                f"model: expected attention over the whole prompt, got a window of {window} keys "
                f"in layer {module.layer_idx} (prompt: {key.shape[2]} tokens)"
            )
        out, weights = dense_attention(module, query, key, value, mask, **kwargs)
        visit(module.layer_idx, query, key, value, kwargs.get("scaling"), out.transpose(1, 2))
        return out, weights

    before, training = model.config._attn_implementation, model.training
    AttentionInterface.register(_NAME, attention)
    try:
        model.eval()
        model.set_attn_implementation(_NAME)
        if model.config._attn_implementation != _NAME:
            raise ValueError(
                f"model: expected one that uses transformers' attention interface, "
                f"got {type(model).__name__}"
            )
        yield
    finally:
        model.set_attn_implementation(before)
        if training:
            model.train()
        AttentionInterface._global_mapping.pop(_NAME, None)


def checked_prompts(prompt_ids: Any, vocab_size: int) -> list[torch.Tensor]:
    """Prompts as int64 [1, L], longest first: the longest decides on sizes."""
    prompts = [prompt_ids] if isinstance(prompt_ids, torch.Tensor) else prompt_ids
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise TypeError(f"prompt_ids: expected a tensor or a list of tensors, got {prompt_ids!r}")
    checked = []
    for number, ids in enumerate(prompts):
        name = f"prompt_ids[{number}]"
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.is_complex():
            got = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise TypeError(f"{name}: expected a tensor of token ids, got {got}")
        if ids.dim() == 1:
            ids = ids[None]
        if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
            raise ValueError(f"{name}: expected shape [L] or [1, L], got {list(ids.shape)}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name}: expected ids in 0..{vocab_size - 1}, got {low}..{high}")
        checked.append(ids.long().cpu())
    return sorted(checked, key=lambda ids: -ids.shape[1])


def digest(ids: torch.Tensor) -> str:
    return f"{ids.shape[1]}:{hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]}"


def fingerprint(model: Any) -> str:
    """Hash of the first values of every weight: tells another checkpoint apart, reads little."""
    total = hashlib.sha256()
    for name, weight in model.named_parameters():
        total.update(f"{name}{tuple(weight.shape)}".encode())
        if weight.device.type != "meta":
            total.update(weight.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]
