"""D4RL's v2 tasks on Gymnasium: `import d4rl_gymnasium as d4rl` registers their ids."""

from d4rl_gymnasium.data import DatasetError, dataset_path, get_dataset
from d4rl_gymnasium.envs import ResumableEnv, get_env_state, set_env_state
from d4rl_gymnasium.side_by_side import EvalEnvs, make_eval_envs
from d4rl_gymnasium.tasks import (
    TASKS,
    Task,
    get_normalized_score,
    register_task,
    register_tasks,
    task,
)
from d4rl_gymnasium.transitions import (
    episode_starts,
    qlearning_dataset,
    sequence_dataset,
)

__all__ = [
    "TASKS",
    "DatasetError",
    "EvalEnvs",
    "ResumableEnv",
    "Task",
    "dataset_path",
    "episode_starts",
    "get_dataset",
    "get_env_state",
    "get_normalized_score",
    "make_eval_envs",
    "qlearning_dataset",
    "register_task",
    "sequence_dataset",
    "set_env_state",
    "task",
]

register_tasks()
