"""Settings: the paper's tables by task, who overrides whom, and one line for what is impossible."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import GROUPS, SETTINGS

import cal_ql
import d4rl_gymnasium as d4rl
import dare_cql
import dare_iql
import edis_cql
import edis_iql
import iql
import pex
from d4rl_gymnasium import runs

SCRIPTS = [*SETTINGS, edis_iql, edis_cql]
EACH = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
ENVS_OF_THE_PAPER = """
    walker2d-medium-expert-v2 halfcheetah-medium-expert-v2 hopper-medium-expert-v2
    walker2d-medium-replay-v2 halfcheetah-medium-replay-v2 hopper-medium-replay-v2
    walker2d-medium-v2 halfcheetah-medium-v2 hopper-medium-v2
    antmaze-umaze-v2 antmaze-medium-play-v2 antmaze-umaze-diverse-v2 antmaze-medium-diverse-v2
""".split()
GUIDANCE_SCALES = [5.0, 3.0, 2.0, 5.0, 8.0, 3.0, 10.0, 10.0, 8.0, 3.0, 4.0, 1.0, 3.0]  # Table 7

# Table 5, of every task
TABLE_5 = {
    "discount": 0.99,
    "hidden_dim": 256,
    "n_hidden": 2,
    "batch_size": 256,
    "qf_lr": 3e-4,
    "vf_lr": 3e-4,
    "actor_lr": 3e-4,
    "tau": 0.005,
}
# Table 5 (expectile, inverse temperature), App. B.1 (n, alpha), and by family what the paper
# leaves to its sources: AntMaze's rewards r - 1 and 100 evaluation episodes, K of CEP.
BY_FAMILY = {
    "locomotion": {
        "iql_tau": 0.7,
        "beta": 3.0,
        "sac_alpha": 0.2,
        "n_max_actions": 1,  # Table 4: max target backup False
        "normalize_reward": False,
        "n_episodes": 10,
        "n_support": 16,
    },
    "antmaze": {
        "iql_tau": 0.9,
        "beta": 10.0,
        "sac_alpha": 0.01,
        "n_max_actions": 10,  # Table 4: True; the number is Cal-QL's
        "normalize_reward": True,
        "n_episodes": 100,
        "n_support": 32,
    },
}
# Sec. 7.1 (updates and steps), Sec. 7.4 (updates a step), App. B.5 (diffusion)
TEXT = {
    "offline_iterations": 1_000_000,
    "online_iterations": 200_000,
    "utd": 1,
    "behavior_iterations": 600_000,
    "behavior_lr": 1e-4,
    "behavior_batch_size": 4096,
    "energy_hidden": 256,
    "energy_lr": 3e-4,
    "energy_batch_size": 256,
}
# Sources other than the paper: PEX, Cal-QL, CEP, and the evaluations of Figs. 7 and 8.
CHOSEN = {
    "mixing_ratio": 0.5,
    "initial_collection_steps": 5_000,
    "exchange": "gaussian",
    "max_exchange": 1_000_000,  # no cap, App. B.1
    "online_loss": "sac",
    "online_expectile": 0.99,  # App. G
    "align": "gaussian_kl",
    "n_reference": 1,
    "diffusion_steps": 10,
    "behavior_width": 512,
    "energy_beta": 3.0,
    "eval_freq": 10_000,
    "checkpoint_freq": 10_000,
}
# Table 4 and, where it is silent (cql_temp, clip, policy's layers, number of actions), CORL.
TABLE_4 = {
    "discount": 0.99,
    "batch_size": 256,
    "policy_lr": 1e-4,
    "qf_lr": 3e-4,
    "soft_target_update_rate": 0.005,
    "hidden_dim": 256,
    "policy_n_hidden_layers": 3,
    "cql_n_actions": 10,
    "cql_temp": 1.0,
    "cql_clip_diff_min": -200.0,
    "calibrated": True,
    "calibrated_online": False,  # Sec. 3.2
    "mixing_ratio": 0.5,
}
TABLE_4_BY_FAMILY = {
    "locomotion": {
        "cql_alpha": 10.0,
        "cql_alpha_online": 10.0,
        "cql_lagrange": False,
        "cql_target_action_gap": -1.0,
        "cql_max_target_backup": False,
        "q_n_hidden_layers": 3,
        "normalize": True,
        "normalize_reward": False,
        "reward_scale": 1.0,
        "reward_bias": 0.0,
        "is_sparse_reward": False,
        "n_episodes": 10,
    },
    "antmaze": {
        "cql_alpha": 5.0,
        "cql_alpha_online": 5.0,
        "cql_lagrange": True,
        "cql_target_action_gap": 0.8,
        "cql_max_target_backup": True,
        "q_n_hidden_layers": 5,
        "normalize": False,
        "normalize_reward": True,
        "reward_scale": 10.0,
        "reward_bias": -5.0,
        "is_sparse_reward": True,
        "n_episodes": 100,
    },
}
OF_DARE_C = {"max_exchange": 32, "online_loss": "td"}  # App. B.1, Eq. 14


TABLE_6 = {  # EDIS
    "model_depth": 6,
    "n_denoising_steps": 128,
    "model_lr": 3e-4,
    "model_width": 1024,
    "model_batch_size": 256,
    "model_iterations": 50_000,
    "edis_freq": 10_000,
    "energy_hidden": 256,
    "n_negatives": 10,
    "energy_lr": 1e-3,
}


def settings(script, **changed):
    """The settings of a script, as a dictionary."""
    return dataclasses.asdict(script.TrainConfig(**changed))


@pytest.mark.parametrize(
    "env, guidance_scale", list(zip(ENVS_OF_THE_PAPER, GUIDANCE_SCALES, strict=True))
)
def test_settings_are_those_of_the_tables(env, guidance_scale):
    """Made in a notebook; the command line's are the same, see below."""
    found = settings(dare_iql, env=env)
    family = "antmaze" if env.startswith("antmaze") else "locomotion"
    expected = TABLE_5 | TEXT | CHOSEN | BY_FAMILY[family] | {"guidance_scale": guidance_scale}
    assert {k: found[k] for k in expected} == expected
    assert found["env"] == env


