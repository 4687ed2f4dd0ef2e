"""``sparseattn eval`` on a small random GLM: every method, resuming, its files, its errors."""

from __future__ import annotations

import json

import eval_fakes
import pytest
import torch
from hf_models import fresh, tokens, transformers

pytest.importorskip("matplotlib")

from sparseattn import PatternConfig, ShadowKVCache, cli, hf, reference
from sparseattn.evaluation import command, forward, methods, record, report, runner
from sparseattn.patterns import AShape, BlockSparse, Dense, VerticalSlash
from sparseattn.search_cost import TOLERANCE

SMALL = ["--lengths", "512", "--density", "0.8", "--examples", "2", "--depths", "2",
         "--ppl-tokens", "32", "--ppl-steps", "8", "--tasks", "niah_single", "common_words",
         "--device", "cpu", "--no-progress", "--budget", "64", "--outliers", "2"]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """In matrices as small as these, threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fakes(monkeypatch):
    eval_fakes.install(monkeypatch)


def evaluate(folder, *options):
    return cli.main(["eval", *SMALL, "--output", str(folder), *options])


def cells_of(folder):
    data = json.loads((folder / "eval.json").read_text())
    return {(c["kind"], c["method"], c["task"], c["length"]): c for c in data["cells"]}


# --- methods -------------------------------------------------------------------------------------


def test_method_names():
    for name in methods.DEFAULT:
        assert methods.parse(name).name == name
    assert methods.parse("shadowkv") == methods.Method("dense", True)
    assert methods.parse("dense+shadowkv").name == "shadowkv"
    for name in ("", "sparse", "shadowkv+dense", "a_shape+", "a_shape+searched+shadowkv"):
        with pytest.raises(ValueError, match=r"--methods: expected dense, .*, got "):
            methods.parse(name)


@pytest.mark.parametrize("length", [500, 1024, 8192])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.7])
def test_sizes_come_near_the_density(length, density):
    q = torch.zeros(1, 1, length, 64)
    pattern = methods.a_shape_of(length, density)
    mask = reference.pattern_mask(q[:, :, :, :16], q[:, :, :, :16], [pattern])
    assert float(mask.float().mean()) * 2 == pytest.approx(density, rel=0.05)
    blocks = methods.block_sparse_of(length, density).top_k
    assert 1 <= blocks <= length / 64 + 1
    if length == 8192:
        assert blocks == round(methods.near_keys(length, density) / 64)
    for slash in methods.vertical_slashes_of(length, density):
        assert 1 <= slash.columns < length and 64 <= slash.offsets < length


def test_scaled_patterns():
    assert methods.scaled(AShape(0, 100), 2) == AShape(0, 200)
    assert methods.scaled(VerticalSlash(100, 64, share=0.9), 0.5) == VerticalSlash(50, 32, 0.9)
    assert methods.scaled(BlockSparse(1, method="antidiagonal"), 0.1).top_k == 1
    assert methods.scaled(Dense(), 3) == Dense()


def test_shadow_sizes():
    config = fresh("glm-2kv").config  # keys of width 256
    options = methods.ShadowSizes().options(config, 8192)
    assert options == {"rank": 160, "sparse_budget": 256, "outlier_chunks": 8, "chunk_size": 8}
    options = methods.ShadowSizes(16, 96, 4, 0).options(config, 131072)
    assert options == {"rank": 16, "sparse_budget": 96, "outlier_chunks": 0, "chunk_size": 4}
    assert methods.ShadowSizes().options(config, 2**20)["sparse_budget"] == 2048


def test_shares_and_bytes_of_caches():
    model = hf.enable(fresh("glm-2kv"))
    ids = tokens(1, 512)
    shadow = ShadowKVCache(model.config, rank=32, sparse_budget=64, outlier_chunks=2)
    dense = transformers.DynamicCache(config=model.config)
    for cache in (shadow, dense):
        forward.generate(model, ids, 1, cache, [])
    assert methods.decode_share(dense, 512) == 1
    assert methods.decode_share(shadow, 100) == 1  # kept as it is
    # 8 selected, 2 outliers and a sink of 8 tokens each, and the latest 32.
    assert methods.decode_share(shadow, 512) == (11 * 8 + 32) / 512
    assert methods.cache_bytes(dense) == 2 * 2 * 2 * 512 * 128 * 4
    assert methods.cache_bytes(shadow) == sum(shadow.memory().values())


def test_patterns_are_fitted_once_for_a_length(tmp_path):
    model = fresh("glm-2kv")
    asked = []

    def prompts_of(length):
        asked.append(length)
        return [(tokens(1, length + 5), 5), (tokens(1, length), 0)]

    def book():
        return methods.PatternBook(
            model, prompts_of, tmp_path, density=0.8, share=0.9, lengths=(512,)
        )

    own = book()
    for prefill in methods.PREFILLS:
        config = own.config(prefill, 512)
        assert (config is None) == (prefill == "dense")
        assert config is None or (config.num_layers, config.num_heads) == (2, 8)
    assert own.config("searched", 512) is own.config("searched", 512)
    assert own.config("vertical_slash", 512).layers == own._fitted("vertical_slash", 512).layers
    longer = own.config("vertical_slash", 600).layers
    for row, scaled in zip(own.config("vertical_slash", 512).layers, longer, strict=True):
        assert [methods.scaled(pattern, 600 / 512) for pattern in row] == list(scaled)
    assert asked == [512]  # the same prompts for both
    kinds = {type(p) for row in own.config("vertical_slash", 512).layers for p in row}
    assert kinds <= {VerticalSlash, Dense}
    assert PatternConfig.load(tmp_path / "searched-512.json").layers == (
        own.config("searched", 512).layers
    )
    assert book().config("searched", 512).layers == own.config("searched", 512).layers
    journal = (tmp_path / "searched-512.json.search.jsonl").read_text()
    assert '"harms"' in journal
    asked.clear()
    by_error = methods.PatternBook(
        model, prompts_of, tmp_path / "error", density=0.8, share=0.9, lengths=(512,), by_harm=False
    )
    by_error.config("vertical_slash", 512)
    journal = (tmp_path / "error" / "vertical_slash-512.json.search.jsonl").read_text()
    assert '"harms"' not in journal and '"prompt": 1' not in journal
    own.config("vertical_slash", 1500)  # far from 512: of the power of two below
    assert set(asked) == {512, 1024}


def test_what_patterns_are_fitted_on(fakes):
    """A prompt of every family with the model's own answer, and text after perplexity's."""
    model, tokenizer = eval_fakes.load(dtype=torch.float32)
    found = list(runner.fit_prompts(model, tokenizer, seed=4, text_from=150)(300))
    wanted = [(t, runner.FIT_TASKS[:n].count(t)) for n, t in enumerate(runner.FIT_TASKS)]
    assert len(found) == len(wanted) + runner.FIT_WINDOWS and ("niah_multivalue", 2) in wanted
    for (ids, answer), (task, index) in zip(found, wanted, strict=False):
        example = eval_fakes.make(task, tokenizer, 300, seed=4 + runner.FIT_SEED, index=index)
        assert ids[0, :300].tolist() == example.input_ids
        assert ids.shape == (1, 300 + answer) and answer <= example.max_new_tokens
        with torch.no_grad():
            greedy = model(ids).logits[0, 299:-1].argmax(-1)
        assert ids[0, 300:].tolist() == greedy.tolist()
    text = tokenizer(eval_fakes.haystack_text()).input_ids
    windows = [(text[start : start + 300], 0) for start in range(150, 1950, 300)]
    assert [(ids[0].tolist(), answer) for ids, answer in found[len(wanted) :]] == windows
    last = list(runner.fit_prompts(model, tokenizer, 4, text_from=10**6)(300))[-1][0]
    assert last[0].tolist() == text[-300:]
    assert len(list(runner.fit_prompts(model, tokenizer, 4, 0)(len(text) + 1))) == len(wanted)


def test_density_is_the_oracles():
    model, ids = fresh("glm-2kv"), tokens(1, 320)
    heads = model.config.num_attention_heads
    configs = {
        "a": PatternConfig.uniform(AShape(3, 50), 2, heads),
        "b": PatternConfig.from_layers([[BlockSparse(2), VerticalSlash(40, 80)] * 4] * 2),
    }
    found, masks = forward.densities(model, ids, configs), []
    from sparseattn.search_model import attention_visitor

    def visit(layer, q, k, v, scale, out):
        masks.append(reference.pattern_mask(q, k, configs["b"].layers[layer]).float().sum((2, 3)))

    with attention_visitor(model, visit), torch.no_grad():
        model.base_model(input_ids=ids, use_cache=False)
    pairs = 320 * 321 / 2
    assert found["b"] == pytest.approx(float(torch.cat(masks).mean()) / pairs)
    assert found["a"] == pytest.approx(sum(min(p + 1, 53) for p in range(320)) / pairs)


# --- what the model does -------------------------------------------------------------------------


def test_losses_are_the_models():
    plain, model = fresh("glm-2kv"), hf.enable(fresh("glm-2kv"))
    ids = tokens(2, 150)
    with torch.no_grad():
        logits = plain(ids).logits[:, -41:-1].log_softmax(-1)
    expected = -logits.gather(2, ids[:, -40:, None])[..., 0]
    torch.testing.assert_close(forward.prefill_losses(model, ids, 40), expected)
    cache = transformers.DynamicCache(config=model.config)
    torch.testing.assert_close(forward.decode_losses(model, ids, 40, cache), expected)


def test_answers_stop_at_end_tokens():
    model, ids = hf.enable(fresh("glm-2kv")), tokens(2, 90)

    def run(ends, count=12):
        cache = transformers.DynamicCache(config=model.config)
        return forward.generate(model, ids, count, cache, ends)

    free = run([])
    assert [len(row) for row in free] == [12, 12]
    end = free[0][3]
    stopped = run([end])
    expected = [row[: row.index(end)] if end in row else row for row in free]
    assert stopped == expected and len(stopped[0]) <= 3


def test_batches_change_no_answer(fakes):
    """Examples of one length run together, each cut to its own number of tokens."""
    model, tokenizer = eval_fakes.load(dtype=torch.float32)
    answers = []
    for batch in (1, 3):
        plan = runner.Plan((methods.parse("dense"),), (100,), ("tasks",), ("niah_single",),
                           examples=3, batch=batch)  # fmt: skip
        work = runner.Runner(model, tokenizer, plan, None, None)
        items = work._items("task", "niah_single", 100, None)
        ((_, cell),) = _run_questions(work, items)
        answers.append([row["output"] for row in cell["examples"]])
        assert cell["batch"] == batch
    assert answers[0] == answers[1]


def _run_questions(work, items):
    work.book = methods.PatternBook(work.model, None, None, density=0.5, share=0.9)
    return list(
        work._questions("task", "niah_single", 100, None, work.plan.methods, lambda *_: None, "")
    )


# --- the whole command ---------------------------------------------------------------------------


def test_every_method(fakes, tmp_path, capsys):
    assert evaluate(tmp_path) == 0
    out = capsys.readouterr().out
    cells = cells_of(tmp_path)
    assert len(cells) == 8 * 4  # niah, two tasks, perplexity
    for (kind, name, _, length), cell in cells.items():
        method = methods.parse(name)
        assert length == 512 and len(cell["examples"]) == (1 if kind == "perplexity" else 2)
        assert (cell["density"] == 1) == (method.prefill == "dense")
        if method.prefill in ("vertical_slash", "searched"):
            assert cell["density"] < 0.8 * TOLERANCE
        if kind == "perplexity":
            assert cell["decode_score"] > 1 and (cell["score"] is None) == method.shadow
        else:
            assert (cell["decode_share"] < 1) == method.shadow
            assert cell["score"] == pytest.approx(sum(row["score"] for row in cell["examples"]) / 2)
    dense, shadow = (cells["perplexity", m, "perplexity", 512] for m in ("dense", "shadowkv"))
    assert shadow["decode_score"] == pytest.approx(dense["decode_score"], rel=0.5)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"eval.json", "eval.md", "perplexity.png", "niah-dense.png", "patterns",
            "niah-searched-shadowkv.png"} <= names  # fmt: skip
    page = (tmp_path / "eval.md").read_text()
    for title in ("Needle in a haystack", "Tasks at 512 tokens", "Perplexity"):
        assert title in out and title in page
    assert "| searched+shadowkv |" in page and "![perplexity](perplexity.png)" in page


def test_resume(fakes, tmp_path, monkeypatch, capsys):
    options = ["--methods", "dense", "a_shape", "--parts", "tasks", "perplexity"]
    calls = []
    real = forward.generate

    def counted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(forward, "generate", counted)
    assert evaluate(tmp_path, *options) == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert len(cells_of(tmp_path)) == 3
    before = (tmp_path / "eval.json").read_text()
    assert evaluate(tmp_path, *options) == 0
    assert len(calls) == 5  # the interrupted cell alone was run again
    after = cells_of(tmp_path)
    assert len(after) == 6
    for cell in json.loads(before)["cells"]:
        assert after[cell["kind"], cell["method"], cell["task"], cell["length"]] == cell

    assert evaluate(tmp_path, *options, "--methods", "dense", "block_sparse") == 0  # joins them
    assert len(calls) == 7 and len(cells_of(tmp_path)) == 9
    written = (tmp_path / "eval.json").read_text()
    assert evaluate(tmp_path, *options, "--seed", "3") == 2
    message = capsys.readouterr().err
    assert "other settings (seed 0 there, 3 here); choose another --output" in message
    assert (tmp_path / "eval.json").read_text() == written


def test_files_of_benchmarks(fakes, tmp_path, capsys):
    text = "magic words " * 30
    rows = {
        "ruler/vt.jsonl": [
            {"index": n, "input": text * (n + 1), "outputs": ["x"], "length": 9} for n in range(3)
        ],
        "infinitebench/passkey.jsonl": [
            {"id": 0, "context": text, "input": "What?", "answer": ["71"], "options": []}
        ],
        "longbench/x.jsonl": [
            {"dataset": "hotpotqa", "context": text, "input": "Who?", "answers": ["me", "you"]}
        ],
    }
    options = []
    for name, lines in rows.items():
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text("\n".join(json.dumps(line) for line in lines))
        options += [f"--{name.partition('/')[0]}", str(path)]
    options += ["--methods", "dense", "a_shape", "shadowkv", "--max-length", "700"]
    assert evaluate(tmp_path / "out", *options) == 0
    cells = cells_of(tmp_path / "out")
    assert {(kind, task) for kind, _, task, _ in cells} == {
        ("file", "ruler/vt"), ("file", "infinitebench/passkey"), ("file", "longbench/hotpotqa")
    }  # fmt: skip
    examples = cells["file", "a_shape", "ruler/vt", None]["examples"]
    assert [row["tokens"] for row in examples] == [362, 670, 670]
    assert [row.get("cut", False) for row in examples] == [False, True, True]
    printed = capsys.readouterr().out
    assert "hotpotqa" in printed and "Perplexity" not in printed


def test_smoke(fakes, tmp_path):
    folder = str(tmp_path)
    assert cli.main(["eval", "--smoke", "--no-progress", "--output", folder]) == 0
    assert {key[1] for key in cells_of(tmp_path)} == set(methods.DEFAULT)


def test_the_shipped_model(tmp_path):
    models = pytest.importorskip("sparseattn.evaluation.model")
    if "needle" not in models.names():
        pytest.skip("its weights are not there")
    assert cli.main(["eval", "--smoke", "--no-progress", "--output", str(tmp_path)]) == 0
    cells = cells_of(tmp_path)
    assert {key[1] for key in cells} == set(methods.DEFAULT)
    assert all(row["output"] for row in cells["niah", "dense", "niah_single", 1024]["examples"])


def test_a_given_config_is_taken_as_it_is(fakes, tmp_path):
    PatternConfig.uniform(AShape(2, 60), 2, 8).save(tmp_path / "own.json")
    options = [
        "--methods",
        "searched",
        "--parts",
        "tasks",
        "--patterns",
        str(tmp_path / "own.json"),
    ]
    assert evaluate(tmp_path / "out", *options) == 0
    cell = cells_of(tmp_path / "out")["task", "searched", "niah_single", 512]
    assert cell["density"] == pytest.approx(
        sum(min(p + 1, 62) for p in range(512)) / (512 * 513 / 2)
    )
    assert not (tmp_path / "out" / "patterns").exists()


@pytest.mark.parametrize("options,message", [
    (["--methods", "sparse"], "--methods: expected dense, a_shape"),
    (["--tasks", "qa"], "--tasks: expected some of niah_single, "),
    (["--lengths", "8192"], "--lengths: expected at most the model's 4096 tokens, got 8192"),
    (["--lengths", "8"], "--lengths: expected at least 64 tokens, got 8"),
    (["--density", "1.5"], "--density: expected 0 < density < 1, got 1.5"),
    (["--density", "0.1"], "--lengths: expected at least 1136 tokens to search patterns"),
    (["--share", "2"], "--share: expected 1e-6 <= share <= 1, got 2.0"),
    (["--rank", "24"], "rank: expected a positive multiple of 16, got 24"),
    (["--examples", "0"], "--examples: expected at least 1, got 0"),
    (["--ppl-steps", "0"], "--ppl-steps: expected at least 1, got 0"),
    (["--max-length", "30", "--ruler", "vt.jsonl"],
     "--max-length: expected more than the 30 tokens of an answer of ruler/vt, got 30"),
    (["--longbench", "absent.jsonl"], "No such file or directory: 'absent.jsonl'"),
    (["--patterns", "absent.json"], "absent.json"),
    (["--text", "short.txt"], "--text: expected at least 512 tokens, got the 4 of short.txt"),
    (["--output", "short.txt"], "--output: expected a folder, got the file short.txt"),
    (["other"], "model: expected 'needle', got 'other'"),
])  # fmt: skip
def test_errors(fakes, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("ab")
    (tmp_path / "vt.jsonl").write_text(json.dumps({"input": "x", "outputs": ["y"]}))
    assert cli.main(["eval", *SMALL, *options]) == 2
    assert message in capsys.readouterr().err


def test_shadowkv_is_refused_at_the_start(fakes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(methods, "SHADOW_DEVICES", ("cuda",))
    assert evaluate(tmp_path / "out", "--methods", "dense", "shadowkv") == 2
    assert "ShadowKVCache: expected a model on cuda, got cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_heads_that_the_operators_refuse(fakes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(methods, "path_of", lambda *_: "refused: head_dim: expected 64")
    assert evaluate(tmp_path, "--methods", "dense", "a_shape") == 2
    assert "sparse prefill of this model is refused: head_dim" in capsys.readouterr().err


def test_a_text_that_is_too_short_for_a_length(fakes, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("word " * 150)
    options = ["--lengths", "512", "1024", "--parts", "perplexity", "--methods", "dense",
               "--text", str(tmp_path / "text.txt")]  # fmt: skip
    assert evaluate(tmp_path / "out", *options) == 0
    assert [key[3] for key in cells_of(tmp_path / "out")] == [512]
    assert "perplexity at 1024 tokens is left out: the text has 752" in capsys.readouterr().out


# --- record and report ---------------------------------------------------------------------------


def test_a_record_that_is_none(tmp_path):
    for text in ("{", "[]", '{"format": "x"}'):
        (tmp_path / "eval.json").write_text(text)
        with pytest.raises(ValueError, match=r"eval.json: expected the record of an evaluation"):
            record.Record(tmp_path / "eval.json", {}, {})


def test_better_and_worse_than_dense():
    def cell(method, *scores):
        return {"kind": "task", "method": method, "task": "t", "length": 64, "source": None,
                "score": sum(scores) / len(scores), "density": 0.5, "decode_share": 1.0,
                "cache_bytes": 2**20, "examples": [{"score": s} for s in scores]}  # fmt: skip

    cells = [cell("dense", 1, 0, 0.5, 1), cell("a_shape", 0, 1, 0.5, 0.25)]
    (table,) = report.tables({"cells": cells})
    assert table.rows[0][-1] == "-" and table.rows[1][-1] == "1/2"
    assert table.rows[1][:5] == ["a_shape", "50.0", "100.0", "1.0", "43.8"]


def test_defaults_of_a_gpu_are_larger():
    cpu, cuda = command.DEFAULTS["cpu"], command.DEFAULTS["cuda"]
    assert cpu.keys() == cuda.keys()
    assert all(cpu[name] < cuda[name] for name in ("examples", "depths", "needles", "windows"))
