"""Keep the features that a frozen backbone computes for an image from one epoch to the next.

Where nothing in the backbone trains (``trainable='fixed'``) its outputs are kept. Where its last block trains
(``'partial_1'``) the input of that block and the outputs before it are kept. Features are found by the content of each
image as the backbone gets it, so the batches may be composed differently in every epoch; a random augmentation makes
new images, whose features are computed. Features of an image that were computed in another batch may differ by
rounding; with batches of one image on a CPU nothing differs.

Features are kept in CPU memory until the limit is reached, and are never replaced: with a data set larger than the
limit, dropping the oldest ones would mean that none is ever found. Those of validation are kept as well. Every process
of a distributed run keeps the features of the images that it has seen. Hooks on modules do not run when features are
found.

Features are valid for one set of weights, and all are dropped when the weights change. Weights that were loaded,
initialised or changed in place are noticed at the next image by their addresses and version counters. Weights that were
exchanged without a trace (as mmengine's EMAHook does between training and evaluation) are noticed by their fingerprint
after every ``train()`` and ``eval()``. State dicts, copies and pickles do not contain features.
"""

import math
import threading
from collections.abc import Sequence
from functools import partial
from logging import WARNING
from typing import Any, NamedTuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mona_mm.errors import ConfigError
from mona_mm.frozen.rules import check_trainable
from mona_mm.hosts import HOSTS, GridSource, find_host, method_modules
from mona_mm.nn.digest import digests, fingerprint
from mona_mm.nn.mixin import qualified_name
from mona_mm.nn.private import DROPOUTS, change_count
from mona_mm.nn.substitute import call_substituted
from mona_mm.record import make_record, record_of


class Features(NamedTuple):
    """The features of one image.

    Args:
        outputs: the outputs of the backbone, without that of the last block if it trains.
        tokens: the input ``(N, C)`` of the last block, if it trains.
        arguments: the other arguments of the last block.
        hw: the grid ``(H, W)`` of the tokens.
        container: the type in which the backbone returns its outputs.
    """

    outputs: tuple[Tensor, ...]
    tokens: Tensor | None = None
    arguments: tuple = ()
    hw: tuple[int, int] | None = None
    container: type = tuple

    def copy(self) -> 'Features':
        """Copy the features to memory of their own on the CPU."""
        outputs = tuple(out.to('cpu', copy=True) for out in self.outputs)
        return self._replace(outputs=outputs, tokens=None if self.tokens is None else self.tokens.to('cpu', copy=True))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.outputs, self.tokens) if t is not None)


class FeatureCache:
    """The features of images by key, and the state of the weights that they belong to. Threads may share it.

    Args:
        gib: the memory that the features may take, in GiB.
    """

    def __init__(self, gib: float) -> None:
        self.gib = gib
        self.features: dict[tuple, Features] = {}
        self.bytes = 0
        self.requested = self.found = 0  # numbers of images since the last report
        self.mode_changed = True  # whether train() or eval() was called since the weights were last checked
        self._is_full = False
        # Marks and fingerprint of the weights, and the tensors themselves, so that no others can get their addresses.
        self._weights: tuple[list, dict, list[Tensor]] = [], {}, []
        self._age = 0  # number of times that the weights have changed
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple:
        return FeatureCache, (self.gib,)

    def look_up(self, backbone: nn.Module, keys: Sequence[tuple]) -> tuple[list[Features | None], int]:
        """Look up the features of images.

        All features are dropped first if the weights of ``backbone`` have changed.

        Returns:
            The features of every image, None where there are none, and the age of the weights, for :meth:`keep`.

        Raises:
            FreezeError: if a parameter trains now that was frozen.
        """
        with self._lock:
            self._drop_if_changed(backbone)
            found = [self.features.get(key) for key in keys]
            self.requested += len(found)
            self.found += sum(features is not None for features in found)
            return found, self._age

    def _drop_if_changed(self, backbone: nn.Module) -> None:
        trainable = record_of(backbone).freeze.trainable
        tensors = [*backbone.named_parameters(), *backbone.named_buffers()]
        marks = [(t.data_ptr(), change_count(t), t.requires_grad) for name, t in tensors if name not in trainable]
        if self.mode_changed:
            self.mode_changed = False  # before the weights are checked, so that a call of train() meanwhile counts
            self.report()
        elif marks == self._weights[0]:
            return
        check_trainable(backbone)
        current = fingerprint({name: t for name, t in tensors if name not in trainable})
        if current != self._weights[1]:
            if self.features:
                print_log('The frozen weights have changed, so all kept features are dropped.', logger='current')
            self.features.clear()
            self.bytes, self._is_full = 0, False
            self._age += 1
        self._weights = marks, current, [t.detach() for _, t in tensors]

    def report(self) -> None:
        """Log the number of images whose features were found since the last report."""
        if self.requested:
            print_log(
                f'Features were found for {self.found} of {self.requested} images; those of {len(self.features)} '
                f'images are kept, in {self.bytes / 2**30:.2f} of {self.gib} GiB.',
                logger='current',
            )
        self.requested = self.found = 0

    def keep(self, key: tuple, features: Features, age: int) -> None:
        """Keep a copy of the features of an image, if there is room and the weights still have that age."""
        with self._lock:
            if key in self.features or age != self._age:
                return
            if self.bytes + features.nbytes <= self.gib * 2**30:
                self.features[key] = features.copy()
                self.bytes += features.nbytes
            elif not self._is_full:
                self._is_full = True
                print_log(
                    f'The {self.gib} GiB of cache_features are full: the features of {len(self.features)} images are '
                    'kept, and those of other images are computed every time.',
                    logger='current',
                    level=WARNING,
                )