@pytest.mark.parametrize(
    "env, guidance_scale", list(zip(ENVS_OF_THE_PAPER, GUIDANCE_SCALES, strict=True))
)
def test_settings_of_the_cql_group_are_those_of_the_tables(env, guidance_scale):
    family = "antmaze" if env.startswith("antmaze") else "locomotion"
    expected, found = TABLE_4 | TABLE_4_BY_FAMILY[family], settings(cal_ql, env=env)
    assert {k: found[k] for k in expected} == expected
    found = settings(dare_cql, env=env)
    expected |= {k: x for k, x in (CHOSEN | TEXT).items() if k in found} | OF_DARE_C
    expected |= {"n_support": BY_FAMILY[family]["n_support"], "guidance_scale": guidance_scale}
    assert {k: found[k] for k in expected} == expected


@pytest.mark.parametrize("env", ENVS_OF_THE_PAPER)
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.baseline.__name__)
def test_dare_has_the_settings_of_its_baseline(group, env):
    found, of_baseline = settings(group.dare, env=env), settings(group.baseline, env=env)
    expected = of_baseline | {"name": group.dare.__name__}
    assert {k: found[k] for k in expected} == expected


@pytest.mark.parametrize("env", ENVS_OF_THE_PAPER)
def test_pex_has_the_settings_of_iql_and_its_own(env):
    expected = settings(iql, env=env) | {"name": "pex", "inv_temperature": 10.0}
    assert settings(pex, env=env) == expected


@pytest.mark.parametrize("env", ENVS_OF_THE_PAPER)
@pytest.mark.parametrize("script, baseline", [(edis_iql, iql), (edis_cql, cal_ql)])
def test_edis_has_the_settings_of_its_baseline_and_of_table_6(script, baseline, env):
    found = settings(script, env=env)
    expected = settings(baseline, env=env) | {"name": script.__name__} | TABLE_6
    assert {k: found[k] for k in expected} == expected


@EACH
def test_no_setting_is_left_without_a_value(script):
    for env in d4rl.TASKS:
        assert None not in settings(script, env=env).values()


def test_tasks_without_a_guidance_scale_in_table_7_have_that_of_most():
    others = set(d4rl.TASKS) - set(ENVS_OF_THE_PAPER)
    assert others and {settings(dare_iql, env=env)["guidance_scale"] for env in others} == {3.0}


# What follows the settings of the baseline
FIRST_OF_VARIANTS = ("exchange", "inv_temperature", "edis_start", "project")


@EACH
def test_every_offline_setting_of_an_agent_is_compared(script):
    """What --load_model must agree with: what makes the networks and what Q and V mean.

    Iterations, rates and batches may differ, as may what concerns a run or a machine.
    """
    fields = [f.name for f in dataclasses.fields(script.TrainConfig)]
    of_variant = next(fields.index(x) for x in FIRST_OF_VARIANTS if x in fields)
    of_algorithm = set(fields[fields.index("batch_size") : of_variant])
    of_algorithm -= {"batch_size", "mixing_ratio", "tau", "soft_target_update_rate"}
    of_algorithm -= {x for x in of_algorithm if x.endswith(("_lr", "_online"))}
    assert set(script.OFFLINE_FIELDS) == of_algorithm | {"env", "data", "regenerated_size"}


