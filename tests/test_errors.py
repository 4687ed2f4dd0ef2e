"""Bad input: ValueError or TypeError that names the argument, the same text through torch.ops."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from helpers import PLACES, Case, Place, cuda_reason, make_qkv

import sparseattn
from sparseattn import AShape, BlockSparse, Dense, VerticalSlash

ATTENTION = [
    "a_shape_attention",
    "vertical_slash_attention",
    "block_sparse_attention",
    "sparse_attention",
]
ESTIMATES = ["estimate_vertical_slash", "estimate_block_sparse"]
CASE = Case(2, 4, 2, 100, 130, 64)


def good(op: str, place: Place) -> dict:
    """Arguments that `op` takes."""
    q, k, v = make_qkv(CASE, place)
    args = {"q": q, "k": k} if op in ESTIMATES else {"q": q, "k": k, "v": v}
    lists = torch.zeros(2, 4, 5, dtype=torch.int32, device=place.device)
    more = {
        "a_shape_attention": {"sink": 4, "window": 20},
        "vertical_slash_attention": {"columns": lists, "offsets": lists.clone()},
        "block_sparse_attention": {
            "block_mask": torch.ones(2, 4, 2, 3, dtype=torch.bool, device=place.device),
            "block_q": 64,
            "block_kv": 64,
        },
        "sparse_attention": {
            "patterns": [Dense(), AShape(4, 20), VerticalSlash(40, 110), BlockSparse(2)]
        },
        "estimate_vertical_slash": {
            "num_columns": 40,
            "num_offsets": 110,
            "last_q": 64,
            "sink": 30,
            "local": 100,
        },
        "estimate_block_sparse": {"top_k": 2, "block": 64},
    }
    return args | more[op]


def call_torch(op: str, args: dict):
    """The same call through torch.ops, where patterns are flat integers."""
    if "patterns" in args:
        flat = [x for p in args["patterns"] for x in (p.code, *p.sizes())]
        args = args | {"patterns": flat}
    return getattr(torch.ops.sparseattn, op)(**args)


def check_refused(op: str, args: dict, names: tuple[str, ...], torch_too: bool = True) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        getattr(sparseattn, op)(**args)
    text = str(raised.value)
    named = [n for n in names if re.search(rf"(?<![\w.]){n}(?!\w)", text)]
    assert named, f"the message names none of {names}: {text!r}"
    assert re.search(r"expected|must", text), f"the message does not say what is expected: {text!r}"
    if torch_too:
        with pytest.raises(RuntimeError) as raised:
            call_torch(op, args)
        assert text in str(raised.value), "torch.ops must give the same text"


@pytest.mark.parametrize("op", ATTENTION + ESTIMATES)
def test_good_arguments_pass(op, main_place):
    args = good(op, main_place)
    results = getattr(sparseattn, op)(**args), call_torch(op, args)
    first = [r[0] if isinstance(r, tuple) else r for r in results]
    assert torch.equal(*first)


# --- q, k, v ------------------------------------------------------------------------------------


def change(name: str, f: Callable):
    return lambda args: args | {name: f(args[name])}


def change_all(f: Callable):
    return lambda args: args | {n: f(args[n]) for n in ("q", "k", "v") if n in args}


def strided(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x], -1)[..., ::2]


SHARED = {
    "q-rank-3": (change("q", lambda x: x[0]), ("q",)),
    "k-rank-5": (change("k", lambda x: x[None]), ("k",)),
    "k-dtype": (change("k", lambda x: x.double()), ("k",)),
    "all-double": (change_all(lambda x: x.double()), ("q",)),
    "all-int": (change_all(lambda x: x.int()), ("q",)),
    "dim-80": (change_all(lambda x: torch.cat([x, x[..., :16]], -1)), ("q", "head_dim")),
    "dim-256": (change_all(lambda x: torch.cat([x] * 4, -1)), ("q", "head_dim")),
    "dim-48": (change_all(lambda x: x[..., :48]), ("q", "head_dim")),
    "k-dim": (change("k", lambda x: x[..., :32]), ("k",)),
    "k-batch": (change("k", lambda x: x[:1]), ("k",)),
    "heads-not-a-multiple": (
        change_all(lambda x: x if x.shape[1] == 4 else torch.cat([x, x[:, :1]], 1)),
        ("q", "k"),
    ),
    "kv-shorter-than-q": (
        change_all(lambda x: x if x.shape[1] == 4 else x[:, :, :99]),
        ("k", "kv_len", "q_len"),
    ),
    "q-empty": (change("q", lambda x: x[:, :, :0]), ("q", "q_len")),
    "q-last-stride": (change("q", strided), ("q",)),
    "k-last-stride": (change("k", strided), ("k",)),
    "k-last-stride-0": (change("k", lambda x: x[..., :1].expand_as(x)), ("k",)),
}
ONLY_ATTENTION = {
    "v-rank-3": (change("v", lambda x: x[0]), ("v",)),
    "v-dtype": (change("v", lambda x: x.double()), ("v",)),
    "v-length": (change("v", lambda x: x[:, :, :-1]), ("v",)),
    "v-heads": (change("v", lambda x: x[:, :1]), ("v",)),
    "v-dim": (change("v", lambda x: x[..., :32]), ("v",)),
    "v-batch": (change("v", lambda x: torch.cat([x, x])), ("v",)),
    "v-last-stride": (change("v", strided), ("v",)),
}


@pytest.mark.parametrize("wrong", SHARED)
@pytest.mark.parametrize("op", ATTENTION + ESTIMATES)
def test_query_and_key(op, wrong, main_place):
    damage, names = SHARED[wrong]
    check_refused(op, damage(good(op, main_place)), names)


@pytest.mark.parametrize("wrong", ONLY_ATTENTION)
@pytest.mark.parametrize("op", ATTENTION)
def test_value(op, wrong, main_place):
    damage, names = ONLY_ATTENTION[wrong]
    check_refused(op, damage(good(op, main_place)), names)


@pytest.mark.parametrize("op", ATTENTION + ESTIMATES)
def test_dtype_of_the_device(op, main_place):
    """fp16 is the GPU's, fp32 the CPU's."""
    other = torch.float16 if main_place.device == "cpu" else torch.float32
    check_refused(op, change_all(lambda x: x.to(other))(good(op, main_place)), ("q",))


@pytest.mark.cuda
@pytest.mark.parametrize("op", ATTENTION + ESTIMATES)
def test_small_head_dims_on_the_gpu(op):
    args = good(op, _gpu())
    check_refused(op, change_all(lambda x: x[..., :32].contiguous())(args), ("q", "head_dim"))


@pytest.mark.cuda
@pytest.mark.parametrize("op", ATTENTION + ESTIMATES)
def test_devices_must_agree(op):
    args = good(op, _gpu())
    for name, value in args.items():
        if name != "q" and isinstance(value, torch.Tensor):
            check_refused(op, args | {name: value.cpu()}, (name,))


def _gpu() -> Place:
    assert cuda_reason() is None
    return PLACES[2]


# --- everything else ----------------------------------------------------------------------------

OTHERS = {
    "a_shape_attention": {
        "sink-negative": ({"sink": -1}, "sink"),
        "sink-too-large": ({"sink": 2**32}, "sink"),
        "window-negative": ({"window": -5}, "window"),
        "window-too-large": ({"window": 2**31}, "window"),
    },
    "vertical_slash_attention": {
        "columns-float": (change("columns", lambda x: x.float()), "columns"),
        "columns-bool": (change("columns", lambda x: x.bool()), "columns"),
        "columns-int16": (change("columns", lambda x: x.short()), "columns"),
        "columns-rank": (change("columns", lambda x: x[0]), "columns"),
        "columns-heads": (change("columns", lambda x: x[:, :2]), "columns"),
        "columns-batch": (change("columns", lambda x: x[:1]), "columns"),
        "offsets-float": (change("offsets", lambda x: x.float()), "offsets"),
        "offsets-rank": (change("offsets", lambda x: x[..., None]), "offsets"),
        "offsets-heads": (change("offsets", lambda x: x[:, :1]), "offsets"),
        "offsets-batch": (change("offsets", lambda x: torch.cat([x, x])), "offsets"),
    },
    "block_sparse_attention": {
        "mask-int": (change("block_mask", lambda x: x.int()), "block_mask"),
        "mask-float": (change("block_mask", lambda x: x.float()), "block_mask"),
        "mask-rank": (change("block_mask", lambda x: x[0]), "block_mask"),
        "mask-heads": (change("block_mask", lambda x: x[:, :1]), "block_mask"),
        "mask-batch": (change("block_mask", lambda x: x[:1]), "block_mask"),
        "mask-query-blocks": (change("block_mask", lambda x: x[:, :, :1]), "block_mask"),
        "mask-key-blocks": (change("block_mask", lambda x: x[..., :2]), "block_mask"),
        "mask-for-other-blocks": ({"block_kv": 128}, "block_mask"),
        "block_q-48": ({"block_q": 48}, "block_q"),
        "block_q-0": ({"block_q": 0}, "block_q"),
        "block_q-256": ({"block_q": 256}, "block_q"),
        "block_kv-48": ({"block_kv": 48}, "block_kv"),
        "block_kv-negative": ({"block_kv": -64}, "block_kv"),
    },
    "sparse_attention": {
        "patterns-too-few": (change("patterns", lambda x: x[:3]), "patterns"),
        "patterns-too-many": (change("patterns", lambda x: [*x, Dense()]), "patterns"),
        "patterns-none": ({"patterns": []}, "patterns"),
    },
    "estimate_vertical_slash": {
        "num_columns-negative": ({"num_columns": -1}, "num_columns"),
        "num_columns-too-large": ({"num_columns": 2**32}, "num_columns"),
        "num_offsets-negative": ({"num_offsets": -1}, "num_offsets"),
        "last_q-0": ({"last_q": 0}, "last_q"),
        "last_q-65": ({"last_q": 65}, "last_q"),
        "sink-negative": ({"sink": -1}, "sink"),
        "local-negative": ({"local": -1}, "local"),
    },
    "estimate_block_sparse": {
        "top_k-0": ({"top_k": 0}, "top_k"),
        "top_k-negative": ({"top_k": -3}, "top_k"),
        "block-48": ({"block": 48}, "block"),
        "block-0": ({"block": 0}, "block"),
    },
}


@pytest.mark.parametrize("op, wrong", [(op, wrong) for op in OTHERS for wrong in OTHERS[op]])
def test_other_arguments(op, wrong, main_place):
    damage, name = OTHERS[op][wrong]
    args = good(op, main_place)
    args = damage(args) if callable(damage) else args | damage
    check_refused(op, args, (name,))


WRONG_TYPES = {
    "a_shape_attention": [("sink", 1.5), ("window", "all"), ("q", [1.0]), ("k", None)],
    "vertical_slash_attention": [("columns", [1, 2]), ("offsets", None), ("v", 3)],
    "block_sparse_attention": [("block_mask", [[True]]), ("block_q", "64")],
    "sparse_attention": [
        ("patterns", ["dense"] * 4),
        ("patterns", Dense()),
        ("patterns", None),
        ("patterns", [(1, 4, 20)] * 4),
    ],
    "estimate_vertical_slash": [("num_columns", 1.5), ("last_q", None), ("k", "k")],
    "estimate_block_sparse": [("top_k", 0.5), ("block", [64])],
}


@pytest.mark.parametrize(
    "op, name, value", [(op, *pair) for op in WRONG_TYPES for pair in WRONG_TYPES[op]]
)
def test_wrong_python_types(op, name, value, main_place):
    """torch.ops answers these with its own words (its schema does), Python with a TypeError."""
    args = good(op, main_place) | {name: value}
    check_refused(op, args, (name,), torch_too=False)


@pytest.mark.parametrize(
    "flat, what",
    [
        ([0, 0, 0] * 3 + [4, 0, 0], "an unknown code"),
        ([0, 0, 0] * 3 + [-1, 0, 0], "a negative code"),
        ([0, 0, 0] * 3 + [1, -4, 9], "a negative sink"),
        ([0, 0, 0] * 3 + [1, 4, 2**32], "a window beyond 31 bits"),
        ([0, 0, 0] * 3 + [2, 5, -9], "a negative count"),
        ([0, 0, 0] * 3 + [3, 0, 0], "no block at all"),
        ([0, 0, 0] * 3 + [1, 4], "not three a head"),
    ],
)
def test_flat_patterns(flat, what, main_place):
    args = good("sparse_attention", main_place) | {"patterns": flat}
    with pytest.raises(RuntimeError, match="patterns"):
        torch.ops.sparseattn.sparse_attention(**args)


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: AShape(-1, 5), "sink"),
        (lambda: AShape(5, 2**31), "window"),
        (lambda: VerticalSlash(5, -1), "offsets"),
        (lambda: BlockSparse(0), "top_k"),
        (lambda: VerticalSlash(5.0, 1), "columns"),
        (lambda: AShape(True, 1), "sink"),
    ],
)
def test_patterns_check_themselves(make, name):
    with pytest.raises((ValueError, TypeError), match=name):
        make()


@pytest.mark.parametrize("op", ["vertical_slash_attention", "sparse_attention"])
def test_a_refused_call_leaves_nothing_behind(op, main_place):
    """The next good call gives what it gave before."""
    args = good(op, main_place)
    before = getattr(sparseattn, op)(**args)
    with pytest.raises((ValueError, TypeError)):
        getattr(sparseattn, op)(**change("k", strided)(args))
    assert torch.equal(getattr(sparseattn, op)(**args), before)
