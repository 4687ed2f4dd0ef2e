"""Search over the user's own files: BM25 over passages of plain text, nothing but Python.

Every result has a number that stays valid for the whole conversation; ``open`` shows the text
around it, part by part. The model sees it as two functions, ``search`` and ``open``, or in the form
of GLM-4's built-in ``simple_browser`` (``BrowserTool``).
"""

# ruff: noqa: RUF001 (GLM-4 was trained on full-width punctuation)

from __future__ import annotations

import ast
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from glm4_tools.tools import ERROR, FunctionTool, Observation, ToolError

PASSAGE_CHARS = 1200
PART_CHARS = 4000
SNIPPET_CHARS = 300
_K1, _B = 1.2, 0.75  # BM25's usual saturation and length normalisation
_WORDS = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]+|[^\W_]+")
_CITATION = re.compile(r"【(\d+)†[^】]*】")


def terms(text: str) -> Iterator[str]:
    """Words in lower case; Chinese runs as their pairs of characters."""
    for match in _WORDS.finditer(text.lower()):
        word = match.group()
        if "\u3400" <= word[0] <= "\ufaff" and len(word) > 1:
            yield from (word[i : i + 2] for i in range(len(word) - 1))
        else:
            yield word


@dataclass(frozen=True)
class Passage:
    """Characters begin .. end - 1 of a file; its first and last line, counted from 1."""

    file: str
    begin: int
    end: int
    first_line: int
    last_line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.first_line}-{self.last_line}"


class LocalSearch:
    """An index in memory of the text files below a folder, as they are now.

    Taken are files that decode as UTF-8 and hold no NUL; hidden files and folders, links that lead
    out of the folder and files above ``max_file_bytes`` are left out (``skipped`` counts files).

    Raises NotADirectoryError if ``root`` is none.
    """

    def __init__(self, root: str | Path, *, max_file_bytes: int = 8 * 2**20) -> None:
        self.root = Path(root).resolve()
        if not self.root.is_dir():
            raise NotADirectoryError(f"{root}: expected a folder")
        self.texts: dict[str, str] = {}
        self.skipped = 0
        self._passages: list[Passage] = []
        self._lengths: list[int] = []
        self._postings: dict[str, list[tuple[int, int]]] = {}
        self._results: list[Passage] = []
        self._numbers: dict[Passage, int] = {}
        for path in self._paths():
            text = self._read(path, max_file_bytes)
            if text is None:
                self.skipped += 1
            else:
                self._add(path.relative_to(self.root).as_posix(), text)
        self._mean = sum(self._lengths) / max(len(self._lengths), 1)

    def _paths(self) -> Iterator[Path]:
        for folder, folders, names in os.walk(self.root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))

    def _read(self, path: Path, max_bytes: int) -> str | None:
        try:
            inside = path.resolve().is_relative_to(self.root)
            if not inside or not path.is_file() or path.stat().st_size > max_bytes:
                return None
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        return None if "\0" in text else text

    def _add(self, file: str, text: str) -> None:
        self.texts[file] = text
        begin, line = 0, 1
        while begin < len(text):
            end = min(begin + PASSAGE_CHARS, len(text))
            if end < len(text):  # end with a line, if one ends here
                end = text.rfind("\n", begin, end) + 1 or end
            piece = text[begin:end]
            last = line + piece.count("\n", 0, len(piece) - 1)
            counts = Counter(terms(f"{file} {piece}"))
            for term, count in counts.items():
                self._postings.setdefault(term, []).append((len(self._passages), count))
            self._passages.append(Passage(file, begin, end, line, last))
            self._lengths.append(counts.total())
            line += piece.count("\n")
            begin = end

    def find(self, query: str, limit: int) -> list[Passage]:
        """The best passages first; ties in the order of files and lines."""
        scores: dict[int, float] = {}
        for term in dict.fromkeys(terms(query)):
            postings = self._postings.get(term, ())
            n, held = len(self._passages), len(postings)
            rarity = math.log(1 + (n - held + 0.5) / (held + 0.5))
            for index, count in postings:
                norm = 1 - _B + _B * self._lengths[index] / self._mean
                gain = rarity * count * (_K1 + 1) / (count + _K1 * norm)
                scores[index] = scores.get(index, 0.0) + gain
        best = sorted(scores, key=lambda index: (-scores[index], index))[:limit]
        return [self._passages[index] for index in best]

    def number(self, passage: Passage) -> int:
        """The passage's number, a new one if it has none."""
        if passage not in self._numbers:
            self._numbers[passage] = len(self._results)
            self._results.append(passage)
        return self._numbers[passage]

    def passage(self, number: int) -> Passage:
        """Raises ToolError if no result has that number."""
        if not 0 <= number < len(self._results):
            raise ToolError(f"no result has the id {number}; {len(self._results)} are known")
        return self._results[number]

    def search(self, query: str, limit: int = 5) -> str:
        """The text of a result list."""
        if not 1 <= limit <= 20:
            raise ToolError(f"limit: expected 1 to 20, got {limit}")
        found = self.find(query, limit)
        if not found:
            return f"nothing found for {query!r} in {len(self.texts)} files"
        return "\n\n".join(f"# 【{self.number(p)}†{p}】\n{self._snippet(p, query)}" for p in found)

    def _snippet(self, passage: Passage, query: str) -> str:
        """From the line with most of the query's words on."""
        text = self.texts[passage.file][passage.begin : passage.end]
        wanted, lines = set(terms(query)), text.splitlines(keepends=True)
        hits = [len(wanted.intersection(terms(line))) for line in lines]
        at = sum(map(len, lines[: hits.index(max(hits))]))
        begin = max(0, min(at, len(text) - SNIPPET_CHARS))
        return text[begin : begin + SNIPPET_CHARS].strip()

    def open(self, id: int, part: int = 0) -> str:
        """The file's text from the result on; part 1 goes on where part 0 ends, -1 is before."""
        passage = self.passage(id)
        text = self.texts[passage.file]
        begin = passage.begin + part * PART_CHARS
        end = min(begin + PART_CHARS, len(text))
        begin = max(begin, 0)
        if begin >= end:
            raise ToolError(f"{passage.file} has no part {part} from result {id}")
        first = text.count("\n", 0, begin) + 1
        last = first + text.count("\n", begin, end - 1)
        total = text.count("\n", 0, len(text) - 1) + 1
        more = [f"part {part - 1}"] if begin > 0 else []
        more += [f"part {part + 1}"] if end < len(text) else []
        where = f"【{id}†{passage.file}】 lines {first}-{last} of {total}"
        return f"{where}{'; more: ' if more else ''}{', '.join(more)}\n{text[begin:end]}"

    def cited(self, text: str) -> dict[int, str]:
        """What the marks 【id†...】 in a text refer to."""
        numbers = sorted({int(n) for n in _CITATION.findall(text)})
        return {n: str(self._results[n]) for n in numbers if n < len(self._results)}

    def tools(self) -> list[FunctionTool]:
        """``search`` and ``open`` as functions."""
        integer, string = {"type": "integer"}, {"type": "string"}
        return [
            _tool(
                self.search,
                "search",
                "Search the user's local files. Results are 【id†file:lines】 with an excerpt; "
                "cite them as 【id†quoted text】.",
                {"query": string | {"description": "words to look for"}},
                {"limit": integer | {"description": "number of results, 1 to 20; default 5"}},
            ),
            _tool(
                self.open,
                "open",
                "Show the text of a file from a search result on.",
                {"id": integer | {"description": "id of the result"}},
                {"part": integer | {"description": "0: from the result on (default); 1, 2, ...: "
                                    "further on; -1, -2, ...: before it"}},
            ),
        ]  # fmt: skip


