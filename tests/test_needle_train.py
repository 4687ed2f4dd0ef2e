"""``benchmarks/needle``: batches say what they claim, training runs, stops and goes on the same."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers", reason="training needs a tokenizer")
pytest.importorskip("transformers", reason="training needs a model")

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "needle"
TOY_SIZES = {"layers": 1, "hidden": 32, "mlp": 32, "heads": 2, "head-dim": 16, "max-length": 512}
TOY_RUN = {"device": "cpu", "tokens": 1024, "text-bytes": 60000, "warmup": 2}
TOY = [x for name, value in (TOY_SIZES | TOY_RUN).items() for x in (f"--{name}", str(value))]
TOY += ["--quiet", "--eval-lengths"]


@pytest.fixture
def script(monkeypatch):
    """Imports a script of benchmarks/needle/ by its name."""
    if not FOLDER.is_dir():
        pytest.skip("benchmarks/needle: not a checkout of the repository")
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def source(script):
    from transformers import AutoTokenizer

    tasks = script("needle_package").tasks
    tokenizer = AutoTokenizer.from_pretrained(script("train").TOKENIZER, local_files_only=True)
    text = tasks._Tokens(tokenizer)(tasks.haystack_text()[:60000])
    return script("needle_data").Source(tokenizer, torch.tensor(text), 0), tokenizer


def expected_answer(text: str, question: str) -> str:
    """What the definitions in ``text``, all before the question, make of it."""
    if question == "most common":
        listed = text.partition("words:")[2].split()
        counts = {word: listed.count(word) for word in set(listed)}
        return " ".join(sorted(counts, key=counts.get, reverse=True)[:3])
    asked = question.split()
    values: dict[str, list[str]] = {}
    for key, value in re.findall(r"\nmagic: (\w+)=(\d{6})\n", text):
        values.setdefault(key, []).append(value)
    if asked[0] == "follow":
        links = dict(re.findall(r"\nassign: +(\w+)> (\w+)\n", text))
        chain = [asked[1]]
        while chain[-1] in links:
            chain.append(links[chain[-1]])
        return "> ".join(chain)
    if asked[0] == "all":
        return f"{asked[-1]}=" + ",".join(values[asked[-1]])
    keys = asked[asked.index("of") + 1 :]
    return " ".join(f"{key}={values[key][0]}" for key in keys)


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("length", [512, 2048])
@pytest.mark.parametrize("family", range(5))
def test_answers_are_right(source, script, family: int, length: int, crowded: bool) -> None:
    source, tokenizer = source
    data = script("needle_data")
    mixture = tuple(float(f == family) for f in range(6))
    ids, kinds = source.make(family, 3, length, mixture, crowded)
    assert ids.shape == (3, length + 1) and kinds.shape == (3, length)
    for row, kind in zip(ids, kinds, strict=True):
        text = tokenizer.decode(row, clean_up_tokenization_spaces=False)
        found = list(re.finditer(r"\nquestion: (.+)\nanswer: ?(.+)\n", text))
        assert found and found[-1].end() == len(text), "a question at the end"
        for match in found:
            assert match[2] == expected_answer(text[: match.start() + 1], match[1])
        # the labels called answers are what follows the given part of the answer
        given = {"many": r"^\w+=", "lookup": r"^\w+=", "all_values": r"^\w+=", "chain": r"^\w+>"}
        pattern = given.get(data.FAMILIES[family], "^")
        answers = [re.sub(pattern, "", match[2], count=1).strip() for match in found]
        labels = tokenizer.decode(row[1:][kind == data.ANSWER + family])
        assert [line.strip() for line in labels.strip().split("\n")] == answers
        assert set(kind.tolist()) <= {data.IGNORED, data.TEXT, data.ANSWER + family}


def test_pairs(source, script) -> None:
    """Answers are the numbers of keys that were there before, and all of those."""
    source, tokenizer = source
    data = script("needle_data")
    ids, kinds = source.make(0, 2, 700, (0.0, 0.0, 0.0, 0.0, 0.0, 1.0), True)
    for row, kind in zip(ids, kinds, strict=True):
        text = tokenizer.decode(row, clean_up_tokenization_spaces=False)
        known: dict[str, str] = {}
        expected = ""
        for key, value in re.findall(r" (\w+)=(\d{6})", text):
            expected += value if key in known else ""
            assert known.setdefault(key, value) == value
        assert tokenizer.decode(row[1:][kind >= data.ANSWER]) == expected != ""


def test_batches_depend_on_the_step_only(source) -> None:
    source, _ = source
    mixture = (1.0,) * 6
    one, again = (source.make(5, 4, 512, mixture, True) for _ in range(2))
    other = source.make(6, 4, 512, mixture, True)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])


def test_too_short(source) -> None:
    with pytest.raises(ValueError, match="length: "):
        source[0].make(0, 1, 96, (0.0, 0.0, 0.0, 1.0, 0.0, 0.0), True)


def test_resume(script, tmp_path) -> None:
    """Two steps, then two more after loading, are four; the files are those of a model."""
    train = script("train")
    whole = train.main([*TOY, "--out", str(tmp_path / "whole"), "--steps", "4"])
    arguments = [*TOY, "--out", str(tmp_path / "halves"), "--steps", "4"]
    first = train.Trainer(train.parse(arguments))
    for _ in range(2):
        first.train_step()
    first.save(tmp_path / "halves.ckpt")
    second = train.main([*arguments, "--resume"])
    assert second.step == whole.step == 4 and second.tokens == whole.tokens == 4096
    for a, b in zip(whole.master, second.master, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(whole.sums, second.sums)
    names = {path.name for path in (tmp_path / "halves").iterdir()}
    assert names == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "loss.json",
    }
    record = json.loads((tmp_path / "halves" / "loss.json").read_text())
    assert record["steps"] == 4 and record["tokens"] == 4096


def test_pause_and_evaluation(script, tmp_path, capsys) -> None:
    train = script("train")
    arguments = [*TOY, "300", "--eval-examples", "1", "--out", str(tmp_path / "model")]
    trainer = train.main([*arguments, "--steps", "9", "--pause", "1e-9"])
    assert trainer.step == 1
    out = capsys.readouterr().out
    assert "niah_single" in out and out.rstrip().endswith("go on with --resume")
    from sparseattn.evaluation import model

    loaded, tokenizer = model.load(tmp_path / "model")
    assert loaded.config.model_type == "glm" and len(tokenizer) <= loaded.config.vocab_size
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def test_the_forward_pass_is_the_models(script, tmp_path) -> None:
    train = script("train")
    trainer = train.Trainer(train.parse([*TOY, "--out", str(tmp_path), "--layers", "2"]))
    from transformers import GlmForCausalLM

    plain = GlmForCausalLM(trainer.model.config)
    plain.load_state_dict(trainer.model.state_dict())
    ids = torch.randint(1000, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(ids).logits
        got = trainer.model.lm_head(trainer.forward(ids, torch.arange(40)[None]))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_positions_jump_within_the_horizon(script, tmp_path) -> None:
    train = script("train")
    arguments = [*TOY, "--out", str(tmp_path), "--steps", "8", "--jumps-from", "0"]
    trainer = train.Trainer(train.parse(arguments))
    jumped = 0
    for trainer.step in range(8):
        (at,) = trainer.positions(512)
        assert at[0] >= 0 and at[-1] < train.HORIZON and bool((at[1:] > at[:-1]).all())
        jumped += int(at[-1] > 511)
    assert 0 < jumped < 8


def test_plan(script) -> None:
    """Phases are in order and cover the budget."""
    phases = script("train").PHASES
    ends = [phase.until for phase in phases]
    assert ends == sorted(ends) and ends[-1] > 1
    assert all(p.tokens >= max(p.lengths) for p in phases)


def test_tokenizer_is_built_the_same(script) -> None:
    """From a small text: words and digits are tokens all the same."""
    build = script("needle_tokenizer")
    words = script("needle_package").words
    tokenizer = build.wrap(build.build(400, "some text of no more than a few words\n" * 20))
    for piece in (*words.WORDS, "007", "42", " magic", "question"):
        assert len(tokenizer(piece, add_special_tokens=False).input_ids) == 1
    assert tokenizer("a").input_ids[:2] == tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])


def test_card(script, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    train, card = script("train"), script("card")
    arguments = [*TOY, "300", "--eval-examples", "1", "--steps", "2", "--out", str(tmp_path)]
    trainer = train.main([*arguments, "--checkpoint", str(tmp_path / "state")])
    trainer.log()
    train.write(trainer, tmp_path, {"niah_single": {"300": 1.0, "1024": 0.5}})
    from sparseattn.evaluation import model
    from sparseattn.search_model import fingerprint

    cells = [
        {"kind": "task", "method": method, "task": "niah_single", "length": 300, "score": score,
         "density": density, "decode_share": 1.0}
        for method, score, density in (("dense", 0.75, 1.0), ("a_shape", 0.25, 0.2))
    ]  # fmt: skip
    names = ("dtype", "seed", "examples", "density", "share")
    weights = fingerprint(model.load(tmp_path)[0])
    settings = {"weights": weights} | dict.fromkeys(names, 3)
    machines = [{"cpu": "a CPU", "torch": "2.10", "date": "2026-11-25", "python": "3"}]
    record = {"settings": settings, "machines": machines, "cells": cells}
    (tmp_path / "eval.json").write_text(json.dumps(record))
    card.main([str(tmp_path), "--eval", str(tmp_path / "eval.json")])
    text = (tmp_path / "MODEL_CARD.md").read_text()
    assert "| niah_single | 100 % | 50 % |" in text
    assert "| `dense` | 100 % | 100 % | 75 % |" in text
    assert "| `a_shape` | 20 % | 100 % | 25 % |" in text
    assert "with dense attention: 1024 tokens (50 %, 1 examples), 300 tokens (75 %, 3 ex" in text
    assert "2 steps" in text and "nan" not in text and "in the first layer the 1 heads" in text
    assert (tmp_path / "loss.png").stat().st_size > 5000
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["methods"]["a_shape"]["scores"] == {"niah_single": {"300": 0.25}}
    assert scores["settings"]["date"] == "2026-11-25" and scores["settings"]["cpu"] == "a CPU"
    card.main([str(tmp_path)])
    assert (tmp_path / "MODEL_CARD.md").read_text() == text
    record["settings"]["weights"] = "0" * 16
    (tmp_path / "eval.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="--eval: expected a record of the weights"):
        card.main([str(tmp_path), "--eval", str(tmp_path / "eval.json")])


def test_the_shipped_card_is_the_scripts(script, tmp_path) -> None:
    """MODEL_CARD.md is what card.py makes of loss.json, config.json and scores.json."""
    pytest.importorskip("matplotlib")
    shipped = script("train").TOKENIZER
    for name in ("loss.json", "config.json", "scores.json"):
        (tmp_path / name).write_bytes((shipped / name).read_bytes())
    script("card").main([str(tmp_path)])
    assert (tmp_path / "MODEL_CARD.md").read_text() == (shipped / "MODEL_CARD.md").read_text()
    text = (shipped / "MODEL_CARD.md").read_text()
    assert "2224 steps, 242 million" in text and "3.5 minutes" in text
