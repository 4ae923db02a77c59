"""What the paper says of its methods, and what runs show of it."""

from collections.abc import Callable
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
    t_interval,
)


@dataclass(frozen=True)
class Claim:
    """A statement of the paper about `method` and `others` up to an online step, of a `kind`.

    Runs that are shorter than `at_least` steps say nothing of it.
    """

    section: str
    text: str
    method: str
    others: tuple[str, ...] = ()
    tasks: dict = field(default_factory=lambda: TASKS)
    until: int = 200_000
    at_least: int = 0
    kind: str = "difference"

    def evidence(self, runs: dict) -> tuple[list[np.ndarray], str]:
        """Values [runs, ...] of the tasks with two or more runs, and the sizes of these."""
        strata, used = [], []
        for task in self.tasks:
            found = matched(runs, [self.method, *self.others], task, self.until)
            found = [x for x in found if x[0].settings["online_iterations"] >= self.at_least]
            if self.kind == "counts":
                found = [(r,) for (r,) in found if len(log(r, "exchanged"))]
            if len(found) < 2:
                continue
            used += [record for records in found for record in records]
            strata.append(np.array([KINDS[self.kind].values(*records) for records in found]))
        return strata, sizes_of(used)


@dataclass(frozen=True)
class Kind:
    """How a kind of claim is tested: values of a tuple of runs, and what is made of them.

    A claim holds where the statistic is above 0.
    """

    unit: str
    values: Callable  # of the runs of one seed, claim.method first
    statistic: Callable = mean_of_tasks
    digits: int = 1

    def interval(self, strata: list[np.ndarray]):
        """95%: of means Student's t, of others a bootstrap."""
        if self.statistic is mean_of_tasks:
            return t_interval(strata)
        return bootstrap(strata, self.statistic)


def few_exchanged(record: Record) -> float:
    """Share of log rows with M < 70, in proportion if a half is not of 128 rows, less 1/2."""
    limit = 70 / 256 * int(record.settings["batch_size"])
    return float(np.mean(log(record, "exchanged") < limit)) - 0.5


def unsteadiness(record: Record) -> float:
    """Standard deviation over the online evaluations of one run."""
    return float(record.scores()[1][1:].std())


def gain(strata: list[np.ndarray]) -> np.ndarray:
    """Percent by which the first method's sum over the strata (..., runs, 2) is above the other."""
    total = np.sum([values.mean(-2) for values in strata], 0)
    return 100 * (total[..., 0] / total[..., 1] - 1)


def spread(strata: list[np.ndarray]) -> np.ndarray:
    """Deviation over runs of strata (..., runs, 2), the second method's less the first's."""
    return np.mean([values.std(-2) @ np.array([-1, 1]) for values in strata], 0)


def last_fours(*records: Record) -> list[float]:
    """Last-four means."""
    return [r.last_four for r in records]


KINDS = {
    "difference": Kind("points", lambda a, b: a.last_four - b.last_four),
    "highest": Kind("share of tasks - 1/2", last_fours, share_highest, 2),
    "gain": Kind("% of the total", last_fours, gain),
    "counts": Kind("share of log rows - 1/2", few_exchanged, digits=2),
    "steadier": Kind("points of deviation", lambda a, b: unsteadiness(b) - unsteadiness(a)),
    "spread": Kind("points of deviation", last_fours, spread),
}


def above(section: str, claim: str, method: str, *others: str, **kwargs) -> list[Claim]:
    """Claims that a method is above each of others; `{}` in the text stands for the other."""
    return [Claim(section, claim.format(o), method, (o,), **kwargs) for o in others]


