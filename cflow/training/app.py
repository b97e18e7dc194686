"""cflow's LightningCLI: parser, trainer and the four commands."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningDataModule, Trainer
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins import CheckpointIO
from pytorch_lightning.utilities import rank_zero_only

from .. import __version__
from ..checkpoint import DEFAULT_ROOT, Kind, find_checkpoint, pretrained_folder
from ..errors import ArgumentError, CflowError
from . import presets, progress, results, runs
from .checkpoints import RunConfig, WholeFiles, checkpoint_callbacks
from .datamodule import SequenceDataModule
from .messages import explain, read_config
from .module import FlowVAEModule
from .optimizer import bfloat16_in_software
from .population import PopulationModule, SnapshotDataModule
from .population_trainer import PopulationTrainer
from .report import REPORT, write_report
from .trainer import FlowTrainer

# The trainer's options that `--help` shows; all of them with --help_all.
COMMON = (
    *("max_steps", "max_epochs", "max_time", "accelerator", "devices", "strategy", "precision", "val_check_interval"),
    *("default_root_dir", "gradient_clip_val", "accumulate_grad_batches", "logger", "enable_progress_bar"),
)

# What the model takes over from the data.
LINKED = {"image_shape": "image_shape", "num_frames": "num_frames", "num_flows": "data_flows"}
HIDDEN = (
    *("kind", "model.dim", "model.units", "data.source", "data.sizes"),
    *(f"model.{name}" for name in LINKED.values()),
)  # never or rarely given


class ConfigFile(ActionConfigFile):  # type: ignore[misc]
    """``--config``: a file whose values are checked here, so that an error names it; a preset is a set of defaults."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Take a file over."""
        path = presets.config_file(values)
        if not presets.is_preset(values):
            read_config(path, parser.options())
            super().__call__(parser, cfg, str(path), option_string)  # type: ignore[no-untyped-call]


class Parser(LightningArgumentParser):
    """Lightning's parser, with errors of one line, no abbreviated options, and a help that begins with the model."""

    everything = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation that works today is another option tomorrow.
        kwargs.update(allow_abbrev=False, version=__version__, dump_header=[f"cflow {__version__}"])
        super().__init__(*args, **kwargs)

    def options(self) -> list[str]:
        """Return the names of all options."""
        return [key for key, _ in self.get_defaults().items()]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong in one line and exit with code 2."""
        command = self.prog.replace("[options] ", "")
        print(f"{command}: error: {explain(message, self.options())} (all options: {command} --help)", file=sys.stderr)
        sys.exit(2)

    def format_help(self, formatter: Any = None) -> str:
        """Return the help, without the options of Lightning's trainer that are rarely needed."""
        hidden = [] if Parser.everything else [a for a in self._actions if self._is_rare(a.dest)]
        texts = [action.help for action in hidden]
        for action in hidden:
            action.help = argparse.SUPPRESS
        text: str = super().format_help(formatter)
        for action, old in zip(hidden, texts, strict=True):
            action.help = old
        return text + ("\nThe other options of Lightning's trainer: --help_all\n" if hidden else "")

    @staticmethod
    def _is_rare(option: str) -> bool:
        section, _, name = option.partition(".")
        return option in HIDDEN or (section == "trainer" and name not in ("", *COMMON))


