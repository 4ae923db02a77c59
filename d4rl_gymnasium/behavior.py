"""The small stochastic policies that make `regenerated` data: their file format and their use."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# The range in which the SAC actors were trained to give their log standard deviation.
_LOG_STD_RANGE = (-20.0, 2.0)
_SCALARS = ("env_steps", "return_mean", "return_std", "normalized_score")
_ARRAYS = ("w0", "b0", "w1", "b1", "w_mean", "b_mean", "w_log_std", "b_log_std")


@dataclass
class BehaviorPolicy:
    """A tanh-Gaussian policy: two ReLU layers, then a mean and a log standard deviation.

    `weights` holds `_ARRAYS`, matrices as (inputs, outputs). The other fields describe the
    policy as it acts with noise: steps it was trained for, its episode returns, D4RL's score.
    """

    weights: dict
    env_steps: int = 0
    return_mean: float = np.nan
    return_std: float = np.nan
    normalized_score: float = np.nan

    @classmethod
    def load(cls, path):
        """Reads a policy from an .npz file; the matrices come back as float32."""
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in (*_ARRAYS, *_SCALARS) if name not in file]
            if missing:
                raise ValueError(f"{path} is no behavior policy: it lacks {', '.join(missing)}")
            weights = {name: file[name].astype(np.float32) for name in _ARRAYS}
            return cls(weights, **{name: file[name].item() for name in _SCALARS})

    def save(self, path):
        """Writes the policy as an .npz file of float16 matrices and float64 scalars."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        with open(partial, "wb") as file:
            arrays = {name: value.astype(np.float16) for name, value in self.weights.items()}
            np.savez_compressed(file, **arrays, **{name: getattr(self, name) for name in _SCALARS})
        os.replace(partial, path)

    def act(self, observation, rng=None):
        """Returns actions in [-1, 1] of shape (..., A) for observations of shape (..., S).

        With a `numpy.random.Generator` the action is drawn, without one it is the tanh of the mean.
        """
        w = self.weights
        hidden = np.maximum(observation.astype(np.float32) @ w["w0"] + w["b0"], 0.0)
        hidden = np.maximum(hidden @ w["w1"] + w["b1"], 0.0)
        action = hidden @ w["w_mean"] + w["b_mean"]
        if rng is not None:
            log_std = hidden @ w["w_log_std"] + w["b_log_std"]
            std = np.exp(np.minimum(np.maximum(log_std, _LOG_STD_RANGE[0]), _LOG_STD_RANGE[1]))
            action = action + std * rng.standard_normal(action.shape, dtype=np.float32)
        return np.tanh(action)
