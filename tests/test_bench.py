"""``sparseattn bench``: pair counts against the oracle, mixes by name, and a whole run."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import cuda_reason

from sparseattn import bench_inputs, bench_layer, bench_mixes, bench_prefill, cli, ops, policy
from sparseattn import reference as ref
from sparseattn.bench_tools import Timer, format_table
from sparseattn.config import PatternConfig
from sparseattn.patterns import AShape, BlockSparse, Dense, VerticalSlash

FILES = ("prefill.json", "prefill.txt", "prefill.png")


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and cuda_reason():
        pytest.skip(cuda_reason())
    return torch.device(request.param)


# --- pairs ----------------------------------------------------------------------------------------


def visible(q, k, pattern):
    """Pairs of each head by the oracle's mask of what the operators estimate."""
    heads, tokens = q.shape[1:3]
    if isinstance(pattern, VerticalSlash):
        lists = ops.estimate_vertical_slash(
            q, k, num_columns=pattern.columns, num_offsets=pattern.offsets
        )
        lists = (x[0].cpu() for x in lists)
        masks = [ref.vertical_slash_mask(tokens, tokens, c, o) for c, o in zip(*lists, strict=True)]
    elif isinstance(pattern, BlockSparse):
        blocks = ops.estimate_block_sparse(q, k, top_k=pattern.top_k)[0].cpu()
        masks = [ref.block_sparse_mask(tokens, tokens, head) for head in blocks]
    elif isinstance(pattern, AShape):
        masks = [ref.a_shape_mask(tokens, tokens, pattern.sink, pattern.window)] * heads
    else:
        masks = [ref.dense_mask(tokens, tokens)] * heads
    return torch.stack([mask.sum().double() for mask in masks])


@pytest.mark.parametrize("tokens", [64, 640])
def test_pairs_are_those_of_the_oracle(device, tokens):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q, k = bench_inputs.structured_qk(tokens, 4, 2, 64, device, dtype=dtype)
    assert q.dtype == k.dtype == dtype and q.shape == (1, 4, tokens, 64)
    patterns = [Dense(), AShape(10, 100), VerticalSlash(40, 90), BlockSparse(3), AShape(0, 0)]
    exact = bench_inputs.pattern_pairs(q, k, patterns, exact=True)
    worked = bench_inputs.pattern_pairs(q, k, patterns)
    for pattern in patterns:
        assert torch.equal(exact[pattern], visible(q, k, pattern)), pattern
        if isinstance(pattern, (VerticalSlash, BlockSparse)):  # whole tiles are never fewer
            assert (worked[pattern] >= exact[pattern]).all()


def test_pairs_of_lists_out_of_range():
    columns = torch.tensor([[[5, 5, -1, 900, 63]]])
    offsets = torch.tensor([[[0, 70, -1, 5000, 191]]])
    counted = bench_inputs.vertical_slash_pairs(columns, offsets, 256, exact=True)
    assert int(counted) == int(
        ref.vertical_slash_mask(256, 256, columns[0, 0], offsets[0, 0]).sum()
    )


# --- mixes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,pattern", [
    ("vertical_slash (30, 800)", VerticalSlash(30, 800)),
    (" ( 30 ,800 )", VerticalSlash(30, 800)),
    ("a_shape 8,100", AShape(8, 100)),
    ("block_sparse 100", BlockSparse(100)),
    ("block_sparse (100)", BlockSparse(100)),
])  # fmt: skip
def test_mix_of_one_pattern(name, pattern):
    (mix,) = bench_mixes.resolve([name, name], heads=3)
    assert mix.layers == ((pattern,) * 3,) and mix.times == (1,) and mix.pattern == pattern


