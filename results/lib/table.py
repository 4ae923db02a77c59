"""Tables of numbers that say what they stand for, as Markdown and LaTeX."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from lib.records import described

PAPER_SIZES = {n: described("d4rl", 1_000_000, 256, 256, n) for n in (200_000, 100_000, 0)}


@dataclass(frozen=True)
class Cell:
    """A number with what it stands for: runs, their data and sizes, and a 95% interval."""

    mean: float
    std: float | None = None
    seeds: int | None = None
    interval: tuple[float, float] | None = None
    sizes: str = ""  # one a line
    digits: int = 1
    signed: bool = False
    bold: bool = False

    def text(self) -> str:
        """As in `63.3 ± 1.8 (5)` or `+1.6 (5); -1.2 to +4.5`."""
        form = f"{'+' if self.signed else ''},.{self.digits}f"
        out = f"{self.mean:{form}}"
        out += f" ± {self.std:,.{self.digits}f}" if self.std is not None else ""
        out += f" ({self.seeds})" if self.seeds is not None else ""
        if self.interval:
            low, high = self.interval
            out += f"; {low:{form}} to {high:{form}}"
        return out


def summary(values, sizes: str, digits: int = 1) -> Cell | None:
    """Mean over runs, with the standard deviation of several; None where there are none."""
    values = np.array(values, float)
    if not len(values):
        return None
    std = float(values.std()) if len(values) > 1 else None
    return Cell(float(values.mean()), std, len(values), None, sizes, digits)


def in_short(sizes: str) -> str:
    """Data and sizes, one a line, as one text: where they differ with `or` between."""
    short = []
    for column in zip(*(line.rsplit(", ", 4) for line in sizes.splitlines()), strict=True):
        texts = list(dict.fromkeys(column))  # such as 25,000 online steps, 50,000 online steps
        unit = " " + texts[0].split(" ", 1)[1]
        if all(text.endswith(unit) for text in texts):
            short.append(" or ".join(text.removesuffix(unit) for text in texts) + unit)
        else:
            short.append(" or ".join(texts))
    return ", ".join(short)


@dataclass
class Table:
    """Rows from column to text, Cell or None (empty)."""

    title: str
    rows: list[dict]
    notes: list[str] = field(default_factory=list)

    def marks(self) -> dict[str, str]:
        """Footnote mark of each data and sizes; the most frequent go without."""
        cells = [c for row in self.rows for c in row.values() if isinstance(c, Cell) and c.sizes]
        names = [sizes for sizes, _ in Counter(c.sizes for c in cells).most_common()]
        return {sizes: f" [{i}]" if i else "" for i, sizes in enumerate(names)}

    def legend(self) -> list[str]:
        """What stands below the table: sizes and data, then notes."""
        marks = self.marks()
        unmarked = "Unmarked" if len(marks) > 1 else "All runs"
        lines = [f"{mark[1:] or unmarked}: {in_short(sizes)}." for sizes, mark in marks.items()]
        if any(sizes not in PAPER_SIZES.values() for sizes in marks):
            lines.append("Not the paper's sizes or data: these numbers compare methods with each "
                         "other, not with published numbers.")  # fmt: skip
        return lines + self.notes

    def grid(self, plain, bold) -> list[list[str]]:
        """Header and rows as text; `plain` escapes a text and `bold` wraps an escaped one."""
        marks, columns = self.marks(), list(dict.fromkeys(k for row in self.rows for k in row))

        def shown(cell) -> str:
            if not isinstance(cell, Cell):
                return "" if cell is None else plain(str(cell))
            text = plain(cell.text() + marks.get(cell.sizes, ""))
            return bold(text) if cell.bold else text

        head = [plain(k) for k in columns]
        return [head] + [[shown(row.get(k)) for k in columns] for row in self.rows]

    def markdown(self) -> str:
        """Title, table and legend."""
        head, *body = self.grid(lambda text: text.replace("|", "\\|"), "**{}**".format)
        lines = [f"| {' | '.join(cells)} |" for cells in (head, *body)]
        lines.insert(1, "|" + "---|" * len(head))
        legend = [f"- {line}" for line in self.legend()]
        parts = ["### " + self.title, "\n".join(lines), "\n".join(legend)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def latex(self) -> str:
        """A table environment with title and legend, for booktabs."""
        rows = self.grid(escaped, r"\textbf{{{}}}".format)
        head, *body = (" & ".join(row) + r" \\" for row in rows)
        columns = "l" * len(rows[0])
        lines = [r"\begin{table}", rf"\caption{{{escaped(self.title)}}}"]
        lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body]
        lines += [r"\bottomrule", r"\end{tabular}"] + [rf"\par {escaped(x)}" for x in self.legend()]
        return "\n".join(lines + [r"\end{table}"]) + "\n"


def escaped(text: str) -> str:
    """Text as LaTeX."""
    codes = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    codes |= {"±": r"$\pm$", "∞": r"$\infty$", "<": "$<$", ">": "$>$"}
    codes |= {c: f"\\{c}" for c in "%_&#${}"}
    return "".join(codes.get(c, c) for c in text)
