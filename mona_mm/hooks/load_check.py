"""Refuse checkpoints that would silently be loaded only in part."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import STRATEGIES
from mmengine.runner import Runner
from torch import Tensor, nn

from mona_mm.checkpoint.convert import backbone_tensors, recognise
from mona_mm.checkpoint.loading import check_loading, is_delta
from mona_mm.checkpoint.pretrained import misfit
from mona_mm.checkpoint.rehearsal import model_state, rehearse
from mona_mm.compat.runner import loaded_file, resumes, trains
from mona_mm.errors import CheckpointMismatchError, ConfigError
from mona_mm.hosts import method_names
from mona_mm.nn.wrappers import innermost
from mona_mm.options import checked
from mona_mm.registry import HOOKS


@HOOKS.register_module()
class LoadCheckHook(Hook):
    """Refuse a whole-model checkpoint that the Runner, which loads with ``strict=False``, would load only in part.

    A checkpoint fits if mmengine and the model's own hooks can load all of it: names may begin with ``module.``, the
    model may be in a wrapper (distributed training, test-time augmentation), and position tables may have another image
    or window size if the host resizes them. A stock model in ``load_from`` may lack the method's parameters. For
    testing and resuming, everything must be present. (Deltas are checked when they are loaded into the model.)

    Args:
        other_classes: whether the checkpoint of ``load_from`` may have been trained for another number of classes. The
            tensors outside the backbone that differ only in their first dimension, those of the last layers of the
            heads, then keep their initial values and are named in the log.

    Raises:
        ConfigError: if a delta is loaded by mmengine's own ``FSDPStrategy``.
        CheckpointMismatchError: when the Runner loads, before the model changes; it names the first tensors that do not
            fit.
    """

    priority = 'VERY_HIGH'  # before EMAHook, which loads into its copy of the model

    @checked
    def __init__(self, other_classes: bool = False) -> None:
        self.other_classes = other_classes

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check a checkpoint that the Runner has read and will load into the model."""
        keys = {*checkpoint, *(checkpoint.get('meta') or {})}
        absent = [name for name in ('epoch', 'iter', 'message_hub') if name not in keys]
        if resumes(runner) and absent:
            raise CheckpointMismatchError(
                f'{loaded_file(runner)} holds no state of a run ({", ".join(absent)}), so it cannot be resumed. Start '
                f'a new run from its weights with load_from={loaded_file(runner)} and without resume.'
            )
        if not is_delta(checkpoint.get('state_dict', checkpoint)):
            check_loading(checkpoint, partial(self._check, runner))
        elif isinstance(getattr(runner, 'strategy', None), STRATEGIES.get('FSDPStrategy')):
            raise ConfigError(
                f"{loaded_file(runner)}: mmengine's FSDPStrategy would skip most of a delta without a word. Name "
                "strategy=dict(type='mona_mm.FSDPStrategy'), or use tools/train.py --strategy fsdp."
            )

    def _check(
        self, runner: Runner, module: nn.Module, state_dict: Mapping[str, Tensor], strict: bool
    ) -> tuple[Mapping[str, Tensor], bool]:
        loaded_into, model, module = module, innermost(runner.model), innermost(module)
        if type(module) is not type(model):
            return state_dict, strict
        if module is not model:
            # The copy of an EMAHook, which does not change names and may lack the same tensors as the model.
            state_dict, strict = model_state(dict(state_dict=state_dict)), False
        fine_tuning = trains(runner) and not resumes(runner)
        found = rehearse(loaded_into, state_dict)
        optional = method_names(module) if fine_tuning and not strict else set()
        if fine_tuning and self.other_classes:
            skipped = _class_layers(module.state_dict(), state_dict) & found.reshaped.keys()
            if skipped:
                metadata = getattr(state_dict, '_metadata', OrderedDict())
                state_dict = OrderedDict((name, t) for name, t in state_dict.items() if name not in skipped)
                state_dict._metadata = metadata
                reshaped = {name: shapes for name, shapes in found.reshaped.items() if name not in skipped}
                found = replace(found, reshaped=reshaped, problem='')
            if skipped and module is model:
                print_log(
                    f'{loaded_file(runner)} has another number of classes. These tensors keep their initial values: '
                    f'{", ".join(sorted(skipped))}',
                    logger='current',
                )
        wrong = misfit(found, optional.__contains__)
        if wrong:
            raise CheckpointMismatchError(
                f'{loaded_file(runner)} does not fit this {type(module).__name__}: {wrong} '
                f'{_advice(state_dict, fine_tuning)}'
            )
        return state_dict, False  # a strict load has been checked above, except for tensors that the host computes


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
            f'Its names are those of another library ({form}); python tools/convert_checkpoint.py FILE OUT converts '
            'them. The weights of a backbone alone belong in its init_cfg.'
        )
    advice = 'It was made with another config, or for another number of classes. '
    if fine_tuning:
        advice += 'To start from a model for other classes, use tools/train.py --fine-tune FILE. '
    return advice + 'To load only what fits, remove mona_mm.LoadCheckHook from custom_hooks.'
