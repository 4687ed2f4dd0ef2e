"""The demo: its measurements against the oracle, and a small run from end to end."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from helpers import cuda_reason

from sparseattn import reference
from sparseattn.config import PatternConfig
from sparseattn.patterns import AShape, BlockSparse, Dense, VerticalSlash

for package in ("transformers", "matplotlib", "tqdm"):
    pytest.importorskip(package)

from sparseattn import demo_measure, demo_model, demo_needle, plots  # noqa: E402
from sparseattn.cli import main  # noqa: E402

PATTERNS = [Dense(), AShape(5, 70), AShape(300, 1), VerticalSlash(40, 130), VerticalSlash(200, 101),
            BlockSparse(2), BlockSparse(3)]  # fmt: skip


def head(length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(1, 1, length, 64, generator=gen) for _ in range(2))


@pytest.mark.parametrize("length", [64, 257, 447])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_visited_keys_are_the_oracles(pattern, length):
    q, k = head(length)
    mask = reference.pattern_mask(q, k, [pattern])[0, 0]
    visited = demo_measure.VisitedKeys(pattern, q, k)
    assert torch.equal(visited.rows(torch.arange(length)), mask)
    rows = torch.tensor([length - 1, 3, 63, 20])
    assert torch.equal(visited.rows(rows), mask[rows])
    assert visited.pairs() == int(mask.sum())
    assert visited.density() == pytest.approx(float(mask.sum()) / (length * (length + 1) / 2))


def test_pairs_in_several_chunks(monkeypatch):
    q, k = head(447)
    visited = demo_measure.VisitedKeys(VerticalSlash(40, 130), q, k)
    whole = visited.pairs()
    monkeypatch.setattr(demo_measure, "_CHUNK", 1000)
    assert visited.pairs() == whole


def test_layer_measurements_are_the_oracles():
    gen = torch.Generator().manual_seed(1)
    q = 2 * torch.randn(1, 4, 128, 64, generator=gen)
    k, v = (2 * torch.randn(1, 2, 128, 64, generator=gen) for _ in range(2))
    patterns = [AShape(2, 20), VerticalSlash(35, 101), BlockSparse(1), Dense()]
    dense = demo_measure.dense_attention(q, k, v, 0.125)
    layer, pictures = demo_measure.measure_layer(q, k, v, 0.125, dense, patterns, [1, 3])
    mask = reference.pattern_mask(q, k, patterns)
    kept = reference.mass_kept(q, k, mask)[0]  # 128 rows: all are sampled
    exact, full = (reference.masked_attention(q, k, v, m)[0] for m in (mask, mask[:, 3:]))
    for h, measured in enumerate(layer["heads"]):
        assert measured["mass_kept"] == pytest.approx(float(kept[h]), abs=1e-4)
        error = (exact - full)[0, h].norm() / full[0, h].norm()
        assert measured["output_error"] == pytest.approx(float(error), abs=1e-4)
    assert layer["density"] == pytest.approx(
        float(mask.float().sum((2, 3)).mean()) / (128 * 129 / 2)
    )
    assert layer["speedup"] == layer["dense_s"] / layer["sparse_s"] > 0
    assert [picture.title.partition(":")[0] for picture in pictures] == ["head 1", "head 3"]
    dense_head = pictures[1]  # a pixel per key, the rest of the width stays empty
    assert torch.equal(dense_head.pattern[:, :128], mask[0, 3].float())
    assert dense_head.pattern.shape == dense_head.attention.shape == (128, plots.PIXELS)
    assert not dense_head.pattern[:, 128:].any()
    assert (dense_head.attention.amax(-1) == 1).all() and dense_head.attention.min() >= 0
    assert demo_measure.exactness(q, k, v, 0.125) < 1e-5


@pytest.mark.parametrize("length", [100_000, 3_000_000])
def test_python_carries_a_long_text(length):
    text, source = demo_model.read_text(None, length)
    assert len(text) >= length and source.startswith("Python's")
    assert len(set(text[:100_000].split())) > 1000  # words, not filler


def test_text_without_help_topics(monkeypatch):
    monkeypatch.setitem(demo_model.sys.modules, "pydoc_data.topics", None)
    text, source = demo_model.read_text(None, 10_000)
    assert len(text) >= 10_000 and source == "Python's help topics and standard library"


def test_byte_tokens():
    ids = demo_model.byte_tokens("aé".encode(), 4, torch.device("cpu"))
    assert ids.tolist() == [[256, 257, 97, 195]]


def test_model_is_glm_4():
    model = demo_model.build_model(1, 8, 256, 128, 512, torch.device("cpu"), seed=0)
    attention = model.model.layers[0].self_attn
    assert type(model).__name__ == "GlmForCausalLM"
    assert attention.q_proj.bias.shape == (8 * 128,) and attention.k_proj.bias.shape == (2 * 128,)
    assert model.model.rotary_emb.inv_freq.shape == (32,)  # half of 128 dims, in pairs
    again = demo_model.build_model(1, 8, 256, 128, 512, torch.device("cpu"), seed=0)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def run_demo(tmp_path, *arguments: str) -> dict:
    assert main(["demo", "--output", str(tmp_path), *arguments]) == 0
    assert (tmp_path / "patterns.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return json.loads((tmp_path / "report.json").read_text())


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    if request.param == "cuda" and cuda_reason():
        pytest.skip(cuda_reason())
    return request.param


def test_needles_are_found(tmp_path, capsys, device):
    report = run_demo(tmp_path, "--tokens", "1024", "--device", device)
    assert report["tokens"] == 1024 and len(report["layers"]) == 5
    assert report["model"]["weights"] == "trained"
    numbers = [needle["number"] for needle in report["needles"]]
    assert [needle["depth"] for needle in report["needles"]] == [0, 0.25, 0.5, 0.75, 1]
    found = report["methods"]
    assert list(found) == ["dense", "sparse", "a_shape", "shadowkv"]
    for name in ("dense", "sparse", "shadowkv"):
        assert found[name]["answers"] == numbers and found[name]["found"] == len(numbers)
    assert found["a_shape"]["found"] < len(numbers)  # the text is needed
    assert found["dense"]["density"] == 1 and 0 < found["sparse"]["density"] < 0.9
    assert found["shadowkv"]["decode_share"] < 0.2
    sizes = {name: sum(method["cache_bytes"].values()) for name, method in found.items()}
    assert sizes["shadowkv"] < sizes["dense"] == sizes["sparse"]
    assert all(method["prefill_s"] > 0 and method["tokens_per_s"] > 0 for method in found.values())
    for layer in report["layers"]:
        assert len(layer["heads"]) == 8
        assert all(0 < measured["density"] <= 1 for measured in layer["heads"])
    assert report["covering_patterns_error"] < (1e-4 if device == "cpu" else 3e-2)
    printed = capsys.readouterr().out
    assert "The weights are trained" in printed and "speed-up" in printed
    assert printed.count(" 5 of 5 ") == 3 and numbers[2] in report["excerpt"]


def test_needles_in_a_text_of_the_user(tmp_path):
    (tmp_path / "text.txt").write_text("Some words of a user, no two lines alike: 12.\n" * 60)
    PatternConfig.uniform(AShape(4, 60), 5, 8).save(tmp_path / "patterns.json")
    text, patterns = (str(tmp_path / name) for name in ("text.txt", "patterns.json"))
    report = run_demo(tmp_path, "--text", text, "--patterns", patterns, "--seed", "3")
    assert 600 < report["tokens"] < 2000 and report["text"] == text
    assert "words of a user" in report["excerpt"] and report["share"] is None
    assert report["methods"]["dense"]["found"] == 5
    assert {m["pattern"] for m in report["layers"][3]["heads"]} == {"a_shape 4,60"}


def test_prompts_hold_the_needles_at_their_depths():
    from sparseattn.evaluation import model

    _, tokenizer = model.load("needle")
    arguments = argparse.Namespace(tokens=700, device="cpu", seed=1, text=None)
    prompts = demo_needle.build(arguments, tokenizer)
    assert [prompts.prompt(n).shape for n in range(5)] == [(1, 700)] * 5
    text = tokenizer.decode(prompts.document[0])
    at = [
        text.index(f"\nmagic: {key}={number}\n") / len(text)
        for key, number in zip(prompts.keys, prompts.numbers, strict=True)
    ]
    assert at == pytest.approx(prompts.depths, abs=0.1) and at == sorted(at)
    assert tokenizer.decode(prompts.questions[4][0]).endswith(f"answer: {prompts.keys[4]}=")


def test_a_prompt_of_the_length_on_a_gpu():
    """The help topics hold it; more text comes from sources that were trained on."""
    from sparseattn.evaluation import model

    _, tokenizer = model.load("needle")
    arguments = argparse.Namespace(tokens=None, device="cpu", seed=0, text=None)
    for tokens, source in ((131072, "Python's help topics"), (300000, "library")):
        arguments.tokens = tokens
        prompts = demo_needle.build(arguments, tokenizer)
        assert prompts.prompt(0).shape == (1, tokens) and prompts.source.endswith(source)


def test_random_weights(tmp_path, capsys, device):
    options = ["--model", "random", "--tokens", "512", "--layers", "2", "--device", device]
    report = run_demo(tmp_path, *options)
    assert report["tokens"] == 512 and len(report["layers"]) == 2
    heads = demo_model.SIZES[device]["heads"]
    for layer in report["layers"]:
        assert len(layer["heads"]) == heads
        for measured in layer["heads"]:
            assert 0 < measured["density"] < 1 and measured["density"] < measured["mass_kept"]
            assert measured["mass_kept"] < 1.001 and 0 < measured["output_error"] < 1
    assert report["covering_patterns_error"] < (1e-4 if device == "cpu" else 3e-2)
    assert report["prefill"]["logits_error"] > 0
    printed = capsys.readouterr().out
    assert "The weights are random" in printed and "speed-up" in printed
    assert printed.count("block_sparse") >= 1


def test_text_and_patterns_of_the_user(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"some words of a user, " * 30)
    PatternConfig.uniform(AShape(4, 60), 1, 4).save(tmp_path / "patterns.json")
    report = run_demo(
        tmp_path,
        "--model",
        "random",
        "--text",
        str(tmp_path / "text.txt"),
        "--patterns",
        str(tmp_path / "patterns.json"),
    )
    assert report["tokens"] == 22 * 30 + 2 and report["model"]["heads"] == 4
    (layer,) = report["layers"]
    assert [measured["pattern"] for measured in layer["heads"]] == ["a_shape 4,60"] * 4


RANDOM = ["--model", "random"]


@pytest.mark.parametrize("arguments,message", [
    (["--tokens", "10"], "--tokens: expected at least 256, got 10"),
    (["--layers", "2"], "--layers: expected --model random with it"),
    (["--text", "absent.txt"], "No such file or directory: 'absent.txt'"),
    (["--text", __file__, "--tokens", "99999"], "--text: expected at least 999"),
    (["--patterns", "absent"], "absent"),
    (["--patterns", "Yi-9B-200K"], "--patterns: expected 5 layers x 8 heads, got 48 x 32"),
    ([*RANDOM, "--tokens", "10"], "--tokens: expected at least 256, got 10"),
    ([*RANDOM, "--layers", "0"], "--layers: expected at least 1, got 0"),
    ([*RANDOM, "--text", "absent.txt"], "No such file or directory: 'absent.txt'"),
    ([*RANDOM, "--text", __file__, "--tokens", "9999999"],
     "--text: expected at least 9999997 bytes, got"),
    ([*RANDOM, "--patterns", "absent"], "absent"),
])  # fmt: skip
def test_bad_arguments(tmp_path, capsys, arguments, message):
    assert main(["demo", "--output", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line and "Loading weights" not in line]
    assert len(lines) == 1 and lines[0].startswith("sparseattn demo: ") and message in lines[0]


def test_missing_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sparseattn.demo._NEEDED", ("transformers", "absent_package"))
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "demo needs absent_package: pip install 'sparseattn[demo]'" in capsys.readouterr().err
