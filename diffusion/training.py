"""Losses of the two networks, and the loop that fits the behavior model to a dataset."""

import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from d4rl_gymnasium.files import contents_of, load, save
from diffusion.networks import BehaviorModel, EnergyModel
from diffusion.process import T_MAX, T_MIN, perturb

REPORT_EVERY = 1_000  # updates between looks at the loss, each of which waits for the device
SAVE_SECONDS = 300.0  # age at which a report saves the training again


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
    accelerate: Callable[[Callable], Callable] | None = None,
) -> float:
    """Fit nu_0 to states [N, S], actions [N, A] (defaults: App. B.5); return the last mean loss.

    `on_progress(updates_done, mean_loss)` is called every 1,000 updates and at the end. With `path`
    the training is kept in `path` + ".partial", and a call that finds the file goes on from it.
    Raises FloatingPointError when the loss is not finite, DamagedFileError when the partial file is
    damaged or holds another training.
    """
    settings = [len(states), batch_size, learning_rate, seed]
    optimizer = torch.optim.Adam(model.parameters(), learning_rate, fused=True, capturable=True)
    loss_sum = torch.zeros((), device=states.device)
    update = _update(model, optimizer, loss_sum, states, actions, batch_size)
    update = update if accelerate is None else accelerate(update)
    partial = None if path is None else Path(f"{os.fspath(path)}.partial")
    with own_draws(seed):
        start, mean_loss = 0, float("nan")
        if partial is not None and partial.exists():
            start, mean_loss = _restore(partial, settings, updates, model, optimizer)
        reported, saved = start, time.monotonic()
        for step in range(start + 1, updates + 1):
            update()
            if step < updates and step % REPORT_EVERY:
                continue
            _check_finite(step, loss_sum, *model.parameters())
            mean_loss, reported = (loss_sum / (step - reported)).item(), step
            loss_sum.zero_()
            if partial and (step == updates or time.monotonic() - saved >= SAVE_SECONDS):
                _save(partial, settings, model, optimizer, step, mean_loss)
                saved = time.monotonic()
            if on_progress is not None:
                on_progress(step, mean_loss)
    return mean_loss


def _update(model, optimizer, loss_sum, states, actions, batch_size):
    def update():
        rows = torch.randint(len(states), (batch_size,), device=states.device)
        loss = behavior_loss(model, states[rows], actions[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum.add_(loss.detach())

    return update


@contextmanager
def own_draws(seed: int):
    """Draw from a seed of one's own, and leave the random state of the caller as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _check_finite(step, *tensors):
    # The weights too: the last update may have broken them after a finite loss.
    if not all(torch.isfinite(x).all() for x in tensors):
        raise FloatingPointError(
            f"behavior loss is not finite by update {step}: look for extreme values in the "
            "dataset, or lower the learning rate"
        )


def _save(partial, settings, model, optimizer, step, mean_loss):
    state = {"settings": settings, "step": step, "mean_loss": mean_loss}
    state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    cuda_rng = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    save(partial, state | {"rng": torch.get_rng_state(), "cuda_rng": cuda_rng})


def _restore(partial, settings, updates, model, optimizer):
    with contents_of(partial):
        state = load(partial)
        old, step = state["settings"], state["step"]
        if old != settings or step > updates:
            raise ValueError(f"{step} updates of another training: {old}, not {settings}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if torch.cuda.is_available() and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])
        return step, state["mean_loss"]
