"""Access to state that mmengine keeps under private names, with a public fallback in case a name does not exist."""

from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope
from mmengine.runner import BaseLoop, Runner


def trains(runner: Runner) -> bool:
    """Whether a runner has begun to train.

    Before that, and in a test, it holds the config of its training loop, or None.
    """
    if hasattr(runner, '_train_loop'):
        return isinstance(runner._train_loop, BaseLoop)
    return isinstance(runner.optim_wrapper, OptimWrapper)  # the optimizer wrapper is built only for training


def resumes(runner: Runner) -> bool:
    """Whether a runner resumes an earlier run."""
    return bool(getattr(runner, '_resume', runner.cfg.get('resume', False)))


def loaded_file(runner: Runner) -> str | None:
    """The checkpoint from which a runner starts or resumes; None if there is none."""
    return getattr(runner, '_load_from', runner.cfg.get('load_from'))


def forget_scopes() -> None:
    """Remove the default scopes that earlier configs have left."""
    getattr(DefaultScope, '_instance_dict', {}).clear()
