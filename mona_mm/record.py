"""The record of mona_mm's changes to a module: its attribute ``peft_record``, which copies and pickles include."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class FreezeRecord:
    """The rules that :func:`mona_mm.frozen.rules.freeze` was called with, and the parameters that train.

    Args:
        rules: the rules.
        trainable: the parameters that train.
        behind: the parameters that were selected but stay frozen, since no output depends on them.
        frozen: the parameters that ``freeze`` has frozen, without those that the host itself had frozen.
    """

    rules: tuple[str, ...]
    trainable: frozenset[str]
    behind: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()


@dataclass(frozen=True)
class TargetRecord:
    """The layers that one target of a :func:`mona_mm.PeftModel` has matched.

    Args:
        path: its pattern, or patterns.
        method: the name of the method.
        layers: the paths of the layers, in the order of the module.
        names: the names of the parameters of the method.
    """

    path: str
    method: str
    layers: tuple[str, ...]
    names: frozenset[str]


@dataclass
class PeftRecord:
    """The changes that mona_mm has made to a module.

    Args:
        method: the name of the method in the blocks of the module, or beside its layers, or those of several joined by
            ``'+'``; None without one.
        paths: the paths in the module of what each of these methods has added, by the method's name.
        config: the ``peft`` of the config that the method was built from, in plain dicts, lists, strings and numbers;
            a list if there are several methods.
        targets: the layers with a method beside them, if the module was made by :func:`mona_mm.PeftModel`.
        freeze: the record of the module's freezing; None if it was not frozen.
        frozen_dtype: the dtype of the frozen weights, ``'bfloat16'`` or ``'float16'``; None for float32.
        feature_cache: the :class:`mona_mm.frozen.feature_cache.FeatureCache` of the module, if it keeps features.
        base_file: the file of the whole model that was loaded as the base of a delta.
        replaced: for every tensor that the latest delta replaced, by name, the previous tensor and the digest of the
            delta's.
        delta_base: the file of the base for deltas that mmengine loads, in place of the one that a delta names.
        allow_other_base: whether such deltas may be loaded on another base than their own.
    """

    method: str | None = None
    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)
    config: dict[str, Any] | list[dict[str, Any]] | None = None
    targets: tuple[TargetRecord, ...] = ()
    freeze: FreezeRecord | None = None
    frozen_dtype: str | None = None
    feature_cache: Any = None
    base_file: str | None = None
    replaced: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    delta_base: str | None = None
    allow_other_base: bool = False


_NO_RECORD = PeftRecord()


def record_of(module: nn.Module) -> PeftRecord:
    """The record of a module, for reading only; an empty one if mona_mm has not changed the module."""
    return vars(module).get('peft_record', _NO_RECORD)


def make_record(module: nn.Module) -> PeftRecord:
    """The record of a module, for writing; it is created if there is none."""
    return vars(module).setdefault('peft_record', PeftRecord())


def freeze_records(model: nn.Module) -> Iterator[tuple[str, nn.Module, FreezeRecord]]:
    """Yield the path, module and record of every module that was given to :func:`mona_mm.frozen.rules.freeze`."""
    for path, module in model.named_modules():
        record = record_of(module).freeze
        if record is not None:
            yield path, module, record
