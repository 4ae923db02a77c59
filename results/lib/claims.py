"""What the paper says of its methods, and what runs show of it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lib.experiments import LOCOMOTION, METHODS, NO_EXPERT, TASKS
from lib.records import Record, matched, sizes_of
from lib.statistics import bootstrap, gain, mean_of_tasks, share_highest, spread, t_interval
from lib.table import Cell, Table


@dataclass(frozen=True)
class Claim:
    """A statement of the paper about `method` and `others`, of a kind in KINDS.

    Runs of fewer than `at_least` online steps are left out; those that go on beyond step `until`
    are cut there.
    """

    section: str
    text: str
    method: str
    others: tuple[str, ...] = ()
    kind: str = "difference"
    tasks: tuple = tuple(TASKS)
    until: int = 200_000
    at_least: int = 0

    def evidence(self, runs: dict) -> tuple[list[np.ndarray], str]:
        """Values [runs, ...] of the tasks with two or more runs, and the sizes of these."""
        strata, used = [], []
        for task in self.tasks:
            found = matched(runs, [self.method, *self.others], task, self.until)
            found = [x for x in found if x[0].n_steps >= self.at_least]
            if self.kind == "counts":
                found = [(r,) for (r,) in found if len(r.log("exchanged")[0])]
            if len(found) >= 2:
                used += [record for records in found for record in records]
                strata.append(np.array([KINDS[self.kind].values(*records) for records in found]))
        return strata, sizes_of(used)


@dataclass(frozen=True)
class Kind:
    """How a claim is tested: it holds where the statistic of the runs' values is above 0."""

    unit: str
    values: Callable  # of the runs of one seed, claim.method first
    statistic: Callable = mean_of_tasks
    digits: int = 1

    def interval(self, strata: list[np.ndarray]) -> tuple[float, float] | None:
        """95%: Student's t for means and (by the differences) gains, a bootstrap for the others."""
        if self.statistic is mean_of_tasks:
            return t_interval(strata)
        if self.statistic is gain:  # in percent of the other's total, taken as known
            total = sum(values[:, 1].mean() for values in strata)
            ends = t_interval([values[:, 0] - values[:, 1] for values in strata])
            return tuple(100 * len(strata) * x / total for x in ends)
        return bootstrap(strata, self.statistic)


def few_exchanged(record: Record) -> float:
    """Share of log rows with M < 70, in proportion if a half is not of 128 rows, less 1/2."""
    limit = 70 / 256 * int(record.settings["batch_size"])
    return float(np.mean(record.log("exchanged")[1] < limit)) - 0.5


def unsteadiness(record: Record) -> float:
    """Mean size of the change from one online evaluation of a run to the next."""
    changes = np.abs(np.diff(record.scores()[1][1:]))
    return float(changes.mean()) if len(changes) else 0.0


def last_fours(*records: Record) -> list[float]:
    """Last-four means."""
    return [r.last_four for r in records]


KINDS = {
    "difference": Kind("points", lambda a, b: a.last_four - b.last_four),
    "highest": Kind("share of tasks - 1/2", last_fours, share_highest, 2),
    "gain": Kind("% of the total", last_fours, gain),
    "counts": Kind("share of log rows - 1/2", few_exchanged, digits=2),
    "steadier": Kind("points of change", lambda a, b: unsteadiness(b) - unsteadiness(a)),
    "spread": Kind("points of deviation", last_fours, spread),
}


def _above(section: str, text: str, method: str, *others: str, **more) -> list[Claim]:
    """Claims that a method is above each of others; `{}` in the text stands for its label."""
    return [
        Claim(section, text.format(METHODS[other].label), method, (other,), **more)
        for other in others
    ]


