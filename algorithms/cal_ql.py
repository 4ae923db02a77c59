"""Cal-QL and CQL, offline then online: python algorithms/cal_ql.py --env antmaze-umaze-v2

Cal-QL is Nakamoto et al. (2023); cal_ql.py --calibrated false --name cql runs CQL, Kumar et al.
(2020). Online, each batch is half offline data and half online data. Equation and table numbers
are the DARE paper's.
"""

import csv
import dataclasses
import difflib
import functools
import hashlib
import inspect
import itertools
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
    batch_size: int = 256  # Table 4
    mixing_ratio: float = 0.5  # offline share of an online batch (PEX, Cal-QL)
    discount: float = 0.99  # gamma, Table 4
    tau: float = 0.005  # target update rate, Table 4
    policy_lr: float = 1e-4  # learning rate of the policy and its temperature, Table 4
    qf_lr: float = 3e-4  # learning rate of Q and the Lagrange multiplier, Table 4
    hidden_dim: int = 256  # hidden units per layer, Table 4
    q_n_hidden_layers: int = 3  # hidden layers of Q, Table 4 (AntMaze: 5)
    policy_n_hidden_layers: int = 3  # hidden layers of the policy (CORL)
    calibrated: bool = True  # true is Cal-QL, false is CQL
    calibrated_online: bool = False  # keep the calibration online (Sec. 3.2: plain CQL penalty)
    cql_alpha: float = 10.0  # weight of R in Eq. 1, offline, Table 4 (AntMaze: 5)
    cql_alpha_online: float = 10.0  # weight of R in Eq. 1, online, Table 4 (AntMaze: 5)
    cql_n_actions: int = 10  # actions of each kind in R, and under the max of the backup (CORL)
    cql_temp: float = 1.0  # temperature of R's logsumexp, Table 4
    cql_lagrange: bool = False  # learn a factor of R by dual descent, Table 4 (AntMaze: true)
    cql_target_action_gap: float = -1.0  # R that this factor aims at, Table 4 (AntMaze: 0.8)
    cql_max_target_backup: bool = False  # max over actions in the target, Table 4 (AntMaze: true)
    cql_clip_diff_min: float = -200.0  # lower bound of R on a row, Table 4
    normalize: bool = True  # standardize observations, Table 4 (AntMaze: false)
    normalize_reward: bool = False  # Table 4 (AntMaze: true); locomotion: 1000 r / range of returns
    reward_scale: float = 1.0  # Table 4 (AntMaze: 10)
    reward_bias: float = 0.0  # Table 4 (AntMaze: -5)
    is_sparse_reward: bool = False  # a failure's return is r / (1 - gamma), Table 4 (AntMaze: true)

    eval_freq: int = 10_000  # online steps between evaluations
    offline_eval_freq: int = 50_000  # offline updates between evaluations
    n_episodes: int = 10  # episodes of an evaluation (AntMaze: 100)
    eval_seed: int = 42  # seeds the evaluation environments, the same at each evaluation
    log_freq: int = 1_000  # steps between rows of train.csv; each is a mean over them
    checkpoint_freq: int = 10_000  # steps between checkpoints

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
        if self.is_sparse_reward and self.discount == 1:
            raise ValueError("is_sparse_reward wants a discount below 1, got 1")

    @property
    def n_offline(self) -> int:
        """Rows of an online batch that come from the offline data; they stand first."""
        return round(self.batch_size * self.mixing_ratio)


CHOICES = {
    "wandb": ["auto", "online", "offline", "disabled"],
    "device": ["auto", "cpu", "cuda"],
    "precision": ["auto", "fp32", "bf16"],
}
FRACTIONS = ["mixing_ratio", "discount", "tau"]
LOWEST = """regenerated_size initial_collection_steps utd batch_size hidden_dim q_n_hidden_layers
    policy_n_hidden_layers cql_n_actions eval_freq offline_eval_freq n_episodes log_freq
    checkpoint_freq"""
