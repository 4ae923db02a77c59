"""What every script needs around a run: settings, wandb, and errors that end in one line."""

import argparse
import dataclasses
import errno
import inspect
import json
import operator
import os
import re
import signal
import sys
import threading
from contextlib import contextmanager

import pyrallis
import wandb
import yaml
from filelock import Timeout

from d4rl_gymnasium.download import DatasetError, one_line
from d4rl_gymnasium.tasks import TASKS

CURES = {  # of what a file system refuses
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "make room, then the same command resumes",
    (errno.EACCES, errno.EPERM, errno.EROFS): "get permission to use it, or name another",
    (errno.EISDIR,): "a folder stands where a file should be: move it away, or name a file (of a "
    "run its offline.pt)",
    (errno.ENOTDIR, errno.EEXIST): "a file or a dangling link stands where a folder should be: "
    "move it away, or name another folder",
    (errno.ENOENT,): "check the path, and any links in it that lead nowhere",
}
CURE = {number: cure for numbers, cure in CURES.items() for number in numbers}
NO_MEMORY = re.compile("allocate|out of memory", re.IGNORECASE)  # of torch's RuntimeErrors
# Largest values, above which no machine has the memory or the time; of other settings 10**9.
HIGHEST = dict.fromkeys(("regenerated_size", "online_iterations", "n_generated"), 10**8)
HIGHEST |= dict.fromkeys(("batch_size", "behavior_batch_size", "model_batch_size"), 10**6)
HIGHEST |= dict.fromkeys(("energy_batch_size", "n_unguided"), 10**6)
HIGHEST |= dict.fromkeys(("hidden_dim", "behavior_width", "energy_hidden", "model_width"), 10**4)
HIGHEST |= dict.fromkeys(("n_episodes", "utd", "generated_updates", "n_negatives"), 10**4)
HIGHEST |= dict.fromkeys(("n_reference", "n_support", "n_max_actions", "cql_n_actions"), 10**4)
HIGHEST |= dict.fromkeys(("diffusion_steps", "n_denoising_steps"), 1000)
HIGHEST |= dict.fromkeys(("n_hidden", "q_n_hidden_layers", "policy_n_hidden_layers"), 100)
HIGHEST |= {"model_depth": 100, "threads": 256}
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}
WANDB_SECONDS = 20  # that wandb may take to reach its server
# Before the first use of pyrallis, which remembers what decodes a type.
pyrallis.decode.register(int, operator.index)  # 2.5 is no int
pyrallis.decode.register(bool, {True: True, False: False}.__getitem__)  # and "maybe" no bool


@contextmanager
def errors_in_one_line():
    """On errors that the user can mend, Ctrl-C or SIGTERM, exit with one line; on Ctrl-C also in a
    background job of a shell script, which starts with Ctrl-C ignored.
    """
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # Python allows no other
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command resumes from the last checkpoint")
    except Timeout as error:
        sys.exit(f"error: another process is training in {os.path.dirname(error.lock_file)}")
    except (DatasetError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.filename is None:  # of files.py, in its own words
            sys.exit(f"error: {one_line(error)}")
        cure = CURE.get(error.errno, "mend this, then run the same command again")
        sys.exit(f"error: {error.filename}: {error.strerror}: {cure}")
    except (MemoryError, RuntimeError) as error:
        if "home directory" in str(error):  # of pathlib
            sys.exit("error: a path starts with ~ and an unknown user: write it out")
        if isinstance(error, RuntimeError) and not NO_MEMORY.search(str(error)):
            raise
        reason = one_line(error)[:200] or "no memory"
        sys.exit(f"error: too little memory for these sizes: lower them ({reason})")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def check_name(name: str):
    """Refuse a --name that is no folder of its own in runs_dir (ValueError, in one line)."""
    if name in ("", ".", "..", "cache") or "/" in name or not name.isprintable():
        raise ValueError(f"--name must be the name of a folder of its own, not {name!r}")
    if len(os.fsencode(name)) > 255:
        raise ValueError("--name must be at most 255 bytes long, as file systems want it")


def parse(config_class: type, args: list[str] | None = None):
    """Settings of a command line, over those of its --config_path FILE.yaml, over the defaults.

    What cannot be ends in one line, or two where argparse adds its usage.
    """
    parser = parser_of(config_class)
    args = _quoted(sys.argv[1:] if args is None else args, config_class)
    try:
        _check_presets(config_class)
        _check_file(args, config_class)
        return parser.parse_args(args)
    except Exception as error:
        sys.exit(f"error: {refusal(error)}")


def refusal(error: Exception) -> str:
    """What is wrong with a setting, in one line: pyrallis speaks of classes and fields."""
    pattern = r"value='(.*)' into field .*\.(\w+)\" of type <class '(\w+)'>"
    if not (found := re.search(pattern, one_line(error))):
        return one_line(error)
    value, name, kind = found.groups()
    return f"--{name} must be {KINDS.get(kind, kind)}, not {value}"


def parser_of(config_class: type) -> pyrallis.argparsing.ArgumentParser:
    """Parser of a script's command line, with the comments of its settings as their help."""
    # pyrallis would read the source again for every setting, which takes seconds, and take banners
    # above settings for their help: a class without a source file spares both.
    of_no_file = {"__module__": "builtins", "__doc__": config_class.__doc__}
    fields = type(config_class.__name__, (config_class,), of_no_file)
    usage = "%(prog)s [--SETTING VALUE ...]; --help lists the settings"
    parser = pyrallis.argparsing.ArgumentParser(fields, usage=usage, allow_abbrev=False)
    parser.config_class = config_class
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(config_class), re.M))
    for action in parser._actions:
        action.help = comments.get(action.dest, action.help)
        if action.dest in comments and action.default is None:
            # Of no length, but argparse adds a default of its own, None, to a help without one.
            action.help += f"%(default).0s (default: {_by_task(config_class, action.dest)})"
    return parser


