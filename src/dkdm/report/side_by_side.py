"""Numbers of several models in rows: in one row stands only what was measured alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from dkdm.evaluation.figures import Figure
from dkdm.report.entries import Entry, named_shortly

ABSENT = "–"


@dataclass(frozen=True)
class Line:
    """One row: what it is, under which circumstances, and a figure or None for each column.

    letter: of the circumstances in `Table.circumstances`; empty for what has none. notes: what
    differs among the figures without changing what they mean.
    """

    label: str
    letter: str
    under: Mapping[str, str]
    figures: tuple[Figure | None, ...]
    notes: tuple[str, ...]

    @property
    def texts(self) -> list[str]:
        """The values as text."""
        return [ABSENT if figure is None else figure.text for figure in self.figures]

    @property
    def floor(self) -> str:
        """The floor as text; empty if it is unknown."""
        return next((figure.floor_text for figure in self.figures if figure), "")

    @property
    def best(self) -> list[int]:
        """The columns that show the best value; none if there is nothing to choose from."""
        known = [figure for figure in self.figures if figure]
        better = next((figure.better for figure in known), None)
        if better is None or len({figure.text for figure in known}) < 2:
            return []
        found = (min if better == "lower" else max)(known, key=lambda figure: figure.value)
        return [i for i, text in enumerate(self.texts) if text == found.text]


@dataclass(frozen=True)
class Table:
    """Columns side by side.

    facts, options: what is no measurement, and the options that differ, a text for each column.
    circumstances: by their letters. remarks: what a reader has to know before comparing.
    """

    names: tuple[str, ...]
    lines: tuple[Line, ...]
    facts: Mapping[str, tuple[str, ...]]
    options: Mapping[str, tuple[str, ...]]
    circumstances: Mapping[str, Mapping[str, str]]
    remarks: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values; numbers as numbers."""
        rows = [
            {
                "metric": line.label,
                "under": dict(line.under),
                "values": [figure and figure.value for figure in line.figures],
                "floor": next((figure.floor for figure in line.figures if figure), None),
                "better": next((figure.better for figure in line.figures if figure), None),
                "beside": [figure and dict(figure.beside) for figure in line.figures],
                "notes": list(line.notes),
            }
            for line in self.lines
        ]
        facts, options = dict(self.facts), dict(self.options)
        about = {"facts": facts, "options": options, "remarks": list(self.remarks)}
        return {"columns": list(self.names), "rows": rows, **about}


def side_by_side(entries: Sequence[Entry]) -> Table:
    """Lay the entries out as rows, so that no row mixes numbers of different circumstances."""
    names = named_shortly(entries)
    groups = _grouped(entries)
    letters = _letters(groups)
    lines = tuple(
        Line(label, letters.get(under, ""), dict(under), figures, _notes(figures, names))
        for (label, under, _), figures in groups.items()
    )
    return Table(
        names=tuple(names),
        lines=lines,
        facts=_facts(entries),
        options=options_that_differ(entries),
        circumstances={letter: dict(under) for under, letter in letters.items()},
        remarks=(*_apart(lines), *_missing(entries, names)),
    )


Under = tuple[tuple[str, str], ...]
Groups = dict[tuple[str, Under, str], tuple[Figure | None, ...]]


def _grouped(entries: Sequence[Entry]) -> Groups:
    """Figures of one label, circumstances and floor, a place for each column, labels together."""
    found: dict[tuple[str, Under, str], list[Figure | None]] = {}
    for column, entry in enumerate(entries):
        for figure in entry.figures:
            key = figure.label, tuple(figure.under.items()), figure.floor_text
            found.setdefault(key, [None] * len(entries))[column] = figure
    labels = list(dict.fromkeys(label for label, _, _ in found))
    ordered = sorted(found.items(), key=lambda item: labels.index(item[0][0]))
    return {key: tuple(figures) for key, figures in ordered}


def _letters(groups: Groups) -> dict[Under, str]:
    different = dict.fromkeys(under for _, under, _ in groups if under)
    count = len(ascii_uppercase)
    return {
        under: ascii_uppercase[i % count] + (str(i // count) if i >= count else "")
        for i, under in enumerate(different)
    }


def _notes(figures: Sequence[Figure | None], names: Sequence[str]) -> tuple[str, ...]:
    """What differs beside the circumstances, and in which column it is what."""
    known = [(name, figure) for name, figure in zip(names, figures, strict=True) if figure]
    keys = dict.fromkeys(key for _, figure in known for key in figure.beside)
    notes = []
    for key in keys:
        words = [(name, figure.beside.get(key) or "not said") for name, figure in known]
        if len({each for _, each in words}) > 1:
            notes.append(f"{key}: {', '.join(f'{each} ({name})' for name, each in words)}")
    return tuple(notes)


def _apart(lines: Sequence[Line]) -> list[str]:
    """A sentence for all numbers whose rows differ in the same circumstances."""
    rows: dict[str, list[Line]] = {}
    for line in lines:
        rows.setdefault(line.label, []).append(line)
    labels: dict[str, list[str]] = {}
    for label, found in rows.items():
        if len(found) > 1:
            labels.setdefault(differing(found), []).append(label)
    return [
        f"Different {what}: values in different rows cannot be compared ({'; '.join(of)})."
        for what, of in labels.items()
    ]


def differing(lines: Sequence[Line]) -> str:
    """The names of the circumstances that differ among rows; floors if nothing else does."""
    keys = dict.fromkeys(key for line in lines for key in line.under)
    different = [key for key in keys if len({line.under.get(key) for line in lines}) > 1]
    return ", ".join(different) or "floor"


def _missing(entries: Sequence[Entry], names: Sequence[str]) -> list[str]:
    pairs = zip(entries, names, strict=True)
    return [f"{name}: {text}" for entry, name in pairs for text in entry.missing]


def _facts(entries: Sequence[Entry]) -> dict[str, tuple[str, ...]]:
    keys = dict.fromkeys(key for entry in entries for key in entry.facts)
    return {key: tuple(entry.facts.get(key) or ABSENT for entry in entries) for key in keys}


def options_that_differ(entries: Sequence[Entry]) -> dict[str, tuple[str, ...]]:
    """The options whose values differ among the runs, as text; those of no run have none.

    An option that another command's runs lack is one of them only where it is not at its default.
    """
    runs = [entry for entry in entries if entry.options]
    keys = dict.fromkeys(key for entry in runs for key in entry.options)
    return {
        key: tuple(_text(e.options[key]) if key in e.options else ABSENT for e in entries)
        for key in keys
        if _differs(key, runs)
    }


def _differs(key: str, runs: Sequence[Entry]) -> bool:
    values = {_text(entry.options[key]) for entry in runs if key in entry.options}
    if len(values) > 1 or all(key in entry.options for entry in runs):
        return len(values) > 1
    usual = [type(entry.run.asked)().flat() for entry in runs if entry.run is not None]
    return values != {_text(options[key]) for options in usual if key in options}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)
