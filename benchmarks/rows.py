"""Tidy benchmark rows: one row, one number. Every benchmark writes and shows these."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One number that was measured, beside what the machine allows."""

    bench: str
    case: str
    impl: str
    """`coterie`, or the peer's name."""
    metric: str
    value: float
    unit: str
    spread: float | None = None
    """Half the distance between the quartiles of the repeats, in `unit`."""
    limit: float | None = None
    """What this machine allows for the same work, in `unit`."""
    fraction: float | None = None
    """How much of the limit was reached: 1 is all of it."""


def write(rows: Sequence[Row], path: str | Path) -> None:
    """Writes the rows as a JSON list, whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n")
    os.replace(part, path)


def read(path: str | Path) -> list[Row]:
    """The rows of a file that `write` wrote."""
    return [Row(**fields) for fields in json.loads(Path(path).read_text())]


def show(rows: Sequence[Row]) -> None:
    """Prints a table for a person, one for each case."""
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # a borrowed machine with torch alone can measure too
        for row in rows:
            print(row.case, row.impl, row.metric, _short(row.value), row.unit)
        return

    console = Console()
    for case in dict.fromkeys(row.case for row in rows):
        table = Table(title=case, title_justify="left", box=SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
        for name in ("impl", "metric", "value", "unit", "spread", "limit", "fraction"):
            table.add_column(name, justify="left" if name in ("impl", "metric", "unit") else "right")
        for row in rows:
            if row.case == case:
                numbers = (_short(row.value), row.unit, _short(row.spread), _short(row.limit), _short(row.fraction))
                table.add_row(row.impl, row.metric, *numbers)
        console.print(table)


def _short(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"
