"""Tools: what the model may call, what it is told of them, and how a call is answered.

A call is always answered. An unknown name, arguments that are not what was asked for, an exception:
all become observations with the metadata ``system_error``, which the model can read and act on.
"""

# ruff: noqa: RUF001 (GLM-4 was trained on full-width punctuation)

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from glm4_tools.chat import IDENTITY, TOOLS_HEADING, Block

ERROR = "system_error"


@dataclass(frozen=True)
class Observation:
    """One answer to a call: what follows ``<|observation|>``."""

    content: str
    metadata: str = ""


class ToolError(Exception):
    """Its text is what the model is told."""


class Tool(Protocol):
    name: str

    def body(self) -> str:
        """What the system message says below the tool's name."""

    def call(self, argument: str) -> list[Observation]:
        """Answer a call; any exception becomes an observation."""


class Toolbox:
    """The tools of a conversation. Results longer than ``max_chars`` lose their middle."""

    def __init__(self, *tools: Tool, max_chars: int = 8000) -> None:
        self.tools: dict[str, Tool] = {}
        self._max_chars = max_chars
        for tool in tools:
            self.add(tool)

    def add(self, tool: Tool) -> None:
        """Raises ValueError if the name is taken."""
        if tool.name in self.tools:
            raise ValueError(f"tool: two are named {tool.name}")
        self.tools[tool.name] = tool

    def system_text(self) -> str:
        """The content of the system message, in GLM-4's form."""
        if not self.tools:
            return IDENTITY
        sections = [f"## {tool.name}\n\n{tool.body()}" for tool in self.tools.values()]
        return "\n\n".join([IDENTITY, TOOLS_HEADING, *sections])

    def dispatch(self, call: Block) -> list[Observation]:
        """The answers to a call, at least one."""
        tool = self.tools.get(call.metadata)
        if tool is None:
            known = ", ".join(self.tools) or "none"
            return [Observation(f"unknown tool {call.metadata[:80]!r}; available: {known}", ERROR)]
        try:
            answers = tool.call(call.content)
        except ToolError as error:
            answers = [Observation(str(error), ERROR)]
        except (Exception, SystemExit) as error:
            answers = [Observation(f"{type(error).__name__}: {error}", ERROR)]
        return [
            Observation(shorten(a.content, self._max_chars) or "[no output]", a.metadata)
            for a in answers or [Observation("")]
        ]


def shorten(text: str, max_chars: int) -> str:
    """At most about max_chars: the beginning, a note, the end."""
    if len(text) <= max_chars:
        return text
    head, tail = max_chars * 2 // 3, max_chars - max_chars * 2 // 3
    left_out = len(text) - max_chars
    return f"{text[:head]}\n[{left_out} characters left out]\n{text[len(text) - tail :]}"


def strip_fence(text: str) -> str:
    """The inside of a Markdown code fence, if the whole text is one."""
    match = re.fullmatch(r"\s*```\w*\n(.*?)\n?```\s*", text, re.DOTALL)
    return match.group(1) if match else text


def function(
    fn: Callable | None = None, *, schema: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Decorator: mark a Python function as a tool for ``load_functions`` and ``FunctionTool``.

    ``schema`` is ``{"name", "description", "parameters": JSON schema}``. Without it transformers
    derives one from type hints and a docstring with an ``Args:`` section.
    """

    def mark(fn: Callable) -> Callable:
        fn.tool_schema = schema or _derived_schema(fn)
        return fn

    return mark if fn is None else mark(fn)


def _derived_schema(fn: Callable) -> dict[str, Any]:
    from transformers.utils import get_json_schema

    try:
        return get_json_schema(fn)["function"]
    except Exception as error:
        raise ValueError(f"{fn.__name__}: no schema given, and none derivable: {error}") from error


class FunctionTool:
    """A Python function that the model calls with a JSON object.

    It runs in this process, without a time limit: register only functions you trust with whatever
    arguments a model may invent.
    """

    def __init__(self, fn: Callable, schema: dict[str, Any] | None = None) -> None:
        self.fn = fn
        self.schema = schema or getattr(fn, "tool_schema", None) or _derived_schema(fn)
        for key in ("name", "description", "parameters"):
            if key not in self.schema:
                raise ValueError(f"schema: expected name, description and parameters, no {key}")
        self.name = self.schema["name"]

    def body(self) -> str:
        described = json.dumps(self.schema, ensure_ascii=False, indent=4)
        return f"{described}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"

    def call(self, argument: str) -> list[Observation]:
        text = strip_fence(argument).strip()
        try:
            arguments = json.loads(text) if text else {}
        except (ValueError, RecursionError) as error:
            raise ToolError(f"arguments of {self.name}: not JSON: {error}") from error
        check(arguments, self.schema["parameters"], f"arguments of {self.name}")
        value = self.fn(**arguments)
        if not isinstance(value, str):
            value = json.dumps(value, ensure_ascii=False, default=str)
        return [Observation(value)]


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def check(value: Any, schema: dict[str, Any], where: str) -> None:
    """Raise ToolError unless value is what a JSON schema asks for: types, enum, items, properties
    and required ones; other keywords are not looked at."""
    names = schema.get("type", "object" if "properties" in schema else [])
    names = [names] if isinstance(names, str) else list(names)
    if schema.get("nullable"):
        names.append("null")
    wanted = tuple(kind for name in names for kind in _TYPES.get(name, (object,)))
    stray_bool = isinstance(value, bool) and bool not in wanted and object not in wanted
    if wanted and (stray_bool or not isinstance(value, wanted)):
        got = next((name for name, kinds in _TYPES.items() if type(value) in kinds), "number")
        raise ToolError(f"{where}: expected {' or '.join(names)}, got {got}")
    if value is None:
        return
    if "enum" in schema and value not in schema["enum"]:
        raise ToolError(f"{where}: expected one of {schema['enum']}, got {value!r}")
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for i, item in enumerate(value):
            check(item, schema["items"], f"{where}[{i}]")
    if isinstance(value, dict) and "properties" in schema:
        missing = [name for name in schema.get("required", ()) if name not in value]
        if missing:
            raise ToolError(f"{where}: missing {', '.join(missing)}")
        for name, item in value.items():
            if name not in schema["properties"]:
                known = ", ".join(schema["properties"]) or "none"
                raise ToolError(f"{where}: unexpected {name!r}, expected of {known}")
            check(item, schema["properties"][name], f"{where}.{name}")


def load_functions(path: str | Path) -> list[FunctionTool]:
    """The functions of a Python file that carry ``@function``, in its order.

    The file is run. Raises OSError if it cannot be read, ValueError if nothing in it is marked.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    marked = [f for f in vars(module).values() if inspect.isfunction(f) and _own(f, module)]
    if not marked:
        raise ValueError(f"{path}: expected at least one function marked with @function")
    return [FunctionTool(f) for f in marked]


def _own(fn: Callable, module: Any) -> bool:
    return hasattr(fn, "tool_schema") and fn.__module__ == module.__name__