LOWEST = dict.fromkeys(LOWEST.split(), 1)
LOWEST |= dict.fromkeys(["cql_target_action_gap", "cql_clip_diff_min", "reward_bias"], -math.inf)
LOWEST["cql_temp"] = 1e-3
PRESETS = {  # by task family, then by task
    "locomotion": {},
    "antmaze": {
        "q_n_hidden_layers": 5,
        "cql_alpha": 5.0,
        "cql_alpha_online": 5.0,
        "cql_lagrange": True,
        "cql_target_action_gap": 0.8,
        "cql_max_target_backup": True,
        "normalize": False,
        "normalize_reward": True,
        "reward_scale": 10.0,
        "reward_bias": -5.0,
        "is_sparse_reward": True,
        "n_episodes": 100,
    },
}
# What an offline agent depends on besides the data: the key of its cache.
OFFLINE_METHOD = "cal_ql"
OFFLINE_FIELDS = """env seed precision offline_iterations batch_size discount tau
    policy_lr qf_lr hidden_dim q_n_hidden_layers policy_n_hidden_layers calibrated
    cql_alpha cql_n_actions cql_temp cql_lagrange cql_target_action_gap
    cql_max_target_backup cql_clip_diff_min normalize offline_eval_freq n_episodes
    eval_seed""".split()
CSV_COLUMNS = {
    "eval": ["phase", "step", "return_mean", "return_std", "normalized_score", "success_rate"],
    "train": """phase step steps_per_second q_loss regularizer actor_loss q log_pi alpha
        alpha_prime""".split(),
}
PANELS = {"q": "mean Q"}  # columns of train.csv shown in the bar and under the curve


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
    """Transitions: observations [B, S], actions [B, A], rewards [B], ..., mc_returns [B].

    A Monte-Carlo return is the discounted sum of rewards to the episode's end, V^nu in Eq. 1.
    """

    observations: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    next_observations: torch.Tensor
    terminals: torch.Tensor
    mc_returns: torch.Tensor


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
    scale = cfg.reward_scale
    if cfg.normalize_reward and d4rl.task(cfg.env).family != "antmaze":
        scale *= 1000.0 / return_range(dataset)
    return scale, cfg.reward_bias


def discounted_returns(rewards: np.ndarray, cfg: Config) -> np.ndarray:
    """Monte-Carlo returns [T] of one episode; r / (1 - gamma) where a sparse reward never came.

    An episode that was cut short (a time-out, the end of the data) counts as if it ended there.
    """
    if cfg.is_sparse_reward and (rewards == np.float32(cfg.reward_bias)).all():
        return rewards / (1 - cfg.discount)
    backwards = itertools.accumulate(reversed(rewards.tolist()), lambda g, r: r + cfg.discount * g)
    return np.array(list(backwards)[::-1])


def monte_carlo_returns(dataset: dict, cfg: Config) -> np.ndarray:
    """Monte-Carlo returns [N] of a dataset, episode by episode."""
    episodes = np.split(dataset["rewards"], episode_starts(dataset)[1:])
    return np.concatenate([discounted_returns(rewards, cfg) for rewards in episodes])


UNFINISHED = -math.inf  # a bound that never holds, until the episode's returns are known


def finish_episode(buffer: ReplayBuffer, cfg: Config):
    """Write the Monte-Carlo returns of the episode at the buffer's end, which has just ended."""
    batch = buffer.batch(buffer.rows[: buffer.size])
    start = int((batch.mc_returns != UNFINISHED).sum())
    returns = discounted_returns(batch.rewards[start:].cpu().numpy(), cfg)
    batch.mc_returns[start:] = torch.from_numpy(returns)


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


class Standardize(nn.Module):
    """(s - mean) / std of observations; the identity until it is given both."""

    def __init__(self, state_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(state_dim))
        self.register_buffer("std", torch.ones(state_dim))

    def forward(self, state):
        """Map [..., S] to [..., S]."""
        return (state - self.mean) / self.std


