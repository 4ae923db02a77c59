"""What the D4RL environments share: the original masses, the control step, the complete state."""

import functools
import json
import math
import os
import sys
import warnings
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.spaces import Box
from gymnasium.utils import RecordConstructorArgs
from gymnasium.wrappers import (
    OrderEnforcing,
    PassiveEnvChecker,
    TimeLimit,
    TransformAction,
    TransformObservation,
    TransformReward,
)

ASSETS = Path(__file__).parent / "assets"
# The one release that reproduces the recorded transitions of the original environments.
EXACT_MUJOCO = "3.2.6"
# Earlier releases of Gymnasium insist on exactly these four.
RENDER_MODES = ["human", "rgb_array", "depth_array", "rgbd_tuple"]
_PHYSICS = json.loads((ASSETS / "physics.json").read_text())
# Everything that a step depends on, the solver's warm start included.
_INTEGRATION_STATE = mujoco.mjtState.mjSTATE_INTEGRATION


@functools.cache
def warn_unless_exact_mujoco():
    """Warns, once in a process, when the installed MuJoCo is not the exact one."""
    if mujoco.__version__ == EXACT_MUJOCO:
        return
    warnings.warn(
        f"MuJoCo {mujoco.__version__} is loaded, but D4RL's physics is exact with {EXACT_MUJOCO} "
        "only: 3.2.7 changed the contacts of capsules and boxes (AntMaze's walls), 3.5.0 the RK4 "
        "integrator (Hopper, Walker2d, Ant); results may differ from published ones. "
        f"For the exact physics: pip install mujoco=={EXACT_MUJOCO}",
        stacklevel=2,
    )


def _require_renderer(render_mode):
    """Raises a RuntimeError where Gymnasium would abort the process or fail obscurely."""
    headless = sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if render_mode is None or not headless:
        return
    if render_mode == "human":
        raise RuntimeError("render_mode='human' needs a display: use render_mode='rgb_array'")
    if "MUJOCO_GL" not in os.environ:
        raise RuntimeError(
            "rendering without a display needs the environment variable MUJOCO_GL=egl (or osmesa), "
            "set before Python starts"
        )


def set_original_masses(model, robot):
    """Puts MuJoCo 2.0's masses and inertias on the bodies of `robot` in a compiled `model`.

    MuJoCo 2.0 took a capsule's volume for pi r^2 (L + r), later ones take pi r^2 (L + 4r/3), so
    today's compiler cannot derive the numbers that made the D4RL data.
    """
    for field, values in _PHYSICS[robot].items():
        getattr(model, field)[:] = values
    # The inverse weights of bodies and joints, which contacts use, follow from the masses.
    mujoco.mj_setConst(model, mujoco.MjData(model))


class D4RLEnv(MujocoEnv):
    """Base of the D4RL tasks: actions in [-1, 1], clipped as D4RL's action wrapper does.

    A subclass sets `robot`, `xml`, `n_substeps` and `observation_size`, and `metadata` with
    the frame rate; it defines `step` and `reset_model`.
    """

    robot: str
    xml: str
    n_substeps: int
    observation_size: int
    camera: dict

    def __init__(self, render_mode=None, **renderer_options):
        warn_unless_exact_mujoco()
        _require_renderer(render_mode)
        bound = np.full(self.observation_size, np.inf)
        super().__init__(
            self.xml,
            self.n_substeps,
            Box(-bound, bound, dtype=np.float64),
            render_mode,
            default_camera_config=self.camera,
            **renderer_options,
        )

    def _initialize_simulation(self):
        model, data = super()._initialize_simulation()
        set_original_masses(model, self.robot)
        return model, data

    def _simulate(self, action):
        """Advances one environment step; returns the sum of squares of the clipped action."""
        # minimum and maximum take a third of np.clip's time on a handful of numbers.
        control = np.minimum(np.maximum(action, -1.0), 1.0)
        if control.shape != (self.model.nu,):
            raise ValueError(f"the action has shape {control.shape}, not ({self.model.nu},)")
        effort = float(control @ control)
        if math.isnan(effort):
            raise FloatingPointError(f"the action has a NaN: {action}")
        self.data.ctrl[:] = control
        mujoco.mj_step(self.model, self.data, nstep=self.frame_skip)
        return effort

    def task_state(self):
        """What the task remembers beside the simulator's state, as plain Python values."""
        return {}

    def set_task_state(self, state):
        """Takes a dictionary that `task_state` made."""


class OfflineEnv(gymnasium.Wrapper, RecordConstructorArgs):
    """What D4RL's environments have beside Gymnasium's methods, around each task's environment."""

    def __init__(self, env):
        RecordConstructorArgs.__init__(self)
        gymnasium.Wrapper.__init__(self, env)

    def get_dataset(self, h5path=None):
        """The task's data set, D4RL's or that of the file `h5path`; see `get_dataset`."""
        from d4rl_gymnasium.data import get_dataset

        return get_dataset(self, h5path or "d4rl")

    def get_normalized_score(self, score):
        """A return as a fraction of the reference scores; see `get_normalized_score`."""
        from d4rl_gymnasium.tasks import get_normalized_score

        return get_normalized_score(self.spec.id, score)


