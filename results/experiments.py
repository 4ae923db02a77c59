"""The experiments of grid.py as data: methods, tasks and seeds of the paper and of the study."""

import dataclasses
from dataclasses import dataclass

UTD10 = {"utd": 10, "online_iterations": 100_000}
METHODS = {  # name of the runs: script and settings
    "cql": ("cal_ql", {"calibrated": "false"}),
    "cal_ql": ("cal_ql", {}),
    "edis_cql": ("edis_cql", {}),
    "dare_cql": ("dare_cql", {}),
    "dare_cql_n16": ("dare_cql", {"max_exchange": 16}),
    "dare_cql_uncapped": ("dare_cql", {"max_exchange": "inf"}),
    "dare_cql_direct": ("dare_cql", {"exchange": "direct"}),
    "dare_cql_no_guidance": ("dare_cql", {"guidance_scale": 0}),
    "dare_cql_no_exchange": ("dare_cql", {"exchange": "none"}),
    "iql": ("iql", {}),
    "pex": ("pex", {}),
    "edis_iql": ("edis_iql", {}),
    "dare_iql": ("dare_iql", {}),
    "dare_iql_n16": ("dare_iql", {"max_exchange": 16}),
    "dare_iql_n32": ("dare_iql", {"max_exchange": 32}),
    "dare_iql_direct": ("dare_iql", {"exchange": "direct"}),
    "dare_iql_no_guidance": ("dare_iql", {"guidance_scale": 0}),
    "dare_iql_no_exchange": ("dare_iql", {"exchange": "none"}),
    "dare_iv": ("dare_iql", {"online_loss": "expectile"}),
    "pex_utd10": ("pex", UTD10),
    "edis_iql_utd10": ("edis_iql", UTD10),
    "dare_iql_utd10": ("dare_iql", UTD10),
    "dare_iql_resample": ("dare_iql", {"reference": "resample"}),
    "dare_iql_reference4": ("dare_iql", {"n_reference": 4}),
    "dare_iql_reference16": ("dare_iql", {"n_reference": 16}),
    "dare_iql_separated": ("dare_iql", {"exchange_when": "separated"}),
}
QUALITIES = "medium-expert", "medium-replay", "medium"
LOCOMOTION = [f"{x}-{q}-v2" for q in QUALITIES for x in ("halfcheetah", "hopper", "walker2d")]
MAZES = "medium-diverse", "medium-play", "umaze-diverse", "umaze"
ANTMAZE = [f"antmaze-{maze}-v2" for maze in MAZES]
TASKS = LOCOMOTION + ANTMAZE


@dataclass(frozen=True)
class Experiment:
    """Methods (names, spaces between) x tasks, with a configuration file a script and settings."""

    parts: list[tuple[str, list[str]]]
    configs: dict = dataclasses.field(default_factory=dict)
    settings: dict = dataclasses.field(default_factory=dict)
    task_settings: dict = dataclasses.field(default_factory=dict)  # by task, over the others
    seeds: tuple = (0, 1, 2, 3, 4)


CQL_GROUP, IQL_GROUP = "cql cal_ql edis_cql dare_cql", "iql pex edis_iql dare_iql"
CQL_CAPS = "dare_cql_n16 dare_cql dare_cql_uncapped"
UTD10_METHODS = "pex_utd10 edis_iql_utd10 dare_iql_utd10"
PARTS = {  # of the paper's tables and figures
    "table1": [(f"{CQL_GROUP} {IQL_GROUP}", TASKS)],
    "table2": [("dare_cql dare_cql_uncapped dare_iql_n32 dare_iql", LOCOMOTION)],
    "table3": [(UTD10_METHODS, LOCOMOTION[3:])],
    "table8": [("cql cal_ql iql", TASKS)],
    "table9": [(CQL_CAPS, LOCOMOTION)],
    "table10": [(f"pex edis_iql dare_iql {UTD10_METHODS}", LOCOMOTION[3:])],
    "table11": [("dare_iv dare_iql_no_exchange dare_iql", LOCOMOTION)],
    "fig1": [("dare_iql", ["halfcheetah-medium-v2"])],
    "fig2": [("dare_cql dare_cql_uncapped dare_iql", LOCOMOTION)],
    "fig3": [("dare_cql dare_cql_direct", TASKS)],
    "fig4": [("dare_iql dare_iql_no_guidance dare_iql_no_exchange", TASKS)],
    "fig5": [(CQL_GROUP, LOCOMOTION)],
    "fig6": [(CQL_GROUP, ANTMAZE)],
    "fig7": [(IQL_GROUP, LOCOMOTION)],
    "fig8": [(IQL_GROUP, ANTMAZE)],
    "fig9": [("dare_cql dare_cql_uncapped dare_iql", TASKS)],
    "fig10": [(CQL_CAPS, LOCOMOTION)],
    "fig11": [("dare_iql_n16 dare_iql_n32 dare_iql", LOCOMOTION)],
    "fig12": [(UTD10_METHODS, LOCOMOTION[3:])],
    "fig13": [("dare_cql dare_cql_no_guidance dare_cql_no_exchange", LOCOMOTION)],
    "fig14": [("dare_iql dare_iql_no_guidance dare_iql_no_exchange", LOCOMOTION)],
}
EXPERIMENTS = {name: Experiment(parts) for name, parts in PARTS.items()}
EXPERIMENTS["paper"] = Experiment([part for parts in PARTS.values() for part in parts])
STUDY_METHODS = """iql pex dare_iql dare_iql_no_guidance dare_iql_no_exchange dare_iql_direct
    dare_iv dare_iql_separated"""
STUDY_TASKS = """hopper-medium-replay-v2 hopper-medium-v2 walker2d-medium-v2 halfcheetah-medium-v2
    antmaze-umaze-v2""".split()
# 20,000 updates leave every seed at a success rate of 0 there, and 10 episodes are coarse.
MAZE_SIZES = {"offline_iterations": 60_000, "offline_eval_freq": 20_000, "n_episodes": 20}
EXPERIMENTS["study"] = Experiment(  # beyond the paper, at sizes for two CPU cores
    [
        (STUDY_METHODS, STUDY_TASKS),
        ("cal_ql dare_cql dare_iql_resample", [STUDY_TASKS[0], STUDY_TASKS[3]]),
        ("dare_iql_reference4 dare_iql_reference16", STUDY_TASKS[:1]),
    ],
    {
        "iql": "results/study.yaml",
        "pex": "results/study.yaml",
        "dare_iql": "results/study_dare.yaml",
        "cal_ql": "results/study_cql.yaml",
        "dare_cql": "results/study_dare_cql.yaml",
    },
    {"data": "regenerated"},
    {"antmaze-umaze-v2": MAZE_SIZES},
)
# Methods of whose offline agent, behavior model and support actions a preparing run is made; the
# others have to agree with one of them. A behavior model needs no trained agent.
PREPARING = {
    "offline": ("cql cal_ql iql", {"online_iterations": 0}),
    "behavior": (
        "dare_iql dare_cql dare_iql_resample",
        {"seed": 0, "offline_iterations": 0, "online_iterations": 0, "n_episodes": 1},
    ),
}
PREPARING["support"] = PREPARING["behavior"]
