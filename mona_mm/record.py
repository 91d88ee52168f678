"""What mona_mm has done to a module: one record on it, ``peft_record``, which copies and pickles take along."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class FreezeRecord:
    """Which parameters :func:`mona_mm.frozen.rules.freeze` was asked to let train, and which it does.

    Args:
        rules: what was asked for.
        trainable: the parameters that train.
        behind: parameters that were selected, too, and stay frozen, since no output depends on them.
        frozen: the parameters that would train had ``freeze`` not been called; what the host itself froze is not
            among them.
    """

    rules: tuple[str, ...]
    trainable: frozenset[str]
    behind: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()


@dataclass
class PeftRecord:
    """What mona_mm has done to a module.

    Args:
        method: the name of the method in the blocks of the module; None without one.
        config: the ``peft`` of the config that the method was built from, in plain dicts, lists, strings and numbers.
        freeze: what trains in the module.
        frozen_dtype: the type that frozen weights are kept in, ``'bfloat16'`` or ``'float16'``; None for float32.
        feature_cache: the :class:`mona_mm.frozen.feature_cache.FeatureCache` of the module, if it keeps features.
        base_file: the whole model that was loaded for a delta to be put on.
        replaced: what the last delta replaced, by name: the tensor that was there, and the digest of the delta's.
        delta_base: the whole model that deltas which mmengine loads belong on, whatever they say themselves.
        allow_other_base: whether such deltas are loaded on another base than their own, too.
    """

    method: str | None = None
    config: dict[str, Any] | None = None
    freeze: FreezeRecord | None = None
    frozen_dtype: str | None = None
    feature_cache: Any = None
    base_file: str | None = None
    replaced: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    delta_base: str | None = None
    allow_other_base: bool = False


_NO_RECORD = PeftRecord()


def record_of(module: nn.Module) -> PeftRecord:
    """The record of a module, not to be changed; an empty one where mona_mm has done nothing to it."""
    return vars(module).get('peft_record', _NO_RECORD)


def make_record(module: nn.Module) -> PeftRecord:
    """The record of a module, to be changed."""
    return vars(module).setdefault('peft_record', PeftRecord())


def freeze_records(model: nn.Module) -> Iterator[tuple[str, nn.Module, FreezeRecord]]:
    """The modules of a model in which something was frozen, with their paths and records."""
    for path, module in model.named_modules():
        record = record_of(module).freeze
        if record is not None:
            yield path, module, record
