"""The small model's tokenizer: byte-level BPE on CPython's text, and one token for every key word
and for every group of up to three digits. Lossless for any text.

``python benchmarks/needle/needle_tokenizer.py FOLDER`` writes tokenizer.json and its config.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from needle_package import tasks, words
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT_TOKENS = 1024  # bytes included; before words and digits get theirs
SPECIAL = ("[gMASK]", "<sop>", "<|endoftext|>")
SPLIT = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def build(text_tokens: int = TEXT_TOKENS, text: str | None = None) -> Tokenizer:
    """BPE trained on ``text`` (default: the haystack's), then groups of digits and whole words."""
    text = tasks.haystack_text() if text is None else text
    trained = _shell(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=text_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # digits come one by one here: their groups are added below, all of them
    trained.train_from_iterator(_without_digits(text), trainer)
    state = _state(trained)
    wanted = [f"{n:0{w}d}" for w in (2, 3) for n in range(10**w)]
    wanted += [f" {word}" for word in words.WORDS]
    wanted += words.WORDS  # after a line break or "{", say, keys come without a space
    for text_of_task in tasks.FORMATS.values():
        wanted += re.findall(r" ?\b[A-Za-z]+\b", re.sub(r"{\w+}", "", text_of_task))
    for piece in wanted:
        _add(state, piece)
    vocabulary, merges = state
    for special in SPECIAL:
        vocabulary[special] = len(vocabulary)
    tokenizer = _shell(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A",
        pair="[gMASK] <sop> $A $B",
        special_tokens=[(s, tokenizer.token_to_id(s)) for s in SPECIAL[:2]],
    )
    return tokenizer


def wrap(tokenizer: Tokenizer) -> Any:
    """As ``transformers`` loads it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[2],
        additional_special_tokens=list(SPECIAL[:2]),
        clean_up_tokenization_spaces=False,
        model_max_length=1 << 20,
    )


def _shell(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _without_digits(text: str) -> list[str]:
    return text.translate(dict.fromkeys(range(48, 58), "\n")).split("\n\n")


def _state(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _add(state: tuple[dict[str, int], list[tuple[str, str]]], piece: str) -> None:
    """Merges, of the lowest rank, that make ``piece`` one token."""
    vocabulary, merges = state
    parts = list(piece.replace(" ", "\u0120"))
    ranks = _Ranks.of(merges)
    while len(parts) > 1:
        best = min(
            range(len(parts) - 1), key=lambda i: ranks.get((parts[i], parts[i + 1]), 1 << 30)
        )
        pair = (parts[best], parts[best + 1])
        if pair not in ranks:
            ranks[pair] = len(merges)
            merges.append(pair)
            vocabulary.setdefault(pair[0] + pair[1], len(vocabulary))
        # as BPE does: every place where this pair stands
        out: list[str] = []
        i = 0
        while i < len(parts):
            if i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair:
                out.append(pair[0] + pair[1])
                i += 2
            else:
                out.append(parts[i])
                i += 1
        parts = out


class _Ranks:
    _kept: tuple[int, dict[tuple[str, str], int]] | None = None

    @classmethod
    def of(cls, merges: list[tuple[str, str]]) -> dict[tuple[str, str], int]:
        """Pair -> rank, kept between calls for the same list."""
        if cls._kept is None or cls._kept[0] != id(merges):
            cls._kept = (id(merges), {pair: i for i, pair in enumerate(merges)})
        return cls._kept[1]


if __name__ == "__main__":
    wrap(build()).save_pretrained(sys.argv[1])