def _presets(config_class):
    """PRESETS of a script, whose values fill in the defaults that are None."""
    return getattr(sys.modules[config_class.__module__], "PRESETS", {})


def _check_presets(config_class):
    """Refuse presets that would do nothing or are lacking, as after an edit of a copy."""
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    for name in [name for values in _presets(config_class).values() for name in values]:
        if name not in defaults:
            raise ValueError(f"PRESETS name {name}, which is no setting of TrainConfig")
        if defaults[name] is not None:
            raise ValueError(
                f"PRESETS give {name}, but TrainConfig has {defaults[name]} for all tasks: write "
                "None there, and the value in PRESETS"
            )
    families = {k: v for k, v in _presets(config_class).items() if k not in TASKS}
    for name in [name for name, default in defaults.items() if default is None]:
        if lacking := [family for family, values in families.items() if name not in values]:
            raise ValueError(
                f"TrainConfig has None for {name}: write a value for {' and '.join(lacking)} in "
                "PRESETS, or one for all tasks in place of None"
            )


def _by_task(config_class, field):
    """The values that a script's PRESETS have for a field."""
    presets = _presets(config_class)
    found = {key: values[field] for key, values in presets.items() if field in values}
    families = [f"{key} {value}" for key, value in found.items() if key not in TASKS]
    more = ["others in PRESETS"] * (len(found) > len(families))
    return ", ".join(families + more) or "None"


def _quoted(args, config_class):
    """Arguments with quotes around strings: pyrallis reads values as YAML, where 007 is 7."""
    names = {f"--{field.name}" for field in dataclasses.fields(config_class) if field.type is str}
    quoted, before = [], None
    for arg in args:
        name, equals, value = arg.partition("=")
        if name in names and equals:
            arg = f"{name}={json.dumps(value, ensure_ascii=False)}"
        elif before in names and not arg.startswith("--"):
            arg = json.dumps(arg, ensure_ascii=False)
        quoted.append(arg)
        before = name
    return quoted


class _NoKeyTwice(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{twice[0]} is there twice")
        return super().construct_mapping(node, deep)


def _check_file(args, config_class):
    """Refuse a --config_path that is not one plain value for each of some settings of the class."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config_path")
    path = parser.parse_known_args(args)[0].config_path
    if path is None:
        return
    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.load(file, _NoKeyTwice)
        if not isinstance(settings, dict):
            raise ValueError("no settings, which are lines like `seed: 1`")
        for key, value in settings.items():
            if not isinstance(value, (str, int, float)):
                raise ValueError(f"{key} needs one plain value")
        fields = {field.name for field in dataclasses.fields(config_class)}
        if unknown := [str(key) for key in settings if key not in fields]:
            script = os.path.basename(inspect.getfile(config_class))
            raise ValueError(f"{', '.join(unknown)}: no settings of {script}, see --help")
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error


def wandb_init(mode: str, **settings):
    """wandb.init(mode=mode), which neither stops a run nor asks: online becomes offline, or offline
    disabled, with one line that says why. `--wandb` alone sets the mode, except that a WANDB_MODE
    other than online keeps a run offline.
    """
    variable = os.environ.pop("WANDB_MODE", None)  # wandb refuses unknown ones in every mode
    modes = ("online", "offline", "disabled")
    try:
        for attempt in modes[modes.index(mode) :]:
            try:
                if attempt == "online" and variable not in (None, "", "online"):
                    raise ValueError(f"WANDB_MODE is {variable}")
                if attempt == "online" and not wandb.login(prompt=False):
                    raise ValueError("not logged in: see `wandb login`")
                options = wandb.Settings(silent=True, init_timeout=WANDB_SECONDS)
                return wandb.init(
                    mode=attempt, resume="allow", reinit="finish_previous", settings=options,
                    **settings,
                )  # fmt: skip
            except Exception as error:  # of many kinds
                if attempt == modes[-1]:
                    raise
                reason, following = one_line(error)[:200], modes[modes.index(attempt) + 1]
                print(f"wandb: {following}, since {attempt} is not possible ({reason})", flush=True)
    finally:
        if variable is not None:
            os.environ["WANDB_MODE"] = variable
