"""What is left of transformers' masks: the real keys of each sequence; other masks are refused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    config: Any = None,
    **_: Any,
) -> Tensor:
    """The mask function: int32 [batch_size, 1, 1, 2] on the CPU, (start, kv_len) of each sequence.

    Keys ``start .. kv_len - 1`` are real, those before are left padding, those after are the unused
    end of a static cache. Four dimensions, because transformers hands a mask that has them through
    unchanged; int32, so that nothing else is taken for it; on the CPU, so that the layers read it
    without a synchronisation (one is made here, when there is a mask or a static cache).
    """
    kv_len = int(q_offset) + q_length
    if int(kv_offset) != 0 or kv_len > kv_length:
        window = getattr(config, "sliding_window", None)
        raise ValueError(
            f"sliding_window: expected at least kv_len = {kv_len}, got {window} "
            f"(the cache kept {kv_length} keys)"
        )
    _check_causal(mask_function, batch_size, q_length, kv_len, config, attention_mask)
    starts = torch.zeros(batch_size, dtype=torch.int32)
    if attention_mask is not None:
        starts = _left_padding(attention_mask, kv_len)
    ends = torch.full_like(starts, kv_len)
    return torch.stack((starts, ends), dim=-1)[:, None, None, :]


def _check_causal(
    mask_function: Any,
    batch_size: int,
    q_length: int,
    kv_len: int,
    config: Any,
    attention_mask: Tensor | None,
) -> None:
    """Refuses every mask function that is not causal over the kv_len keys at hand."""
    from transformers.masking_utils import causal_mask_function

    if mask_function is causal_mask_function or mask_function is None:
        return
    window = getattr(config, "sliding_window", None)
    if window is not None and kv_len > window:
        raise ValueError(f"sliding_window: expected at least kv_len = {kv_len}, got {window}")
    # A window that holds all keys hides none. Three keys of each row tell a causal mask from one
    # with a window (key 0), with packed sequences (the key before) or without causality (the next).
    device = torch.device("cpu") if attention_mask is None else attention_mask.device
    rows = torch.arange(kv_len - q_length, kv_len, device=device)[None, :]
    batch = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    causal = (
        mask_function(batch, head, rows, torch.zeros_like(rows)).all()
        and mask_function(batch, head, rows, (rows - 1).clamp(min=0)).all()
        and not mask_function(batch, head, rows[:, :-1], rows[:, :-1] + 1).any()
    )
    if not causal:
        raise ValueError(
            "attention_mask: expected a causal mask with left padding, got another one "
            "(packed position_ids, a sliding window or a bidirectional mask)"
        )


def _left_padding(attention_mask: Tensor, kv_len: int) -> Tensor:
    """int32 [batch] on the CPU: the first real key of each sequence (kv_len if there is none)."""
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask: expected [batch, kv_len], got shape {tuple(attention_mask.shape)}"
        )
    real = attention_mask[:, :kv_len].bool()
    real = F.pad(real, (0, kv_len - real.shape[1]))  # transformers: what is missing is padding
    starts = kv_len - real.sum(dim=1)
    positions = torch.arange(kv_len, device=real.device)
    left = (real == (positions >= starts[:, None])).all(dim=1)
    starts, left = torch.stack((starts, left.long())).cpu()
    if not left.all():
        row = int((left == 0).nonzero()[0])
        raise ValueError(
            f"attention_mask: expected zeros only before the first one (left padding), got row "
            f"{row} with right padding or a gap"
        )
    return starts.int()
