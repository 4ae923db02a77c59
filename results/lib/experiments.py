"""Methods, tasks, and the experiments of the paper and beyond, as data."""

from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def words(text: str) -> list[str]:
    """A type of argparse: words with commas between."""
    return [word.strip() for word in text.split(",")]


ENDS = {"medium-expert": "ME", "medium-replay": "MR", "medium": "M"}
MAZES = {"medium-diverse": "MD", "medium-play": "MP", "umaze-diverse": "UD", "umaze": "U"}
ROBOTS = {"halfcheetah": "HC", "hopper": "H", "walker2d": "W2D"}
# Tasks in the paper's order, with their names in its tables.
LOCOMOTION = {f"{x}-{end}-v2": f"{ROBOTS[x]}-{ENDS[end]}" for end in ENDS for x in ROBOTS}
ANTMAZE = {f"antmaze-{maze}-v2": f"AM-{MAZES[maze]}" for maze in MAZES}
TASKS = LOCOMOTION | ANTMAZE
NO_EXPERT = list(LOCOMOTION)[3:]  # tasks of Tables 3 and 10


# What a script's scores are compared with, and whose offline agent it starts from; and the method
# that variants of DARE are compared with as well. Name your own script here.
BASELINES = dict.fromkeys(("iql", "pex", "edis_iql", "dare_iql"), "iql")
BASELINES |= dict.fromkeys(("cal_ql", "edis_cql", "dare_cql"), "cal_ql")
DARES = {"dare_iql": "dare_iql", "dare_cql": "dare_cql"}


@dataclass(frozen=True)
class Method:
    """What a run of this name is: a script with settings."""

    label: str  # in tables and figures
    color: str
    script: str
    settings: dict = field(default_factory=dict)
    offline: str | None = None  # whose offline agent it starts from, if not the baseline's

    @property
    def baseline(self) -> str | None:
        """What the method's scores are compared with."""
        return BASELINES.get(self.script)

    @property
    def dare(self) -> str | None:
        """What a variant's scores are compared with as well."""
        return DARES.get(self.script)

    @property
    def agent(self) -> str:
        """The method whose offline agent fine-tuning starts from."""
        return self.offline or self.baseline