def test_mix_of_a_preset():
    config = PatternConfig.load(bench_mixes.LLAMA)
    (mix,) = bench_mixes.resolve([bench_mixes.LLAMA], heads=32)
    assert sum(mix.times) == len(config.layers) and mix.pattern is None
    assert set(mix.layers) == set(config.layers)
    (spread,) = bench_mixes.resolve([bench_mixes.LLAMA], heads=8)
    assert {layer[::4] for layer in config.layers} == set(spread.layers)


def test_all_mixes():
    mixes = bench_mixes.resolve(["all"], heads=32)
    names = [mix.name for mix in mixes]
    assert names[: len(bench_mixes.NAMED)] == list(bench_mixes.NAMED)
    configs = {PatternConfig.load(name).layers for name in PatternConfig.presets()}
    assert len(names) == len(set(names)) == len(bench_mixes.NAMED) + len(configs)


@pytest.mark.parametrize("name", ["", "dense (1, 2)", "a_shape 3", "(1, 2, 3)", "block_sparse 1,2",
                                  "no-such-preset", "spiral (1, 2)"])  # fmt: skip
def test_unknown_mix(name):
    with pytest.raises(ValueError, match=r"--mixes: .*expect"):
        bench_mixes.resolve([name], heads=4)


# --- the command ----------------------------------------------------------------------------------


