"""Readers of the published benchmarks' files, on rows written here."""

from __future__ import annotations

import json

import pytest
from eval_fakes import Bytes, Chatty

from sparseattn.evaluation import metrics, published
from sparseattn.evaluation.templates import INFINITEBENCH, LONGBENCH

OPTIONS = ["one", "two", "three", "four"]


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


def test_ruler(tmp_path):
    rows = [
        {"index": 7, "input": "find {it}:", "outputs": ["12", "34"], "length": 9},
        {"index": 8, "input": "find", "outputs": ["5"], "length": 9, "answer_prefix": " it is"},
    ]
    file = published.read("ruler", write(tmp_path / "niah_multikey_1" / "validation.jsonl", *rows))
    assert file.name == "ruler/niah_multikey_1"
    first, second = file.questions
    assert first == published.Question(7, "find {it}:", ("12", "34"), 128, "exact_all")
    assert second.prompt == "find it is"
    file = published.read("ruler", write(tmp_path / "qa_1.jsonl", rows[0]))
    assert (file.questions[0].max_new_tokens, file.questions[0].metric) == (32, "exact_any")


@pytest.mark.parametrize("task", INFINITEBENCH)
def test_infinitebench(tmp_path, task):
    row = {"id": 3, "context": "the {context}", "input": "What is the largest number?",
           "answer": ["two"], "options": OPTIONS}  # fmt: skip
    file = published.read("infinitebench", write(tmp_path / f"{task}.jsonl", row))
    (question,) = file.questions
    assert file.name == f"infinitebench/{task}" and question.index == 3
    assert "the {context}" in question.prompt
    if task in ("longbook_choice_eng", "code_debug"):
        assert question.answers == ("two", "B") and "\nC. three\n" in question.prompt
        output = "B." if task == "code_debug" else "B"
        assert metrics.score(question.metric, output, question.answers) == 1
    else:
        assert question.answers == ("two",)
    if task == "math_find":
        assert question.prompt.startswith("Which is the largest number in")


@pytest.mark.parametrize("task", LONGBENCH)
def test_longbench(tmp_path, task):
    row = {"_id": "x1", "input": "the question", "context": "a context", "answers": ["yes", "no"],
           "length": 5, "dataset": f"{task}_e", "language": "en",
           "all_classes": ["yes", "no"] if task in ("trec", "lsht") else None}  # fmt: skip
    file = published.read("longbench", write(tmp_path / "any.jsonl", row))
    (question,) = file.questions
    assert file.name == f"longbench/{task}_e"
    assert "a context" in question.prompt
    assert question.answers == ("yes", "no") and question.metric in metrics.METRICS
    assert question.first_line == (task in ("trec", "triviaqa", "samsum", "lsht"))
    assert published.scored_text(question, "\nyes\nno") == (
        "yes" if question.first_line else "\nyes\nno"
    )


def test_numbers_are_answers(tmp_path):
    row = {"context": "1 2", "input": "The smallest number", "answer": 3.5}
    file = published.read("infinitebench", write(tmp_path / "math_find.jsonl", row))
    assert file.questions[0].answers == ("3.5",)


def test_limit_and_digest(tmp_path):
    row = {"index": 0, "input": "x", "outputs": ["y"]}
    path = write(tmp_path / "vt.jsonl", row, row, row)
    whole, some = published.read("ruler", path), published.read("ruler", path, 2)
    assert (len(whole.questions), len(some.questions)) == (3, 2)
    assert whole.digest == some.digest
    assert published.read("ruler", write(path, row)).digest != whole.digest


@pytest.mark.parametrize("benchmark,file,row,message", [
    ("ruler", "vt.jsonl", {"outputs": ["y"]}, r"line 1: input: expected text, got none \(keys: o"),
    ("ruler", "vt.jsonl", {"input": "x", "outputs": []}, r"outputs: expected texts, got '\[\]'"),
    ("ruler", "other.jsonl", {}, "task: expected a file or folder named after one .*got 'other'"),
    ("ruler", "vt.jsonl", [1], "line 1: expected a JSON object, got list"),
    ("infinitebench", "passkeys.jsonl", {}, "task: expected one of passkey, .*got 'passkeys'"),
    ("infinitebench", "longbook_choice_eng.jsonl",
     {"context": "c", "input": "q", "answer": "five", "options": OPTIONS},
     "answer: expected one of the options, got 'five'"),
    ("infinitebench", "code_debug.jsonl", {"context": "c", "input": "q", "answer": "x"},
     "options: expected four texts, got none"),
    ("infinitebench", "math_find.jsonl", {"context": "c", "input": "q", "answer": 1},
     'input: expected "The ... number ..."'),
    ("longbench", "x.jsonl", {"dataset": "hotpot", "context": "c", "answers": ["a"]},
     "task: expected one of narrativeqa, .*got 'hotpot'"),
    ("longbench", "x.jsonl", {"dataset": "trec", "context": "c", "input": "q", "answers": ["a"]},
     "all_classes: expected the task's classes, got none"),
    ("squad", "x.jsonl", {}, "benchmark: expected one of ruler, infinitebench, longbench, got"),
])  # fmt: skip
def test_refusals(tmp_path, benchmark, file, row, message):
    with pytest.raises(ValueError, match=message):
        published.read(benchmark, write(tmp_path / file, row))


def test_refused_files(tmp_path):
    (tmp_path / "vt.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="expected lines of ruler, got none"):
        published.read("ruler", tmp_path / "vt.jsonl")
    (tmp_path / "vt.jsonl").write_text("{not json")
    with pytest.raises(ValueError, match=r"vt.jsonl, line 1: Expecting"):
        published.read("ruler", tmp_path / "vt.jsonl")
    with pytest.raises(FileNotFoundError):
        published.read("ruler", tmp_path / "qa.jsonl")
    rows = [{"dataset": d, "context": "c", "answers": ["a"]} for d in ("musique", "hotpotqa")]
    with pytest.raises(ValueError, match="line 2: expected one task a file, musique, got hotpotqa"):
        published.read("longbench", write(tmp_path / "mixed.jsonl", *rows))


def test_prompts_are_cut_in_the_middle():
    assert published.cut_in_the_middle(list(range(9)), 9) == list(range(9))
    assert published.cut_in_the_middle(list(range(9)), 5) == [0, 1, 2, 7, 8]
    assert published.cut_in_the_middle(list(range(9)), 4) == [0, 1, 7, 8]
    with pytest.raises(ValueError, match="limit: expected at least 2 tokens, got 1"):
        published.cut_in_the_middle([1, 2], 1)


def test_encoding():
    question = published.Question(0, "abcdef", ("x",), 1, "qa_f1")
    plain = published.Question(0, "abcdef", ("x",), 1, "qa_f1", plain=True)
    whole = Bytes()("abcdef").input_ids
    assert published.encode(question, Bytes(), 8) == (whole, False)
    assert published.encode(question, Bytes(), 4) == ([*whole[:2], *whole[-2:]], True)
    chatty = Chatty()
    letters = whole[2:]
    assert published.encode(question, chatty, 8, chat=True) == ([302, *letters, 303], False)
    ids, cut = published.encode(question, chatty, 6, chat=True)
    assert cut and ids == [302, *letters[:2], *letters[-2:], 303]
    assert published.encode(plain, chatty, 8, chat=True) == (whole, False)
    with pytest.raises(ValueError, match="--chat: expected a tokenizer with a chat template"):
        published.encode(question, Bytes(), 8, chat=True)
