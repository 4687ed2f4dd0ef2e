"""The parts of examples/all_tools.py: GLM-4's All Tools over one long document."""

from glm4_tools.agent import Agent, Answer
from glm4_tools.chat import ChatFormat, Turn
from glm4_tools.interpreter import Interpreter, PythonTool
from glm4_tools.search import BrowserTool, LocalSearch
from glm4_tools.session import ContextFull, Session, sampler
from glm4_tools.tools import FunctionTool, Observation, Toolbox, ToolError, function

__all__ = [
    "Agent",
    "Answer",
    "BrowserTool",
    "ChatFormat",
    "ContextFull",
    "FunctionTool",
    "Interpreter",
    "LocalSearch",
    "Observation",
    "PythonTool",
    "Session",
    "ToolError",
    "Toolbox",
    "Turn",
    "function",
    "sampler",
]
