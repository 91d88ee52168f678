"""No checkpoint is loaded in part without a word."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import Tensor, nn

from mona_mm.checkpoint.convert import backbone_tensors, recognise
from mona_mm.checkpoint.loading import check_loading, is_delta
from mona_mm.checkpoint.pretrained import misfit
from mona_mm.checkpoint.rehearsal import model_state, rehearse
from mona_mm.compat.runner import loaded_file, resumes, trains
from mona_mm.errors import CheckpointMismatchError
from mona_mm.hosts import method_names
from mona_mm.nn.wrappers import innermost
from mona_mm.options import checked
from mona_mm.registry import HOOKS


@HOOKS.register_module()
class LoadCheckHook(Hook):
    """Refuse a whole-model checkpoint that the Runner, which loads with ``strict=False``, would load in part.

    What fits is what mmengine and the model's own hooks make fit: names that begin with ``module.``, a model behind a
    wrapper (distributed training, test-time augmentation), tables of positions of another image or window size where
    the host resizes them. ``load_from`` of a stock model into one with a method may lack the method's parameters. For
    testing and resuming, everything must be there. (Deltas are checked when they are put into the model.)

    Args:
        other_classes: whether what ``load_from`` names may have been trained for another number of classes. Then the
            tensors outside the backbone that differ in their first length alone, the last layers of the heads, are
            left as they are initialised, and named in the log.

    Raises:
        CheckpointMismatchError: when the Runner loads, before anything of the model changes; it names the first keys
            that do not fit.
    """

    priority = 'VERY_HIGH'  # before EMAHook, which loads into its copy of the model

    @checked
    def __init__(self, other_classes: bool = False) -> None:
        self.other_classes = other_classes

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Called by the Runner between reading a checkpoint and loading it into the model: check what it will load."""
        held = {*checkpoint, *(checkpoint.get('meta') or {})}
        absent = [name for name in ('epoch', 'iter', 'message_hub') if name not in held]
        if resumes(runner) and absent:
            raise CheckpointMismatchError(
                f'{loaded_file(runner)} holds no state of a run ({", ".join(absent)}), so there is nothing to resume: '
                f'start a new run from its weights with load_from={loaded_file(runner)} and without resume.'
            )
        if not is_delta(checkpoint.get('state_dict', checkpoint)):
            check_loading(checkpoint, partial(self._check, runner))

    def _check(
        self, runner: Runner, module: nn.Module, state_dict: Mapping[str, Tensor], strict: bool
    ) -> tuple[Mapping[str, Tensor], bool]:
        loaded_into, model, module = module, innermost(runner.model), innermost(module)
        if type(module) is not type(model):
            return state_dict, strict
        if module is not model:
            # An EMAHook's copy may lack what the model itself may; the hook leaves names as they are.
            state_dict, strict = model_state(dict(state_dict=state_dict)), False
        fine_tuning = trains(runner) and not resumes(runner)
        found = rehearse(loaded_into, state_dict)
        optional = method_names(module) if fine_tuning and not strict else set()
        if fine_tuning and self.other_classes:
            anew = _class_layers(module.state_dict(), state_dict) & found.reshaped.keys()
            if anew:
                metadata = getattr(state_dict, '_metadata', OrderedDict())
                state_dict = OrderedDict((name, t) for name, t in state_dict.items() if name not in anew)
                state_dict._metadata = metadata
                found = replace(found, reshaped={n: s for n, s in found.reshaped.items() if n not in anew}, problem='')
            if anew and module is model:
                print_log(
                    f'{loaded_file(runner)} is of another number of classes. These begin anew: '
                    f'{", ".join(sorted(anew))}',
                    logger='current',
                )
        wrong = misfit(found, optional.__contains__)
        if wrong:
            raise CheckpointMismatchError(
                f'{loaded_file(runner)} does not fit this {type(module).__name__}: {wrong} '
                f'{_advice(state_dict, fine_tuning)}'
            )
        return state_dict, False  # what is strict has been checked, but for what the host computes by itself


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
