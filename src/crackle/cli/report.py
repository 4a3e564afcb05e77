"""The tables of `crackle doctor`: rows, what they are read from, and how they are printed."""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal["ok", "missing", "problem", "info"]


class Row(msgspec.Struct, frozen=True):
    """One line of the table.

    state: "ok"; "missing", something that a feature or good practice would need; "problem", what was asked about will
    not do; "info", neither good nor bad. advice: what to do about it, or nothing.
    """

    area: str
    name: str
    value: str
    state: State
    advice: str = ""


def read(path: str) -> str | None:
    """Content of a small file in /proc or /sys, stripped; None when it is not there."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


def print_json(rows: list[Row], **verdict: object) -> None:
    """Print a report as one JSON object on standard output, `verdict` first."""
    found = {**verdict, "rows": rows}
    print(msgspec.json.format(msgspec.json.encode(found)).decode())


def print_table(rows: list[Row], sentence: str, good: bool) -> None:
    """Print a report as a table on standard output, and under it what follows from it, in a sentence."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "missing": "yellow", "problem": "red", "info": ""}
    marks = {"ok": "+", "missing": "-", "problem": "!", "info": " "}
    table = Table(box=None, pad_edge=False, show_header=False)
    area = ""
    for row in rows:
        value = row.value + (f" ({row.advice})" if row.advice else "")
        texts = (row.area if row.area != area else "", marks[row.state], row.name, value)
        table.add_row(
            *(Text(text, colours[row.state] if column else "bold") for column, text in enumerate(texts))
        )
        area = row.area
    console = Console(highlight=False)
    console.print(table)
    console.print(Text(sentence, "bold green" if good else "bold red"), soft_wrap=True)
