"""DARE-I, offline then online: python algorithms/dare_iql.py --env antmaze-umaze-v2

DARE (Dynamic Alignment for RElease) is Algorithm 1 with Eqs. 5 to 10, 15 and 16 on implicit
Q-learning: this file is algorithms/iql.py plus what is marked `# DARE`.

IQL is Kostrikov et al. (2021). Online, each batch is half offline data and half online data, as
in PEX (Zhang et al., 2023). Equation and table numbers are the DARE paper's.
"""

import csv
import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import pyrallis
import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml
from filelock import FileLock
from tqdm import tqdm

import d4rl_gymnasium as d4rl
from diffusion import (  # DARE
    BehaviorModel,
    EnergyModel,
    draw_support_actions,
    energy_loss,
    guided_noise,
    sample_actions,
    train_behavior,
)

# --- Config ---


@dataclass
class Config:
    """All settings. Defaults are the paper's for locomotion; PRESETS has what differs by task."""

    env: str = "antmaze-umaze-v2"  # D4RL task id
    data: str = "d4rl"  # d4rl (cache or download), regenerated, minari:ID, or path of an HDF5 file
    regenerated_size: int = 200_000  # transitions that --data regenerated collects
    seed: int = 0  # seeds networks, batches, exploration and the training environment
    device: str = "auto"  # auto, cpu or cuda
    compile: bool = False  # compile losses and sampler: a minute at first; needs a C++ compiler
    cuda_graph: bool = True  # on CUDA, replay each update as one graph (no effect on a CPU)
    precision: str = "fp32"  # of the networks' products: fp32, bf16 or auto (bf16 if faster)
    threads: int = 1  # CPU threads: one per run, as two runs beat two threads; 0 takes all cores
    runs_dir: str = "runs"  # a run writes <runs_dir>/<name>/<env>/seed_<seed>/
    name: str = Path(__file__).stem  # name of the method; rename a variant to keep it apart
    wandb: str = "auto"  # online, offline, disabled; auto is online when logged in, else offline
    project: str = "DARE"  # wandb project

    offline_iterations: int = 1_000_000  # offline updates (Sec. 7.1)
    online_iterations: int = 200_000  # online environment steps (Sec. 7.1)
    initial_collection_steps: int = 5_000  # first online steps, without updates (PEX)
    utd: int = 1  # online updates per environment step (Sec. 7.4)
    batch_size: int = 256  # Table 5
    mixing_ratio: float = 0.5  # offline share of an online batch (PEX, Cal-QL)
    discount: float = 0.99  # gamma, Table 5
    tau: float = 0.005  # target update rate, Table 5
    iql_tau: float = 0.7  # expectile of Eq. 2, Table 5 (AntMaze: 0.9)
    beta: float = 3.0  # inverse temperature of Eq. 4, Table 5 (AntMaze: 10)
    qf_lr: float = 3e-4  # learning rate of Q, Table 5
    vf_lr: float = 3e-4  # learning rate of V, Table 5
    actor_lr: float = 3e-4  # learning rate of the policy, Table 5; cosine decay offline
    hidden_dim: int = 256  # hidden units per layer, Table 5
    n_hidden: int = 2  # hidden layers, Table 5
    normalize_reward: bool = False  # AntMaze: r - 1 (PEX); locomotion: 1000 r / range of returns

    eval_freq: int = 10_000  # online steps between evaluations
    offline_eval_freq: int = 50_000  # offline updates between evaluations
    n_episodes: int = 10  # episodes of an evaluation (AntMaze: 100)
    eval_seed: int = 42  # seeds the evaluation environments, the same at each evaluation
    log_freq: int = 1_000  # steps between rows of train.csv; each is a mean over them
    checkpoint_freq: int = 10_000  # steps between checkpoints

    exchange: str = "gaussian"  # DARE: gaussian (Eqs. 8 to 10), direct (Sec. 7.5) or none
    max_exchange: float = math.inf  # n of Eq. 10, App. B.1
    exchange_when: str = "always"  # or separated: only if mu_off < mu_on (beyond the paper)
    online_loss: str = "sac"  # on online-like rows: sac (Eqs. 15, 16), expectile (Eq. 35) or none
    sac_alpha: float = 0.2  # entropy coefficient of Eq. 16, App. B.1 (AntMaze: 0.01)
    n_max_actions: int = 10  # actions under the max of Eq. 15 (Cal-QL's max-target backup)
    online_expectile: float = 0.99  # expectile of online-like rows in Eq. 35
    align: str = "gaussian_kl"  # reading of Eq. 7: gaussian_kl or softmax_kl
    n_reference: int = 1  # reference actions per state
    reference: str = "guided"  # guided sampling (Eq. 6), or resample K support actions by Q
    guidance_scale: float = 3.0  # s, Table 7 by task; 0 is the ablation of Sec. 7.6
    diffusion_steps: int = 10  # solver steps of a reference action (CEP: 15 of a coarser solver)
    behavior_seed: int = 0  # seeds the behavior model; one model serves every --seed
    behavior_iterations: int = 600_000  # updates of the behavior model, App. B.5
    behavior_batch_size: int = 4096  # App. B.5
    behavior_lr: float = 1e-4  # App. B.5
    behavior_width: int = 512  # widest layer of the behavior model (CEP)
    n_support: int = 16  # K, support actions per state of Eq. 34 (AntMaze: 32)
    n_support_states: int = 0  # dataset states that get support actions; 0 (and resample) is all
    energy_hidden: int = 256  # hidden units of f_phi, App. B.5
    energy_beta: float = 3.0  # beta_E of Eq. 34 (CEP)
    energy_normalize: bool = True  # divide Q by the running mean of its spread over K actions
    energy_iterations: int = 10_000  # updates of f_phi on the offline Q before the first exchange
    energy_batch_size: int = 256  # states of an energy batch, App. B.5
    energy_lr: float = 3e-4  # App. B.5

    def __post_init__(self):
        """Refuse impossible values."""
        if self.env not in d4rl.TASKS:
            near = difflib.get_close_matches(self.env, d4rl.TASKS, n=3, cutoff=0)
            raise ValueError(f"unknown env {self.env!r}; the nearest are {', '.join(near)}")
        for field, value in vars(self).items():
            if field in CHOICES and value not in CHOICES[field]:
                raise ValueError(f"{field} must be one of {CHOICES[field]}, got {value!r}")
            low, high = LOWEST.get(field, 0), 1 if field in FRACTIONS else math.inf
            if not isinstance(value, str) and not low <= value <= high:
                raise ValueError(f"{field} must be in [{low}, {high}], got {value}")
        if not 0 < self.n_offline < self.batch_size:
            raise ValueError(f"mixing_ratio {self.mixing_ratio} leaves a half of the batch empty")

    @property
    def n_offline(self) -> int:
        """Rows of an online batch that come from the offline data; they stand first."""
        return round(self.batch_size * self.mixing_ratio)


CHOICES = {
    "wandb": ["auto", "online", "offline", "disabled"],
    "device": ["auto", "cpu", "cuda"],
    "precision": ["auto", "fp32", "bf16"],
}
FRACTIONS = ["mixing_ratio", "discount", "tau", "iql_tau"]
LOWEST = """regenerated_size initial_collection_steps utd batch_size hidden_dim n_hidden eval_freq
    offline_eval_freq n_episodes log_freq checkpoint_freq"""
