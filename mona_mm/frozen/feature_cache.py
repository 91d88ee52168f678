"""What a frozen backbone makes of an image, kept from one epoch for the next.

Where nothing in the backbone trains (``trainable='fixed'``) its outputs are kept; where its last block does
(``'partial_1'``), the input of that block and the outputs before it. They are found again by the content of the image
as the backbone gets it, image by image, so that batches may be composed anew every epoch; a random augmentation
makes other images, which are computed. What was computed in a batch may differ by rounding from what another batch
would give; in batches of one, on a CPU, nothing differs.

Features are kept in CPU memory, until it is used up, and then those there are stay: of a data set larger than the
memory, throwing out the oldest would find nothing again. Those of validation are kept as well. Every process of a
distributed run has its own, of the images that it has seen. Hooks on modules whose features are found do not run.

They belong to the weights. Weights that were loaded, initialised or changed in place are found by their addresses and
version counters at the next image, those exchanged without a trace (mmengine's EMAHook does so between training and
evaluation) by their fingerprint after every ``train()`` and ``eval()``; then all features are dropped. No state dict,
copy or pickle has them.
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
from mona_mm.nn.substitute import substitute
from mona_mm.record import make_record, record_of


class Features(NamedTuple):
    """Of one image.

    Args:
        outputs: of the backbone; those of the last block are not among them where it trains.
        tokens: what the last block is given, ``(N, C)``, where it trains.
        arguments: what it is given besides.
        hw: the ``(H, W)`` of the tokens.
        container: the type in which the backbone returns its outputs.
    """

    outputs: tuple[Tensor, ...]
    tokens: Tensor | None = None
    arguments: tuple = ()
    hw: tuple[int, int] | None = None
    container: type = tuple

    def copy(self) -> 'Features':
        """In memory of its own on the CPU."""
        outputs = tuple(out.to('cpu', copy=True) for out in self.outputs)
        return self._replace(outputs=outputs, tokens=None if self.tokens is None else self.tokens.to('cpu', copy=True))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.outputs, self.tokens) if t is not None)


class FeatureCache:
    """The features of images, by key, and the weights that they belong to. Threads may share it.

    Args:
        gib: how much memory they may take, in GiB.
    """

    def __init__(self, gib: float) -> None:
        self.gib = gib
        self.features: dict[tuple, Features] = {}
        self.bytes = 0
        self.asked = self.found = 0  # images, since they were last reported
        self.switched = True  # whether train() or eval() has been called since the weights were looked at
        self._is_full = False
        # Their marks, fingerprint and, so that their addresses can be no others', storages.
        self._weights: tuple[list, dict, list[Tensor]] = [], {}, []
        self._age = 0  # how often the weights have changed
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple:
        return FeatureCache, (self.gib,)

    def look_up(self, backbone: nn.Module, keys: Sequence[tuple]) -> tuple[list[Features | None], int]:
        """The features of images, None where there are none, and the age of the weights, which :meth:`keep` asks for.

        All features are dropped first if they are of other weights than those that ``backbone`` has now.

        Raises:
            FreezeError: if what the features were kept for as frozen trains now.
        """
        with self._lock:
            self._follow(backbone)
            found = [self.features.get(key) for key in keys]
            self.asked += len(found)
            self.found += sum(each is not None for each in found)
            return found, self._age

    def _follow(self, backbone: nn.Module) -> None:
        trainable = record_of(backbone).freeze.trainable
        tensors = [*backbone.named_parameters(), *backbone.named_buffers()]
        marks = [(t.data_ptr(), change_count(t), t.requires_grad) for name, t in tensors if name not in trainable]
        if self.switched:
            self.switched = False  # before the weights are looked at: who calls train() from now on is not overlooked
            self.report()
        elif marks == self._weights[0]:
            return
        check_trainable(backbone)
        current = fingerprint({name: t for name, t in tensors if name not in trainable})
        if current != self._weights[1]:
            if self.features:
                print_log('The frozen weights have changed: the features kept are dropped.', logger='current')
            self.features.clear()
            self.bytes, self._is_full = 0, False
            self._age += 1
        self._weights = marks, current, [t.detach() for _, t in tensors]

    def report(self) -> None:
        """Say how many images were found since the last report."""
        if self.asked:
            print_log(
                f'Features of {self.found} of {self.asked} images were found again; those of {len(self.features)} are '
                f'kept, in {self.bytes / 2**30:.2f} of {self.gib} GiB.',
                logger='current',
            )
        self.asked = self.found = 0

    def keep(self, key: tuple, features: Features, age: int) -> None:
        """Keep a copy of the features of an image, if there is room for them and the weights are still that old."""
        with self._lock:
            if key in self.features or age != self._age:
                return
            if self.bytes + features.nbytes <= self.gib * 2**30:
                self.features[key] = features.copy()
                self.bytes += features.nbytes
            elif not self._is_full:
                self._is_full = True
                print_log(
                    f'cache_features={self.gib} GiB are full: the features of {len(self.features)} images are kept, '
                    'those of others are computed every time.',
                    logger='current',
                    level=WARNING,
                )


def cache_features(backbone: nn.Module, gib: float) -> None:
    """Keep the features of ``backbone``, in place, in at most so many GiB of memory, in its record's ``feature_cache``.

    Raises:
        ConfigError: if ``gib`` is no positive number, anything below the last block trains or drops at random, or the
            last block trains in a backbone whose end is not known.
    """
    if not isinstance(gib, int | float) or isinstance(gib, bool) or not 0 < gib < math.inf:
        raise ConfigError(f'cache_features={gib!r} must be a number of GiB greater than 0, or None.')
    host = find_host(backbone)
    *_, last = host.blocks(backbone)
    trainable = record_of(backbone).freeze.trainable
    below = sorted(name for name in trainable if not name.startswith(f'{last}.'))
    if below or method_modules(backbone):
        record = record_of(backbone)
        what = record.method or f'trainable={list(record.freeze.rules)}'
        raise ConfigError(
            f'cache_features: {what} trains {below[0] if below else "modules in its blocks"}, so that nothing behind '
            "it stays the same. Features can be kept with trainable='fixed' or 'partial_1' and no method."
        )
    if trainable and (host.last_output is None or not _has_stock_forward(backbone)):
        ends = ', '.join(name for name, each in HOSTS.items() if each.last_output is not None)
        raise ConfigError(
            f"cache_features with trainable='partial_1' is there for {ends}, and not for "
            f"{qualified_name(type(backbone))}; with trainable='fixed' it is."
        )
    for path, module in backbone.named_modules():
        rate = _drop_rate(module)
        if rate and not (trainable and f'{path}.'.startswith(f'{last}.')):
            raise ConfigError(
                f'cache_features: {path} drops at random while training ({rate:.3g}), so that an image has other '
                'features every time. Set drop_path_rate=0.0 in the base config (and drop_rate=0.0, '
                'attn_drop_rate=0.0, where those are set).'
            )
    cache = make_record(backbone).feature_cache = FeatureCache(gib)
    backbone.train = partial(_train, backbone.train, cache)
    # By the class, and not as a bound method: that would be pickled by its name, and come back as what it is now.
    backbone.forward = partial(_forward, backbone, partial(type(backbone).forward, backbone), cache)


def _has_stock_forward(backbone: nn.Module) -> bool:
    return qualified_name(type(backbone).forward).removesuffix('.forward') in HOSTS


def _drop_rate(module: nn.Module) -> float:
    rates = [module.p] if isinstance(module, DROPOUTS) else []
    if isinstance(module, nn.MultiheadAttention):
        rates.append(module.dropout)
    rates += [getattr(module, name, 0.0) for name in ('drop_prob', 'attn_drop')]  # of mmcv's DropPath, ViT's attention
    return max((rate for rate in rates if isinstance(rate, int | float)), default=0.0)


def _train(inner: partial, cache: FeatureCache, mode: bool = True) -> nn.Module:
    cache.switched = True
    return inner(mode)


def _forward(backbone: nn.Module, inner: partial, cache: FeatureCache, x: Tensor) -> Sequence[Tensor]:
    if x.requires_grad or x.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return inner(x)
    keys = _keys(x)
    features, age = cache.look_up(backbone, keys)
    missing = [i for i, found in enumerate(features) if found is None]
    if len(missing) == len(features):
        outputs, computed = _compute(backbone, inner, x)
    else:
        outputs = None
        with torch.no_grad():
            computed = _compute(backbone, inner, x[missing])[1] if missing else []
    for i, each in zip(missing, computed, strict=True):
        cache.keep(keys[i], each, age)
        features[i] = each
    return _assemble(backbone, features, x.device) if outputs is None else outputs


def _keys(x: Tensor) -> list[tuple]:
    """Of every image: two digests, for there may be millions, and what else decides on its features."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    images = dict(enumerate(x))
    first, second = digests(images), digests(images, seed=1)
    return [(first[i], second[i], x.shape[1:], x.dtype, autocast) for i in images]


