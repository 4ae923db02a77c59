"""Reference actions a_hat: behavior diffusion steered by the energy (Eqs. 5, 6, App. B.5)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from diffusion.networks import BehaviorModel, EnergyModel
from diffusion.process import alpha_sigma, solve


@torch.no_grad()
def sample_actions(
    behavior: BehaviorModel,
    states: Tensor,
    n_samples: int = 1,
    energy: EnergyModel | None = None,
    guidance_scale: float = 0.0,
    steps: int = 10,
    max_action: float | None = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw actions [B, n_samples, A] for states [B, S], from nu_0, or steered by the energy.

    The guided score is grad log nu_t + guidance_scale * grad f_phi. At scale 1 it is Eq. 6, and the
    actions follow pi_0 of Eq. 5. They lie within [-max_action, max_action] (None: no bounds).
    """
    shape = (len(states), n_samples, behavior.action_dim)
    noise = torch.randn(shape, device=states.device, dtype=states.dtype, generator=generator)
    networks = [behavior] if energy is None or guidance_scale == 0 else [behavior, energy]
    embedded = [network.embed_states(states)[:, None] for network in networks]
    scale = states.new_full((), guidance_scale)  # a compiled region takes no Python number
    actions = solve(partial(guided_noise, networks, embedded, scale), noise, steps, max_action)
    return actions if max_action is None else actions.clamp(-max_action, max_action)


@torch.compiler.nested_compile_region  # compiled once, not once for every step
def guided_noise(networks, embedded_states, guidance_scale, actions_t, t) -> Tensor:
    """Noise in actions_t by the behavior model and, if `networks` has one, the energy (Eq. 6)."""
    behavior, *energies = networks
    noise = behavior.predict(actions_t, embedded_states[0], t)
    if energies:  # noise = -sigma_t * score: what the score gains is taken off the noise
        scale = guidance_scale * alpha_sigma(t)[1]
        noise = noise - scale * energies[0].gradient(actions_t, embedded_states[1], t)
    return noise


def draw_support_actions(
    behavior: BehaviorModel,
    states: Tensor,
    n_samples: int,
    steps: int = 10,
    chunk: int = 4096,
    on_progress: Callable[[int], None] = lambda states_done: None,
) -> Tensor:
    """Unguided actions [N, n_samples, A] for states [N, S]: what Eq. 34 compares the energies of.

    `chunk` states at a time; `on_progress(states_done)` is called after every chunk.
    """
    result = states.new_empty((len(states), n_samples, behavior.action_dim))
    for start in range(0, len(states), chunk):
        rows = slice(start, start + chunk)
        result[rows] = sample_actions(behavior, states[rows], n_samples, steps=steps)
        on_progress(min(start + chunk, len(states)))
    return result