_C, _I, _U = "dare_cql", "dare_iql", "dare_iql_utd10"
_L = {"tasks": LOCOMOTION}
_UTD = {"tasks": UTD_TASKS, "until": 100_000, "at_least": 100_000}
CLAIMS = [
    Claim("7.2", "DARE-C: total above cql (paper: 15%)", _C, ("cql",), kind="gain"),
    Claim("7.2", "DARE-I: total above iql (paper: 15%)", _I, ("iql",), kind="gain"),
    *above("7.2", "DARE-C above {}", _C, "cql", "cal_ql", "edis_cql"),
    Claim("7.2", "DARE-C highest on most tasks", _C, ("cql", "cal_ql", "edis_cql"), kind="highest"),
    *above("7.2", "DARE-I above {}", _I, "iql", "pex", "edis_iql"),
    Claim("7.2", "DARE-I highest on most tasks", _I, ("iql", "pex", "edis_iql"), kind="highest"),
    Claim("7.3", "DARE-C: mostly M < 70 of 128", "dare_cql_uncapped", kind="counts"),
    Claim("7.3", "DARE-I: mostly M < 70 of 128", _I, kind="counts"),
    *above("7.3", "DARE-C: n = 32 above {}", _C, "dare_cql_uncapped", **_L),
    *above("7.3", "DARE-I: no cap above {}", _I, "dare_iql_n32", **_L),
    *above("7.4", "UTD 10: DARE-I above {}", _U, "pex_utd10", "edis_iql_utd10", **_UTD),
    *above("7.5", "Gaussian fit steadier than {}", _C, "dare_cql_direct", kind="steadier"),
    *above("7.5", "Gaussian fit steadier than {}", _I, "dare_iql_direct", kind="steadier"),
    *above("7.6", "DARE-I above {}", _I, "dare_iql_no_guidance", "dare_iql_no_exchange"),
    *above("App. D", "DARE-C: n = 32 above {}", _C, "dare_cql_n16", **_L),
    *above("App. D", "DARE-I: no cap above {}", _I, "dare_iql_n16", **_L),
    *above("App. E", "UTD 1, 0.1M steps: DARE-I above {}", _I, "pex", "edis_iql", **_UTD),
    *above("App. E", "UTD 10 above {}", _U, _I, **_UTD),
    *above("App. F", "DARE-C above {}", _C, "dare_cql_no_guidance", "dare_cql_no_exchange", **_L),
    *above("App. F", "DARE-I, locomotion: above {}", _I, "dare_iql_no_guidance",
           "dare_iql_no_exchange", **_L),
    *above("App. G", "DARE-I above {}", _I, "dare_iv", **_L),
    *above("App. G", "DARE-I varies less over seeds than {}", _I, "dare_iv", kind="spread", **_L),
]  # fmt: skip


def verdict(interval: tuple[float, float] | None) -> str:
    """What an interval of (what the claim says is positive) shows."""
    if interval is None:
        return "not tested"
    low, high = interval
    return "seen" if low > 0 else "opposite seen" if high < 0 else "not seen"


def claims(runs: dict) -> list[Table]:
    """What the paper says, against the records."""
    rows = []
    for claim in CLAIMS:
        strata, sizes = claim.evidence(runs)
        kind = KINDS[claim.kind]
        interval, row = kind.interval(strata), {"section": claim.section}
        row |= {"claim": claim.text, "tasks": len(strata) or None}
        row |= {"pairs": sum(map(len, strata)) or None, "unit": kind.unit, "estimate": None}
        if strata:
            estimate = float(kind.statistic(strata))
            row["estimate"] = Cell(estimate, None, None, interval, sizes, kind.digits, signed=True)
        rows.append(row | {"verdict": verdict(interval)})
    notes = [
        "Of last-four means, paired by seed, over the tasks with two or more pairs; 95% interval, "
        "stratified by task: Student's t, but for shares of tasks, totals and deviations over "
        "seeds, which have bootstrap intervals, too narrow if there are few seeds. seen: interval "
        "above 0; not seen: it has 0; opposite seen: below 0; not tested: no such runs.",
        "M < 70 of 128: in proportion where half a batch is not of 128 rows. Steadier: the "
        "deviation over a run's online evaluations.",
    ]
    return [Table("claims", "The paper's claims", rows, notes)]