LOWEST = dict.fromkeys(LOWEST.split(), 1)
PRESETS = {  # by task family, then by task
    "locomotion": {},
    "antmaze": {"iql_tau": 0.9, "beta": 10.0, "normalize_reward": True, "n_episodes": 100},
}
# What an offline agent depends on besides the data: the key of its cache.
OFFLINE_METHOD = "iql"
OFFLINE_FIELDS = """env seed precision offline_iterations batch_size discount tau
    iql_tau beta qf_lr vf_lr actor_lr hidden_dim n_hidden normalize_reward
    offline_eval_freq n_episodes eval_seed""".split()
CSV_COLUMNS = {
    "eval": ["phase", "step", "return_mean", "return_std", "normalized_score", "success_rate"],
    "train": ["phase", "step", "steps_per_second", "value_loss", "q_loss", "actor_loss", "q", "v"],
}
PANELS = {"q": "mean target Q"}  # columns of train.csv shown in the bar and under the curve

# DARE: App. B.1 and Table 7; the fields that the behavior model depends on; its columns
PRESETS["antmaze"] |= {"sac_alpha": 0.01, "n_support": 32}
GUIDANCE_SCALE = {
    "walker2d-medium-expert-v2": 5.0,
    "halfcheetah-medium-expert-v2": 3.0,
    "hopper-medium-expert-v2": 2.0,
    "walker2d-medium-replay-v2": 5.0,
    "halfcheetah-medium-replay-v2": 8.0,
    "hopper-medium-replay-v2": 3.0,
    "walker2d-medium-v2": 10.0,
    "halfcheetah-medium-v2": 10.0,
    "hopper-medium-v2": 8.0,
    "antmaze-umaze-v2": 3.0,
    "antmaze-medium-play-v2": 4.0,
    "antmaze-umaze-diverse-v2": 1.0,
    "antmaze-medium-diverse-v2": 3.0,
}
PRESETS |= {env: {"guidance_scale": scale} for env, scale in GUIDANCE_SCALE.items()}
CHOICES |= {
    "exchange": ["gaussian", "direct", "none"],
    "exchange_when": ["always", "separated"],
    "online_loss": ["sac", "expectile", "none"],
    "align": ["gaussian_kl", "softmax_kl"],
    "reference": ["guided", "resample"],
}
FRACTIONS += ["online_expectile"]
LOWEST |= {"n_support": 2, "behavior_width": 4, "energy_hidden": 1, "energy_batch_size": 2}
LOWEST |= dict.fromkeys("n_max_actions n_reference diffusion_steps behavior_batch_size".split(), 1)
BEHAVIOR_FIELDS = """env precision behavior_seed behavior_iterations behavior_batch_size
    behavior_lr behavior_width""".split()
SUPPORT_FIELDS = [*BEHAVIOR_FIELDS, "n_support", "n_support_states", "diffusion_steps"]
SCORE_COLUMNS = ["exchanged", "tau", "mu_offline", "mu_online", "sigma_offline", "sigma_online"]
CSV_COLUMNS["train"] += [*SCORE_COLUMNS, "energy_loss"]
PANELS |= {"exchanged": "pairs exchanged"}


class Parser(pyrallis.argparsing.ArgumentParser):
    """Command line over --config_path over PRESETS over defaults; an error ends in one line."""

    def error(self, message):
        """Exit with one line."""
        sys.exit("error: " + " ".join(f"{message}; see --help".split()))

    def set_dataclass(self, dataclass):
        """Add the flags; pyrallis would parse this file anew for the comment of each of them."""
        with patch("inspect.getsource", functools.cache(inspect.getsource)):
            super().set_dataclass(dataclass)

    def _postprocessing(self, parsed):
        values, kinds = vars(parsed), {f.name: f.type for f in dataclasses.fields(Config)}
        try:
            if path := values.pop("config_path", None):
                values = {**yaml.safe_load(Path(path).read_text()), **values}
            if unknown := set(values) - set(kinds):
                raise ValueError(f"{path} has no such setting: {', '.join(sorted(unknown))}")
            values = {k: convert(k, kinds[k], v) for k, v in values.items()}
            return Config(**{**preset(values.get("env", Config.env)), **values})
        except (OSError, ValueError, TypeError, yaml.YAMLError) as e:
            self.error(e)


def convert(field: str, kind: type, value):
    """Text or a YAML value as `kind`, strictly: 2.5 is no int and 'maybe' no bool."""
    try:
        if value is None:
            raise ValueError
        text = str(value)
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise ValueError(f"{field} takes a value of type {kind.__name__}, got {value!r}") from None


def preset(env: str) -> dict:
    """Settings in which a task differs from the defaults."""
    family = "antmaze" if env.startswith("antmaze") else "locomotion"
    return {**PRESETS[family], **PRESETS.get(env, {})}


# --- Data and buffers ---


class Batch(NamedTuple):
    """Transitions: observations [B, S], actions [B, A], rewards [B], ..., terminals [B]."""

    observations: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    next_observations: torch.Tensor
    terminals: torch.Tensor


class ReplayBuffer:
    """Transitions as the rows of one tensor on the training device."""

    def __init__(self, state_dim: int, action_dim: int, capacity: int, device):
        self.dims = state_dim, action_dim
        widths = {"observations": state_dim, "actions": action_dim, "next_observations": state_dim}
        self.widths = [widths.get(name, 1) for name in Batch._fields]
        self.rows = torch.empty(capacity, sum(self.widths), device=device)
        self.size = 0
        self.n_drawable = torch.zeros((), dtype=torch.int64, device=device)  # size, for sample

    def add(self, *transitions: np.ndarray):
        """Append the columns of a Batch, each with one row per transition."""
        columns = [np.asarray(x, np.float32).reshape(len(transitions[0]), -1) for x in transitions]
        rows = torch.from_numpy(np.concatenate(columns, 1))
        self.rows[self.size : self.size + len(rows)] = rows.to(self.rows.device)
        self.size += len(rows)
        self.n_drawable.fill_(self.size)

    def batch(self, rows: torch.Tensor) -> Batch:
        """Split rows [B, W] into their columns."""
        columns = zip(rows.split(self.widths, dim=-1), self.widths, strict=True)
        return Batch(*(x.squeeze(-1) if width == 1 else x for x, width in columns))

    def sample(self, batch_size: int) -> Batch:
        """Draw rows uniformly, with replacement."""
        # A size on the device, so that a recorded update draws from rows that come after it.
        draws = torch.randint(1 << 62, (batch_size,), device=self.rows.device)
        self.index = draws % self.n_drawable
        return self.batch(self.rows[self.index])

    def digest(self, width: int | None = None) -> str:
        """Fingerprint of the first columns of the data, or of all."""
        rows = self.rows[: self.size, :width].cpu().numpy()
        return hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest()

    def state_dict(self) -> dict:
        """Filled part only."""
        return {"rows": self.rows[: self.size].clone()}

    def load_state_dict(self, state: dict):
        """Inverse of state_dict."""
        self.size = len(state["rows"])
        self.rows[: self.size] = state["rows"]
        self.n_drawable.fill_(self.size)


def concatenate(first: Batch, second: Batch) -> Batch:
    """One batch of both halves, the first half's rows first."""
    return Batch(*map(torch.cat, zip(first, second, strict=True)))


def episode_starts(dataset: dict) -> np.ndarray:
    """First rows of the episodes: after a terminal and where the states do not join."""
    obs, next_obs = dataset["observations"], dataset["next_observations"]
    new_episode = np.ones(len(obs), bool)
    new_episode[1:] = dataset["terminals"][:-1] | (obs[1:] != next_obs[:-1]).any(1)
    return np.flatnonzero(new_episode)


