"""D4RL's v2 tasks on Gymnasium: `import d4rl_gymnasium as d4rl` registers their ids."""

from d4rl_gymnasium.tasks import TASKS, Task, get_normalized_score, register_tasks, task

__all__ = ["TASKS", "Task", "get_normalized_score", "task"]

register_tasks()
