"""Synthetic long-context tasks after RULER (arXiv 2404.06654), as token sequences of exact length.

A prompt is: the tokens that open every prompt of the tokenizer, one line that says what to look
for, real text with the needles pasted in between its tokens, a question, and the first words of
the answer. The formats (``FORMATS``) put a key right before what is looked up by it, so that a
model of a few million parameters learns them in minutes; a large one reads them as few-line notes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from sparseattn.demo_model import read_text
from sparseattn.evaluation.words import WORDS

TASKS: dict[str, str] = {
    "niah_single": "one needle in text: the number of a key",
    "niah_multikey": "needles of many keys in text: the number of one of them",
    "niah_multivalue": "several needles of one key, among others: all its numbers",
    "niah_multiquery": "needles of many keys: the numbers of four of them",
    "variable_tracking": "a chain of assignments among others: all variables it reaches",
    "common_words": "a long list of words: the three that are most common",
}

VALUES = 4  # numbers of the key in niah_multivalue
QUERIES = 4  # keys asked for in niah_multiquery
HOPS = 5  # variables that a chain reaches
COMMON = 3  # words asked for in common_words
SHARES = (0.24, 0.16, 0.10)  # their shares of the list
RARE = 60  # other words of the list
OTHERS = 8  # keys nobody asks for (niah_multikey; half of it in niah_multivalue)
CHAINS = 2  # chains nobody asks for

#: What the prompts are made of. ``{key}``s are of WORDS, ``{value}``s numbers of six digits.
FORMATS: dict[str, str] = {
    "open_niah": "Remember the magic numbers.",
    "open_chain": "Remember the assignments.",
    "open_words": "Remember the common words:",
    "needle": "\nmagic: {key}={value}\n",
    "ask": "\nquestion: magic number of {key}\nanswer: {key}=",
    "ask_all": "\nquestion: all magic numbers of {key}\nanswer: {key}=",
    "ask_many": "\nquestion: magic numbers of {keys}\nanswer: {key}=",
    "link_first": "\nassign: {value}> {key}\n",
    "link": "\nassign: {source}> {key}\n",
    "ask_chain": "\nquestion: follow {value}\nanswer: {value}>",
    "ask_words": "\nquestion: most common\nanswer:",
}


@dataclass(frozen=True)
class Example:
    """A prompt of exactly the length asked for, which ends where the answer begins."""

    input_ids: list[int]
    answers: tuple[str, ...]  # what the stripped output should hold
    max_new_tokens: int
    metric: str  # "exact_all": the share of answers found; "exact_any": 1 if any is found
    depth: float | None  # of the first needle: 0 at the start of the text, 1 at its end


def score(example: Example, output: str) -> float:
    """0 to 1: what ``example.metric`` says of the model's output."""
    found = [answer in output for answer in example.answers]
    return float(any(found)) if example.metric == "exact_any" else sum(found) / len(found)


@lru_cache(maxsize=1)
def haystack_text() -> str:
    """Python's help topics, then the standard library's sources: about 5 MB of text."""
    return read_text(None, 1 << 40)[0].decode("utf-8", errors="replace")


@lru_cache(maxsize=1)
def topics_length() -> int:
    """Characters of ``haystack_text()`` that are help topics, the part used first."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return 0
    return sum(len(text) + 1 for text in topics.values())


def make(
    task: str,
    tokenizer: Any,
    length: int,
    *,
    seed: int,
    index: int,
    depth: float | None = None,
) -> Example:
    """Example ``index`` of ``task``: the same for the same arguments and tokenizer.

    ``depth``: where the first needle goes; None draws it. ``common_words`` has no needle, and
    takes None only. Raises ValueError for an unknown task, a depth outside 0..1, or a length too
    short for the needles and the question.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    if depth is not None and (task == "common_words" or not 0 <= depth <= 1):
        expected = "None (no needle)" if task == "common_words" else "None or 0..1"
        raise ValueError(f"depth: expected {expected} for {task}, got {depth!r}")
    draw = random.Random(f"{task} {seed} {index} {length}")
    return _MAKERS[task](_encoder(tokenizer), length, draw, depth)