_STATELESS_WRAPPERS = (
    OfflineEnv, PassiveEnvChecker, TransformAction, TransformObservation, TransformReward
)  # fmt: skip


def _wrapper_states(env):
    """Yields the stateful wrappers, outermost first, with the name of their changing attribute."""
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, TimeLimit):
            yield env, "_elapsed_steps"
        elif isinstance(env, OrderEnforcing):
            yield env, "_has_reset"
        elif not isinstance(env, _STATELESS_WRAPPERS):
            raise ValueError(
                f"the state of the wrapper {type(env).__name__} cannot be saved or restored; "
                "put it around the environment only where no resuming is needed"
            )
        env = env.env


# Where the bodies were when the last substep began. Ant-v5 and Humanoid-v5 take it for their place
# before a step, and mj_forward would move it on.
_BEHIND = ("xpos", "xipos")


def get_env_state(env):
    """Returns the complete state of a MuJoCo environment as plain Python values.

    `env` may be wrapped as `gymnasium.make` does, and by wrappers that only transform
    observations, actions or rewards; any other wrapper or simulator is a ValueError. The
    dictionary holds numbers, strings, lists and dictionaries, so `torch.load(weights_only=True)`
    reads it back.
    """
    base = env.unwrapped
    if not isinstance(base, MujocoEnv):
        raise ValueError(f"the state of {env.spec.id} cannot be saved: it is no MuJoCo environment")
    physics = np.empty(mujoco.mj_stateSize(base.model, _INTEGRATION_STATE))
    mujoco.mj_getState(base.model, base.data, physics, _INTEGRATION_STATE)
    return {
        "env_id": env.spec.id,
        "physics": physics.tolist(),
        "behind": {name: getattr(base.data, name).tolist() for name in _BEHIND},
        # By this method an environment reports what else it remembers.
        "task": base.task_state() if hasattr(base, "task_state") else {},
        "np_random": base.np_random.bit_generator.state,
        "action_space_np_random": base.action_space.np_random.bit_generator.state,
        "wrappers": [getattr(wrapper, name) for wrapper, name in _wrapper_states(env)],
    }


def set_env_state(env, state):
    """Puts `env` into a state of `get_env_state`: it then continues bit for bit as that one did.

    Raises a ValueError when `env` is another task or wrapped differently.
    """
    wrappers = list(_wrapper_states(env))
    if env.spec.id != state["env_id"] or len(wrappers) != len(state["wrappers"]):
        raise ValueError(
            f"the state is one of {state['env_id']} with {len(state['wrappers'])} stateful "
            f"wrappers, the environment is {env.spec.id} with {len(wrappers)}"
        )
    # The checks that Gymnasium wraps around an environment want a reset before the first step;
    # everything that it draws is overwritten below.
    env.reset()
    base = env.unwrapped
    physics = np.array(state["physics"])
    mujoco.mj_setState(base.model, base.data, physics, _INTEGRATION_STATE)
    # Rendering needs the body positions; the second call undoes what mj_forward does to the state.
    mujoco.mj_forward(base.model, base.data)
    mujoco.mj_setState(base.model, base.data, physics, _INTEGRATION_STATE)
    for name, value in state.get("behind", {}).items():  # older states have none
        getattr(base.data, name)[:] = value
    if hasattr(base, "task_state"):
        base.set_task_state(state["task"])
    base.np_random.bit_generator.state = state["np_random"]
    base.action_space.np_random.bit_generator.state = state["action_space_np_random"]
    for (wrapper, name), value in zip(wrappers, state["wrappers"], strict=True):
        setattr(wrapper, name, value)


class ResumableEnv(gymnasium.Wrapper):
    """An environment that a checkpoint can hold: it continues bit for bit from its `state_dict`.

    `last_observation` is what the last reset or step gave: the observation to act on next. The
    environment is one that `get_env_state` can save. Make it the outermost wrapper.
    """

    last_observation = None

    def reset(self, **kwargs):
        """Start an episode; see `gymnasium.Env.reset`."""
        self.last_observation, info = self.env.reset(**kwargs)
        return self.last_observation, info

    def step(self, action):
        """Act once; see `gymnasium.Env.step`."""
        self.last_observation, *rest = self.env.step(action)
        return self.last_observation, *rest

    def state_dict(self):
        """Return the state as plain Python values, once the environment has been reset."""
        return {
            "env": get_env_state(self.env),
            "last_observation": np.asarray(self.last_observation).tolist(),
        }

    def load_state_dict(self, state):
        """Go on from a state of `state_dict`; a ValueError where it is one of another task."""
        set_env_state(self.env, state["env"])
        dtype = self.observation_space.dtype
        self.last_observation = np.array(state["last_observation"], dtype)
