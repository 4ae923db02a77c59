"""Losses of the two networks, and the loop that fits the behavior model to a dataset."""

import os
import pickle
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from diffusion.networks import BehaviorModel, EnergyModel
from diffusion.process import T_MAX, T_MIN, perturb

REPORT_EVERY = 1_000  # updates between looks at the loss, each of which waits for the device


def _perturbed(actions: Tensor, t_shape: tuple[int, ...], generator: Generator | None):
    """Times ~ U[T_MIN, T_MAX], noise ~ N(0, I), and the actions perturbed by them."""
    like = {"device": actions.device, "dtype": actions.dtype, "generator": generator}
    t = T_MIN + (T_MAX - T_MIN) * torch.rand(t_shape, **like)
    noise = torch.randn(actions.shape, **like)
    return t, noise, perturb(actions, t, noise)


def behavior_loss(
    model: BehaviorModel, states: Tensor, actions: Tensor, generator: Generator | None = None
) -> Tensor:
    """Noise prediction loss at states [B, S], actions [B, A] of the dataset, a scalar.

    The mean over rows and action dimensions: 1 is what predicting no noise costs.
    """
    t, noise, actions_t = _perturbed(actions, actions.shape[:1], generator)
    return mse_loss(model(actions_t, states, t).to(noise.dtype), noise)


def energy_loss(
    model: EnergyModel,
    states: Tensor,
    support_actions: Tensor,
    energies: Tensor,
    generator: Generator | None = None,
) -> Tensor:
    """Contrastive energy prediction, Eq. 34: cross entropy of softmax_k f to the labels, a scalar.

    States [B, S]; support actions [B, K, A] drawn from nu_0(. | s); energies [B, K] = beta_E * Q,
    whose softmax over k are the labels (in Eq. 34, E := -Q, and its -f is this f). One t per state,
    own noise per action. The minimiser is f = log E[exp(beta_E Q(s, a_0)) | a_t] + c(s, t).
    """
    t, _, actions_t = _perturbed(support_actions, (states.shape[0], 1), generator)
    log_probabilities = model(actions_t, states[:, None], t).to(energies.dtype).log_softmax(dim=-1)
    return -(energies.softmax(dim=-1) * log_probabilities).sum(dim=-1).mean()


def train_behavior(
    model: BehaviorModel,
    states: Tensor,
    actions: Tensor,
    updates: int = 600_000,
    batch_size: int = 4096,
    learning_rate: float = 1e-4,
    seed: int = 0,
    path: str | os.PathLike | None = None,
    on_progress: Callable[[int, float], None] | None = None,
    checkpoint_every: int = 10_000,
    autocast_dtype: torch.dtype | None = None,
) -> float:
    """Fit nu_0 to states [N, S], actions [N, A] on the model's device; return the last mean loss.

    The defaults are App. B.5's. `on_progress(updates_done, mean_loss)` is called every 1,000
    updates and at the end, with the mean since the last call; it may raise to stop. With `path`,
    the training is kept in `path` + ".partial", and a call that finds the file goes on from it; the
    file stays at the end, for the caller to remove once the model is stored. `autocast_dtype` is
    the type of the networks' products (None: that of the weights).

    Raises FloatingPointError when the loss is not finite, ValueError when the partial file cannot
    be read or holds another training.
    """
    settings = [len(states), batch_size, learning_rate, seed, str(autocast_dtype)]
    training = _Training(model, states, actions, settings, autocast_dtype, path)
    while training.step < updates:
        training.update()
        finished = training.step == updates
        if finished or training.step % REPORT_EVERY == 0:
            training.report(on_progress)
        if finished or training.step % checkpoint_every == 0:
            training.save()
    return training.mean_loss


class _Training:
    """State of `train_behavior`: all that going on exactly needs."""

    COUNTERS = ("step", "n_summed", "mean_loss", "loss_sum")

    def __init__(self, model, states, actions, settings, dtype, path):
        self.model, self.states, self.actions = model, states, actions
        self.settings, self.dtype = settings, dtype
        _, self.batch_size, learning_rate, seed, _ = settings
        self.optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
        self.generator = Generator(states.device).manual_seed(seed)
        self.step, self.n_summed, self.mean_loss = 0, 0, float("nan")
        self.loss_sum = torch.zeros((), device=states.device)
        self.partial = None if path is None else f"{os.fspath(path)}.partial"
        if self.partial is not None and os.path.exists(self.partial):
            self.load()

    def update(self):
        n, device, dtype = len(self.states), self.states.device, self.dtype
        rows = torch.randint(n, (self.batch_size,), device=device, generator=self.generator)
        # Without the cache: within a caller's autocast it would hold the casts of older weights.
        with torch.autocast(device.type, dtype, dtype is not None, cache_enabled=False):
            loss = behavior_loss(self.model, self.states[rows], self.actions[rows], self.generator)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss_sum += loss.detach()
        self.n_summed += 1
        self.step += 1

    def check_finite(self):
        # The weights too: the last update may have broken them after a finite loss.
        if not all(torch.isfinite(x).all() for x in (self.loss_sum, *self.model.parameters())):
            raise FloatingPointError(
                f"behavior loss is not finite by update {self.step}: look for NaN or extreme values"
                " in the dataset, or lower the learning rate"
            )

    def report(self, on_progress):
        self.check_finite()
        self.mean_loss = (self.loss_sum / self.n_summed).item()
        self.loss_sum.zero_()
        self.n_summed = 0
        try:
            if on_progress is not None:
                on_progress(self.step, self.mean_loss)
        except BaseException:
            self.save()
            raise

    def save(self):
        self.check_finite()
        if self.partial is not None:
            content = {name: getattr(self, name) for name in ("settings", *self.COUNTERS)}
            content |= {name: getattr(self, name).state_dict() for name in ("model", "optimizer")}
            torch.save(content | {"generator": self.generator.get_state()}, f"{self.partial}.tmp")
            os.replace(f"{self.partial}.tmp", self.partial)

    def load(self):
        try:
            content = torch.load(self.partial, map_location=self.states.device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"cannot read {self.partial}: delete it to train afresh") from error
        if content["settings"] != self.settings:
            raise ValueError(
                f"{self.partial} holds another training (rows, batch size, learning rate, seed,"
                f" type {content['settings']}, not {self.settings}): delete it to train afresh"
            )
        for name in self.COUNTERS:
            setattr(self, name, content[name])
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.generator.set_state(content["generator"].cpu())
