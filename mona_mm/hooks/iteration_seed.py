"""Make random numbers depend only on the iteration, so that a resumed run repeats an uninterrupted one."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, Runner, set_random_seed

from mona_mm.options import checked
from mona_mm.registry import HOOKS


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seed torch, numpy and ``random`` from (run's seed, rank, iteration) before every fetch and every model step.

    mmengine's checkpoints hold the seed but no random state. With this hook none is needed: dropout, DropPath,
    sampling in the heads, and the augmentation of a loader without worker processes are functions of the iteration,
    and so equal after ``--resume``. A loader's worker processes keep random states of their own, which mmengine
    restarts with the workers; the order of the data does not depend on them.
    """

    priority = 'VERY_HIGH'

    @checked
    def __init__(self) -> None:
        """The hook has no options."""

    def before_train(self, runner: Runner) -> None:
        """Let an iteration-based loop seed before each fetch, including those that resuming skips."""
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = _SeededIterator(loop.dataloader_iterator, runner.seed)

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed before the first fetch of an epoch."""
        seed(runner.seed, runner.iter, _FETCH)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed before the model step."""
        seed(runner.seed, runner.iter, _STEP)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Seed before the next fetch."""
        seed(runner.seed, runner.iter + 1, _FETCH)


_FETCH, _STEP = 0, 1


def seed(run_seed: int, iteration: int, purpose: int) -> None:
    """Seed every random number generator of this process with a hash of the arguments and the rank."""
    sequence = np.random.SeedSequence([run_seed, get_rank(), iteration, purpose])
    set_random_seed(int(sequence.generate_state(1)[0]))


class _SeededIterator:
    """An iterator over batches that seeds with the number of each batch before fetching it."""

    def __init__(self, batches: Iterator, run_seed: int) -> None:
        self._batches = batches
        self._seed = run_seed
        self._fetched = 0

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        seed(self._seed, self._fetched, _FETCH)
        self._fetched += 1
        return next(self._batches)

    def skip_iter(self, count: int) -> None:
        """Skip ``count`` batches without loading them, as the loop of a fork of mmengine does when it resumes."""
        self._batches.skip_iter(count)
        self._fetched += count
