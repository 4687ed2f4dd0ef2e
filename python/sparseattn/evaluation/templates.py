"""Tasks of InfiniteBench and LongBench: prompt, length of the answer, metric.

The prompts are in our own words. Each asks for what the published one asks for, in the form that
the metric reads, and ends where a model that only continues text would begin the answer. Lengths
and metrics are the published ones.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """``prompt`` has fields of the file's rows; ``plain``: never put into a chat template."""

    prompt: str
    max_new_tokens: int
    metric: str
    plain: bool = False


_OPTIONS = "A. {a}\nB. {b}\nC. {c}\nD. {d}\n\n"

INFINITEBENCH = {
    "passkey": Template(
        "Somewhere in the long text below one fact is hidden that matters; all else is filler. "
        "Keep it in mind, you will be asked for it.\n\n{context}\n\n{input}\n\nThe pass key is",
        6,
        "first_integer",
    ),
    "number_string": Template(
        "Somewhere in the long text below one fact is hidden that matters; all else is filler. "
        "You will be asked for it.\n\n{context}\n\n{input}\n\nThe sequence of digits is",
        12,
        "first_integer",
    ),
    "kv_retrieval": Template(
        "The JSON object below maps keys to values. Give the value of the key that is asked for at "
        "its end.\n\n{context}\n\n{input}",
        50,
        "word",
    ),
    "longbook_sum_eng": Template(
        "Read this book and summarise it.\n\n{context}\n\nSummary of the book:", 1200, "rouge_lsum"
    ),
    "longbook_choice_eng": Template(
        "Read this book and answer the question after it.\n\n{context}\n\nQuestion: {input}\n\n"
        "One of four answers is right:\n" + _OPTIONS + "The letter of the right answer is",
        40,
        "choice",
    ),
    "longbook_qa_eng": Template(
        "Read this book and answer the question after it in as few words as you can.\n\n"
        "{context}\n\nQuestion: {input}\nAnswer:",
        40,
        "qa_f1",
    ),
    "longbook_qa_chn": Template(
        "请阅读下面这本书，然后尽可能简短地回答书后的问题。\n\n{context}\n\n问题：{input}\n答案：",  # noqa: RUF001
        40,
        "qa_f1_characters",
    ),
    "longdialogue_qa_eng": Template(
        "In the script below one character's name has been replaced by $$MASK$$ in one place. Work "
        "out whose name it is.\n\n{context}\n\nThe name behind $$MASK$$ is most likely",
        40,
        "name",
    ),
    "math_find": Template(
        "Which is {target} in the following list?\n\n{context}\n\n{input}", 3, "first_number"
    ),
    "math_calc": Template(
        "Each list holds the values of an expression after every operation.\n\n"
        "Expression: 2 + 5 - 1\nValues: [2, 7, 6]\n\nExpression: 9 - 4 + 3 - 6\n"
        "Values: [9, 5, 8, 2]\n\nExpression: {context}\nValues:",
        30000,
        "running_values",
    ),
    "code_run": Template(
        "Work out what a call of one of these Python functions returns.\n\n{context}\n\n{input}\n\n"
        "The returned value is",
        5,
        "last_integer",
    ),
    "code_debug": Template(
        "In the Python code below exactly one function has been given an error on purpose, which "
        "makes it fail.\n\n{context}\n\nIt is one of these:\n" + _OPTIONS + "The faulty one is:",
        5,
        "faulty_function",
    ),
}

_PASSAGES = (
    "Use the passages below to answer the question after them. Give nothing but the answer.\n\n"
    "{context}\n\nGive nothing but the answer to this question.\n\nQuestion: {input}\nAnswer:"
)
_CODE = "Continue this code with its next line.\n"

