"""All that Algorithm 1 needs of the behavior diffusion, behind one class."""

import hashlib
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from d4rl_gymnasium.files import contents_of, load, locked, save
from diffusion.networks import BehaviorModel, EnergyModel
from diffusion.sampling import draw_support_actions, sample_actions
from diffusion.training import SETTINGS, energy_loss, seeded, train_behavior

SUPPORT_CHUNK = 100  # online states that support actions are drawn for at once, for speed
BEHAVIOR_FIELDS = ("precision", "behavior_width", *SETTINGS)
SUPPORT_FIELDS = (*BEHAVIOR_FIELDS, "n_support", "diffusion_steps")


class EnergyGuidedSampler:
    """Reference actions: the dataset's behavior nu_0, guided by a Q function (Eqs. 5, 6, App. B.5).

    Before the first update call `add_support` and `fit_energy`, then `add_support` as online states
    come, and `train` and `sample` in every update.

    Args:
        config: a DARE script's TrainConfig; used are its settings under "Behavior diffusion", and
            env, device, precision, mixing_ratio and runs_dir.
        states, actions: the dataset's, [N, S] and [N, A].
        online_states: those of the online transitions, [capacity, S]; its rows fill up.
        q_function: maps states [..., S] and actions [..., A] to Q [...]: the smaller target Q.
        accelerate: maps an update without arguments to a faster one.
    """

    def __init__(self, config, states, actions, online_states, q_function, accelerate):
        self.config, self.q_function, self.accelerate = config, q_function, accelerate
        self.behavior = cached_behavior(config, states, actions, accelerate)
        self.energy = EnergyModel(states.shape[1], actions.shape[1], config.energy_hidden)
        self.energy.to(states.device)
        parameters = self.energy.parameters()
        self.optimizer = torch.optim.Adam(parameters, config.energy_lr, fused=True, capturable=True)
        self.q_spread = torch.ones((), device=states.device)  # running mean over n_spreads calls
        self.n_spreads = torch.zeros((), device=states.device)
        self.has_energy = config.reference == "guided" and config.guidance_scale > 0
        self.has_support = self.has_energy or config.reference == "resample"
        if self.has_support:
            rows, self.support = cached_support(config, states, actions, self.behavior)
            self.states, self.online_states = states[rows], online_states
            shape = len(online_states), *self.support.shape[1:]
            self.online_support = torch.zeros(shape, device=states.device)
            self.n_added = 0  # online states that have support actions
            self.n_online = torch.zeros((), dtype=torch.int64, device=states.device)  # n_added

    def add_support(self, n_states: int):
        """Draw support actions for the first n_states online states, many at a time."""
        # At first whenever their number doubles, so that early batches do not repeat a few states.
        if not self.has_support or n_states - self.n_added < min(SUPPORT_CHUNK, self.n_added):
            return
        new, config = slice(self.n_added, n_states), self.config
        with _autocast(config):
            states, sizes = self.online_states[new], (config.n_support, config.diffusion_steps)
            self.online_support[new] = draw_support_actions(self.behavior, states, *sizes)
        self.n_added = n_states
        self.n_online.fill_(n_states)

    def fit_energy(self):
        """Fit f_phi to the offline Q, before the first exchange."""
        if self.has_energy:
            update = self.accelerate(self.train)
            report = progress("energy", self.config.energy_iterations)
            for i in range(self.config.energy_iterations):
                update()
                report(i + 1)

    def train(self) -> dict[str, Tensor]:
        """One update of f_phi, Eq. 34, on offline and online states; returns what to log."""
        if not self.has_energy:
            return {}
        config, device = self.config, self.states.device
        n_offline = round(config.energy_batch_size * config.mixing_ratio)
        i = torch.randint(len(self.states), (n_offline,), device=device)
        j = torch.randint(1 << 62, (config.energy_batch_size - n_offline,), device=device)
        j %= self.n_online  # as ReplayBuffer.sample_indices, for CUDA graphs
        states = torch.cat([self.states[i], self.online_states[j]])
        support = torch.cat([self.support[i], self.online_support[j]])
        loss = energy_loss(self.energy, states, support, self.energies(states, support))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"energy_loss": loss.detach()}

    @torch.no_grad()
    def energies(self, states: Tensor, support: Tensor) -> Tensor:
        """beta_E Q of the support actions [B, K, A] of states [B, S], [B, K]; with energy_normalize
        Q is in units of its spread over the K actions, whose running mean is updated here.
        """
        q = self.q_function(states[:, None].expand(-1, support.shape[1], -1), support)
        if self.config.energy_normalize:
            self.n_spreads += 1
            self.q_spread.lerp_(q.std(1).mean(), (1 / self.n_spreads).clamp(min=0.001))
            q = q / self.q_spread
        return self.config.energy_beta * q

    def sample(self, states: Tensor, offline_rows: Tensor, online_rows: Tensor) -> Tensor:
        """Reference actions [B, n, A] for the states [B, S] of rows of the dataset and online rows:
        by guided sampling (Eq. 6), or from a state's support actions with softmax(s beta_E Q).
        """
        config = self.config
        if config.reference == "guided":
            guide = self.energy, config.guidance_scale, config.diffusion_steps
            return sample_actions(self.behavior, states, config.n_reference, *guide)
        support = torch.cat([self.support[offline_rows], self.online_support[online_rows]])
        logits = config.guidance_scale * self.energies(states, support)
        shape = len(states), config.n_reference, config.n_support
        # Gumbel-max: draws from softmax(logits) that a CUDA graph can record.
        gumbel = -torch.empty(shape, device=states.device).exponential_().log()
        drawn = (logits[:, None] + gumbel).argmax(-1, keepdim=True)
        return support.take_along_dim(drawn, 1)

    def state_dict(self) -> dict:
        """What changes online, and which behavior model it belongs to; all else is in the cache."""
        state = {name: getattr(self, name).state_dict() for name in ("energy", "optimizer")}
        if self.has_support:
            state["online_support"] = self.online_support[: self.n_added].clone()
        state |= {"q_spread": self.q_spread, "n_spreads": self.n_spreads}
        return state | {"behavior": self._behavior_digest()}

    def _behavior_digest(self) -> str:
        weights = torch.cat([x.float().flatten() for x in self.behavior.parameters()])
        return hashlib.sha256(weights.cpu().numpy().data).hexdigest()[:12]

    def load_state_dict(self, state: dict):
        """Inverse of state_dict."""
        digest = self._behavior_digest()
        if state.get("behavior", digest) != digest:
            print("resuming with another behavior model: the cache was made anew", flush=True)
        self.energy.load_state_dict(state["energy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.q_spread.copy_(state["q_spread"])
        self.n_spreads.copy_(state["n_spreads"])
        if self.has_support:
            self.n_added = len(state["online_support"])
            self.n_online.fill_(self.n_added)
            self.online_support[: self.n_added] = state["online_support"]


def _autocast(config):
    return torch.autocast(config.device, torch.bfloat16, config.precision == "bf16")


def cached_behavior(config, states: Tensor, actions: Tensor, accelerate) -> BehaviorModel:
    """nu_0 of states [N, S] and actions [N, A], trained or from the cache."""
    with seeded(config.behavior_seed):
        model = BehaviorModel(states.shape[1], actions.shape[1], config.behavior_width)
    model.to(states.device)
    with _cached("behavior", config, BEHAVIOR_FIELDS, states, actions) as path:
        if path.exists():
            with contents_of(path):
                model.load_state_dict(load(path)["behavior"])
        else:
            report = progress("behavior model", config.behavior_iterations)
            train_behavior(model, states, actions, config, path, report, accelerate)
            save(path, {"behavior": model.state_dict()})
        Path(f"{path}.partial").unlink(missing_ok=True)  # also one that a kill just here left
    model.zero_grad()  # frees the last update's gradients
    if config.precision == "bf16":  # else autocast casts the weights in every solver step
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    return model.requires_grad_(False)


def cached_support(config, states: Tensor, actions: Tensor, behavior: BehaviorModel) -> tuple:
    """Rows [n] of the dataset and their support actions [n, K, A], drawn or from the cache."""
    n = config.n_support_states if config.reference == "guided" else 0  # 0 is all rows
    with _cached(f"support-{n}", config, SUPPORT_FIELDS, states, actions) as path:
        if not path.exists():
            with seeded(config.behavior_seed), _autocast(config):
                rows = torch.randperm(len(states))[:n] if n else torch.arange(len(states))
                report, steps = progress("support actions", len(rows)), config.diffusion_steps
                support = draw_support_actions(
                    behavior, states[rows], config.n_support, steps, on_progress=report
                )
            save(path, {"rows": rows, "support": support.cpu()})
        with contents_of(path):
            content = load(path)
            return content["rows"].to(states.device), content["support"].to(states.device)


@contextmanager
def _cached(kind: str, config, fields: tuple, states: Tensor, actions: Tensor):
    """Path of what depends on `fields`, the data and this folder's code; locked if missing."""
    digest = hashlib.sha256(repr([getattr(config, name) for name in fields]).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for data in (states, actions):
        digest.update(data.cpu().contiguous().numpy().data)
    folder = Path(config.runs_dir, "cache").expanduser()
    path = folder / f"{kind}-{config.env}-{digest.hexdigest()[:12]}.pt"
    if path.exists():
        print(f"cache hit: {kind} from {path}", flush=True)
        yield path
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(path):
        yield path


def progress(what: str, total: int) -> Callable:
    """A function of what is done and of losses, which prints a line at every tenth of a long
    computation, and one after its first minute.
    """
    shown, start = -1, time.monotonic()  # tenths, seconds

    def report(done: int, **losses: float):
        nonlocal shown
        tenths, minutes = done * 10 // total, (time.monotonic() - start) / 60
        if done == total or tenths > max(shown, 0) or (shown < 0 and minutes >= 1):
            shown = tenths
            text = "".join(f", {name.replace('_', ' ')} {x:.4f}" for name, x in losses.items())
            print(f"{what}: {done:,} of {total:,} after {minutes:.0f} min{text}", flush=True)

    return report
