"""GLM-4's chat format, as token ids.

A conversation is ``[gMASK]<sop>`` and then messages, with nothing between them::

    <|role|>{metadata}\\n{content}

Generation starts after a bare ``<|assistant|>`` and ends at one of three tokens: ``<|user|>`` and
``<|endoftext|>`` (the turn is finished) or ``<|observation|>`` (it waits for a tool's result). A
turn may hold several blocks, divided by ``<|assistant|>``; a block that calls a tool has the tool's
name as its metadata, plain text has none.

Content never becomes a special token, whatever it says: a document or a tool result that contains
the text "<|user|>" cannot open a message.
"""

# ruff: noqa: RUF001 (GLM-4 was trained on full-width punctuation)

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "observation")
STOPS = ("<|user|>", "<|observation|>", "<|endoftext|>")
_PREFIX = ("[gMASK]", "<sop>")

#: What GLM-4's system message says before its tools, word for word.
IDENTITY = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。"
)
TOOLS_HEADING = "# 可用工具"


@dataclass(frozen=True)
class Block:
    """A part of an assistant turn: ``metadata`` is its first line, without surrounding blanks."""

    metadata: str
    content: str


@dataclass(frozen=True)
class Turn:
    """What the model said: text for the user and, if it waits for results, the calls in order."""

    text: str
    calls: tuple[Block, ...]
    stop: str | None  # the token that ended it; None: it was cut by its length


class ChatFormat:
    """Messages to ids and back, with a GLM-4 tokenizer.

    Raises ValueError if the tokenizer lacks one of GLM-4's special tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        names = [*_PREFIX, *(f"<|{role}|>" for role in ROLES), *STOPS]
        self.special: dict[str, int] = {}
        for name in names:
            index = tokenizer.convert_tokens_to_ids(name)
            if index is None or index == tokenizer.unk_token_id:
                raise ValueError(f"tokenizer: expected GLM-4's special tokens, it has no {name}")
            self.special[name] = index
        self._reserved = frozenset(self.special.values())
        self.prefix = [self.special[name] for name in _PREFIX]
        self.assistant = self.special["<|assistant|>"]
        self.stops = {self.special[name]: name for name in STOPS}

    def text(self, text: str) -> list[int]:
        """Ids of plain text."""
        ids = self._encode(text)
        if not self._reserved.isdisjoint(ids):  # names that this tokenizer does not split by itself
            ids = [i for piece in re.split(r"(?<=[<\[])", text) for i in self._encode(piece)]
        return ids

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def message(self, role: str, content: str, metadata: str = "") -> list[int]:
        """Ids of a message; the metadata line is encoded apart from the content."""
        line = " ".join(metadata.split())
        return [self.special[f"<|{role}|>"], *self.text(f"{line}\n"), *self.text(content)]

    def parse(self, ids: Sequence[int], stop: int | None) -> Turn:
        """The turn that ``ids`` (without the token ``stop`` that ended it) make."""
        name = None if stop is None else self.stops[stop]
        blocks, part = [], []
        for index in [*ids, self.assistant]:
            if index == self.assistant:
                blocks.append(self._decode(part))
                part = []
            else:
                part.append(index)
        if name != "<|observation|>":
            return Turn("\n".join(filter(None, (b.strip() for b in blocks))), (), name)
        texts, calls = [], []
        for text in blocks:
            first, _, rest = text.partition("\n")
            if first.strip():
                calls.append(Block(first.strip(), rest))
            elif rest.strip():
                texts.append(rest.strip())
        return Turn("\n".join(texts), tuple(calls), name)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def document_text(name: str, text: str) -> str:
    """What stands before the first question, in GLM-4's form for uploaded files."""
    return f"[File Name]\n{name}\n[File Content]\n{text}\n\n\n1 files uploaded.\n"
