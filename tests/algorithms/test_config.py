"""Settings: the paper's tables by task, who overrides whom, and one line for what is impossible."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import cal_ql
import dare_cql
import dare_iql
import edis_cql
import edis_iql
import iql
import pex

REPOSITORY = Path(__file__).parents[2]
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
        "max_exchange": math.inf,
        "sac_alpha": 0.2,
        "normalize_reward": False,
        "n_episodes": 10,
        "n_support": 16,
    },
    "antmaze": {
        "iql_tau": 0.9,
        "beta": 10.0,
        "max_exchange": math.inf,
        "sac_alpha": 0.01,
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
    "exchange_when": "always",
    "online_loss": "sac",
    "n_max_actions": 10,
    "online_expectile": 0.99,  # App. G
    "align": "gaussian_kl",
    "n_reference": 1,
    "diffusion_steps": 10,
    "behavior_width": 512,
    "energy_beta": 3.0,
    "eval_freq": 10_000,
    "checkpoint_freq": 10_000,
}


# Table 4, and App. B.1 for n; target backup and sparse reward are of the second family alone.
TABLE_4 = {
    "batch_size": [256, 256],
    "discount": [0.99, 0.99],
    "reward_scale": [1.0, 10.0],
    "reward_bias": [0.0, -5.0],
    "normalize": [True, False],
    "normalize_reward": [False, True],
    "is_sparse_reward": [False, True],
    "policy_lr": [1e-4, 1e-4],
    "qf_lr": [3e-4, 3e-4],
    "tau": [0.005, 0.005],
    "cql_alpha": [10.0, 5.0],
    "cql_alpha_online": [10.0, 5.0],
    "cql_lagrange": [False, True],
    "cql_temp": [1.0, 1.0],
    "cql_target_action_gap": [-1.0, 0.8],
    "cql_max_target_backup": [False, True],
    "cql_clip_diff_min": [-200.0, -200.0],
    "q_n_hidden_layers": [3, 5],
    "hidden_dim": [256, 256],
    "max_exchange": [32.0, 32.0],
    # Sources other than the paper: CORL, and what DARE-I has by family.
    "cql_n_actions": [10, 10],
    "policy_n_hidden_layers": [3, 3],
    "calibrated": [True, True],
    "calibrated_online": [False, False],
    "online_loss": ["td", "td"],
    "n_episodes": [10, 100],
    "n_support": [16, 32],
}


# Table 6; and what it does not say: the guidance is EDIS's product of densities, the sizes of what
# is generated and of an energy batch are its released settings, the other two are ours.
TABLE_6 = {
    "edis_freq": 10_000,
    "state_guidance": 1.0,
    "action_guidance": 1.0,
    "dynamics_guidance": 1.0,
    "n_denoising_steps": 128,
    "model_depth": 6,
    "model_width": 1024,
    "model_iterations": 50_000,
    "model_batch_size": 256,
    "model_lr": 3e-4,
    "energy_hidden": 256,
    "energy_iterations": 5_000,
    "energy_batch_size": 256,
    "energy_lr": 1e-3,
    "n_negatives": 10,
    "n_unguided": 20_000,
    "n_generated": 100_000,
}


def parse(*args, script=dare_iql):
    return script.Parser(script.Config, allow_abbrev=False).parse_args(list(args))


@pytest.mark.parametrize(
    "env, guidance_scale", list(zip(ENVS_OF_THE_PAPER, GUIDANCE_SCALES, strict=True))
)
def test_resolved_settings_are_those_of_the_tables(env, guidance_scale):
    resolved = dataclasses.asdict(parse("--env", env))
    print(yaml.safe_dump(resolved, sort_keys=False))
    family = "antmaze" if env.startswith("antmaze") else "locomotion"
    expected = TABLE_5 | TEXT | CHOSEN | BY_FAMILY[family] | {"guidance_scale": guidance_scale}
    assert {k: resolved[k] for k in expected} == expected
    assert resolved["env"] == env
    # The baseline has the same settings where it has them at all.
    of_iql = dataclasses.asdict(parse("--env", env, script=iql)) | {"name": "dare_iql"}
    assert of_iql == {k: resolved[k] for k in of_iql}


@pytest.mark.parametrize(
    "env, guidance_scale", list(zip(ENVS_OF_THE_PAPER, GUIDANCE_SCALES, strict=True))
)
def test_resolved_settings_of_the_cql_group(env, guidance_scale):
    resolved = dataclasses.asdict(parse("--env", env, script=dare_cql))
    expected = {k: x[env.startswith("antmaze")] for k, x in TABLE_4.items()} | TEXT
    expected |= {k: x for k, x in CHOSEN.items() if k in resolved and k not in TABLE_4}
    expected |= {"guidance_scale": guidance_scale, "env": env}
    assert {k: resolved[k] for k in expected} == expected
    of_cal_ql = dataclasses.asdict(parse("--env", env, script=cal_ql)) | {"name": "dare_cql"}
    assert of_cal_ql == {k: resolved[k] for k in of_cal_ql}


@pytest.mark.parametrize("env", ENVS_OF_THE_PAPER)
def test_pex_has_the_settings_of_iql_and_its_own(env):
    resolved = dataclasses.asdict(parse("--env", env, script=pex))
    of_iql = dataclasses.asdict(parse("--env", env, script=iql)) | {"name": "pex"}
    assert resolved == of_iql | {"inv_temperature": 10.0, "eval_epsilon": 0.1}


@pytest.mark.parametrize("baseline, script", [(iql, edis_iql), (cal_ql, edis_cql)])
@pytest.mark.parametrize("env", ENVS_OF_THE_PAPER)
def test_edis_has_the_settings_of_its_baseline_and_its_own(env, baseline, script):
    resolved = dataclasses.asdict(parse("--env", env, script=script))
    of_baseline = dataclasses.asdict(parse("--env", env, script=baseline))
    assert resolved == of_baseline | {"name": script.__name__} | TABLE_6


@pytest.mark.parametrize("script", [dare_iql, dare_cql, edis_iql, edis_cql])
def test_every_setting_has_its_place_in_or_beside_the_cache_key(script):
    """What is not in the key changes nothing offline, or acts on the data, which is in it too."""
    of_data = {"data", "regenerated_size", "reward_scale", "reward_bias", "is_sparse_reward"}
    of_machine = {"device", "compile", "threads", "runs_dir", "name", "wandb", "project"}
    of_machine |= {"log_freq", "cuda_graph"}
    online = {"checkpoint_freq", "eval_freq", "utd", "mixing_ratio", "online_iterations"}
    online |= {"initial_collection_steps", "calibrated_online", "cql_alpha_online"}
    fields = [f.name for f in dataclasses.fields(script.Config)]
    first = "exchange" if script in (dare_iql, dare_cql) else "edis_freq"
    of_method = set(fields[fields.index(first) :])
    rest = set(fields) - set(script.OFFLINE_FIELDS) - of_data - of_machine - online - of_method
    assert rest == ({"normalize_reward"} if script in (dare_cql, edis_cql) else set())  # in rewards


def test_defaults_are_those_of_the_default_task():
    for script in (iql, dare_iql, cal_ql, dare_cql, pex, edis_iql, edis_cql):
        assert parse(script=script) == parse("--env", "antmaze-umaze-v2", script=script)
    assert parse().env == "antmaze-umaze-v2"


def test_command_line_over_yaml_over_presets_over_defaults(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("env: antmaze-umaze-v2\niql_tau: 0.8\nbeta: 7\nutd: 3\ntau: 1.0e-2\n")
    cfg = parse("--config_path", str(file), "--beta", "2.5", "--utd", "4")
    assert (cfg.utd, cfg.beta) == (4, 2.5)  # command line
    assert (cfg.iql_tau, cfg.tau) == (0.8, 0.01)  # file, over a preset and over a default
    assert (cfg.sac_alpha, cfg.n_episodes) == (0.01, 100)  # presets of the file's task
    assert cfg.discount == 0.99
    # Another task on the command line brings its presets, but not over the file.
    cfg = parse("--config_path", str(file), "--env", "hopper-medium-v2")
    assert (cfg.sac_alpha, cfg.guidance_scale, cfg.iql_tau) == (0.2, 8.0, 0.8)


def test_settings_survive_the_file_that_a_run_writes(tmp_path):
    cfg = parse("--env", "walker2d-medium-v2", "--energy_normalize", "false", "--qf_lr", "1e-5")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(cfg)))
    assert parse("--config_path", str(file)) == cfg


@pytest.mark.parametrize(
    "text, expected", [("true", True), ("True", True), ("false", False), ("FALSE", False)]
)
def test_truth_values(text, expected):
    assert parse("--normalize_reward", text).normalize_reward is expected


IMPOSSIBLE = {
    "unknown flag": ("--no_such_flag 1", ["no_such_flag"]),
    "abbreviated flag": ("--batch 8", ["--batch"]),
    "flag without value": ("--seed", ["seed"]),
    "stray word": ("hopper", ["hopper"]),
    "unknown env": ("--env hoper-medum-v2", ["hoper-medum-v2", "hopper-medium-v2"]),
    "env of another version": ("--env antmaze-umaze-v1", ["antmaze-umaze-v2"]),
    "fraction for an int": ("--batch_size 2.5", ["batch_size", "int", "2.5"]),
    "word for a float": ("--discount high", ["discount", "float", "high"]),
    "word for a bool": ("--normalize_reward maybe", ["normalize_reward", "bool", "maybe"]),
    "negative batch": ("--batch_size -256", ["batch_size", "-256"]),
    "no batch": ("--batch_size 0", ["batch_size", "0"]),
    "mixing ratio above 1": ("--mixing_ratio 1.5", ["mixing_ratio", "1.5"]),
    "discount above 1": ("--discount 1.01", ["discount", "1.01"]),
    "mixing ratio without online rows": ("--mixing_ratio 1", ["mixing_ratio", "empty"]),
    "mixing ratio without offline rows": ("--mixing_ratio 0.001", ["mixing_ratio", "empty"]),
    "not a number": ("--discount nan", ["discount", "nan"]),
    "negative learning rate": ("--qf_lr -1", ["qf_lr", "-1"]),
    "negative cap": ("--max_exchange -1", ["max_exchange", "-1"]),
    "expectile above 1": ("--online_expectile 1.1", ["online_expectile", "1.1"]),
    "bad exchange": ("--exchange all", ["exchange", "all", "gaussian", "direct", "none"]),
    "bad loss": ("--online_loss awr", ["online_loss", "awr", "sac", "expectile", "none"]),
    "bad alignment": ("--align kl", ["align", "gaussian_kl", "softmax_kl"]),
    "bad device": ("--device tpu", ["device", "tpu", "cpu"]),
    "bad wandb mode": ("--wandb on", ["wandb", "online", "offline", "disabled"]),
    "width that the network cannot have": ("--behavior_width 3", ["behavior_width", "4"]),
    "one support action": ("--n_support 1", ["n_support"]),
    "missing file": ("--config_path no_such_file.yaml", ["no_such_file.yaml"]),
}


IMPOSSIBLE_CQL = {
    "no temperature": ("--cql_temp 0", ["cql_temp", "0"]),
    "failure without end": ("--is_sparse_reward true --discount 1", ["discount", "1"]),
    "no action": ("--cql_n_actions 0", ["cql_n_actions"]),
    "bad loss": ("--online_loss sac", ["online_loss", "sac", "td", "none"]),
    "setting of IQL": ("--iql_tau 0.5", ["iql_tau"]),
}


IMPOSSIBLE_EDIS = {
    "negative interval": ("--edis_freq -1", ["edis_freq", "-1"]),
    "guidance away from the target": ("--state_guidance -0.5", ["state_guidance", "-0.5"]),
    "no negatives": ("--n_negatives 0", ["n_negatives", "1"]),
    "no solver step": ("--n_denoising_steps 0", ["n_denoising_steps", "1"]),
    "no training": ("--model_iterations 0", ["model_iterations", "1"]),
    "nothing generated": ("--n_generated 0", ["n_generated", "1"]),
    "setting of DARE": ("--guidance_scale 1", ["guidance_scale"]),
}


def one_error_line(capsys, *args, script=dare_iql):
    """Message of the SystemExit that parsing ends in; nothing else is printed."""
    with pytest.raises(SystemExit) as stop:
        parse(*args, script=script)
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert capsys.readouterr() == ("", "")
    return message


@pytest.mark.parametrize("args, parts", list(IMPOSSIBLE.values()), ids=list(IMPOSSIBLE))
def test_impossible_arguments_end_in_one_line(capsys, args, parts):
    message = one_error_line(capsys, *args.split())
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("args, parts", list(IMPOSSIBLE_CQL.values()), ids=list(IMPOSSIBLE_CQL))
def test_impossible_arguments_of_the_cql_group(capsys, args, parts):
    message = one_error_line(capsys, *args.split(), script=dare_cql)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("script", [edis_iql, edis_cql])
@pytest.mark.parametrize("args, parts", list(IMPOSSIBLE_EDIS.values()), ids=list(IMPOSSIBLE_EDIS))
def test_impossible_arguments_of_edis(capsys, script, args, parts):
    message = one_error_line(capsys, *args.split(), script=script)
    assert all(part in message for part in parts), message


def test_negative_numbers_where_they_have_a_meaning():
    args = "--reward_bias -5 --cql_clip_diff_min -7 --cql_target_action_gap -2".split()
    cfg = parse(*args, script=cal_ql)
    assert (cfg.reward_bias, cfg.cql_clip_diff_min, cfg.cql_target_action_gap) == (-5, -7, -2)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("batchsize: 256", ["batchsize"]),
        ("batch_size: 2.5", ["batch_size", "int", "2.5"]),
        ("batch_size: true", ["batch_size", "int", "True"]),
        ("batch_size:", ["batch_size"]),
        ("name:", ["name"]),
        ("normalize_reward: 2", ["normalize_reward", "bool", "2"]),
        ("mixing_ratio: 1.5", ["mixing_ratio", "1.5"]),
        ("env: hoper-medum-v2", ["hoper-medum-v2", "hopper-medium-v2"]),
        ("env: {a: 1}", ["env"]),
        ("seed: [1, 2]", ["seed"]),
        ("env: [", []),  # not YAML
        ("- 1\n- 2", []),  # a list
        ("just text", []),
        ("", []),  # empty
    ],
)
def test_impossible_files_end_in_one_line(capsys, tmp_path, text, parts):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    message = one_error_line(capsys, "--config_path", str(file))
    assert all(part in message for part in parts), message


def test_a_directory_or_bytes_for_a_file_end_in_one_line(capsys, tmp_path):
    assert str(tmp_path) in one_error_line(capsys, "--config_path", str(tmp_path))
    file = tmp_path / "config.yaml"
    file.write_bytes(b"\x80\xff\x00")
    one_error_line(capsys, "--config_path", str(file))


def test_nearest_names_of_an_unknown_env(capsys):
    message = one_error_line(capsys, "--env", "antmaze-medium-divers-v2")
    nearest = message.split("nearest")[1]
    assert "antmaze-medium-diverse-v2" in nearest and "hopper" not in nearest


def commented_fields(script):
    """Comment behind each field of Config, as written in the file."""
    lines = Path(script.__file__).read_text().splitlines()
    comments = {}
    for field in dataclasses.fields(script.Config):
        (line,) = [x for x in lines if x.startswith(f"    {field.name}: ") and " = " in x]
        comments[field.name] = line.partition("  # ")[2]
    return comments


@pytest.fixture
def wide_terminal(monkeypatch):
    """Help whose lines do not break at hyphens."""
    monkeypatch.setenv("COLUMNS", "200")


def test_help_shows_every_field_with_its_comment(wide_terminal):
    command = [sys.executable, dare_iql.__file__, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    described = " ".join(result.stdout.split("options:")[1].split())
    kinds = {f.name: f.type.__name__ for f in dataclasses.fields(dare_iql.Config)}
    for name, comment in commented_fields(dare_iql).items():
        assert comment and f"--{name} {kinds[name]} {comment} (default: " in described, name


@pytest.mark.parametrize("script", [iql, cal_ql, dare_cql, pex, edis_iql, edis_cql])
def test_help_of_the_other_scripts(capsys, wide_terminal, script):
    with pytest.raises(SystemExit) as stop:
        parse("--help", script=script)
    assert not stop.value.code
    described = " ".join(capsys.readouterr().out.split())
    for name, comment in commented_fields(script).items():
        assert comment and f" {comment} (default: " in described, name
