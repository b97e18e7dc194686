"""cflow's LightningCLI: parser, trainer and the three commands."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import Namespace
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Trainer
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from .. import __version__
from ..checkpoint import find_checkpoint
from ..errors import ArgumentError, CflowError, did_you_mean
from . import runs
from .callbacks import FitProgressBar, RunConfig, checkpoint_callbacks
from .datamodule import SequenceDataModule
from .module import FlowVAEModule
from .threads import FasterThreads
from .trainer import FlowTrainer


class Parser(LightningArgumentParser):
    """Lightning's parser, with errors of one line and no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation that works today is another option tomorrow.
        kwargs.update(allow_abbrev=False, version=__version__, dump_header=[f"cflow {__version__}"])
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong in one line and exit with code 2."""
        command = self.prog.replace("[options] ", "")
        options = [key for key, _ in self.get_defaults().items()]
        print(f"{command}: error: {explain(message, options)} (all options: {command} --help)", file=sys.stderr)
        sys.exit(2)


def explain(message: str, options: Sequence[str] = ()) -> str:
    """Return jsonargparse's message as one line that names the option and, if it is misspelt, the right one.

    Example:
        >>> explain("unrecognized arguments: --model.lrr 3", ["model.lr", "data.root"])
        "unknown option --model.lrr. Did you mean '--model.lr'?"
        >>> explain('Parser key "model.lr":\\n  Expected a <class \\'float\\'>. Got value: abc')
        '--model.lr: expected a float, got abc'
    """
    text = " ".join(re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message).split())
    if found := re.match(r"unrecognized arguments: (.*)", text):
        return _unknown_option(found[1], options)
    if found := re.search(r"does not accept option '([\w.]+)'", text):
        return _unknown_option(f"--{found[1]}", options)
    if found := re.match(r'Parser key "([\w.]+)":\s*(.*)', text):
        key, problem = found.groups()
        if union := re.search(r"Subtypes: \[(.*?)\] Errors: .*Given value: (.*)$", problem):
            wanted = union[1].replace("typing.", "").replace("NoneType", "null")
            return f"--{key}: {union[2]!r} is none of {wanted}"
        problem = re.sub(r"Expected an? (\w+)\. Got value: ", r"expected a \1, got ", problem)
        return f"--{key}: {problem}"
    return text


def _unknown_option(given: str, options: Sequence[str]) -> str:
    option = given.split()[0]
    if not option.startswith("-"):
        return f"unexpected argument {option!r}; options are written --name value"
    name = option.lstrip("-").split("=")[0]
    same_leaf = [o for o in options if o.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    if len(same_leaf) == 1:
        return f"unknown option {option}. Did you mean '--{same_leaf[0]}'?"
    return f"unknown option {option}." + did_you_mean(f"--{name}", [f"--{o}" for o in options])


class CflowCLI(LightningCLI):
    """LightningCLI in which a checkpoint's configuration is a default and never wins over what the user wrote.

    The configuration of a checkpoint enters through the arguments (`cli.prepare`), before those of the user.
    """

    model: FlowVAEModule
    datamodule: SequenceDataModule
    trainer: FlowTrainer
    run: Path | None = None

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands and the arguments of each method that are no options."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "test": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
            "traverse": {"model", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add cflow's own options and defaults."""
        parser.add_argument(
            "--run_name",
            type=str,
            default=None,
            help="Runs are written to <default_root_dir>/<run_name>/version_<n>; the configuration's name by default.",
        )
        parser.set_defaults(
            {
                "trainer.default_root_dir": runs.DEFAULT_ROOT,
                "trainer.enable_model_summary": False,
                "trainer.num_sanity_val_steps": 0,
                "trainer.check_val_every_n_epoch": None,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments without Lightning's warning about arguments given in Python."""
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def _parse_ckpt_path(self) -> None:
        """Leave the parsed values alone: Lightning would put the checkpoint's over the user's, in silence."""

    def before_instantiate_classes(self) -> None:
        """Take 32-true for bf16-mixed where the processor would compute bfloat16 in software."""
        section = self._get(self.config, "trainer")
        if section["precision"] == "bf16-mixed" and bfloat16_in_software(section["accelerator"]):
            section["precision"] = "32-true"
            if self.subcommand == "fit" and is_first_process():
                print(
                    "--trainer.precision: this processor has no bfloat16, and would be slower with it; taking 32-true"
                )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer; for `fit`, look at the data first, then claim the folder of a new run."""
        section = self._get(self.config, "trainer")
        bar = [FitProgressBar()] if section["enable_progress_bar"] is not False else []
        self.trainer_defaults["callbacks"] = [*bar, FasterThreads()]
        if self.subcommand != "fit" or section["fast_dev_run"]:
            kwargs.setdefault("logger", False)
            self.save_config_callback = None
            return self._make_trainer(**kwargs)
        self._check_resume(section)
        self.datamodule.prepare_data()
        root, name = Path(section["default_root_dir"]), str(self._get(self.config, "run_name") or "run")
        # Other processes of the same fit get the folder of the first one, by broadcast.
        self.run = runs.claim_run(root, name) if is_first_process() else root / name / "version_0"
        self.save_config_kwargs = {"folder": self.run}
        if section["logger"] in (None, True):
            kwargs["logger"] = TensorBoardLogger(root, name=name, version=self.run.name)
        if section["enable_checkpointing"] is not False:
            self.trainer_defaults["callbacks"] += checkpoint_callbacks(self.run / "checkpoints")
        return self._make_trainer(**kwargs)

    def _make_trainer(self, **kwargs: Any) -> Trainer:
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            if isinstance(error, CflowError):
                raise
            raise ArgumentError(f"--trainer: {str(error).splitlines()[0]}") from None

    def _check_resume(self, section: Namespace) -> None:
        """Refuse to resume a fit that has nothing left to do: it would end at once, in silence."""
        path = self._get(self.config, "ckpt_path")
        if path and section["max_steps"] >= 0:
            steps = runs.read_fit(Path(path)).get("global_step", 0)
            if steps >= section["max_steps"]:
                raise ArgumentError(
                    f"--trainer.max_steps={section['max_steps']}: the checkpoint is at step {steps} already; "
                    "give a larger number to go on."
                )

    def after_fit(self) -> None:
        """Test the best checkpoint and write the results into the run."""
        if self.run is None:
            return
        run = self.trainer.strategy.broadcast(self.run)
        if found := find_checkpoint(run):
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=str(found), out_dir=str(run))


def is_first_process() -> bool:
    """Whether this is the process of a fit that writes and speaks."""
    return getattr(rank_zero_only, "rank", 0) in (0, None)


def bfloat16_in_software(accelerator: object) -> bool:
    """Whether a trainer of this accelerator runs on a CPU for which oneDNN has no bfloat16 kernels.

    Convolutions then take ten times as long as in float32 (AVX2 processors).
    """
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return on_cpu and supported is not None and not supported()


def run(args: Sequence[str]) -> None:
    """Run a command whose arguments `cli.prepare` has prepared."""
    _quieten()
    threads = torch.get_num_threads()
    try:
        CflowCLI(
            FlowVAEModule,
            SequenceDataModule,
            trainer_class=FlowTrainer,
            save_config_callback=RunConfig,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={
                "prog": "cflow",
                "description": "Potential flows in latent spaces: train, measure and look at them.",
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(args),
        )
    finally:
        torch.set_num_threads(threads)


def _quieten() -> None:
    """Keep the terminal for what the user asked: hide Lightning's tips and its advice on data loaders."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("pytorch_lightning", "lightning_fabric", "torch.utils.tensorboard", "jsonargparse"):
        warnings.filterwarnings("ignore", module=rf"{re.escape(module)}.*")
    torch.set_float32_matmul_precision("high")
