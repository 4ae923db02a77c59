"""Behavior diffusion nu_0(a | s) and its sampling under energy guidance (Eqs. 5, 6 and 34).

Read `process.py` (noise schedule and solver), `networks.py`, `training.py` (losses), `sampling.py`
(guided reference actions) and `sampler.py` (what the scripts use) in this order.
"""

from diffusion.networks import BehaviorModel, EnergyModel
from diffusion.process import alpha_sigma, perturb, solve
from diffusion.sampler import EnergyGuidedSampler
from diffusion.sampling import draw_support_actions, guided_noise, sample_actions
from diffusion.training import behavior_loss, energy_loss, train_behavior
