"""Arguments, work dirs, runners and error messages of the command lines in ``tools/``."""

import argparse
import logging
import os
import os.path as osp
import re
import select
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from mmengine.config import Config, DictAction
from mmengine.dist import init_dist, is_main_process
from mmengine.registry import MODELS, RUNNERS
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing

from mona_mm.checkpoint.delta import expect_delta
from mona_mm.compat.terminal import short_terminal
from mona_mm.config.check import check_config
from mona_mm.config.load import adapt_to_device, default_work_dir, has_accelerator, load_config
from mona_mm.config.run_hooks import add_hooks
from mona_mm.config.watching import apply_watching
from mona_mm.data_check.report import DataReport
from mona_mm.errors import ConfigError, UserError
from mona_mm.reliability.failures import in_one_line

_SPACE = '\x1f'  # stands for a space, since mmengine's parser removes spaces
_LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


class _Settings(DictAction):
    """mmengine's ``DictAction``, which keeps the spaces within paths and class names, where mmengine removes them."""

    @staticmethod
    def _parse_iterable(val: str) -> Any:
        tight = re.sub(r'\s*,\s*|(?<=[\[(])\s+|\s+(?=[\])])', lambda found: found[0].strip(), val.strip())
        return _with_spaces(DictAction._parse_iterable(tight.replace(' ', _SPACE)))


def _with_spaces(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_with_spaces(item) for item in value)
    return value.replace(_SPACE, ' ') if isinstance(value, str) else value


def run_parser(description: str) -> argparse.ArgumentParser:
    """Make an argument parser with the options that training and testing share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--work-dir', help='folder for logs and checkpoints (default: ./work_dirs/<config name>[/<task>])'
    )
    add_cfg_options(parser)
    parser.add_argument(
        '--allow-other-base',
        action='store_true',
        help='load a delta although the frozen base is not the one on which it was trained',
    )
    parser.add_argument(
        '--traceback', action='store_true', help='show where in the code an error arose; every command takes it'
    )
    parser.add_argument('--launcher', choices=_LAUNCHERS, default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options`` and ``--data`` to a command that reads a config."""
    parser.add_argument(
        '--data',
        metavar='DIR',
        help='a folder of your own images and annotations, whose layout, splits and classes are found: COCO, '
        'VOC, YOLO, '
        'LabelMe, label maps, a folder per class',
    )
    add_data_options(parser)
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_Settings,
        metavar='KEY=VALUE',
        help='settings that replace those of the config, e.g. data_root=data/mine train_dataloader.batch_size=4',
    )


def add_data_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add ``--data-options`` to a command."""
    parser.add_argument(
        '--data-options',
        nargs='+',
        action=_Settings,
        metavar='KEY=VALUE',
        help='how to read --data: val=0.2 and test=0 (shares of the images, where the folder has no such '
        'split), seed=0, '
        'layout=NAME, skip=True (leave out images that cannot be read)',
    )


def data_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """What ``--data`` and ``--data-options`` say, for :func:`mona_mm.config.load.load_config`."""
    said = {**({} if args.data is None else dict(folder=args.data)), **(args.data_options or {})}
    return said or None


def new_file(path: str) -> str:
    """The type of an argument that names a file of weights to write, which must not exist.

    Raises:
        UserError: if it exists.
    """
    if osp.exists(path):
        raise UserError(f'{path} already exists and is not overwritten. Name another file, or remove that one.')
    return path


def read_run_config(args: argparse.Namespace) -> Config:
    """Read the config that the arguments of :func:`run_parser` name, check it, and adapt it to this machine.

    Raises:
        ConfigError: if the config has mistakes; it names all that can be found before anything is built.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = load_config(args.config, args.cfg_options, data_of(args), args.work_dir)
    cfg.launcher = args.launcher
    cfg.work_dir = default_work_dir(cfg, args.config) if args.work_dir is None else args.work_dir
    if getattr(args, 'amp', False):
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    check_config(cfg, args.cfg_options or ())
    adapt_to_device(cfg)
    apply_watching(cfg, args)
    add_hooks(cfg)
    return cfg


def show_report(report: DataReport, cfg: Config) -> None:
    """Print what the data of a run hold, and write all of it and a picture into the work dir, in the main process."""
    if is_main_process():
        print(*report.lines(report.write(cfg.work_dir)), sep='\n', flush=True)


