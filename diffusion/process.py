"""The variance-preserving diffusion process and the solver that runs it backwards."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# VP-SDE (arXiv:2011.13456) with CEP's constants: beta(t) from 0.1 to 20 over t in [1e-3, 1].
BETA_MIN, BETA_MAX = 0.1, 20.0
T_MIN, T_MAX = 1e-3, 1.0
# Times are evenly spaced in t^(1/4). With exact scores and 10 or 15 steps, powers 4 to 8 left under
# half the error of a grid even in log(alpha / sigma), and power 1, even times, fails; with trained
# networks and guidance, powers 3 and 4 were best.
GRID_POWER = 4


def _log_alpha(t):
    return -0.25 * (BETA_MAX - BETA_MIN) * t**2 - 0.5 * BETA_MIN * t


def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    """Scale alpha_t and noise level sigma_t, alpha^2 + sigma^2 = 1, in the shape of t."""
    log_alpha = _log_alpha(t)
    return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()


def perturb(actions: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Forward process a_t = alpha_t a_0 + sigma_t noise: actions and noise [..., A], t [...]."""
    alpha, sigma = alpha_sigma(t)
    return alpha[..., None] * actions + sigma[..., None] * noise


def _schedule(steps: int) -> list[tuple]:
    """Time and coefficients of every step of `solve`.

    With l = log(alpha / sigma), x(l + h) = (sigma' / sigma) x(l) + alpha' times the integral of
    e^(tau - h) clean(l + tau) over tau in [0, h], where primes mean at l + h. Corrector and
    predictor each have the weights of the last state, the older and the newer clean action.
    """
    if steps < 1:
        raise ValueError(f"the solver needs at least 1 step, got {steps}")
    first, last = T_MAX ** (1 / GRID_POWER), T_MIN ** (1 / GRID_POWER)
    grid = [(first + (last - first) * i / steps) ** GRID_POWER for i in range(steps + 1)]
    alpha = [math.exp(_log_alpha(t)) for t in grid]
    sigma = [math.sqrt(-math.expm1(2 * _log_alpha(t))) for t in grid]
    schedule, corrector, last_h = [], (1.0, 0.0, 0.0), math.inf
    for i in range(steps):
        h = math.log(alpha[i + 1] / sigma[i + 1]) - math.log(alpha[i] / sigma[i])
        kept, weight = sigma[i + 1] / sigma[i], -alpha[i + 1] * math.expm1(-h)
        # First order in the first step, for want of history, and in the last, where it is better.
        slope = 0.5 * h / last_h if i < steps - 1 else 0.0
        predictor = (kept, -slope * weight, (1 + slope) * weight)
        schedule.append((grid[i], alpha[i], sigma[i], corrector, predictor))
        # The integral once more, clean(.) now being linear between the interval's two ends.
        newer = alpha[i + 1] - weight / h
        corrector, last_h = (kept, weight - newer, newer), h
    return schedule


def solve(
    noise_prediction: Callable[[Tensor, Tensor], Tensor],
    initial_noise: Tensor,
    steps: int,
    max_action: float | Tensor | None = None,
) -> Tensor:
    """Run the diffusion from t = 1 to 1e-3 in `steps` noise predictions; second order.

    Predictor: multistep DPM-Solver++ (arXiv:2211.01095, Algorithm 2). Each prediction of the noise
    also corrects the step that led to it (UniC, arXiv:2302.04867), which costs no evaluation and,
    with an exact score, halves the error.

    `noise_prediction(x, t)` takes x in the shape of `initial_noise` (standard normal, any shape)
    and t as a 0-d tensor; it returns the noise in the same shape. The state keeps the type of
    `initial_noise` whatever type the prediction has. With `max_action`, the predicted clean actions
    are clamped: exact for data within these bounds, whose mean given a_t lies within them too, and
    what keeps strong guidance stable. Raises ValueError when steps < 1.
    """
    x = predicted = initial_noise
    previous = torch.zeros_like(initial_noise)
    for t, alpha, sigma, corrector, predictor in _schedule(steps):
        # Filled on the device: no copy from the host, so the loop can be captured in a CUDA graph.
        t = initial_noise.new_full((), t, dtype=torch.float32)
        clean = (predicted - sigma * noise_prediction(predicted, t).to(x.dtype)) / alpha
        if max_action is not None:
            clean = clean.clamp(-max_action, max_action)
        kept, older, newer = corrector
        x = kept * x + older * previous + newer * clean
        kept, older, newer = predictor
        predicted = kept * x + older * previous + newer * clean
        previous = clean
    return predicted
