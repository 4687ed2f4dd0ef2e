"""Bad input to the ShadowKV operators: ValueError or TypeError that names the argument."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import PLACES, cuda_reason
from shadow_inputs import OPS, needs
from test_shadow_torch import inputs, torch_op

from sparseattn import shadow


def good(op: str, place) -> dict:
    """Arguments that `op` takes, by name."""
    args, options = inputs(op, place)
    names = [x.name for x in torch_op(op)._schema.arguments]
    return dict(zip(names, args, strict=False)) | options


def check_refused(op: str, args: dict, name: str, torch_too: bool = True) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        getattr(shadow, op)(**args)
    text = str(raised.value)
    assert re.search(rf"(?<![\w.]){name}(?!\w)", text), f"the message does not name {name}: {text}"
    assert "expected" in text and "got" in text, f"what was expected, what came: {text}"
    if torch_too:
        with pytest.raises(RuntimeError) as raised:
            torch_op(op)(**args)
        assert text in str(raised.value), "torch.ops must give the same text"


def strided(x):
    return torch.cat([x, x], -1)[..., ::2]


def short(x):
    return x[..., :-1].contiguous()


def one_sequence(x):
    return x[:1]


def no_rows(x):
    return x[:, :, :0]


DAMAGE = {  # op: (argument, what is done to it), the argument also being the one that is named
    "shadow_undo_rope_": [
        ("k", lambda x: x[0]),
        ("k", lambda x: x.double()),
        ("k", lambda x: x[..., :40]),
        ("k", strided),
        ("out", lambda x: x[0]),
        ("out", lambda x: x.double()),
        ("out", lambda x: x[:, :-1]),
        ("out", lambda x: x.transpose(1, 2)),
        ("out", strided),
        ("inv_freq", lambda x: x.double()),
        ("inv_freq", lambda x: torch.cat([x, x])),
        ("inv_freq", lambda x: x[None]),
        ("inv_freq", lambda x: torch.stack([x, x], 1)[:, 0]),
        ("mean", lambda x: x.double()),
        ("mean", short),
        ("mean", strided),
        ("mean", one_sequence),
        ("first", lambda x: -1),
        ("first", lambda x: 2**31 - 100),
        ("first", lambda x: 2**40),
        ("rope_scale", lambda x: float("inf")),
        ("rope_scale", lambda x: float("nan")),
        ("rope_scale", lambda x: 0.0),
        ("rope_scale", lambda x: 1e-60),
    ],
    "shadow_gram_": [
        ("k", lambda x: x[0]),
        ("k", lambda x: x.double()),
        ("k", lambda x: x[..., :40]),
        ("k", strided),
        ("gram", lambda x: x.float()),
        ("gram", short),
        ("gram", lambda x: x.mT),
        ("total", short),
        ("total", lambda x: x.int()),
        ("count", one_sequence),
        ("count", lambda x: x.int()),
        ("kv_lens", lambda x: x.float()),
        ("kv_lens", one_sequence),
        ("kv_lens", lambda x: x[None]),
    ],
    "shadow_landmarks_": [
        ("k", lambda x: x[0]),
        ("k", strided),
        ("landmarks", lambda x: x.double()),
        ("landmarks", lambda x: x[..., :32]),
        ("landmarks", strided),
        ("landmarks", lambda x: x[:, :1]),
        ("min_cosine", lambda x: x.double()),
        ("min_cosine", short),
        ("min_cosine", lambda x: x.transpose(0, 1)),
        ("chunk", lambda x: 5),
        ("chunk", lambda x: 64),
        ("chunk", lambda x: 0),
        ("first_chunk", one_sequence),
        ("first_chunk", lambda x: x.bool()),
        ("kv_lens", one_sequence),
    ],
    "shadow_outliers": [
        ("min_cosine", lambda x: x[0]),
        ("min_cosine", lambda x: x.double()),
        ("min_cosine", lambda x: x.mT.contiguous().mT),
        ("count", lambda x: -1),
        ("count", lambda x: 2**31),
        ("sink_chunks", lambda x: -1),
        ("num_chunks", one_sequence),
        ("num_chunks", lambda x: x.float()),
    ],
    "shadow_select": [
        ("q", lambda x: x[0]),
        ("q", lambda x: x.int()),
        ("q", lambda x: x[..., :40]),
        ("q", strided),
        ("q", no_rows),
        ("landmarks", lambda x: x.double()),
        ("landmarks", lambda x: x[..., :32]),
        ("landmarks", one_sequence),
        ("landmarks", lambda x: torch.cat([x, x[:, :1]], 1)),
        ("landmarks", lambda x: x[:, :0]),
        ("landmarks", strided),
        ("excluded", lambda x: x.int()),
        ("excluded", short),
        ("excluded", lambda x: x[:1]),
        ("excluded", lambda x: x.mT.contiguous().mT),
        ("top_k", lambda x: 0),
        ("top_k", lambda x: 2**31),
        ("num_chunks", one_sequence),
        ("q_lens", lambda x: x.float()),
        ("scale", lambda x: 0.0),
        ("scale", lambda x: float("nan")),
    ],
    "shadow_plan_": [
        ("selected", lambda x: x.long()),
        ("selected", lambda x: x[0]),
        ("selected", lambda x: x.mT.contiguous().mT),
        ("slot_chunk", lambda x: x.long()),
        ("slot_chunk", one_sequence),
        ("slot_chunk", lambda x: x[..., :5].contiguous()),
        ("last_used", short),
        ("last_used", lambda x: x.float()),
        ("last_used", lambda x: x.mT.contiguous().mT),
    ],
    "store_rows_": [
        ("x", lambda x: x[0]),
        ("x", lambda x: x.double()),
        ("x", lambda x: x[..., :20]),
        ("x", lambda x: x[:, :, :90]),
        ("x", strided),
        ("store", lambda x: x[0]),
        ("store", lambda x: x.double()),
        ("store", lambda x: x[:1]),
        ("store", lambda x: x[..., :100]),
        ("store", lambda x: x[..., :32]),
        ("store", lambda x: x[:, :, ::2]),
        ("store", lambda x: x.to(torch.float8_e4m3fn)),
        ("first", lambda x: -1),
        ("first", lambda x: 9),
    ],
    "gather_values_": [
        ("store", lambda x: x[0]),
        ("store", lambda x: x.to(torch.float8_e4m3fn)),
        ("store", lambda x: x.double()),
        ("store", lambda x: x[..., :64]),
        ("store", lambda x: x[:, :, ::2]),
        ("store", lambda x: x[:, :1]),
        ("values", lambda x: x.double()),
        ("values", lambda x: x[:, :, ::2]),
        ("values", strided),
        ("misses", lambda x: x.long()),
        ("misses", lambda x: x[..., 0].contiguous()),
        ("misses", lambda x: x[..., :1].contiguous()),
        ("misses", lambda x: x.transpose(0, 1)),
        ("miss_count", one_sequence),
        ("miss_count", lambda x: x.long()),
    ],
    "lowrank_reconstruct": [
        ("selected", lambda x: x.long()),
        ("selected", lambda x: x[:, :1].contiguous()),
        ("selected", lambda x: x.mT.contiguous().mT),
        ("factor", lambda x: x[0]),
        ("factor", lambda x: x.double()),
        ("factor", strided),
        ("factor", lambda x: x[..., :24]),
        ("factor", lambda x: x[..., :0]),
        ("basis", lambda x: x.double()),
        ("basis", lambda x: x[:, :, :16]),
        ("basis", lambda x: x[..., :40]),
        ("basis", strided),
        ("mean", lambda x: x.double()),
        ("mean", short),
        ("mean", strided),
        ("inv_freq", lambda x: x.double()),
        ("inv_freq", lambda x: torch.cat([x, x])),
        ("inv_freq", lambda x: x[None]),
        ("inv_freq", lambda x: torch.stack([x, x], 1)[:, 0]),
        ("chunk", lambda x: 12),
        ("rope_scale", lambda x: float("inf")),
    ],
    "shadow_attention": [
        ("q", lambda x: x[0]),
        ("q", lambda x: x.double()),
        ("q", strided),
        ("q", lambda x: x[..., :40]),
        ("k", lambda x: x[:, :, :1]),
        ("k", lambda x: x.double()),
        ("k", lambda x: torch.cat([x, x[:, :1]], 1)),
        ("v", short),
        ("v", lambda x: x[:, :, :-1]),
        ("selected", lambda x: x.long()),
        ("selected", lambda x: x[0]),
        ("slot_of", short),
        ("slot_of", lambda x: x.long()),
        ("slot_of", lambda x: x.mT.contiguous().mT),
        ("values", lambda x: x.double()),
        ("values", lambda x: x[..., :-1]),
        ("values", lambda x: x[..., : 5 * 64]),
        ("values", lambda x: x[:, :, ::2]),
        ("values", one_sequence),
        ("factor", lambda x: x.double()),
        ("factor", lambda x: x[..., :24]),
        ("factor", one_sequence),
        ("basis", lambda x: x[..., :32]),
        ("basis", lambda x: x[:, :1]),
        ("mean", lambda x: x.double()),
        ("inv_freq", lambda x: torch.cat([x, x])),
        ("rope_scale", lambda x: float("nan")),
        ("scale", lambda x: -1.0),
        ("q_lens", one_sequence),
        ("exact_lens", lambda x: x.float()),
        ("exact_starts", lambda x: x[None]),
    ],
}


@pytest.mark.parametrize("op", OPS)
def test_good_arguments_pass(op, main_place):
    needs(main_place, op)
    getattr(shadow, op)(**good(op, main_place))


@pytest.mark.parametrize(
    "op, case",
    [(op, i) for op in DAMAGE for i in range(len(DAMAGE[op]))],
    ids=lambda x: x if isinstance(x, str) else str(x),
)
def test_refused(op, case, main_place):
    needs(main_place, op)
    args = good(op, main_place)
    name, damage = DAMAGE[op][case]
    # The argument that a check is made against may be what the message calls wrong.
    named = {("k", "shadow_gram_"): "k", ("factor", "lowrank_reconstruct"): "(factor|basis)"}
    check_refused(op, args | {name: damage(args[name])}, named.get((name, op), name))


WRONG_TYPES = {
    "shadow_undo_rope_": [("out", None), ("inv_freq", None), ("mean", 0.0), ("first", 0.5)],
    "shadow_gram_": [("gram", None), ("k", 1.0)],
    "shadow_landmarks_": [("chunk", 8.5), ("landmarks", None)],
    "shadow_outliers": [("count", "all"), ("min_cosine", None)],
    "shadow_select": [("top_k", 1.5), ("excluded", [True])],
    "shadow_plan_": [("last_used", None), ("selected", [1])],
    "store_rows_": [("first", 0.5), ("store", None)],
    "gather_values_": [("misses", None)],
    "lowrank_reconstruct": [("rope_scale", "1"), ("mean", 0.0)],
    "shadow_attention": [("values", None), ("interleaved", "no"), ("q_lens", [1])],
}


@pytest.mark.parametrize(
    "op, name, value", [(op, *pair) for op in WRONG_TYPES for pair in WRONG_TYPES[op]]
)
def test_wrong_python_types(op, name, value, main_place):
    args = good(op, main_place) | {name: value}
    check_refused(op, args, name, torch_too=False)


def quantised(op: str, place) -> dict:
    """Good arguments with what is quantised in fp8."""
    args = good(op, place)
    name, scale, heads = {
        "store_rows_": ("store", "scale", True),
        "gather_values_": ("store", "store_scale", True),
        "lowrank_reconstruct": ("factor", "factor_scale", False),
        "shadow_attention": ("factor", "factor_scale", False),
    }[op]
    scales = torch.ones(args[name].shape[: 3 if heads else 2], device=place.device)
    return args | {name: args[name].to(torch.float8_e4m3fn), scale: scales}


QUANTISED_DAMAGE = [
    (lambda x: x.double(), None),
    (lambda x: x[..., :-1], None),
    (lambda x: x[:1], None),
    (lambda x: torch.stack([x, x], -1)[..., 0], None),
    (None, lambda x: x.to(torch.uint8)),
    (None, lambda x: x.float()),
    (None, lambda x: x.to(torch.float8_e5m2)),
]


@pytest.mark.parametrize("op", OPS[-4:])
@pytest.mark.parametrize("case", range(len(QUANTISED_DAMAGE)))
def test_refused_if_quantised(op, case, main_place):
    needs(main_place, op)
    args = quantised(op, main_place)
    getattr(shadow, op)(**args)
    name = "factor" if "factor" in args else "store"
    scale = {"store_rows_": "scale", "gather_values_": "store_scale"}.get(op, "factor_scale")
    of_scale, of_rows = QUANTISED_DAMAGE[case]
    if of_scale is not None:
        check_refused(op, args | {scale: of_scale(args[scale])}, scale)
    else:
        check_refused(op, args | {name: of_rows(args[name])}, name)


@pytest.mark.parametrize("op", OPS)
def test_a_refused_call_writes_nothing(op, main_place):
    needs(main_place, op)
    args = good(op, main_place)
    written = [x.name for x in torch_op(op)._schema.arguments if x.alias_info and x.name in args]
    name, damage = DAMAGE[op][-1]
    before = {x: args[x].clone() for x in written}
    with pytest.raises((ValueError, TypeError)):
        getattr(shadow, op)(**args | {name: damage(args[name])})
    for x in written:
        assert torch.equal(args[x], before[x])


@pytest.mark.parametrize("op", OPS)
def test_devices_must_agree(op):
    """On a GPU: one argument at a time left on the CPU; only a store may be."""
    if cuda_reason():
        pytest.skip(cuda_reason())
    needs(PLACES[2], op)
    args = good(op, PLACES[2])
    anchors = {"q", "k", "x", "values", "basis", "min_cosine", "selected", "store"}
    for name in {x for x in args if torch.is_tensor(args[x])} - anchors:
        check_refused(op, args | {name: args[name].cpu()}, name)


@pytest.mark.parametrize(
    "change, error",
    [
        ({"rank": 24}, ValueError),
        ({"rank": 144}, ValueError),
        ({"rank": 0}, ValueError),
        ({"rank": 16.0}, TypeError),
        ({"kv_heads": 3}, ValueError),
        ({"kv_heads": 0}, ValueError),
    ],
)
def test_basis_checks_its_sizes(change, error):
    args, _ = inputs("shadow_gram_", PLACES[0])
    with pytest.raises(error, match=next(iter(change))):
        shadow.shadow_basis(*args[1:], **({"rank": 32, "kv_heads": 2} | change))


def test_projection_checks_its_sizes():
    k, basis = torch.zeros(1, 2, 5, 64), torch.zeros(1, 2, 16, 64)
    with pytest.raises(ValueError, match=r"basis: expected .* got"):
        shadow.shadow_project(k, basis[:, :1])
    with pytest.raises(ValueError, match=r"out: expected .* got"):
        shadow.shadow_project(k, basis, out=torch.zeros(1, 4, 16))
