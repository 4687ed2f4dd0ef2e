"""The published scores against cases worked by hand."""

from __future__ import annotations

import builtins

import pytest

from sparseattn.evaluation.metrics import METRICS, normalized, score

BOOK = ("Two of them", "B")
CLASSES = ("Animal", "Animal name", "Other animal", "City")
CASES = [
    ("exact_all", "12, 34 AND Oak", ["12", "oak", "99", "34"], 0.75),
    ("exact_all", "", ["1"], 0.0),
    ("exact_any", "it was oak", ["Elm", "OAK"], 1.0),
    ("exact_any", "it was oak", ["elm"], 0.0),
    ("qa_f1", "The cat, sat!", ["a cat sat"], 1.0),
    ("qa_f1", "cat cat dog", ["cat bird", "x"], 2 / 5),  # one common word of 3 and of 2
    ("qa_f1", "", ["cat"], 0.0),
    ("qa_f1_characters", "张三，李四", ["张 三"], 2 * 2 / (4 + 2)),  # noqa: RUF001
    ("rouge_l", "a b x c", ["a b c d"], 2 * 3 / (4 + 4)),
    ("rouge_l", "c b a", ["a b c", "q"], 2 * 1 / (3 + 3)),
    ("rouge_l", "", ["a"], 0.0),
    ("rouge_lsum", "a b\nC d", ["a c\nb d"], 2 * 4 / (4 + 4)),  # unions: a and c, b and d
    ("rouge_lsum", "a", ["a\na"], 2 * 1 / (1 + 2)),  # the one word is used once
    ("count", "5 or 6, so 5", ["5"], 2 / 3),
    ("count", "none", ["5"], 0.0),
    ("retrieval", "Paragraph 7 (not 12)", ["Paragraph 7"], 0.5),
    ("retrieval", "段落3", ["段落3"], 1.0),
    ("code_similarity", "\n# note\nreturn x\nmore", ["return x"], 1.0),
    ("code_similarity", "abcd", ["abce"], 0.75),
    ("code_similarity", "# only\n", ["x"], 0.0),
    ("first_integer", "is 71432. 9", ["71432"], 1.0),
    ("first_integer", "1 then 71432", ["71432"], 0.0),
    ("first_integer", "none", ["71432"], 0.0),
    ("word", '{"k": "ab-cd"}', ["ab-cd"], 1.0),
    ("word", "ab-cde", ["ab-cd"], 0.0),
    ("name", "It is Betty.", ["BETTY"], 1.0),
    ("name", "Bettys", ["BETTY"], 0.0),
    ("first_number", "about 3.5, or 4", ["3.5"], 1.0),
    ("first_number", "12", ["12.0"], 1.0),
    ("first_number", "-", ["12"], 0.0),
    ("last_integer", "func(3) returns: -42.", ["-42"], 1.0),
    ("last_integer", "42 or so", ["42"], 0.0),
    ("last_integer", "", ["42"], 0.0),
    ("running_values", "[1, 4, 9, 5]", ["1", "4", "8", "5"], 0.5),
    ("choice", "B. Two", BOOK, 1.0),
    ("choice", "C", BOOK, 0.0),
    ("choice", "The answer is: Two of them", BOOK, 1.0),
    ("choice", "the answer is B, surely", BOOK, 1.0),
    ("choice", "I think B or so", BOOK, 1.0),
    ("choice", "", BOOK, 0.0),
    ("choice", "none", BOOK, 0.0),
    ("faulty_function", "B. load", ("load", "B"), 1.0),
    ("faulty_function", "The answer is: load", ("load", "B"), 1.0),
    ("faulty_function", "the error is: C", ("load", "B"), 0.0),
    ("faulty_function", "load", ("load", "B"), 0.0),
]  # fmt: skip


@pytest.mark.parametrize("metric,output,answers,expected", CASES)
def test_worked_cases(metric, output, answers, expected):
    assert score(metric, output, answers) == pytest.approx(expected)


@pytest.mark.parametrize("output,answer,expected", [
    ("City", "City", 1.0),
    ("City or Animal", "City", 0.5),
    ("Animal name", "Animal name", 1.0),  # "Animal" is part of it and does not count
    ("Animal name", "Animal", 0.5),
    ("nothing", "City", 0.0),
])  # fmt: skip
def test_classification(output, answer, expected):
    assert score("classification", output, [answer], CLASSES) == expected


def test_normalised_words():
    assert normalized("The  U.S.A., an \t apple a day") == "usa apple day"


@pytest.mark.parametrize("metric", ["qa_f1_chinese", "rouge_l_chinese"])
def test_chinese_words_need_jieba(metric, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "jieba":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="pip install jieba"):
        score(metric, "x", ["y"])


def test_refusals():
    with pytest.raises(ValueError, match=r"metric: expected one of exact_all, .*, got 'bleu'"):
        score("bleu", "", ["x"])
    with pytest.raises(ValueError, match="answers: expected at least one, got none"):
        score("qa_f1", "", [])
    with pytest.raises(ValueError, match='answers: expected "Paragraph N"'):
        score("retrieval", "7", ["7"])


def test_every_metric_is_between_0_and_1():
    for metric in set(METRICS) - {"qa_f1_chinese", "rouge_l_chinese"}:
        answers = ["Paragraph 1"] if metric == "retrieval" else ["1", "B"]
        for output in ("", "1", "B", "Paragraph 1", "x\ny 1"):
            assert 0 <= score(metric, output, answers, ("1", "B")) <= 1
