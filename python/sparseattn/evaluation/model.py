"""Models for the evaluation, from this machine only: the shipped one, or a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

MODELS = Path(__file__).resolve().parent.parent / "models"


def names() -> list[str]:
    """The shipped models."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def folder(path_or_name: str | Path) -> Path:
    """A shipped model's folder, or the folder given. Raises ValueError if it holds no model."""
    shipped = MODELS / str(path_or_name)
    found = shipped if str(path_or_name) in names() else Path(path_or_name).expanduser()
    for needed in ("config.json", "tokenizer_config.json"):
        if not (found / needed).is_file():
            raise ValueError(
                f"model: expected {' or '.join(map(repr, names())) or 'a shipped name'} or a local "
                f"Hugging Face folder, got {str(path_or_name)!r} (no {needed} there)"
            )
    return found


def load(
    path_or_name: str | Path = "needle",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer); nothing is downloaded, no code of the folder is run.

    ``dtype``: default bf16 on a GPU, fp32 on the CPU. Raises ValueError if there is no such model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = folder(path_or_name)
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, local_files_only=True, attn_implementation="sdpa"
    )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return model.to(device).eval(), tokenizer
