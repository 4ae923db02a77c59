"""Tables of numbers that say what they stand for, as Markdown, CSV rows and LaTeX."""

from collections import Counter
from dataclasses import dataclass, field


def described(data: str, offline: int, batch: int, hidden: int, online: int) -> str:
    """Data and sizes as text."""
    return (
        f"data {data}, {offline:,} offline updates, {online:,} online steps, "
        f"batches of {batch}, layers of {hidden}"
    )


PAPER_SIZES = {n: described("d4rl", 1_000_000, 256, 256, n) for n in (200_000, 100_000, 0)}


@dataclass(frozen=True)
class Cell:
    """A number with what it stands for: runs, their data and sizes, and a 95% interval."""

    mean: float
    std: float | None = None
    seeds: int | None = None
    interval: tuple[float, float] | None = None
    sizes: str = ""
    digits: int = 1
    signed: bool = False
    bold: bool = False

    def text(self) -> str:
        """As in `63.3 ± 1.8 (5); 61.9 to 64.7`."""
        form = f"{'+' if self.signed else ''},.{self.digits}f"
        out = f"{self.mean:{form}}"
        out += f" ± {self.std:,.{self.digits}f}" if self.std is not None else ""
        out += f" ({self.seeds})" if self.seeds is not None else ""
        return out + ("; {:{f}} to {:{f}}".format(*self.interval, f=form) if self.interval else "")

    def parts(self, name: str) -> dict:
        """Columns of a CSV file; what the cell has not is left out."""
        low, high = self.interval or (None, None)
        found = {"": float(self.mean), " std": self.std, " seeds": self.seeds}
        found |= {" low": low, " high": high, " sizes": self.sizes or None}
        return {name + k: v for k, v in found.items() if v is not None}


@dataclass
class Table:
    """Rows from column to text, Cell or None (empty); `warning` goes into every format."""

    name: str
    title: str
    rows: list[dict]
    notes: list[str] = field(default_factory=list)
    warning: str = ""
    until: int | None = None  # online steps of the paper's table

    def marks(self) -> dict[str, str]:
        """Footnote mark of each data and sizes; the most frequent go without."""
        cells = [c for row in self.rows for c in row.values() if isinstance(c, Cell) and c.sizes]
        names = [sizes for sizes, _ in Counter(c.sizes for c in cells).most_common()]
        return {sizes: f" [{i}]" if i else "" for i, sizes in enumerate(names)}

    def legend(self) -> list[str]:
        """What stands below the table: sizes and data, notes, warnings."""
        lines = [f"{mark[1:] or 'Unmarked'}: {sizes}." for sizes, mark in self.marks().items()]
        papers = PAPER_SIZES.values() if self.until is None else [PAPER_SIZES[self.until]]
        if any(sizes not in papers for sizes in self.marks()):
            lines.append("Not the paper's sizes or data: these numbers compare methods with each "
                         "other, not with published numbers.")  # fmt: skip
        return lines + self.notes + ([f"Warning: {self.warning}"] if self.warning else [])

    def grid(self, plain, bold) -> list[list[str]]:
        """Header and rows as text; `plain` escapes a text and `bold` wraps an escaped one."""
        marks, columns = self.marks(), list(dict.fromkeys(k for row in self.rows for k in row))
        lines = [[plain(k) for k in columns]]

        def shown(cell) -> str:
            if not isinstance(cell, Cell):
                return "" if cell is None else plain(str(cell))
            text = plain(cell.text() + marks.get(cell.sizes, ""))
            return bold(text) if cell.bold else text

        return lines + [[shown(row.get(k)) for k in columns] for row in self.rows]

    def markdown(self) -> str:
        """Title, table and legend."""
        lines = []
        if self.rows:
            head, *body = self.grid(lambda text: text.replace("|", "\\|"), "**{}**".format)
            lines = [f"| {' | '.join(cells)} |" for cells in (head, *body)]
            lines.insert(1, "|" + "---|" * len(head))
        legend = "\n".join(f"- {line}" for line in self.legend())
        return "\n\n".join(x for x in (f"### {self.title}", "\n".join(lines), legend) if x) + "\n"

    def latex(self) -> str:
        """A table environment with title and legend, for booktabs."""
        lines = [r"\begin{table}", rf"\caption{{{escaped(self.title)}}}"]
        if self.rows:
            head, *body = self.grid(escaped, r"\textbf{{{}}}".format)
            lines += [rf"\begin{{tabular}}{{{'l' * len(head)}}}", r"\toprule"]
            lines += [" & ".join(head) + r" \\", r"\midrule"]
            lines += [" & ".join(cells) + r" \\" for cells in body]
            lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\par {escaped(line)}" for line in self.legend()]
        return "\n".join(lines + [r"\end{table}"]) + "\n"

    def csv_rows(self) -> list[dict]:
        """Rows of numbers and texts with the union of columns left to write_table."""
        rows = []
        for row in self.rows:
            found = {"warning": self.warning} if self.warning else {}
            for name, cell in row.items():
                found |= cell.parts(name) if isinstance(cell, Cell) else {name: cell}
            rows.append(found)
        return rows


def escaped(text: str) -> str:
    """Text as LaTeX."""
    codes = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    codes |= {"±": r"$\pm$", "<": "$<$", ">": "$>$"} | {c: f"\\{c}" for c in "%_&#${}"}
    return "".join(codes.get(c, c) for c in text)