class CflowCLI(LightningCLI):
    """LightningCLI in which presets and the configuration of a checkpoint are defaults: what the user wrote wins."""

    model: FlowVAEModule
    datamodule: SequenceDataModule
    trainer: FlowTrainer
    run: Path | None = None
    config_name: str | None = None
    data_class: type[LightningDataModule] = SequenceDataModule
    linked = LINKED
    monitor = "val/equivariance_error"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Run a command; a fit that is refused, or interrupted before its first step, leaves no folder of a run."""
        try:
            super().__init__(*args, **kwargs)
        except BaseException:
            callbacks = self.trainer.callbacks if hasattr(self, "trainer") else []  # type: ignore[attr-defined]
            has_trained = any(isinstance(each, RunConfig) and each.has_trained for each in callbacks)
            if self.run is not None and is_first_process() and not has_trained:
                runs.give_back(self.run)
            raise

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands and the arguments of each method that are no options."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "test": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
            "traverse": {"model", "datamodule"},
            "report": {"model", "datamodule"},
        }

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser whose ``--config`` knows presets."""
        parser = self.parser_class(**kwargs)
        parser.add_argument(*("-c", "--config"), action=ConfigFile, help="A preset (see `cflow --help`) or a file.")
        return parser

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Make the parsers; their usage would fill a page with the names of all options."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        for command, parser in self._subcommand_parsers.items():
            words = "RUN [RUN …]" if command == "report" else "[--config PRESET|FILE]"
            parser.usage = f"cflow {command} {words} [--NAME VALUE …]"

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the model and the data first: they are what the help begins with."""
        parser.add_lightning_class_args(self._model_class, "model")
        parser.add_lightning_class_args(self.data_class, "data")
        for theirs, its in self.linked.items():
            parser.link_arguments(f"data.{theirs}", f"model.{its}", apply_on="instantiate")
        parser.add_lightning_class_args(self.trainer_class, "trainer")

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
                "trainer.default_root_dir": DEFAULT_ROOT,
                "trainer.enable_model_summary": False,
                "trainer.num_sanity_val_steps": 0,
                "trainer.check_val_every_n_epoch": None,
                "trainer.use_distributed_sampler": False,  # the data module gives every process its part
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Make presets, and what the checkpoint stores, defaults; then parse what the user wrote."""
        words = with_signs([str(word) for word in args] if isinstance(args, list) else [])
        command, wanted = words[0], cast(Parser, self._subcommand_parsers[words[0]])
        names = [*given(words, "--config"), *given(words, "-c")]
        checkpoint, weights = last(words, "--ckpt_path"), last(words, "--pretrained")
        if command == "fit" and not names and checkpoint is None:
            names = [presets.DEFAULT]
        for preset in filter(presets.is_preset, names):
            for file in presets.layers(preset):
                wanted.set_defaults(read_config(file, wanted.options()))
        self.config_name = name = Path(names[-1]).stem if names else None
        if checkpoint is not None:
            root = Path(last(words, "--trainer.default_root_dir") or DEFAULT_ROOT)
            prefer: Kind = "last" if command == "fit" else "best"
            file = runs.named_checkpoint(checkpoint, root, last(words, "--run_name") or name, prefer=prefer)
            checkpoint, known = str(file), set(wanted.options()) - ({"run_name"} if name else set())
            wanted.set_defaults({key: value for key, value in runs.stored_options(file).items() if key in known})
        elif weights is not None:
            folder, known = runs.named_weights(weights), set(wanted.options())
            wanted.set_defaults({key: value for key, value in runs.weights_options(folder).items() if key in known})
        elif command != "fit" and not any(word.startswith(("--print_config", "--help", "-h")) for word in words):
            if command == "report":
                raise ArgumentError("`cflow report` needs a run, or several: `cflow report runs/digits`, or `last`.")
            raise ArgumentError(
                f"`cflow {command}` needs --ckpt_path: a checkpoint, a run's folder, or `last`; or --pretrained."
            )
        if checkpoint is not None and weights is not None:
            raise ArgumentError("--ckpt_path and --pretrained: give one of them, the other names another model.")
        self.config = parser.parse_args(words)
        if checkpoint is not None:
            self.config[command]["ckpt_path"] = checkpoint
        check_seed_and_name(self.config[command])

    def _parse_ckpt_path(self) -> None:
        """Leave the parsed values alone: Lightning would put the checkpoint's over the user's, in silence."""

    def instantiate_classes(self) -> None:
        """Make data, model and trainer of the options.

        Raises:
            ArgumentError: of what cannot be: a layer that no memory holds, say.
        """
        try:
            super().instantiate_classes()  # type: ignore[no-untyped-call]
        except (MemoryError, OverflowError, RuntimeError, TypeError) as error:
            # of a size beyond 2⁶³ PyTorch says that a type is wrong; every other TypeError is a mistake of ours
            if isinstance(error, CflowError) or (isinstance(error, TypeError) and "Overflow" not in str(error)):
                raise
            said = " ".join(str(error).split()) or type(error).__name__
            raise ArgumentError(f"nothing can be made of these options: {said:.200}") from error

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
        plugins = section["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeFiles()]
        bar = progress.FitProgress()
        if section["enable_progress_bar"] is not False:
            self.trainer_defaults["callbacks"] = [bar]
        if self.subcommand != "fit" or section["fast_dev_run"]:
            kwargs.setdefault("logger", False)
            self.save_config_callback = None
            return self._make_trainer(**kwargs)
        self._check_resume(section)
        self.datamodule.prepare_data()
        root, name = Path(section["default_root_dir"]), self._get(self.config, "run_name") or self.config_name or "run"
        self.config[self.subcommand]["run_name"] = name  # for config.yaml and the checkpoints
        # Other processes of the same fit get the folder of the first one, by broadcast.
        self.run = runs.claim_run(root, name) if is_first_process() else root / name / "version_0"
        self.save_config_kwargs = {"folder": self.run}
        bar.where = results.short(self.run)
        if section["logger"] in (None, True):
            kwargs["logger"] = TensorBoardLogger(root, name=name, version=self.run.name)
        if section["enable_checkpointing"] is not False:
            callbacks = self.trainer_defaults.setdefault("callbacks", [])
            callbacks += checkpoint_callbacks(self.run / "checkpoints", self.monitor)
        return self._make_trainer(**kwargs)

    def _make_trainer(self, **kwargs: Any) -> Trainer:
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
            if isinstance(error, CflowError):
                raise
            raise ArgumentError(f"--trainer: {str(error).splitlines()[0]}") from None

    def _check_resume(self, section: Namespace) -> None:
        """Refuse a fit that has nothing to do: it would end at once, in silence."""
        path = self._get(self.config, "ckpt_path")
        if section["max_steps"] == 0:
            raise ArgumentError("--trainer.max_steps=0: give at least one step, or -1 for no limit.")
        if path and section["max_steps"] >= 0:
            steps = runs.read_fit(Path(path)).get("global_step", 0)
            if steps >= section["max_steps"]:
                raise ArgumentError(
                    f"--trainer.max_steps={section['max_steps']}: the checkpoint is at step {steps} already; "
                    "give a larger number to go on."
                )

    def after_fit(self) -> None:
        """Test the best checkpoint, write the results into the run, and say how long the training took."""
        if self.run is None:
            return
        run = self.trainer.strategy.broadcast(self.run)
        wanted, steps, seconds = progress.wanted_steps(self.trainer), self.trainer.global_step, self.model.seconds
        if wanted and steps < wanted and progress.time_is_up(self.trainer):
            rank_zero_only(print)(
                f"trainer.max_time ended the training after {steps:,} of {wanted:,} steps: what follows is of an "
                f"unfinished model. Go on with: cflow fit --ckpt_path {results.short(run)} --trainer.max_time null"
            )
        if found := find_checkpoint(run):
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=str(found), out_dir=str(run))
        rank_zero_only(print)(progress.last_line(steps, wanted, seconds))