def cache_features(backbone: nn.Module, gib: float) -> None:
    """Let ``backbone`` keep its features, in place, in the ``feature_cache`` of its record.

    Args:
        backbone: a supported backbone that is frozen up to its last block.
        gib: the memory that the features may take, in GiB.

    Raises:
        ConfigError: if ``gib`` is not a positive number, anything before the last block trains or drops at random, or
            the last block trains in a host without :attr:`~mona_mm.hosts.Host.last_output`.
    """
    if not isinstance(gib, int | float) or isinstance(gib, bool) or not 0 < gib < math.inf:
        raise ConfigError(f'cache_features={gib!r} must be a number of GiB greater than 0, or None.')
    host = find_host(backbone)
    *_, last = host.blocks(backbone)
    trainable = record_of(backbone).freeze.trainable
    earlier = sorted(name for name in trainable if not name.startswith(f'{last}.'))
    if earlier or method_modules(backbone):
        record = record_of(backbone)
        setting = record.method or f'trainable={list(record.freeze.rules)}'
        raise ConfigError(
            f'cache_features: {setting} trains {earlier[0] if earlier else "modules in the blocks"}, so that later '
            "features change. Features can be kept with trainable='fixed' or 'partial_1' and no method."
        )
    if trainable and (host.last_output is None or not _has_stock_forward(backbone)):
        supported = ', '.join(name for name, other in HOSTS.items() if other.last_output is not None)
        raise ConfigError(
            f"cache_features with trainable='partial_1' supports only {supported}, and not "
            f"{qualified_name(type(backbone))}. Use trainable='fixed', which supports every backbone."
        )
    for path, module in backbone.named_modules():
        rate = _drop_rate(module)
        if rate and not (trainable and f'{path}.'.startswith(f'{last}.')):
            raise ConfigError(
                f'cache_features: {path} drops at random while training (rate {rate:.3g}), so that the features of an '
                'image differ every time. Set drop_path_rate=0.0 in the base config (and drop_rate=0.0 and '
                'attn_drop_rate=0.0, if those are set).'
            )
    cache = make_record(backbone).feature_cache = FeatureCache(gib)
    backbone.train = partial(_train, backbone.train, cache)
    # A bound method would be pickled by its name, and would become this forward itself when it is loaded.
    backbone.forward = partial(_forward_with_cache, backbone, partial(type(backbone).forward, backbone), cache)


def _has_stock_forward(backbone: nn.Module) -> bool:
    return qualified_name(type(backbone).forward).removesuffix('.forward') in HOSTS


