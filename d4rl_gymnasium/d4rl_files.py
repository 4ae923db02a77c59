"""What is publicly known of D4RL's own files: `assets/d4rl.json`, with a source for each figure.

Quantiles of the returns are not: the figures are sizes, means, standard deviations and extremes.
"""

import json

from d4rl_gymnasium.envs import ASSETS
from d4rl_gymnasium.tasks import task

_KNOWN = json.loads((ASSETS / "d4rl.json").read_text())
SOURCES = _KNOWN["sources"]
FILES = _KNOWN["files"]


def known_of(env_id):
    """The figures known of D4RL's file of a task, by the names of a row of `report.row`.

    transitions, episodes, "length mean" (steps), "return mean", "return std", "return 0%" (the
    smallest), "return 100%" and, of AntMaze, "rewarded", the share of rewarded rows. A name is
    missing where nothing is known, as of a task that is not D4RL's. An unknown task id is a
    ValueError.
    """
    return {name: figure for name, (figure, _) in FILES.get(task(env_id).env_id, {}).items()}
