"""Around a run: names, settings files, wandb where it cannot be reached, errors in one line."""

import errno
import os
import signal
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import wandb
from filelock import Timeout

from d4rl_gymnasium.data import DatasetError
from d4rl_gymnasium.runs import check_name, errors_in_one_line, parse, wandb_init
from d4rl_gymnasium.tasks import TASKS

# --- Names and settings ---


@pytest.mark.parametrize("name", ["iql", "größe 😀", "a.b", "...", "n" * 255])
def test_a_name_of_a_folder_is_taken(tmp_path, name):
    check_name(name)
    (tmp_path / name).mkdir()
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "cache",
        "a/b",
        "/tmp/x",
        "../x",
        "a\nb",
        "a\0b",
        "n" * 256,
        "ü" * 128,
        "\udcff",
    ],
)
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match="^--name must be [^\n]*$"):
        check_name(name)


@dataclass
class Settings:
    """Of a script."""

    # Banner
    seed: int = 0  # of everything
    rate: float = 0.1  # of learning
    name: str = "iql"  # of the method


@pytest.mark.parametrize(
    "text, reason",
    [
        ("seed: 1\nrate: 0.5\nseed: 2\n", "seed is there twice"),
        ("", "no settings"),
        ("- 1\n- 2\n", "no settings"),
        ("42\n", "no settings"),
        ("seed: [1]\n", "seed needs one plain value"),
        ("seed:\n", "seed needs one plain value"),
        ("seed: {a: 1, a: 2}\n", "a is there twice"),
        ("seed: 2020-01-01\n", "seed needs one plain value"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "a needs one plain value"),
        ("[" * 5000, "recursion"),
        ("seed: !!python/object/apply:os.getpid []\n", "could not determine a constructor"),
        ("seed: 1\n\t- b\n", "cannot start any token"),
    ],
)
def test_a_settings_file_that_is_none_is_refused(tmp_path, text, reason):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    for args in (["--config_path", str(file)], [f"--config_path={file}"]):
        with pytest.raises(SystemExit) as stop:
            parse(Settings, args)
        message = stop.value.code
        assert message.startswith(f"error: {file}: ") and reason in message and "\n" not in message


@pytest.mark.parametrize(
    "value", ["", "007", "null", "[a]", "a\nb", "a: b", "größe 😀", 'the "best"', "\\", "a=b", "-x"]
)
def test_a_string_is_taken_as_it_stands(value):
    """Not as YAML."""
    for args in (["--name", value, "--seed", "3"], ["--seed", "3", f"--name={value}"]):
        if value != "-x" or args[0] == "--seed":  # argparse takes -x for a flag
            assert parse(Settings, args) == Settings(seed=3, name=value)


def test_a_string_without_a_value_is_none(capsys):
    with pytest.raises(SystemExit):
        parse(Settings, ["--name", "--seed", "3"])
    assert "--name: expected one argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    "presets, reason",
    [
        ({"a": {"sed": 1}}, "PRESETS name sed, which is no setting of TrainConfig"),
        ({"a": {}, "b": {"seed": 1}}, "PRESETS give seed, but TrainConfig has 0 for all tasks: "),
    ],
)
def test_presets_that_would_do_nothing_are_refused(monkeypatch, presets, reason):
    monkeypatch.setattr(sys.modules[__name__], "PRESETS", presets, raising=False)
    with pytest.raises(SystemExit) as stop:
        parse(Settings, [])
    assert stop.value.code.startswith(f"error: {reason}")


@dataclass
class ByTask:
    """A setting that PRESETS fill in."""

    rate: float = None  # of learning


def test_a_setting_of_none_needs_a_preset_of_each_family(monkeypatch):
    presets = {"a": {}, "b": {"rate": 1.0}, "c": {}, "hopper-medium-v2": {}, "pendulum-v0": {}}
    monkeypatch.setitem(TASKS, "pendulum-v0", None)  # as register_task does
    monkeypatch.setattr(sys.modules[__name__], "PRESETS", presets, raising=False)
    with pytest.raises(SystemExit, match="^error: TrainConfig has None for rate: write a value for "
                                         "a and c in PRESETS"):  # fmt: skip
        parse(ByTask, [])
    for name in "ac":
        presets[name]["rate"] = 2.0
    assert parse(ByTask, []) == ByTask()