_C, _I, _U = "dare_cql", "dare_iql", "dare_iql_utd10"
_L = {"tasks": tuple(LOCOMOTION)}
_UTD = {"tasks": tuple(NO_EXPERT), "until": 100_000, "at_least": 100_000}
CLAIMS = [
    Claim("7.2", "DARE-C: total above CQL (paper: by 15%)", _C, ("cql",), "gain"),
    Claim("7.2", "DARE-I: total above IQL (paper: by 15%)", _I, ("iql",), "gain"),
    *_above("7.2", "DARE-C above {}", _C, "cql", "cal_ql", "edis_cql"),
    Claim("7.2", "DARE-C highest on most tasks", _C, ("cql", "cal_ql", "edis_cql"), "highest"),
    *_above("7.2", "DARE-I above {}", _I, "iql", "pex", "edis_iql"),
    Claim("7.2", "DARE-I highest on most tasks", _I, ("iql", "pex", "edis_iql"), "highest"),
    Claim("7.3", "DARE-C: mostly M < 70", "dare_cql_uncapped", (), "counts"),
    Claim("7.3", "DARE-I: mostly M < 70", _I, (), "counts"),
    *_above("7.3", "DARE-C: n = 32 above {}", _C, "dare_cql_uncapped", **_L),
    *_above("7.3", "DARE-I: no cap above {}", _I, "dare_iql_n32", **_L),
    *_above("7.4", "UTD 10: DARE-I above {}", _U, "pex_utd10", "edis_iql_utd10", **_UTD),
    *_above("7.5", "Gaussian fit steadier than {}", _C, "dare_cql_direct", kind="steadier"),
    *_above("7.6", "DARE-I above {}", _I, "dare_iql_no_guidance", "dare_iql_no_exchange"),
    *_above("App. C", "DARE-C smoother than {}", _C, "cal_ql", "edis_cql", kind="steadier"),
    *_above("App. C", "DARE-I smoother than {}", _I, "pex", "edis_iql", kind="steadier"),
    *_above("App. D", "DARE-C: n = 32 above {}", _C, "dare_cql_n16", **_L),
    *_above("App. E", "UTD 1, 0.1M steps: DARE-I above {}", _I, "pex", "edis_iql", **_UTD),
    *_above("Table 10", "UTD 10 above {}", _U, _I, **_UTD),
    *_above("App. F", "DARE-C above {}", _C, "dare_cql_no_guidance", "dare_cql_no_exchange", **_L),
    *_above("App. F", "DARE-I, locomotion: above {}", _I, "dare_iql_no_guidance",
            "dare_iql_no_exchange", **_L),
    *_above("App. G", "DARE-I above {}", _I, "dare_iv", **_L),
    *_above("App. G", "n = ∞ above n = 0, {}", _I, "dare_iql_no_exchange", **_L),
    *_above("App. G", "DARE-I varies less over seeds than {}", _I, "dare_iv", kind="spread", **_L),
]  # fmt: skip
NOTES = [
    "Of last-four means, paired by seed, over the tasks with two or more pairs; 95% interval, "
    "stratified by task: Student's t, but bootstraps for shares of tasks and deviations over "
    "seeds, too narrow if there are few seeds. seen: interval above 0; not seen: it has 0; "
    "opposite seen: below 0; not tested: no such runs.",
    "M < 70: of half batches of 128 rows, otherwise in proportion; labels drawn at random mostly "
    "stay below 70 too. Steadier, smoother: the mean change from one online evaluation of a run to "
    "the next is smaller.",
]


def verdict(interval: tuple[float, float]) -> str:
    """What an interval of (what the claim says is positive) shows."""
    low, high = interval
    return "seen" if low > 0 else "opposite seen" if high < 0 else "not seen"


def claims(runs: dict) -> Table:
    """What the paper says, against the records; claims without runs are only named."""
    rows, untested = [], []
    for claim in CLAIMS:
        strata, sizes = claim.evidence(runs)
        if not strata:
            untested.append(f"{claim.section} {claim.text}")
            continue
        kind = KINDS[claim.kind]
        interval, estimate = kind.interval(strata), float(kind.statistic(strata))
        cell = Cell(estimate, None, None, interval, sizes, kind.digits, signed=True)
        row = {"section": claim.section, "claim": claim.text, "tasks": len(strata)}
        row |= {"pairs": sum(map(len, strata)), "unit": kind.unit, "estimate": cell}
        rows.append(row | {"verdict": verdict(interval)})
    left = [f"Not tested, for there are no runs: {'; '.join(untested)}."] * bool(untested)
    return Table("The paper's claims", rows, NOTES + left)