def _tool(
    fn: Callable[..., str], name: str, description: str, required: dict, optional: dict
) -> FunctionTool:
    parameters = {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
    }
    return FunctionTool(fn, {"name": name, "description": description, "parameters": parameters})


class BrowserTool:
    """The same search in the form of GLM-4's ``simple_browser``: lines of calls, not JSON.

    ``search(query, recency_days)`` (the days are ignored), ``mclick(ids)``, ``open_url(file)``.
    """

    name = "simple_browser"

    def __init__(self, search: LocalSearch) -> None:
        self._search = search

    def body(self) -> str:
        return (
            "你可以使用 `simple_browser` 工具。该工具支持以下函数：\n"
            "`search(query: str, recency_days: int)`：在用户的本地文件中进行查询并显示结果。\n"
            "`mclick(ids: list[int])`：获取一系列指定 id 的页面内容。\n"
            "`open_url(url: str)`：打开指定的本地文件。\n\n"
            "使用 `【{引用 id}†{引用文本}】` 来引用内容。\n\n"
            "操作步骤：1. 使用 `search` 来获得信息列表; 2. 使用 `mclick` 来获取指定 ID 页面的内容; "
            "3. 根据获得的内容进行回复。在回复中应当引用信息来源。\n"
            "如果初次搜索结果没有找到合适的信息，也可以再次使用 `search` 进行搜索。"
        )

    def call(self, argument: str) -> list[Observation]:
        try:
            lines = ast.parse(argument.strip()).body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ToolError(f"expected search(..), mclick(..) or open_url(..): {error}") from error
        answers = []
        for line in lines:
            try:
                answers += self._one(line)
            except ToolError as error:
                answers.append(Observation(str(error), ERROR))
        return answers or [Observation("expected search(..), mclick(..) or open_url(..)", ERROR)]

    def _one(self, line: ast.stmt) -> list[Observation]:
        call = getattr(line, "value", None)
        name = getattr(getattr(call, "func", None), "id", None)
        parameter = {"search": "query", "mclick": "ids", "open_url": "url"}.get(name)
        if parameter is None:
            raise ToolError("expected search(..), mclick(..) or open_url(..)")
        named = {word.arg: word.value for word in call.keywords}
        node = call.args[0] if call.args else named.get(parameter)
        try:
            value = ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, RecursionError) as error:
            raise ToolError(f"{name}: expected a literal as {parameter}") from error
        if name == "mclick":
            if not isinstance(value, list) or not all(type(n) is int for n in value):
                raise ToolError(f"mclick: expected a list of ids, got {value!r}")
            return [self._quote(n) for n in value[:10]]
        if not isinstance(value, str):
            raise ToolError(f"{name}: expected a string, got {value!r}")
        if name == "search":
            return [Observation(self._search.search(value), "browser_result")]
        text = self._search.texts.get(value.removeprefix("file://"))
        if text is None:
            raise ToolError(f"open_url: {value!r} is none of the user's files")
        return [Observation(text[:PART_CHARS], "browser_result")]

    def _quote(self, number: int) -> Observation:
        try:
            text, passage = self._search.open(number), self._search.passage(number)
        except ToolError as error:
            return Observation(str(error), ERROR)
        return Observation(text, f"quote_result [{number}†{passage.file}]")
