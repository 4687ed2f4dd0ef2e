"""Sparse attention for long prompts: MInference prefill as a compiled PyTorch extension."""

from __future__ import annotations

import importlib
from typing import Any

from ._C import build_info as _build_info
from .info import info
from .ops import (
    a_shape_attention,
    block_sparse_attention,
    estimate_block_sparse,
    estimate_vertical_slash,
    sparse_attention,
    vertical_slash_attention,
)
from .patterns import AShape, BlockSparse, Dense, Pattern, VerticalSlash

__version__: str = _build_info()["version"]

# Loaded on first use: they need more than torch, or more time.
_LAZY = {
    "GraphDecoder": ("decode_graph", "GraphDecoder"),
    "PatternConfig": ("config", "PatternConfig"),
    "SHADOW_DEVICES": ("shadow_layer", "DEVICES"),
    "ShadowKVCache": ("shadow_cache", "ShadowKVCache"),
    "search_patterns": ("search", "search_patterns"),
}
_MODULES = ("config", "hf", "policy", "reference", "search", "shadow")

__all__ = [
    "SHADOW_DEVICES",
    "AShape",
    "BlockSparse",
    "Dense",
    "GraphDecoder",
    "Pattern",
    "PatternConfig",
    "ShadowKVCache",
    "VerticalSlash",
    "a_shape_attention",
    "block_sparse_attention",
    "estimate_block_sparse",
    "estimate_vertical_slash",
    "hf",
    "info",
    "policy",
    "reference",
    "search_patterns",
    "shadow",
    "sparse_attention",
    "vertical_slash_attention",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, attribute = _LAZY[name]
        value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
