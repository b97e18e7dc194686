"""The command ``cflow``: ``cflow fit | test | traverse | report``.

    cflow fit --config digits                                  # a preset, or the path of a configuration file
    cflow fit --config mnist --data.root data --model.lr 3e-4 --trainer.devices 2
    cflow fit --config digits --ckpt_path last --trainer.max_steps 20000        # go on from the newest run
    cflow test --ckpt_path runs/digits
    cflow traverse --ckpt_path last --num_samples 6
    cflow traverse --ckpt_path last --schedule 0:scaling,4:rotation             # or --weights 0.5,0.5,0
    cflow report runs/digits/version_0 runs/digits/version_1
    cflow fit --config digits --print_config > mine.yaml

This file answers what needs no PyTorch, and turns errors into one line and an exit code; Lightning does the rest
(`app.py`).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..errors import ArgumentError, CflowError, DataError, IntegrationError, TrainingError, did_you_mean
from .presets import preset_names

COMMANDS = {
    "fit": "train a flow-factorised VAE, then test its best checkpoint",
    "test": "measure a checkpoint on held-out data and draw it",
    "traverse": "draw what the flows of a checkpoint make of held-out data",
    "report": "write a page about one run, or several, that needs no network and no server",
}

HELP = """usage: cflow COMMAND [options]

Potential flows in latent spaces: train, measure and look at them.

{commands}

  cflow fit --config NAME        a preset ({presets}), or a configuration file of your own
  cflow test --ckpt_path last    the newest run; or a checkpoint, or a run's folder
  cflow report runs/digits       report.html about the newest run in there
  cflow fit --ckpt_path last --trainer.max_steps 20000
                                 go on with it
  cflow COMMAND --help           the options of a command
  cflow fit --print_config       all of them with their values, as a configuration file
  cflow --version
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done; 1: training failed; 2: wrong arguments, missing, unreadable or unwritable files; 130: interrupted.

    Arguments:
        args: the arguments after ``cflow``; those of the process by default.
    """
    given = list(sys.argv[1:] if args is None else args)
    if "--version" in given:
        print(f"cflow {__version__}")
        return 0
    if not given or given[0] in ("-h", "--help"):
        lines = (f"  {name:<10}{what}" for name, what in COMMANDS.items())
        print(HELP.format(commands="\n".join(lines), presets=", ".join(preset_names())), end="")
        return 0
    try:
        if given[0].startswith("--print_config"):
            given = ["fit", *given]
        if given[0] not in COMMANDS:
            _unknown_command(given[0])
        try:
            from .app import run
        except ModuleNotFoundError as error:
            raise DataError(f"{error}; training needs more packages: pip install 'cflow-torch[train]'") from None
        run(given)
    except KeyboardInterrupt as interrupt:
        if args is None:  # the process is about to end, and a second Ctrl-C would only add a traceback
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"\ncflow: interrupted{': ' + str(interrupt) if str(interrupt) else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (`cflow fit --help | head`) left; give Python nothing more to flush to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except TrainingError as error:
        # All processes of a fit stop at once; the first one speaks, and is killed by Lightning where another fails.
        return _report(error, 1) if os.environ.get("LOCAL_RANK", "0") == "0" else 0
    except IntegrationError as error:
        return _report(error, 1)
    except (CflowError, OSError) as error:
        return _report(error, 2)
    return 0


def _report(error: BaseException, code: int) -> int:
    text = str(error)
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)):  # TensorBoard's are of bytes
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    if text.startswith("Caught "):  # in a worker that reads: PyTorch hands its traceback on as the message
        text = text.rstrip().splitlines()[-1].partition(": ")[2]
    print(f"cflow: error: {' '.join(text.split())}", file=sys.stderr)
    return code


def _unknown_command(command: str) -> NoReturn:
    if command.startswith("-"):
        raise ArgumentError(f"the command comes first: `cflow fit|test|traverse|report {command} …`.")
    raise ArgumentError(
        f"unknown command {command!r}, expected {', '.join(COMMANDS)}.{did_you_mean(command, COMMANDS)}"
    )


if __name__ == "__main__":
    sys.exit(main())
