"""Training batches, made on the device: text with needles and questions pasted over it.

A sequence is the opening of a prompt, text, pieces (definitions and questions with their answers)
at random places, and one question at the very end, as ``sparseattn.evaluation.tasks`` asks it.
Nothing is kept between steps: a batch depends on (seed, step, sizes) only.

``kinds`` says of each label what it is: IGNORED (random by nature: numbers, list entries), TEXT,
or an answer: ANSWER + the index of its family in FAMILIES.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from needle_package import tasks, words

IGNORED, TEXT, ANSWER = 0, 1, 2
FAMILIES = ("lookup", "all_values", "many", "chain", "common", "pairs")
SPARE = 8  # tokens between two pieces, at least on average


@dataclass(frozen=True)
class Template:
    """Tokens of a format, and where its words and numbers go."""

    ids: torch.Tensor  # int64 [L]
    slots: torch.Tensor  # int64, positions in the order of the slots; a number takes two

    def fill(self, *parts: torch.Tensor) -> torch.Tensor:
        """``parts`` [..., n] of tokens, together one per slot -> int64 [..., L]."""
        values = torch.cat(parts, dim=-1)
        return self.ids.expand(*values.shape[:-1], -1).index_copy(-1, self.slots, values)


class Source:
    """Makes batches. ``text``: int64 [n] tokens, on the device that batches are made on."""

    def __init__(self, tokenizer: Any, text: torch.Tensor, seed: int) -> None:
        self.tokens = tasks._Tokens(tokenizer)
        self.device, self.text, self.seed = text.device, text, seed
        self.words = self._ids([self._one(" " + word) for word in words.WORDS])
        self.triples = self._ids([self._one(f"{n:03d}") for n in range(1000)])
        self.newline, self.comma = self._one("\n"), self._one(",")
        self.equals, self.more = self._one("="), self._one(">")
        w = [f"{word}" for word in words.WORDS[:5]]
        many = w[: tasks.QUERIES]
        form = tasks.FORMATS
        self.needle = self._template(form["needle"], f" {w[0]}", "482913", key=w[0], value="482913")
        self.link_first = self._template(
            form["link_first"], "482913", f" {w[0]}", key=w[0], value="482913"
        )
        self.link = self._template(form["link"], f" {w[1]}", f" {w[0]}", key=w[0], source=w[1])
        self.ask = self._template(form["ask"], f" {w[0]}", f" {w[0]}", key=w[0])
        self.ask_all = self._template(form["ask_all"], f" {w[0]}", f" {w[0]}", key=w[0])
        self.ask_many = self._template(
            form["ask_many"], *(f" {k}" for k in many), f" {w[0]}", keys=" ".join(many), key=w[0]
        )
        self.ask_chain = self._template(form["ask_chain"], "482913", "482913", value="482913")
        self.ask_words = self._template(form["ask_words"])
        self.openings = {
            name: self._ids(self.tokens.prefix + self.tokens(form[name]))
            for name in ("open_niah", "open_chain", "open_words")
        }

    def make(
        self, step: int, rows: int, length: int, mixture: tuple[float, ...], crowded: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids int64 [rows, length + 1], kinds int64 [rows, length] of the labels ids[:, 1:]).

        ``mixture``: weights of FAMILIES, drawn from for every row. ``crowded``: as many pieces as
        fit or half of them; otherwise anything from one to that.
        """
        self._host = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        self._draw = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + step)
        weights = torch.tensor(mixture, dtype=torch.float64)
        family = torch.multinomial(weights, rows, replacement=True, generator=self._host)
        ids, kinds = [], []
        for f, name in enumerate(FAMILIES):
            count = int((family == f).sum())
            if not count:
                continue
            canvas = _Canvas(self, count, length + 1, ANSWER + f)
            getattr(self, f"_{name}")(canvas, crowded)
            ids.append(canvas.ids[:, : length + 1])
            kinds.append(canvas.kinds[:, 1 : length + 1])
        return torch.cat(ids), torch.cat(kinds)

    # families: each pastes its pieces into a canvas

    def _lookup(self, canvas: _Canvas, crowded: bool) -> None:
        self._grouped(canvas, crowded, "open_niah", size=1)

    def _all_values(self, canvas: _Canvas, crowded: bool) -> None:
        self._grouped(canvas, crowded, "open_niah", size=tasks.VALUES)

    def _chain(self, canvas: _Canvas, crowded: bool) -> None:
        self._grouped(canvas, crowded, "open_chain", size=tasks.HOPS)

    def _grouped(self, canvas: _Canvas, crowded: bool, opening: str, size: int) -> None:
        """Groups of ``size`` definitions in order: numbers of one key, or links of one chain. A
        question lists what of a group has come so far."""
        rows = canvas.rows
        chain = opening == "open_chain"
        final = self._answer_length(size, chain)
        head = len(self.openings[opening])
        longest = max(final, len(self.needle.ids), len(self.link_first.ids))
        fit = canvas.slots(longest, head, final)
        most = min(fit, 2 * len(self.words) // (size if chain else 1))
        each = size + min(size, 2)  # pieces of a group, two questions among them: few, or the
        pieces = self._count(each, most, crowded)  # answers would be copied from each other
        groups = max(1, min(pieces // each, len(self.words) // (size if chain else 1)))
        definitions = groups * size
        questions = max(0, min(groups * each, fit) - definitions)
        if definitions + questions > fit:
            raise ValueError(f"length: {canvas.length - 1} tokens hold no {size} definitions")
        # keys and values of the groups
        if chain:
            names = self.words[self._rank(rows, len(self.words))[:, : groups * size]]
            names = names.view(rows, groups, size)  # the variables
            starts = self._numbers(rows, groups)
        else:
            keys = self.words[self._rank(rows, len(self.words))[:, :groups]][..., None]
            values = self._numbers(rows, groups, size)
        # order of the definitions, in their group's order: place[b, g, r]
        order = self._rand(rows, groups, size).sort(-1).values.view(rows, -1).argsort(-1)
        place = order.argsort(-1).view(rows, groups, size)
        group_of = order // size
        # which of the pieces are questions: never the first
        total = definitions + questions
        score = self._rand(rows, total)
        score[:, 0] = -1
        ranks = score.argsort(-1).argsort(-1)
        is_question = ranks >= definitions
        seen = (~is_question).cumsum(-1)  # definitions up to each piece
        starts_at = canvas.places(total, longest, head, final)
        split = is_question.byte().argsort(dim=-1, stable=True)  # definitions, then questions
        seen, starts_at = seen.gather(1, split), starts_at.gather(1, split)
        where = starts_at[:, :definitions]
        at = where.gather(1, place.flatten(1)).view(rows, groups, size)
        if chain:
            first = self.link_first.fill(starts, names[:, :, :1])
            canvas.paste(at[:, :, 0], first, IGNORED)
            if size > 1:
                later = self.link.fill(names[:, :, :-1, None], names[:, :, 1:, None])
                canvas.paste(at[:, :, 1:].flatten(1), later.flatten(1, 2), IGNORED)
        else:
            pieces_ids = self.needle.fill(keys[:, :, None].expand(-1, -1, size, -1), values)
            canvas.paste(at.flatten(1), pieces_ids.flatten(1, 2), IGNORED)
        # questions, and the one at the end, which knows all definitions
        known = torch.cat((seen[:, definitions:], seen.new_full((rows, 1), definitions)), 1)
        chosen = (self._rand(rows, questions + 1) * known).long()
        asked = group_of.gather(1, chosen)  # [b, questions + 1]
        back = asked[..., None].expand(-1, -1, size)
        count = (place.gather(1, back) < known[..., None]).sum(-1)
        if chain:
            ask, answer = self.ask_chain, self._chain_answer(names.gather(1, back))
            start = starts.gather(1, asked[..., None].expand(-1, -1, 2))
            question = ask.fill(start, start)
        else:
            ask = self.ask if size == 1 else self.ask_all
            asked_values = values.gather(1, back[..., None].expand(-1, -1, -1, 2))
            answer = self._values_answer(asked_values)
            key = keys.gather(1, asked[..., None])
            question = ask.fill(key, key)
        step = answer.shape[-1] // size  # tokens per entry, its separator included
        kept = torch.arange(answer.shape[-1], device=self.device) < (count * step)[..., None]
        last = torch.arange(answer.shape[-1], device=self.device) == (count * step - 1)[..., None]
        answer = torch.where(last, self.newline, answer)
        places = torch.cat(
            (
                starts_at[:, definitions:],
                starts_at.new_full((rows, 1), canvas.length - final),
            ),
            1,
        )
        canvas.open(self.openings[opening])
        canvas.paste(places, question, IGNORED)
        canvas.paste(places + question.shape[-1], answer, canvas.answer, kept)

    def _many(self, canvas: _Canvas, crowded: bool) -> None:
        """Questions for the numbers of several keys at once."""
        rows, queries = canvas.rows, tasks.QUERIES
        head = len(self.openings["open_niah"])
        final = len(self.ask_many.ids) + 4 * queries - 1
        fit = canvas.slots(final, head, final)
        pieces = self._count(2 * queries, min(fit, 128), crowded)
        definitions = max(queries, min(pieces // 2, fit))
        questions = max(0, min(pieces, fit) - definitions)
        total = definitions + questions
        keys = self.words[self._rank(rows, len(self.words))[:, :definitions]]
        values = self._numbers(rows, definitions)
        score = self._rand(rows, total)
        score[:, :queries] = -1
        is_question = score.argsort(-1).argsort(-1) >= definitions
        seen = (~is_question).cumsum(-1)
        starts_at = canvas.places(total, final, head, final)
        split = is_question.byte().argsort(dim=-1, stable=True)
        seen, starts_at = seen.gather(1, split), starts_at.gather(1, split)
        where = starts_at[:, :definitions]
        canvas.paste(where, self.needle.fill(keys[..., None], values), IGNORED)
        known = torch.cat((seen[:, definitions:], seen.new_full((rows, 1), definitions)), 1)
        score = self._rand(rows, questions + 1, definitions)
        score.masked_fill_(torch.arange(definitions, device=self.device) >= known[..., None], -1)
        chosen = score.topk(queries, -1).indices  # [b, n, queries]
        flat = chosen.flatten(1)
        asked = keys.gather(1, flat).view(chosen.shape)
        numbers = values.gather(1, flat[..., None].expand(-1, -1, 2)).view(*chosen.shape, 2)
        question = self.ask_many.fill(asked, asked[..., :1])
        # "482913 stone=591823 ... \n"
        entry = torch.stack(
            (
                numbers[..., 0],
                numbers[..., 1],
                torch.cat((asked[..., 1:], asked.new_full(asked[..., :1].shape, self.newline)), -1),
                asked.new_full(asked.shape, self.equals),
            ),
            -1,
        )
        answer = entry.flatten(2)[..., :-1]
        places = torch.cat(
            (
                starts_at[:, definitions:],
                starts_at.new_full((rows, 1), canvas.length - final),
            ),
            1,
        )
        canvas.open(self.openings["open_niah"])
        canvas.paste(places, question, IGNORED)
        canvas.paste(places + question.shape[-1], answer, canvas.answer)

    def _common(self, canvas: _Canvas, crowded: bool) -> None:
        """A list of words instead of text; the common ones, most common first."""
        rows, common = canvas.rows, tasks.COMMON
        head = self.openings["open_words"]
        final = len(self.ask_words.ids) + common + 1
        room = canvas.length - len(head) - final
        drawn = self.words[self._rank(rows, len(self.words))[:, : common + tasks.RARE]]
        kind = self._rank(rows, room)
        index = common + kind % tasks.RARE
        upto = 0
        for i, share in enumerate(tasks.SHARES):
            index = torch.where((kind >= upto) & (kind < upto + int(share * room)), i, index)
            upto += int(share * room)
        canvas.open(head)
        canvas.fill(len(head), drawn.gather(1, index), IGNORED)
        canvas.fill(canvas.length - final, self.ask_words.ids.expand(rows, -1), IGNORED)
        answer = torch.cat((drawn[:, :common], drawn.new_full((rows, 1), self.newline)), 1)
        canvas.fill(canvas.length - common - 1, answer, canvas.answer)

    def _pairs(self, canvas: _Canvas, crowded: bool) -> None:
        """No text: keys with their numbers over and over. Nearly half of all labels are recalls,
        and the lookup by key is learned from these first."""
        rows, head = canvas.rows, self.openings["open_niah"]
        keys = self._count(2, 64, False)
        names = self.words[self._rank(rows, len(self.words))[:, :keys]]
        values = self._numbers(rows, keys)
        entries = (canvas.length - len(head)) // 4
        which = (self._rand(rows, entries) * keys).long()
        times = F.one_hot(which, keys).cumsum(1).gather(2, which[..., None])
        name = names.gather(1, which)
        number = values.gather(1, which[..., None].expand(-1, -1, 2))
        ids = torch.stack((name, torch.full_like(name, self.equals), *number.unbind(-1)), -1)
        answers = torch.where(times > 1, canvas.answer, IGNORED)
        kinds = torch.cat((torch.full_like(ids[..., :2], IGNORED), answers.expand(-1, -1, 2)), -1)
        canvas.fill(0, ids.new_zeros(1, 1).expand(rows, canvas.length), IGNORED)
        canvas.open(head)
        canvas.fill(len(head), ids.flatten(1), IGNORED)
        canvas.kinds[:, len(head) : len(head) + 4 * entries] = kinds.flatten(1)

    # small things

    def _answer_length(self, size: int, chain: bool) -> int:
        if chain:
            return len(self.ask_chain.ids) + 2 * size
        return len((self.ask if size == 1 else self.ask_all).ids) + 3 * size

    def _chain_answer(self, names: torch.Tensor) -> torch.Tensor:
        """[b, n, size] words -> " river> stone>" and so on; the last separator is a line break."""
        return torch.stack((names, torch.full_like(names, self.more)), -1).flatten(2)

    def _values_answer(self, values: torch.Tensor) -> torch.Tensor:
        """[b, n, size, 2] -> "482913,591823," and so on."""
        comma = values.new_full((*values.shape[:-1], 1), self.comma)
        return torch.cat((values, comma), -1).flatten(2)

    def _count(self, least: int, most: int, crowded: bool) -> int:
        """Crowded: the upper half of the range; else log-uniform in it."""
        most = max(least, most)
        u = float(torch.rand((), generator=self._host))
        if crowded:
            return max(least, round(most * (0.5 + u / 2)))
        return round(least * (most / least) ** u)

    def _numbers(self, *shape: int) -> torch.Tensor:
        """int64 [*shape, 2]: the two tokens of numbers of six digits, the first not zero."""
        high = 100 + (self._rand(*shape) * 900).long()
        low = (self._rand(*shape) * 1000).long()
        return self.triples[torch.stack((high, low), -1)]

    def _rand(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self._draw, device=self.device)

    def _rank(self, rows: int, count: int) -> torch.Tensor:
        """[rows, count]: random permutations."""
        return self._rand(rows, count).argsort(-1)

    def _ids(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.device)

    def _one(self, text: str) -> int:
        (token,) = self.tokens(text)
        return token

    def _template(self, form: str, *slots: str, **values: str) -> Template:
        """The tokens of ``form.format(**values)``; ``slots``: its words and numbers in order."""
        ids = self.tokens(form.format(**values))
        found: list[int] = []
        start = 0
        for slot in slots:
            for token in self.tokens(slot):
                start = ids.index(token, start) + 1
                found.append(start - 1)
        return Template(self._ids(ids), self._ids(found))


class _Canvas:
    """Rows of text to paste on: ``ids`` and ``kinds`` [rows, length + a margin nobody sees]."""

    def __init__(self, source: Source, rows: int, length: int, answer: int) -> None:
        self.source, self.rows, self.length, self.answer = source, rows, length, answer
        self.margin = 64
        width = length + self.margin
        start = (source._rand(rows, 1) * (len(source.text) - width)).long()
        self.ids = source.text[start + torch.arange(width, device=source.device)]
        self.kinds = torch.full_like(self.ids, TEXT)

    def slots(self, longest: int, head: int, final: int) -> int:
        """How many pieces of ``longest`` tokens fit, each with room to move."""
        return (self.length - head - final) // (longest + SPARE)

    def places(self, count: int, longest: int, head: int, final: int) -> torch.Tensor:
        """int64 [rows, count], ascending: starts of pieces that don't touch."""
        fit = self.slots(longest, head, final)
        if count > fit:
            raise ValueError(f"length: {self.length - 1} tokens are too few for {count} pieces")
        slot = self.source._rand(self.rows, fit).argsort(-1)[:, :count].sort(-1).values
        size = (self.length - head - final) // fit
        jitter = (self.source._rand(self.rows, count) * (size - longest + 1)).long()
        return head + slot * size + jitter

    def open(self, ids: torch.Tensor) -> None:
        self.fill(0, ids.expand(self.rows, -1), IGNORED)

    def fill(self, start: int, ids: torch.Tensor, kind: int) -> None:
        self.ids[:, start : start + ids.shape[1]] = ids
        self.kinds[:, start : start + ids.shape[1]] = kind

    def paste(
        self, at: torch.Tensor, ids: torch.Tensor, kind: int, kept: torch.Tensor | None = None
    ) -> None:
        """``at`` [rows, n], ``ids`` [rows, n, L]; where ``kept`` [rows, n, L] is false, the text
        stays."""
        index = at[..., None] + torch.arange(ids.shape[-1], device=at.device)
        if kept is not None:
            index = torch.where(kept, index, self.length + self.margin - 1)
        self.ids.scatter_(1, index.flatten(1), ids.flatten(1))
        self.kinds.scatter_(1, index.flatten(1), torch.full_like(index.flatten(1), kind))
