"""block_sparse_attention against the oracle."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    CASES,
    LAYOUTS,
    Case,
    block_masks,
    check_attention,
    check_mask,
    check_no_influence,
    full_mask,
    make_qkv,
    merge,
    poison_unseen,
    random_blocks,
    relayout,
)

import sparseattn
from sparseattn import reference

BLOCKS = [(64, 64), (64, 128), (128, 64), (128, 128)]


def attend(q, k, v, blocks, block_q=64, block_kv=64, **options):
    return sparseattn.block_sparse_attention(
        q, k, v, blocks, block_q=block_q, block_kv=block_kv, return_lse=True, **options
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("block_q, block_kv", BLOCKS)
def test_against_oracle(case, block_q, block_kv, place):
    for seed, share in enumerate([0.1, 0.5]):
        q, k, v = make_qkv(case, place, seed)
        blocks = random_blocks(case, block_q, block_kv, seed, share)
        mask = block_masks(case, blocks, block_q, block_kv).to(place.device)
        k, v = poison_unseen(k, v, mask)
        out, lse = attend(q, k, v, blocks.to(place.device), block_q, block_kv)
        check_attention(out, lse, q, k, v, mask)


@pytest.mark.parametrize("block_q, block_kv", BLOCKS)
def test_mask_to_the_key(block_q, block_kv, main_place):
    for case in [Case(1, 2, 1, 300, 300, 128), Case(2, 2, 2, 131, 330, 128)]:
        blocks = random_blocks(case, block_q, block_kv, seed=3, share=0.5)
        mask = block_masks(case, blocks, block_q, block_kv).to(main_place.device)
        blocks = blocks.to(main_place.device)
        check_mask(
            lambda q, k, v: attend(q, k, v, blocks, block_q, block_kv),  # noqa: B023
            mask,
            case,
            main_place,
        )


@pytest.mark.parametrize("block_q, block_kv", BLOCKS)
def test_full_mask_is_dense(block_q, block_kv, place):
    case = Case(1, 4, 2, 200, 270, 64)
    q, k, v = make_qkv(case, place)
    blocks = random_blocks(case, block_q, block_kv, 0) | True
    out, lse = attend(q, k, v, blocks.to(place.device), block_q, block_kv)
    mask = reference.dense_mask(200, 270, place.device)
    check_attention(out, lse, q, k, v, full_mask(mask, case))


def test_more_blocks_than_a_word(place):
    """Rows of more than 32 blocks, selected on both sides of each word's edge."""
    case = Case(1, 2, 1, 70, 64 * 70 + 5, 64)
    q, k, v = make_qkv(case, place)
    blocks = torch.zeros(1, 2, 2, 71, dtype=torch.bool)
    blocks[0, 0, 0, [0, 31, 32, 63, 64, 69]] = True
    blocks[0, 0, 1, [1, 33, 70]] = True
    blocks[0, 1, :, 64:] = True
    mask = block_masks(case, blocks, 64, 64).to(place.device)
    k, v = poison_unseen(k, v, mask)
    check_attention(*attend(q, k, v, blocks.to(place.device)), q, k, v, mask)


def test_nothing_selected(place):
    case = Case(2, 2, 1, 130, 200, 64)
    q, k, v = make_qkv(case, place)
    k.fill_(torch.nan)
    v.fill_(torch.nan)
    blocks = torch.zeros(2, 2, 3, 4, dtype=torch.bool, device=place.device)
    out, lse = attend(q, k, v, blocks)
    assert (out == 0).all() and lse.isneginf().all()


