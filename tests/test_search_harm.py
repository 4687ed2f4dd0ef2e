"""A budget that the whole model shares: harms of single heads, who gets it, resuming, errors."""

from __future__ import annotations

import argparse
import json
import types

import pytest
import torch
from test_search import CHEAP, FAMILIES, Crash, D, prompt, tiny

from sparseattn import search as search_module
from sparseattn import search_budget, search_harm
from sparseattn.config import PatternConfig
from sparseattn.ops import sparse_attention
from sparseattn.patterns import AShape, Dense
from sparseattn.search import search_patterns
from sparseattn.search_cost import a_shape_cost, budget_keys
from sparseattn.search_harm import HarmMeter, counted_rows
from sparseattn.search_model import attention_replaced

transformers = pytest.importorskip("transformers")

LENGTH = 300


def lines_of(path):
    text = path.with_name(path.name + ".search.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def whole_forward(model, ids, rows, layer=None, head=None, pattern=None, prefill=None):
    """Log-probabilities of the last rows, one head of one layer by a pattern, no layer skipped."""

    def attend(at, q, k, v, scale, dense):
        out = dense().clone()
        if at == layer:
            q, k, v = (x[:, :, :prefill] for x in (q, k, v))
            sparse = sparse_attention(q, k, v, [pattern] * q.shape[1], scale=scale)
            out[:, head, :prefill] = sparse[:, head]
        return out

    with attention_replaced(model, attend), torch.no_grad():
        return model(ids, use_cache=False).logits[0, -rows:].double().log_softmax(-1)


@pytest.mark.parametrize("answer", [0, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_harm_is_the_divergence_of_predictions(family, answer):
    changes = {} if family == "Phi3" else {"head_dim": D}
    model = tiny(getattr(transformers, f"{family}ForCausalLM"), num_hidden_layers=3, **changes)
    before = model.config._attn_implementation
    ids, prefill = prompt(LENGTH)[None], LENGTH - answer
    rows = counted_rows(LENGTH, answer)
    assert rows == (8 if answer else 150)
    near, pattern = AShape(1, 20), AShape(1, 40)
    dense = whole_forward(model, ids, rows)
    meter = HarmMeter(model, ids, answer, heads=4, layers=3)
    for layer in range(3):
        done = []
        options = [[near, pattern], [near], [Dense(), near, near], []]
        harms = meter.layer_harms(layer, options, done.append)
        assert [len(own) for own in harms] == [2, 1, 1, 0] and sum(done) == 6
        assert harms[2][0] < 1e-6
        for head, n in ((0, 0), (0, 1), (1, 0)):
            sparse = whole_forward(model, ids, rows, layer, head, options[head][n], prefill)
            expected = (1 - (-(dense.exp() * (dense - sparse)).sum(-1)).exp()).mean()
            assert harms[head][n] == pytest.approx(float(expected), rel=1e-2, abs=1e-6)
            assert harms[head][n] > 1e-6
    assert model.config._attn_implementation == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_are_skipped_without_a_difference():
    model, ids = tiny(num_hidden_layers=3), prompt(LENGTH)[None]
    wanted = [[AShape(1, 40)]] * 4
    quick, whole = (HarmMeter(model, ids, 0, 4, 3) for _ in range(2))
    whole.blocks = []
    calls = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    for layer in range(3):
        assert quick.layer_harms(layer, wanted) == whole.layer_harms(layer, wanted)
    # Of the first layer: twice, and once a head; for every layer where nothing is skipped.
    assert len(calls) == (2 + 4) + 3 * (2 + 4)
    # A search that goes on later has no hidden states at first.
    assert HarmMeter(model, ids, 0, 4, 3).layer_harms(2, wanted) == whole.layer_harms(2, wanted)


def test_rounding_is_no_harm():
    """In bf16 nothing is exact; a head that needs nothing must still do no harm."""
    model, ids = tiny(num_hidden_layers=3).bfloat16(), prompt(LENGTH)[None]
    meter = HarmMeter(model, ids, 0, 4, 3)
    near, whole = AShape(1, 40), AShape(0, LENGTH)
    for layer in range(3):
        harms = meter.layer_harms(layer, [[near], [whole]] * 2)
        found = [own[0] for own in harms]
        assert max(found[1], found[3]) < 0.3 * max(found[0], found[2])


def one_head_counts(layer, head):
    """A model whose other heads hardly reach the residual stream."""
    model = tiny(seed=3)
    with torch.no_grad():
        for at, block in enumerate(model.model.layers):
            weight = block.self_attn.o_proj.weight
            for h in range(4):
                weight[:, h * D : (h + 1) * D] *= 20.0 if (at, h) == (layer, head) else 1e-3
    return model


@pytest.mark.parametrize(("layer", "head"), [(0, 2), (1, 1)])
def test_the_head_that_counts_gets_the_budget(layer, head):
    ids, budget = prompt(2048), 0.35
    found = {}
    for shared in ("layer", "model"):
        config = search_patterns(
            one_head_counts(layer, head), ids, candidates=[AShape(16, 1500)], budget=budget,
            shared=shared, progress=False,
        )  # fmt: skip
        found[shared] = config.layers
    windows = {
        shared: [getattr(p, "window", 2048) for p in sum(layers, ())]
        for shared, layers in found.items()
    }
    at = 4 * layer + head
    assert windows["model"][at] == max(windows["model"]) >= 1500
    assert windows["layer"][at] < 1500


def test_costs_are_the_budget_on_average(tmp_path):
    path, budget = tmp_path / "p.json", 0.6
    ids = [prompt(900), prompt(1024, seed=1)]
    config = search_patterns(
        tiny(), ids, candidates=[AShape(16, 900)], budget=budget, shared="model",
        answers=[12, 0], output=path, progress=False,
    )  # fmt: skip
    assert PatternConfig.load(path) == config
    header, *records = lines_of(path)
    assert header["answers"] == [0, 12] and header["candidates"][-1] == {"kind": "dense"}
    harms = [record for record in records if "harms" in record]
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [(r["prompt"], r["layer"]) for r in harms] == places
    for record in harms:
        for head in range(4):
            known = record["harms"][head]
            assert 1 <= len(known) <= search_budget.MEASURED and min(known) >= 0
            assert all(harm > search_harm.NO_HARM for harm in known[:-1])
    costs = [
        1024 if pattern == Dense() else a_shape_cost(pattern.sink, pattern.window, 1024, 1024)
        for row in config.layers
        for pattern in row
    ]
    assert sum(costs) / 8 <= budget_keys(budget, 1024)


@pytest.mark.parametrize("runs", [0, 9, 33])
def test_interrupted_search_goes_on_with_the_same_result(tmp_path, monkeypatch, runs):
    prompts, settings = [prompt(260), prompt(200, seed=1)], {
        "candidates": CHEAP, "budget": 0.6, "shared": "model", "answers": [3, 0],
        "progress": False,
    }  # fmt: skip
    whole, broken = tmp_path / "whole.json", tmp_path / "broken.json"
    expected = search_patterns(tiny(), prompts, output=whole, **settings)
    real, left = HarmMeter._harm, [runs]

    def crashing(*args):
        if left[0] == 0:
            raise Crash
        left[0] -= 1
        return real(*args)

    model = tiny()
    with monkeypatch.context() as patch:
        patch.setattr(HarmMeter, "_harm", crashing)
        with pytest.raises(Crash):
            search_patterns(model, prompts, output=broken, **settings)
    assert not any("forward" in vars(module) for module in model.modules())
    assert len(lines_of(broken)) < len(lines_of(whole))
    assert PatternConfig.load(broken).num_layers == 2  # by errors, until harms are known
    assert search_patterns(model, prompts, output=broken, **settings) == expected
    assert broken.read_text() == whole.read_text()
    assert lines_of(broken) == lines_of(whole)
    monkeypatch.setattr(HarmMeter, "_harm", crashing)
    assert search_patterns(model, prompts, output=broken, **settings) == expected
    with pytest.raises(ValueError, match="got other answers;"):
        search_patterns(model, prompts, output=broken, **{**settings, "answers": [4, 0]})


def test_nearly_dense_is_no_option():
    """A head gets much less than all keys, or all; where all cost nearly as much, the cheapest."""
    # (error, cost, candidate); candidate 2 is dense.
    heads = [
        [(0.5, 10.0, 0), (0.1, 76.0, 1), (0.0, 100.0, 2), (0.2, 74.0, 3)],
        [(0.2, 80.0, 0), (0.1, 90.0, 1), (0.0, 100.0, 2), (0.3, 79.0, 3)],
        [(0.5, 10.0, 0), (0.6, 50.0, 1), (0.0, 100.0, 2), (0.6, 60.0, 3)],
    ]
    search = types.SimpleNamespace(
        prompts=[0], layers=1, journal=types.SimpleNamespace(harms={}),
        candidates=[CHEAP[0], CHEAP[1], Dense(), CHEAP[2]], options=lambda layer: heads,
    )  # fmt: skip
    assert search_budget.ModelBudget(search).measured(0) == [[0, 3], [3], [0]]


def test_default_candidates_of_short_prompts():
    """Parts of the budget too small for the prompt take no part."""
    config = search_patterns(tiny(), prompt(700), budget=0.2, shared="model", progress=False)
    assert (config.num_layers, config.num_heads) == (2, 4)
    with pytest.raises(ValueError, match="at least 4 boxes of 64 keys a row"):
        search_patterns(tiny(), prompt(300), budget=0.1, shared="model", progress=False)


def test_bad_arguments():
    settings = {"candidates": CHEAP, "budget": 0.5, "progress": False}
    for changes, text in (
        ({"shared": "head"}, "shared: expected False, True, 'layer' or 'model', got 'head'"),
        ({"answers": [1, 2]}, "answers: expected a number for each of 1 prompts, got 2"),
        ({"answers": [99]}, r"answers\[0\]: expected 0..98 of the prompt's 99 tokens, got 99"),
        ({"answers": [-1]}, r"answers\[0\]: expected 0..98 of the prompt's 99 tokens, got -1"),
        ({"shared": "model", "budget": None}, "budget: expected a share that heads can share"),
    ):
        with pytest.raises(ValueError, match=text):
            search_patterns(tiny(), prompt(99), **{**settings, **changes})


def test_answers_attend_to_all_keys():
    """Their rows count for no error: a pattern that covers the prefill has none."""
    full = AShape(0, 256)
    config = search_patterns(
        tiny(), prompt(300), candidates=[AShape(0, 200), full], answers=[44], progress=False
    )
    assert set(sum(config.layers, ())) == {full}


def test_option_of_the_command_line():
    parser = argparse.ArgumentParser()
    search_module.add_arguments(parser)
    base = ["model", "--prompt", "a.txt", "--output", "p.json"]
    for extra, expected in (
        ([], False), (["--share-budget"], "layer"), (["--share-budget", "model"], "model")
    ):  # fmt: skip
        assert parser.parse_args(base + extra).share_budget == expected
    with pytest.raises(SystemExit):
        parser.parse_args([*base, "--share-budget", "head"])


def test_rows_that_count():
    assert counted_rows(100000, 0) == search_harm.TEXT_ROWS
    assert counted_rows(1, 0) == 1 and counted_rows(9, 4) == 5