LONGBENCH = {
    "narrativeqa": Template(
        "Read this story, a novel or a film script, then answer the question in a single phrase if "
        "you can and without explanation.\n\nStory: {context}\n\nQuestion: {input}\n\nAnswer in a "
        "single phrase if you can, without explanation:",
        128,
        "qa_f1",
    ),
    "qasper": Template(
        "Read this scientific article, then answer the question in a phrase or a sentence, without "
        'explanation; "yes" or "no" where that is the question, "unanswerable" where the article '
        "does not tell.\n\nArticle: {context}\n\nQuestion: {input}\n\nAnswer (a phrase or "
        'sentence, "yes", "no" or "unanswerable"):',
        128,
        "qa_f1",
    ),
    "multifieldqa_en": Template(
        "Read this text, then give a short answer to the question.\n\n{context}\n\nGive nothing "
        "but the answer.\n\nQuestion: {input}\nAnswer:",
        64,
        "qa_f1",
    ),
    "multifieldqa_zh": Template(
        "请阅读下面的文字，然后用中文简短地回答问题。\n\n{context}\n\n"  # noqa: RUF001
        "只给出答案，不要写别的内容。\n\n问题：{input}\n答案：",  # noqa: RUF001
        64,
        "qa_f1_chinese",
    ),
    "hotpotqa": Template(_PASSAGES, 32, "qa_f1"),
    "2wikimqa": Template(_PASSAGES, 32, "qa_f1"),
    "musique": Template(_PASSAGES, 32, "qa_f1"),
    "dureader": Template(
        "请根据下面的文章回答文章后的问题。\n\n文章：{context}\n\n问题：{input}\n答案：",  # noqa: RUF001
        128,
        "rouge_l_chinese",
    ),
    "gov_report": Template(
        "Summarise this report of a government agency on one page.\n\nReport:\n{context}\n\n"
        "Summary of the report, one page:",
        512,
        "rouge_l",
    ),
    "qmsum": Template(
        "Read the transcript of a meeting, then answer the query in one or more sentences.\n\n"
        "Transcript:\n{context}\n\nQuery: {input}\nAnswer:",
        512,
        "rouge_l",
    ),
    "multi_news": Template(
        "Summarise these news articles together on one page.\n\nNews:\n{context}\n\nSummary of all "
        "the news, one page:",
        512,
        "rouge_l",
    ),
    "vcsum": Template(
        "请阅读下面的会议记录，并总结会议内容。\n\n会议记录：\n{context}\n\n总结：",  # noqa: RUF001
        512,
        "rouge_l_chinese",
    ),
    "trec": Template(
        "Name the type of the last question, as in the examples.\n\n{context}\n{input}",
        64,
        "classification",
        plain=True,
    ),
    "triviaqa": Template(
        "Answer the last question from its passage, as in the examples, with the answer alone.\n\n"
        "{context}\n\n{input}",
        32,
        "qa_f1",
        plain=True,
    ),
    "samsum": Template(
        "Summarise the last dialogue in a few short sentences, as in the examples.\n\n{context}\n\n"
        "{input}",
        128,
        "rouge_l",
        plain=True,
    ),
    "lsht": Template(
        "请像示例那样判断最后一则新闻的类别。\n\n{context}\n{input}",
        64,
        "classification",
        plain=True,
    ),
    "passage_count": Template(
        "Some of the paragraphs below occur more than once. Count the different ones.\n\n"
        "{context}\n\nGive the number alone, such as 5.\n\nThe number of different paragraphs is ",
        32,
        "count",
    ),
    "passage_retrieval_en": Template(
        "Below are 30 paragraphs and an abstract of one of them. Find that paragraph.\n\n"
        '{context}\n\nThe abstract:\n\n{input}\n\nAnswer in the form "Paragraph 1", '
        '"Paragraph 2".\n\nThe abstract is of',
        32,
        "retrieval",
    ),
    "passage_retrieval_zh": Template(
        "下面是若干段落，以及其中一个段落的摘要。请找出该段落。\n\n{context}\n\n摘要：\n\n"  # noqa: RUF001
        "{input}\n\n请按“段落1”“段落2”的格式回答。\n\n答案：",  # noqa: RUF001
        32,
        "retrieval",
    ),
    "lcc": Template(_CODE + "{context}Next line:\n", 64, "code_similarity", plain=True),
    "repobench-p": Template(
        _CODE + "{context}{input}Next line:\n", 64, "code_similarity", plain=True
    ),
}

#: Start of a RULER task's name -> (length of the answer, metric); arXiv 2404.06654.
RULER = {
    "niah": (128, "exact_all"),
    "vt": (30, "exact_all"),
    "cwe": (120, "exact_all"),
    "fwe": (50, "exact_all"),
    "qa": (32, "exact_any"),
}
#: LongBench tasks of whose output only the first line is scored.
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
