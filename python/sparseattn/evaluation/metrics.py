"""The published scores of RULER, InfiniteBench and LongBench, each 0 to 1 for one output.

Written from the definitions in the benchmarks' own evaluation scripts (NVIDIA/RULER
``scripts/eval``, arXiv 2404.06654; OpenBMB/InfiniteBench ``src/compute_scores.py``, arXiv
2402.13718; THUDM/LongBench ``metrics.py`` and ``eval.py``, arXiv 2308.14508). Where one of ours
differs its docstring says how.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"\d+\.\d+|\d+")
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』"  # noqa: RUF001
    "【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ALL_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)
_LETTERS = "ABCD"


def score(metric: str, output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """The score of one output; ``classes`` are a classification task's.

    Raises ValueError for a metric that is not in METRICS, or no answers.
    """
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    if not answers:
        raise ValueError("answers: expected at least one, got none")
    return float(METRICS[metric](output, answers, classes))


# --- RULER ---------------------------------------------------------------------------------------


def exact_all(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Share of the answers that occur in the output, case ignored (RULER: string_match_all)."""
    return sum(answer.lower() in output.lower() for answer in answers) / len(answers)


def exact_any(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """1 if any answer occurs in the output, case ignored (RULER: string_match_part, for qa)."""
    return float(any(answer.lower() in output.lower() for answer in answers))


# --- words and overlap ---------------------------------------------------------------------------


def normalized(text: str) -> str:
    """Lower case, without punctuation and English articles, single spaces (SQuAD's rule)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _without_chinese_punctuation(text: str) -> str:
    return "".join(text.lower().translate(_ALL_PUNCTUATION).split())


def _overlap_f1(output: Sequence[str], answer: Sequence[str]) -> float:
    """F1 of two bags of words."""
    common = sum((Counter(output) & Counter(answer)).values())
    return 2 * common / (len(output) + len(answer)) if common else 0.0


def qa_f1(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """F1 of normalised words, the best over the answers (LongBench, InfiniteBench)."""
    words = normalized(output).split()
    return max(_overlap_f1(words, normalized(answer).split()) for answer in answers)


def qa_f1_characters(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """F1 of characters without punctuation (InfiniteBench, longbook_qa_chn)."""
    own = _without_chinese_punctuation(output)
    return max(_overlap_f1(own, _without_chinese_punctuation(answer)) for answer in answers)


def _chinese_words(text: str) -> list[str]:
    try:
        import jieba
    except ImportError as error:
        raise ImportError(
            "LongBench scores Chinese by words and needs jieba: pip install jieba"
        ) from error
    return list(jieba.cut(text, cut_all=False))


def qa_f1_chinese(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """F1 of jieba's words without punctuation (LongBench)."""

    def words(text: str) -> list[str]:
        return [word for word in map(_without_chinese_punctuation, _chinese_words(text)) if word]

    own = words(output)
    return max(_overlap_f1(own, words(answer)) for answer in answers)


# --- ROUGE ---------------------------------------------------------------------------------------


def _common_positions(a: Sequence[str], b: Sequence[str]) -> set[int]:
    """Positions in ``a`` of one longest common subsequence of a and b."""
    rows = [[0] * (len(b) + 1)]
    for word in a:
        last, row = rows[-1], [0]
        for j, other in enumerate(b):
            row.append(last[j] + 1 if word == other else max(last[j + 1], row[j]))
        rows.append(row)
    found, i, j = set(), len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            found.add(i)
        elif rows[i - 1][j] >= rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def _rouge_f1(common: int, output: int, answer: int) -> float:
    return 2 * common / (output + answer) if common else 0.0


def _rouge_l(output: Sequence[str], answer: Sequence[str]) -> float:
    return _rouge_f1(len(_common_positions(answer, output)), len(output), len(answer))


def rouge_l(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """F1 by the longest common subsequence of words (Lin 2004), the best over the answers.

    LongBench calls the package ``rouge``, which splits texts at full stops and counts distinct
    words of the sentences' unions; ours is the definition over the whole texts, in words as blanks
    part them. The two differ by a few points on summaries.
    """
    words = output.split()
    return max(_rouge_l(words, answer.split()) for answer in answers)


def rouge_l_chinese(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """rouge_l over jieba's words (LongBench)."""

    def words(text: str) -> list[str]:
        return " ".join(_chinese_words(text)).split()

    own = words(output)
    return max(_rouge_l(own, words(answer)) for answer in answers)


def rouge_lsum(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Summary-level ROUGE-L: lines are sentences, and of every sentence of the answer the union of
    its common subsequences with the output's counts (Lin 2004; InfiniteBench, longbook_sum_eng).

    Words are runs of letters a-z and digits in lower case, without stemming.
    """

    def sentences(text: str) -> list[list[str]]:
        return [re.findall(r"[a-z0-9]+", line) for line in text.lower().split("\n")]

    own, best = sentences(output), 0.0
    for answer in map(sentences, answers):
        left = Counter(word for sentence in own for word in sentence)
        common = 0
        for sentence in answer:
            union = set().union(*(_common_positions(sentence, other) for other in own))
            for position in sorted(union):  # a word of the output is used once
                if left[sentence[position]] > 0:
                    left[sentence[position]] -= 1
                    common += 1
        best = max(best, _rouge_f1(common, sum(map(len, own)), sum(map(len, answer))))
    return best


# --- LongBench -----------------------------------------------------------------------------------


def classification(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """1 / (classes named in the output) if the answer is one of them; names that are part of the
    answer's do not count (LongBench: trec, lsht; the published loop may leave one of several)."""

    def one(answer: str) -> float:
        named = [name for name in classes if name in output]
        named = [name for name in named if name == answer or name not in answer]
        return 1 / len(named) if answer in named else 0.0

    return max(map(one, answers))


def _share_of_numbers(output: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", output)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def count(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Share of the output's numbers that are the answer (LongBench: passage_count)."""
    return max(_share_of_numbers(output, answer) for answer in answers)


def retrieval(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Share of the output's numbers that are the answer's ("Paragraph 7", "段落7"; LongBench)."""
    wanted = [re.findall(r"(?:Paragraph |段落)(\d+)", answer) for answer in answers]
    if not all(wanted):
        raise ValueError(f'answers: expected "Paragraph N" or "段落N", got {answers[0]!r}')
    return max(_share_of_numbers(output, numbers[0]) for numbers in wanted)


def code_similarity(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """difflib's ratio, in whole hundredths, of the output's first line of code and the answer.

    The first line without a backquote, "#" or "//" (LongBench: lcc, repobench-p). fuzzywuzzy, which
    LongBench calls, does the same, unless python-Levenshtein is there to approximate it.
    """
    lines = output.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")

    def one(answer: str) -> float:
        if not line or not answer:
            return 0.0
        return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100

    return max(map(one, answers))


# --- InfiniteBench -------------------------------------------------------------------------------


def _words(output: str, marks: Iterable[str]) -> list[str]:
    for mark in marks:
        output = output.replace(mark, " ")
    return output.split()


_WORD_MARKS = ("\n", ":", '"', "'", ".", ",", "?", "!", "{", "}")


def first_integer(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """1 if the first run of digits is the answer (passkey, number_string)."""
    found = re.search("[0-9]+", output)
    return float(found is not None and found[0] in answers)


def word(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """1 if the answer is one of the output's words (kv_retrieval)."""
    words = _words(output, _WORD_MARKS)
    return float(any(answer in words for answer in answers))


def name(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """1 if the first answer, in capitals, is one of the output's words (longdialogue_qa_eng)."""
    return float(answers[0].upper() in _words(output.upper(), _WORD_MARKS))


def first_number(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """1 if the first number, whole or not, equals the answer (math_find)."""
    found = _NUMBER.search(output)
    return float(found is not None and float(found[0]) == float(answers[0]))


def last_integer(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """1 if the last word is an integer equal to the answer (code_run)."""
    words = _words(output, ("\n", ".", "`", "'", '"', ":"))
    return float(bool(words) and bool(re.fullmatch(r"[+-]?\d+", words[-1]))
                 and int(words[-1]) == int(answers[0]))  # fmt: skip


def running_values(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Share of the answers that the output's numbers repeat in order before the first wrong one
    (math_calc; signs do not count)."""
    numbers = [int(x) for x in re.findall("[0-9]+", output)]
    right = 0
    for got, wanted in zip(numbers, answers, strict=False):
        if got != int(wanted):
            break
        right += 1
    return right / len(answers)


def _after(output: str, prefixes: Sequence[str]) -> str | None:
    """What follows the first of the prefixes that occurs, and the blank after it; or None."""
    for prefix in prefixes:
        at = output.find(prefix)
        if at >= 0:
            return output[at + len(prefix) + 1 :]
    return None


def choice(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """``answers``: the option's text and its letter. The first character, else what follows
    "answer is:" and the like, else the first word that is a letter (longbook_choice_eng)."""
    if output[:1] and output[0] in _LETTERS:
        return float(output[0] in answers)
    words = _words(output, ("\n", '"', "'", ".", ",", "?", "!", "{", "}"))
    after = _after(" ".join(words), ("answer is:", "answer:", "answer is", "option is"))
    if after is not None:
        return float(any(after.startswith(answer) for answer in answers))
    letter = next((x for x in words if x in _LETTERS), None)
    return float(letter in answers)


def faulty_function(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """``answers``: the function's name and its letter. The output starts with "B." or "B:", or its
    name or letter follows "answer is:" and the like (code_debug)."""
    function, letter = answers
    if output[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    marks = ("\n", "`", "'", '"', "-", "*", "Option", "option")
    after = _after(" ".join(_words(output, marks)), ("answer is:", "is:", "answer:"))
    return float(after is not None and after.startswith((letter, function)))


METRICS: dict[str, Callable[[str, Sequence[str], Sequence[str]], float]] = {
    function.__name__: function
    for function in (
        exact_all,
        exact_any,
        qa_f1,
        qa_f1_characters,
        qa_f1_chinese,
        rouge_l,
        rouge_l_chinese,
        rouge_lsum,
        classification,
        count,
        retrieval,
        code_similarity,
        first_integer,
        word,
        name,
        first_number,
        last_integer,
        running_values,
        choice,
        faulty_function,
    )
}