def test_only_future_blocks_selected(place):
    """Blocks after the query are no error and select nothing."""
    case = Case(1, 1, 1, 192, 192, 64)
    q, k, v = make_qkv(case, place)
    blocks = torch.ones(3, 3, dtype=torch.bool, device=place.device).triu(1).expand(1, 1, 3, 3)
    k.fill_(torch.nan)
    out, lse = attend(q, k, v, blocks)
    assert (out == 0).all() and lse.isneginf().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, place):
    case = Case(2, 4, 2, 100, 170, 64)
    q, k, v = make_qkv(case, place)
    blocks = random_blocks(case, 64, 64, seed=4)
    mask = block_masks(case, blocks, 64, 64).to(place.device)
    views = [relayout(x, layout) for x in poison_unseen(k, v, mask)]
    out, lse = attend(relayout(q, layout), *views, blocks.to(place.device))
    check_attention(out, lse, q, k, v, mask)


def test_mask_strides(place):
    case = Case(2, 4, 1, 200, 270, 64)
    q, k, v = make_qkv(case, place)
    blocks = random_blocks(case, 64, 64, seed=5).to(place.device)
    expected = attend(q, k, v, blocks)
    wide = torch.ones(5, 4, 2, 9, dtype=torch.bool, device=place.device)
    view = wide.permute(2, 1, 3, 0)[:, :, 1::2][..., :5].copy_(blocks)
    got = attend(q, k, v, view)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    shared = blocks[:1, :1].expand(2, 4, -1, -1)
    got, expected = attend(q, k, v, shared), attend(q, k, v, shared.contiguous())
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    rows = blocks[:, :, :1].expand(2, 4, 4, 5)
    got, expected = attend(q, k, v, rows), attend(q, k, v, rows.contiguous())
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_masked_finite_values_have_no_influence(place):
    case = Case(1, 4, 2, 200, 330, 64)
    q, k, v = make_qkv(case, place)
    for seed, (block_q, block_kv) in enumerate(BLOCKS):
        blocks = random_blocks(case, block_q, block_kv, seed)
        mask = block_masks(case, blocks, block_q, block_kv).to(place.device)
        blocks = blocks.to(place.device)
        check_no_influence(
            lambda q, k, v: attend(q, k, v, blocks, block_q, block_kv),  # noqa: B023
            q,
            k,
            v,
            mask,
            seed,
        )


@pytest.mark.parametrize("block_q, block_kv", BLOCKS)
def test_complements_merge_to_dense(block_q, block_kv, place):
    case = Case(2, 4, 2, 200, 300, 128)
    q, k, v = make_qkv(case, place)
    blocks = random_blocks(case, block_q, block_kv, seed=7, share=0.5).to(place.device)
    out, lse = merge([attend(q, k, v, b, block_q, block_kv) for b in (blocks, ~blocks)])
    mask = full_mask(reference.dense_mask(200, 300, place.device), case)
    check_attention(out.to(place.dtype), lse.float(), q, k, v, mask)


@pytest.mark.parametrize("factor", [10.0, 100.0])
def test_large_scores(factor, place):
    case = Case(1, 2, 1, 200, 260, 128)
    q, k, v = make_qkv(case, place)
    q = q * factor
    blocks = random_blocks(case, 64, 64, seed=8)
    mask = block_masks(case, blocks, 64, 64).to(place.device)
    check_attention(*attend(q, k, v, blocks.to(place.device)), q, k, v, mask)


def test_neighbouring_rows_of_very_different_length(place):
    """Kernels that load for two tiles at once must not wait for the one that has nothing to do."""
    case = Case(1, 4, 1, 192, 4096, 64)
    blocks = torch.zeros(1, 4, 3, 64, dtype=torch.bool)
    blocks[:, 0, 1] = blocks[:, 1, 0] = True  # all against none
    blocks[:, 2, 0, 5], blocks[:, 2, 1] = True, True  # all against one
    blocks[:, 3, 0, ::2], blocks[:, 3, 1, 3::16] = True, True
    blocks[:, :, 2, 10:13] = True
    mask = block_masks(case, blocks, 64, 64).to(place.device)
    q, k, v = make_qkv(case, place)
    k, v = poison_unseen(k, v, mask)
    out, lse = attend(q, k, v, blocks.to(place.device))
    check_attention(out, lse, q, k, v, mask)
