"""Patterns with a share or a method: whole calls, files, torch.ops, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Case, Place, make_qkv, relayout
from test_adaptive import check_share, masses_of, planted

import sparseattn
from sparseattn import AShape, BlockSparse, Dense, PatternConfig, VerticalSlash, reference
from sparseattn.config import pattern_from_json, pattern_to_json
from sparseattn.ops import flatten

MIXED = [
    VerticalSlash(80, 300, share=0.6),
    BlockSparse(4, share=0.7),
    VerticalSlash(40, 130),
    BlockSparse(4, method="antidiagonal"),
    BlockSparse(3, share=0.9, method="antidiagonal", stride=4),
    VerticalSlash(120, 500, share=0.95),
    BlockSparse(3),
    AShape(4, 70),
]


def test_sparse_attention_is_estimate_then_attend(place):
    q, k, v = make_qkv(Case(2, 8, 2, 300, 520, 64), place)
    q = q * 2
    out, lse = sparseattn.sparse_attention(q, k, v, MIXED, return_lse=True)
    for h, pattern in enumerate(MIXED):
        one = slice(h, h + 1), slice(h // 4, h // 4 + 1)
        qh, kh, vh = q[:, one[0]], k[:, one[1]], v[:, one[1]]
        if isinstance(pattern, VerticalSlash):
            index = sparseattn.estimate_vertical_slash(
                qh,
                kh,
                num_columns=pattern.columns,
                num_offsets=pattern.offsets,
                share=pattern.share,
            )
            want = sparseattn.vertical_slash_attention(qh, kh, vh, *index, return_lse=True)
        elif isinstance(pattern, BlockSparse):
            mask = sparseattn.estimate_block_sparse(
                qh,
                kh,
                top_k=pattern.top_k,
                share=pattern.share,
                method=pattern.method,
                stride=pattern.stride,
            )
            want = sparseattn.block_sparse_attention(qh, kh, vh, mask, return_lse=True)
        else:
            want = sparseattn.a_shape_attention(qh, kh, vh, sink=4, window=70, return_lse=True)
        assert torch.equal(out[:, one[0]], want[0]), pattern
        assert torch.equal(lse[:, one[0]], want[1]), pattern
    again = sparseattn.sparse_attention(q, k, v, MIXED)
    assert torch.equal(out, again), "a second call is the same to the bit"


@pytest.mark.parametrize("layout", ["packed", "odd"])
def test_strides(layout, place):
    q, k, _ = make_qkv(Case(2, 4, 2, 130, 300, 64), place)
    moved = [relayout(x, layout) for x in (q, k)]
    options = {"num_columns": 60, "num_offsets": 250, "share": 0.6}
    for got, want in zip(
        sparseattn.estimate_vertical_slash(*moved, **options),
        sparseattn.estimate_vertical_slash(q, k, **options),
        strict=True,
    ):
        assert torch.equal(got, want)
    how = {"top_k": 4, "share": 0.6, "method": "antidiagonal", "stride": 8}
    assert torch.equal(
        sparseattn.estimate_block_sparse(*moved, **how),
        sparseattn.estimate_block_sparse(q, k, **how),
    )


def test_pattern_mask_follows_the_options(main_place):
    """The oracle's whole path takes the options too, with margins wide enough to agree."""
    q, k = planted(main_place)
    patterns = [VerticalSlash(200, 600, share=0.9)] * 2
    masks = reference.pattern_mask(q, k, patterns)
    columns, offsets = sparseattn.estimate_vertical_slash(
        q, k, num_columns=200, num_offsets=600, share=0.9
    )
    for h in range(2):
        mask = reference.vertical_slash_mask(900, 900, columns[0, h], offsets[0, h])
        assert torch.equal(masks[0, h], mask)


def test_flatten():
    flat = flatten([Dense(), VerticalSlash(5, 6, share=0.25), BlockSparse(7, 1.0, "antidiagonal")])
    assert flat == [0, 0, 0, 2 + (250_000 << 16), 5, 6, 3 + (16 << 8) + (1_000_000 << 16), 7, 0]
    # A stride without antidiagonal scores means nothing.
    assert flatten([BlockSparse(7, stride=4)]) == flatten([BlockSparse(7)]) == [3, 7, 0]


