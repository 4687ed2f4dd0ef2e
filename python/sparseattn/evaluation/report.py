"""What is made of the record of an evaluation: tables as text and Markdown, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseattn.bench_tools import format_table

Cell = dict[str, Any]


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        table = format_table(rows, [(name, name, "") for name in self.columns])
        return "\n".join([self.title, table, *self.notes])

    def markdown(self) -> str:
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([f"### {self.title}", body, *self.notes])


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


def _of(cells: Sequence[Cell], **wanted: Any) -> list[Cell]:
    return [cell for cell in cells if all(cell.get(k) == v for k, v in wanted.items())]


def _distinct(cells: Sequence[Cell], key: str) -> list[Any]:
    return list(dict.fromkeys(cell[key] for cell in cells))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def _density(cells: Sequence[Cell]) -> str:
    return _percent(_mean([cell["density"] for cell in cells]) if cells else None)


def _against_dense(own: Sequence[Cell], dense: Sequence[Cell]) -> str:
    """ "better/worse": examples of the same cells with a higher and with a lower score."""
    place = lambda cell: (cell["task"], cell["length"], cell["source"])  # noqa: E731
    before = {place(cell): cell["examples"] for cell in dense}
    better = worse = 0
    for cell in own:
        for one, other in zip(cell["examples"], before.get(place(cell), ()), strict=False):
            better += one["score"] > other["score"]
            worse += one["score"] < other["score"]
    return f"{better}/{worse}"


def _decode(cells: Sequence[Cell]) -> str:
    shares = [cell["decode_share"] for cell in cells if cell.get("decode_share") is not None]
    return _percent(_mean(shares) if shares else None)


def _mib(cells: Sequence[Cell]) -> str:
    return f"{_mean([cell['cache_bytes'] for cell in cells]) / 2**20:.1f}" if cells else "-"


_FACTS = ("prefill keys, %", "decode keys, %", "cache, MiB")


def _score_table(
    title: str, cells: Sequence[Cell], column: str, name: Callable[[Any], str]
) -> Table:
    """Methods down, the values of ``column`` right; scores in per cent."""
    values = _distinct(cells, column)
    rows = []
    for method in _distinct(cells, "method"):
        own = _of(cells, method=method)
        scores = [[c["score"] for c in _of(own, **{column: value})] for value in values]
        row = [method, _density(own), _decode(own), _mib(own)]
        row += [_percent(_mean(found) if found else None) for found in scores]
        if len(values) > 1:
            row.append(_percent(_mean([c["score"] for c in own])))
        dense = _of(cells, method="dense")
        rows.append([*row, _against_dense(own, dense) if dense and method != "dense" else "-"])
    mean = ["mean"] if len(values) > 1 else []
    columns = ["method", *_FACTS, *map(name, values), *mean, "better/worse"]
    counts = [len(cell["examples"]) for cell in cells]
    error = 50 / min(counts) ** 0.5
    few, many = min(counts), max(counts)
    note = (
        f"Scores in per cent, {few if few == many else f'{few} to {many}'} examples a cell "
        f"(standard error at most {error:.1f}); better/worse: examples that score higher or "
        "lower than dense."
    )
    return Table(title, columns, rows, [note])


def _perplexity_tables(cells: Sequence[Cell]) -> list[Table]:
    if not cells:
        return []
    lengths = _distinct(cells, "length")
    rows = []
    for method in _distinct(cells, "method"):
        own = _of(cells, method=method)
        row = [method, _density(own), _decode(own)]
        for key in ("score", "decode_score"):
            for length in lengths:
                found = [c[key] for c in _of(own, length=length) if c[key] is not None]
                row.append(f"{found[0]:.4f}" if found else "-")
        rows.append(row)
    first = cells[0]
    more = [f"{_tokens(n)}, last {max(c['loss_tokens'] for c in cells)}" for n in lengths]
    few = [f"{_tokens(n)}, last {first['loss_steps']}" for n in lengths]
    columns = ["method", *_FACTS[:2], *more, *few]
    note = (
        "Perplexity of the last tokens of each window. ShadowKV reads them one by one after a "
        "prompt without them, the others in one forward."
    )
    return [Table("Perplexity", columns, rows, [note])]


def tables(data: dict[str, Any]) -> list[Table]:
    """The tables of a record."""
    cells, found = data["cells"], []
    needles = _of(cells, kind="niah")
    if needles:
        title = "Needle in a haystack: mean over depths"
        found.append(_score_table(title, needles, "length", _tokens))
    tasks = _of(cells, kind="task")
    for length in sorted(_distinct(tasks, "length")):
        own = _of(tasks, length=length)
        found.append(_score_table(f"Tasks at {_tokens(length)} tokens", own, "task", str))
    found += _perplexity_tables(_of(cells, kind="perplexity"))
    files = _of(cells, kind="file")
    for benchmark in dict.fromkeys(cell["task"].partition("/")[0] for cell in files):
        own = [cell for cell in files if cell["task"].startswith(f"{benchmark}/")]
        found.append(_score_table(benchmark, own, "task", lambda task: task.partition("/")[2]))
    return found


def heading(data: dict[str, Any]) -> str:
    """What was measured and how, in lines."""
    settings, machine = data["settings"], data["machines"][-1]
    shown = {key: value for key, value in settings.items() if value is not None}
    return (
        f"{settings['model']}, {settings['dtype']}, on {machine.get('gpu', machine['cpu'])}; "
        f"torch {machine['torch']}, transformers {machine['transformers']}, "
        f"sparseattn {machine['sparseattn']}, {machine['date']}\n"
        + ", ".join(
            f"{key} {value}" for key, value in shown.items() if key not in ("model", "dtype")
        )
    )


def text(data: dict[str, Any]) -> str:
    return "\n\n".join([heading(data), *(table.text() for table in tables(data))])


def markdown(data: dict[str, Any], pictures: Sequence[Path] = ()) -> str:
    parts = ["## Accuracy", heading(data), *(table.markdown() for table in tables(data))]
    parts += [f"![{path.stem}]({path.name})" for path in pictures]
    return "\n\n".join(parts) + "\n"


# --- pictures ------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def heat_map(cells: Sequence[Cell], model: str, path: Path) -> None:
    """A method's needle grid: lengths right, depths down, the mean score as colour and number."""
    import numpy

    cells = sorted(cells, key=lambda cell: cell["length"])
    depths = sorted({row["depth"] for cell in cells for row in cell["examples"]})
    grid = numpy.full((len(depths), len(cells)), numpy.nan)
    for column, cell in enumerate(cells):
        for line, depth in enumerate(depths):
            found = [row["score"] for row in cell["examples"] if row["depth"] == depth]
            if found:
                grid[line, column] = _mean(found)
    figure = _figure(2.6 + 0.75 * len(cells), 1.9 + 0.36 * len(depths))
    axis = figure.subplots()
    image = axis.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(cells)), [_tokens(cell["length"]) for cell in cells])
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set_xlabel("tokens")
    axis.set_ylabel("depth of the needle")
    for line, column in numpy.ndindex(*grid.shape):
        if not numpy.isnan(grid[line, column]):
            axis.text(
                column, line, f"{grid[line, column]:.2g}", ha="center", va="center", fontsize=7
            )
    figure.colorbar(image, ax=axis, label="share found")
    mean = _mean([cell["score"] for cell in cells])
    axis.set_title(
        f"{cells[0]['method']}: {mean:.1%} found\nprefill keys {_density(cells)} %, decode keys "
        f"{_decode(cells)} %\n{model}",
        fontsize=8,
    )
    figure.savefig(path, dpi=130)


