"""What every check reports, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

Status = Literal["ok", "warning", "problem"]
COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    name: what was checked, in a word or two. what: what was found. remedy: what to do; None if
    all is well. usual: what a sound model has instead, for values that can be compared.
    """

    name: str
    status: Status
    what: str
    remedy: str | None = None
    usual: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.what}" + (f"; {self.remedy}" if self.remedy else "")

    def as_dict(self) -> dict[str, Any]:
        """JSON values of all but `usual`."""
        return {key: getattr(self, key) for key in ("name", "status", "what", "remedy")}


def not_ok(findings: Sequence[Finding]) -> list[Finding]:
    """The warnings and problems among findings."""
    return [finding for finding in findings if finding.status != "ok"]


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print all findings as a table, then what to do about the warnings and problems."""
    first, name = Column(no_wrap=True), Column(style="bold", no_wrap=True)
    table = Table(first, name, Column(overflow="fold"), show_header=False)
    for finding in findings:
        colour = COLOURS[finding.status]
        usual = f" (usual: {finding.usual})" if finding.usual else ""
        status = f"[{colour}]{finding.status}[/{colour}]"
        table.add_row(status, escape(finding.name), escape(finding.what + usual))
    console.print(table)
    for finding in not_ok(findings):
        remedy = f"{finding.name}: {finding.remedy}"
        console.print(escape(remedy), soft_wrap=True, highlight=False)
    if not not_ok(findings):
        console.print("[green]No problems found.[/green]")