# --- The command line ---


def parse(monkeypatch, script, *args):
    """What main() trains with."""
    configs = []
    monkeypatch.setattr(script, "train", configs.append)
    script.main(list(args))
    (config,) = configs
    return config


@EACH
def test_a_notebook_has_the_settings_of_the_command_line(monkeypatch, script):
    env = "walker2d-medium-v2"
    assert parse(monkeypatch, script, "--env", env) == script.TrainConfig(env=env)


def test_command_line_over_yaml_over_presets_over_defaults(monkeypatch, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("env: antmaze-umaze-v2\niql_tau: 0.8\nbeta: 7\nutd: 3\ntau: 1.0e-2\n")
    args = "--beta 2.5 --utd 4 --normalize_reward FALSE".split()
    config = parse(monkeypatch, dare_iql, "--config_path", str(file), *args)
    assert (config.utd, config.beta, config.normalize_reward) == (4, 2.5, False)  # command line
    assert (config.iql_tau, config.tau) == (0.8, 0.01)  # file, over a preset and over a default
    assert (config.sac_alpha, config.n_episodes) == (0.01, 100)  # presets of the file's task
    assert config.discount == 0.99
    # Another task on the command line brings its presets, but not over the file.
    more = "--env hopper-medium-v2 --normalize_reward True".split()
    config = parse(monkeypatch, dare_iql, "--config_path", str(file), *more)
    assert (config.sac_alpha, config.guidance_scale, config.iql_tau) == (0.2, 8.0, 0.8)
    assert config.normalize_reward is True


def test_settings_survive_the_file_that_a_run_writes(monkeypatch, tmp_path):
    config = dare_iql.TrainConfig(env="walker2d-medium-v2", energy_normalize=False, qf_lr=1e-5)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    assert parse(monkeypatch, dare_iql, "--config_path", str(file)) == config


def end_of(capsys, monkeypatch, script, *args):
    """The message with which main() ends, and what argparse added."""
    monkeypatch.setattr(script, "train", lambda config: pytest.fail("training began"))
    with pytest.raises(SystemExit) as stop:
        script.main(list(args))
    out, err = capsys.readouterr()
    assert out == ""
    return stop.value.code, err


@pytest.mark.parametrize(
    "args, parts",
    [
        ("--batch 8", ["--batch"]),  # not an abbreviation
        ("--seed", ["seed"]),
        ("hopper", ["hopper"]),
    ],
)
def test_what_the_parser_does_not_know_ends_in_two_lines(capsys, monkeypatch, args, parts):
    code, err = end_of(capsys, monkeypatch, iql, *args.split())
    assert code == 2 and len(err.splitlines()) == 2
    usage, message = err.splitlines()
    assert usage.startswith("usage: ") and "--help lists the settings" in usage
    assert "error: " in message and all(part in message for part in parts)


@pytest.mark.parametrize(
    "args, parts",
    [
        ("--batch_size 2.5", ["--batch_size must be a whole number, not 2.5"]),
        ("--eval_freq 1e4", ["--eval_freq must be a whole number, not 1e4"]),
        ("--discount high", ["--discount must be a number, not high"]),
        ("--normalize_reward maybe", ["--normalize_reward must be true or false, not maybe"]),
        ("--mixing_ratio 1.5", ["mixing_ratio", "1.5"]),
    ],
)
def test_impossible_arguments_end_in_one_line(capsys, monkeypatch, args, parts):
    message, err = end_of(capsys, monkeypatch, iql, *args.split())
    assert message.startswith("error: ") and "\n" not in message and err == ""
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "text, parts",
    [
        ("batchsize: 256", ["batchsize"]),
        ("batch_size:", ["batch_size"]),
        ("normalize_reward: 2", ["normalize_reward", "2"]),
        ("env: hoper-medum-v2", ["hoper-medum-v2", "hopper-medium-v2"]),
        ("env: {a: 1}", ["env"]),
        ("env: [", []),  # not YAML
        ("just text", []),
    ],
)
def test_impossible_files_end_in_one_line(capsys, monkeypatch, tmp_path, text, parts):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    message, err = end_of(capsys, monkeypatch, iql, "--config_path", str(file))
    assert message.startswith("error: ") and "\n" not in message and err == ""
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("name", ["no_such_file.yaml", "folder", "bytes.yaml"])
def test_what_is_no_text_file_ends_in_one_line(capsys, monkeypatch, tmp_path, name):
    file = tmp_path / name
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes.yaml").write_bytes(b"\x80\xff\x00")
    message, _ = end_of(capsys, monkeypatch, iql, "--config_path", str(file))
    assert message.startswith("error: ") and "\n" not in message
    assert str(file) in message or name == "bytes.yaml"


