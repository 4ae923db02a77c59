"""The two networks: noise prediction of the behavior model and the intermediate energy f_phi.

Batch dimensions broadcast: actions [B, K, A] with states [B, 1, S] compute what depends on the
state alone once for its K actions, and a 0-d t computes what depends on t alone once for all rows.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

# Sizes and scale of the embeddings: Chen et al. (2022), as CEP uses them.
TIME_FEATURES, TIME_SCALE = 32, 30.0
STATE_FEATURES, EMBEDDING = 32, 128


class TimeFeatures(nn.Module):
    """Gaussian Fourier features: t [...] to sin and cos of 2 pi w t [..., 32], w ~ N(0, 30^2)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", TIME_SCALE * torch.randn(TIME_FEATURES // 2))

    def forward(self, t: Tensor | float) -> Tensor:
        """Features of t; in fp32 because the angles reach hundreds of radians."""
        t = torch.as_tensor(t, dtype=torch.float32, device=self.frequencies.device)
        angles = 2 * math.pi * t[..., None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ResidualBlock(nn.Module):
    """Two layers around an added condition, with a skip (linear where the width changes)."""

    def __init__(self, size_in: int, size_out: int):
        super().__init__()
        self.first = nn.Linear(size_in, size_out)
        self.second = nn.Linear(size_out, size_out)
        self.skip = nn.Identity() if size_in == size_out else nn.Linear(size_in, size_out)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Input x [..., size_in], condition [..., size_out] -> [..., size_out]."""
        # Sums in place: silu's gradient does not need its output.
        hidden = silu(self.first(x)).add_(condition)
        return silu(self.second(hidden)).add_(self.skip(x))


class BehaviorModel(nn.Module):
    """Noise prediction for nu_0(a | s): the residual U-shaped network of Chen et al. (2022).

    Block widths are 512-256-128-128-256-512 at the published `width` of 512.
    """

    def __init__(self, state_dim: int, action_dim: int, width: int = 512):
        super().__init__()
        self.action_dim = action_dim
        self.state_features = nn.Linear(state_dim, STATE_FEATURES)
        self.state_embedding = nn.Linear(STATE_FEATURES, EMBEDDING)
        self.time_features = TimeFeatures()
        self.time_embedding = nn.Linear(TIME_FEATURES, EMBEDDING)
        self.embedding = nn.Linear(EMBEDDING, EMBEDDING)
        wide, middle, narrow = width, width // 2, width // 4
        self.sizes = [wide, middle, narrow, narrow, middle, wide]
        # The blocks' conditions are one product, not six.
        self.conditions = nn.Linear(EMBEDDING, sum(self.sizes))
        self.down_wide = ResidualBlock(action_dim, wide)
        self.down_middle = ResidualBlock(wide, middle)
        self.down_narrow = ResidualBlock(middle, narrow)
        self.bottom = ResidualBlock(narrow, narrow)
        self.up_middle = ResidualBlock(2 * narrow, middle)
        self.up_wide = ResidualBlock(2 * middle, wide)
        self.output = nn.Linear(2 * wide, action_dim)

    def forward(self, actions_t: Tensor, states: Tensor, t: Tensor | float) -> Tensor:
        """Noise in actions_t [N, A] at states [N, S] and t (0-d or [N]) -> [N, A]."""
        return self.predict(actions_t, self.embed_states(states), t)

    def embed_states(self, states: Tensor) -> Tensor:
        """What depends on the states alone, [..., S] -> [..., 128]; reused over solver steps."""
        return self.state_embedding(silu(self.state_features(states)))

    def predict(self, actions_t: Tensor, embedded_states: Tensor, t: Tensor | float) -> Tensor:
        """Noise in actions_t [..., A], given `embed_states(states)`; t and states broadcast."""
        embedding = silu(embedded_states + self.time_embedding(self.time_features(t)))
        conditions = self.conditions(silu(self.embedding(embedding))).split(self.sizes, dim=-1)
        wide = self.down_wide(actions_t, conditions[0])
        middle = self.down_middle(wide, conditions[1])
        narrow = self.down_narrow(middle, conditions[2])
        x = self.bottom(narrow, conditions[3])
        x = self.up_middle(torch.cat([narrow, x], dim=-1), conditions[4])
        x = self.up_wide(torch.cat([middle, x], dim=-1), conditions[5])
        return self.output(torch.cat([wide, x], dim=-1))


class EnergyModel(nn.Module):
    """Intermediate energy f_phi(s, a_t, t): 4 hidden layers of 256, SiLU (App. B.5).

    f_phi estimates beta_E * Q at t = 0 (by default Q in units of its spread), up to a function of s
    and t. High is good: guidance ADDS a multiple of its gradient (Eq. 6); Eq. 34's energies are -Q.
    """

    def __init__(self, state_dim: int, action_dim: int, hidden: int = 256):
        super().__init__()
        self.state_layer = nn.Linear(state_dim, hidden)
        self.action_layer = nn.Linear(action_dim, hidden, bias=False)
        self.time_features = TimeFeatures()
        self.time_layer = nn.Linear(TIME_FEATURES, hidden, bias=False)
        layers = [m for _ in range(3) for m in (nn.SiLU(), nn.Linear(hidden, hidden))]
        self.layers = nn.Sequential(*layers, nn.SiLU(), nn.Linear(hidden, 1))

    def forward(self, actions_t: Tensor, states: Tensor, t: Tensor | float) -> Tensor:
        """Energy of actions_t [N, A] at states [N, S] and t (0-d or [N]) -> [N]."""
        return self.predict(actions_t, self.embed_states(states), t)

    def embed_states(self, states: Tensor) -> Tensor:
        """What depends on the states alone, [..., S] -> [..., hidden]."""
        return self.state_layer(states)

    def predict(self, actions_t: Tensor, embedded_states: Tensor, t: Tensor | float) -> Tensor:
        """Energy of actions_t [..., A], given `embed_states(states)`; t and states broadcast."""
        condition = embedded_states + self.time_layer(self.time_features(t))
        return self.layers(self.action_layer(actions_t) + condition).squeeze(-1)

    def gradient(self, actions_t: Tensor, embedded_states: Tensor, t: Tensor | float) -> Tensor:
        """Gradient of `predict` in actions_t, [..., A], written out for speed: who edits `predict`
        must edit this too, or take torch.func.grad of its sum (torch.autograd.grad would fail, for
        sampling is under no_grad).
        """
        condition = embedded_states + self.time_layer(self.time_features(t))
        linears, hidden = list(self.layers)[1::2], [self.action_layer(actions_t) + condition]
        for layer in linears[:-1]:
            hidden.append(layer(silu(hidden[-1])))
        gradient = linears[-1].weight.expand_as(hidden[-1])
        for layer, x in zip([*linears[-2::-1], self.action_layer], hidden[::-1], strict=True):
            gradient = torch.ops.aten.silu_backward(gradient.to(x.dtype), x) @ layer.weight
        return gradient
