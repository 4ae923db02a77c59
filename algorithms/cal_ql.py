"""Cal-QL and CQL, offline then online: python algorithms/cal_ql.py --env antmaze-umaze-v2

Cal-QL is Nakamoto et al. (2023); --calibrated false --name cql runs CQL, Kumar et al. (2020).
Online, half of each of its batches is offline data. Equations and tables are the DARE paper's,
names and their order CORL's: algorithms/README.md lists what differs from CORL on purpose.
"""

import math
import os
import shutil
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml
from filelock import FileLock
from matplotlib.figure import Figure
from tqdm import tqdm

import d4rl_gymnasium as d4rl
from d4rl_gymnasium.files import contents_of, digest, load, save, save_figure, write
from d4rl_gymnasium.runs import HIGHEST, check_name, errors_in_one_line, parse, wandb_init


class TensorBatch(NamedTuple):
    """Columns of buffers and batches: [B, S], [B, A], [B], [B, S], [B] and V^nu of Eq. 1, [B]."""

    observations: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    next_observations: torch.Tensor
    terminals: torch.Tensor
    mc_returns: torch.Tensor


ALPHA_PRIME_MAX = 1e6  # bound of the Lagrange multiplier (CORL)
LOG_STD_MIN = -20.0
LOG_STD_MAX = 2.0
UNFINISHED = -math.inf  # Monte-Carlo return of a row until its episode ends: a bound without effect


@dataclass
class TrainConfig:
    """All settings; those that are None here get their value from PRESETS, by task."""

    # Experiment
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cuda or cpu
    env: str = "antmaze-umaze-v2"  # D4RL task
    data: str = "d4rl"  # d4rl (cache or download), regenerated, minari:ID or an HDF5 file
    regenerated_size: int = 200_000  # transitions that --data regenerated collects; 0: D4RL's size
    seed: int = 0  # of networks, batches, exploration and the training environment
    eval_seed: int = 42  # of the resets of every evaluation
    eval_freq: int = 10_000  # online steps between evaluations
    offline_eval_freq: int = 50_000  # offline updates between evaluations
    n_episodes: int = None  # episodes per evaluation
    offline_iterations: int = 1_000_000  # offline updates (Sec. 7.1)
    online_iterations: int = 200_000  # online environment steps (Sec. 7.1)
    initial_collection_steps: int = 5_000  # first online steps, without updates (PEX)
    utd: int = 1  # updates per online step (Sec. 7.4)
    load_model: str = ""  # offline.pt of an earlier run, to start fine-tuning from
    runs_dir: str = "runs"  # a run writes runs_dir/name/env/seed_N
    log_freq: int = 1_000  # steps between rows of train.csv, which are means over them
    checkpoint_freq: int = 10_000  # steps between checkpoints, or ten minutes if that comes first
    threads: int = 1  # CPU threads; to use two cores, start two runs of one thread each
    precision: str = "fp32"  # of the networks' matrix products: fp32 or bf16
    compile: bool = False  # compile the updates; needs a C++ compiler
    cuda_graph: bool = False  # on CUDA, replay each update as one graph
    # Cal-QL
    batch_size: int = 256  # rows of a batch, Table 4
    discount: float = 0.99  # gamma, Table 4
    policy_lr: float = 1e-4  # learning rate of the policy, Table 4, and of its temperature (CORL)
    qf_lr: float = 3e-4  # learning rate of Q, Table 4, and of the Lagrange multiplier (CORL)
    soft_target_update_rate: float = 0.005  # rate of the target network, Table 4
    calibrated: bool = True  # true is Cal-QL, false is CQL
    calibrated_online: bool = False  # max with V^nu online too; false as in Sec. 3.2 and CORL
    cql_alpha: float = None  # weight of R in Eq. 1, offline, Table 4
    cql_alpha_online: float = None  # weight of R in Eq. 1, online, Table 4
    cql_n_actions: int = 10  # actions of each kind in R, and under the max of the backup (CORL)
    cql_lagrange: bool = None  # learn a Lagrange multiplier of R by dual descent, Table 4
    cql_target_action_gap: float = None  # value of R that the multiplier aims at, Table 4
    cql_temp: float = 1.0  # temperature of R's logsumexp, Table 4
    cql_max_target_backup: bool = None  # max over drawn actions in the target, Table 4
    cql_clip_diff_min: float = -200.0  # lower bound of R on a row, Table 4
    normalize: bool = None  # standardize observations, Table 4
    normalize_reward: bool = None  # locomotion: 1000 r / range of returns, else no effect; Table 4
    hidden_dim: int = 256  # units of a hidden layer, Table 4
    q_n_hidden_layers: int = None  # hidden layers of Q, Table 4
    policy_n_hidden_layers: int = 3  # hidden layers of the policy (CORL)
    reward_scale: float = None  # factor of every reward, Table 4
    reward_bias: float = None  # added to every scaled reward, Table 4
    mixing_ratio: float = 0.5  # offline share of an online batch (PEX, Cal-QL)
    is_sparse_reward: bool = None  # the return of a failed episode is r / (1 - gamma), Table 4
    # Wandb logging
    project: str = "DARE"  # project on wandb
    name: str = Path(__file__).stem  # of the method; rename a variant to keep its runs apart
    wandb: str = "offline"  # online, offline or disabled

    def __post_init__(self):
        """Fill in what differs by task, and refuse impossible values."""
        family = d4rl.task(self.env).family  # an unknown task is a ValueError with the nearest ones
        presets = {**PRESETS[family], **PRESETS.get(self.env, {})}
        for key, value in vars(self).items():
            if value is None:
                setattr(self, key, value := presets.get(key))
            low, high = LOWEST.get(key, 0), (1 if key in AT_MOST_1 else HIGHEST.get(key, 10**9))
            low = -high if key in MAY_BE_NEGATIVE else low
            if value is None or isinstance(value, (int, float)) and not low <= value <= high:
                raise ValueError(f"--{key} must be from {low} to {high}, not {value}")
            if key in CHOICES and value not in CHOICES[key]:
                raise ValueError(f"--{key} must be one of {', '.join(CHOICES[key])}, not {value}")
        check_name(self.name)
        if 0 < self.online_iterations <= self.initial_collection_steps:
            raise ValueError("--online_iterations must be 0, or above --initial_collection_steps")
        self.n_offline = round(self.batch_size * self.mixing_ratio)  # the first rows of a batch
        if not 0 < self.n_offline < self.batch_size:
            raise ValueError(f"--mixing_ratio {self.mixing_ratio} leaves one half empty")
        if self.cql_temp == 0:
            raise ValueError("--cql_temp must be above 0")
        if self.is_sparse_reward and self.discount == 1:
            raise ValueError("--is_sparse_reward needs a --discount below 1")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda, but torch sees no CUDA device: use --device cpu")
        if self.compile and not shutil.which(os.environ.get("CXX", "g++")):
            raise ValueError("--compile needs a C++ compiler: install g++ or set CXX")


