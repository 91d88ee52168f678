"""Build a stock module, attach a method and freeze the rest, as ``type='mona_mm.PeftBackbone'`` in a config asks."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from mmengine.config import ConfigDict
from torch import nn

from mona_mm.checkpoint.pretrained import initialise_as_stock, load_pretrained, pretrained_file
from mona_mm.errors import ConfigError
from mona_mm.frozen.feature_cache import cache_features as keep_features
from mona_mm.frozen.half_precision import in_float32, keep_frozen
from mona_mm.frozen.rules import Rules, as_rules, freeze
from mona_mm.hosts import find_host, is_host, make_fast, method_modules, taken_out
from mona_mm.methods import Method, build_method
from mona_mm.methods import deploy as put_in_deploy_forms
from mona_mm.methods.auxiliary import expect_auxiliary_losses
from mona_mm.methods.base import start_from_base
from mona_mm.nn import choice
from mona_mm.options import Positive, checked, show
from mona_mm.record import make_record
from mona_mm.registry import METHODS, MODELS
from mona_mm.type_names import look_up, with_names


@MODELS.register_module()
@checked
def PeftBackbone(
    base: dict[str, Any],
    peft: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
    trainable: Rules | None = None,
    fast: bool | Literal['exact', 'static'] = True,
    compile: bool | dict[str, Any] = False,
    frozen_dtype: Literal['bfloat16', 'float16'] | None = None,
    cache_features: Positive | None = None,
    deploy: bool = False,
) -> nn.Module:
    """A stock backbone with a method in its blocks and its other weights frozen.

    The object returned *is* the stock backbone, modified in place: its class and the names of its parameters stay, so
    every published checkpoint loads and the OpenMMLab code sees the class it knows. The parameters of the method have
    ``.peft.`` in their names and always train.

    Args:
        base: the stock backbone's config; a ``Pretrained`` ``init_cfg`` in it may name a file of any known format.
        peft: the method and its options, ``dict(type='Mona', bottleneck=64)``; None inserts nothing. ``sites`` and
            ``blocks`` say where it is: ``blocks='last 6'`` only in the last six blocks, so that nothing before them is
            kept for the backward pass (see :func:`mona_mm.methods.blocks.choose_blocks`). A width may be a dict of
            patterns of blocks, ``bottleneck={'stages.3': 128, 'default': 64}``
            (:func:`mona_mm.methods.blocks.in_each_block`). A list of such dicts, which may each have a ``name``, is
            several methods together, at different sites or in different blocks.
        trainable: which parameters of the base train, a rule or a list of rules of :mod:`mona_mm.frozen.rules`. By
            default none under a method, all without one.
        fast: use the faster forms of the host's modules and of the method, which need less time and memory and compute
            the same within rounding (see :mod:`mona_mm.hosts.fast`). Which of them is fastest is measured at the first
            call for a shape (:mod:`mona_mm.nn.choice`). ``'exact'`` draws the dropout masks of Mona as
            ``torch.nn.functional.dropout`` does, which takes four times as many random numbers. ``'static'`` takes the
            same forms always, without a measurement, for results that are equal bit for bit from one process to the
            next; it holds for the whole process, as ``torch.use_deterministic_algorithms`` does, which has the same
            effect. With False the backbone computes the same as the stock one, bit for bit, and the method uses its
            plain form.
        compile: compile the backbone, but not the model around it, with ``torch.compile``, whose arguments may be given
            as a dict. It compiles at the first call and whenever the size of the images changes, and needs a C++
            compiler on a CPU. Copies of the backbone are not compiled.
        frozen_dtype: ``'bfloat16'`` or ``'float16'`` keeps the frozen weights of linear layers and convolutions in that
            dtype; parameters that train stay in float32 (see :mod:`mona_mm.frozen.half_precision`). Forward and
            backward then run in mixed precision, with or without an AmpOptimWrapper; float16 needs its loss scaling.
        cache_features: the memory in GiB for keeping the features that the frozen part computes for every image from
            one epoch to the next; it needs ``trainable`` ``'fixed'`` or ``'partial_1'`` and a pipeline without
            randomness (see :mod:`mona_mm.frozen.feature_cache`).
        deploy: replace every module of the method by its form for inference (Mona's has its parameters folded
            together). ``tools/delta.py merge`` writes configs with this option, and the weights for them.

    Raises:
        UnsupportedHostError: if the base is not one of :data:`mona_mm.hosts.HOSTS`.
        ConfigError: if the base or method is unknown, this host lacks the sites or blocks of the method, two methods
            are at one site, the method is wider than the blocks, a rule selects nothing, a method's base has
            ``frozen_stages``, ``frozen_dtype`` is given where nothing is frozen, ``cache_features`` where the features
            of an image change or with ``compile``, ``deploy`` with a method that has no form for inference, or the
            ``init_cfg`` of the base is not one.
        UnknownOptionError: if the method does not have an option.
    """
    method = None if peft is None else build_method(peft)
    backbone = build_base(base)
    find_host(backbone)
    pretrained_file(backbone)  # refuses what is no init_cfg, before anything is loaded
    if fast == 'static':
        choice.measure(False)
    if fast:  # before the method, whose classes must come in front of the fast ones
        for module in backbone.modules():
            make_fast(module)
    if method is not None:
        method.attach(backbone)
        expect_auxiliary_losses(backbone)
    if deploy and not put_in_deploy_forms(backbone):
        raise ConfigError(
            f'deploy=True: {"a backbone without method" if method is None else method.name} has no form for inference '
            '(Mona has one). Leave deploy out.'
        )
    if fast is not True:
        for module in method_modules(backbone):
            module.fast = fast
    make_record(backbone).config = _plain_config(peft)  # a delta records it, to name the method that it belongs to
    if trainable is None:
        trainable = 'all' if method is None else 'none'
    freeze(backbone, (*as_rules(trainable), *(method.trainable if method else ())))
    # A bound method would be pickled by its name, and would become the host's own when it is loaded.
    backbone.init_weights = partial(init_weights, backbone, method)
    if cache_features is not None:
        if compile:
            raise ConfigError(
                'cache_features and compile exclude each other, since a compiled backbone does not look features up. '
                'Leave one of them out.'
            )
        keep_features(backbone, cache_features)
    if frozen_dtype is not None:  # last, so that its autocast covers everything else
        keep_frozen(backbone, frozen_dtype)
    if compile:
        try:
            backbone.compile(**(compile if isinstance(compile, dict) else {}))
        except Exception as error:  # torch and its backends raise errors of any class
            raise ConfigError(f'compile={show(compile)}: torch.compile refuses these arguments ({error}).') from error
    return backbone


@MODELS.register_module()
@checked
def FrozenModel(base: dict[str, Any], trainable: Rules) -> nn.Module:
    """Any module of a config (a neck, a head, a ResNet, a whole detector) of which only ``trainable`` trains.

    Freezing happens here, before a Runner wraps the model for distributed training. A BatchNorm without trainable
    parameters also keeps its statistics.

    Args:
        base: the module's own config.
        trainable: a rule or a list of rules of :mod:`mona_mm.frozen.rules`.

    Raises:
        ConfigError: if the base is unknown, or a rule selects nothing.
        CheckpointMismatchError: by ``init_weights``, if a ``Pretrained`` ``init_cfg`` lacks a frozen tensor.
    """
    module = build_base(base)
    freeze(module, trainable)
    load_hosts_strictly(module)
    return module


def load_hosts_strictly(module: nn.Module) -> None:
    """Make the hosts in a module load their pretrained files by :func:`load_pretrained`, in place.

    It refuses tensors that do not fit, which the loading of some hosts silently skips.
    """
    for backbone in module.modules():
        if is_host(backbone) and pretrained_file(backbone) and 'init_weights' not in vars(backbone):
            backbone.init_weights = partial(init_weights, backbone)


def _plain_config(peft: Any) -> dict[str, Any] | list[dict[str, Any]] | None:
    """The config of methods in a form that JSON can hold: registered names, dicts, lists, strings and numbers."""
    if isinstance(peft, list | tuple):
        return [_plain_config(each) for each in peft]
    return None if peft is None else {**with_names(peft), 'type': look_up(METHODS, peft['type']).__name__}


def build_base(base: dict[str, Any]) -> nn.Module:
    """Build the stock module of a config.

    Raises:
        ConfigError: if there is no module of its ``type``.
    """
    if 'type' not in base:
        raise ConfigError(f'base={show(base)} must be the config of a stock module, a dict with a `type`.')
    with MODELS.switch_scope_and_registry(None) as registry:  # the running config's default scope
        if not callable(look_up(registry, base['type'])):
            raise ConfigError(
                f'base: there is no module {show(base["type"])}. Give the type of a stock config, with the scope of '
                "its library if the config has another: 'mmdet.SwinTransformer', 'mmpretrain.VisionTransformer'."
            )
    return MODELS.build(ConfigDict(base))


def init_weights(self: nn.Module, method: Method | None = None) -> None:
    """``init_weights`` of a :func:`PeftBackbone`: load or initialise the base, then initialise the method.

    The file of a ``Pretrained`` ``init_cfg`` is loaded by :func:`load_pretrained`, which checks that it fits, whatever
    library the host is from. Without a file the base gets the values that the stock backbone would get from the same
    random numbers.
    """
    pretrained = pretrained_file(self)
    with in_float32(self):
        if pretrained is not None:
            load_pretrained(self, **pretrained)
        else:
            with taken_out(self.modules()):
                initialise_as_stock(self)
        if method is not None:
            method.check_base(self)
    for module in method_modules(self):
        module.reset_parameters()
    start_from_base(self)
