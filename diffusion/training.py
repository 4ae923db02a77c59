"""Losses of the two networks, and the loop that fits the behavior model to a dataset."""

import os
import pickle
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from diffusion.networks import BehaviorModel, EnergyModel
from diffusion.process import T_MAX, T_MIN, perturb

REPORT_EVERY = 1_000


def _random_times(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None):
    uniform = torch.rand(shape, device=like.device, dtype=like.dtype, generator=generator)
    return T_MIN + (T_MAX - T_MIN) * uniform


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)


def behavior_loss(
    model: BehaviorModel,
    states: Tensor,
    actions: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Noise prediction loss, mean over rows and action dimensions: 1 predicts nothing.

    States [B, S] and actions [B, A] of the dataset; t ~ U[1e-3, 1] and the noise are drawn here.
    """
    t = _random_times(states.shape[:1], states, generator)
    noise = _noise_like(actions, generator)
    return mse_loss(model(perturb(actions, t, noise), states, t).to(noise.dtype), noise)


def energy_loss(
    model: EnergyModel,
    states: Tensor,
    support_actions: Tensor,
    energies: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Contrastive energy prediction, Eq. 34: cross entropy of softmax_k f against the labels.

    States [B, S]; support actions [B, K, A] drawn from nu_0(. | s); energies [B, K] = beta_E * Q,
    whose softmax over k are the labels (the paper's exponents -beta E with E := -Q, and its -f is
    our f). One t per state, own noise per action. Minimised by
    f = log E[exp(beta_E Q(s, a_0)) | a_t] + c(s, t).
    """
    t = _random_times((states.shape[0], 1), states, generator)
    noisy_actions = perturb(support_actions, t, _noise_like(support_actions, generator))
    prediction = model(noisy_actions, states[:, None], t)
    log_probabilities = prediction.to(energies.dtype).log_softmax(dim=-1)
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
    """Fit nu_0 to states [N, S], actions [N, A] (on the model's device); return the last mean loss.

    Defaults are App. B.5's. `on_progress(updates_done, mean_loss)` is called every 1,000 updates
    and at the end, with the mean since the previous call. With `path`, the state of the training
    is kept in `path` + ".partial" and an interrupted call resumes from it; the file stays after the
    last update, so that the caller removes it once the model is stored. `autocast_dtype` is the
    type of the networks' products (None: that of the weights).

    Raises FloatingPointError when the loss is not finite, ValueError when the partial file belongs
    to another training or cannot be read.
    """
    training = _Training(model, states, actions, batch_size, learning_rate, seed, autocast_dtype)
    partial = None if path is None else f"{os.fspath(path)}.partial"
    if partial is not None and os.path.exists(partial):
        training.load(partial)
    while training.step < updates:
        training.update()
        done = training.step == updates
        report = training.step % REPORT_EVERY == 0 or done
        if report:
            training.report(on_progress)
        if partial is not None and (training.step % checkpoint_every == 0 or done):
            training.save(partial)
    return training.mean_loss


class _Training:
    """State of `train_behavior`: everything that an exact resumption needs."""

    def __init__(self, model, states, actions, batch_size, learning_rate, seed, autocast_dtype):
        self.model, self.states, self.actions = model, states, actions
        self.batch_size, self.autocast_dtype = batch_size, autocast_dtype
        self.optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
        self.generator = torch.Generator(states.device).manual_seed(seed)
        self.identity = {
            "rows": states.shape[0],
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "seed": seed,
        }
        self.step = 0
        self.reported_step = 0
        self.loss_sum = torch.zeros((), device=states.device)
        self.mean_loss = float("nan")

    def update(self):
        rows = torch.randint(
            self.states.shape[0],
            (self.batch_size,),
            device=self.states.device,
            generator=self.generator,
        )
        # No cache: an outer autocast context would keep the casts of older weights.
        with torch.autocast(
            self.states.device.type,
            self.autocast_dtype,
            enabled=self.autocast_dtype is not None,
            cache_enabled=False,
        ):
            loss = behavior_loss(self.model, self.states[rows], self.actions[rows], self.generator)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss_sum += loss.detach()
        self.step += 1

    def report(self, on_progress):
        self.check_finite()
        self.mean_loss = (self.loss_sum / (self.step - self.reported_step)).item()
        self.loss_sum.zero_()
        self.reported_step = self.step
        if on_progress is not None:
            on_progress(self.step, self.mean_loss)

    def check_finite(self):
        if not torch.isfinite(self.loss_sum):
            raise FloatingPointError(
                f"behavior loss is not finite by update {self.step}: look for extreme values in "
                "the dataset or lower the learning rate"
            )

    def save(self, path: str):
        self.check_finite()
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "loss_sum": self.loss_sum,
            "mean_loss": self.mean_loss,
            "step": self.step,
            "reported_step": self.reported_step,
            "identity": self.identity,
        }
        temporary = f"{path}.{os.getpid()}.tmp"
        torch.save(content, temporary)
        os.replace(temporary, path)

    def load(self, path: str):
        try:
            content = torch.load(path, map_location=self.states.device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"cannot read {path}: delete it to train afresh") from error
        if content["identity"] != self.identity:
            raise ValueError(
                f"{path} holds a training with {content['identity']}, not {self.identity}: "
                "delete it to train afresh"
            )
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.generator.set_state(content["generator"].cpu())
        self.loss_sum = content["loss_sum"]
        self.mean_loss = content["mean_loss"]
        self.step = content["step"]
        self.reported_step = content["reported_step"]