def test_config_files(tmp_path):
    patterns = [*MIXED, Dense(), BlockSparse(9, stride=8)]
    config = PatternConfig.from_layers([patterns, patterns[::-1]])
    config.save(tmp_path / "a.json")
    assert PatternConfig.load(tmp_path / "a.json") == config
    assert pattern_to_json(VerticalSlash(1, 2)) == {
        "kind": "vertical_slash",
        "columns": 1,
        "offsets": 2,
    }
    assert pattern_from_json({"kind": "block_sparse", "top_k": 3}) == BlockSparse(3)
    assert pattern_to_json(BlockSparse(3, 0.5)) == {
        "kind": "block_sparse",
        "top_k": 3,
        "share": 0.5,
    }
    with pytest.raises(ValueError, match="vertical_slash: expected the sizes columns, offsets"):
        pattern_from_json({"kind": "vertical_slash", "columns": 3, "share": 0.5})
    with pytest.raises(ValueError, match="got sink, window, share"):
        pattern_from_json({"kind": "a_shape", "sink": 3, "window": 4, "share": 0.5})


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: VerticalSlash(1, 2, share=0),
            ValueError,
            "VerticalSlash.share: expected 1e-6 <= share <= 1 or None, got 0",
        ),
        (
            lambda: BlockSparse(1, share=1.5),
            ValueError,
            "BlockSparse.share: expected 1e-6 <= share <= 1 or None, got 1.5",
        ),
        (
            lambda: BlockSparse(1, share=math.nan),
            ValueError,
            "BlockSparse.share: expected 1e-6 <= share <= 1 or None, got nan",
        ),
        (
            lambda: BlockSparse(1, share="0.5"),
            TypeError,
            "BlockSparse.share: expected float or None, got str",
        ),
        (
            lambda: VerticalSlash(1, 2, share=True),
            TypeError,
            "VerticalSlash.share: expected float or None, got bool",
        ),
        (
            lambda: BlockSparse(1, method="max"),
            ValueError,
            'BlockSparse.method: expected "mean" or "antidiagonal", got "max"',
        ),
        (
            lambda: BlockSparse(1, method=3),
            TypeError,
            "BlockSparse.method: expected str, got int",
        ),
        (
            lambda: BlockSparse(1, stride=5),
            ValueError,
            "BlockSparse.stride: expected 4, 8, 16 or 32, got 5",
        ),
        (
            lambda: BlockSparse(1, stride=4.0),
            TypeError,
            "BlockSparse.stride: expected int, got float",
        ),
    ],
)
def test_patterns_refuse(make, error, text):
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == text


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, math.nan, 1e-7])
def test_estimates_refuse_shares(share, main_place):
    q, k, _ = make_qkv(Case(1, 1, 1, 8, 8, 64), main_place)
    text = "share: expected 1e-6 <= share <= 1 or None, got"
    with pytest.raises(ValueError, match=text):
        sparseattn.estimate_vertical_slash(q, k, num_columns=1, num_offsets=1, share=share)
    with pytest.raises(ValueError, match=text):
        sparseattn.estimate_block_sparse(q, k, top_k=1, share=share)


def test_estimates_refuse_methods(main_place):
    q, k, _ = make_qkv(Case(1, 1, 1, 8, 8, 64), main_place)
    with pytest.raises(ValueError, match='method: expected "mean" or "antidiagonal", got "max"'):
        sparseattn.estimate_block_sparse(q, k, top_k=1, method="max")
    for method in ("mean", "antidiagonal"):
        with pytest.raises(ValueError, match="stride: expected 4, 8, 16 or 32, got 64"):
            sparseattn.estimate_block_sparse(q, k, top_k=1, method=method, stride=64)
    with pytest.raises(TypeError, match="method: "):
        sparseattn.estimate_block_sparse(q, k, top_k=1, method=3)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (1 + (500_000 << 16), "expected a share of at most 1 of a vertical-slash or block-sparse"),
        (2 + (1_000_001 << 16), "expected a share of at most 1"),
        (2 + (16 << 8), "expected a stride of 4, 8, 16 or 32 of a block-sparse pattern"),
        (3 + (5 << 8), "expected a stride of 4, 8, 16 or 32"),
        (4, "expected a code of 0 to 3 for head 0, got 4"),
        (-1, "expected a code of 0 to 3"),
    ],
)
def test_codes_refuse(code, text, main_place):
    q, k, v = make_qkv(Case(1, 1, 1, 8, 8, 64), main_place)
    with pytest.raises(RuntimeError, match=text):
        torch.ops.sparseattn.sparse_attention(q, k, v, [code, 1, 1])


# --- torch --------------------------------------------------------------------------------------


def test_opcheck_and_compile(main_place):
    q, k, v = make_qkv(Case(2, 4, 2, 100, 130, 64), main_place)
    ops = torch.ops.sparseattn
    torch.library.opcheck(
        ops.estimate_vertical_slash.default,
        (q, k),
        {"num_columns": 40, "num_offsets": 110, "share": 0.5},
    )
    torch.library.opcheck(
        ops.estimate_block_sparse.default,
        (q, k),
        {"top_k": 2, "share": 0.5, "method": "antidiagonal", "stride": 8},
    )
    torch.library.opcheck(ops.sparse_attention.default, (q, k, v, flatten(MIXED[2:6])), {})
    compiled = torch.compile(
        lambda q, k: sparseattn.estimate_block_sparse(q, k, top_k=2, method="antidiagonal"),
        fullgraph=True,
        backend="eager",
    )
    want = sparseattn.estimate_block_sparse(q, k, top_k=2, method="antidiagonal")
    assert torch.equal(compiled(q, k), want)


@pytest.mark.cuda
def test_long_rows_and_many_heads_on_cuda():
    """Several chunks, panels and rounds; the CPU's fp32 result is close on the same numbers."""
    place = Place("cuda", torch.bfloat16)
    q, k, _ = make_qkv(Case(1, 6, 2, 20_000, 20_000, 128), place)
    options = {"num_columns": 3000, "num_offsets": 9000}
    got = sparseattn.estimate_vertical_slash(q, k, **options, share=0.7)
    again = sparseattn.estimate_vertical_slash(q, k, **options, share=0.7)
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
    check_share(got, masses_of(q, k, options), 64, 0.7, options)
    how = {"top_k": 40, "share": 0.8, "method": "antidiagonal"}
    blocks = sparseattn.estimate_block_sparse(q, k, **how)
    assert torch.equal(blocks, sparseattn.estimate_block_sparse(q, k, **how))
    other = sparseattn.estimate_block_sparse(q.cpu().float(), k.cpu().float(), **how)
    assert (blocks.cpu() != other).float().mean() < 0.02
