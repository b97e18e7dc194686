"""The command ``cflow``: ``cflow fit | test | traverse``.

    cflow fit --config digits                                  # a preset, or the path of a configuration file
    cflow fit --config mnist --data.root data --model.lr 3e-4 --trainer.devices 2
    cflow fit --config digits --ckpt_path last --trainer.max_steps 20000        # go on from the newest run
    cflow test --config digits --ckpt_path last
    cflow traverse --ckpt_path runs/digits/version_0 --num_samples 6
    cflow fit --config digits --print_config > mine.yaml

This file prepares the arguments and turns errors into one line and an exit code; Lightning does the rest
(`app.py`). Nothing heavy is imported before the arguments ask for it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from .. import __version__
from ..errors import ArgumentError, CflowError, DataError, IntegrationError, did_you_mean

COMMANDS = ("fit", "test", "traverse")
PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "digits"


def preset_names() -> list[str]:
    """Return the names of the presets shipped with cflow.

    Example:
        >>> preset_names()
        ['digits', 'mnist']
    """
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done; 1: training failed; 2: wrong arguments, missing or unreadable files; 130: interrupted.

    Arguments:
        args: the arguments after ``cflow``; those of the process by default.
    """
    given = list(sys.argv[1:] if args is None else args)
    if "--version" in given:
        print(f"cflow {__version__}")
        return 0
    try:
        arguments = prepare(given)
        try:
            from .app import run
        except ModuleNotFoundError as error:
            raise DataError(f"{error}; training needs more packages: pip install 'cflow-torch[train]'") from None
        run(arguments)
    except KeyboardInterrupt as interrupt:
        print(f"\ncflow: interrupted{': ' + str(interrupt) if str(interrupt) else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (`cflow fit --help | head`) left; give Python nothing more to flush to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except IntegrationError as error:
        return _report(error, 1)
    except (CflowError, OSError) as error:
        return _report(error, 2)
    return 0


def _report(error: BaseException, code: int) -> int:
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    print(f"cflow: error: {' '.join(text.split())}", file=sys.stderr)
    return code


def prepare(args: Sequence[str]) -> list[str]:
    """Return the arguments as the parser wants them: presets as files, and a checkpoint's own configuration.

    What is later wins: the preset, the configuration stored in the checkpoint, then everything that the
    user wrote, in the user's order.

    Raises:
        ArgumentError: no command, an unknown one, or an unknown preset.
        DataError: a configuration file or checkpoint that is missing or damaged.
    """
    if not args or args[0] in ("-h", "--help"):
        return list(args) or ["--help"]
    if args[0].startswith("--print_config"):
        args = ["fit", *args]
    command, *rest = args
    if command not in COMMANDS:
        _unknown_command(command)
    if "-h" in rest or "--help" in rest:
        return [command, "--help"]
    rest = _split_equals(rest)
    configs = [_config(value) for value in _values(rest, "--config", "-c")]
    stored: list[str] = []
    if checkpoint := _last_value(rest, "--ckpt_path"):
        file, content = _checkpoint(command, checkpoint, rest, configs)
        stored = ["--config", json.dumps(content)]
        rest = _replace(rest, "--ckpt_path", lambda _: str(file))
    elif command != "fit" and not any(a.startswith("--print_config") for a in rest):
        raise ArgumentError(f"`cflow {command}` needs --ckpt_path: a checkpoint, a run's folder, or `last`.")
    elif not configs:
        configs = [_config(DEFAULT_PRESET)]
        rest = ["--config", DEFAULT_PRESET, *rest]
    name = ["--run_name", configs[-1].stem] if configs else []
    presets = [c for c in configs if c.parent == PRESETS]
    base = [token for preset in presets for token in ("--config", str(preset))]
    own = _without(_replace(rest, "--config", lambda v: str(_config(v))), "--config", [str(p) for p in presets])
    return [command, *name, *base, *stored, *own]


def _unknown_command(command: str) -> NoReturn:
    if command.startswith("-"):
        raise ArgumentError(f"the command comes first: `cflow fit|test|traverse {command} …`.")
    raise ArgumentError(
        f"unknown command {command!r}, expected fit, test or traverse.{did_you_mean(command, COMMANDS)}"
    )


def _config(value: str) -> Path:
    """Return the file that a user's ``--config`` means."""
    if value in preset_names() and not Path(value).is_file():
        return PRESETS / f"{value}.yaml"
    path = Path(value)
    if path.is_file():
        return path
    if path.suffix or len(path.parts) > 1 or path.exists():
        what = "is not a file" if path.exists() else "there is no such file"
        raise DataError(
            f"--config {value}: {what}; give a configuration file or a preset ({', '.join(preset_names())})."
        )
    raise ArgumentError(
        f"--config {value}: unknown preset, and no such file; presets are {', '.join(preset_names())}."
        f"{did_you_mean(value, preset_names())}"
    )


def _checkpoint(command: str, value: str, rest: list[str], configs: list[Path]) -> tuple[Path, dict[str, object]]:
    """Return the file that ``--ckpt_path`` means and the configuration stored in it."""
    from . import runs

    root = Path(_last_value(rest, "--trainer.default_root_dir") or runs.DEFAULT_ROOT)
    name = _last_value(rest, "--run_name") or (configs[-1].stem if configs else None)
    file = runs.named_checkpoint(value, root, name, prefer="last" if command == "fit" else "best")
    return file, dict(runs.read_fit(file)[runs.CONFIG_KEY])


def _split_equals(args: Sequence[str]) -> list[str]:
    """Return the arguments with the options that are read here as two tokens: ``--config=x`` → ``--config x``."""
    result: list[str] = []
    for token in args:
        option, equals, value = token.partition("=")
        known = option in ("--config", "-c", "--ckpt_path", "--run_name", "--trainer.default_root_dir")
        result += [option, value] if known and equals else [token]
    return ["--config" if token == "-c" else token for token in result]


def _values(args: Sequence[str], *options: str) -> list[str]:
    return [value for option, value in pairwise(args) if option in options]


def _last_value(args: Sequence[str], option: str) -> str | None:
    return next(iter(reversed(_values(args, option))), None)


def _replace(args: Sequence[str], option: str, change: Callable[[str], str]) -> list[str]:
    result = list(args)
    for index in range(1, len(result)):
        if result[index - 1] == option:
            result[index] = change(result[index])
    return result


def _without(args: Sequence[str], option: str, values: Sequence[str]) -> list[str]:
    """Return the arguments without those pairs of an option and one of some values."""
    result: list[str] = []
    skip = False
    for index, token in enumerate(args):
        if skip:
            skip = False
        elif token == option and index + 1 < len(args) and args[index + 1] in values:
            skip = True
        else:
            result.append(token)
    return result


if __name__ == "__main__":
    sys.exit(main())
