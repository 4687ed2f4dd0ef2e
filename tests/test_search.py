"""Pattern search: families, scores, planted heads, budget, resuming, the command line's part."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch

from sparseattn import search as search_module
from sparseattn.config import PatternConfig
from sparseattn.patterns import AShape, BlockSparse, Dense, VerticalSlash
from sparseattn.search import search_patterns
from sparseattn.search_cost import (
    a_shape_cost,
    budget_keys,
    default_candidates,
    dense_cost,
    shrink,
)
from sparseattn.search_model import attention_visitor

transformers = pytest.importorskip("transformers")

D = 64


def tiny(model_class=None, seed=0, **changes):
    """A random model of two layers, four query heads, two key/value heads, D = 64."""
    model_class = model_class or transformers.LlamaForCausalLM
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 100,
        "hidden_size": 4 * D,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    return model_class(model_class.config_class(**sizes)).eval()


def prompt(length, seed=0):
    return torch.randint(3, 100, (length,), generator=torch.Generator().manual_seed(seed))


CHEAP = [AShape(16, 96), VerticalSlash(64, 100), BlockSparse(2)]
FAMILIES = ["Llama", "Glm", "Glm4", "Qwen2", "Qwen3", "Phi3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    changes = {} if family == "Phi3" else {"head_dim": D}
    model = tiny(getattr(transformers, f"{family}ForCausalLM"), **changes)
    before = model.config._attn_implementation
    config = search_patterns(model, prompt(300), candidates=CHEAP, progress=False)
    assert (config.num_layers, config.num_heads) == (2, 4)
    assert set(sum(config.layers, ())) <= set(CHEAP)
    assert model.config._attn_implementation == before
    assert "sparseattn_search" not in transformers.AttentionInterface()


def test_pattern_that_sees_everything_wins():
    full = AShape(0, 300)
    config = search_patterns(
        tiny(), prompt(300), candidates=[*CHEAP, full, AShape(0, 1)], progress=False
    )
    assert set(sum(config.layers, ())) == {full}


def test_equal_errors_take_the_cheaper_then_the_earlier(monkeypatch):
    monkeypatch.setattr(search_module, "_relative_errors", lambda out, _: [0.5] * out.shape[1])

    def winners(*candidates):
        config = search_patterns(tiny(), prompt(300), candidates=candidates, progress=False)
        return set(sum(config.layers, ()))

    cheap, twin, dear = AShape(0, 300), AShape(300, 300), Dense()
    assert a_shape_cost(0, 300, 300, 300) == dense_cost(300, 300)
    assert winners(cheap, twin) == {cheap}
    assert winners(twin, cheap) == {twin}
    assert winners(dear, AShape(0, 100), cheap) == {AShape(0, 100)}


def test_scores_are_the_errors_of_the_outputs(tmp_path):
    model, ids = tiny(), prompt(333)
    seen = {}

    def visit(layer, q, k, v, scale, dense):
        seen[layer] = (q.double(), k.double(), v.double(), scale)

    with attention_visitor(model, visit), torch.no_grad():
        model(input_ids=ids[None])
    path = tmp_path / "p.json"
    search_patterns(model, ids, candidates=[AShape(16, 96)], output=path, progress=False)
    records = read_journal(path)[1:]
    assert [record["layer"] for record in records] == [0, 1]
    position = torch.arange(333)
    causal = position[:, None] >= position
    visible = causal & ((position < 16) | (position[:, None] - position < 96))
    for record in records:
        q, k, v, scale = seen[record["layer"]]
        scores = scale * q @ k.repeat_interleave(2, dim=1).transpose(-1, -2)
        v = v.repeat_interleave(2, dim=1)
        dense, sparse = (
            scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v for mask in (causal, visible)
        )
        expected = (sparse - dense).norm(dim=(-1, -2)) / dense.norm(dim=(-1, -2))
        torch.testing.assert_close(
            torch.tensor(record["errors"][0]).double(), expected[0], rtol=1e-3, atol=1e-6
        )
        assert record["costs"][0] == [pytest.approx(a_shape_cost(16, 96, 333, 333), rel=1e-5)] * 4


COLUMN_AT = 300  # key position that a planted head looks at from everywhere
OFFSET = 700  # distance that another one looks back
MARK = 99  # the token at COLUMN_AT, nowhere else


def planted():
    """One layer: head 0 looks at the near keys, head 1 at one offset, head 2 at one column."""
    model = tiny(num_hidden_layers=1, attention_bias=True)
    layer = model.model.layers[0].self_attn
    rotate = model.model.rotary_emb
    with torch.no_grad():
        for projection in (layer.q_proj, layer.k_proj):
            projection.bias.zero_()
        layer.q_proj.weight[: 3 * D].zero_()
        layer.k_proj.weight.zero_()
        # Rotary embedding turns equal constant vectors into a score by distance, peaked at zero.
        constant = torch.full((D,), 2.0)
        layer.k_proj.bias[:D] = constant
        layer.q_proj.bias[:D] = 0.3 * constant
        # Turned back by OFFSET positions the peak lies at that distance.
        cos, sin = rotate(constant[None, None], torch.tensor([[-OFFSET]]))
        half = constant[: D // 2]
        turned = torch.cat([-half, half])
        layer.q_proj.bias[D : 2 * D] = constant * cos[0, 0] + turned * sin[0, 0]
        # The slowest pair hardly turns: only the mark's keys answer, whatever the distance.
        slow = [D // 2 - 1, D - 1]
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = 0
        embedding[MARK] = 0
        embedding[MARK, 0] = 1
        layer.q_proj.bias[[2 * D + i for i in slow]] = 4.0
        layer.k_proj.weight[[D + i for i in slow], 0] = 2.0
        layer.v_proj.weight.normal_()
    return model


def marked_prompt(length=1500):
    ids = torch.randint(3, MARK, (length,), generator=torch.Generator().manual_seed(1))
    ids[COLUMN_AT] = MARK
    return ids


def test_planted_heads_get_their_patterns(tmp_path):
    local, slashes = AShape(0, 449), VerticalSlash(64, 200)
    columns = VerticalSlash(256, 64)
    path = tmp_path / "p.json"
    config = search_patterns(
        planted(),
        marked_prompt(),
        candidates=[local, slashes, columns],
        budget=0.56,  # fits the window; offsets that lie apart are shrunk for head 0
        output=path,
        progress=False,
    )
    errors = read_journal(path)[1]["errors"]
    assert config.layers[0][0] == local
    assert config.layers[0][1] == slashes
    assert isinstance(config.layers[0][2], VerticalSlash)
    assert errors[0][1] > 0.8 > 0.3 > errors[1][1]  # a window misses the offset
    assert errors[0][2] > 0.5 > 0.02 > min(errors[1][2], errors[2][2])  # and the column


def test_budget_rule(tmp_path):
    model, ids, budget = tiny(), prompt(1024), 0.5
    path = tmp_path / "p.json"
    config = search_patterns(model, ids, budget=budget, output=path, progress=False)
    header, *records = read_journal(path)
    assert header["budget"] == budget
    limit = 1.1 * budget_keys(budget, 1024)
    candidates = default_candidates(1024, budget)
    for record in records:
        for head in range(4):
            taken = [
                (record["errors"][c][head], c)
                for c in range(len(candidates))
                if record["steps"][c][head] is not None
            ]
            assert taken and all(record["costs"][c][head] <= limit for _, c in taken)
            best = min(taken)[1]
            assert config.layers[record["layer"]][head] == shrink(
                candidates[best], record["steps"][best][head]
            )


def test_heads_of_a_layer_share_the_budget(tmp_path):
    """Costs are the budget on average, errors smaller than with equal costs."""
    model, ids = tiny(num_hidden_layers=1), prompt(2048)
    near = [AShape(16, 1500)]
    found = {}
    for shared in (False, True):
        path = tmp_path / f"{shared}.json"
        config = search_patterns(
            model, ids, candidates=near, budget=0.3, shared=shared, output=path, progress=False
        )
        header, record = [
            json.loads(line)
            for line in path.with_name(path.name + ".search.jsonl").read_text().splitlines()
        ]
        count = len(header["candidates"])
        assert count == (len(search_module.SHARES) if shared else 1)
        pick = []
        for head, pattern in enumerate(config.layers[0]):
            pick.append(
                next(
                    (record["errors"][c][head], record["costs"][c][head])
                    for c in range(count)
                    if record["steps"][c][head] is not None
                    and shrink(near[0], record["steps"][c][head]) == pattern
                )
            )
        found[shared] = [sum(column) for column in zip(*pick, strict=True)]
        assert found[shared][1] <= 4 * 1.1 * budget_keys(0.3, 2048)
    assert found[True][0] <= found[False][0]
    with pytest.raises(ValueError, match="budget: expected a share that heads can share"):
        search_patterns(model, ids, candidates=near, shared=True, progress=False)
    with pytest.raises(ValueError, match="other candidates, shared"):
        search_patterns(
            model, ids, candidates=near, budget=0.3, shared=True, output=tmp_path / "False.json"
        )


def test_head_that_nothing_fits_keeps_the_cheapest():
    candidates = [VerticalSlash(900, 900), AShape(64, 900)]
    config = search_patterns(
        tiny(), prompt(1024), candidates=candidates, budget=0.05, progress=False
    )
    assert {type(pattern) for pattern in sum(config.layers, ())} == {AShape}


def test_mean_over_prompts_of_several_lengths(tmp_path):
    path = tmp_path / "p.json"
    prompts = [prompt(200), prompt(450, seed=1)[None], prompt(300, seed=2)]
    config = search_patterns(tiny(), prompts, candidates=CHEAP, output=path, progress=False)
    header, *records = read_journal(path)
    assert [int(entry.split(":")[0]) for entry in header["prompts"]] == [450, 300, 200]
    assert len(records) == 6
    for layer in range(2):
        errors = torch.tensor([r["errors"] for r in records if r["layer"] == layer]).mean(0)
        expected = tuple(CHEAP[i] for i in errors.argmin(0).tolist())
        assert config.layers[layer] == expected


# Files.
def read_journal(path):
    text = path.with_name(path.name + ".search.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


class Crash(Exception):
    pass


def crash_after(monkeypatch, runs):
    real, left = search_module.ops.sparse_attention, [runs]

    def crashing(*args, **kwargs):
        if left[0] == 0:
            raise Crash
        left[0] -= 1
        return real(*args, **kwargs)

    monkeypatch.setattr(search_module.ops, "sparse_attention", crashing)


@pytest.mark.parametrize("runs", [4, 8, 11])
def test_interrupted_search_goes_on_with_the_same_result(tmp_path, monkeypatch, runs):
    prompts = [prompt(260), prompt(200, seed=1)]
    whole, broken = tmp_path / "whole.json", tmp_path / "broken.json"
    expected = search_patterns(tiny(), prompts, candidates=CHEAP, output=whole, progress=False)
    assert PatternConfig.load(whole) == expected

    model = tiny()
    before = model.config._attn_implementation
    with monkeypatch.context() as patch:
        crash_after(patch, runs)
        with pytest.raises(Crash):
            search_patterns(model, prompts, candidates=CHEAP, output=broken, progress=False)
    assert model.config._attn_implementation == before
    assert "sparseattn_search" not in transformers.AttentionInterface()
    done = runs // len(CHEAP)  # layers of prompts finished before the crash
    partial = PatternConfig.load(broken)
    assert len(read_journal(broken)) == 1 + done
    assert (Dense() in partial.layers[1]) == (done < 2)
    assert Dense() not in partial.layers[0]

    with open(f"{broken}.search.jsonl", "a") as file:
        file.write('{"prompt": 0, "la')  # a write that did not end
    with monkeypatch.context() as patch:
        crash_after(patch, 4 * len(CHEAP) - done * len(CHEAP))  # enough for the rest, no more
        resumed = search_patterns(model, prompts, candidates=CHEAP, output=broken, progress=False)
    assert resumed == expected
    assert broken.read_text() == whole.read_text()
    assert read_journal(broken) == read_journal(whole)


def test_finished_search_runs_nothing(tmp_path, monkeypatch):
    path = tmp_path / "p.json"
    first = search_patterns(tiny(), prompt(200), candidates=CHEAP, output=path, progress=False)
    crash_after(monkeypatch, 0)
    again = search_patterns(tiny(), prompt(200), candidates=CHEAP, output=path, progress=False)
    assert again == first
    with pytest.raises(Crash):
        search_patterns(
            tiny(), prompt(200), candidates=CHEAP, output=path, resume=False, progress=False
        )


def test_the_same_weights_from_elsewhere_resume(tmp_path, monkeypatch):
    path, moved = tmp_path / "p.json", tiny()
    first = search_patterns(tiny(), prompt(200), candidates=CHEAP, output=path, progress=False)
    moved.config._name_or_path = "elsewhere"
    crash_after(monkeypatch, 0)
    again = search_patterns(moved, prompt(200), candidates=CHEAP, output=path, progress=False)
    assert again.layers == first.layers


def test_other_settings_do_not_resume(tmp_path):
    path = tmp_path / "p.json"
    search_patterns(tiny(), prompt(200), candidates=CHEAP, output=path, progress=False)
    for model, ids, candidates, text in (
        (tiny(), prompt(201), CHEAP, "got other prompts;"),
        (tiny(), prompt(200), CHEAP[:2], "got other candidates;"),
        (tiny(seed=1), prompt(200), CHEAP, "got other weights;"),
        (tiny().bfloat16(), prompt(200), CHEAP, "got other dtype, weights;"),
    ):
        with pytest.raises(ValueError, match=text):
            search_patterns(model, ids, candidates=candidates, output=path, progress=False)


# Bad input.
@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        ([1, 2], TypeError, r"prompt_ids\[0\]: expected a tensor of token ids, got int"),
        ([], TypeError, "prompt_ids: expected a tensor or a list of tensors"),
        (torch.zeros(9), TypeError, r"prompt_ids\[0\]: expected a tensor of token ids, got torch"),
        (torch.zeros(2, 9).long(), ValueError, r"expected shape \[L\] or \[1, L\], got \[2, 9\]"),
        (torch.zeros(0).long(), ValueError, r"got \[1, 0\]"),
        (torch.full((9,), 100), ValueError, "expected ids in 0..99, got 100..100"),
    ],
)
def test_bad_prompts(ids, error, text):
    with pytest.raises(error, match=text):
        search_patterns(tiny(), ids, candidates=CHEAP, progress=False)


def test_bad_candidates():
    for candidates, error in ((["dense"], TypeError), ([], ValueError), ("dense", TypeError)):
        with pytest.raises(error, match="candidates"):
            search_patterns(tiny(), prompt(99), candidates=candidates, progress=False)


def test_sliding_window_is_refused_by_name():
    model = tiny(transformers.Phi3ForCausalLM, sliding_window=128)
    search_patterns(model, prompt(128), candidates=CHEAP, progress=False)
    with pytest.raises(ValueError, match="got a window of 128 keys in layer 0"):
        search_patterns(model, prompt(129), candidates=CHEAP, progress=False)


def test_overflow_is_named():
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[:] = math.inf
    with pytest.raises(ValueError, match="finite attention outputs, got others in layer 1, head 0"):
        search_patterns(model, prompt(99), candidates=CHEAP, progress=False)


# Command line.
def test_command_line(tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(99)} | {"[UNK]": 99}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "model"
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    model = tiny()
    model.save_pretrained(folder)
    text = tmp_path / "text.txt"
    ids = prompt(400)
    text.write_text(" ".join(f"w{i}" for i in ids.tolist()))
    output = tmp_path / "p.json"

    parser = argparse.ArgumentParser()
    search_module.add_arguments(parser)
    argv = [str(folder), "--prompt", str(text), "--length", "400", "250", "--output", str(output)]
    argv += ["--candidate", "a_shape:16,96", "--candidate", "vertical_slash:64,100"]
    argv += ["--device", "cpu", "--no-progress"]
    assert search_module.run(parser.parse_args(argv)) == 0
    report = capsys.readouterr().out
    assert "heads  mean error  keys/row  pattern" in report and str(output) in report
    expected = search_patterns(model, [ids, ids[:250]], candidates=CHEAP[:2], progress=False)
    assert PatternConfig.load(output).layers == expected.layers

    too_long = [*argv[:3], "--length", "401", *argv[6:]]
    with pytest.raises(ValueError, match="--length: expected at most the 400 tokens"):
        search_module.run(parser.parse_args(too_long))
    with pytest.raises(SystemExit):
        parser.parse_args([*argv, "--candidate", "slash:3"])
    assert "expected KIND:SIZES with a kind of dense, a_shape" in capsys.readouterr().err
