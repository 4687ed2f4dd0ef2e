"""Files of the published benchmarks, as their authors' scripts and data sets have them.

* RULER: ``{"index", "input", "outputs", "length"}``, also with ``"answer_prefix"``, as its
  ``prepare.py`` writes them: ``TASK/validation.jsonl`` or ``TASK.jsonl``.
* InfiniteBench: ``{"id", "context", "input", "answer", "options"}``, ``TASK.jsonl``.
* LongBench and LongBench-E: ``{"input", "context", "answers", "dataset", "all_classes", ...}``.

One JSON object a line.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseattn.evaluation.templates import (
    FIRST_LINE,
    INFINITEBENCH,
    LONGBENCH,
    RULER,
    Template,
)

BENCHMARKS = ("ruler", "infinitebench", "longbench")


@dataclass(frozen=True)
class Question:
    """One prompt as text, and how its output is scored (``metrics.score``)."""

    index: int | str
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    metric: str
    classes: tuple[str, ...] = ()
    plain: bool = False  # not for a chat template
    first_line: bool = False  # only the output's first line is scored


@dataclass(frozen=True)
class QuestionFile:
    name: str  # benchmark/task
    digest: str
    questions: list[Question]


def read(benchmark: str, path: str | Path, limit: int | None = None) -> QuestionFile:
    """Reads a file of one of BENCHMARKS; of more than ``limit`` rows, the first ones.

    Raises:
        OSError: no such file.
        ValueError: an unknown benchmark or task, or a row of another form; the text names file and
            line, what was expected and what came.
    """
    readers = {"ruler": _ruler, "infinitebench": _infinitebench, "longbench": _longbench}
    if benchmark not in readers:
        raise ValueError(f"benchmark: expected one of {', '.join(readers)}, got {benchmark!r}")
    path = Path(path)
    data = path.read_bytes()
    questions: list[Question] = []
    task = None
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        if limit is not None and len(questions) == limit:
            break
        try:
            own, question = readers[benchmark](_Row(line), path, len(questions))
            if task is not None and own != task:
                raise ValueError(f"expected one task a file, {task}, got {own}")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        task = own
        questions.append(question)
    if task is None:
        raise ValueError(f"{path}: expected lines of {benchmark}, got none")
    digest = hashlib.sha256(data).hexdigest()[:16]
    return QuestionFile(f"{benchmark}/{task}", digest, questions)


class _Row:
    """A line's object; every field that is asked for has to be there."""

    def __init__(self, line: bytes) -> None:
        data = json.loads(line)
        if not isinstance(data, dict):
            raise ValueError(f"expected a JSON object, got {type(data).__name__}")
        self.data = data

    def text(self, key: str, default: str | None = None) -> str:
        value = self.data.get(key, default)
        if not isinstance(value, str):
            raise ValueError(f"{key}: expected text, {self._got(key)}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts or numbers, also a single one, as texts; at least one."""
        value = self.data.get(key)
        values = value if isinstance(value, list) else [value]
        good = values and all(
            isinstance(x, (str, int, float)) and not isinstance(x, bool) for x in values
        )
        if not good:
            raise ValueError(f"{key}: expected texts, {self._got(key)}")
        return tuple(map(str, values))

    def options(self) -> list[str]:
        value = self.data.get("options")
        if not isinstance(value, list) or len(value) != 4 or not all(map(str, value)):
            raise ValueError(f"options: expected four texts, {self._got('options')}")
        return [str(x) for x in value]

    def _got(self, key: str) -> str:
        if key not in self.data:
            return f"got none (keys: {', '.join(map(str, self.data)) or 'none'})"
        return f"got {str(self.data[key])[:60]!r}"


def _template(table: dict[str, Template], task: str) -> Template:
    if task not in table:
        raise ValueError(f"task: expected one of {', '.join(table)}, got {task!r}")
    return table[task]


def _filled(prompt: str, fields: dict[str, str]) -> str:
    """The prompt with its fields; braces in their texts are left alone, unlike in str.format's."""
    parts = re.split(r"\{(\w+)\}", prompt)
    return "".join(fields[part] if n % 2 else part for n, part in enumerate(parts))


def _ruler(row: _Row, path: Path, position: int) -> tuple[str, Question]:
    task = path.stem if path.stem not in ("validation", "test") else path.resolve().parent.name
    kind = next((start for start in RULER if task.startswith(start)), None)
    if kind is None:
        raise ValueError(
            f"task: expected a file or folder named after one ({', '.join(RULER)}, with what "
            f"follows), got {task!r}"
        )
    length, metric = RULER[kind]
    prompt = row.text("input") + row.text("answer_prefix", "")
    index = row.data.get("index", position)
    return task, Question(index, prompt, row.texts("outputs"), length, metric)


def _infinitebench(row: _Row, path: Path, position: int) -> tuple[str, Question]:
    task = path.stem
    template = _template(INFINITEBENCH, task)
    fields = {"context": row.text("context"), "input": row.text("input", "")}
    answers = row.texts("answer")
    if "{a}" in template.prompt:
        options = row.options()
        fields |= dict(zip("abcd", options, strict=True))
        if len(answers) == 1:  # the option's text; its letter joins it
            if answers[0] not in options:
                raise ValueError(f"answer: expected one of the options, got {answers[0]!r}")
            answers = (answers[0], "ABCD"[options.index(answers[0])])
        if len(answers) != 2:
            raise ValueError(f"answer: expected an option's text, got {answers!r}")
    if "{target}" in template.prompt:
        target = re.search(r"[Tt]he \w+ number", fields["input"])
        if target is None:
            raise ValueError(f'input: expected "The ... number ...", got {fields["input"][:60]!r}')
        fields["target"] = target[0].lower()
    prompt = _filled(template.prompt, fields)
    index = row.data.get("id", position)
    return task, Question(index, prompt, answers, template.max_new_tokens, template.metric)


def _longbench(row: _Row, path: Path, position: int) -> tuple[str, Question]:
    dataset = row.text("dataset")
    task = dataset.removesuffix("_e")
    template = _template(LONGBENCH, task)
    prompt = _filled(
        template.prompt, {"context": row.text("context"), "input": row.text("input", "")}
    )
    classes = row.texts("all_classes") if row.data.get("all_classes") else ()
    if template.metric == "classification" and not classes:
        raise ValueError("all_classes: expected the task's classes, got none")
    return dataset, Question(
        row.data.get("_id", position),
        prompt,
        row.texts("answers"),
        template.max_new_tokens,
        template.metric,
        classes,
        template.plain,
        task in FIRST_LINE,
    )


def scored_text(question: Question, output: str) -> str:
    """The part of an output that is scored."""
    return output.lstrip("\n").split("\n")[0] if question.first_line else output


def cut_in_the_middle(ids: list[int], limit: int) -> list[int]:
    """At most ``limit`` tokens: the first and the last halves of it, as both benchmarks cut."""
    if limit < 2:
        raise ValueError(f"limit: expected at least 2 tokens, got {limit}")
    if len(ids) <= limit:
        return ids
    last = limit // 2
    return ids[: limit - last] + ids[len(ids) - last :]


def encode(
    question: Question, tokenizer: Any, limit: int, *, chat: bool = False
) -> tuple[list[int], bool]:
    """(token ids of the prompt, at most ``limit``; whether it was cut).

    With ``chat`` the prompt, cut first, is the user's message in the tokenizer's chat template,
    unless the question is plain.

    Raises ValueError if the tokenizer has no chat template.
    """
    if not chat or question.plain:
        ids = list(tokenizer(question.prompt, verbose=False).input_ids)
        cut = cut_in_the_middle(ids, limit)
        return cut, len(cut) < len(ids)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("--chat: expected a tokenizer with a chat template, got none")

    def turn(text: str) -> list[int]:
        message = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        return list(ids)

    ids = list(tokenizer(question.prompt, add_special_tokens=False, verbose=False).input_ids)
    room = limit - len(turn(""))
    cut = cut_in_the_middle(ids, room)
    text = question.prompt if len(cut) == len(ids) else tokenizer.decode(cut)
    return cut_in_the_middle(turn(text), limit), len(cut) < len(ids)
