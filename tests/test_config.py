"""Pattern configs: own format, MInference's JSON, presets, errors by name."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import sparseattn.config as config_module
from sparseattn.config import PatternConfig, pattern_from_json, pattern_to_json, write_atomic
from sparseattn.patterns import AShape, BlockSparse, Dense, VerticalSlash

SHARED = Path(__file__).parents[2] / "shared" / "data" / "minference_patterns"
KINDS = [Dense(), AShape(128, 3968), VerticalSlash(1000, 6096), BlockSparse(100)]


def saved(tmp_path, data, name="patterns.json"):
    path = tmp_path / name
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def mixed(num_layers, num_heads, distinct, seed=0):
    rng = random.Random(seed)
    palette = [VerticalSlash(7 * i, 3 * i + 1) for i in range(distinct - len(KINDS))] + KINDS
    picks = palette + rng.choices(palette, k=num_layers * num_heads - len(palette))
    rng.shuffle(picks)
    return [picks[i * num_heads : (i + 1) * num_heads] for i in range(num_layers)]


def test_layers_are_tuples_of_patterns():
    config = PatternConfig.from_layers([[Dense(), AShape(1, 2)], [BlockSparse(3), Dense()]], "m")
    assert config.layers == ((Dense(), AShape(1, 2)), (BlockSparse(3), Dense()))
    assert (config.num_layers, config.num_heads, config.model) == (2, 2, "m")
    assert config == PatternConfig(config.layers, "m")
    assert config != PatternConfig(config.layers)
    assert repr(config) == ("PatternConfig(model='m', 2 layers x 2 heads, 3 distinct patterns)")


def test_uniform():
    config = PatternConfig.uniform(AShape(4, 8), 3, 5)
    assert config.layers == ((AShape(4, 8),) * 5,) * 3
    with pytest.raises(ValueError, match="num_heads: expected at least 1, got 0"):
        PatternConfig.uniform(Dense(), 3, 0)
    with pytest.raises(TypeError, match="num_layers: expected int, got float"):
        PatternConfig.uniform(Dense(), 3.0, 1)


@pytest.mark.parametrize(
    ("layers", "error", "text"),
    [
        ([], ValueError, "at least one layer, got none"),
        ([[]], ValueError, "layer 0: expected at least one head"),
        ("ab", TypeError, "layers: expected nested sequences"),
        ([Dense()], TypeError, "layer 0: expected nested sequences"),
        ([[Dense()], [Dense()] * 2], ValueError, "layer 1: expected 1 heads as in layer 0, got 2"),
        ([[Dense()], ["dense"]], TypeError, "layer 1, head 0: expected one of Dense.*got 'dense'"),
        ([[Dense]], TypeError, "layer 0, head 0: expected one of"),
    ],
)
def test_bad_layers_are_named(layers, error, text):
    with pytest.raises(error, match=text):
        PatternConfig.from_layers(layers)


@pytest.mark.parametrize("distinct", [4, 52, 53, 120])
def test_own_format_round_trips(tmp_path, distinct):
    config = PatternConfig.from_layers(mixed(20, 16, distinct), "org/näme")
    path = tmp_path / "patterns.json"
    config.save(path)
    assert PatternConfig.load(path) == config
    assert PatternConfig.load(str(path)) == config
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # no scratch left


def test_own_format_is_small_with_a_line_a_layer(tmp_path):
    config = PatternConfig.from_layers(mixed(80, 64, 6))
    text = config.dumps()
    assert len(text) < 7000
    lines = [line.strip(' ",') for line in text.splitlines()]
    assert sum(len(line) == 64 and line.isalpha() for line in lines) == 80
    assert json.loads(text)["model"] is None
    assert PatternConfig.load(saved(tmp_path, text)) == config


def test_commonest_pattern_is_a():
    config = PatternConfig.from_layers([[Dense()] + [BlockSparse(5)] * 3])
    assert json.loads(config.dumps())["layers"] == ["baaa"]


@pytest.mark.parametrize("pattern", KINDS)
def test_pattern_json_round_trips(pattern):
    assert pattern_from_json(json.loads(json.dumps(pattern_to_json(pattern)))) == pattern


def own(**changes):
    data = {
        "format": "sparseattn-patterns",
        "version": 1,
        "model": None,
        "patterns": {"a": {"kind": "dense"}, "b": {"kind": "a_shape", "sink": 1, "window": 2}},
        "layers": ["ab", "ba"],
    }
    return {**data, **changes}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("{", "expected JSON"),
        ("3", "expected an object with"),
        ({"format": "other"}, "got format 'other'"),
        (own(version=2), "version: expected 1, got 2"),
        (own(extra=1), "expected the keys format, version, model, patterns, layers"),
        (own(model=3), "model: expected str or None, got int"),
        (own(layers=["ab", "a"]), "layer 1: expected 2 heads as in layer 0, got 1"),
        (own(layers=["ab", "ac"]), "layer 1, head 1: expected one of the codes 'a b', got 'c'"),
        (own(layers=["ab", 3]), "layer 1: expected a string of codes, got 3"),
        (own(layers=[]), "at least one layer"),
        (own(layers={}), '"layers" a list'),
        (own(patterns={"a1": {"kind": "dense"}}), "codes of letters"),
        (own(patterns={"a": {"kind": "slash"}}), "pattern 'a': kind: expected one of dense, a_"),
        (own(patterns={"a": {"kind": "a_shape", "sink": 1}}), "expected the sizes sink, window"),
        (own(patterns={"a": {"kind": "block_sparse", "top_k": 0}}), "pattern 'a': BlockSparse"),
        (own(patterns={"a": {"kind": "block_sparse", "top_k": 1.5}}), "expected int, got float"),
        (own(patterns={"a": 3}), "pattern 'a': expected an object"),
        ('{"format": "sparseattn-patterns", "format": "x"}', "the key 'format' twice"),
    ],
)
def test_bad_files_are_named(tmp_path, data, text):
    path = saved(tmp_path, data)
    with pytest.raises(ValueError, match=text) as caught:
        PatternConfig.load(path)
    assert str(path) in str(caught.value)


def test_longer_codes_are_parted_by_spaces(tmp_path):
    data = own(patterns={"d": {"kind": "dense"}, "sink": own()["patterns"]["b"]})
    data["layers"] = ["d sink  d", "sink d d"]
    assert PatternConfig.load(saved(tmp_path, data)).layers == (
        (Dense(), AShape(1, 2), Dense()),
        (AShape(1, 2), Dense(), Dense()),
    )


def test_minference_file(tmp_path):
    data = [
        {
            "0": ["vertical_and_slash", 1000, 4096, 336],
            "1": ["stream_llm", 100, 800, 0.5],
            "2": ["block_sparse", 1000, 6096, 1],
        },
        {"2": ["vertical_and_slash", 30, 800], "0": ["vertical_and_slash", 3500, 100, 1]},
        {},
    ]
    missing = VerticalSlash(1000, 6096)
    assert PatternConfig.load(saved(tmp_path, data)).layers == (
        (VerticalSlash(1000, 4096), AShape(100, 800), BlockSparse(100)),
        (VerticalSlash(3500, 100), missing, VerticalSlash(30, 800)),
        (missing,) * 3,
    )


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "at least one layer"),
        ([{}], "at least one layer that lists all heads"),
        ([{"0": ["stream_llm", 1, 2, 0], "2": ["stream_llm", 1, 2, 0]}], "highest head number 2"),
        ([{"0": ["slash", 1, 2, 0]}], "layer 0, head '0': type: expected one of vertical_and_"),
        ([{"0": ["stream_llm", 1.5, 2, 0]}], "layer 0, head '0': AShape.sink: expected int"),
        ([{"0": ["stream_llm", 1]}], r"layer 0, head '0': expected \[type, a, b, score\]"),
        ([{"x": ["stream_llm", 1, 2]}], "layer 0, head 'x': expected a head number"),
        ([{"0": ["stream_llm", 1, 2]}, []], "layer 1: expected an object of heads"),
    ],
)
def test_bad_minference_files_are_named(tmp_path, data, text):
    path = saved(tmp_path, data)
    with pytest.raises(ValueError, match=text) as caught:
        PatternConfig.load(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_wrong_type(tmp_path):
    with pytest.raises(FileNotFoundError):
        PatternConfig.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        PatternConfig.load(str(tmp_path / "none.json"))
    with pytest.raises(TypeError, match="path_or_name: expected str or path, got int"):
        PatternConfig.load(3)


# Shapes of the models, from their published configs: layers, query heads.
SHAPES = {
    "gradientai/Llama-3-8B-Instruct-Gradient-1048k": (32, 32),
    "gradientai/Llama-3-70B-Instruct-Gradient-262k": (80, 64),
    "meta-llama/Llama-3.1-8B-Instruct": (32, 32),
    "meta-llama/Llama-3.1-70B-Instruct": (80, 64),
    "THUDM/glm-4-9b-chat-1m": (40, 32),
    "zai-org/glm-4-9b-chat-1m": (40, 32),
    "01-ai/Yi-9B-200K": (48, 32),
    "microsoft/Phi-3-mini-128k-instruct": (32, 32),
    "Qwen/Qwen2-7B-Instruct": (28, 28),
    "Qwen/Qwen2.5-7B-Instruct": (28, 28),
    "Qwen/Qwen2.5-32B-Instruct": (64, 40),
    "Qwen/Qwen2.5-72B-Instruct": (80, 64),
    "Qwen/Qwen2.5-7B-Instruct-1M": (28, 28),
    "Qwen/Qwen2.5-14B-Instruct-1M": (48, 40),
}


@pytest.mark.parametrize("name", SHAPES)
def test_presets_have_their_models_shape(name):
    config = PatternConfig.load(name)
    assert (config.num_layers, config.num_heads) == SHAPES[name]
    assert config.model == name
    assert name in PatternConfig.presets()


def test_every_preset_loads():
    folder = Path(config_module.__file__).parent / "presets"
    files = {path.name for path in folder.glob("*.json")} - {"index.json"}
    assert set(json.loads((folder / "index.json").read_text()).values()) == files
    assert len(files) == 14
    assert "Copyright (c) Microsoft Corporation" in (folder / "NOTICE").read_text()
    for name in PatternConfig.presets():
        assert PatternConfig.load(name).model == name


def test_preset_names_ignore_case_and_organisation():
    config = PatternConfig.load("META-llama/llama-3.1-8b-INSTRUCT")
    assert config.model == "meta-llama/Llama-3.1-8B-Instruct"
    assert set(sum(config.layers, ())) == {VerticalSlash(512, 2048)}
    assert PatternConfig.load("llama-3.1-8b-instruct") == config
    searched = PatternConfig.load("meta-llama/Llama-3.1-8B-Instruct@v1")
    assert len(set(sum(searched.layers, ()))) == 6
    # Two organisations publish this one, with the same patterns.
    assert PatternConfig.load("glm-4-9b-chat-1m").num_layers == 40


def test_unknown_preset_lists_close_and_all_names():
    with pytest.raises(ValueError, match=r"Did you mean .*Qwen/Qwen2-7B-Instruct") as caught:
        PatternConfig.load("Qwen/Qwen2-7B-Instrukt")
    for name in PatternConfig.presets():
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="expected a file or the name of a preset, got ''"):
        PatternConfig.load("")


@pytest.mark.skipif(not SHARED.is_dir(), reason="MInference's files are not beside the checkout")
def test_presets_equal_minferences_files():
    files = {path.stem: PatternConfig.load(path).layers for path in SHARED.glob("*.json")}
    assert len(files) == 14
    tail = "_kv_out_v32_fit_o_best_pattern"
    source = {
        "meta-llama/Llama-3.1-8B-Instruct": f"Llama_3.1_8B_Instruct_128k{tail}_v2",
        "meta-llama/Llama-3.1-8B-Instruct@v1": f"Llama_3.1_8B_Instruct_128k{tail}",
        "meta-llama/Llama-3.1-70B-Instruct": f"Llama_3.1_70B_Instruct_128k{tail}_v2",
        "gradientai/Llama-3-8B-Instruct-262k": f"Llama_3_8B_Instruct_262k{tail}",
        "gradientai/Llama-3-8B-Instruct-Gradient-1048k": f"Llama_3_8B_Instruct_262k{tail}",
        "gradientai/Llama-3-70B-Instruct-Gradient-1048k": f"Llama_3_70B_Instruct_262k{tail}",
        "zai-org/glm-4-9b-chat-1m": f"GLM_4_9B_1M_instruct{tail}",
        "01-ai/Yi-9B-200K": f"Yi_9B_200k{tail}",
        "microsoft/Phi-3-mini-128k-instruct": f"Phi_3_mini_128k_instruct{tail}",
        "Qwen/Qwen2-7B-Instruct": f"Qwen2_7B_Instruct_128k_instruct{tail}",
        "Qwen/Qwen2.5-7B-Instruct": f"Qwen2.5_7B_Instruct_128k_instruct{tail}",
        "Qwen/Qwen2.5-32B-Instruct": f"Qwen2.5_32B_Instruct_128k{tail}",
        "Qwen/Qwen2.5-72B-Instruct": f"Qwen2.5_72B_Instruct_128k{tail}",
        "Qwen/Qwen2.5-7B-Instruct-1M": "Qwen2.5_7B_Instruct_1M",
        "Qwen/Qwen2.5-14B-Instruct-1M": "Qwen2.5_14B_Instruct_1M",
    }
    assert set(source.values()) == set(files)
    for name, stem in source.items():
        assert PatternConfig.load(name).layers == files[stem], name


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "patterns.json"
    path.write_text("old")

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(config_module.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