class PopulationCLI(CflowCLI):
    """The same for snapshots of a population."""

    data_class = SnapshotDataModule
    linked = {"dim": "dim", "units": "units"}  # noqa: RUF012
    monitor = "val/wasserstein"

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands and the arguments of each method that are no options."""
        commands = CflowCLI.subcommands()
        return {name: commands[name] for name in ("fit", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a configuration says so that it is known for one of populations."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--kind", type=str, default=presets.POPULATION, help="Of what is trained.")


def check_seed_and_name(options: Namespace) -> None:
    """Check what Lightning and the file system would refuse later, in words of their own.

    Raises:
        ArgumentError: a seed that NumPy does not know; a name that is no name of one folder.
    """
    seed, name = options.get("seed_everything"), options.get("run_name")
    if type(seed) is int and not 0 <= seed < 2**32:
        raise ArgumentError(f"--seed_everything={seed}: expected 0 to {2**32 - 1}")
    if name is not None and (name in ("", "..") or Path(name).name != name or not name.isprintable()):
        raise ArgumentError(
            f"--run_name={name!r}: expected the name of a folder; --trainer.default_root_dir says where"
        )


def of_population(words: Sequence[str]) -> bool:
    """Whether a command line is about a population: by its preset, its configuration, or its checkpoint."""
    names, checkpoint = [*given(words, "--config"), *given(words, "-c")], last(words, "--ckpt_path")
    if names:
        if presets.is_preset(names[-1]):
            return names[-1] == presets.POPULATION
        return presets.kind_of(presets.config_file(names[-1])) == presets.POPULATION
    if checkpoint is None:
        return False
    root = Path(last(words, "--trainer.default_root_dir") or DEFAULT_ROOT)
    file = runs.named_checkpoint(checkpoint, root, last(words, "--run_name"), prefer="last")
    return bool(runs.read_fit(file)[runs.CONFIG_KEY].get("kind") == presets.POPULATION)


def given(words: Sequence[str], option: str) -> list[str]:
    """Return the values that an option has on the command line, written `--name value` or `--name=value`.

    Example:
        >>> given(["fit", "--config=digits", "--config", "mine.yaml"], "--config")
        ['digits', 'mine.yaml']
    """
    values = [(i, value) for i, (name, value) in enumerate(pairwise(words)) if name == option]
    values += [(i, word.split("=", 1)[1]) for i, word in enumerate(words) if word.startswith(f"{option}=")]
    return [value for _, value in sorted(values)]


def with_signs(words: Sequence[str]) -> list[str]:
    """Return a command line in which a list of numbers that begins with a minus is no option.

    Example:
        >>> with_signs(["traverse", "--weights", "-1,0.5,0"])
        ['traverse', '--weights=-1,0.5,0']
    """
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in ("--weights", "--schedule", "--times") and re.match(r"-[\d.]", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def last(words: Sequence[str], option: str) -> str | None:
    """Return the value of an option that counts."""
    return next(reversed(given(words, option)), None)


def is_first_process() -> bool:
    """Whether this is the process of a fit that writes and speaks."""
    return getattr(rank_zero_only, "rank", 0) in (0, None)


def run(words: Sequence[str], module: type[FlowVAEModule] = FlowVAEModule) -> None:
    """Run a command: `fit`, `test`, `traverse` or `report` with its options.

    Arguments:
        words: the command line after ``cflow``.
        module: what trains; a subclass of your own may train otherwise.
    """
    _quieten()
    Parser.everything = "--help_all" in words
    if words[0] != "report":
        _cli(words, module)
        return
    trainers = [_cli(each, module).trainer for each in one_by_one(words)]
    chapters = [trainer.chapter for trainer in trainers if trainer.chapter is not None]
    if chapters and trainers[0].is_global_zero:
        folder = Path(os.path.commonpath([trainer.folder.resolve() for trainer in trainers]))
        results.say_where([write_report(folder / REPORT, chapters)])


def one_by_one(words: Sequence[str]) -> list[list[str]]:
    """Return the command lines of the single runs of ``report RUN [RUN …] [options]``.

    Raises:
        ArgumentError: runs behind the options.

    Example:
        >>> one_by_one(["report", "runs/a", "digits", "--seed_everything", "0"])[1]
        ['report', '--pretrained', 'digits', '--seed_everything', '0']
        >>> one_by_one(["report", "--ckpt_path", "last"])
        [['report', '--ckpt_path', 'last']]
    """
    command, *others = words
    first = next((i for i, word in enumerate(others) if word.startswith("-")), len(others))
    named, options = others[:first], others[first:]
    if not named and len(options) > 2 and not options[-1].startswith("-") and not options[-2].startswith("-"):
        raise ArgumentError(
            f"`cflow report`: runs come first, options behind them: cflow report {options[-1]} {' '.join(options[:-1])}"
        )
    sources = [("--ckpt_path" if pretrained_folder(each) is None else "--pretrained", each) for each in named]
    return [[command, *source, *options] for source in sources] or [[command, *options]]


def _cli(words: Sequence[str], module: type[FlowVAEModule]) -> CflowCLI:
    """Run one command line."""
    population = of_population(words)
    if population and words[0] not in PopulationCLI.subcommands():
        raise ArgumentError(f"`cflow {words[0]}` is for images; `cflow test` draws a population.")
    cli: type[CflowCLI] = PopulationCLI if population else CflowCLI
    return cli(
        PopulationModule if population else module,
        cli.data_class,
        trainer_class=PopulationTrainer if population else FlowTrainer,
        save_config_callback=RunConfig,
        seed_everything_default=0,
        parser_class=Parser,
        parser_kwargs={"prog": "cflow", "description": "Potential flows in latent spaces."},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=["--help" if word == "--help_all" else word for word in words],
    )


def _quieten() -> None:
    """Keep the terminal for what the user asked: hide Lightning's tips and its advice on data loaders."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("pytorch_lightning", "lightning_fabric", "torch.utils.tensorboard", "jsonargparse"):
        warnings.filterwarnings("ignore", module=rf"{re.escape(module)}.*")
    threading.excepthook = _of_thread
    torch.set_float32_matmul_precision("high")


def _of_thread(args: threading.ExceptHookArgs) -> None:
    """Say what ended a thread, but for TensorBoard's writer: what it cannot write comes again in the main thread."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(args)