def return_range(dataset: dict) -> float:
    """Difference of the largest and the smallest episode return of a dataset."""
    rewards = dataset["rewards"].astype(np.float64)
    returns = np.add.reduceat(rewards, episode_starts(dataset))
    return float(returns.max() - returns.min())


def reward_transform(dataset: dict, cfg: Config) -> tuple[float, float]:
    """Scale and bias of the rewards, the same for offline and online data."""
    if not cfg.normalize_reward:
        return 1.0, 0.0
    if d4rl.task(cfg.env).family == "antmaze":
        return 1.0, -1.0
    return 1000.0 / return_range(dataset), 0.0


# --- Networks ---


class MLP(nn.Module):
    """Linear layers of the given sizes with ReLU between them."""

    def __init__(self, dims: list[int], output_activation: nn.Module | None = None):
        super().__init__()
        layers = []
        for i in range(len(dims) - 1):
            layers += [nn.Linear(dims[i], dims[i + 1]), nn.ReLU()]
        layers[-1:] = [] if output_activation is None else [output_activation]
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        """Map [B, dims[0]] to [B, dims[-1]]."""
        return self.net(x).float()  # a product in bf16 ends here


class TwinQ(nn.Module):
    """Two Q functions."""

    def __init__(self, state_dim: int, action_dim: int, hidden_dim: int, n_hidden: int):
        super().__init__()
        dims = [state_dim + action_dim, *[hidden_dim] * n_hidden, 1]
        self.q1, self.q2 = MLP(dims), MLP(dims)

    def both(self, state, action):
        """Q1 and Q2, each [B]."""
        x = torch.cat([state, action], -1)
        return self.q1(x).squeeze(-1), self.q2(x).squeeze(-1)

    def forward(self, state, action):
        """Smaller of the two, [B]."""
        return torch.min(*self.both(state, action))


class ValueFunction(nn.Module):
    """V(s)."""

    def __init__(self, state_dim: int, hidden_dim: int, n_hidden: int):
        super().__init__()
        self.v = MLP([state_dim, *[hidden_dim] * n_hidden, 1])

    def forward(self, state):
        """V, [B]."""
        return self.v(state).squeeze(-1)