class TwinQ(nn.Module):
    """Two Q functions as one batched network; weights [2, in, out] of each layer."""

    def __init__(self, state_dim: int, action_dim: int, hidden_dim: int, n_hidden: int):
        super().__init__()
        self.standardize = Standardize(state_dim)
        dims = [state_dim + action_dim, *[hidden_dim] * n_hidden, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for d_in, d_out in itertools.pairwise(dims):
            twins = [orthogonal(nn.Linear(d_in, d_out)) for _ in range(2)]
            self.weights.append(torch.stack([layer.weight.detach().T for layer in twins]))
            self.biases.append(torch.zeros(2, 1, d_out))

    def both(self, state, action):
        """Q1 and Q2 of [..., S] and [..., A], [2, ...]."""
        x = torch.cat([self.standardize(state), action], -1)
        h = x.flatten(0, -2).expand(2, -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, torch.relu(h) if i else h, weight)
        return h.view(2, *x.shape[:-1]).float()  # a product in bf16 ends here

    def forward(self, state, action):
        """Smaller of the two, [...]."""
        return self.both(state, action).amin(0)


class TanhGaussianPolicy(nn.Module):
    """Gaussian squashed by tanh; its standard deviation depends on the state (CORL's)."""

    def __init__(self, state_dim: int, action_dim: int, hidden_dim: int, n_hidden: int):
        super().__init__()
        self.standardize = Standardize(state_dim)
        self.net = MLP([state_dim, *[hidden_dim] * n_hidden, 2 * action_dim]).apply(orthogonal)
        self.log_std_multiplier = nn.Parameter(torch.tensor(1.0))
        self.log_std_offset = nn.Parameter(torch.tensor(-1.0))

    def forward(self, state):
        """Mean and log standard deviation before the tanh, each [B, A]; the bounds are CORL's."""
        mean, log_std = self.net(self.standardize(state)).chunk(2, -1)
        log_std = self.log_std_multiplier * log_std + self.log_std_offset
        return mean, log_std.clamp(-20.0, 2.0)


def sample_tanh_gaussian(mean, log_std, n: int = 1):
    """Draw n actions [B, n, A] from a policy's output, each [B, A]; log densities [B, n]."""
    z = torch.randn(len(mean), n, mean.shape[-1], device=mean.device)
    log_std = log_std[:, None]
    x = mean[:, None] + torch.exp(log_std) * z
    log_prob = -0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_slope = 2.0 * (math.log(2.0) - x - F.softplus(-2.0 * x))  # log of tanh's derivative
    return torch.tanh(x), (log_prob - log_slope).sum(-1)


def orthogonal(module: nn.Module) -> nn.Module:
    """Orthogonal weights with gain sqrt(2), zero biases (Table 4, CORL)."""
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight, math.sqrt(2))
        nn.init.zeros_(module.bias)
    return module


# --- Agent ---

ALPHA_PRIME_MAX = 1e6  # bound of the Lagrange multiplier (CORL)