def join_process_group(cfg: Config) -> None:
    """Join the process group of the config's launcher, in a command that does not build a Runner."""
    _join_gloo(cfg)
    if cfg.get('launcher', 'none') != 'none' and not torch.distributed.is_initialized():
        env_cfg = cfg.get('env_cfg', {})
        set_multi_processing(**env_cfg.get('mp_cfg', {}), distributed=True)  # first, as in mmengine's runner
        init_dist(cfg.launcher, **env_cfg.get('dist_cfg', {}))


def build_runner(cfg: Config, delta_base: str | None = None, allow_other_base: bool = False) -> Runner:
    """Build the Runner of a config. On a CPU with a launcher, join the process group first, which mmengine cannot.

    Args:
        cfg: the config.
        delta_base: the checkpoint of the whole model to use as base of deltas, in place of the one that they name.
        allow_other_base: whether deltas may be loaded on another base than their own.
    """
    _join_gloo(cfg)
    with short_terminal():
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
        if isinstance(runner.model, dict):  # a FlexibleRunner would build it when it trains
            runner.model = MODELS.build(runner.model)
    runner.logger.info(f'The environment, the config and all that follows are in {_log_file(runner)}')
    expect_delta(runner.model, delta_base, allow_other_base)
    return runner


# For every launcher, the variables in which it tells a process its rank, the number of processes and its local rank.
_VARIABLES = dict(
    slurm=('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    mpi=('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
)


def use_temporary(cfg: Config, folder: str) -> None:
    """Set a config to leave everything in a folder that will be removed.

    mmengine keeps visualizers by name, and with them the folder of the first runner that asked for the name: a name of
    its own lets the next runner of this process have another.
    """
    cfg.work_dir, cfg.experiment_name = folder, osp.basename(folder)
    cfg.pop('visualizer', None)


def close_log_file(runner: Runner) -> None:
    """Close the log file of a runner whose work dir will be removed."""
    for handler in list(runner.logger.handlers):
        if isinstance(handler, logging.FileHandler):
            handler.close()
            runner.logger.removeHandler(handler)


def _log_file(runner: Runner) -> str:
    return osp.join(runner.work_dir, runner.timestamp, f'{runner.timestamp}.log')


def _join_gloo(cfg: Config) -> None:
    """Join the process group of a launcher on CPUs, where mmengine would first select a CUDA device."""
    launcher = cfg.get('launcher', 'none')
    if launcher == 'none' or has_accelerator() or torch.distributed.is_initialized():
        return
    if launcher != 'pytorch':
        absent = [name for name in _VARIABLES[launcher] if name not in os.environ]
        if absent:
            command = dict(slurm='srun', mpi='mpirun')[launcher]
            raise ConfigError(
                f'--launcher {launcher}: the environment lacks {absent[0]}. Start the processes with {command}.'
            )
        for name, given in zip(('RANK', 'WORLD_SIZE', 'LOCAL_RANK'), _VARIABLES[launcher], strict=True):
            os.environ[name] = os.environ[given]
    for name, default in (('MASTER_ADDR', '127.0.0.1'), ('MASTER_PORT', '29500')):
        os.environ.setdefault(name, default)
    absent = [name for name in ('RANK', 'WORLD_SIZE') if name not in os.environ]
    if absent:
        raise ConfigError(
            f'--launcher pytorch: the environment lacks {absent[0]}. Start the processes with torchrun, or with '
            'tools/dist_train.sh.'
        )
    torch.distributed.init_process_group('gloo')


def run(main: Callable[[], None]) -> None:
    """Run a command. Errors that the user can fix are printed as one line without a traceback, with exit status 2.

    Those are also the errors of the system: files, disks, connections, memory. ``--traceback``, which every command
    takes, shows them whole. If the reader of its output closes the pipe (``| head``), the command ends silently, with
    exit status 1; if it is interrupted (SIGINT) where nothing has to be saved, with status 130.
    """
    whole = '--traceback' in sys.argv
    if whole:
        sys.argv.remove('--traceback')
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise  # the pipe of a worker process
        # Discard the output that is flushed at exit, as Python's documentation recommends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        if whole:
            raise
        print('error: interrupted', file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError, TypeError) as error:
        # A TypeError is a misspelt argument of a module in a config, or a bug; Python's message names the argument.
        is_bug = isinstance(error, TypeError) and not isinstance(error, UserError)
        if whole or (is_bug and 'unexpected keyword argument' not in str(error)):
            raise
        _fail(error)


def _reader_is_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))


def _fail(error: Exception) -> NoReturn:
    print(f'error: {in_one_line(error)}', file=sys.stderr)
    sys.exit(2)
