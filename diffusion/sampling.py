"""Reference actions a_hat ~ pi_0(. | s): behavior diffusion steered by the energy (Eqs. 5, 6)."""

from collections.abc import Callable

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
    steps: int = 15,
    max_action: float | None = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw actions [B, n_samples, A] for states [B, S], from nu_0, or from pi_0 when guided.

    The guided score is grad log nu_t + guidance_scale * grad f_phi (Eq. 6). Actions lie within
    [-max_action, max_action], the bounds of the data (None: no bounds). Keeps no autograd graph and
    computes no gradient of parameters. Under `torch.autocast` only the networks change type.
    """
    shape = (states.shape[0], n_samples, behavior.action_dim)
    noise = torch.randn(shape, device=states.device, dtype=states.dtype, generator=generator)
    behavior_states = behavior.embed_states(states)[:, None]
    if energy is None or guidance_scale == 0:

        def predicted_noise(x: Tensor, t: Tensor) -> Tensor:
            return behavior.predict(x, behavior_states, t)
    else:
        energy_states = energy.embed_states(states)[:, None]
        gradient = torch.func.grad(lambda x, t: energy.predict(x, energy_states, t).sum())

        def predicted_noise(x: Tensor, t: Tensor) -> Tensor:
            # The score is -noise / sigma_t, so adding to the score subtracts from the noise.
            scale = guidance_scale * alpha_sigma(t)[1]
            return behavior.predict(x, behavior_states, t) - scale * gradient(x, t)

    actions = solve(predicted_noise, noise, steps, max_action)
    return actions if max_action is None else actions.clamp(-max_action, max_action)


def draw_support_actions(
    behavior: BehaviorModel,
    states: Tensor,
    n_samples: int,
    steps: int = 15,
    chunk: int = 4096,
    max_action: float | None = 1.0,
    generator: torch.Generator | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Unguided actions [N, n_samples, A] for all states [N, S], `chunk` states at a time.

    The candidates among which Eq. 34 compares energies. `on_progress(states_done)` is called
    after every chunk.
    """
    result = states.new_empty((states.shape[0], n_samples, behavior.action_dim))
    for start in range(0, states.shape[0], chunk):
        rows = slice(start, start + chunk)
        result[rows] = sample_actions(
            behavior,
            states[rows],
            n_samples,
            steps=steps,
            max_action=max_action,
            generator=generator,
        )
        if on_progress is not None:
            on_progress(min(start + chunk, states.shape[0]))
    return result