UTD10 = {"utd": 10, "online_iterations": 100_000}
METHODS = {
    "iql": Method("IQL", "#999999", "iql"),
    "pex": Method("PEX", "#66AADD", "pex"),
    "edis_iql": Method("EDIS-I", "#225588", "edis_iql"),
    "dare_iql": Method("DARE-I", "#D55E00", "dare_iql"),
    "dare_iv": Method("DARE-IV", "#882255", "dare_iql", {"online_loss": "expectile"}),
    "dare_iql_n16": Method("DARE-I, n = 16", "#44AA99", "dare_iql", {"max_exchange": 16}),
    "dare_iql_n32": Method("DARE-I, n = 32", "#117733", "dare_iql", {"max_exchange": 32}),
    "dare_iql_direct": Method("DARE-I, direct", "#332288", "dare_iql", {"exchange": "direct"}),
    "dare_iql_no_guidance": Method("DARE-I, no guidance", "#DDAA33",
        "dare_iql", {"guidance_scale": 0}),
    "dare_iql_no_exchange": Method("DARE-I, no exchange", "#222222",
        "dare_iql", {"exchange": "none"}),
    "dare_iql_random": Method("DARE-I, random exchange", "#BBBB00",
        "dare_iql", {"exchange": "random"}),
    "dare_iql_resample": Method("DARE-I, resampled reference", "#661100",
        "dare_iql", {"reference": "resample"}),
    # The control: as many random rows as the scores would exchange.
    "dare_iql_resample_random": Method("DARE-I, resampled, random", "#CC6677",
        "dare_iql", {"reference": "resample", "exchange": "random"}),
    # Scores of the behavior alone, -log of its density smoothed by a Gaussian of covariance I.
    "dare_iql_resample_density": Method("DARE-I, unguided, 16 references", "#5566CC",
        "dare_iql", {"reference": "resample", "guidance_scale": 0, "n_reference": 16}),
    # One drawn action in Eq. 15, the default, where the other runs take the max of ten.
    "dare_iql_no_exchange_one_draw": Method("DARE-I, no exchange, one draw", "#777777",
        "dare_iql", {"exchange": "none", "n_max_actions": 1}),
    "dare_iql_resample_one_draw": Method("DARE-I, resampled, one draw", "#BB6655",
        "dare_iql", {"reference": "resample", "n_max_actions": 1}),
    # Other readings of what the paper leaves open in the online losses, without exchange.
    "dare_iql_no_exchange_alpha0": Method("no exchange, alpha 0 in Eq. 16", "#225588",
        "dare_iql", {"exchange": "none", "sac_alpha": 0}),
    "dare_iql_no_exchange_ten_draws": Method("no exchange, ten draws in Eq. 15", "#66AADD",
        "dare_iql", {"exchange": "none", "n_max_actions": 10}),
    "dare_iql_no_exchange_small_rate": Method("no exchange, policy's rate 3e-5", "#44AA99",
        "dare_iql", {"exchange": "none", "actor_lr": 0.00003}),
    "dare_iv_no_exchange": Method("no exchange, DARE-IV", "#882255",
        "dare_iql", {"exchange": "none", "online_loss": "expectile"}),
    # The policy's learning rate online, a tenth of Table 5's.
    "iql_small_rate": Method("IQL, 3e-5", "#555555", "iql", {"actor_lr": 0.00003}),
    "pex_utd10": Method("PEX, UTD = 10", "#4477AA", "pex", UTD10),
    "edis_iql_utd10": Method("EDIS-I, UTD = 10", "#114466", "edis_iql", UTD10),
    "dare_iql_utd10": Method("DARE-I, UTD = 10", "#BB4400", "dare_iql", UTD10),
    "cql": Method("CQL", "#999999", "cal_ql", {"calibrated": "false"}, offline="cql"),
    "cal_ql": Method("Cal-QL", "#66AADD", "cal_ql"),
    # R at the weight that it has in Eq. 14, on the offline-like half of a batch alone ...
    "cal_ql_alpha5": Method("Cal-QL, alpha 5 online", "#4477AA", "cal_ql", {"cql_alpha_online": 5}),
    "edis_cql": Method("EDIS-C", "#225588", "edis_cql"),
    "dare_cql": Method("DARE-C", "#AA3377", "dare_cql"),
    "dare_cql_n16": Method("DARE-C, n = 16", "#44AA99", "dare_cql", {"max_exchange": 16}),
    "dare_cql_uncapped": Method("DARE-C, n = ∞", "#999933", "dare_cql", {"max_exchange": 10**6}),
    "dare_cql_random": Method("DARE-C, random exchange", "#BBBB00",
        "dare_cql", {"exchange": "random"}),
    "dare_cql_direct": Method("DARE-C, direct", "#332288", "dare_cql", {"exchange": "direct"}),
    "dare_cql_no_guidance": Method("DARE-C, no guidance", "#DDAA33",
        "dare_cql", {"guidance_scale": 0}),
    "dare_cql_resample": Method("DARE-C, resampled reference", "#661100",
        "dare_cql", {"reference": "resample"}),
    "dare_cql_no_exchange": Method("DARE-C, no exchange", "#222222",
        "dare_cql", {"exchange": "none"}),
    # ... and on that half at the weight that it has in Cal-QL.
    "dare_cql_no_exchange_alpha20": Method("DARE-C, no exchange, alpha 20 online", "#777777",
        "dare_cql", {"exchange": "none", "cql_alpha_online": 20}),
}  # fmt: skip


def kind_of(name: str) -> str | None:
    """The longest key of METHODS that a run's name is or begins with; None if there is none."""
    found = [key for key in METHODS if name == key or name.startswith(key + "_")]
    return max(found, key=len, default=None)


def method_of(name: str) -> Method:
    """The method of a run's name: another name than those in METHODS is its own label."""
    if name in METHODS:
        return METHODS[name]
    kind = kind_of(name)
    return replace(METHODS[kind], label=name) if kind else Method(name, "#000000", "unknown")


# Ends the name of the run that fills the cache, where prepare_NAME trains an offline agent.
CACHE = "_cache"


