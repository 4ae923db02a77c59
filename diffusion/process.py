"""The variance-preserving diffusion process and the solver that runs it backwards."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# VP-SDE of Song et al. (2021), constants of CEP: beta(t) from 0.1 to 20 over t in [1e-3, 1].
BETA_MIN, BETA_MAX = 0.1, 20.0
T_MIN, T_MAX = 1e-3, 1.0


def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    """Scale alpha_t and noise level sigma_t, alpha^2 + sigma^2 = 1, in the shape of t."""
    log_alpha = -0.25 * (BETA_MAX - BETA_MIN) * t**2 - 0.5 * BETA_MIN * t
    return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()


def perturb(actions: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Forward process a_t = alpha_t a_0 + sigma_t noise: actions and noise [..., A], t [...]."""
    alpha, sigma = alpha_sigma(t)
    return alpha[..., None] * actions + sigma[..., None] * noise


def _log_snr(t: float) -> float:
    alpha, sigma = alpha_sigma(torch.tensor(t, dtype=torch.float64))
    return math.log(alpha / sigma)


def _time(log_snr: float) -> float:
    """Inverse of `_log_snr`: the positive root of the quadratic -log(alpha_t)."""
    minus_log_alpha = 0.5 * math.log1p(math.exp(-2 * log_snr))
    a, b = 0.25 * (BETA_MAX - BETA_MIN), 0.5 * BETA_MIN
    return 2 * minus_log_alpha / (b + math.sqrt(b * b + 4 * a * minus_log_alpha))


def time_grid(steps: int) -> list[float]:
    """The steps + 1 times from T_MAX down to T_MIN, evenly spaced in log(alpha_t / sigma_t)."""
    first, last = _log_snr(T_MAX), _log_snr(T_MIN)
    return [_time(first + (last - first) * i / steps) for i in range(steps + 1)]


class _Step(NamedTuple):
    """One solver step: clean = scale x - noise_scale noise; x = keep x + new clean + old clean'."""

    scale: float
    noise_scale: float
    keep: float
    new: float
    old: float


@functools.lru_cache(maxsize=64)
def _schedule(steps: int, device: torch.device) -> tuple[tuple[Tensor, ...], list[_Step]]:
    """Times at which the noise is predicted (0-d tensors on `device`), and the coefficients."""
    if steps < 1:
        raise ValueError(f"the solver needs at least 1 step, got {steps}")
    grid = time_grid(steps)
    alphas, sigmas = (x.tolist() for x in alpha_sigma(torch.tensor(grid, dtype=torch.float64)))
    log_snr = [_log_snr(t) for t in grid]
    coefficients = []
    for i in range(steps):
        h = log_snr[i + 1] - log_snr[i]
        weight = -alphas[i + 1] * math.expm1(-h)
        # Slope of the clean action from the two latest predictions; none before the second step.
        extrapolation = 0.5 * h / (log_snr[i] - log_snr[i - 1]) if i > 0 else 0.0
        coefficients.append(
            _Step(
                scale=1 / alphas[i],
                noise_scale=sigmas[i] / alphas[i],
                keep=sigmas[i + 1] / sigmas[i],
                new=weight * (1 + extrapolation),
                old=-weight * extrapolation,
            )
        )
    # Cached tensors must not be inference tensors, whatever the mode of the first caller.
    with torch.inference_mode(False):
        times = torch.tensor(grid[:-1], dtype=torch.float32).to(device).unbind()
    return times, coefficients


def solve(
    noise_prediction: Callable[[Tensor, Tensor], Tensor], initial_noise: Tensor, steps: int
) -> Tensor:
    """Second-order multistep DPM-Solver++ (Lu et al. 2022, Algorithm 2), one prediction a step.

    `noise_prediction(x, t)` takes x in the shape of `initial_noise` (standard normal, any shape)
    and t as a 0-d tensor; it returns the predicted noise in the same shape. The state keeps the
    type of `initial_noise` whatever type the prediction has. Raises ValueError when steps < 1.
    """
    times, coefficients = _schedule(steps, initial_noise.device)
    x, previous = initial_noise, torch.zeros_like(initial_noise)
    for t, step in zip(times, coefficients, strict=True):
        noise = noise_prediction(x, t).to(x.dtype)
        clean = step.scale * x - step.noise_scale * noise
        x = step.keep * x + step.new * clean + step.old * previous
        previous = clean
    return x
