"""No checkpoint is loaded in part without a word."""

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner

from mona_mm.checkpoint.loading import is_delta
from mona_mm.checkpoint.pretrained import compare
from mona_mm.errors import CheckpointMismatchError
from mona_mm.registry import HOOKS
from mona_mm.sites import method_names


@HOOKS.register_module()
class LoadCheckHook(Hook):
    """Compare a whole-model checkpoint with the model before the Runner loads it, which it does with ``strict=False``.

    ``load_from`` of a stock model into one with a method may lack the method's parameters. For testing and resuming,
    everything must be there.

    Raises:
        CheckpointMismatchError: in ``after_load_checkpoint``; it names the first keys that do not fit.
    """

    priority = 'VERY_LOW'  # after EMAHook has put the weights to evaluate in their place

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Called by the Runner between reading a checkpoint and loading it into the model."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        given = checkpoint.get('state_dict', checkpoint)
        if is_delta(given):
            return  # checked when it is put into the model
        # The Runner keeps the loop's config until it trains.
        fine_tuning = isinstance(runner._train_loop, BaseLoop) and not runner._resume
        method = method_names(model) if fine_tuning else set()
        wrong = compare(model.state_dict(), given, optional=method.__contains__)
        if wrong:
            raise CheckpointMismatchError(
                f'{runner._load_from} does not fit this {type(model).__name__}: {wrong} '
                'It was made by another config, or for another number of classes. To load what fits all the same, take '
                'mona_mm.LoadCheckHook out of custom_hooks.'
            )
