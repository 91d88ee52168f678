"""What mmengine keeps under private names, with a plain path where it has none of that name."""

from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope
from mmengine.runner import BaseLoop, Runner


def trains(runner: Runner) -> bool:
    """Whether a runner has begun to train; until then, and in tests, it keeps the config of its loop, or None."""
    if hasattr(runner, '_train_loop'):
        return isinstance(runner._train_loop, BaseLoop)
    return isinstance(runner.optim_wrapper, OptimWrapper)  # built for training alone


def resumes(runner: Runner) -> bool:
    """Whether a runner goes on with an earlier run."""
    return bool(getattr(runner, '_resume', runner.cfg.get('resume', False)))


def loaded_file(runner: Runner) -> str | None:
    """The checkpoint that a runner starts from, or goes on with."""
    return getattr(runner, '_load_from', runner.cfg.get('load_from'))


def forget_scopes() -> None:
    """Let no default scope be left from a config before this one."""
    getattr(DefaultScope, '_instance_dict', {}).clear()