def test_a_configuration_file_of_another_script_is_refused(capsys, monkeypatch):
    file = Path(__file__).parents[2] / "quickstart.yaml"
    message, _ = end_of(capsys, monkeypatch, iql, "--config_path", str(file))
    assert message.startswith(f"error: {file}: diffusion_steps, behavior_iterations")
    assert message.endswith("energy_batch_size: no settings of iql.py, see --help")


# --- Impossible values, whoever makes the settings ---

IMPOSSIBLE = {
    "unknown env": ({"env": "hoper-medum-v2"}, ["hoper-medum-v2", "hopper-medium-v2"]),
    "env of another version": ({"env": "antmaze-umaze-v1"}, ["antmaze-umaze-v2"]),
    "negative batch": ({"batch_size": -256}, ["--batch_size", "-256"]),
    "no batch": ({"batch_size": 0}, ["--batch_size", "0"]),
    "mixing ratio above 1": ({"mixing_ratio": 1.5}, ["--mixing_ratio", "1.5"]),
    "discount above 1": ({"discount": 1.01}, ["--discount", "1.01"]),
    "no online rows": ({"mixing_ratio": 1}, ["--mixing_ratio", "empty"]),
    "no offline rows": ({"mixing_ratio": 0.001}, ["--mixing_ratio", "empty"]),
    "not a number": ({"discount": float("nan")}, ["--discount", "nan"]),
    "infinite": ({"qf_lr": float("inf")}, ["--qf_lr", "inf"]),
    "negative learning rate": ({"qf_lr": -1.0}, ["--qf_lr", "-1"]),
    "no evaluation": ({"n_episodes": 0}, ["--n_episodes", "from 1", "0"]),
    "too large a seed": ({"seed": 2**64}, ["--seed", str(2**64)]),
    "too large a batch": ({"batch_size": 10**9}, ["--batch_size", "from 1 to 1000000"]),
    "too wide": ({"hidden_dim": 10**9}, ["--hidden_dim", "from 1 to 10000"]),
    "too many threads": ({"threads": 10**12}, ["--threads", "from 1 to 256"]),
    "too much data": ({"regenerated_size": 10**17}, ["--regenerated_size", "from 0"]),
    "too many episodes": ({"n_episodes": 10**8}, ["--n_episodes", "from 1 to 10000"]),
    "a name above the folder": ({"name": ".."}, ["--name", "'..'"]),
    "no update online": (
        {"online_iterations": 60, "initial_collection_steps": 60},
        ["--online_iterations must be 0, or above --initial_collection_steps"],
    ),
    "bad device": ({"device": "tpu"}, ["--device", "tpu", "cpu"]),
    "bad precision": ({"precision": "auto"}, ["--precision", "auto", "fp32", "bf16"]),
    "bad wandb mode": ({"wandb": "auto"}, ["--wandb", "online", "offline", "disabled"]),
}
IMPOSSIBLE_DARE = {
    "negative cap": ({"max_exchange": -1}, ["--max_exchange", "-1"]),
    "bad exchange": ({"exchange": "all"}, ["--exchange", "all", "gaussian", "direct", "none"]),
    "bad alignment": ({"align": "kl"}, ["--align", "gaussian_kl", "softmax_kl"]),
    "bad reference": ({"reference": "x"}, ["--reference", "guided", "resample"]),
    "no solver step": ({"diffusion_steps": 0}, ["--diffusion_steps", "0"]),
    "width that the network cannot have": ({"behavior_width": 3}, ["behavior_width", "4"]),
    "too wide an energy": ({"energy_hidden": 10**9}, ["--energy_hidden", "to 10000"]),
    "one support action": ({"n_support": 1}, ["--n_support", "1"]),
}
IMPOSSIBLE_ALONE = {
    "expectile above 1": (dare_iql, {"online_expectile": 1.1}, ["--online_expectile", "1.1"]),
    "bad loss": (dare_iql, {"online_loss": "awr"}, ["--online_loss", "sac", "expectile", "none"]),
    "bad loss of DARE-C": (dare_cql, {"online_loss": "sac"}, ["--online_loss", "td", "none"]),
    "too deep": (dare_iql, {"n_hidden": 100_000}, ["--n_hidden", "from 1 to 100", "100000"]),
    "too deep a Q": (dare_cql, {"q_n_hidden_layers": 10**5}, ["--q_n_hidden_layers", "to 100"]),
    "no interval": (edis_iql, {"edis_freq": 0}, ["--edis_freq", "from 1", "0"]),
    "no denoising step": (edis_cql, {"n_denoising_steps": 0}, ["--n_denoising_steps", "from 1"]),
    "weights that outgrow": (edis_iql, {"model_ema": 1.5}, ["--model_ema", "from 0 to 1", "1.5"]),
}


