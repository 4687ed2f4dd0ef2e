"""``benchmarks/end_to_end.py`` at toy sizes: its rows, bars, inputs and picture."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")


pytestmark = pytest.mark.usefixtures("one_thread")


def test_smoke(script, tmp_path, capsys):
    path = tmp_path / "end.json"
    arguments = ["--smoke", "--output", str(path), "--commit", "abc", "--slice-tokens", "600"]
    assert script("end_to_end").main(arguments) == 0
    printed = capsys.readouterr().out
    assert "weights: random" in printed and "sparse prefill, 2048 tokens" in printed
    record = json.loads(path.read_text())
    assert record["benchmark"] == "end-to-end" and record["complete"] is True
    rows = record["results"]
    assert not [row for row in rows if "note" in row]
    for model in ("Llama-3-8B-1M", "GLM-4-9B-1M"):
        assert model in record["patterns"]
        for tokens in (1024, 2048):
            own = [r for r in rows if r["model"] == model and r.get("tokens") == tokens]
            first = {row["way"]: row for row in own if "ttft_s" in row}
            assert set(first) == {"sparse", "dense, own", "dense, SDPA"}
            for row in first.values():
                parts = row["attention_s"] + row["cache_s"] + row["other_s"]
                assert row["ttft_s"] == pytest.approx(parts) and row["weights_bytes"] > 0
            sparse = first["sparse"]
            assert sparse["sparse_layers"] == 2 and 0 < sparse["density"] < 1
            assert sum(sparse["cache_bytes"].values()) > sparse["cache_bytes"]["host_values"] > 0
            steps = {row["mode"]: row for row in own if row.get("phase") == "decode"}
            assert set(steps) == {"eager", "fixed, eager"}
            for row in steps.values():
                assert row["ms_per_token"] > 0 and 0 < row["hit_rate"] <= 1
    assert len(record["judged"]) == 4 and not any("bar" in row for row in record["judged"])
    pytest.importorskip("matplotlib")
    script("plot_results").main([str(path)])
    assert path.with_suffix(".png").stat().st_size > 10000


def test_long_dense_prefills_are_skipped(script, capsys):
    arguments = ["--smoke", "--dense-limit-s", "0", "--lengths", "512", "--ways", "dense, own"]
    assert script("end_to_end").main([*arguments, "--models", "GLM-4-9B-1M"]) == 0
    assert "skipped, about" in capsys.readouterr().out


def test_expected_time_of_a_longer_prefill(script):
    runs = script("end_to_end_runs")
    last = {"tokens": 1000, "ttft_s": 5.0, "attention_s": 2.0}
    assert runs.expected_seconds(None, 4000, last) == pytest.approx(2 * 16 + 3 * 4)


def test_bars(script):
    judge = script("end_to_end").judge
    rows = [
        {"model": "Llama-3-8B-1M", "way": "sparse", "tokens": 131072, "ttft_s": 5.3},
        {"model": "Llama-3-8B-1M", "way": "dense, own", "tokens": 131072, "ttft_s": 10.6},
        {"model": "Llama-3-8B-1M", "way": "dense, SDPA", "tokens": 131072, "ttft_s": 12.0},
        {"model": "Llama-3-8B-1M", "way": "sparse", "tokens": 1048576, "ttft_s": 61.0},
        {"model": "Llama-3-8B-1M", "way": "dense, own", "tokens": 1048576, "skipped": True,
         "expected_ttft_s": 610.0},
        {"model": "GLM-4-9B-1M", "way": "sparse", "tokens": 1048576, "ttft_s": 61.0},
    ]  # fmt: skip
    short, long, other = judge(rows)
    assert short["met"] is True and short["times_faster_than_dense"] == pytest.approx(2)
    assert "dense, own, measured" in short["dense"]
    assert long["met"] is False and long["times_faster_than_dense"] == pytest.approx(10)
    assert "expected" in long["dense"]
    assert "bar" not in other and "dense" not in other


@pytest.mark.parametrize("name", ["Llama-3-8B-1M", "GLM-4-9B-1M"])
@torch.no_grad()
def test_heads_select_clusters(script, name):
    """One layer of the real head shape: estimates select few pairs, far less than on noise."""
    models, runs = script("long_models"), script("end_to_end_runs")
    from sparseattn import VerticalSlash, hf

    tokens = 4096
    chosen = models.MODELS[name]
    sizes = {"hidden_size": 256, "intermediate_size": 64, "vocab_size": 2048}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 1}
    config = chosen.config(**(chosen.sizes | sizes))
    pattern = VerticalSlash(30, 200)
    found = {}
    for shaped in (False, True):
        torch.manual_seed(0)
        model = models.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        if shaped:
            models.shape(model, [[pattern] * 4])
        else:
            torch.nn.init.normal_(model.model.embed_tokens.weight)
        hf.enable(model, [[pattern] * 4], min_length=0)
        watch = runs.Watch(torch.device("cpu"), [0])
        runs.prefill(model, runs.prompt(model, tokens, 0), None, watch, 1024)
        (densities,) = watch.densities.values()
        found[shaped] = sum(densities) / len(densities)
    assert found[True] < 0.3 and found[True] < 0.6 * found[False]


def test_mean_density_needs_every_pattern(script):
    runs = script("end_to_end_runs")
    from sparseattn import AShape, VerticalSlash

    patterns = [[AShape(1, 5), VerticalSlash(3, 4)], [AShape(1, 5), AShape(1, 5)]]
    found = {"a_shape 1,5": [0.1, 0.3], "vertical_slash 3,4": [0.6]}
    assert runs.mean_density(patterns, found) == pytest.approx((0.6 + 3 * 0.2) / 4)
    assert runs.mean_density(patterns, {"a_shape 1,5": [0.1]}) is None


@pytest.mark.parametrize("arguments, message", [
    (["--steps", "0"], "--steps: expected at least 1, got 0"),
    (["--lengths", "64", "0"], "--lengths: expected at least 1"),
])  # fmt: skip
def test_refusals(script, capsys, arguments, message):
    with pytest.raises(SystemExit):
        script("end_to_end").main(["--smoke", *arguments])
    assert message in capsys.readouterr().err


def test_pool_lends_its_memory_and_gets_it_back(script, monkeypatch):
    """Pieces that fit are lent, the smallest first, nothing for no bytes; others are taken anew."""
    runs = script("end_to_end_runs")

    class Memory:
        def __init__(self, nbytes, device):
            self.nbytes, self.tensor = nbytes, None

        def free(self):
            pass

    class Module:
        HostMemory = Memory

    pool = runs.HostPool(torch.device("cpu"))
    pool.module, pool.allocate = Module, Module.HostMemory
    with pool.lending():
        pool.reserve(2, 100)  # of its own, not lent
    assert len({id(piece) for piece in pool.pieces}) == 2
    assert all(isinstance(piece, pool.allocate) for piece in pool.pieces)
    assert pool.nbytes == 200 and pool.reserve(2, 90) >= 0 and pool.nbytes == 200
    with pool.lending():
        assert Module.HostMemory(0, None).nbytes == 0 and len(pool.pieces) == 2
        first, second = Module.HostMemory(80, None), Module.HostMemory(100, None)
        assert not pool.pieces and Module.HostMemory(10, None).nbytes == 10
        first.free()
        first.free()
        assert len(pool.pieces) == 1
        del second
        assert len(pool.pieces) == 2
    assert Module.HostMemory is Memory
    pool.reserve(3, 200)
    assert [piece.nbytes for piece in pool.pieces] == [200, 200, 200] and pool.nbytes == 600