def _drop_rate(module: nn.Module) -> float:
    rates = [module.p] if isinstance(module, DROPOUTS) else []
    if isinstance(module, nn.MultiheadAttention):
        rates.append(module.dropout)
    rates += [getattr(module, name, 0.0) for name in ('drop_prob', 'attn_drop')]  # mmcv's DropPath, ViT's attention
    return max((rate for rate in rates if isinstance(rate, int | float)), default=0.0)


def _train(inner: partial, cache: FeatureCache, mode: bool = True) -> nn.Module:
    cache.mode_changed = True
    return inner(mode)


def _forward_with_cache(backbone: nn.Module, inner: partial, cache: FeatureCache, x: Tensor) -> Sequence[Tensor]:
    if x.requires_grad or x.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return inner(x)
    keys = _image_keys(x)
    features, age = cache.look_up(backbone, keys)
    missing = [i for i, found in enumerate(features) if found is None]
    if len(missing) == len(features):
        outputs, computed = _compute(backbone, inner, x)
    else:
        outputs = None
        with torch.no_grad():
            computed = _compute(backbone, inner, x[missing])[1] if missing else []
    for i, features_of_image in zip(missing, computed, strict=True):
        cache.keep(keys[i], features_of_image, age)
        features[i] = features_of_image
    return _assemble(backbone, features, x.device) if outputs is None else outputs


def _image_keys(x: Tensor) -> list[tuple]:
    """The key of every image: two digests, since there may be millions of images, its shape and dtypes."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    images = dict(enumerate(x))
    first, second = digests(images), digests(images, seed=1)
    return [(first[i], second[i], x.shape[1:], x.dtype, autocast) for i in images]


def _compute(backbone: nn.Module, inner: partial, x: Tensor) -> tuple[Sequence[Tensor], list[Features]]:
    """Compute the outputs of a batch, as the backbone returns them, and the features of every image."""
    if not record_of(backbone).freeze.trainable:
        outputs = inner(x)
        return outputs, [Features(tuple(image), container=type(outputs)) for image in zip(*outputs, strict=True)]
    recorded: dict[str, Any] = {}
    outputs = _compute_recording(backbone, recorded, x)
    tokens, *arguments = recorded['block']
    hw = recorded['hw']
    return outputs, [
        Features(
            tuple(out[i].detach() for out in outputs[:-1]),
            tokens[i].detach(),
            tuple(arguments),
            tuple(hw),
            type(outputs),
        )
        for i in range(len(x))
    ]


def _compute_recording(backbone: nn.Module, recorded: dict[str, Any], x: Tensor) -> Sequence[Tensor]:
    """Compute the outputs of a batch, and write the last block's arguments (``block``) and grid (``hw``) to
    ``recorded``."""

    def block(*args: Any) -> Tensor:
        recorded.update(block=args)
        if not isinstance(spec.grid, GridSource):
            recorded.update(hw=spec.grid.of_call(last, args, {}))
        return last(*args)

    def grid(*args: Any) -> Any:
        output = source(*args)
        recorded.update(hw=spec.grid.find(source, args, output))
        return output

    host, last = find_host(backbone), _last_block(backbone)
    spec = host.spec(last)
    *_, path = host.blocks(backbone)
    parts = {path: block}
    if isinstance(spec.grid, GridSource):
        source = backbone.get_submodule(spec.grid.path)
        parts[spec.grid.path] = grid
    return call_substituted(backbone, parts, lambda stand_in: type(backbone).forward(stand_in, x))


def _last_block(backbone: nn.Module) -> nn.Module:
    *_, block = find_host(backbone).blocks(backbone).values()
    return block


def _assemble(backbone: nn.Module, features: Sequence[Features], device: torch.device) -> Sequence[Tensor]:
    """Assemble the outputs of a batch from the features of its images."""
    first = features[0]
    outputs = [
        torch.stack([output.to(device) for output in of_images])
        for of_images in zip(*(f.outputs for f in features), strict=True)
    ]
    if first.tokens is not None:
        tokens = torch.stack([f.tokens.to(device) for f in features])
        tokens = _last_block(backbone)(tokens, *first.arguments)
        outputs.append(find_host(backbone).last_output(backbone, tokens, first.hw))
    return first.container(outputs)
