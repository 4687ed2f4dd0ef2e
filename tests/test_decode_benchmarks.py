"""``benchmarks/decode_step.py`` and ``benchmarks/decode_model.py`` at toy sizes, their bars, inputs
and pictures."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(script, path):
    """The picture of a record, where matplotlib is."""
    pytest.importorskip("matplotlib")
    script("plot_results").main([str(path)])
    assert path.with_suffix(".png").stat().st_size > 10000


def test_fp8_smoke(script, tmp_path):
    path = tmp_path / "fp8.json"
    arguments = ["--smoke", "--output", str(path), "--repeats", "2", "--lengths", "512"]
    assert script("decode_fp8").main([*arguments, "--batches", "2", "--commit", "abc"]) == 0
    rows = json.loads(path.read_text())["results"]
    assert {r["kind"] for r in rows} == {"none", "values", "factor", "both"}
    for row in rows:
        fp8 = {"values": row["kind"] in ("values", "both"), "factor": row["kind"] != "values"}
        assert row["ms"] > 0 and (0.005 < row["error"] < 0.05 or row["kind"] == "none")
        plain = next(r for r in rows if r["kind"] == "none" and r["shape"] == row["shape"])
        if fp8["values"]:
            assert row["store_bytes"] < 0.51 * plain["store_bytes"]
            assert row["gather_bytes"] == plain["gather_bytes"] / 2
        if fp8["factor"] and row["kind"] != "none":
            assert row["factor_bytes"] < 0.6 * plain["factor_bytes"]


# --- decode_step ----------------------------------------------------------------------------------


def test_step_smoke(script, tmp_path, capsys):
    path = tmp_path / "step.json"
    arguments = ["--smoke", "--output", str(path), "--repeats", "2", "--lengths", "512"]
    assert script("decode_step").main([*arguments, "--hits", "0.5", "--commit", "abc"]) == 0
    printed = capsys.readouterr().out
    record = json.loads(path.read_text())
    assert record["benchmark"] == "decode-step" and record["complete"] is True
    rows = record["results"]
    cases = {
        "select", "plan", "gather, host", "gather, device", "attention", "reconstruct",
        "step, host", "step, device", "step, direct", "dense, SDPA", "dense, SDPA, rows",
    }  # fmt: skip
    for name in ("Llama-3.1-8B", "GLM-4-9B-1M"):
        assert name in printed
        for batch in (1, 2):
            own = [r for r in rows if r["shape"] == name and r["batch"] == batch]
            steps = [r for r in own if not r["case"].startswith("compress")]
            assert {r["case"] for r in steps if "ms" in r} == cases
            for row in steps:
                assert "error" not in row
                if "ms" in row:
                    assert row["ms"] > 0 and row["device_mb"] > 0 and row["floor_ms"] > 0
                    assert row.get("difference", 0) < 1e-2
                    assert row.get("hit_rate", 0.5) == 0.5
                    assert (row["pcie_mb"] > 0) == ("host" in row["case"])
                if row["case"].startswith("step") and "ms" in row:
                    assert row["times_faster_than_dense"] > 0
    compress = {row["case"] for row in rows if row["case"].startswith("compress")}
    assert len(compress) == 7 and "compress, whole" in compress
    assert record["judged"] == []  # bars are for 122K
    draw(script, path)


def test_step_bars(script):
    judge = script("decode_step").judge
    base = {"shape": "Llama-3.1-8B", "tokens": 124928, "batch": 1, "mode": "graph"}

    def verdicts(**row):
        return {found["target"]: found["met"] for found in judge([base | row])}

    fast = {"ms": 0.119, "times_faster_than_dense": 1.2}
    assert verdicts(case="step, direct", **fast) == {"T9": True, "dense": True}
    assert verdicts(case="step, device", ms=0.121, times_faster_than_dense=0.99) == {
        "T9": False, "dense": False
    }  # fmt: skip
    assert verdicts(case="step, host", ms=0.199, times_faster_than_dense=0.8) == {"T9": True}
    assert verdicts(case="step, host", note="skipped") == {"T9": None}
    assert verdicts(case="compress, whole", ms=16.1) == {"T11": False}
    assert verdicts(case="step, direct", batch=4, **fast) == {}
    assert verdicts(case="step, direct", shape="GLM-4-9B-1M", **fast) == {"dense": True}


@pytest.mark.parametrize("hits", [0.0, 0.35, 1.0])
def test_tables_give_the_hit_rate(script, hits):
    """Again and again, once they are restored; and slots hold what the tables say."""
    inputs = script("decode_inputs")
    setting = inputs.SMOKE
    device = torch.device("cpu")
    layer = inputs.Layer(setting.shapes[0], setting, 512, 2, device, hits=hits)
    top_k = setting.top_k(512)
    expected = top_k - round(hits * top_k)
    for _ in range(2):
        layer.restore()
        _, _, missed = layer.plan()
        assert (missed == expected).all()
    layer.fill_slots()
    index = layer.slot_chunk.long()[..., None].expand_as(layer.slots)
    assert torch.equal(layer.slots, layer.store.gather(2, index))
    assert torch.equal(layer.step(layer.store), layer.direct_step())


@pytest.mark.parametrize("arguments,message", [
    (["--lengths", "516"], "--lengths: expected multiples of 8"),
    (["--lengths", "128"], "--lengths: expected multiples of 8 >= 256, got 128"),
    (["--batches", "0"], "--batches: expected at least 1, got 0"),
    (["--hits", "2"], "--hits: expected 0 to 1, got 2.0"),
])  # fmt: skip
def test_step_refusals(script, capsys, arguments, message):
    with pytest.raises(SystemExit):
        script("decode_step").main(["--smoke", *arguments])
    assert message in capsys.readouterr().err


# --- decode_model ---------------------------------------------------------------------------------


def test_model_smoke(script, tmp_path, capsys):
    pytest.importorskip("transformers")
    path = tmp_path / "model.json"
    arguments = ["--smoke", "--output", str(path), "--models", "GLM-4-9B-1M", "--steps", "4"]
    assert script("decode_model").main([*arguments, "--ttft", "--ttft-tokens", "512"]) == 0
    assert "random weights" in capsys.readouterr().out
    record = json.loads(path.read_text())
    assert record["benchmark"] == "decode-model" and record["complete"] is True
    rows = record["results"]
    assert not [row for row in rows if "note" in row]
    ways = {(r["way"], r.get("store"), r["mode"], r["batch"]) for r in rows}
    for batch in (1, 2):
        assert ("dense", None, "eager", batch) in ways
        for store in ("device", "host"):
            assert {("shadow", store, mode, batch) for mode in ("eager", "fixed, eager")} <= ways
    for row in rows:
        if row["way"].startswith("TTFT"):
            assert row["ttft_s"] > 0 and row["ttft_tokens"] == 512
        else:
            assert row["tokens_per_s"] > 0
        if row["way"] == "shadow":
            assert 0.2 < row["hit_rate"] < 0.6
            assert (row["pcie_bytes_per_step"] > 0) == (row["store"] == "host")
        if row.get("store") == "host" and row["way"] == "shadow":
            assert row["host_bytes"] >= row["host_bytes_needed"] > 0
    assert len(record["judged"]) == 4 and not any("bar" in row for row in record["judged"])
    draw(script, path)


@torch.no_grad()
def test_fixed_layers_are_the_caches(script):
    """A step of the layers for CUDA graphs is the ShadowKVCache's, for sequences of a batch."""
    pytest.importorskip("transformers")
    from sparseattn import hf

    decode_model, runs = script("decode_model"), script("decode_runs")
    caches = script("decode_caches")
    device = torch.device("cpu")
    arguments = decode_model.parse_arguments(["--smoke", "--steps", "3"])
    model = decode_model.build_model("Llama-3.1-8B", arguments, device)
    hf.enable(model)
    options = dict(arguments.cache, value_store="host")
    cache = caches.filled(model.config, options, arguments.tokens, device, 0)
    stores = caches.Stores(cache, "shared", device, 2.0**30)
    caches.repeat(cache, 2, stores, device)
    state = cache.layers[0].state
    picked = []
    fixed = runs.make_clock(model, arguments, 2, state.length, state.keys.length)
    steps = caches.graph_cache(cache, fixed, 4)
    own = runs.make_clock(model, arguments, 2, 0, 0)
    for clock, target, positions in ((fixed, steps, True), (own, cache, False)):
        if positions:
            caches.use_attention(model)
        else:
            model.set_attn_implementation(hf.NAME)
        outs = []
        for _ in range(3):
            given = {"position_ids": clock.positions} if positions else {}
            out = model(clock.ids, past_key_values=target, logits_to_keep=1, **given)
            outs.append(out.logits)
            clock.advance()
        picked.append(torch.stack(outs))
    torch.testing.assert_close(picked[0], picked[1])
    assert not torch.equal(picked[0][:, 0], picked[0][:, 1])  # sequences get tokens of their own