def test_smoke(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, table = tmp_path / "a" / "b", tmp_path / "lengths.json"
    arguments = ["bench", "prefill", "--smoke", "--output", str(out), "--record-policy", str(table)]
    assert cli.main([*arguments, "--commit", "abc"]) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    assert (out / "prefill.txt").read_text() in printed + "\n"
    assert (out / "prefill.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((out / "prefill.json").read_text())
    assert record["machine"]["commit"] == "abc" and record["stopped"] is None
    assert len(record["results"]) == 2 * len(bench_mixes.SMOKE)
    for row in record["results"]:
        assert row["mix"] in printed and row["tokens"] in (256, 512)
        assert 0 < row["density"] <= 1 and row["ms"] > 0 and row["tflops"] > 0
        fastest = min(row["dense_ms"].values())
        assert row["speedup"] == pytest.approx(fastest / row["ms"])
        assert list(row["dense_ms"]) == ["dense list", "SDPA"]
    classes = policy.load(table)["cpu"]
    assert {one.pattern for one in classes} == {
        Dense(), VerticalSlash(60, 200), BlockSparse(2), AShape(64, 128)
    }  # fmt: skip
    assert all(set(one.ratios) == {256, 512} for one in classes)


def run(capsys, *arguments: str) -> str:
    assert cli.main(["bench", "prefill", "--smoke", *arguments]) == 0
    return capsys.readouterr().out


def test_slow_dense_is_skipped(capsys):
    text = run(capsys, "--lengths", "256", "--mixes", "a_shape 8,8", "--dense-limit-s", "1e-9")
    assert "256 tokens, SDPA: skipped: about 0 s" in text and "none of them" in text


def test_long_dense_calls_run_once(capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    calls = []
    real = bench_layer.sdpa

    def spy(q, *rest):
        calls.append(q.shape[2])
        return real(q, *rest)

    monkeypatch.setattr(bench_layer, "sdpa", spy)
    monkeypatch.setattr(bench_layer, "_ONCE_MS", 0)
    run(capsys, "--lengths", "512", "1024", "--mixes", "a_shape 8,8", "--output", str(tmp_path))
    assert [calls.count(tokens) for tokens in (64, 512, 1024)] == [4, 1, 1]
    record = json.loads((tmp_path / "prefill.json").read_text())
    assert [one["repeats"] for one in record["dense"]] == [1] * 4


def test_stops_where_memory_does_not_suffice(capsys, monkeypatch):
    monkeypatch.setattr(bench_layer.bench_tools, "available_memory", lambda: 1.0 * 2**20)
    text = run(capsys, "--lengths", "128", "65536", "--mixes", "a_shape 8,8")
    assert "\n   128  a_shape (8, 8)" in text
    assert "stopped: 65536 tokens and more: q, k, v and the output take 0.1 GiB, 0.0 GiB" in text


def test_sizes_beyond_the_prompt(capsys):
    """Patterns larger than the prompt select it whole."""
    text = run(
        capsys, "--lengths", "128", "--mixes", "(1000, 6096)", "block_sparse 9", "a_shape 0,900"
    )
    assert text.count("1.0000") == 3


@pytest.mark.parametrize("arguments,message", [
    (["--lengths", "100"], "--lengths: expected multiples of 64 below 2**31 - 128, got 100"),
    (["--heads", "6", "--kv-heads", "4"], "--kv-heads: expected a divisor of 6, got 4"),
    (["--heads", "0"], "--heads: expected at least 1, got 0"),
    (["--head-dim", "80"], "--dtype, --head-dim: refused: head_dim: expected one of"),
    (["--budget-ms", "0"], "--budget-ms: expected more than 0, got 0.0"),
    (["--mixes", "nothing"], "--mixes: expected a pattern with sizes"),
    (["--mixes", "a_shape 8,8", "--record-policy", "x"],
     "--record-policy: expected --mixes that have a layer all of one pattern of each kind, got "
     "none of block_sparse, vertical_slash"),
])  # fmt: skip
def test_refusals(capsys, arguments, message):
    assert cli.main(["bench", "prefill", "--smoke", *arguments]) == 2
    assert f"sparseattn bench: {message}" in capsys.readouterr().err


def test_bench_needs_a_name(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench"])
    assert exit_.value.code == 2
    assert "BENCHMARK" in capsys.readouterr().err


@pytest.mark.cuda
def test_on_the_gpu(capsys):
    arguments = ["--lengths", "1024", "2048", "--heads", "8", "--kv-heads", "2", "--budget-ms", "5"]
    assert cli.main(["bench", "prefill", *arguments]) == 0
    text = capsys.readouterr().out
    assert "SDPA cuDNN ms" in text and "extra MiB" in text
    assert all(text.count(name) == 3 for name in bench_mixes.DEFAULT)


# --- pieces ---------------------------------------------------------------------------------------


def test_timer(device):
    calls = []
    timing = Timer(device)(lambda: calls.append(1), warm_up=0, least=2)
    assert timing.repeats == len(calls) == 2 and timing.ms_min <= timing.ms <= timing.ms_max
    assert Timer(device)(lambda: None, budget_ms=1e9, most=4).repeats == 4


def test_table():
    rows = [{"a": "x", "b": 1.26}, {"a": "long", "b": "skipped"}, {"a": "y"}]
    text = format_table(rows, (("a", "name", ""), ("b", "ms", ".1f"), ("c", "none", "")))
    assert text.split("\n") == [
        "name       ms  none",
        "x         1.3  -",
        "long  skipped  -",
        "y           -  -",
    ]


def test_wins_from_and_classes():
    def row(tokens, mix, speedup):
        dense = {"dense list": 3.0, "SDPA": 2.0}
        return {"tokens": tokens, "mix": mix, "dense_ms": dense, "fastest_dense": "SDPA",
                **({"speedup": speedup} if speedup else {})}  # fmt: skip

    (mix,) = bench_mixes.resolve(["a_shape 8,8"], heads=2)
    rows = [row(64, mix.name, 1.5), row(128, mix.name, 0.8), row(256, mix.name, 1.25),
            row(512, mix.name, None)]  # fmt: skip
    assert bench_prefill.wins_from(rows, mix.name) == 256
    assert bench_prefill.wins_from(rows[:2], mix.name) is None
    dense, slash = bench_prefill.policy_classes((mix,), rows)
    assert dense == policy.MixClass(Dense(), dict.fromkeys((64, 128, 256, 512), 1.5))
    assert slash == policy.MixClass(AShape(8, 8), {64: 0.6667, 128: 1.25, 256: 0.8})
