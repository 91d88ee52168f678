"""Give the optimizer exactly the parameters that train."""

import logging
from collections import defaultdict

from mmengine.logging import MMLogger
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

from mona_mm.errors import ConfigError
from mona_mm.hosts import find_host, is_host
from mona_mm.options import show
from mona_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mona_mm.spt.sparse import SparseDelta


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class PeftOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor for only the parameters that train, with few parameter groups and without a log line for
    each parameter.

    Without ``paramwise_cfg`` mmengine gives frozen parameters to the optimizer as well; with it, it logs a warning for
    each of them, and makes a group for every parameter. The options of ``paramwise_cfg`` mean what mmengine documents
    and mmcv 1.x does: ``dwconv_decay_mult`` applies to the weights and biases of depthwise convolutions, to which
    ``bias_decay_mult`` then does not apply. (In mmengine's code the latter comes first.) A parameter that modules share
    counts once, under its first name. Single weights (:class:`~mona_mm.spt.sparse.SparseDelta`) have no weight decay,
    which would pull their changes, and not the weights, to zero.

    ``paramwise_cfg`` has one more option, ``layer_decay_rate``: it multiplies the learning rate of a backbone's block
    once more for every later block, as in BEiT (Bao et al., ICLR 2022) and ViTDet; see :func:`layer_scales`. It is for
    pretrained plain ViTs that train as a whole.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        if self.paramwise_cfg and not isinstance(self.paramwise_cfg, dict):
            raise ConfigError(f'paramwise_cfg={show(self.paramwise_cfg)} must be a dict or None.')
        # mmengine calls `add_params`, which leaves out frozen parameters, only if paramwise_cfg is not empty.
        self.paramwise_cfg = {'custom_keys': {}, **(self.paramwise_cfg or {})}
        return super().__call__(model)

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module=None) -> None:
        """Append the parameter groups of ``module`` to ``params``, one for each set of options."""
        if prefix:  # a recursive call from mmengine
            given = self.paramwise_cfg
            if 'dwconv_decay_mult' in given and _is_depthwise(module):
                self.paramwise_cfg = {key: value for key, value in given.items() if key != 'bias_decay_mult'}
            super().add_params(params, module, prefix, is_dcn_module)
            self.paramwise_cfg = given
            return
        separate: list[dict] = []
        logger = MMLogger.get_current_instance()
        logger.addFilter(_not_per_parameter)
        try:
            super().add_params(separate, module)
        finally:
            logger.removeFilter(_not_per_parameter)
        deltas = {id(m.values) for m in module.modules() if isinstance(m, SparseDelta)}
        rate = self.paramwise_cfg.get('layer_decay_rate')
        scales = {} if rate is None else layer_scales(module, rate)
        groups, seen = defaultdict(list), set()
        for group in separate:
            (parameter,) = map(id, group['params'])
            if parameter in seen:
                continue
            seen.add(parameter)
            if parameter in deltas:
                group['weight_decay'] = 0.0
            if scales.get(parameter, 1.0) != 1.0:
                group['lr'] = group.get('lr', self.base_lr) * scales[parameter]
            options = tuple(sorted((key, value) for key, value in group.items() if key != 'params'))
            groups[options] += group['params']
        params += [{'params': members, **dict(options)} for options, members in groups.items()]


def layer_scales(model: nn.Module, rate: float) -> dict[int, float]:
    """The factors of layer-wise learning rate decay, by the ids of the parameters of a model's backbones.

    With L blocks, the factor is ``rate ** (L + 1 - i)`` for the i-th block, i = 1..L, and for what lies between it and
    the next one; ``rate ** (L + 1)`` for what comes before the first block (patch and position embeddings); 1 for what
    comes after the last one. A method's parameters have the factor of their block.

    Raises:
        ConfigError: if the rate is not a number above 0 and of at most 1, or no backbone is a host.
    """
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate <= 1:
        raise ConfigError(f'paramwise_cfg: layer_decay_rate={show(rate)} must be a number above 0 and of at most 1.')
    hosts = [module for module in model.modules() if is_host(module)]
    if not hosts:
        raise ConfigError(
            'paramwise_cfg: layer_decay_rate needs a backbone whose blocks are known, and this model has none '
            '(tools/count_params.py --hosts lists them). Leave it out.'
        )
    scales: dict[int, float] = {}
    for backbone in hosts:
        blocks = list(find_host(backbone).blocks(backbone))
        reached = 0
        for name, parameter in backbone.named_parameters():  # in the order of the modules
            if reached < len(blocks) and name.startswith(f'{blocks[reached]}.'):
                reached += 1
            is_behind = reached == len(blocks) and not name.startswith(f'{blocks[-1]}.')
            scales[id(parameter)] = 1.0 if is_behind else float(rate) ** (len(blocks) + 1 - reached)
    return scales


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.in_channels == module.groups


def _not_per_parameter(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not (message.startswith('paramwise_options') or 'is skipped since its requires_grad' in message)
