"""The length from which on a layer runs sparse: lookup, tables, and hf.enable's use of them."""

from __future__ import annotations

import json

import pytest
import torch
from hf_models import fresh, spread, tokens

from sparseattn import hf, ops, policy
from sparseattn.config import PatternConfig
from sparseattn.patterns import AShape, BlockSparse, Dense, VerticalSlash

LLAMA = "gradientai/Llama-3-8B-Instruct-262k"
CLASSES = (
    policy.MixClass(Dense(), {1024: 1.2, 4096: 1.0}),
    policy.MixClass(AShape(16, 256), {1024: 0.9, 2048: 0.5, 4096: 0.25}),
    policy.MixClass(AShape(64, 1024), {1024: 1.3, 2048: 1.1, 4096: 0.6}),
    policy.MixClass(VerticalSlash(100, 1000), {1024: 3.0, 2048: 2.0, 4096: 1.6}),
    policy.MixClass(BlockSparse(10), {1024: 0.8, 2048: 1.2, 4096: 0.9}),
)


@pytest.mark.parametrize("patterns,length", [
    ([AShape(16, 256)], 1024),
    ([AShape(0, 0)], 1024),  # the smallest class that holds it
    ([AShape(17, 10)], 4096),
    ([AShape(64, 1024)] * 3, 4096),
    ([AShape(64, 1024), AShape(16, 256)], 2048),  # (1.3 + 0.9) / 2, then (1.1 + 0.5) / 2
    ([BlockSparse(10)], 4096),  # not 1024: it must stay faster
    ([BlockSparse(20)], 8192),  # no class is that large: twice the keys; then 1 / length
    ([VerticalSlash(100, 1000)], 8192),  # 1.6 at the last length
    ([VerticalSlash(200, 2000)], 16384),
    ([Dense()], 4096),
    ([Dense(), VerticalSlash(100, 1000)], 8192),  # 0.5 stays, 0.8 has to fall to 0.5
    ([AShape(0, 2**30)], policy.NEVER),
])  # fmt: skip
def test_min_length(patterns, length):
    assert policy.min_length(patterns, CLASSES) == length


def test_dense_heads_alone_never_win():
    slow = (policy.MixClass(Dense(), {64: 1.5}), policy.MixClass(AShape(1, 1), {64: 0.9}))
    assert policy.min_length([Dense()], slow) == policy.NEVER
    assert policy.min_length([Dense(), Dense(), AShape(1, 1)], slow) == policy.NEVER
    assert policy.min_length([Dense(), AShape(1, 1)], slow) == 128


def test_shipped_table():
    paths = policy.load(policy.SHIPPED)
    assert "sm80" in paths and all(classes for classes in paths.values())
    assert json.loads(policy.SHIPPED.read_text())["paths"]["sm80"]["measured"]["record"]


def test_shipped_sm80_agrees_with_its_record():
    """Of the record that its small heads are fitted to: no check of other presets."""
    classes = policy.load(policy.SHIPPED)["sm80"]
    assert policy.min_length([VerticalSlash(1000, 6096)], classes) == 65536
    assert policy.min_length([BlockSparse(100)], classes) == 32768
    assert policy.min_length([AShape(1024, 4096)], classes) == 32768
    layers = PatternConfig.load(LLAMA).layers
    found = [policy.min_length(layer, classes) for layer in layers]
    assert set(found) == {16384, 32768}  # all of its layers won at 32768, 10 at 16384
    assert 8 <= found.count(16384) <= 12


@pytest.mark.parametrize("name", PatternConfig.presets())
def test_every_preset_has_lengths(name):
    for classes in policy.load(policy.SHIPPED).values():
        for layer in PatternConfig.load(name).layers:
            assert 1024 <= policy.min_length(layer, classes) < policy.NEVER


# --- recommended_min_length -----------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    """A file of CLASSES for the CPU."""
    file = tmp_path / "lengths.json"
    policy.save(file, "cpu", CLASSES, {"device": "x"})
    return file


def test_recommended(table):
    recommend = policy.recommended_min_length
    assert recommend([AShape(16, 256)], "cpu", table=table) == 1024
    assert recommend((AShape(64, 1024),), torch.device("cpu"), table=str(table)) == 4096
    # float16 is refused on the CPU, other devices have no path
    assert recommend([AShape(1, 1)], "cpu", dtype=torch.float16, table=table) == 32768
    assert recommend([AShape(1, 1)], "meta") == policy.DEFAULT_MIN_LENGTH


