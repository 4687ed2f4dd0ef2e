"""The All Tools loop: generate, answer the calls, generate again, at most ten times a question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glm4_tools.chat import ChatFormat, document_text
from glm4_tools.session import ContextFull
from glm4_tools.tools import ERROR, Observation, Toolbox

MAX_ROUNDS = 10


@dataclass(frozen=True)
class Answer:
    """The text of the last turn, and why it ended.

    ``stopped`` is ``answer`` (the model was finished), ``rounds`` (it still wanted a tool in its
    last round), ``length`` (cut after max_new_tokens) or ``context`` (the model's context is full).
    """

    text: str
    rounds: int
    stopped: str


class Agent:
    """Questions about one document, with tools, on one session.

    Args:
        session: a ``Session``, or what has its ``append``, ``prefill`` and ``generate``.
        chat: the model's ``ChatFormat``.
        toolbox: the tools.
        max_rounds: how often the model is asked to go on for one question.
        max_new_tokens: for each round.
        report: called with (kind, text) as things happen; kinds are ``text`` (said before a call),
            ``call``, ``observation`` and ``answer``.
    """

    def __init__(
        self,
        session: Any,
        chat: ChatFormat,
        toolbox: Toolbox,
        *,
        max_rounds: int = MAX_ROUNDS,
        max_new_tokens: int = 1024,
        report: Callable[[str, str], None] = lambda kind, text: None,
    ) -> None:
        if max_rounds < 1 or max_new_tokens < 1:
            raise ValueError(
                "expected max_rounds and max_new_tokens of at least 1, "
                f"got {max_rounds} and {max_new_tokens}"
            )
        self.session, self.chat, self.toolbox = session, chat, toolbox
        self.max_rounds, self.max_new_tokens = max_rounds, max_new_tokens
        self.report = report
        self._started = False  # something follows the system message
        self._opened = False  # it is the document, and its message waits for the question
        session.append([*chat.prefix, *chat.message("system", toolbox.system_text())])

    def read(self, name: str, text: str) -> None:
        """Prefill the document, as the beginning of the user's first message.

        Raises ContextFull if it does not fit, ValueError after the first question.
        """
        if self._started:
            raise ValueError("read: expected one document, before the first question")
        self.session.append(self.chat.message("user", document_text(name, text)))
        self._started = self._opened = True
        self.session.prefill()

    def ask(self, question: str) -> Answer:
        """Append the question and run the loop to its end."""
        rounds, text = 0, ""
        try:
            if self._opened:
                self.session.append(self.chat.text(question))
            else:
                self.session.append(self.chat.message("user", question))
            self._started, self._opened = True, False
            while True:
                rounds += 1
                self.session.append([self.chat.assistant])
                ids, stop = self.session.generate(self.chat.stops, self.max_new_tokens)
                turn = self.chat.parse(ids, stop)
                text = turn.text
                if turn.stop != "<|observation|>":
                    self.report("answer", text)
                    return Answer(text, rounds, self._why(turn.stop, len(ids)))
                if text:
                    self.report("text", text)
                last = rounds == self.max_rounds
                for answer in self._refuse() if last else self._answer(turn.calls):
                    self.report("observation", answer.content)
                    self.session.append(
                        self.chat.message("observation", answer.content, answer.metadata)
                    )
                if last:
                    return Answer(text, rounds, "rounds")
        except ContextFull:
            return Answer(text, rounds, "context")

    def _why(self, stop: str | None, length: int) -> str:
        if stop is not None:
            return "answer"
        return "length" if length >= self.max_new_tokens else "context"

    def _answer(self, calls: Any) -> list[Observation]:
        if not calls:
            return [Observation("expected a tool's name in the first line of the call", ERROR)]
        answers = []
        for call in calls:
            self.report("call", f"{call.metadata}\n{call.content}")
            answers += self.toolbox.dispatch(call)
        return answers

    def _refuse(self) -> list[Observation]:
        return [Observation(f"not run: the limit of {self.max_rounds} rounds is reached", ERROR)]