PRESETS = {  # Table 4; n_episodes as in iql.py
    "locomotion": dict(
        cql_alpha=10.0, cql_alpha_online=10.0, cql_lagrange=False, cql_target_action_gap=-1.0,
        cql_max_target_backup=False, normalize=True, normalize_reward=False, q_n_hidden_layers=3,
        reward_scale=1.0, reward_bias=0.0, is_sparse_reward=False, n_episodes=10,
    ),
    "antmaze": dict(
        cql_alpha=5.0, cql_alpha_online=5.0, cql_lagrange=True, cql_target_action_gap=0.8,
        cql_max_target_backup=True, normalize=False, normalize_reward=True, q_n_hidden_layers=5,
        reward_scale=10.0, reward_bias=-5.0, is_sparse_reward=True, n_episodes=100,
    ),
}  # fmt: skip
CHOICES = {"device": ("cpu", "cuda"), "precision": ("fp32", "bf16")}
CHOICES |= {"wandb": ("online", "offline", "disabled")}
LOWEST = dict(eval_freq=1, offline_eval_freq=1, n_episodes=1, initial_collection_steps=1, utd=1)
LOWEST |= dict(log_freq=1, checkpoint_freq=1, threads=1, batch_size=1, cql_n_actions=1)
LOWEST |= dict(hidden_dim=1, q_n_hidden_layers=1, policy_n_hidden_layers=1)
AT_MOST_1 = ("discount", "soft_target_update_rate", "mixing_ratio")
MAY_BE_NEGATIVE = ("cql_target_action_gap", "cql_clip_diff_min", "reward_bias")
OFFLINE_FIELDS = ("env", "data", "regenerated_size", "discount", "calibrated", "cql_alpha")
OFFLINE_FIELDS += ("cql_n_actions", "cql_lagrange", "cql_target_action_gap", "cql_temp")
OFFLINE_FIELDS += ("cql_max_target_backup", "cql_clip_diff_min", "normalize", "normalize_reward")
OFFLINE_FIELDS += ("hidden_dim", "q_n_hidden_layers", "policy_n_hidden_layers")
OFFLINE_FIELDS += ("reward_scale", "reward_bias", "is_sparse_reward")  # must match --load_model's
PANELS = {"d4rl_normalized_score": "normalized score", "q": "mean Q"}  # of curve.png


