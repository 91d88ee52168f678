"""Build a stock module, insert a method, freeze: what ``type='mona_mm.PeftBackbone'`` in a config does."""

from functools import partial
from typing import Any, Literal

from mmengine.config import ConfigDict
from torch import nn

from mona_mm.checkpoint.pretrained import initialise_as_stock, load_pretrained, pretrained_file
from mona_mm.errors import ConfigError
from mona_mm.frozen.feature_cache import cache_features as keep_features
from mona_mm.frozen.half_precision import in_float32, keep_frozen
from mona_mm.frozen.rules import Rules, as_rules, freeze
from mona_mm.hosts import find_host, is_host, make_fast, method_modules
from mona_mm.methods import Method, build_method
from mona_mm.methods import deploy as put_in_deploy_forms
from mona_mm.methods.base import start_from_base
from mona_mm.options import Positive, checked, show
from mona_mm.record import make_record
from mona_mm.registry import METHODS, MODELS
from mona_mm.type_names import look_up, with_names


@MODELS.register_module()
@checked
def PeftBackbone(
    base: dict[str, Any],
    peft: dict[str, Any] | None = None,
    trainable: Rules | None = None,
    fast: bool = True,
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
        peft: the method and its options, ``dict(type='Mona', bottleneck=64)``; None inserts nothing.
        trainable: which parameters of the base train, a rule or a list of rules of :mod:`mona_mm.frozen.rules`. By
            default none under a method, all without one.
        fast: compute the same, within rounding, in less time and memory: see :mod:`mona_mm.hosts`. Without it the
            backbone computes what the stock one does, bit for bit, and a method its plain form.
        compile: give the backbone to ``torch.compile``, whose arguments a dict holds; the detector around it stays as
            it is. It compiles at the first call, again where the size of the images changes, and needs a C++ compiler
            on a CPU. Copies are not compiled.
        frozen_dtype: ``'bfloat16'`` or ``'float16'`` keeps the frozen weights of linear layers and convolutions in that
            type; what trains stays in float32: see :mod:`mona_mm.frozen.half_precision`. Forward and backward are in
            mixed precision then, with or without an AmpOptimWrapper; float16 needs the loss scaling of one.
        cache_features: GiB of memory in which to keep what the frozen part makes of every image, for the next epoch;
            with ``trainable`` ``'fixed'`` or ``'partial_1'`` and a pipeline that is not random: see
            :mod:`mona_mm.frozen.feature_cache`.
        deploy: put the form for inference in the place of every module of the method (of Mona the one with its
            parameters folded together); ``tools/delta.py merge`` writes such configs, with the weights for them.

    Raises:
        UnsupportedHostError: if the base is not one of :data:`mona_mm.hosts.HOSTS`.
        ConfigError: unknown base or method, a method that this host has no sites for or that is wider than its blocks,
            a rule that matches nothing, ``frozen_stages`` under a method, or ``frozen_dtype`` where nothing is frozen;
            ``cache_features`` where the features of an image change, or with ``compile``; ``deploy`` of a method
            without a form for inference.
        UnknownOptionError: an option that the method does not have.
    """
    method = None if peft is None else build_method(peft)
    backbone = _build(base)
    find_host(backbone)
    if fast:  # before a method, whose classes come in front
        for module in backbone.modules():
            make_fast(module)
    if method is not None:
        method.attach(backbone)
    if deploy and not put_in_deploy_forms(backbone):
        raise ConfigError(
            f'deploy=True: {"no method" if method is None else method.name} has no form for inference of its own; Mona '
            'has. Leave deploy out.'
        )
    if not fast:
        for module in method_modules(backbone):
            module.fast = False
    make_record(backbone).config = _plain(peft)  # for deltas to say what they belong to
    if trainable is None:
        trainable = 'all' if method is None else 'none'
    freeze(backbone, (*as_rules(trainable), *(method.trainable if method else ())))
    # A partial and not a bound method: that would be pickled by its name, and come back as the host's own.
    backbone.init_weights = partial(init_weights, backbone, method)
    if cache_features is not None:
        if compile:
            raise ConfigError('cache_features and compile exclude each other: what is compiled asks no cache.')
        keep_features(backbone, cache_features)
    if frozen_dtype is not None:  # last: within its autocast everything else is computed
        keep_frozen(backbone, frozen_dtype)
    if compile:
        try:
            backbone.compile(**(compile if isinstance(compile, dict) else {}))
        except Exception as error:  # of torch, or of a backend that it finds by name
            raise ConfigError(f'compile={show(compile)}: torch.compile refuses these arguments ({error}).') from error
    return backbone


@MODELS.register_module()
@checked
def FrozenModel(base: dict[str, Any], trainable: Rules) -> nn.Module:
    """Any module of a config (neck, head, a ResNet, a whole detector), of which only ``trainable`` trains.

    Freezing happens here, before a Runner wraps the model for distributed training. A BatchNorm that is frozen
    altogether keeps its statistics, too.

    Args:
        base: the module's own config.
        trainable: a rule or a list of rules of :mod:`mona_mm.frozen.rules`.

    Raises:
        ConfigError: unknown base, or a rule that matches nothing.
        CheckpointMismatchError: by ``init_weights``, if a ``Pretrained`` ``init_cfg`` lacks something that is frozen.
    """
    module = _build(base)
    freeze(module, trainable)
    # Some hosts' own loading skips in silence what does not fit; a PeftBackbone's does not.
    for each in module.modules():
        if is_host(each) and pretrained_file(each) and 'init_weights' not in vars(each):
            each.init_weights = partial(init_weights, each)
    return module


def _plain(peft: dict[str, Any] | None) -> dict[str, Any] | None:
    """The config of a method as text can have it: its registered name, plain dicts, lists, strings and numbers."""
    return None if peft is None else {**with_names(peft), 'type': look_up(METHODS, peft['type']).__name__}


def _build(base: dict[str, Any]) -> nn.Module:
    if 'type' not in base:
        raise ConfigError(f'base={show(base)} must be the config of a stock module, a dict with a `type`.')
    with MODELS.switch_scope_and_registry(None) as registry:  # the running config's default scope
        if not callable(look_up(registry, base['type'])):
            raise ConfigError(
                f'base: there is no module {show(base["type"])}. Give the type that a stock config has, outside a '
                "config with its library's scope: 'mmdet.SwinTransformer', 'mmpretrain.VisionTransformer'."
            )
    return MODELS.build(ConfigDict(base))


def init_weights(self: nn.Module, method: Method | None = None) -> None:
    """``init_weights`` of a :func:`PeftBackbone`: load or initialise the base, then give the method its own values.

    A ``Pretrained`` ``init_cfg`` goes through :func:`load_pretrained`, which checks that the file fits, whichever of
    the libraries the host is from. The method comes last, because some hosts re-randomise every linear layer.
    """
    pretrained = pretrained_file(self)
    with in_float32(self):
        if pretrained is not None:
            load_pretrained(self, **pretrained)
        else:
            initialise_as_stock(self)
        if method is not None:
            method.check_base(self)
    for module in method_modules(self):
        module.reset_parameters()
    start_from_base(self)