def perplexity_picture(cells: Sequence[Cell], model: str, path: Path) -> None:
    """Perplexity of the tokens that all methods have, against the length."""
    figure = _figure(7, 4.2)
    axis = figure.subplots()
    lengths = sorted(_distinct(cells, "length"))
    for method in _distinct(cells, "method"):
        own = sorted(_of(cells, method=method), key=lambda cell: cell["length"])
        points = [(cell["length"], cell["decode_score"]) for cell in own]
        style = "o--" if "shadowkv" in method else "o-"
        axis.plot(*zip(*points, strict=True), style, label=method)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [_tokens(length) for length in lengths])
    axis.set_xlabel("tokens")
    axis.set_ylabel(f"perplexity of the last {cells[0]['loss_steps']} tokens")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title(model, fontsize=9)
    figure.savefig(path, dpi=130)


def save(data: dict[str, Any], folder: Path) -> list[Path]:
    """Writes eval.md and the pictures; returns their paths. Pictures need matplotlib."""
    cells, model, pictures = data["cells"], str(data["settings"]["model"]), []
    needles = _of(cells, kind="niah")
    for method in _distinct(needles, "method"):
        path = folder / f"niah-{method.replace('+', '-')}.png"
        heat_map(_of(needles, method=method), model, path)
        pictures.append(path)
    losses = _of(cells, kind="perplexity")
    if losses:
        pictures.append(folder / "perplexity.png")
        perplexity_picture(losses, model, pictures[-1])
    page = folder / "eval.md"
    page.write_text(markdown(data, pictures), encoding="utf-8")
    return [page, *pictures]