@torch.no_grad()
def soft_update(target: nn.Module, source: nn.Module, tau: float):
    """Exponential moving average of the parameters."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


class ReplayBuffer:
    """Transitions as rows of one tensor, so that a batch is one look-up."""

    def __init__(self, state_dim: int, action_dim: int, buffer_size: int, device: str = "cpu"):
        s, a, n = state_dim, action_dim, len(TensorBatch._fields) - 4  # n scalars follow s'
        self._columns = [slice(s), slice(s, s + a), s + a, slice(s + a + 1, -n), *range(-n, 0)]
        self._data = torch.zeros(buffer_size, 2 * s + a + 1 + n, device=device)
        self.size = torch.zeros((), dtype=torch.int64, device=device)
        self._pointer = 0  # size as a Python int

    def load_d4rl_dataset(self, data: dict[str, np.ndarray]):
        """Append the columns of a dataset."""
        columns = [np.reshape(data[k], (len(data["rewards"]), -1)) for k in TensorBatch._fields]
        self._append(torch.from_numpy(np.concatenate(columns, 1)))

    def add_transition(self, *transition):
        """Append one transition, its values in the order of TensorBatch."""
        self._append(torch.from_numpy(np.hstack(transition)[None]))

    def _append(self, rows: torch.Tensor):
        start, self._pointer = self._pointer, self._pointer + len(rows)
        self._data.narrow(0, start, len(rows)).copy_(rows)  # an error if the buffer is full
        self.size.fill_(self._pointer)

    def rows(self, index: torch.Tensor | slice) -> TensorBatch:
        """The rows at the given indices."""
        rows = self._data[index]
        return TensorBatch(*(rows[:, column] for column in self._columns))

    def sample_indices(self, batch_size: int, n_rows: torch.Tensor | None = None) -> torch.Tensor:
        """Indices [batch_size] of rows, or of the first n_rows, uniform, with replacement."""
        # The bound is a tensor, to grow in a replayed CUDA graph too; randint takes only numbers.
        draws = torch.randint(1 << 62, (batch_size,), device=self._data.device)
        return draws % (self.size if n_rows is None else n_rows)

    def sample(self, batch_size: int) -> TensorBatch:
        """Draw rows uniformly, with replacement."""
        return self.rows(self.sample_indices(batch_size))

    def state_dict(self) -> dict:
        """The filled rows."""
        return {"rows": self._data[: self._pointer].clone()}

    def load_state_dict(self, state: dict):
        """Inverse of state_dict."""
        self._pointer = 0
        self._append(state["rows"])


def eval_actor(envs: gym.vector.VectorEnv, trainer, n_episodes: int, seed: int) -> np.ndarray:
    """Returns [n_episodes] of the mean policy, one episode per environment."""
    states, _ = envs.reset(seed=seed)
    returns, running = np.zeros(n_episodes), np.ones(n_episodes, bool)
    while running.any():
        actions = trainer.act(states, deterministic=True)
        states, rewards, terminated, truncated, _ = envs.step(actions)
        returns += rewards * running
        running &= ~(terminated | truncated)
    return returns


def return_reward_range(dataset: dict) -> tuple[float, float]:
    """Smallest and largest return of an episode."""
    returns = np.add.reduceat(dataset["rewards"].astype(float), d4rl.episode_starts(dataset))
    return float(returns.min()), float(returns.max())


def discounted_returns(rewards: np.ndarray, config: TrainConfig) -> np.ndarray:
    """Monte-Carlo returns [T] of an episode; a truncated one counts as ended."""
    if config.is_sparse_reward and (rewards == np.float32(config.reward_bias)).all():
        return rewards / (1 - config.discount)  # the goal was never reached
    returns = []
    for reward in reversed(rewards.tolist()):
        returns.append(reward + config.discount * (returns[-1] if returns else 0.0))
    return np.array(returns[::-1])


def get_return_to_go(dataset: dict, config: TrainConfig) -> np.ndarray:
    """Monte-Carlo returns [N] of a dataset, episode by episode."""
    episodes = np.split(dataset["rewards"], d4rl.episode_starts(dataset)[1:])
    return np.concatenate([discounted_returns(rewards, config) for rewards in episodes])


def finish_episode(buffer: ReplayBuffer, config: TrainConfig):
    """Fill in the Monte-Carlo returns of the episode that just ended, the buffer's last rows."""
    batch = buffer.rows(slice(int(buffer.size)))  # a slice of rows is a view
    start = int((batch.mc_returns != UNFINISHED).sum())
    returns = discounted_returns(batch.rewards[start:].cpu().numpy(), config)
    batch.mc_returns[start:] = torch.from_numpy(returns)


def modify_reward(dataset: dict, config: TrainConfig) -> tuple[float, float]:
    """Scale and shift the dataset's rewards; returns (scale, shift) for the online rewards."""
    scale, shift = config.reward_scale, config.reward_bias
    if config.normalize_reward and d4rl.task(config.env).family != "antmaze":
        min_ret, max_ret = return_reward_range(dataset)
        if min_ret == max_ret:
            sys.exit("error: all episodes have the same return: use --normalize_reward false")
        scale *= 1000.0 / (max_ret - min_ret)
    dataset["rewards"] = dataset["rewards"] * scale + shift
    return scale, shift


# --- Networks ---


def extend_and_repeat(tensor: torch.Tensor, dim: int, repeat: int) -> torch.Tensor:
    """Insert a dimension along which the tensor repeats, without a copy."""
    return tensor.unsqueeze(dim).expand(*tensor.shape[:dim], repeat, *tensor.shape[dim:])


