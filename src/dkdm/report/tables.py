"""A comparison as a table: in a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import ceil

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from dkdm.report.side_by_side import Line, Table
from dkdm.shipping.markdown import one_line, plain

LABELS, COLUMN = 34, 11  # characters of the terminal: what stands before the columns, and of each


def print_comparison(table: Table, console: Console) -> None:
    """Print the numbers with their circumstances, then what differs between the runs.

    Columns that do not fit beside each other come in blocks, one below the other.
    """
    blocks = _blocks(len(table.names), console.width)
    for columns in blocks:
        grid = _grid(["", "under", *(table.names[i] for i in columns), "floor"])
        for line in table.lines:
            texts = [_bold(line, i, line.texts[i]) for i in columns]
            grid.add_row(_safe(_marked(table, line)), line.letter, *texts, _safe(line.floor))
        console.print(grid)
    for text in _below(table):
        console.print(_safe(text), soft_wrap=True)
    for title, rows in (("", table.facts), ("options that differ", table.options)):
        for columns in blocks if rows else ():
            grid = _grid([title, *(table.names[i] for i in columns)])
            for name, values in rows.items():
                grid.add_row(_safe(name), *(_safe(values[i]) for i in columns))
            console.print(grid)


def _blocks(count: int, width: int) -> list[range]:
    """So many columns in blocks as equal as can be, each fit for a terminal of this width."""
    most = max(1, (width - LABELS) // COLUMN)
    parts = max(1, ceil(count / most))
    edges = [round(count * i / parts) for i in range(parts + 1)]
    return [range(low, high) for low, high in pairwise(edges)]


def _safe(text: str) -> str:
    return escape(one_line(text))


def _grid(columns: Sequence[str]) -> Grid:
    grid = Grid(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        grid.add_column(_safe(name), justify="left" if i == 0 else "right", overflow="fold")
    return grid


def _bold(line: Line, column: int, text: str) -> str:
    return f"[bold]{_safe(text)}[/bold]" if column in line.best else _safe(text)


def markdown(table: Table) -> str:
    """The same as Markdown; every text of a file or a name is escaped."""
    names = [plain(name) for name in table.names]
    parts = [_table(["", "under", *names, "floor"], [_cells(table, line) for line in table.lines])]
    parts.append("".join(f"- {plain(text)}\n" for text in _below(table)))
    for title, found in (("", table.facts), ("option", table.options)):
        if found:
            rows = [list(map(plain, [name, *texts])) for name, texts in found.items()]
            parts.append(_table([title, *names], rows))
    return "\n".join(parts)


def _cells(table: Table, line: Line) -> list[str]:
    texts = [f"**{plain(t)}**" if i in line.best else plain(t) for i, t in enumerate(line.texts)]
    return [plain(_marked(table, line)), line.letter, *texts, plain(line.floor)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def footnotes(table: Table) -> dict[str, int]:
    """The notes of all rows by their numbers, from 1."""
    notes = dict.fromkeys(note for line in table.lines for note in line.notes)
    return {note: i for i, note in enumerate(notes, 1)}


def _marked(table: Table, line: Line) -> str:
    numbers = footnotes(table)
    return line.label + "".join(f" [{numbers[note]}]" for note in line.notes)


def _below(table: Table) -> Iterator[str]:
    """Circumstances by their letters, notes by their numbers, then the remarks."""
    for letter, under in table.circumstances.items():
        yield f"{letter}: {in_words(under)}"
    for note, number in footnotes(table).items():
        yield f"[{number}] {note}"
    yield from table.remarks


def in_words(under: Mapping[str, str]) -> str:
    """Circumstances on one line."""
    return "; ".join(f"{name} {words}" for name, words in under.items())