# --- Errors ---


@pytest.mark.parametrize(
    "error, message",
    [
        (KeyboardInterrupt(), "interrupted; the same command resumes from the last checkpoint"),
        (Timeout("/runs/x/lock"), "error: another process is training in /runs/x"),
        (DatasetError("no data"), "error: no data"),
        (FloatingPointError("q is not finite"), "error: q is not finite"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/runs/x/eval.csv"),
            "error: /runs/x/eval.csv: No space left on device: make room, then the same command "
            "resumes",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/runs/x"),
            "error: /runs/x: Permission denied: get permission to use it, or name another",
        ),
        (OSError("damaged"), "error: damaged"),
        (
            MemoryError("Unable to allocate 3 TiB"),
            "error: too little memory for these sizes: lower them (Unable to allocate 3 TiB)",
        ),
        (
            RuntimeError("Could not determine home directory."),
            "error: a path starts with ~ and an unknown user: write it out",
        ),
        (
            RuntimeError("[enforce fail]\n can't allocate memory"),
            "error: too little memory for these sizes: lower them ([enforce fail] can't allocate "
            "memory)",
        ),
    ],
)
def test_errors_end_in_one_line(error, message):
    with pytest.raises(SystemExit) as stop, errors_in_one_line():
        raise error
    assert stop.value.code == message


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("x"), SystemExit(3)])
def test_a_defect_keeps_its_traceback(error):
    with pytest.raises(type(error)) as found, errors_in_one_line():
        raise error
    assert found.value is error


# --- wandb ---


@pytest.fixture
def attempts(monkeypatch):
    """Modes that wandb.init was called with; those in `fails` fail."""
    calls = SimpleNamespace(modes=[], fails=set(), logged_in=True, ids=[])

    def init(mode, id, settings, **_):
        assert "WANDB_MODE" not in os.environ and settings.init_timeout <= 30 and settings.silent
        calls.modes.append(mode)
        calls.ids.append(id)
        if mode in calls.fails:
            raise wandb.errors.CommError("no answer\nwhile retrying")
        return mode

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "login", lambda prompt: prompt or calls.logged_in)
    return calls


@pytest.mark.parametrize(
    "asked, variable, fails, modes, said",
    [
        ("online", None, "", ["online"], ""),
        ("online", "online", "", ["online"], ""),
        ("offline", None, "", ["offline"], ""),
        ("disabled", "online", "", ["disabled"], ""),
        ("offline", "nonsense", "", ["offline"], ""),
        ("online", None, "online", ["online", "offline"], "no answer while retrying"),
        ("online", "login", "", ["offline"], "not logged in: see `wandb login`"),
        ("online", "offline", "", ["offline"], "WANDB_MODE is offline"),
        ("online", "disabled", "", ["offline"], "WANDB_MODE is disabled"),
        ("online", "nonsense", "", ["offline"], "WANDB_MODE is nonsense"),
        ("offline", None, "offline", ["offline", "disabled"], "no answer while retrying"),
    ],
)
def test_wandb_never_stops_a_run(
    monkeypatch, capsys, attempts, asked, variable, fails, modes, said
):
    """Nor asks; the run keeps its id, and the environment its variable."""
    attempts.fails, attempts.logged_in = {fails}, variable != "login"
    if variable not in (None, "login"):
        monkeypatch.setenv("WANDB_MODE", variable)
    before = os.environ.get("WANDB_MODE")
    assert wandb_init(asked, id="abc", project="DARE") == modes[-1]
    assert attempts.modes == modes and set(attempts.ids) == {"abc"}
    assert os.environ.get("WANDB_MODE") == before
    line = f"wandb: {modes[-1]}, since {asked} is not possible ({said})\n" if said else ""
    assert capsys.readouterr().out == line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_in_one_line_also_where_a_shell_ignores_it(number):
    """As in a job in the background of a shell script."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit, match="interrupted; the same command resumes"):
            with errors_in_one_line():
                signal.raise_signal(number)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