@dataclass(frozen=True)
class Experiment:
    """Methods x tasks x seeds: the runs of a table or figure.

    Methods are names with spaces between; in a table of the paper each part is a group of columns.
    """

    title: str
    parts: list[tuple[str, list[str]]]
    seeds: tuple = (0, 1, 2, 3, 4)
    task_seeds: dict = field(default_factory=dict)  # by task, in their place
    configs: dict = field(default_factory=dict)  # configuration file by script
    settings: dict = field(default_factory=dict)  # of all runs
    task_settings: dict = field(default_factory=dict)  # by task, over the others
    until: int = 200_000  # online step whose scores a table has
    sums: bool = False  # a table's rows are sums over the three robots
    shows: str = "score"  # of figures: score, exchanged, sign or auc; differences: from DARE

    @property
    def methods(self) -> list[str]:
        """All methods, each once."""
        return list(dict.fromkeys(m for part, _ in self.parts for m in part.split()))

    @property
    def tasks(self) -> list[str]:
        """All tasks, each once."""
        return list(dict.fromkeys(task for _, tasks in self.parts for task in tasks))

    def seeds_of(self, env: str) -> tuple:
        """Seeds of the runs on a task."""
        return self.task_seeds.get(env, self.seeds)

    def has(self, method: str, env: str) -> bool:
        """Whether it runs this method on this task, with whatever seeds."""
        return any(method in part.split() and env in tasks for part, tasks in self.parts)

    def needs(self, name: str, env: str) -> bool:
        """Whether one of its runs starts from what prepare_NAME made."""
        methods = {m: METHODS[m] for m in self.methods if self.has(m, env)}
        name = name.removesuffix(CACHE)
        return any(name in (m, method.agent, method.script) for m, method in methods.items())


def _group(title: str, methods: str, tasks, **more) -> Experiment:
    """Methods with a bar between groups, all on the same tasks."""
    return Experiment(title, [(part, list(tasks)) for part in methods.split("|")], **more)


CQL_GROUP, IQL_GROUP = "cql cal_ql edis_cql dare_cql", "iql pex edis_iql dare_iql"
CQL_CAPS = "dare_cql_n16 dare_cql dare_cql_uncapped"
UTD10_GROUP = "edis_iql_utd10 pex_utd10 dare_iql_utd10"
CQL_ABLATION = "dare_cql_no_guidance dare_cql_no_exchange dare_cql"
IQL_ABLATION = "dare_iql_no_guidance dare_iql_no_exchange dare_iql"
UNCAPPED = "dare_cql dare_cql_uncapped|dare_iql"
PAPER_TABLES = {
    "table1": _group("Online fine-tuning", f"{CQL_GROUP}|{IQL_GROUP}", TASKS),
    "table2": _group("Maximum exchange n", "dare_cql dare_cql_uncapped|dare_iql_n32 dare_iql",
                     LOCOMOTION, sums=True),
    "table3": _group("Ten updates a step (UTD = 10)", UTD10_GROUP, NO_EXPERT, until=100_000),
    "table8": _group("Offline training, before fine-tuning", "cql cal_ql iql", TASKS, until=0),
    "table9": _group("Maximum exchange n of DARE-C", CQL_CAPS, LOCOMOTION, sums=True),
    "table10": _group("One and ten updates a step", f"pex edis_iql dare_iql|{UTD10_GROUP}",
                      NO_EXPERT, until=100_000),
    "table11": _group("Online losses of DARE-I", "dare_iv dare_iql_no_exchange dare_iql",
                      LOCOMOTION),
}  # fmt: skip
FIGURES = {
    "fig2": _group("Exchanged pairs, locomotion", UNCAPPED, LOCOMOTION, shows="exchanged"),
    "fig3": _group("Gaussian or direct exchange", "dare_cql_direct dare_cql", TASKS),
    "fig4": _group("Ablation of DARE-I", IQL_ABLATION, TASKS),
    "fig5": _group("CQL group, locomotion", CQL_GROUP, LOCOMOTION),
    "fig6": _group("CQL group, AntMaze", CQL_GROUP, ANTMAZE),
    "fig7": _group("IQL group, locomotion", IQL_GROUP, LOCOMOTION),
    "fig8": _group("IQL group, AntMaze", IQL_GROUP, ANTMAZE),
    "fig9": _group("Exchanged pairs", UNCAPPED, TASKS, shows="exchanged"),
    "fig10": _group("Maximum exchange n of DARE-C, 32 by default", CQL_CAPS, LOCOMOTION),
    "fig11": _group("Maximum exchange n of DARE-I, ∞ by default",
                    "dare_iql_n16 dare_iql_n32 dare_iql", LOCOMOTION),
    "fig12": _group("Ten updates a step", UTD10_GROUP, NO_EXPERT),
    "fig13": _group("Ablation of DARE-C, locomotion", CQL_ABLATION, LOCOMOTION),
    "fig14": _group("Ablation of DARE-I, locomotion", IQL_ABLATION, LOCOMOTION),
}  # fmt: skip
# Pictures beyond the paper, of whatever runs there are; those of differences are without these.
_UNDRAWN = """
    dare_iql_resample_density dare_iql_no_exchange_one_draw dare_iql_resample_one_draw
    dare_iql_no_exchange_alpha0 dare_iql_no_exchange_ten_draws dare_iql_no_exchange_small_rate
    dare_iv_no_exchange pex_utd10 edis_iql_utd10 dare_iql_utd10 dare_cql_no_exchange_alpha20
""".split()


