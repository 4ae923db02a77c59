"""What the D4RL environments share: the original masses, the control step, the complete state."""

import json
import math
import warnings
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.spaces import Box

ASSETS = Path(__file__).parent / "assets"
# The one release that reproduces the recorded transitions of the original environments.
EXACT_MUJOCO = "3.2.6"
_PHYSICS = json.loads((ASSETS / "physics.json").read_text())
_warned_about_mujoco = False


def warn_unless_exact_mujoco():
    """Warns, once in a process, when the installed MuJoCo is not the exact one."""
    global _warned_about_mujoco
    if mujoco.__version__ == EXACT_MUJOCO or _warned_about_mujoco:
        return
    _warned_about_mujoco = True
    warnings.warn(
        f"MuJoCo {mujoco.__version__} is loaded, D4RL's physics is exact with {EXACT_MUJOCO} only: "
        "3.2.7 changed the contacts of capsules and boxes (AntMaze walls), 3.5.0 the RK4 "
        f"integrator (Hopper, Walker2d, Ant). For exact physics: pip install mujoco=={EXACT_MUJOCO}",
        stacklevel=2,
    )


def set_original_masses(model, robot):
    """Puts MuJoCo 2.0's masses and inertias on the bodies of `robot` in a compiled `model`.

    MuJoCo 2.0 took a capsule's volume for pi r^2 (L + r), later ones take pi r^2 (L + 4r/3), so
    today's compiler cannot derive the numbers that made the D4RL data. Bodies beyond the robot's
    (maze walls) keep theirs.
    """
    physics = _PHYSICS[robot]
    n_bodies = len(physics["body_mass"])
    for field, values in physics.items():
        getattr(model, field)[:n_bodies] = values
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
            raise ValueError(f"the action has a NaN: {action}")
        self.data.ctrl[:] = control
        mujoco.mj_step(self.model, self.data, nstep=self.frame_skip)
        return effort
