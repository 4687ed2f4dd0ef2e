"""The model's side of a search: its attention calls, its prompts, its identity."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

_NAME = "sparseattn_search"


@contextmanager
def attention_replaced(model: Any, attend: Any) -> Iterator[None]:
    """Within it each layer's attention is ``attend(layer, q, k, v, scale, dense)``.

    ``attend`` returns the output ``[B, Hq, L, D]``; ``dense()`` computes SDPA's.
    """
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

        def dense() -> Any:
            return dense_attention(module, query, key, value, mask, **kwargs)[0].transpose(1, 2)

        out = attend(module.layer_idx, query, key, value, kwargs.get("scaling"), dense)
        return out.transpose(1, 2).contiguous(), None

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


def attention_visitor(model: Any, visit: Any) -> AbstractContextManager[None]:
    """Within it the model's attention is SDPA, and ``visit`` sees each layer's call."""

    def attend(layer: int, q: Any, k: Any, v: Any, scale: float | None, dense: Any) -> Any:
        out = dense()
        visit(layer, q, k, v, scale, out)
        return out

    return attention_replaced(model, attend)


def checked_prompts(
    prompt_ids: Any, vocab_size: int, answers: Sequence[int] | None = None
) -> list[tuple[torch.Tensor, int]]:
    """Prompts as int64 [1, L], each with how many of its last tokens are an answer; those with the
    most other tokens first: the first decides on sizes."""
    prompts = [prompt_ids] if isinstance(prompt_ids, torch.Tensor) else prompt_ids
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise TypeError(f"prompt_ids: expected a tensor or a list of tensors, got {prompt_ids!r}")
    if answers is not None and len(answers) != len(prompts):
        raise ValueError(
            f"answers: expected a number for each of {len(prompts)} prompts, got {len(answers)}"
        )
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
        answer = 0 if answers is None else answers[number]
        if not 0 <= answer < ids.shape[1]:
            raise ValueError(
                f"answers[{number}]: expected 0..{ids.shape[1] - 1} of the prompt's "
                f"{ids.shape[1]} tokens, got {answer}"
            )
        checked.append((ids.long().cpu(), answer))
    return sorted(checked, key=lambda prompt: prompt[1] - prompt[0].shape[1])


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
