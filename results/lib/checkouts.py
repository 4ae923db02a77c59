"""Updates and sampling of CORL and CEP, by the classes of a user's own checkouts of both."""

import contextlib
import importlib
import importlib.util
import io
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gymnasium
import numpy as np
import torch

import d4rl_gymnasium

CORL, CEP = "algorithms/finetune", "Offline_RL_2D/diffusion_SDE"


def calls_of(folder: Path, data: dict, states, actions, device: str) -> dict:
    """What a checkout has of the computations of benchmark.py, by their names there.

    CORL works on rows of a dataset's columns `data`, CEP on states [4096, S] with their support
    actions [4096, 16, A].
    """
    # Both are imported by CORL's files, and neither is used by their classes.
    sys.modules.setdefault("gym", gymnasium)
    sys.modules.setdefault("d4rl", d4rl_gymnasium)
    if (folder / CORL / "cal_ql.py").exists():
        return {
            "iql update": corl_iql(load(folder / CORL / "iql.py"), data, device),
            "cal_ql update, 3 layers": corl_cal_ql(load(folder / CORL / "cal_ql.py"), data, device),
        }
    if (folder / CEP / "model.py").exists():
        sys.path.append(str(folder / CEP.split("/")[0]))
        return cep(states, actions, device)
    sys.exit(f"error: {folder} is no checkout of CORL ({CORL}/cal_ql.py) or CEP ({CEP}/model.py)")


def load(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"corl_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for its types
    spec.loader.exec_module(module)
    return module


def on_batches(module: ModuleType, trainer, data: dict, device: str):
    """A call that samples 256 rows and updates, as CORL's training loop does."""
    dims = data["observations"].shape[1], data["actions"].shape[1]
    buffer = module.ReplayBuffer(*dims, len(data["rewards"]), device)
    with contextlib.redirect_stdout(io.StringIO()):
        buffer.load_d4rl_dataset(data)
    return lambda: trainer.train([x.to(device) for x in buffer.sample(256)])


def corl_iql(corl: ModuleType, data: dict, device: str):
    """An update of CORL's IQL."""
    dims = data["observations"].shape[1], data["actions"].shape[1]
    nets = {
        "q_network": corl.TwinQ(*dims),
        "v_network": corl.ValueFunction(dims[0]),
        "actor": corl.GaussianPolicy(*dims, max_action=1.0),
    }
    for name, net in list(nets.items()):
        optimizer = f"{name.removesuffix('_network')}_optimizer"
        nets[optimizer] = torch.optim.Adam(net.to(device).parameters(), lr=3e-4)
    trainer = corl.ImplicitQLearning(1.0, **nets, device=device)
    return on_batches(corl, trainer, data, device)


def corl_cal_ql(corl: ModuleType, data: dict, device: str):
    """An update of CORL's Cal-QL, with critics of 3 layers."""
    dims = data["observations"].shape[1], data["actions"].shape[1]
    nets = {f"critic_{i}": corl.FullyConnectedQFunction(*dims, True, 3) for i in (1, 2)}
    nets["actor"] = corl.TanhGaussianPolicy(*dims, 1.0, orthogonal_init=True)
    for name, net in list(nets.items()):
        nets[f"{name}_optimizer"] = torch.optim.Adam(net.to(device).parameters(), lr=3e-4)
    trainer = corl.CalQL(**nets, target_entropy=-dims[1], bc_steps=0, device=device)
    return on_batches(corl, trainer, data, device)


def cep(states: torch.Tensor, actions: torch.Tensor, device: str) -> dict:
    """Updates of CEP's behavior model and energy, and its guided sampling in 15 steps."""
    loss, model, schedule = (
        importlib.import_module(f"diffusion_SDE.{name}") for name in ("loss", "model", "schedule")
    )
    schedule.marginal_prob_std.__defaults__ = (device,)  # it is "cuda"
    warnings.filterwarnings("ignore", "To copy construct", UserWarning)
    std = schedule.marginal_prob_std
    settings = SimpleNamespace(device=device, alpha=3.0, q_alpha=3.0, method="CEP")
    action_dim = actions.shape[-1]
    net = model.ScoreNet(states.shape[1] + action_dim, action_dim, std, args=settings).to(device)
    energy = net.q[0]
    energy.guidance_scale = 3.0
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)

    def behavior_update():
        net.condition = states
        found = loss.loss_fn(net, actions[:, 0], std)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()

    batch = {"s": states[:256], "a": actions[:256, 0], "fake_a": actions[:256]}
    some_states = np.array(states[:256].cpu())
    return {
        "behavior update, 4,096": behavior_update,
        "energy update, 256 x 16": lambda: energy.update_qt(batch),
        "guided sampling, 256 states, 15 steps": lambda: net.select_actions(some_states),
    }
