"""``sparseattn.evaluation``: the tasks' lengths, answers and depths; loading a model."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("tokenizers", reason="the tasks need a tokenizer")
pytest.importorskip("transformers", reason="the tasks need a tokenizer")

from sparseattn.evaluation import model, tasks
from sparseattn.evaluation.words import WORDS

IN_TEXT = [name for name in tasks.TASKS if name != "common_words"]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.MODELS / "needle", local_files_only=True)


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Another kind: one token per byte, nothing opens a prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bare.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bare)


def text_of(tokenizer, example) -> str:
    return tokenizer.decode(example.input_ids, clean_up_tokenization_spaces=False)


def needle_of(task: str, text: str, example: tasks.Example) -> str:
    """The text of the first needle that is asked for."""
    asked = text.rpartition("\nanswer: ")[2].rstrip("=>")
    if task == "variable_tracking":
        return tasks.FORMATS["link_first"].format(value=asked, key=example.answers[0])
    values = [tasks.FORMATS["needle"].format(key=asked, value=v) for v in example.answers]
    if task == "niah_multiquery":
        keys = text.rpartition("numbers of ")[2].partition("\n")[0].split()
        values = [
            tasks.FORMATS["needle"].format(key=k, value=v)
            for k, v in zip(keys, example.answers, strict=True)
        ]
    return min(values, key=text.index)


def test_words() -> None:
    assert len(WORDS) == len(set(WORDS)) == 256
    assert all(word.isalpha() and word.islower() for word in WORDS)


def test_tokenizer(tokenizer) -> None:
    """Keys are one token, numbers two, any text comes back."""
    encode = tasks._encoder(tokenizer)
    assert all(len(encode(" " + word)) == 1 for word in WORDS)
    assert all(len(encode(str(n))) == 2 for n in range(100000, 1000000, 997))
    assert len(encode.prefix) == 2
    text = "h\u00e9llo \u2713 \u6f22\u5b57 \x00\n\t  a  b\r\n 12345678 river=123456 \U0001f980"
    for sample in (text, tasks.haystack_text()[:20000]):
        assert tokenizer.decode(encode(sample), clean_up_tokenization_spaces=False) == sample


@pytest.mark.parametrize("length", [512, 1001, 8192])
@pytest.mark.parametrize("task", tasks.TASKS)
def test_length_and_answers(task: str, length: int, tokenizer) -> None:
    example = tasks.make(task, tokenizer, length, seed=0, index=3)
    assert len(example.input_ids) == length
    text = text_of(tokenizer, example)
    assert text.startswith("[gMASK]<sop>Remember the ")
    body = text.rpartition("\nquestion: ")[0]
    assert example.answers and all(answer in body for answer in example.answers)
    assert example.metric == "exact_all" and example.max_new_tokens >= len(example.answers)
    if task == "common_words":
        counts = {word: body.split().count(word) for word in set(body.split())}
        assert sorted(counts, key=counts.get)[-3:] == list(reversed(example.answers))
        assert example.depth is None
    else:
        assert needle_of(task, text, example) in body
    ends = {"variable_tracking": ">", "common_words": "answer:"}
    assert text.endswith(ends.get(task, "="))


@pytest.mark.parametrize("task", tasks.TASKS)
def test_another_tokenizer(task: str, byte_tokenizer) -> None:
    example = tasks.make(task, byte_tokenizer, 4096, seed=0, index=0)
    assert len(example.input_ids) == 4096
    text = text_of(byte_tokenizer, example)
    assert all(answer in text for answer in example.answers)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("task", IN_TEXT)
def test_depth(task: str, depth: float, tokenizer) -> None:
    """Needles before the first one asked for, and they alone, may push it back."""
    length = 4096
    example = tasks.make(task, tokenizer, length, seed=1, index=0, depth=depth)
    assert example.depth == depth
    text = text_of(tokenizer, example)
    needle = needle_of(task, text, example)
    before = len(tasks._encoder(tokenizer)(text[: text.index(needle)]))
    assert abs(before / length - depth) < 0.05


def test_drawn_depths_spread(tokenizer) -> None:
    drawn = [tasks.make("niah_single", tokenizer, 256, seed=0, index=i).depth for i in range(64)]
    assert min(drawn) < 0.2 and max(drawn) > 0.8


@pytest.mark.parametrize("task", tasks.TASKS)
def test_what_decides_an_example(task: str, tokenizer) -> None:
    def make(seed: int, index: int) -> tasks.Example:
        return tasks.make(task, tokenizer, 600, seed=seed, index=index)

    assert make(0, 0) == make(0, 0)
    made = [make(0, 0), make(0, 1), make(1, 0), make(1, 1)]
    assert len({tuple(e.input_ids) for e in made}) == len({e.answers for e in made}) == 4


def test_the_depth_moves_the_needle_only(tokenizer) -> None:
    one, two = (
        tasks.make("niah_multikey", tokenizer, 600, seed=0, index=0, depth=d) for d in (0.1, 0.8)
    )
    assert one.answers == two.answers and sorted(one.input_ids) == sorted(two.input_ids)


def test_long_haystack(byte_tokenizer, monkeypatch) -> None:
    """Longer than the help topics: the sources follow, then the text starts over."""
    monkeypatch.setattr(tasks, "haystack_text", lambda: "0123456789abc")
    monkeypatch.setattr(tasks, "topics_length", lambda: 10)
    encode = tasks._Tokens(byte_tokenizer)
    draw = random.Random(0)
    assert byte_tokenizer.decode(encode.hay(7, draw)) in "0123456789"
    assert byte_tokenizer.decode(encode.hay(16, draw)) == "0123456789abc012"


def test_score() -> None:
    example = tasks.Example([1], ("12", "34"), 4, "exact_all", None)
    assert [tasks.score(example, out) for out in ("", "x 12", "34,12")] == [0, 0.5, 1]
    example = tasks.Example([1], ("12", "34"), 4, "exact_any", None)
    assert [tasks.score(example, out) for out in ("", "x 12", "34,12")] == [0, 1, 1]


def test_refusals(tokenizer) -> None:
    def make(task: str, length: int, depth: float | None = None) -> None:
        tasks.make(task, tokenizer, length, seed=0, index=0, depth=depth)

    with pytest.raises(ValueError, match=r"task: expected one of niah_single, .* got 'niah'"):
        make("niah", 512)
    with pytest.raises(ValueError, match=r"depth: expected None or 0\.\.1 .* got 1\.5"):
        make("niah_single", 512, 1.5)
    with pytest.raises(ValueError, match=r"depth: expected None .* got 0\.5"):
        make("common_words", 512, 0.5)
    for task in tasks.TASKS:
        with pytest.raises(ValueError, match=r"length: expected more than \d+ tokens .* got 20"):
            make(task, 20)


def test_load_refusals(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"model: expected .* got 'absent' \(no config.json"):
        model.load("absent")
    with pytest.raises(ValueError, match="model: expected"):
        model.load(tmp_path)
