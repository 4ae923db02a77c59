"""Gaussian mixtures whose diffusion is known in closed form, and the energy distance."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion import alpha_sigma


def spread_uniform(n: int, dimension: int, seed: int) -> Tensor:
    """n evenly spread points of the unit cube: randomised Sobol, float64."""
    points = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=seed).draw(n)
    return points.double().clamp(1e-7, 1 - 1e-7)


def spread_normal(n: int, dimension: int, seed: int = 0) -> Tensor:
    """n evenly spread standard normal points [n, dimension]."""
    return torch.special.ndtri(spread_uniform(n, dimension, seed))


@dataclass
class Mixture:
    """sum_k weights_k N(means_k, stds_k^2 I): weights, stds [..., K], means [..., K, A].

    Points are [..., A]; leading dimensions broadcast, so one object can hold a conditional
    distribution. All in float64.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    def __post_init__(self):
        self.weights, self.means, self.stds = (
            torch.as_tensor(x, dtype=torch.float64) for x in (self.weights, self.means, self.stds)
        )

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[-1], dtype=torch.float64, generator=generator)
        return self.means[k] + self.stds[k, None] * noise

    def spread_sample(self, n: int, seed: int = 1) -> Tensor:
        """n points [n, A] that represent the distribution with little scatter."""
        u = spread_uniform(n, 1 + self.means.shape[-1], seed)
        k = torch.searchsorted(self.weights.cumsum(0), u[:, 0].contiguous()).clamp(
            max=len(self.weights) - 1
        )
        return self.means[k] + self.stds[k, None] * torch.special.ndtri(u[:, 1:])

    def _posterior(self, x: Tensor, t: Tensor):
        """Given a_t = x: component probabilities, residuals, and variances of a_t by component."""
        alpha, sigma = alpha_sigma(torch.as_tensor(t, dtype=torch.float64))
        variances = (alpha * self.stds) ** 2 + sigma**2
        residuals = x[..., None, :] - alpha * self.means
        logits = self.weights.log() - 0.5 * residuals.square().sum(-1) / variances
        logits = logits - 0.5 * self.means.shape[-1] * variances.log()
        return logits.log_softmax(-1), residuals, variances

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """Exact noise prediction E[noise | a_t = x] = -sigma_t grad log nu_t(x)."""
        log_probabilities, residuals, variances = self._posterior(x, t)
        _, sigma = alpha_sigma(torch.as_tensor(t, dtype=torch.float64))
        return sigma * ((log_probabilities.exp() / variances)[..., None] * residuals).sum(-2)

    def energy(self, x: Tensor, t: Tensor, slope: Tensor) -> Tensor:
        """E_t(x) = log E[exp(slope . a_0) | a_t = x]: [...]; slope [A]."""
        log_probabilities, residuals, variances = self._posterior(x, t)
        alpha, sigma = alpha_sigma(torch.as_tensor(t, dtype=torch.float64))
        gain = alpha * self.stds**2 / variances
        means = self.means + gain[..., None] * residuals
        spread = (self.stds * sigma) ** 2 / variances * slope.square().sum()
        return (log_probabilities + means @ slope + 0.5 * spread).logsumexp(-1)

    def tilted(self, slope: Tensor) -> "Mixture":
        """The density nu(a) exp(slope . a), normalised."""
        logits = self.weights.log() + self.means @ slope
        logits = logits + 0.5 * self.stds**2 * slope.square().sum()
        means = self.means + self.stds[..., None] ** 2 * slope
        return Mixture(logits.softmax(-1), means, self.stds)

    def share_off(self, x: Tensor, stds: float = 5.0) -> float:
        """Share of the points further than `stds` standard deviations from every component."""
        distances = (x[..., None, :] - self.means).norm(dim=-1) / self.stds
        return (distances.amin(-1) > stds).double().mean().item()


def _mean_difference(x: Tensor) -> float:
    """Mean |x_i - x_j| over all ordered pairs of x [N], exact by sorting."""
    n = len(x)
    ranks = torch.arange(1 - n, n, 2, dtype=torch.float64)
    return (2 * (ranks * x.sort().values).sum() / n**2).item()


def energy_distance_ratio(x: Tensor, exact: Tensor, size: int = 20_000) -> float:
    """Energy distance of `size` points of x to `size` exact ones, over that of two exact sets.

    Both are means over random sets. The squared energy distance 2 E|x - y| - E|x - x'| - E|y - y'|
    of two random finite sets exceeds that of their distributions by (E|x - x'| + E|y - y'|) / size
    on average, and evenly spread pools x [N, A] and exact [M, A] give the latter, so the ratio has
    hardly any scatter. In 2-D over 8 projections.
    """
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 8
    directions = torch.stack([angles.cos(), angles.sin()])
    if x.shape[1] == 1:
        directions = torch.ones(1, 1, dtype=torch.float64)
    distance = reference = 0.0
    n, m = len(x), len(exact)
    for a, b in zip((x @ directions).T, (exact @ directions).T, strict=True):
        xx, yy, both = (_mean_difference(c) for c in (a, b, torch.cat([a, b])))
        xy = (both * (n + m) ** 2 - xx * n**2 - yy * m**2) / (2 * n * m)
        distance += 2 * xy - xx - yy + (xx + yy) / size
        reference += 2 * yy / size
    return distance / reference


HEXAGON = [[0.7 * math.cos(k * math.pi / 3), 0.7 * math.sin(k * math.pi / 3)] for k in range(6)]
MIXTURES = {
    "1d": Mixture([0.3, 0.7], [[-0.6], [0.5]], [0.1, 0.2]),
    "1d three narrow modes": Mixture([0.2, 0.5, 0.3], [[-0.8], [0.1], [0.7]], [0.05, 0.1, 0.05]),
    "2d": Mixture(
        [0.1, 0.2, 0.3, 0.4],
        [[-0.7, -0.7], [0.6, -0.5], [-0.3, 0.4], [0.8, 0.8]],
        [0.05, 0.1, 0.2, 0.1],
    ),
    "2d hexagon": Mixture([1 / 21 * k for k in range(1, 7)], HEXAGON, [0.1] * 6),
}