def assert_refused(script, changed, parts):
    """Settings that cannot be are one line."""
    with pytest.raises(ValueError) as error:
        script.TrainConfig(**changed)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


@EACH
@pytest.mark.parametrize("changed, parts", list(IMPOSSIBLE.values()), ids=list(IMPOSSIBLE))
def test_impossible_values(script, changed, parts):
    assert_refused(script, changed, parts)


@pytest.mark.parametrize("dare", [dare_iql, dare_cql], ids=lambda script: script.__name__)
@pytest.mark.parametrize(
    "changed, parts", list(IMPOSSIBLE_DARE.values()), ids=list(IMPOSSIBLE_DARE)
)
def test_impossible_values_of_dare(dare, changed, parts):
    assert_refused(dare, changed, parts)


@pytest.mark.parametrize(
    "script, changed, parts", list(IMPOSSIBLE_ALONE.values()), ids=list(IMPOSSIBLE_ALONE)
)
def test_impossible_values_of_one_script(script, changed, parts):
    assert_refused(script, changed, parts)


@EACH
def test_a_setting_without_a_value_for_the_task_is_refused(monkeypatch, script):
    for presets in script.PRESETS.values():
        monkeypatch.delitem(presets, "n_episodes", raising=False)
    assert_refused(script, {}, ["--n_episodes", "not None"])
    assert script.TrainConfig(n_episodes=3).n_episodes == 3


@EACH
def test_an_offline_run_needs_no_steps_with_updates(script):
    config = script.TrainConfig(online_iterations=0, initial_collection_steps=60)
    assert (config.online_iterations, config.initial_collection_steps) == (0, 60)
    assert script.TrainConfig(online_iterations=61, initial_collection_steps=60)


def test_nearest_names_of_an_unknown_env():
    with pytest.raises(ValueError) as error:
        iql.TrainConfig(env="antmaze-medium-divers-v2")
    nearest = str(error.value).split("nearest")[1]
    assert "antmaze-medium-diverse-v2" in nearest and "hopper" not in nearest


@EACH
def test_a_machine_that_lacks_something_is_told_so(monkeypatch, script):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(script, {"device": "cuda"}, ["--device cuda", "--device cpu"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert_refused(script, {"compile": True}, ["--compile needs a C++ compiler"])


# --- Help ---


def commented_fields(script):
    """Comment behind each field of TrainConfig, as written in the file."""
    lines = Path(script.__file__).read_text().splitlines()
    comments = {}
    for field in dataclasses.fields(script.TrainConfig):
        line = next(x for x in lines if x.startswith(f"    {field.name}: "))
        comments[field.name] = line.partition("  # ")[2]
    return comments


@EACH
def test_every_setting_says_in_words_what_it_does(script):
    for name, comment in commented_fields(script).items():
        if name not in ("device", "project"):
            assert re.search(r"[a-z]{2,}", comment), name


def test_the_source_is_read_once_and_not_for_every_setting(monkeypatch):
    read, findsource = [], inspect.findsource

    def reading(what):
        source = findsource(what)
        read.append(what)
        return source

    monkeypatch.setattr(inspect, "findsource", reading)
    assert type(runs.parse(dare_iql.TrainConfig, [])) is dare_iql.TrainConfig
    assert read == [dare_iql.TrainConfig]


def test_help_shows_every_field_with_its_comment(monkeypatch):
    """Also of the first one under a banner, for which pyrallis shows the banner."""
    monkeypatch.setenv("COLUMNS", "200")  # else lines break at hyphens
    command = [sys.executable, dare_iql.__file__, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    described = " ".join(result.stdout.split("options:")[1].split())
    for name, comment in commented_fields(dare_iql).items():
        assert f"--{name} " in described, name
        assert comment in described, name
    assert "Behavior diffusion" not in described
    assert "App. B.1 (default: locomotion 0.2, antmaze 0.01)" in described  # sac_alpha
    assert "Sec. 7.6 (default: locomotion 3.0, antmaze 3.0, others in PRESETS)" in described
    assert described.count("(default: None)") == 1  # of --config_path
