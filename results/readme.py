"""Write the README's section on results from committed records: python results/readme.py [--check]

Everything between the two marks in README.md is made from results/study (collect.py --records).
With --check nothing is written, and a section that differs is an error.
"""

import argparse
import os
import sys
from pathlib import Path

from cells import Table
from claims import claims
from collect import read_records
from pairs import by_seed, cut, sizes_of, summary
from tables import baseline, cost, exchange, study

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "results" / "study"
BEGIN, END = "<!-- results: python results/readme.py -->", "<!-- end of results -->"
# The README's short names of columns; the order is that of the table.
METHODS = {
    "iql": "IQL",
    "pex": "PEX",
    "dare_iql": "DARE-I",
    "dare_iv": "DARE-IV",
    "dare_iql_no_guidance": "no guidance",
    "dare_iql_no_exchange": "no exchange",
    "dare_iql_direct": "direct",
    "dare_iql_separated": "separated",
    "cal_ql": "Cal-QL",
    "dare_cql": "DARE-C",
}


def scores(runs: dict) -> Table:
    """Tasks x methods: last-four means, and the score before fine-tuning."""
    rows = []
    for task in sorted({task for _, task in runs}):
        row = {"task": task}
        for offline in ("iql", "cal_ql"):
            found = [cut(r, 0) for r in runs.get((offline, task), {}).values()]
            name = f"{METHODS[offline]}, offline"
            row[name] = summary([r.offline_score for r in found], sizes_of(found))
        for method, name in METHODS.items():
            found = [cut(r) for r in runs.get((method, task), {}).values()]
            row[name] = summary([r.last_four for r in found], sizes_of(found))
        rows.append(row)
    used = [name for name in rows[0] if any(row[name] for row in rows)]
    rows = [{name: row[name] for name in used} for row in rows]
    note = "Mean ± population standard deviation of the last-four mean over (n) seeds; the columns "
    note += "from `no guidance` to `separated` are variants of DARE-I."
    return Table("scores", "Scores after fine-tuning", rows, [note])


def tested(table: Table) -> Table:
    """The rows that have an estimate."""
    rows = [row for row in table.rows if row["verdict"] != "not tested"]
    left = sum(row["verdict"] == "not tested" for row in table.rows)
    table.notes.append(f"{left} more claims are not tested: no runs.")
    return Table(table.name, table.title, rows, table.notes)


def section(records: list) -> str:
    """The section as Markdown."""
    runs = by_seed(records)
    compared = study(runs)[1]
    compared.rows = [row for row in compared.rows if baseline(row["method"]) != row["method"]]
    tables = [scores(runs), compared, tested(claims(runs)[0]), *exchange(runs), *cost(runs)]
    commits = sorted({str(r.settings.get("commit", "unknown")) for r in records})
    hardware = sorted({str(r.settings.get("hardware", "unknown")) for r in records})
    torch = sorted({str(r.settings.get("torch", "unknown")) for r in records})
    head = (
        f"The study: {len(records)} runs at reduced size on regenerated data, which compare the "
        "methods with each other and with no published number. Commit "
        f"{', '.join(commits)}; {'; '.join(hardware)}; torch {', '.join(torch)}. "
        "Every evaluation and command is in [results/study](results/study).\n"
    )
    return "\n".join([head, *(table.markdown() for table in tables)])


def replaced(readme: str, text: str) -> str:
    """The README with another section.

    Raises:
        ValueError: the marks are missing.
    """
    begin, end = readme.find(BEGIN), readme.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"README.md needs the lines {BEGIN} and {END}")
    return readme[: begin + len(BEGIN)] + "\n\n" + text + "\n" + readme[end:]


def main():
    """Write or check the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if it differs")
    args = parser.parse_args()
    path = ROOT / "README.md"
    try:
        old = path.read_text()
        new = replaced(old, section(read_records(RECORDS)))
    except (ValueError, FileNotFoundError) as e:
        sys.exit(f"error: {e}")
    if args.check and new != old:
        sys.exit("error: the README's results are not those of results/study; "
                 "run python results/readme.py")  # fmt: skip
    if new != old and not args.check:
        path.with_suffix(".tmp").write_text(new)
        os.replace(path.with_suffix(".tmp"), path)


if __name__ == "__main__":
    main()
