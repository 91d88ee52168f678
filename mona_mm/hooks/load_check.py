"""No checkpoint is loaded in part without a word."""

from collections.abc import Mapping

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner
from torch import Tensor

from mona_mm.checkpoint.convert import backbone_tensors
from mona_mm.checkpoint.formats import recognise
from mona_mm.checkpoint.loading import is_delta
from mona_mm.checkpoint.pretrained import compare
from mona_mm.errors import CheckpointMismatchError
from mona_mm.options import checked
from mona_mm.registry import HOOKS
from mona_mm.sites import method_names


@HOOKS.register_module()
class LoadCheckHook(Hook):
    """Compare a whole-model checkpoint with the model before the Runner loads it, which it does with ``strict=False``.

    ``load_from`` of a stock model into one with a method may lack the method's parameters. For testing and resuming,
    everything must be there. (Deltas are checked when they are put into the model.)

    Args:
        other_classes: whether what ``load_from`` names may have been trained for another number of classes. Then the
            tensors outside the backbone that differ in their first length alone, the last layers of the heads, are
            left as they are initialised, and named in the log.

    Raises:
        CheckpointMismatchError: in ``after_load_checkpoint``; it names the first keys that do not fit.
    """

    priority = 'VERY_LOW'  # after EMAHook has put the weights to evaluate in their place

    @checked
    def __init__(self, other_classes: bool = False) -> None:
        self.other_classes = other_classes

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Called by the Runner between reading a checkpoint and loading it into the model."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        given = checkpoint.get('state_dict', checkpoint)
        if is_delta(given):
            return
        # The Runner keeps the loop's config until it trains.
        fine_tuning = isinstance(runner._train_loop, BaseLoop) and not runner._resume
        optional = method_names(model) if fine_tuning else set()
        if fine_tuning and self.other_classes:
            anew = _class_layers(model.state_dict(), given)
            for name in anew:
                del given[name]
            optional |= anew
            if anew:
                print_log(
                    f'{runner._load_from} is of another number of classes. These begin anew: {", ".join(sorted(anew))}',
                    logger='current',
                )
        wrong = compare(model.state_dict(), given, optional=optional.__contains__)
        if wrong:
            raise CheckpointMismatchError(
                f'{runner._load_from} does not fit this {type(model).__name__}: {wrong} {_advice(given, fine_tuning)}'
            )


def _class_layers(current: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> set[str]:
    return {
        name
        for name, tensor in current.items()
        if name in given
        and not name.startswith('backbone.')
        and tensor.dim() > 0
        and tensor.shape != given[name].shape
        and tensor.shape[1:] == given[name].shape[1:]
    }


def _advice(given: Mapping[str, Tensor], fine_tuning: bool) -> str:
    form = recognise(backbone_tensors(given))
    if form not in ('mm', None):
        return (
            f"Its names are another library's ({form}): python tools/convert_checkpoint.py FILE OUT converts them. The "
            'weights of a backbone alone belong in its init_cfg.'
        )
    advice = 'It was made by another config, or for another number of classes. '
    if fine_tuning:
        advice += 'To start from a model for other classes: tools/train.py --fine-tune FILE. '
    return advice + 'To load what fits all the same, take mona_mm.LoadCheckHook out of custom_hooks.'