class CalQL:
    """Networks, their losses and one update step.

    In the losses policy and next_policy are the policy's mean and log_std, each [B, A], at s and
    s', and q is Q1 and Q2 of the batch, [2, B].
    """

    PARTS = ("qf", "actor", "q_target", "factors", "optimizer")

    def __init__(self, state_dim: int, action_dim: int, cfg: Config, device):
        sizes = (state_dim, action_dim, cfg.hidden_dim)
        self.qf = TwinQ(*sizes, cfg.q_n_hidden_layers).to(device)
        self.actor = TanhGaussianPolicy(*sizes, cfg.policy_n_hidden_layers).to(device)
        self.q_target = deepcopy(self.qf).requires_grad_(False)
        # Logs of the entropy's temperature and of R's factor, which starts at e or stays 1 (CORL).
        logs = {"log_alpha": 0.0, "log_alpha_prime": 1.0 if cfg.cql_lagrange else 0.0}
        self.factors = nn.ParameterDict({k: torch.tensor(x) for k, x in logs.items()}).to(device)
        self.factors["log_alpha_prime"].requires_grad_(cfg.cql_lagrange)
        log_alpha, log_alpha_prime = self.factors["log_alpha"], self.factors["log_alpha_prime"]
        self.optimizer = torch.optim.Adam(
            [
                {"params": [*self.qf.parameters(), log_alpha_prime], "lr": cfg.qf_lr},
                {"params": [*self.actor.parameters(), log_alpha], "lr": cfg.policy_lr},
            ],
            fused=True,
            capturable=True,
        )
        self.target_entropy = -float(action_dim)
        self.cfg, self.device = cfg, device
        self.iterations = torch.zeros((), dtype=torch.int64, device=device)
        self.online = False

    def standardize(self, observations: np.ndarray):
        """Let the networks standardize observations as those of a dataset [N, S] need it."""
        for net in (self.qf, self.q_target, self.actor):
            net.standardize.mean.copy_(torch.from_numpy(observations.mean(0)))
            net.standardize.std.copy_(torch.from_numpy(observations.std(0) + 1e-3))  # CORL's floor

    @torch.no_grad()
    def td_target(self, batch: Batch, next_policy):
        """Target of Eq. 1, [B]: a' is drawn from the policy, or is the best of n drawn ones."""
        n = self.cfg.cql_n_actions if self.cfg.cql_max_target_backup else 1
        actions, _ = sample_tanh_gaussian(*next_policy, n)
        states = batch.next_observations[:, None].expand(-1, n, -1)
        next_q = self.q_target(states, actions).amax(1)
        return batch.rewards + (1.0 - batch.terminals) * self.cfg.discount * next_q

    def conservative_regularizer(self, batch: Batch, q, policy, next_policy):
        """R of Eq. 1 for each row and both Q, [2, B]: Q of drawn actions less Q of the data.

        The expectation over actions is CQL's logsumexp, over uniform actions and the policy's at s
        and s', each weighted by the inverse of its density. R is clipped at cql_clip_diff_min.
        """
        cfg, n = self.cfg, self.cfg.cql_n_actions
        with torch.no_grad():
            uniform = torch.rand(len(batch.actions), n, batch.actions.shape[1], device=self.device)
            drawn = [sample_tanh_gaussian(*policy, n), sample_tanh_gaussian(*next_policy, n)]
            actions = torch.cat([2.0 * uniform - 1.0, *(a for a, _ in drawn)], 1)
            log_uniform = math.log(0.5) * actions.shape[-1]
            log_density = F.pad(torch.cat([x for _, x in drawn], 1), (n, 0), value=log_uniform)
        states = batch.observations[:, None].expand(-1, 3 * n, -1)
        q_drawn = self.qf.both(states, actions)
        if cfg.calibrated and (cfg.calibrated_online or not self.online):
            # max(Q, V^nu(s)) on the policy's actions, not on the uniform ones (CORL)
            bound = F.pad(batch.mc_returns[:, None].expand(-1, 2 * n), (n, 0), value=-math.inf)
            q_drawn = torch.maximum(q_drawn, bound)
        soft_max = cfg.cql_temp * torch.logsumexp((q_drawn - log_density) / cfg.cql_temp, -1)
        return (soft_max - q).clamp(min=cfg.cql_clip_diff_min)

    def critic_loss(self, batch: Batch, policy, next_policy):
        """TD term and alpha R (with Lagrange, less the gap), each summed over both Q; mean Q.

        Eq. 1 with the TD term of Eq. 14 and CORL, without 1/2: Table 4's alpha is on this scale.
        """
        n_rows = len(batch.rewards)
        q = self.qf.both(batch.observations, batch.actions)
        mean_q = q.detach().mean()
        td_loss = (q - self.td_target(batch, next_policy)).square().sum() / n_rows
        regularizer = self.conservative_regularizer(batch, q, policy, next_policy)
        if self.cfg.cql_lagrange:
            regularizer = regularizer - self.cfg.cql_target_action_gap
        alpha = self.cfg.cql_alpha_online if self.online else self.cfg.cql_alpha
        return td_loss, alpha * regularizer.sum() / n_rows, mean_q

    def actor_loss(self, batch: Batch, policy):
        """Soft actor-critic's loss alpha log pi - Q and its log pi, [B]; Q gets no gradient."""
        actions, log_pi = (x[:, 0] for x in sample_tanh_gaussian(*policy))
        frozen = {k: p.detach() for k, p in self.qf.named_parameters()}
        q = torch.func.functional_call(self.qf, frozen, (batch.observations, actions))
        return (self.factors["log_alpha"].exp().detach() * log_pi - q).mean(), log_pi.detach()

    def losses(self, batch: Batch):
        """Sum of all losses, a scalar, and what to log of them."""
        policy = self.actor(batch.observations)
        with torch.no_grad():
            next_policy = self.actor(batch.next_observations)
        actor_loss, log_pi = self.actor_loss(batch, policy)
        q_loss, regularizer, mean_q = self.critic_loss(batch, policy, next_policy)
        alpha_loss = -(self.factors["log_alpha"] * (log_pi + self.target_entropy)).mean()
        alpha = self.factors["log_alpha"].exp()
        alpha_prime = self.factors["log_alpha_prime"].exp().clamp(max=ALPHA_PRIME_MAX)
        alpha_prime_loss = -0.5 * alpha_prime * regularizer.detach()
        critic_loss = q_loss + alpha_prime.detach() * regularizer
        losses = {"q_loss": q_loss, "regularizer": regularizer, "actor_loss": actor_loss}
        means = {"q": mean_q, "log_pi": log_pi.mean(), "alpha": alpha, "alpha_prime": alpha_prime}
        metrics = {k: x.detach() for k, x in {**losses, **means}.items()}
        return critic_loss + actor_loss + alpha_loss + alpha_prime_loss, metrics

    def update(self, batch: Batch) -> dict:
        """One step on all networks; all losses come from the weights before it."""
        # The losses share no parameter: one backward pass and one step serve all.
        loss, metrics = self.losses(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.update_target()
        self.iterations += 1
        return metrics

    @torch.no_grad()
    def update_target(self):
        """Exponential moving average of Q."""
        target, source = list(self.q_target.parameters()), list(self.qf.parameters())
        torch._foreach_lerp_(target, source, self.cfg.tau)

    def start_online(self):
        """Switch from offline training to fine-tuning."""
        self.online = True

    @torch.no_grad()
    def act(self, state: np.ndarray, deterministic: bool) -> np.ndarray:
        """Actions [N, A] for states [N, S]: the squashed mean, or a draw."""
        state = torch.as_tensor(state, dtype=torch.float32, device=self.device)
        mean, log_std = self.actor(state)
        action = torch.tanh(mean) if deterministic else sample_tanh_gaussian(mean, log_std)[0][:, 0]
        return action.cpu().numpy()

    def state_dict(self) -> dict:
        """Networks, targets, factors and optimizer."""
        parts = {k: getattr(self, k).state_dict() for k in self.PARTS}
        return {**parts, "iterations": self.iterations.item(), "online": self.online}

    def load_state_dict(self, state: dict):
        """Inverse of state_dict."""
        for k in self.PARTS:
            getattr(self, k).load_state_dict(state[k])
        self.iterations.fill_(state["iterations"])
        self.online = state["online"]


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
        # Before the environment, whose step then runs while a GPU is at work on the update.
        for _ in range(cfg.utd if step >= cfg.initial_collection_steps else 0):
            run.add(update())
        state, action, reward, next_state, terminated, truncated = env.step(action)
        reward = reward * transform[0] + transform[1]
        online_buffer.add([state], [action], [reward], [next_state], [terminated], [UNFINISHED])
        if terminated or truncated:
            finish_episode(online_buffer, cfg)
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
    dataset["mc_returns"] = monte_carlo_returns(dataset, cfg)
    dims = dataset["observations"].shape[1], dataset["actions"].shape[1]
    offline_buffer = ReplayBuffer(*dims, len(dataset["rewards"]), device)
    offline_buffer.add(*(dataset[k] for k in Batch._fields))
    run = Run(cfg)
    torch.manual_seed(cfg.seed)
    agent, evaluator = CalQL(*dims, cfg, device), Evaluator(cfg)
    if cfg.compile:
        agent.losses = torch.compile(agent.losses)
    if cfg.normalize:
        agent.standardize(dataset["observations"])
    if not run.resumed or run.resumed["phase"] == "offline":
        offline_agent(cfg, run, agent, offline_buffer, evaluator)
    fine_tune(cfg, run, agent, offline_buffer, transform, evaluator)
    run.finish()


if __name__ == "__main__":
    main()