class GaussianPolicy(nn.Module):
    """Gaussian with a mean in [-1, 1] and one standard deviation per action dimension."""

    def __init__(self, state_dim: int, action_dim: int, hidden_dim: int, n_hidden: int):
        super().__init__()
        self.net = MLP([state_dim, *[hidden_dim] * n_hidden, action_dim], nn.Tanh())
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, state):
        """Mean [B, A] and log standard deviation [A]; its bounds are CORL's."""
        return self.net(state), self.log_std.clamp(-20.0, 2.0)

    def log_prob(self, state, action):
        """Log density of actions, [B]."""
        mean, log_std = self(state)
        z = (action - mean) * torch.exp(-log_std)
        return (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def sample(self, state, n: int = 1):
        """Draw n actions [n, B, A] within the action bounds, with their log densities [n, B]."""
        mean, log_std = self(state)
        z = torch.randn(n, *mean.shape, device=mean.device)
        log_prob = (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        return (mean + torch.exp(log_std) * z).clamp(-1.0, 1.0), log_prob


# --- Agent ---

EXP_ADV_MAX = 100.0  # bound of the weights of Eq. 4 (IQL's authors)


class ImplicitQLearning:
    """Networks, their losses and one update step."""

    def __init__(self, state_dim: int, action_dim: int, cfg: Config, device):
        sizes = (cfg.hidden_dim, cfg.n_hidden)
        self.qf = TwinQ(state_dim, action_dim, *sizes).to(device)
        self.vf = ValueFunction(state_dim, *sizes).to(device)
        self.actor = GaussianPolicy(state_dim, action_dim, *sizes).to(device)
        self.q_target = deepcopy(self.qf).requires_grad_(False)
        self.actor_lr = torch.tensor(cfg.actor_lr, device=device)  # set_actor_lr changes it
        self.optimizer = torch.optim.Adam(
            [
                {"params": list(self.qf.parameters()), "lr": cfg.qf_lr},
                {"params": list(self.vf.parameters()), "lr": cfg.vf_lr},
                {"params": list(self.actor.parameters()), "lr": self.actor_lr},
            ],
            fused=True,
            capturable=True,
        )
        self.cfg, self.device = cfg, device
        self.iterations = torch.zeros((), dtype=torch.int64, device=device)
        self.online = False

    def value_loss(self, batch: Batch, advantage):
        """Expectile regression of V towards the target Q, Eq. 2."""
        expectile = self.cfg.iql_tau
        if self.online and self.cfg.online_loss == "expectile":  # DARE-IV: Eq. 35
            expectile = torch.full_like(advantage, self.cfg.online_expectile)
            expectile[: self.cfg.n_offline] = self.cfg.iql_tau
        return (torch.abs(expectile - (advantage < 0).float()) * advantage**2).mean()

    def critic_loss(self, batch: Batch, next_v):
        """Regression of both Q towards r + gamma V(s'), Eq. 3."""
        q1, q2 = self.qf.both(batch.observations, batch.actions)
        targets = batch.rewards + (1.0 - batch.terminals) * self.cfg.discount * next_v
        if self.online and self.cfg.online_loss != "none":  # DARE: Eq. 15
            reward, next_state, done = (x[self.cfg.n_offline :] for x in batch[2:])
            with torch.no_grad():
                actions, _ = self.actor.sample(next_state, self.cfg.n_max_actions)
                next_q = self.q_target(next_state.expand(len(actions), -1, -1), actions)
            online_targets = reward + (1.0 - done) * self.cfg.discount * next_q.amax(0)
            targets = torch.cat([targets[: self.cfg.n_offline], online_targets])
        return (F.mse_loss(q1, targets) + F.mse_loss(q2, targets)) / 2

    def actor_loss(self, batch: Batch, advantage):
        """Advantage-weighted regression on the actions of the batch, Eq. 4."""
        weight = torch.exp(self.cfg.beta * advantage).clamp(max=EXP_ADV_MAX)
        losses = -weight * self.actor.log_prob(batch.observations, batch.actions)
        if self.online and self.cfg.online_loss == "sac":  # DARE: Eq. 16
            state = batch.observations[self.cfg.n_offline :]
            actions, log_prob = self.actor.sample(state)
            frozen = {k: p.detach() for k, p in self.qf.named_parameters()}
            q = torch.func.functional_call(self.qf, frozen, (state, actions[0]))
            online_losses = self.cfg.sac_alpha * log_prob[0] - q
            losses = torch.cat([losses[: self.cfg.n_offline], online_losses])
        return losses.mean()

    def losses(self, batch: Batch):
        """Sum of all losses, a scalar, and what to log of them."""
        with torch.no_grad():
            target_q = self.q_target(batch.observations, batch.actions)
            next_v = self.vf(batch.next_observations)
        v = self.vf(batch.observations)
        advantage = target_q - v
        value_loss = self.value_loss(batch, advantage)
        q_loss = self.critic_loss(batch, next_v)
        actor_loss = self.actor_loss(batch, advantage.detach())
        losses = {"value_loss": value_loss, "q_loss": q_loss, "actor_loss": actor_loss}
        means = {"q": target_q.mean(), "v": v.mean(), "advantage": advantage.mean()}
        metrics = {k: x.detach() for k, x in {**losses, **means}.items()}
        return value_loss + q_loss + actor_loss, metrics

    def update(self, batch: Batch) -> dict:
        """One step on all networks; advantage and V(s') come from V before its step."""
        # The three losses share no parameter: one backward pass and one step serve all.
        loss, metrics = self.losses(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.update_target()
        self.iterations += 1
        self.set_actor_lr()
        return metrics

    def set_actor_lr(self):
        """Cosine decay over the offline phase, constant online (IQL's authors, PEX)."""
        progress = self.iterations.double() / max(1, self.cfg.offline_iterations)
        decay = 1.0 if self.online else 0.5 * (1 + torch.cos(math.pi * progress))
        self.actor_lr.fill_(self.cfg.actor_lr * decay)

    @torch.no_grad()
    def update_target(self):
        """Exponential moving average of Q."""
        target, source = list(self.q_target.parameters()), list(self.qf.parameters())
        torch._foreach_lerp_(target, source, self.cfg.tau)

    def start_online(self):
        """Switch from offline training to fine-tuning."""
        self.online = True
        self.set_actor_lr()

    @torch.no_grad()
    def act(self, state: np.ndarray, deterministic: bool) -> np.ndarray:
        """Actions [N, A] for states [N, S]: the mean, or a draw within the action bounds."""
        state = torch.as_tensor(state, dtype=torch.float32, device=self.device)
        action = self.actor(state)[0] if deterministic else self.actor.sample(state)[0][0]
        return action.cpu().numpy()

    def state_dict(self) -> dict:
        """Networks, targets, optimizer and schedule."""
        parts = {k: getattr(self, k).state_dict() for k in ("qf", "vf", "actor", "q_target")}
        steps = {"iterations": self.iterations.item(), "online": self.online}
        return {**parts, "optimizer": self.optimizer.state_dict(), **steps}

    def load_state_dict(self, state: dict):
        """Inverse of state_dict."""
        for k in ("qf", "vf", "actor", "q_target", "optimizer"):
            getattr(self, k).load_state_dict(state[k])
        self.iterations.fill_(state["iterations"])
        self.online = state["online"]
        self.optimizer.param_groups[-1]["lr"] = self.actor_lr  # not the copy that was loaded
        self.set_actor_lr()


# --- Alignment and exchange (DARE) ---
# DARE: Eqs. 7 to 10; the reference actions of Eqs. 5 and 6 and Algorithm 1 follow.


def alignment_score(actions, reference_actions, align: str = "gaussian_kl"):
    """Distance of actions [B, A] from reference actions [B, M, A], Eq. 7; [B].

    gaussian_kl takes actions for the means of Gaussians with covariance I, softmax_kl for the
    logits of categorical distributions. M > 1 gives the soft minimum -log mean exp(-KL).
    """
    if align == "gaussian_kl":
        divergence = 0.5 * (actions[:, None] - reference_actions).square().sum(-1)
    else:
        log_p, log_q = actions[:, None].log_softmax(-1), reference_actions.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return math.log(divergence.shape[1]) - torch.logsumexp(-divergence, 1)


def separation_point(offline_scores, online_scores):
    """Where the Gaussians fitted to the two halves' scores cross, Eqs. 8 and 9; a 0-d tensor.

    The root between the means, of which there is at most one; else their midpoint.
    """
    x, y = offline_scores.double(), online_scores.double()
    mean, variance = x.mean(), x.var(correction=0)
    distance, variance_on = y.mean() - mean, y.var(correction=0)
    # Eq. 9 in u = tau - mu_off is a u^2 + 2 h u + c = 0.
    a, h = variance_on - variance, variance * distance
    c = -variance * (distance**2 + variance_on * torch.log(variance_on / variance))
    q = -(h + torch.copysign((h**2 - a * c).sqrt(), h))
    u = 0.5 * distance
    for root in (q / a, c / q):
        between = (root / distance >= 0) & (root / distance <= 1)
        u = torch.where(between, root, u)
    return (mean + u).to(offline_scores.dtype)


def exchange(
    offline_batch, online_batch, offline_scores, online_scores, max_exchange=math.inf, when="always"
):
    """Swap the M highest-scored offline rows at or above tau with the M lowest-scored online rows
    below it, Eq. 10; gives both batches, M and tau. "separated" swaps none unless mu_off < mu_on.
    """
    tau = separation_point(offline_scores, online_scores)
    online_like, offline_like = (offline_scores >= tau).sum(), (online_scores < tau).sum()
    exchanged = torch.minimum(online_like, offline_like).clamp(max=max_exchange).floor()
    if when == "separated":
        exchanged = exchanged * (offline_scores.mean() < online_scores.mean())
    n, n_pairs = len(offline_scores), min(len(offline_scores), len(online_scores))
    i = offline_scores.argsort(descending=True, stable=True)[:n_pairs]
    j = online_scores.argsort(stable=True)[:n_pairs] + n
    swap = torch.arange(n_pairs, device=i.device) < exchanged
    index = torch.arange(n + len(online_scores), device=i.device)
    index[i], index[j] = torch.where(swap, j, i), torch.where(swap, i, j)
    return *regroup(offline_batch, online_batch, index), exchanged, tau


def direct_exchange(offline_batch, online_batch, offline_scores, online_scores):
    """Sec. 7.5: sort the whole batch by score and make the lowest-scored rows the offline half;
    gives both batches, the rows that changed sides and the score at the cut.
    """
    n, scores = len(offline_scores), torch.cat([offline_scores, online_scores])
    index = scores.argsort(stable=True)
    cut = scores.gather(0, index[n : n + 1]).squeeze()
    return *regroup(offline_batch, online_batch, index), (index[:n] >= n).sum(), cut


def regroup(offline_batch, online_batch, index):
    """Reorder the rows of both batches by an index into the two; halves keep their sizes."""
    n = len(offline_batch[0])
    rows = [torch.cat(pair)[index] for pair in zip(offline_batch, online_batch, strict=True)]
    kind = type(offline_batch)
    return kind(*(x[:n] for x in rows)), kind(*(x[n:] for x in rows))


SUPPORT_CHUNK = 100  # online states drawn for at once: a solver run for each would be slow


class DARE:
    """What Algorithm 1 adds to the agent: nu_0, the energy f_phi, and the exchange."""

    def __init__(self, cfg: Config, run, agent, offline_buffer: ReplayBuffer, online_buffer):
        self.cfg, self.run, self.agent = cfg, run, agent
        self.offline_buffer, self.online_buffer = offline_buffer, online_buffer
        state_dim, action_dim = offline_buffer.dims
        device = offline_buffer.rows.device
        self.behavior = behavior_model(cfg, run, offline_buffer)
        self.guided_noise = torch.compile(guided_noise) if cfg.compile else guided_noise
        self.energy = EnergyModel(state_dim, action_dim, cfg.energy_hidden).to(device)
        self.optimizer = torch.optim.Adam(
            self.energy.parameters(), lr=cfg.energy_lr, fused=True, capturable=True
        )
        self.q_spread = torch.ones((), device=device)
        self.n_spreads = torch.zeros((), device=device)
        self.has_energy = cfg.reference == "guided" and cfg.guidance_scale > 0
        self.has_support = cfg.reference == "resample" or self.has_energy
        self.energy_fitted = not self.has_energy
        if self.has_support:
            self.states, self.actions = offline_support(cfg, run, offline_buffer, self.behavior)
            shape = len(online_buffer.rows), cfg.n_support, action_dim
            self.online_actions, self.n_online = torch.empty(shape, device=device), 0
            self.n_online_drawable = torch.zeros((), dtype=torch.int64, device=device)

    def prepare(self):
        """What the updates of an environment step need first: support actions of new states, and
        before the first exchange f_phi fitted to the offline Q.
        """
        if self.has_support:
            self.draw_online_support()
        if not self.energy_fitted:
            step = accelerated(self.energy_step, self.cfg, self.agent.device)
            total = self.cfg.energy_iterations
            on_progress = watch(self.run, "energy", total, "starts it afresh")
            for i in range(total):
                step()
                on_progress(i + 1)
            self.energy_fitted = True

    def update(self) -> dict:
        """Lines 4 to 10 of Algorithm 1; line 10, the energy's update, comes first."""
        metrics = {"energy_loss": self.energy_step()} if self.has_energy else {}
        offline_batch = self.offline_buffer.sample(self.cfg.n_offline)
        online_batch = self.online_buffer.sample(self.cfg.batch_size - self.cfg.n_offline)
        offline_batch, online_batch, fits = self(offline_batch, online_batch)
        return metrics | fits | self.agent.update(concatenate(offline_batch, online_batch))

    def __call__(self, offline_batch: Batch, online_batch: Batch):
        """Lines 6 to 8 of Algorithm 1: reference actions, scores, exchange."""
        both = concatenate(offline_batch, online_batch)
        reference_actions = self.reference_actions(both.observations)
        scores = alignment_score(both.actions, reference_actions, self.cfg.align)
        halves = scores.split([len(offline_batch.rewards), len(online_batch.rewards)])
        if self.cfg.exchange == "direct":
            *batches, exchanged, tau = direct_exchange(offline_batch, online_batch, *halves)
        else:
            *batches, exchanged, tau = exchange(
                offline_batch, online_batch, *halves, self.cfg.max_exchange, self.cfg.exchange_when
            )
        fits = [x.mean() for x in halves] + [x.std(correction=0) for x in halves]
        return *batches, dict(zip(SCORE_COLUMNS, [exchanged.float(), tau, *fits], strict=True))

    def reference_actions(self, states):
        """Draw from pi_0 of Eq. 5 for the states [B, S] of the sampled rows, [B, M, A]: by guided
        sampling, or among a state's support actions with softmax(s beta_E Q).
        """
        cfg = self.cfg
        if cfg.reference == "guided":
            return sample_actions(
                self.behavior,
                states,
                cfg.n_reference,
                energy=self.energy,
                guidance_scale=cfg.guidance_scale,
                steps=cfg.diffusion_steps,
                noise_prediction=self.guided_noise,
            )
        i, j = self.offline_buffer.index, self.online_buffer.index
        actions = torch.cat([self.actions[i], self.online_actions[j]])
        logits = cfg.guidance_scale * self.energies(states, actions)
        shape = len(states), cfg.n_reference, cfg.n_support
        gumbel = -torch.empty(shape, device=states.device).exponential_().log()
        drawn = (logits[:, None] + gumbel).argmax(-1, keepdim=True)
        return actions.take_along_dim(drawn, 1)

    def draw_online_support(self):
        """Draw support actions for the online states that have none, many at a time."""
        rows = slice(self.n_online, self.online_buffer.size)
        if not self.n_online or rows.stop - rows.start >= SUPPORT_CHUNK:
            states = self.online_buffer.batch(self.online_buffer.rows[rows]).observations
            with autocast(self.cfg, self.agent.device):
                self.online_actions[rows] = draw_support_actions(
                    self.behavior, states, self.cfg.n_support, self.cfg.diffusion_steps
                )
            self.n_online = rows.stop
            self.n_online_drawable.fill_(rows.stop)
        if self.cfg.reference == "resample":  # the newest rows wait for their support actions
            self.online_buffer.n_drawable.fill_(self.n_online)

    def energy_step(self):
        """One step on Eq. 34, with offline and online states in the proportion of the batches."""
        n = round(self.cfg.energy_batch_size * self.cfg.mixing_ratio)
        i = torch.randint(len(self.states), (n,), device=self.states.device)
        j = torch.randint(1 << 62, (self.cfg.energy_batch_size - n,), device=i.device)
        j %= self.n_online_drawable
        online_states = self.online_buffer.batch(self.online_buffer.rows[j]).observations
        states = torch.cat([self.states[i], online_states])
        actions = torch.cat([self.actions[i], self.online_actions[j]])
        loss = energy_loss(self.energy, states, actions, self.energies(states, actions))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def energies(self, states, actions):
        """beta_E Q of support actions [B, K, A], [B, K]; Q in units of its usual spread over K."""
        q = self.agent.q_target(states[:, None].expand(-1, actions.shape[1], -1), actions)
        if self.cfg.energy_normalize:
            self.n_spreads += 1
            self.q_spread.lerp_(q.std(1).mean(), (1 / self.n_spreads).clamp(min=0.001))
            q = q / self.q_spread
        return self.cfg.energy_beta * q

    def state_dict(self) -> dict:
        """What changes online; the behavior model and the offline support are cached."""
        state = {"energy_fitted": self.energy_fitted, "n_spreads": self.n_spreads}
        state |= {"energy": self.energy.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.has_support:
            state["online_actions"] = self.online_actions[: self.n_online].clone()
        return {**state, "q_spread": self.q_spread}

    def load_state_dict(self, state: dict):
        """Inverse of state_dict."""
        self.energy.load_state_dict(state["energy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.q_spread.copy_(state["q_spread"])
        self.energy_fitted = state["energy_fitted"]
        self.n_spreads.copy_(state["n_spreads"])
        if self.has_support:
            self.n_online = len(state["online_actions"])
            self.n_online_drawable.fill_(self.n_online)
            self.online_actions[: self.n_online] = state["online_actions"]


def behavior_model(cfg: Config, run, buffer: ReplayBuffer) -> BehaviorModel:
    """Train nu_0 on the dataset, or take the cached one; states and actions alone matter."""
    with own_draws(cfg.behavior_seed, buffer.rows.device):
        model = BehaviorModel(*buffer.dims, cfg.behavior_width).to(buffer.rows.device)
    data = buffer.batch(buffer.rows[: buffer.size])
    with cached(cfg, "behavior", BEHAVIOR_FIELDS, buffer.digest(sum(buffer.dims))) as path:
        if path.exists():
            model.load_state_dict(load(path)["behavior"])
        else:
            sizes = cfg.behavior_iterations, cfg.behavior_batch_size, cfg.behavior_lr
            report = watch(run, "behavior", cfg.behavior_iterations)
            seed, every = cfg.behavior_seed, cfg.checkpoint_freq
            wrap = functools.partial(accelerated, cfg=cfg, device=data.actions.device.type)
            try:
                train_behavior(
                    model, data.observations, data.actions, *sizes, seed, path, report, every, wrap
                )
            except (FloatingPointError, ValueError) as e:
                sys.exit(f"error: {e}")
            save(path, {"behavior": model.state_dict()})
            Path(f"{path}.partial").unlink(missing_ok=True)
    return model.requires_grad_(False)


def offline_support(cfg: Config, run, buffer: ReplayBuffer, behavior: BehaviorModel) -> tuple:
    """Draw states [N, S] of the dataset and support actions [N, K, A], or take the cached ones."""
    if cfg.reference == "resample":  # which any sampled row may need
        cfg = dataclasses.replace(cfg, n_support_states=0)
    states = buffer.batch(buffer.rows[: buffer.size]).observations
    generator = torch.Generator(states.device).manual_seed(cfg.behavior_seed)
    if cfg.n_support_states:
        order = torch.randperm(len(states), generator=generator, device=states.device)
        states = states[order[: cfg.n_support_states]]
    with cached(cfg, "support", SUPPORT_FIELDS, buffer.digest(sum(buffer.dims))) as path:
        if not path.exists():
            with autocast(cfg, states.device):
                actions = draw_support_actions(
                    behavior,
                    states,
                    cfg.n_support,
                    cfg.diffusion_steps,
                    generator=generator,
                    on_progress=watch(run, "support", len(states), "starts it afresh"),
                )
            save(path, {"actions": actions})
        return states, load(path)["actions"].to(states.device)


def watch(run, name: str, total: int, then: str = "goes on from there"):
    """Callback for the long computations: a line every tenth; stops at Ctrl-C."""
    shown = 0

    def on_progress(done: int, *loss: float):
        nonlocal shown
        if run.stop:
            sys.exit(f"interrupted in the {name} phase; the same command {then}")
        if done == total or done * 10 // total > shown:
            shown = done * 10 // total
            print(f"{name} {done:,} of {total:,}", *(f"loss {x:.4f}" for x in loss), flush=True)

    return on_progress


# --- Evaluation ---


class Evaluator:
    """Runs the mean policy in environments of its own, one episode in each, side by side."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.envs = [gym.make(cfg.env) for _ in range(cfg.n_episodes)]
        # MuJoCo's steps run outside Python's lock, about 4/5 of the time: few threads suffice.
        self.n_threads = min(8, os.cpu_count())
        self.pool = ThreadPoolExecutor(self.n_threads)

    def __call__(self, agent) -> dict:
        """Return mean and standard deviation, normalized score (0 to 100), success rate."""
        seeds = range(self.cfg.eval_seed, self.cfg.eval_seed + self.cfg.n_episodes)
        states = np.stack([x.reset(seed=s)[0] for x, s in zip(self.envs, seeds, strict=True)])
        returns, running = np.zeros(self.cfg.n_episodes), np.ones(self.cfg.n_episodes, bool)

        def step(rows):
            for i in rows:
                states[i], reward, terminated, truncated, _ = self.envs[i].step(actions[i])
                returns[i] += reward
                running[i] = not (terminated or truncated)

        while running.any():
            actions = agent.act(states, True)
            list(self.pool.map(step, np.array_split(np.flatnonzero(running), self.n_threads)))
        score = d4rl.get_normalized_score(self.cfg.env, returns.mean())
        antmaze = d4rl.task(self.cfg.env).family == "antmaze"
        return {
            "return_mean": float(returns.mean()),
            "return_std": float(returns.std()),
            "normalized_score": 100 * float(score),
            "success_rate": float((returns > 0).mean()) if antmaze else "",
        }


# --- Run directory: logs, checkpoints, cache ---


class Run:
    """Writes config.yaml, eval.csv, train.csv, checkpoint.pt, curve.png and summary.yaml."""

    def __init__(self, cfg: Config):
        self.cfg, self.settings = cfg, dataclasses.asdict(cfg)
        self.dir = Path(cfg.runs_dir, cfg.name, cfg.env, f"seed_{cfg.seed}")
        self.checkpoint = self.dir / "checkpoint.pt"
        self.open_directory()
        self.resumed = load(self.checkpoint) if self.checkpoint.exists() else None
        for name, columns in CSV_COLUMNS.items():
            if self.resumed:  # rows that are newer than the checkpoint will be written again
                os.truncate(self.dir / f"{name}.csv", self.resumed["csv_sizes"][name])
            else:
                write(self.dir / f"{name}.csv", ",".join(columns) + "\n")
        self.sums, self.counts, self.last, self.score, self.stop = {}, {}, {}, "", False
        self.clock, self.clock_step = time.perf_counter(), 0
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.request_stop)
        self.wandb = None if cfg.wandb == "disabled" else self.start_wandb()

    def open_directory(self):
        """One configuration and one process to a directory; a finished one is left alone."""
        if (self.dir / "summary.yaml").exists():
            sys.exit(f"error: {self.dir} is finished; take another --seed or --name, or delete it")
        self.dir.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.dir / "lock", timeout=0)
        try:
            self.lock.acquire()
        except TimeoutError:
            sys.exit(f"error: another process is training in {self.dir}")
        path = self.dir / "config.yaml"
        if path.exists():
            old = yaml.safe_load(path.read_text())
            free = ("device", "compile", "cuda_graph", "threads", "wandb", "project", "runs_dir")
            new = [k for k, v in self.settings.items() if k not in free and old.get(k) != v]
            if new:
                sys.exit(f"error: {self.dir} has other settings of {', '.join(new)}; repeat them "
                         "to go on with that run, take another --name, or delete it")  # fmt: skip
        write(path, yaml.safe_dump(self.settings, sort_keys=False))

    def start_wandb(self):
        """Start wandb without ever asking; the local files stay the truth."""
        import wandb

        cfg, mode = self.cfg, self.cfg.wandb
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False) else "offline"
        group = f"{cfg.name}-{cfg.env}"
        id_ = self.resumed["wandb_id"] if self.resumed else None
        return wandb.init(project=cfg.project, group=group, name=f"{group}-{cfg.seed}", mode=mode,
                          id=id_, resume="allow", dir=self.dir, config=self.settings,
                          settings=wandb.Settings(silent=True))  # fmt: skip

    def request_stop(self, *_):
        """Ctrl-C or SIGTERM: save and stop at the end of the step; a second one stops at once."""
        if self.stop:
            sys.exit("stopped")
        self.stop = True

    def append(self, name: str, row: dict):
        """Add a row to eval.csv or train.csv, and to wandb."""
        with open(self.dir / f"{name}.csv", "a", newline="") as f:
            csv.DictWriter(f, CSV_COLUMNS[name], restval="", extrasaction="ignore").writerow(row)
        if self.wandb:
            self.wandb.log({f"{row['phase']}/{k}": v for k, v in row.items() if v != ""})

    def read(self, name: str, phase: str) -> list[dict]:
        """Rows of eval.csv or train.csv of one phase; numbers as floats, empty cells left out."""
        with open(self.dir / f"{name}.csv", newline="") as f:
            rows = [r for r in csv.DictReader(f) if r.pop("phase") == phase]
        return [{k: float(v) for k, v in row.items() if v != ""} for row in rows]

    def add(self, metrics: dict):
        """Sum metrics on the device: 0-d tensors, the same names at each call from one place."""
        names, values = tuple(metrics), torch.stack(list(metrics.values()))
        self.sums[names] = self.sums.get(names, 0) + values
        self.counts[names] = self.counts.get(names, 0) + 1

    def write_means(self, phase: str, step: int):
        """Write the means since the last call; one that is not finite ends the run."""
        now = time.perf_counter()
        self.last = {"steps_per_second": (step - self.clock_step) / (now - self.clock)}
        for names, values in self.sums.items():
            means = (values / self.counts[names]).tolist()
            self.last |= dict(zip(names, means, strict=True))
        for name, value in self.last.items():
            if not math.isfinite(value):
                self.stop_on_nan(name, phase, step)
        self.append("train", {"phase": phase, "step": step, **self.last})
        self.sums, self.counts, self.clock, self.clock_step = {}, {}, now, step

    def stop_on_nan(self, name: str, phase: str, step: int):
        """End the run; the checkpoint is older than what broke."""
        sys.exit(f"error: {name} is not finite at {phase} step {step}; the last good state is in "
                 f"{self.checkpoint}")  # fmt: skip

    def after_step(self, phase: str, step: int, bar, parts: dict, evaluator):
        """Log, evaluate and save where they are due."""
        last = step == bar.total
        if step % self.cfg.log_freq == 0 or last:
            self.write_means(phase, step)
            shown = {k: f"{self.last[k]:.4g}" for k in PANELS if k in self.last}
            bar.set_postfix(shown | {"score": self.score}, refresh=False)
        start = time.perf_counter()
        if step % (self.cfg.eval_freq if phase == "online" else self.cfg.offline_eval_freq) == 0:
            self.evaluate(phase, step, parts["agent"], evaluator)
        stop = self.stop  # a signal that comes from here on stops the next step
        if step % self.cfg.checkpoint_freq == 0 or last or stop:
            self.save(phase, step, parts)
        if stop:
            sys.exit(f"interrupted at {phase} step {step}; the same command goes on from there")
        self.clock += time.perf_counter() - start

    def evaluate(self, phase: str, step: int, agent, evaluator):
        """Evaluate, record it, redraw curve.png; a plain line where there is no bar."""
        with own_draws(self.cfg.eval_seed, agent.device):
            result = evaluator(agent)
        self.score = f"{result['normalized_score']:.1f}"
        self.append("eval", {"phase": phase, "step": step, **result})
        self.plot()
        if not sys.stderr.isatty():
            shown = [f"{k} {v:.4g}" for k, v in self.last.items() if k in PANELS]
            print(f"{phase} step {step:,}: score {self.score}", *shown, sep=", ", flush=True)

    def save(self, phase: str, step: int, parts: dict):
        """Write a checkpoint from which the run goes on as if it had not been interrupted."""
        groups = parts["agent"].optimizer.param_groups
        if not all(p.isfinite().all() for group in groups for p in group["params"]):
            self.stop_on_nan("a weight of the agent", phase, step)
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"phase": phase, "step": step, "rng": torch.get_rng_state()}
        state["cuda_rng"] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        state["csv_sizes"] = {k: (self.dir / f"{k}.csv").stat().st_size for k in CSV_COLUMNS}
        state["wandb_id"] = self.wandb.id if self.wandb else None
        save(self.checkpoint, state)

    def restore(self, phase: str, parts: dict) -> int:
        """Load the checkpoint into `parts` if it is of this phase; gives the steps done."""
        if not self.resumed or self.resumed["phase"] != phase:
            return 0
        for name, part in parts.items():
            part.load_state_dict(self.resumed[name])
        torch.set_rng_state(self.resumed["rng"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.resumed["cuda_rng"])
        self.clock_step = self.resumed["step"]
        print(f"going on with {self.dir} from {phase} step {self.clock_step:,}", flush=True)
        return self.clock_step

    def plot(self):
        """Draw curve.png: the online scores from the offline agent's on, and PANELS below."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        names, scores = ["normalized_score", *PANELS], self.read("eval", "online")
        figure = Figure(figsize=(6, 1.5 + 1.5 * len(names)), layout="constrained")
        axes = figure.subplots(len(names), sharex=True, height_ratios=[2] + [1] * len(PANELS))
        for ax, name in zip(axes, names, strict=True):
            rows = scores if name == "normalized_score" else self.read("train", "online")
            points = np.array([(r["step"], r[name]) for r in rows if name in r]).reshape(-1, 2)
            ax.plot(*points.T, color="C0", marker="o" if rows is scores else "", ms=4)
            ax.set_ylabel(PANELS.get(name, "normalized score"))
            ax.spines[["top", "right"]].set_visible(False)
        if scores:
            offline = scores[0]["normalized_score"]
            axes[0].axhline(offline, color="0.5", ls="--", lw=1)
            axes[0].annotate("offline agent", (1, offline), xycoords=("axes fraction", "data"),
                             color="0.4", ha="right", va="bottom")  # fmt: skip
        axes[-1].set_xlabel("online environment steps")
        axes[0].set_title(f"{self.cfg.name}, {self.cfg.env}, seed {self.cfg.seed}\n"
                          f"data: {self.cfg.data}", fontsize=10)  # fmt: skip
        FigureCanvasAgg(figure).print_png(str(self.dir / "curve.tmp"))
        os.replace(self.dir / "curve.tmp", self.dir / "curve.png")

    def finish(self):
        """Write summary.yaml, which marks the run as finished, and print the closing line."""
        scores = [row["normalized_score"] for row in self.read("eval", "online")]
        offline, last, best = scores[0], float(np.mean(scores[1:][-4:] or scores)), max(scores)
        summary = {"offline_score": offline, "last_four_mean": last, "best": best}
        versions = {"torch": str(torch.__version__), "numpy": np.__version__, "data": self.cfg.data}
        write(self.dir / "summary.yaml", yaml.safe_dump(summary | versions, sort_keys=False))
        self.lock.release()
        if self.wandb:
            self.wandb.finish()
        print(f"{self.cfg.name} on {self.cfg.env} (data: {self.cfg.data}), seed {self.cfg.seed}: "
              f"offline score {offline:.1f}, mean of the last four evaluations {last:.1f}, "
              f"best {best:.1f}\ncurve: {self.dir / 'curve.png'}")  # fmt: skip


@contextmanager
def own_draws(seed: int, device):
    """Draw from a seed of one's own and leave the run's random state as it was."""
    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def write(path: Path, text: str):
    """Write a text file, whole or not at all."""
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def save(path: Path, state: dict):
    """Write tensors, whole or not at all."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load(path: Path) -> dict:
    """Read what `save` wrote; a broken file ends the program with one line."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        sys.exit(f"error: cannot read {path} ({type(e).__name__}); delete it to start afresh")


@contextmanager
def cached(cfg: Config, kind: str, fields: list, data_digest: str):
    """Path of a result that depends on the data and `fields` alone; other processes wait."""
    key = json.dumps([kind, data_digest, {k: getattr(cfg, k) for k in fields}])
    path = Path(cfg.runs_dir, "cache")
    path.mkdir(parents=True, exist_ok=True)
    path /= f"{kind}-{cfg.env}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.pt"
    with FileLock(f"{path}.lock"):
        if path.exists():
            print(f"cache hit: {kind} from {path}", flush=True)
        yield path


# --- Training ---


def automatic_precision(cfg: Config, device: str) -> str:
    """What --precision auto stands for: the precision of the run to go on with, else bf16 if its
    products take less than 3/4 of the time.
    """
    path = Path(cfg.runs_dir, cfg.name, cfg.env, f"seed_{cfg.seed}", "config.yaml")
    if path.exists():
        return yaml.safe_load(path.read_text())["precision"]
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, runs = torch.ones(1024, 1024, dtype=dtype, device=device), []
        for _ in range(10):
            start = time.perf_counter()
            (x @ x)[0, 0].item()
            runs.append(time.perf_counter() - start)
        times[dtype] = min(runs)
    return "bf16" if times[torch.bfloat16] < 0.75 * times[torch.float32] else "fp32"


def autocast(cfg: Config, device: str):
    """Context in which the networks' products are in cfg.precision; all else stays in fp32."""
    # Without the cache, which would hold the casts of weights from before an optimizer's step.
    on = cfg.precision == "bf16"
    return torch.autocast(torch.device(device).type, torch.bfloat16, on, cache_enabled=False)


class CudaGraph:
    """A function whose kernels are recorded once and replayed from then on, without Python.

    What it changes must be tensors that stay where they are (a number would be frozen in the
    recording); its results are the same tensors at every replay. It takes no arguments.
    """

    WARM_UP_CALLS = 3  # on a stream of their own, as PyTorch asks for before a recording

    def __init__(self, function, generator=None):
        self.function, self.calls = function, 0
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        if generator is not None:
            self.graph.register_generator_state(generator)

    def __call__(self):
        """Call, record or replay it."""
        self.calls += 1
        if self.calls <= self.WARM_UP_CALLS:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.results = self.function()
            torch.cuda.current_stream().wait_stream(self.stream)
            return self.results
        if self.calls == self.WARM_UP_CALLS + 1:
            self.record()
        self.graph.replay()
        return self.results

    def record(self):
        """Note the kernels without running them; what waits for the GPU cannot be noted."""
        try:
            with torch.cuda.graph(self.graph):
                self.results = self.function()
        except RuntimeError as e:
            why = str(e).splitlines()[0]
            sys.exit(f"error: cannot record the update ({why}); take --cuda_graph false")


def accelerated(update, cfg: Config, device: str, generator=None):
    """An update without arguments in cfg.precision and, where cfg.cuda_graph says so, as a graph.

    A generator that it draws from, other than the default one, has to be named.
    """

    def in_precision():
        with autocast(cfg, device):
            return update()

    on = cfg.cuda_graph and device == "cuda"
    return CudaGraph(in_precision, generator) if on else in_precision


class TrainingEnv:
    """The environment that fine-tuning acts in, with all that a checkpoint needs of it."""

    def __init__(self, cfg: Config):
        self.env = gym.make(cfg.env)
        self.state, _ = self.env.reset(seed=cfg.seed)

    def step(self, action: np.ndarray) -> tuple:
        """Act once; gives the transition and truncated. Where an episode ends a new one starts."""
        state = self.state
        next_state, reward, terminated, truncated, _ = self.env.step(action)
        self.state = self.env.reset()[0] if terminated or truncated else next_state
        return state, action, reward, next_state, terminated, truncated

    def state_dict(self) -> dict:
        """Simulator, goal, time limit, random state and current observation."""
        return {"env": d4rl.get_env_state(self.env), "state": self.state.tolist()}

    def load_state_dict(self, state: dict):
        """Inverse of state_dict."""
        d4rl.set_env_state(self.env, state["env"])
        self.state = np.array(state["state"])


def progress_bar(phase: str, start: int, total: int):
    """Count steps on a terminal, and nowhere else."""
    off = not sys.stderr.isatty()
    return tqdm(range(start, total), phase, total=total, initial=start, disable=off)


def train_offline(cfg: Config, run: Run, agent, buffer: ReplayBuffer, evaluator):
    """Offline phase: updates on the dataset alone."""
    parts = {"agent": agent}
    start = run.restore("offline", parts)
    if start == 0:
        run.save("offline", 0, parts)
    update = accelerated(lambda: agent.update(buffer.sample(cfg.batch_size)), cfg, agent.device)
    bar = progress_bar("offline", start, cfg.offline_iterations)
    for step in bar:
        run.add(update())
        run.after_step("offline", step + 1, bar, parts, evaluator)


def offline_agent(cfg: Config, run: Run, agent, buffer: ReplayBuffer, evaluator):
    """Train the agent offline, or take the cached one with its evaluations."""
    with cached(cfg, OFFLINE_METHOD, OFFLINE_FIELDS, buffer.digest()) as path:
        if path.exists():
            state = load(path)
            agent.load_state_dict(state["agent"])
            write(run.dir / "eval.csv", state["eval.csv"])
        else:
            train_offline(cfg, run, agent, buffer, evaluator)
            evals = (run.dir / "eval.csv").read_text()
            save(path, {"agent": agent.state_dict(), "eval.csv": evals})


def fine_tune(cfg: Config, run: Run, agent, offline_buffer: ReplayBuffer, transform, evaluator):
    """Online phase: one environment step, then `utd` updates on half-and-half batches."""
    torch.manual_seed(cfg.seed)
    agent.start_online()
    env = TrainingEnv(cfg)
    online_buffer = ReplayBuffer(*offline_buffer.dims, cfg.online_iterations, agent.device)
    parts = {"agent": agent, "online_buffer": online_buffer, "env": env}

    def mixed_update() -> dict:
        """A step of the agent on half offline and half online data."""
        offline_batch = offline_buffer.sample(cfg.n_offline)
        online_batch = online_buffer.sample(cfg.batch_size - cfg.n_offline)
        return agent.update(concatenate(offline_batch, online_batch))

    if cfg.exchange != "none":  # DARE: Algorithm 1
        parts["dare"] = dare = DARE(cfg, run, agent, offline_buffer, online_buffer)
        mixed_update = dare.update
    update = accelerated(mixed_update, cfg, agent.device)
    run.clock, run.clock_step = time.perf_counter(), 0
    start = run.restore("online", parts)
    if start == 0:
        run.evaluate("online", 0, agent, evaluator)
        run.save("online", 0, parts)
    bar = progress_bar("online", start, cfg.online_iterations)
    for step in bar:
        action = agent.act(env.state[None], deterministic=False)[0]
        if not np.isfinite(action).all():
            run.write_means("online", step)  # names the loss that is not finite either
            run.stop_on_nan("the policy's action", "online", step)
        if cfg.exchange != "none" and step >= cfg.initial_collection_steps:  # DARE
            dare.prepare()
        # Before the environment, whose step then runs while a GPU is at work on the update.
        for _ in range(cfg.utd if step >= cfg.initial_collection_steps else 0):
            run.add(update())
        state, action, reward, next_state, terminated, _ = env.step(action)
        reward = reward * transform[0] + transform[1]
        online_buffer.add([state], [action], [reward], [next_state], [terminated])
        run.after_step("online", step + 1, bar, parts, evaluator)


def main(args: list[str] | None = None):
    """Train offline, or take the cached agent; fine-tune online; summarize."""
    cfg = Parser(Config, allow_abbrev=False).parse_args(args)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device = cfg.device if cfg.device != "auto" else ("cpu", "cuda")[torch.cuda.is_available()]
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but torch sees no CUDA device; take --device cpu")
    if cfg.compile and not shutil.which(os.environ.get("CXX", "g++")):
        sys.exit("error: --compile needs a C++ compiler; install g++, set CXX, or leave it out")
    if cfg.precision == "auto":
        cfg.precision = automatic_precision(cfg, device)
    try:
        dataset = d4rl.qlearning_dataset(
            cfg.env, data=cfg.data, regenerated_size=cfg.regenerated_size
        )
    except d4rl.DatasetError as e:
        sys.exit(f"error: {e}")
    transform = reward_transform(dataset, cfg)
    dataset["rewards"] = dataset["rewards"] * transform[0] + transform[1]
    dims = dataset["observations"].shape[1], dataset["actions"].shape[1]
    offline_buffer = ReplayBuffer(*dims, len(dataset["rewards"]), device)
    offline_buffer.add(*(dataset[k] for k in Batch._fields))
    run = Run(cfg)
    torch.manual_seed(cfg.seed)
    agent, evaluator = ImplicitQLearning(*dims, cfg, device), Evaluator(cfg)
    if cfg.compile:
        agent.losses = torch.compile(agent.losses)
    if not run.resumed or run.resumed["phase"] == "offline":
        offline_agent(cfg, run, agent, offline_buffer, evaluator)
    fine_tune(cfg, run, agent, offline_buffer, transform, evaluator)
    run.finish()


if __name__ == "__main__":
    main()
