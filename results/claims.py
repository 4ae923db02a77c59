"""What the paper says of its methods, and what runs show of it."""

from dataclasses import dataclass, field

import numpy as np
from cells import Cell, Table
from collect import Record
from pairs import (
    LOCOMOTION,
    TASKS,
    UTD_TASKS,
    bootstrap,
    log,
    matched,
    mean_of_tasks,
    share_highest,
    sizes_of,
)


@dataclass(frozen=True)
class Claim:
    """A statement of the paper about `method` and `others` at an online step, of a `kind`.

    "difference": method above the other in the last-four mean, paired by seed; "highest": above
    all others on more than half of the tasks; "counts": less than 70 of 128 pairs exchanged in
    more than half of the log rows (no others).
    """

    section: str
    text: str
    method: str
    others: tuple[str, ...] = ()
    tasks: dict = field(default_factory=lambda: TASKS)
    until: int = 200_000
    kind: str = "difference"

    def evidence(self, runs: dict) -> tuple[list[np.ndarray], str]:
        """Values of the tasks with two or more runs, first axis runs, and their sizes."""
        strata, used = [], []
        for task in self.tasks:
            found = matched(runs, [self.method, *self.others], task, self.until)
            if self.kind == "counts":
                found = [(r,) for (r,) in found if len(log(r, "exchanged"))]
            if len(found) < 2:
                continue
            used += [record for records in found for record in records]
            if self.kind == "counts":
                strata.append(np.array([few_exchanged(record) - 0.5 for (record,) in found]))
            else:
                scores = np.array([[r.last_four for r in records] for records in found])
                strata.append(scores if self.kind == "highest" else scores[:, 0] - scores[:, 1])
        return strata, sizes_of(used)


def few_exchanged(record: Record) -> float:
    """Share of log rows with M < 70, in proportion if a half is not of 128 rows."""
    limit = 70 / 256 * int(record.settings["batch_size"])
    return float(np.mean(log(record, "exchanged") < limit))


def above(section: str, claim: str, method: str, *others: str, **kwargs) -> list[Claim]:
    """Claims that a method is above each of others; `{}` in the text stands for the other."""
    return [Claim(section, claim.format(o), method, (o,), **kwargs) for o in others]


_C, _I, _U = "dare_cql", "dare_iql", "dare_iql_utd10"
_L = {"tasks": LOCOMOTION}
_UTD = {"tasks": UTD_TASKS, "until": 100_000}
CLAIMS = [
    *above("7.2", "DARE-C above {}", _C, "cql", "cal_ql", "edis_cql"),
    Claim("7.2", "DARE-C highest on most tasks", _C, ("cql", "cal_ql", "edis_cql"), kind="highest"),
    *above("7.2", "DARE-I above {}", _I, "iql", "pex", "edis_iql"),
    Claim("7.2", "DARE-I highest on most tasks", _I, ("iql", "pex", "edis_iql"), kind="highest"),
    *above("7.3", "DARE-C: n = 32 above {}", _C, "dare_cql_uncapped", "dare_cql_n16", **_L),
    *above("7.3", "DARE-I: no cap above {}", _I, "dare_iql_n32", **_L),
    Claim("7.3", "DARE-C: mostly M < 70", "dare_cql_uncapped", kind="counts"),
    Claim("7.3", "DARE-I: mostly M < 70", _I, kind="counts"),
    *above("7.4", "UTD 10: DARE-I above {}", _U, "pex_utd10", "edis_iql_utd10", **_UTD),
    *above("7.4", "UTD 10 does DARE-I no harm: above {}", _U, _I, **_UTD),
    *above("App. E", "UTD 1, up to 0.1M steps: DARE-I above {}", _I, "pex", "edis_iql", **_UTD),
    *above("7.5", "Gaussian fit above {}", _C, "dare_cql_direct"),
    *above("7.6", "DARE-I above {}", _I, "dare_iql_no_guidance", "dare_iql_no_exchange"),
    *above("App. F", "DARE-C above {}", _C, "dare_cql_no_guidance", "dare_cql_no_exchange", **_L),
    *above("App. G", "DARE-I above {}", _I, "dare_iv", **_L),
]


def verdict(interval: tuple[float, float] | None) -> str:
    """What an interval of (what the claim says is positive) shows."""
    if interval is None:
        return "not tested"
    low, high = interval
    return "seen" if low > 0 else "opposite seen" if high < 0 else "not seen"


def claims(runs: dict) -> list[Table]:
    """What the paper says, against the records."""
    rows = []
    kinds = {"difference": "points", "highest": "share of tasks - 1/2",
             "counts": "share of log rows - 1/2"}  # fmt: skip
    for claim in CLAIMS:
        strata, sizes = claim.evidence(runs)
        statistic = share_highest if claim.kind == "highest" else mean_of_tasks
        interval, row = bootstrap(strata, statistic), {"section": claim.section}
        row |= {"claim": claim.text, "tasks": len(strata) or None}
        row |= {"pairs": sum(map(len, strata)) or None, "unit": kinds[claim.kind], "estimate": None}
        if strata:
            points = claim.kind == "difference"
            row["estimate"] = Cell(float(statistic(strata)), interval=interval, sizes=sizes,
                                   digits=1 if points else 2, signed=True)  # fmt: skip
        rows.append(row | {"verdict": verdict(interval)})
    notes = ["Differences of last-four means, paired by seed, mean over the tasks with two or "
             "more pairs; 95% interval, stratified by task. seen: interval above 0; not seen: "
             "it has 0; opposite seen: below 0; not tested: no such runs."]  # fmt: skip
    return [Table("claims", "The paper's claims", rows, notes)]
