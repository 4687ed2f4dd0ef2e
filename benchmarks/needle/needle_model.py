"""The model that ``train.py`` trains: its sizes, and the weights that it starts from."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F

HORIZON = 131072  # positions that the model is to know


def build_model(args: argparse.Namespace, vocabulary: int, eos: int) -> Any:
    """A GlmForCausalLM with tied embeddings, untrained; ``args`` as ``train.py`` parses them."""
    from transformers import GlmConfig, GlmForCausalLM

    config = GlmConfig(
        vocab_size=-(-vocabulary // 64) * 64,
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=HORIZON * 2,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": args.theta,
            "partial_rotary_factor": 0.5,
        },
        pad_token_id=None,
        eos_token_id=eos,
        attention_bias=True,
        tie_word_embeddings=True,
        initializer_range=0.02,
        attn_implementation="sdpa",
    )
    model = GlmForCausalLM(config)
    initialise(model, args)
    return model


@torch.no_grad()
def initialise(model: Any, args: argparse.Namespace) -> None:
    """Weights that start near what recall needs, so that it comes in seconds.

    Every weight keeps its input's scale. Embeddings are large, so that tokens show through the
    layers, and the last norm's weight small, so that the first predictions are even. Heads write
    back what they read (``o = v^T``), which the tied output layer takes for a copied token. In the
    first ``--local-layers`` layers, the heads of KV head 0 look a few tokens back: biases on q and
    k that differ by RoPE's turn at that offset.
    """
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.normal_(0, 0.5 if "embed" in name else weight.shape[1] ** -0.5)
    model.model.norm.weight.fill_(4 / model.config.hidden_size)
    scale = (2 * args.layers) ** -0.5
    group, dim = args.heads // args.kv_heads, args.head_dim
    frequencies = model.model.rotary_emb.inv_freq
    for number, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.weight.mul_(scale)
        attention = layer.self_attn
        values = attention.v_proj.weight.view(args.kv_heads, dim, -1)
        back = values.repeat_interleave(group, 0).flatten(0, 1).T
        attention.o_proj.weight.copy_(back * scale)
        if number >= args.local_layers:
            continue
        turn = torch.polar(
            torch.full_like(frequencies, args.local_strength),
            2 * torch.pi * torch.rand(len(frequencies)),
        )
        rotary = 2 * len(frequencies)
        attention.k_proj.bias[:rotary] = torch.view_as_real(turn).flatten()
        for head in range(group):
            offset = 1 + head + number * (group - 1)  # 1 2 3 4, then 4 5 6 7
            seen = turn * torch.polar(torch.ones_like(frequencies), -offset * frequencies)
            attention.q_proj.bias[head * dim : head * dim + rotary] = torch.view_as_real(
                seen
            ).flatten()


def fast_norms(model: Any) -> None:
    """The same norm by one fused kernel (the weight is multiplied before rounding, not after)."""
    for module in model.modules():
        if type(module).__name__ == "GlmRMSNorm":
            shape, eps = tuple(module.weight.shape), module.variance_epsilon
            module.forward = lambda x, m=module, s=shape, e=eps: F.rms_norm(x, s, m.weight, e)