def _drawn(baseline: str, dare: str) -> str:
    """Methods of a group in pictures of differences, DARE last."""
    group = [m for m in METHODS if METHODS[m].baseline == baseline and m not in _UNDRAWN]
    return " ".join(m for m in group if m != dare) + f" {dare}"


_CQL, _IQL = _drawn("cal_ql", "dare_cql"), _drawn("iql", "dare_iql")
_OWN = " ".join(k for k, m in METHODS.items() if m.dare and m.dare != m.script)  # own scripts
PICTURES = FIGURES | {
    "fig3-iql": _group("Gaussian or direct exchange", "dare_iql_direct dare_iql", TASKS),
    "sign": _group("Which half scores higher",
                   f"dare_cql|dare_iql_no_guidance dare_iql {_OWN}", TASKS, shows="sign"),
    "auc": _group("Do the scores tell the halves apart? 0.5: no",
                  "dare_cql|dare_iql_no_guidance dare_iql_random dare_iql_resample dare_iql"
                  f" {_OWN}", TASKS, shows="auc"),
    "differences-iql": _group("Last-four mean minus that of DARE-I, by seed", _IQL, TASKS,
                              shows="differences"),
    "differences-cql": _group("Last-four mean minus that of DARE-C, by seed", _CQL, TASKS,
                              shows="differences"),
}  # fmt: skip