def _single(tokens: _Tokens, length: int, draw: random.Random, depth: float | None) -> Example:
    return _lookup(tokens, length, draw, depth, others=0)


def _multikey(tokens: _Tokens, length: int, draw: random.Random, depth: float | None) -> Example:
    return _lookup(tokens, length, draw, depth, others=OTHERS)


def _lookup(
    tokens: _Tokens, length: int, draw: random.Random, depth: float | None, others: int
) -> Example:
    key, *rest = draw.sample(WORDS, 1 + others)
    value = _number(draw)
    at = _depth(draw, depth)
    needles = [(at, _needle(key, value))]
    needles += [(draw.random(), _needle(word, _number(draw))) for word in rest]
    ask = FORMATS["ask"].format(key=key)
    return _in_text(tokens, length, draw, "open_niah", needles, ask, (value,), value, at)


def _multivalue(tokens: _Tokens, length: int, draw: random.Random, depth: float | None) -> Example:
    key, *rest = draw.sample(WORDS, 1 + OTHERS // 2)
    values = tuple(_number(draw) for _ in range(VALUES))
    depths = _depths(draw, depth, VALUES)
    needles = [(at, _needle(key, value)) for at, value in zip(depths, values, strict=True)]
    needles += [(draw.random(), _needle(word, _number(draw))) for word in rest]
    ask = FORMATS["ask_all"].format(key=key)
    return _in_text(
        tokens, length, draw, "open_niah", needles, ask, values, ",".join(values), depths[0]
    )


def _multiquery(tokens: _Tokens, length: int, draw: random.Random, depth: float | None) -> Example:
    keys = draw.sample(WORDS, QUERIES + OTHERS // 2)
    values = [_number(draw) for _ in keys]
    depths = _depths(draw, depth, QUERIES) + [draw.random() for _ in range(OTHERS // 2)]
    needles = [(at, _needle(k, v)) for at, k, v in zip(depths, keys, values, strict=True)]
    asked = list(zip(keys, values, strict=True))[:QUERIES]
    draw.shuffle(asked)
    ask = FORMATS["ask_many"].format(keys=" ".join(k for k, _ in asked), key=asked[0][0])
    answer = " ".join(f"{k}={v}" for k, v in asked).partition("=")[2]
    answers = tuple(v for _, v in asked)
    return _in_text(tokens, length, draw, "open_niah", needles, ask, answers, answer, depths[0])


def _chain(tokens: _Tokens, length: int, draw: random.Random, depth: float | None) -> Example:
    words = draw.sample(WORDS, (1 + CHAINS) * HOPS)
    needles: list[tuple[float, str]] = []
    first = 0.0
    asked: tuple[str, ...] = ()
    start = ""
    for chain in range(1 + CHAINS):
        names = words[chain * HOPS : (chain + 1) * HOPS]
        value = _number(draw)
        depths = _depths(draw, depth if chain == 0 else None, HOPS)
        links = [FORMATS["link_first"].format(value=value, key=names[0])]
        links += [FORMATS["link"].format(source=source, key=key) for source, key in pairwise(names)]
        needles += zip(depths, links, strict=True)
        if chain == 0:
            first, asked, start = depths[0], tuple(names), value
    ask = FORMATS["ask_chain"].format(value=start)
    answer = " " + "> ".join(asked)
    return _in_text(tokens, length, draw, "open_chain", needles, ask, asked, answer, first)


def _common(tokens: _Tokens, length: int, draw: random.Random, depth: float | None) -> Example:
    words = draw.sample(WORDS, COMMON + RARE)
    common, rare = words[:COMMON], words[COMMON:]
    head = tokens.prefix + tokens(FORMATS["open_words"])
    tail = tokens(FORMATS["ask_words"])
    _room(length, len(head) + len(tail) + 2 * len(words), "common_words")
    room = length - len(head) - len(tail)
    parts = [tokens(" " + word) for word in words]
    mean = sum(map(len, parts)) / len(parts)
    count = int(room / mean) + 1
    listed = [
        word for word, share in zip(common, SHARES, strict=True) for _ in range(int(share * count))
    ]
    listed += [rare[i % RARE] for i in range(count - len(listed))]
    draw.shuffle(listed)
    pieces = dict(zip(words, parts, strict=True))
    ids = [token for word in listed for token in pieces[word]]
    while len(ids) < room:
        ids += pieces[draw.choice(rare)]
    answer = " " + " ".join(common)
    return _example(tokens, head + ids[:room] + tail, tuple(common), answer, None)


_MAKERS: dict[str, Callable[..., Example]] = {
    "niah_single": _single,
    "niah_multikey": _multikey,
    "niah_multivalue": _multivalue,
    "niah_multiquery": _multiquery,
    "variable_tracking": _chain,
    "common_words": _common,
}


class _Tokens:
    """Text to tokens without special ones; what opens a prompt; the tokens of the haystack."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        plain, full = self("a"), list(tokenizer("a", verbose=False).input_ids)
        starts = [i for i in range(len(full)) if full[i : i + len(plain)] == plain]
        self.prefix = full[: starts[0]] if starts else []
        self._hay: list[int] = []
        self._whole = False

    def __call__(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def hay(self, length: int, draw: random.Random) -> list[int]:
        """``length`` tokens of the haystack from a place that ``draw`` says: of the help topics if
        they are long enough, else of all text from its start, over again where that ends."""
        if not self._hay:
            self._hay = self(haystack_text()[: topics_length() or 1 << 19])
        if len(self._hay) < length and not self._whole:
            self._hay, self._whole = self(haystack_text()), True
        at = draw.randrange(max(1, len(self._hay) - length))
        ids = self._hay[at : at + length]
        while len(ids) < length:
            ids += self._hay[: length - len(ids)]
        return ids


_ENCODERS: WeakKeyDictionary[Any, _Tokens] = WeakKeyDictionary()


def _encoder(tokenizer: Any) -> _Tokens:
    if tokenizer not in _ENCODERS:
        _ENCODERS[tokenizer] = _Tokens(tokenizer)
    return _ENCODERS[tokenizer]


def _number(draw: random.Random) -> str:
    return str(draw.randrange(100000, 1000000))


def _needle(key: str, value: str) -> str:
    return FORMATS["needle"].format(key=key, value=value)


def _depth(draw: random.Random, depth: float | None) -> float:
    drawn = draw.random()  # drawn in any case, so that what follows is the same at every depth
    return drawn if depth is None else depth


def _depths(draw: random.Random, depth: float | None, count: int) -> list[float]:
    """Ascending; the first at ``depth``, the others anywhere after it."""
    drawn = sorted(draw.random() for _ in range(count))
    if depth is None:
        return drawn
    return [depth] + [depth + (1 - depth) * x for x in drawn[1:]]


def _room(length: int, taken: int, task: str) -> int:
    if length <= taken:
        raise ValueError(f"length: expected more than {taken} tokens for {task}, got {length}")
    return length - taken


def _in_text(
    tokens: _Tokens,
    length: int,
    draw: random.Random,
    opening: str,
    needles: list[tuple[float, str]],
    ask: str,
    answers: tuple[str, ...],
    answer: str,
    depth: float,
) -> Example:
    head = tokens.prefix + tokens(FORMATS[opening])
    tail = tokens(ask)
    pieces = [(at, tokens(text)) for at, text in needles]
    taken = len(head) + len(tail) + sum(len(ids) for _, ids in pieces)
    room = _room(length, taken, "the needles and the question")
    hay = tokens.hay(room, draw)
    body: list[int] = []
    done = 0
    for at, ids in sorted(pieces, key=lambda piece: piece[0]):
        upto = round(at * room)
        body += hay[done:upto] + ids
        done = upto
    return _example(tokens, head + body + hay[done:] + tail, answers, answer, depth)


def _example(
    tokens: _Tokens, ids: list[int], answers: tuple[str, ...], answer: str, depth: float | None
) -> Example:
    return Example(ids, answers, len(tokens(answer)) + 2, "exact_all", depth)
