"""Rotary position embedding of a transformers config: frequencies, layout, scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: model_type of the families whose pairs are neighbouring dimensions; the others pair halves.
_INTERLEAVED = frozenset({"glm", "glm4"})


@dataclass(frozen=True)
class Rope:
    """Pair i of a row at position n turns by n * inv_freq[i]; cosines and sines are times scale.

    inv_freq: fp32 ``[rotary_dim / 2]``. Dimensions from rotary_dim on are left alone. Pairs are
    ``(2i, 2i + 1)`` if interleaved, else ``(i, i + rotary_dim / 2)``.
    """

    inv_freq: Tensor
    interleaved: bool
    scale: float = 1.0

    @classmethod
    def of_config(cls, config: Any, tokens: int) -> Rope:
        """The embedding that a model of this config applies to a prompt of ``tokens`` tokens.

        Frequencies of some types depend on the length of a text. Undoing and applying the same
        embedding gives back any key, so others than the model used cost accuracy at low rank only.
        """
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        parameters = config.rope_parameters
        kind = parameters["rope_type"]
        interleaved = config.model_type in _INTERLEAVED
        if kind == "default":
            head_dim = getattr(config, "head_dim", None)
            head_dim = head_dim or config.hidden_size // config.num_attention_heads
            dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
            exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
            return cls(1.0 / parameters["rope_theta"] ** exponents, interleaved)
        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=tokens)
        return cls(inv_freq.float(), interleaved, float(scale))