FINETUNING = Experiment(
    "Fine-tuning on one policy's data, with small networks",
    [
        (methods, ["halfcheetah-medium-v2"])
        for methods in (
            f"iql pex {IQL_ABLATION} dare_iql_resample",  # in the picture
            "dare_iql_random iql_small_rate",
        )
    ],
    configs={
        "iql": "results/finetuning.yaml",
        "pex": "results/finetuning.yaml",
        "dare_iql": "results/finetuning_dare.yaml",
    },
    settings={"data": "regenerated"},
)
# A task whose behavior got better and better, so that an agent has more to gain.
FINETUNING_REPLAY = replace(
    FINETUNING,
    title="Fine-tuning from a replay buffer, with small networks",
    parts=[
        (methods, ["halfcheetah-medium-replay-v2"])
        for methods in (
            "iql dare_iql_no_exchange dare_iql_resample dare_iql_resample_random dare_iql",
            "dare_iql_no_exchange_one_draw dare_iql_resample_one_draw",
        )
    ],
    seeds=(0, 1, 2),
)
# Offline as REGENERATED, whose agents will do.
LONGER = {"offline_iterations": 200_000, "online_iterations": 50_000}
FULL_SIZE = replace(
    FINETUNING,
    title="Fine-tuning with networks of the published size",
    parts=[
        (
            "iql dare_iql_no_exchange dare_iql_resample dare_iql_resample_random dare_iql",
            [
                "antmaze-umaze-diverse-v2",
                "halfcheetah-medium-replay-v2",
                "hopper-medium-v2",
                "walker2d-medium-replay-v2",
            ],
        ),
        (
            "pex dare_iql_resample_density",
            ["hopper-medium-v2", "walker2d-medium-replay-v2", "antmaze-umaze-diverse-v2"],
        ),
    ],
    seeds=(0, 1, 2),
    configs={
        "iql": "results/full_size.yaml",
        "pex": "results/full_size.yaml",
        "dare_iql": "results/full_size_dare.yaml",
    },
    task_settings={
        "hopper-medium-v2": LONGER,
        "walker2d-medium-replay-v2": LONGER,
        "antmaze-umaze-diverse-v2": {"offline_iterations": 200_000, "n_episodes": 50},
    },
)
# Does it help to score by the behavior alone? And which reading of Eqs. 15 and 16 fine-tunes best
# (without exchange, so that it alone is seen)?
READINGS = replace(
    FULL_SIZE,
    title="Readings of what the paper leaves open, with networks of the published size",
    parts=[
        (
            methods,
            ["halfcheetah-medium-replay-v2", "hopper-medium-v2", "walker2d-medium-replay-v2"],
        )
        for methods in (
            "iql dare_iql_no_exchange dare_iql_resample dare_iql_resample_density",
            "dare_iql_no_exchange_alpha0 dare_iql_no_exchange_ten_draws"
            " dare_iql_no_exchange_small_rate dare_iv_no_exchange iql_small_rate",
        )
    ],
    task_seeds={"halfcheetah-medium-replay-v2": (4, 5)},
    task_settings={
        "hopper-medium-v2": {"offline_iterations": 200_000},
        "walker2d-medium-replay-v2": {"offline_iterations": 200_000},
    },
)
# Does the gain of an exchange last and grow? On data of many policies, and of one.
LONGER_RUNS = replace(
    FULL_SIZE,
    title="Twice the online steps on halfcheetah, with networks of the published size",
    parts=[
        (
            "iql dare_iql_no_exchange dare_iql_resample_random dare_iql_resample dare_iql",
            ["halfcheetah-medium-replay-v2", "halfcheetah-medium-v2"],
        )
    ],
    seeds=(6, 7, 8),
    settings={"data": "regenerated", "online_iterations": 50_000},
    task_settings={},
)
FINETUNING_CQL = replace(
    FINETUNING,
    title="Fine-tuning of the CQL group, with small networks",
    parts=[
        (
            "cal_ql dare_cql_no_exchange dare_cql_random dare_cql",
            ["halfcheetah-medium-replay-v2", "halfcheetah-medium-v2"],
        ),
        (
            "cal_ql_alpha5 dare_cql_no_exchange_alpha20 dare_cql_resample",
            ["halfcheetah-medium-replay-v2"],
        ),
    ],
    seeds=(0, 1, 2),
    configs={
        "cal_ql": "results/finetuning_cql.yaml",
        "dare_cql": "results/finetuning_dare_cql.yaml",
    },
)
# Is an agent trained on regenerated data about as good as a published one?
REGENERATED = _group(
    "IQL offline on regenerated data, 200,000 updates, networks of the published size", "iql",
    ["hopper-medium-v2", "walker2d-medium-replay-v2", "halfcheetah-medium-v2",
     "antmaze-umaze-diverse-v2"],
    seeds=(0, 1, 2), until=0,
    settings={"data": "regenerated", "offline_iterations": 200_000, "online_iterations": 0},
)  # fmt: skip
EXPERIMENTS = PAPER_TABLES | FIGURES
EXPERIMENTS["fig1"] = _group("Distribution shift of one run", "dare_iql", ["halfcheetah-medium-v2"])
EXPERIMENTS["paper"] = Experiment("All", [part for x in EXPERIMENTS.values() for part in x.parts])
EXPERIMENTS["finetuning"] = FINETUNING
EXPERIMENTS["finetuning_replay"] = FINETUNING_REPLAY
EXPERIMENTS["finetuning_cql"] = FINETUNING_CQL
EXPERIMENTS["full_size"] = FULL_SIZE
EXPERIMENTS["longer"] = LONGER_RUNS
EXPERIMENTS["readings"] = READINGS
EXPERIMENTS["regenerated"] = REGENERATED
PICTURES["full_size"] = replace(
    FULL_SIZE,
    parts=[("iql pex dare_iql_no_exchange dare_iql_resample_random dare_iql", FULL_SIZE.tasks)],
)
PICTURES["longer"] = LONGER_RUNS
PICTURES["finetuning_cql"] = replace(
    FINETUNING_CQL,
    parts=[
        ("cal_ql cal_ql_alpha5 dare_cql_no_exchange dare_cql_random dare_cql", FINETUNING_CQL.tasks)
    ],
)
PICTURES["finetuning_replay"] = replace(FINETUNING_REPLAY, parts=FINETUNING_REPLAY.parts[:1])
PICTURES["finetuning"] = replace(FINETUNING, parts=FINETUNING.parts[:1])