def init_module_weights(module: nn.Module):
    """Orthogonal weights with gain sqrt(2), zero biases (Table 4, CORL)."""
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight, math.sqrt(2))
        nn.init.zeros_(module.bias)


class MLP(nn.Module):
    """Linear layers of the given sizes with ReLU between them."""

    def __init__(self, dims: list[int], output_activation: nn.Module | None = None):
        super().__init__()
        layers = []
        for dim_in, dim_out in zip(dims[:-2], dims[1:-1], strict=True):
            layers += [nn.Linear(dim_in, dim_out), nn.ReLU()]
        layers += [nn.Linear(*dims[-2:]), output_activation or nn.Identity()]
        self.net = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., dims[0]] to [..., dims[-1]]."""
        return self.net(x).float()  # fp32 again after products in bf16


class TanhGaussian(NamedTuple):
    """Mean and log_std, each [B, A], of Gaussians whose samples are squashed by tanh."""

    mean: torch.Tensor
    log_std: torch.Tensor

    def sample(self, n: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw n squashed actions [B, n, A] with their log densities [B, n]."""
        z = torch.randn(len(self.mean), n, self.mean.shape[-1], device=self.mean.device)
        log_std = self.log_std[:, None]
        x = self.mean[:, None] + torch.exp(log_std) * z
        log_prob = -0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2.0 * (math.log(2.0) - x - F.softplus(-2.0 * x))  # log of tanh's derivative
        return torch.tanh(x), (log_prob - log_slope).sum(-1)


class TanhGaussianPolicy(nn.Module):
    """Gaussian squashed by tanh; its standard deviation depends on the state."""

    def __init__(self, state_dim: int, action_dim: int, hidden_dim: int = 256, n_hidden: int = 3):
        super().__init__()
        self.register_buffer("mean", torch.zeros(state_dim))
        self.register_buffer("std", torch.ones(state_dim))
        self.net = MLP([state_dim, *([hidden_dim] * n_hidden), 2 * action_dim])
        self.net.apply(init_module_weights)
        self.log_std_multiplier = nn.Parameter(torch.tensor(1.0))
        self.log_std_offset = nn.Parameter(torch.tensor(-1.0))

    def forward(self, state: torch.Tensor) -> TanhGaussian:
        """The distribution of actions at states [B, S]."""
        mean, log_std = self.net((state - self.mean) / self.std).chunk(2, -1)
        log_std = self.log_std_multiplier * log_std + self.log_std_offset
        return TanhGaussian(mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX))


