"""Losses of the two networks, and the loop that fits the behavior model to a dataset."""

import math
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
SAVE_SECONDS = 300.0  # once so long has passed, the next report saves the training
SETTINGS = ("behavior_iterations", "behavior_batch_size", "behavior_lr", "behavior_lr_decay")
SETTINGS += ("behavior_seed",)
WARM_UP = 0.02  # share of the updates
# At most so many held-out rows are looked at; a rise of their loss by this factor is reported.
HELD_OUT_ROWS, OVERFITTED = 10_000, 1.05


def _perturbed(actions: Tensor, t_shape: tuple[int, ...], generator: Generator | None = None):
    """Times ~ U[T_MIN, T_MAX], noise ~ N(0, I), and the actions perturbed by them."""
    like = {"device": actions.device, "dtype": actions.dtype, "generator": generator}
    t = T_MIN + (T_MAX - T_MIN) * torch.rand(t_shape, **like)
    noise = torch.randn(actions.shape, **like)
    return t, noise, perturb(actions, t, noise)


def behavior_loss(model: BehaviorModel, states: Tensor, actions: Tensor) -> Tensor:
    """Noise prediction loss at states [B, S], actions [B, A] of the dataset, a scalar.

    The mean over rows and action dimensions: 1 is what predicting no noise costs.
    """
    t, noise, actions_t = _perturbed(actions, actions.shape[:1])
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
    own noise per action. The minimiser is f = log E[exp(beta_E Q(s, a_0)) | a_t] + c(s, t) for K to
    infinity, and flatter for a smaller K, since few draws seldom have the actions that weigh most.
    """
    t, _, actions_t = _perturbed(support_actions, (states.shape[0], 1), generator)
    log_probabilities = model(actions_t, states[:, None], t).to(energies.dtype).log_softmax(dim=-1)
    return -(energies.softmax(dim=-1) * log_probabilities).sum(dim=-1).mean()


def train_behavior(
    model: BehaviorModel,
    states: Tensor,
    actions: Tensor,
    config,
    path: str | os.PathLike,
    on_progress: Callable = lambda done, **losses: None,
    accelerate: Callable = lambda update: update,
) -> float:
    """Fit nu_0 to states [N, S], actions [N, A], by the SETTINGS of `config`; return the last loss.

    `on_progress(updates_done, loss=, held_out_loss=)` is called every 1,000 updates and at the end;
    loss is the mean since the last call. The training is kept in `path` + ".partial"; a call that
    finds the file resumes it. Raises FloatingPointError when the loss is not finite,
    DamagedFileError when the partial file is damaged or holds another training.
    """
    updates, partial = config.behavior_iterations, Path(f"{path}.partial")
    settings = [len(states), *(getattr(config, field) for field in SETTINGS)]
    data, held_out = _hold_out(states, actions)
    lr, loss_sum = torch.zeros((), device=states.device), torch.zeros((), device=states.device)
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True, capturable=True)
    update = accelerate(_update(model, optimizer, loss_sum, *data, config.behavior_batch_size))
    with seeded(config.behavior_seed):
        start, losses, smallest = 0, {"loss": math.nan, "held_out_loss": math.nan}, math.inf
        if partial.exists():
            start, losses, smallest = _restore(partial, settings, updates, model, optimizer)
            optimizer.param_groups[0]["lr"] = lr
        reported, saved = start, time.monotonic()
        for step in range(start + 1, updates + 1):
            lr.fill_(_rate(config, step / updates))
            update()
            if step < updates and step % REPORT_EVERY:
                continue
            losses = _losses(model, loss_sum / (step - reported), held_out, step)
            smallest, reported = min(smallest, losses["held_out_loss"]), step
            loss_sum.zero_()
            if step == updates or time.monotonic() - saved >= SAVE_SECONDS:
                _save(partial, settings, model, optimizer, step, losses, smallest)
                saved = time.monotonic()
            on_progress(step, **losses)
    if losses["held_out_loss"] > OVERFITTED * smallest:
        print(f"behavior model: overfitted, held-out loss up from {smallest:.4f}", flush=True)
    return losses["loss"]


def _hold_out(states, actions):  # blocks of the file, for the rows of an episode are alike
    percent = torch.arange(len(states), device=states.device) * 100 // len(states)
    held = percent % 20 == 10  # the 11th, 31st, 51st, 71st and 91st percent of the file
    every = (len(states) - 1) // (20 * HELD_OUT_ROWS) + 1  # some rows of all five blocks
    return (states[~held], actions[~held]), (states[held][::every], actions[held][::every])


def _update(model, optimizer, loss_sum, states, actions, batch_size):
    def update():
        rows = torch.randint(len(states), (batch_size,), device=states.device)
        loss = behavior_loss(model, states[rows], actions[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum.add_(loss.detach())

    return update


def _rate(config, done):
    if not config.behavior_lr_decay:  # otherwise a linear warm-up, then a cosine to 0
        return config.behavior_lr
    return config.behavior_lr * min(1, done / WARM_UP) * 0.5 * (1 + math.cos(math.pi * done))


def _losses(model, mean_loss, held_out, step):
    # The weights too: the last update may have broken them after a finite loss.
    if not all(torch.isfinite(x).all() for x in (mean_loss, *model.parameters())):
        raise FloatingPointError(
            f"behavior loss is not finite by update {step}: look for extreme values in the "
            "dataset, or lower --behavior_lr"
        )
    with seeded(0), torch.no_grad():  # the same times and noise each time
        return {"loss": mean_loss.item(), "held_out_loss": behavior_loss(model, *held_out).item()}


@contextmanager
def seeded(seed: int):
    """Draw from a seed of one's own, and leave the random state of the caller as it was."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _save(partial, settings, model, optimizer, step, losses, smallest):
    cuda_rng = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    state = {"settings": settings, "step": step, "losses": losses, "smallest": smallest}
    state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
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
        return step, state["losses"], state["smallest"]