def test_selections_share_what_is_asked_for(script):
    pytest.importorskip("transformers")
    lists = script("decode_caches").selections((2, 3, 20), 200, 0.35, 5, torch.device("cpu"))
    assert lists.shape == (5, 2, 3, 20) and (lists.diff(dim=-1) > 0).all()
    for last, now in pairwise(lists):
        shared = (last[..., :, None] == now[..., None, :]).sum((-1, -2))
        assert (shared == 7).all()


def test_throughput_bar(script):
    pytest.importorskip("transformers")
    base = {"model": "Llama-3.1-8B", "tokens": 124928}
    rows = [
        base | {"way": "dense", "mode": "eager", "batch": 7, "largest": True, "tokens_per_s": 90},
        base | {"way": "dense", "mode": "graph", "batch": 7, "largest": True, "tokens_per_s": 100},
        base | {"way": "dense", "mode": "graph", "batch": 4, "largest": False, "tokens_per_s": 150},
        base | {"way": "shadow", "store": "host", "mode": "graph", "batch": 24, "largest": True,
                "tokens_per_s": 304},
        base | {"way": "shadow", "store": "host", "mode": "eager", "batch": 24, "largest": True,
                "tokens_per_s": 303},
    ]  # fmt: skip
    judged = script("decode_model").judge(rows)
    assert [row["met"] for row in judged] == [True, False]
    assert judged[0]["times_faster_than_dense"] == pytest.approx(3.04)
    assert "batch 24, against dense graph, batch 7" in judged[0]["case"]