class BatchedTwinQ(nn.Module):
    """Two Q functions as one batched network; weights [2, in, out] of each layer."""

    def __init__(self, state_dim: int, action_dim: int, hidden_dim: int = 256, n_hidden: int = 3):
        super().__init__()
        self.register_buffer("mean", torch.zeros(state_dim))
        self.register_buffer("std", torch.ones(state_dim))
        dims = [state_dim + action_dim, *([hidden_dim] * n_hidden), 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for dim_in, dim_out in zip(dims[:-1], dims[1:], strict=True):
            twins = [nn.Linear(dim_in, dim_out).apply(init_module_weights) for _ in range(2)]
            self.weights.append(torch.stack([layer.weight.detach().T for layer in twins]))
            self.biases.append(torch.zeros(2, 1, dim_out))

    def both(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Q1 and Q2, [2, ...], of states [..., S] and actions [..., A]."""
        x = torch.cat([(state - self.mean) / self.std, action], -1)
        h = x.flatten(0, -2).expand(2, -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, torch.relu(h) if i else h, weight)
        return h.view(2, *x.shape[:-1]).float()  # products in bf16 end here

    def forward(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """The smaller of the two, [...]."""
        return self.both(state, action).amin(0)


# --- Agent ---


class CalQL:
    """Networks, their losses and one update of them all."""

    PARTS = ("qf", "actor", "q_target", "factors", "optimizer")  # of a checkpoint

    def __init__(self, state_dim: int, action_dim: int, config: TrainConfig):
        dims, device = (state_dim, action_dim, config.hidden_dim), config.device
        self.qf = BatchedTwinQ(*dims, config.q_n_hidden_layers).to(device)
        self.actor = TanhGaussianPolicy(*dims, config.policy_n_hidden_layers).to(device)
        self.q_target = deepcopy(self.qf).requires_grad_(False)
        # Logarithms of the temperature, 1 at first, and of R's multiplier: e, or 1 without Lagrange
        log_alpha = nn.Parameter(torch.tensor(0.0))
        log_alpha_prime = nn.Parameter(torch.tensor(1.0 if config.cql_lagrange else 0.0))
        log_alpha_prime.requires_grad_(config.cql_lagrange)
        self.factors = nn.ParameterDict(dict(log_alpha=log_alpha, log_alpha_prime=log_alpha_prime))
        self.factors.to(device)
        groups = [
            {"params": [*self.qf.parameters(), log_alpha_prime], "lr": config.qf_lr},
            {"params": [*self.actor.parameters(), log_alpha], "lr": config.policy_lr},
        ]
        self.optimizer = torch.optim.Adam(groups, fused=True, capturable=True)  # for CUDA graphs
        self.target_entropy = -float(action_dim)
        self.config, self.online = config, False
        self.total_it = torch.zeros((), dtype=torch.int64, device=device)

    def standardize(self, observations: np.ndarray):
        """Let the networks standardize observations by the mean and deviation of these [N, S]."""
        for net in (self.qf, self.q_target, self.actor):
            net.mean.copy_(torch.from_numpy(observations.mean(0)))
            net.std.copy_(torch.from_numpy(observations.std(0) + 1e-3))  # + 1e-3 is CORL's

    def policy_loss(self, batch: TensorBatch, policy: TanhGaussian) -> tuple[torch.Tensor, ...]:
        """Soft actor-critic's alpha log pi - Q, and log pi [B]; Q gets no gradient."""
        actions, log_pi = (x[:, 0] for x in policy.sample())
        frozen = {name: p.detach() for name, p in self.qf.named_parameters()}
        q = torch.func.functional_call(self.qf, frozen, (batch.observations, actions))
        return (self.factors["log_alpha"].exp().detach() * log_pi - q).mean(), log_pi.detach()

    @torch.no_grad()
    def td_target(self, batch: TensorBatch, next_policy: TanhGaussian) -> torch.Tensor:
        """Target of Eq. 1, [B]: a' is drawn from the policy, or is the best of n drawn ones."""
        n = self.config.cql_n_actions if self.config.cql_max_target_backup else 1
        actions, _ = next_policy.sample(n)
        states = extend_and_repeat(batch.next_observations, 1, n)
        next_q = self.q_target(states, actions).amax(1)
        return batch.rewards + (1.0 - batch.terminals) * self.config.discount * next_q

    def conservative_regularizer(
        self, batch: TensorBatch, q: torch.Tensor, policy: TanhGaussian, next_policy: TanhGaussian
    ) -> torch.Tensor:
        """R of Eq. 1 for each row and both Q, [2, B]: Q of drawn actions less q, that of the data.

        The expectation over actions is CQL's logsumexp, over uniform actions and the policy's at s
        and s', each weighted by the inverse of its density. R is clipped at cql_clip_diff_min.
        """
        config, n = self.config, self.config.cql_n_actions
        n_rows, action_dim = batch.actions.shape
        with torch.no_grad():
            uniform = 2.0 * torch.rand(n_rows, n, action_dim, device=config.device) - 1.0
            (pi, log_pi), (next_pi, log_next_pi) = policy.sample(n), next_policy.sample(n)
            actions = torch.cat([uniform, pi, next_pi], 1)
            log_uniform = torch.full_like(log_pi, math.log(0.5) * action_dim)
            log_density = torch.cat([log_uniform, log_pi, log_next_pi], 1)
        q_drawn = self.qf.both(extend_and_repeat(batch.observations, 1, 3 * n), actions)
        if config.calibrated and (config.calibrated_online or not self.online):
            # max(Q, V^nu(s)) on the policy's actions, not on the uniform ones (CORL)
            of_policy = torch.maximum(q_drawn[..., n:], batch.mc_returns[:, None])
            q_drawn = torch.cat([q_drawn[..., :n], of_policy], -1)
        q_ood = config.cql_temp * torch.logsumexp((q_drawn - log_density) / config.cql_temp, -1)
        return (q_ood - q).clamp(min=config.cql_clip_diff_min)

    def q_loss(self, batch: TensorBatch, policy: TanhGaussian, next_policy: TanhGaussian) -> tuple:
        """TD loss and alpha R, or alpha (R - gap) with Lagrange, each summed over both Q; mean Q.

        Eq. 1 with the TD term of Eq. 14 and CORL, without 1/2: Table 4's alpha is on this scale.
        """
        n_rows = len(batch.rewards)
        q = self.qf.both(batch.observations, batch.actions)
        mean_q = q.mean()
        td_loss = (q - self.td_target(batch, next_policy)).square().sum() / n_rows
        regularizer = self.conservative_regularizer(batch, q, policy, next_policy)
        if self.config.cql_lagrange:
            regularizer = regularizer - self.config.cql_target_action_gap
        alpha = self.config.cql_alpha_online if self.online else self.config.cql_alpha
        return td_loss, alpha * regularizer.sum() / n_rows, mean_q

    def train(self, batch: TensorBatch) -> dict[str, torch.Tensor]:
        """One update, all its losses computed with the old weights; returns what to log."""
        policy = self.actor(batch.observations)
        with torch.no_grad():
            next_policy = self.actor(batch.next_observations)
        policy_loss, log_pi = self.policy_loss(batch, policy)
        td_loss, regularizer, q = self.q_loss(batch, policy, next_policy)
        alpha_loss = -(self.factors["log_alpha"] * (log_pi + self.target_entropy)).mean()
        alpha_prime = self.factors["log_alpha_prime"].exp().clamp(max=ALPHA_PRIME_MAX)
        alpha_prime_loss = -0.5 * alpha_prime * regularizer.detach()  # mean over both Q (CORL)
        qf_loss = td_loss + alpha_prime.detach() * regularizer
        # The losses share no parameters, so the gradient of the sum is each loss's own.
        self.optimizer.zero_grad(set_to_none=True)
        (qf_loss + policy_loss + alpha_loss + alpha_prime_loss).backward()
        log_dict = {"policy_loss": policy_loss, "log_pi": log_pi.mean()}
        log_dict |= {"alpha": self.factors["log_alpha"].exp(), "alpha_prime": alpha_prime}
        log_dict |= {"q_loss": td_loss, "regularizer": regularizer, "q": q}
        self.optimizer.step()
        soft_update(self.q_target, self.qf, self.config.soft_target_update_rate)
        self.total_it += 1
        return {name: x.detach() for name, x in log_dict.items()}

    def start_online(self):
        """Switch from offline training to fine-tuning."""
        self.online = True

    @torch.no_grad()
    def act(self, state: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """Actions [N, A] at states [N, S]: the squashed mean, or a draw."""
        state = torch.as_tensor(state, dtype=torch.float32, device=self.config.device)
        policy = self.actor(state)
        action = torch.tanh(policy.mean) if deterministic else policy.sample()[0][:, 0]
        return action.cpu().numpy()

    def state_dict(self) -> dict:
        """Networks, optimizer and counters."""
        state = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return {**state, "total_it": self.total_it.item(), "online": self.online}

    def load_state_dict(self, state: dict):
        """Inverse of state_dict; the learning rates stay those of the settings."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        self.total_it.fill_(state["total_it"])
        self.online = state["online"]


# --- Run directory, precision and CUDA graphs: nothing of the algorithm from here to train() ---

# Settings that may change when a run is resumed
FREE = ("device", "threads", "online_iterations", "runs_dir", "name", "project", "wandb")


class Run:
    """Files of a run in runs_dir/name/env/seed_N; checkpoint.pt has all that resuming needs."""

    def __init__(self, config: TrainConfig):
        self.config, self.settings = config, {**asdict(config), "script": Path(__file__).stem}
        self.dir = Path(config.runs_dir, config.name, config.env, f"seed_{config.seed}")
        self.dir = self.dir.expanduser()
        self.dir.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.dir / "lock", timeout=0)
        self.checkpoint = {"phase": "offline", "rows": {}, "sums": {}, "n_sums": 0, "wandb": None}
        self.digest = digest(__file__)  # to say when a run is resumed with an edited script
        self.n_steps = 0  # since the last row of train.csv

    def start(self):
        """With the lock held: read the checkpoint, write config.yaml and start wandb."""
        config, path = self.config, self.dir / "checkpoint.pt"
        if os.path.lexists(path):
            with contents_of(path):
                self.checkpoint = state = load(path)
                old, new = state["settings"], self.settings
                if other := [k for k in new | old if k not in FREE and new.get(k) != old.get(k)]:
                    names = ", ".join(f"{k} ({old.get(k)})" for k in other)
                    sys.exit(f"error: {self.dir} was run with another {names}: use another --name")
                phase, step, last = state["phase"], state["step"], config.offline_iterations
                if phase == "online":
                    last = len(state["online_buffer"]["rows"])
                if phase not in ("offline", "online") or not 0 <= step <= last:
                    raise ValueError(f"{phase} step {step:,} is impossible")
                if phase == "online" and step >= config.online_iterations:
                    sys.exit(f"error: {self.dir} is finished: use another --seed or --name")
        self.rows, self.n_sums = self.checkpoint["rows"], self.checkpoint["n_sums"]
        self.sums = {name: x.to(config.device) for name, x in self.checkpoint["sums"].items()}
        settings = {k: v for k, v in asdict(config).items() if k not in ("name", "runs_dir")}
        write(self.dir / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
        self.wandb = wandb_init(
            config.wandb, project=config.project, group=f"{config.name}-{config.env}",
            id=self.checkpoint["wandb"], dir=self.dir, config=settings,
        )  # fmt: skip
        self.clock = self.last_save = time.perf_counter()

    def add(self, log_dict: dict[str, torch.Tensor]):
        """Add what an update logs to the sums, on the device; other names start them anew."""
        if self.sums.keys() != log_dict.keys():  # a new log interval, or a script edited meanwhile
            self.sums, self.n_sums = {k: torch.zeros_like(x) for k, x in log_dict.items()}, 0
        torch._foreach_add_(list(self.sums.values()), [log_dict[k].detach() for k in self.sums])
        self.n_sums += 1

    def log_means(self, phase: str, step: int):
        """Log the means since the last call; FloatingPointError if one is not finite."""
        means = {name: (x / self.n_sums).item() for name, x in self.sums.items()}  # waits for a GPU
        row = {"steps_per_second": self.n_steps / (time.perf_counter() - self.clock), **means}
        if bad := [name for name, x in row.items() if not math.isfinite(x)]:
            raise FloatingPointError(f"not finite at {phase} step {step}: {', '.join(bad)}")
        self.log("train", phase, step, row)
        self.sums, self.n_sums = {}, 0
        self.n_steps, self.clock = 0, time.perf_counter()

    def log(self, kind: str, phase: str, step: int, row: dict[str, float]):
        """Add a row to eval.csv or train.csv, and to wandb."""
        rows = self.rows.setdefault(kind, [])
        rows.append({"phase": phase, "step": step, **row})
        columns = dict.fromkeys(name for row in rows for name in row)
        lines = [",".join(str(row.get(name, "")) for name in columns) for row in rows]
        write(self.dir / f"{kind}.csv", "\n".join([",".join(columns), *lines, ""]))
        self.wandb.log({f"{phase}/{name}": x for name, x in row.items()} | {f"{phase}/step": step})

    def after_step(self, phase: str, step: int, last: int, parts: dict, evaluate):
        """Log, evaluate and save where they are due."""
        config, self.n_steps = self.config, self.n_steps + 1
        if step % config.log_freq == 0 or step == last:
            self.log_means(phase, step)
        start = time.perf_counter()
        if step % (config.eval_freq if phase == "online" else config.offline_eval_freq) == 0:
            evaluate(phase, step)
        if step % config.checkpoint_freq == 0 or step == last or start - self.last_save > 600:
            self.save(phase, step, parts)
        self.clock += time.perf_counter() - start

    def save(self, phase: str, step: int, parts: dict):
        """Write all that the run needs to resume as if it had not been interrupted."""
        groups = parts["trainer"].optimizer.param_groups
        if not all(p.isfinite().all() for group in groups for p in group["params"]):
            raise FloatingPointError(f"a weight is not finite at {phase} step {step}")
        cuda_rng = torch.cuda.get_rng_state() if self.config.device == "cuda" else None
        state = {"settings": self.settings, "phase": phase, "step": step, "rows": self.rows}
        state |= {"sums": self.sums, "n_sums": self.n_sums, "wandb": self.wandb.id}
        state |= {"rng": torch.get_rng_state(), "cuda_rng": cuda_rng, "source": self.digest}
        state |= {name: part.state_dict() for name, part in parts.items()}
        save(self.dir / "checkpoint.pt", state)
        self.last_save = time.perf_counter()

    def restore(self, phase: str, parts: dict) -> int | None:
        """Load the checkpoint if it is of this phase; returns the steps that are done."""
        state = self.checkpoint
        if "step" not in state or state["phase"] != phase:
            return None
        with contents_of(self.dir / "checkpoint.pt"):
            for name, part in parts.items():
                part.load_state_dict(state[name])
            torch.set_rng_state(state["rng"])
            if self.config.device == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"])
        edited = ", with an edited script" if state.get("source") != self.digest else ""
        print(f"resuming {self.dir} at {phase} step {state['step']:,}{edited}", flush=True)
        return state["step"]

    def plot(self):
        """Draw curve.png: PANELS over the online steps."""
        figure = Figure(figsize=(6, 3 + len(PANELS)), layout="constrained")
        axes = figure.subplots(len(PANELS), sharex=True)
        for ax, (name, label) in zip(axes, PANELS.items(), strict=True):
            rows = [row for kind in self.rows.values() for row in kind if name in row]
            rows = [row for row in rows if row["phase"] == "online"]
            ax.plot([row["step"] for row in rows], [row[name] for row in rows], marker=".")
            ax.set_ylabel(label)
        axes[0].set_title(f"{self.config.name}, {self.config.env}, seed {self.config.seed}")
        axes[-1].set_xlabel(f"online environment steps (data: {self.config.data})")
        save_figure(self.dir / "curve.png", figure)


def accelerate(update, config: TrainConfig):
    """An update without arguments in config.precision; if set, compiled and as a CUDA graph.

    For a graph the first three calls warm up, the fourth captures, later ones replay: an update may
    change tensors in place only, and the next call overwrites its results.
    """
    if config.compile:
        update = torch.compile(update, recompile_limit=1000)  # EDIS compiles anew in each training
    # No cache: it would hold the casts of weights from before the optimizer's step.
    bf16 = config.precision == "bf16"
    update = torch.autocast(config.device, torch.bfloat16, bf16, cache_enabled=False)(update)
    if config.device != "cuda" or not config.cuda_graph:
        return update
    graph, stream, calls, results = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0, None

    def replay():
        nonlocal calls, results
        calls += 1
        if calls <= 3:  # warm-up on a side stream, as torch.cuda.graph requires
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results = update()
            torch.cuda.current_stream().wait_stream(stream)
            return results
        if calls == 4:
            with torch.cuda.graph(graph):
                results = update()
        graph.replay()
        return results

    return replay


# --- Training ---


def train(config: TrainConfig):
    """Train offline, or take the agent of --load_model; then fine-tune online."""
    torch.set_num_threads(config.threads)
    source = {"data": config.data, "regenerated_size": config.regenerated_size}
    dataset = d4rl.qlearning_dataset(config.env, **source)
    reward_scale, reward_shift = modify_reward(dataset, config)
    dataset["mc_returns"] = get_return_to_go(dataset, config)
    dims = dataset["observations"].shape[1], dataset["actions"].shape[1]
    offline_buffer = ReplayBuffer(*dims, len(dataset["rewards"]), config.device)
    offline_buffer.load_d4rl_dataset(dataset)
    online_buffer = ReplayBuffer(*dims, config.online_iterations, config.device)
    env = d4rl.ResumableEnv(gym.make(config.env))
    eval_envs = d4rl.make_eval_envs(config.env, config.n_episodes)

    run = Run(config)
    with run.lock:
        run.start()
        torch.manual_seed(config.seed)
        trainer = CalQL(*dims, config)
        if config.normalize:
            trainer.standardize(dataset["observations"])

        def evaluate(phase: str, step: int):
            returns = eval_actor(eval_envs, trainer, config.n_episodes, config.eval_seed)
            score = 100 * d4rl.get_normalized_score(config.env, float(returns.mean()))
            row = {"return_mean": float(returns.mean()), "return_std": float(returns.std())}
            run.log("eval", phase, step, {**row, "d4rl_normalized_score": float(score)})
            run.plot()
            print(f"{phase} step {step:,}: score {score:.1f}", flush=True)

        # Offline: updates on the dataset alone.
        if config.load_model and run.checkpoint["phase"] == "offline":
            file = Path(config.load_model).expanduser()
            with contents_of(file):
                agent = load(file)
                old = agent["settings"]
                if other := [k for k in OFFLINE_FIELDS if old.get(k) != getattr(config, k)]:
                    sys.exit(f"error: {file} was trained with another {', '.join(other)}")
                if "phase" in agent:
                    sys.exit(f"error: {file} is a checkpoint: use the run's offline.pt")
                trainer.load_state_dict(agent["trainer"])
                print(f"agent: {file}, seed {old['seed']}, {old['offline_iterations']:,} updates")
        elif run.checkpoint["phase"] == "offline":
            parts, last = {"trainer": trainer}, config.offline_iterations
            start = run.restore("offline", parts) or 0
            size = config.batch_size
            update = accelerate(lambda: trainer.train(offline_buffer.sample(size)), config)
            for step in tqdm(range(start, last), "offline", last, initial=start, disable=None):
                run.add(update())
                run.after_step("offline", step + 1, last, parts, evaluate)
            save(run.dir / "offline.pt", dict(trainer=trainer.state_dict(), settings=run.settings))

        # Online: one environment step and `utd` updates at a time.
        torch.manual_seed(config.seed)  # again: the same online phase after --load_model
        trainer.start_online()
        env.reset(seed=config.seed)
        parts = {"trainer": trainer, "online_buffer": online_buffer, "env": env}

        def online_update() -> dict[str, torch.Tensor]:
            offline_batch = offline_buffer.sample(config.n_offline)
            online_batch = online_buffer.sample(config.batch_size - config.n_offline)
            batch = map(torch.cat, zip(offline_batch, online_batch, strict=True))
            return trainer.train(TensorBatch(*batch))

        update = accelerate(online_update, config)
        start, last = run.restore("online", parts), config.online_iterations
        if start is None:
            start = 0
            evaluate("online", 0)
            run.save("online", 0, parts)
        run.clock = time.perf_counter()  # steps_per_second leaves the set-up out
        for step in tqdm(range(start, last), "online", last, initial=start, disable=None):
            state = env.last_observation
            action = trainer.act(state[None])[0]
            # Before env.step, so that the CPU steps while a GPU computes the updates.
            for _ in range(config.utd if step >= config.initial_collection_steps else 0):
                run.add(update())
            next_state, reward, terminated, truncated, _ = env.step(action)
            reward = reward * reward_scale + reward_shift
            online_buffer.add_transition(state, action, reward, next_state, terminated, UNFINISHED)
            if terminated or truncated:
                finish_episode(online_buffer, config)
                env.reset()
            run.after_step("online", step + 1, last, parts, evaluate)
        scores = [r["d4rl_normalized_score"] for r in run.rows["eval"] if r["phase"] == "online"]
        after = scores[1:] or scores  # scores[0] is from before fine-tuning
        print(f"score before fine-tuning {scores[0]:.1f}, mean of the last four evaluations "
              f"{np.mean(after[-4:]):.1f}\ncurve: {run.dir}/curve.png")  # fmt: skip


def main(args: list[str] | None = None):
    """Train with the settings of the command line; errors a user can fix end in one line."""
    with errors_in_one_line():
        train(parse(TrainConfig, args))


if __name__ == "__main__":
    main()