def _compute(backbone: nn.Module, inner: partial, x: Tensor) -> tuple[Sequence[Tensor], list[Features]]:
    """The outputs of a batch, as the backbone gives them, and the features of every image."""
    if not record_of(backbone).freeze.trainable:
        outputs = inner(x)
        return outputs, [Features(tuple(image), container=type(outputs)) for image in zip(*outputs, strict=True)]
    heard: dict[str, Any] = {}
    outputs = _compute_heard(backbone, heard, x)
    tokens, *arguments = heard['block']
    hw = heard['hw']
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


def _compute_heard(backbone: nn.Module, heard: dict[str, Any], x: Tensor) -> Sequence[Tensor]:
    """The outputs of a batch; what the last block is called with, and the grid where it is not told, is then heard."""

    def block(*args: Any) -> Tensor:
        heard.update(block=args)
        if not isinstance(spec.grid, GridSource):
            heard.update(hw=spec.grid.of_call(last, args, {}))
        return last(*args)

    def grid(*args: Any) -> Any:
        output = source(*args)
        heard.update(hw=spec.grid.find(source, args, output))
        return output

    host, last = find_host(backbone), _last_block(backbone)
    spec = host.spec(last)
    *_, path = host.blocks(backbone)
    parts = {path: block}
    if isinstance(spec.grid, GridSource):
        source = backbone.get_submodule(spec.grid.path)
        parts[spec.grid.path] = grid
    return type(backbone).forward(substitute(backbone, parts), x)


def _last_block(backbone: nn.Module) -> nn.Module:
    *_, block = find_host(backbone).blocks(backbone).values()
    return block


def _assemble(backbone: nn.Module, features: Sequence[Features], device: torch.device) -> Sequence[Tensor]:
    """The outputs of a batch from the features of its images."""
    first = features[0]
    outputs = [
        torch.stack([each.to(device) for each in image]) for image in zip(*(f.outputs for f in features), strict=True)
    ]
    if first.tokens is not None:
        tokens = torch.stack([each.tokens.to(device) for each in features])
        tokens = _last_block(backbone)(tokens, *first.arguments)
        outputs.append(find_host(backbone).last_output(backbone, tokens, first.hw))
    return first.container(outputs)