def test_a_path_without_measurements(monkeypatch, table):
    monkeypatch.setattr(policy, "path_of", lambda *_: "sm999 new")
    assert policy.recommended_min_length([AShape(1, 1)], "cpu") == policy.DEFAULT_MIN_LENGTH
    monkeypatch.setattr(policy, "path_of", lambda *_: "sm80 portable")
    for file in (None, table):  # the shipped table has it
        assert policy.recommended_min_length([AShape(1024, 4096)], "cpu", table=file) == 32768


@pytest.mark.parametrize("patterns,error,text", [
    ([], ValueError, "patterns: expected one for every query head, got none"),
    ([AShape(1, 1), 3], TypeError, r"patterns\[1\]: expected a pattern, got int"),
])  # fmt: skip
def test_bad_patterns(patterns, error, text):
    with pytest.raises(error, match=text):
        policy.recommended_min_length(patterns, "cpu")


# --- tables ---------------------------------------------------------------------------------------


def test_save_and_load(table):
    assert policy.load(table) == {"cpu": CLASSES}
    policy.save(table, "sm90", CLASSES[:1] + CLASSES[2:], {"device": "y"})
    policy.save(table, "cpu", CLASSES[:2] + CLASSES[3:], {"device": "z"})  # replaces its own only
    assert policy.load(table) == {
        "cpu": CLASSES[:2] + CLASSES[3:],
        "sm90": CLASSES[:1] + CLASSES[2:],
    }
    assert json.loads(table.read_text())["paths"]["cpu"]["measured"] == {"device": "z"}


@pytest.mark.parametrize("old,new,text", [
    ('"format"', '"formt"', 'expected an object with "format": "sparseattn-min-lengths"'),
    ('"version": 1', '"version": 7', "expected version 1"),
    ("{", "[", "expected JSON"),
    ('"block_sparse"', '"spiral"', "path cpu: kind: expected one of"),
    ('"top_k": 10', '"top_k": 0', "path cpu: BlockSparse.top_k"),
    ('"1024": 0.8', '"1024": -1', "path cpu: ratios of BlockSparse"),
    ('"1024": 0.8', '"x": 1', "path cpu: invalid literal"),
    ('"ratios": {"1024": 0.8, "2048": 1.2, "4096": 0.9}', '"ratios": {}', "expected positive"),
])  # fmt: skip
def test_bad_tables(tmp_path, table, old, new, text):
    bad = tmp_path / f"{abs(hash((old, new)))}.json"
    bad.write_text(table.read_text().replace(old, new))
    with pytest.raises(ValueError, match=text) as raised:
        policy.load(bad)
    assert str(bad) in str(raised.value)


def test_a_kind_without_class(tmp_path):
    file = tmp_path / "few.json"
    policy.save(file, "cpu", CLASSES[:1], {})
    with pytest.raises(ValueError, match="no class of kind a_shape, block_sparse, vertical_slash"):
        policy.load(file)


# --- in a model -----------------------------------------------------------------------------------


@pytest.fixture
def sparse_layers(monkeypatch):
    """Patterns of every call of sparse_attention."""
    calls = []
    real = ops.sparse_attention

    def spy(q, k, v, patterns, **kwargs):
        calls.append(tuple(patterns))
        return real(q, k, v, patterns, **kwargs)

    monkeypatch.setattr(ops, "sparse_attention", spy)
    return calls


@torch.no_grad()
def test_each_layer_has_its_own_length(tmp_path, sparse_layers):
    file = tmp_path / "lengths.json"
    ratios = {AShape(8, 8): {64: 0.9}, AShape(64, 64): {64: 1.4, 128: 0.9}}
    classes = [policy.MixClass(pattern, found) for pattern, found in ratios.items()]
    others = [
        policy.MixClass(pattern, {64: 9.0})
        for pattern in (Dense(), VerticalSlash(1, 1), BlockSparse(1))
    ]
    policy.save(file, "cpu", classes + others, {})
    model = fresh("llama")
    heads = model.config.num_attention_heads
    small, large = (AShape(8, 8),) * heads, (AShape(64, 64),) * heads
    assert hf.enable(model, [small, large], min_length=file) is model
    for length, expected in ((96, [small]), (128, [small, large])):
        sparse_layers.clear()
        model(tokens(1, length))
        assert sparse_layers == expected
    hf.enable(model, [small, large], min_length=str(file))
    hf.enable(model, [small, large])  # the shipped table
    sparse_layers.clear()
    model(tokens(1, 128))
    assert sparse_layers == []


def test_bad_files_are_refused_by_enable(tmp_path):
    model = fresh("llama")
    patterns = spread([AShape(1, 8)], model)
    with pytest.raises(FileNotFoundError):
        hf.enable(model, patterns, min_length=tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match=r"bad\.json: expected an object"):
        hf.enable(model, patterns, min_length=tmp_path / "bad.json")
    assert model.config._attn_implementation != hf.NAME  # nothing was changed
