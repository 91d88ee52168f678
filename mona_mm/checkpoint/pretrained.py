"""Load the pretrained base: any known format, into any host, with nothing skipped in silence."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from http.client import HTTPException
from os.path import basename, join
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from mona_mm.checkpoint.convert import backbone_tensors, convert_state_dict, recognise
from mona_mm.checkpoint.rehearsal import Rehearsal, rehearse
from mona_mm.errors import CheckpointMismatchError, ConfigError, MissingFileError, UserError
from mona_mm.hosts import find_host, method_names, recomputed_names
from mona_mm.type_names import is_type

_CLASSIFIER = ('norm.', 'head.')  # what a classifier has beyond the backbone
FETCHED = ('.safetensors', '.npz')  # without torch.hub
UNREACHABLE = (URLError, HTTPException, TimeoutError, ConnectionError)
_OPTION = '--cfg-options model.backbone.base.init_cfg.checkpoint=/path/to/the/file'


def pretrained_file(host: nn.Module) -> dict[str, str] | None:
    """The ``file`` (or address) and ``prefix`` that the ``init_cfg`` of a supported backbone names, or None.

    What an ``init_cfg`` means is what mmengine does with it: it may be a dict or several, of which a ``Pretrained`` one
    (by name or by class) comes last and wins, and an empty one is none. The hosts that read their checkpoint themselves
    (mmdet's and mmseg's) take one without a ``type``, as mmdet's PVT configs have it.

    Raises:
        ConfigError: if it is neither, or names no file, where the stock backbone would fail, too.
    """
    init_cfg = getattr(host, 'init_cfg', None)
    if not init_cfg:
        return None
    reads_itself, pretrained = find_host(host).reads_checkpoint, None
    for cfg in init_cfg if isinstance(init_cfg, list | tuple) else [init_cfg]:
        if not isinstance(cfg, Mapping) or not ('type' in cfg or (reads_itself and 'checkpoint' in cfg)):
            raise _no_init_cfg(host, "it has to be a dict with a type, or a list of such: dict(type='Pretrained', "
                                     "checkpoint='/path/or/address')")  # fmt: skip
        if is_type(cfg, 'Pretrained') or (reads_itself and 'checkpoint' in cfg):
            pretrained = cfg
    if pretrained is None:
        return None
    if not isinstance(pretrained.get('checkpoint'), str) or not isinstance(pretrained.get('prefix') or '', str):
        raise _no_init_cfg(host, "Pretrained needs checkpoint='/path/or/address', and may have prefix='backbone.'")
    return dict(file=pretrained['checkpoint'], prefix=pretrained.get('prefix') or '')


def initialise_as_stock(host: nn.Module) -> None:
    """The stock backbone's own ``init_weights``.

    Raises:
        ConfigError: if it fails at its ``init_cfg``.
    """
    try:
        type(host).init_weights(host)
    except (AssertionError, LookupError, TypeError, ValueError, AttributeError) as error:
        if host.init_cfg is None or isinstance(error, UserError):
            raise
        raise _no_init_cfg(host, f'the stock backbone fails at it ({type(error).__name__}: {error})') from error


def _no_init_cfg(host: nn.Module, reason: str) -> ConfigError:
    return ConfigError(
        f'init_cfg={host.init_cfg!r} of the {type(host).__name__} is none: {reason}. None starts from random weights.'
    )


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a file, by the names in the model.

    Args:
        file: the file.
        format: of its names; see :mod:`mona_mm.checkpoint.convert`.
        loaded: tensors of the model that were in it.
        missing: tensors of the model that were not, and need not be.
        unexpected: tensors of the file that the model has no use for, and need not have.
        resized: of the loaded, those that were interpolated: (name, shape in the file, shape in the model).
    """

    file: str
    format: str
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    resized: list[tuple[str, tuple[int, ...], tuple[int, ...]]]

    def lines(self, every: bool = False) -> list[str]:
        """The report as lines of text; ``every`` names each missing and unexpected tensor, and not the first three."""
        resized = [f'{name} {old} to {new}' for name, old, new in self.resized]
        lines = [f'{self.file} (names: {self.format}): {len(self.loaded)} tensors loaded']
        for label, names in (('missing', self.missing), ('unexpected', self.unexpected), ('resized', resized)):
            if names:
                lines.append(_first(f'{label}, {len(names)}: ', names, len(names) if every else 3))
        return lines


def load_pretrained(backbone: nn.Module, file: str, prefix: str = '') -> LoadReport:
    """Load a pretrained base into a supported backbone, in place, and log what it held.

    Relative-position tables of another window size are interpolated (bicubic), position embeddings of another image
    size by the host. The parameters of a method and the norms of the backbone's outputs, which pretraining does not
    have, may be absent; everything else must be there.

    Args:
        backbone: an instance of one of :data:`mona_mm.hosts.HOSTS`, with or without a method.
        file: a path or an address that mmengine can read.
        prefix: of the backbone's names in the file; without one, ``backbone.`` is found by itself.

    Raises:
        MissingFileError: if the file is not there or cannot be downloaded; it says where to put it.
        CheckpointMismatchError: if it does not fit, or is no checkpoint; it names the first keys that do not fit.
    """
    checkpoint = read_checkpoint(file)
    form = recognise(backbone_tensors(checkpoint, prefix)) or 'unknown'
    state_dict = convert_state_dict(checkpoint, prefix, known=False)  # it is compared with the backbone below
    current = backbone.state_dict()
    in_file = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    host = find_host(backbone)
    if host.fit_checkpoint is not None:
        host.fit_checkpoint(state_dict, current)
    for name in state_dict.keys() & current.keys():
        shape = current[name].shape
        if state_dict[name].shape != shape and _squeezed(state_dict[name]) == _squeezed(current[name]):
            # a 1x1 convolution where the file has a linear layer, or the other way round
            state_dict[name] = state_dict[name].reshape(shape)
            in_file[name] = tuple(shape)

    method = method_names(backbone)
    recomputed = recomputed_names()
    without_class_token = () if getattr(backbone, 'cls_token', 0) is not None else ('cls_token',)

    def optional(name: str) -> bool:
        return (
            name in method
            or name.startswith((*host.output_norms, *_CLASSIFIER))
            or name.endswith((*recomputed, *without_class_token))
        )

    wrong = misfit(rehearse(backbone, state_dict), optional)
    if wrong:
        raise CheckpointMismatchError(
            f'{file} does not hold the weights of this {type(backbone).__name__}: {wrong} Use the checkpoint of the '
            'same architecture (embed_dims, depths, window), or change the backbone in the config.'
        )
    missing, unexpected = backbone.load_state_dict(state_dict, strict=False)
    loaded = [name for name in state_dict if name in current and name not in unexpected]
    absent = [name for name in missing if not name.endswith(recomputed)]
    resized = [
        (name, in_file[name], tuple(current[name].shape))
        for name in loaded
        if name in in_file and in_file[name] != current[name].shape and not name.endswith(recomputed)
    ]
    report = LoadReport(file, form, loaded, absent, list(unexpected), resized)
    print_log(
        f'Loaded {len(loaded)} tensors of the base from {file}; {len(absent)} are not in it and keep their initial '
        f'values (the method and the output norms).{" ".join(["", *report.lines()[1:]])}',
        logger='current',
    )
    return report


def read_checkpoint(file: str, map_location: Any = 'cpu') -> dict:
    """Read a checkpoint with mmengine's loaders, as :mod:`mona_mm.checkpoint.loading` guards them, by default onto the
    CPU.

    Raises:
        MissingFileError: if it is not there or cannot be downloaded; it says where to put the file.
        CheckpointMismatchError: if it is not a checkpoint that weights-only loading can read.
    """
    try:
        return CheckpointLoader.load_checkpoint(file, map_location=map_location)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(
            f'There is no checkpoint {file}. Name another in init_cfg, in the shipped configs with {_OPTION}, or set '
            'model.backbone.base.init_cfg=None to start from random weights.'
        ) from error


def download_place(address: str) -> str:
    """Where a file is kept once it has been downloaded: torch.hub's place, but one of its own for every address of a
    format that torch.hub does not read. Deltas and safetensors of different models often have the same name."""
    folder, path = join(torch.hub.get_dir(), 'checkpoints'), urlparse(address).path
    if path.endswith(FETCHED):
        folder = join(folder, sha256(address.encode()).hexdigest()[:8])
    return join(folder, basename(path))


def unreachable(file: str, error: Exception) -> MissingFileError:
    """What to tell of an address that could not be downloaded: why, and where to put the file."""
    return MissingFileError(
        f'Cannot download {file} ({error}). Fetch it on a machine with network and either put it at '
        f'{download_place(file)}, where the next run finds it, or name its path in init_cfg: {_OPTION}'
    )


def unreadable(file: str, error: Exception) -> CheckpointMismatchError:
    """What to tell of a file that could not be read: why, and how to read it all the same."""
    return CheckpointMismatchError(
        f'{file} cannot be read as a checkpoint of weights: it is damaged, something else, or needs more than '
        f'weights-only loading allows ({reason(error)}). No pickle in it was executed. If you trust whoever made it, '
        'python tools/convert_checkpoint.py --trust-pickle FILE OUT executes it once and writes the weights alone.'
    )


def reason(error: Exception) -> str:
    """The first line of an error; of torch's about weights-only loading, which begins with advice, what it is about."""
    about = str(error).rpartition('WeightsUnpickler error: ')[2].lstrip()
    return f'{type(error).__name__}: {about.partition(chr(10))[0]}'


def _squeezed(tensor: Tensor) -> tuple[int, ...]:
    return tuple(length for length in tensor.shape if length > 1)


def compare(current: Mapping[str, Tensor], given: Mapping[str, Tensor], optional: Callable[[str], bool]) -> str:
    """Describe how the keys and shapes of ``given`` differ from ``current``; the empty string if they fit.

    Keys that are ``optional`` may be in one of the two alone.
    """
    missing = [name for name in current if name not in given]
    unexpected = [name for name in given if name not in current]
    reshaped = [
        f'{name} {tuple(given[name].shape)} instead of {tuple(tensor.shape)}'
        for name, tensor in current.items()
        if name in given and given[name].shape != tensor.shape
    ]
    return _describe(missing, unexpected, reshaped, optional)


def misfit(rehearsal: Rehearsal, optional: Callable[[str], bool]) -> str:
    """Describe what does not fit in what loading would do; the empty string if all of it does.

    Keys that are ``optional`` may be missing in the file or in the model, and of those that the host computes from its
    configuration it does not matter what the file holds.
    """
    reshaped = [f'{n} {shapes}' for n, shapes in rehearsal.reshaped.items() if not n.endswith(recomputed_names())]
    missing = [name for name in rehearsal.missing if not name.endswith(recomputed_names())]
    unexpected = [name for name in rehearsal.unexpected if not name.endswith(recomputed_names())]
    wrong = _describe(missing, unexpected, reshaped, optional)
    return f'{wrong} The model itself fails at it: {rehearsal.problem}.'.strip() if rehearsal.problem else wrong


def _describe(
    missing: Sequence[str], unexpected: Sequence[str], reshaped: Sequence[str], optional: Callable[[str], bool]
) -> str:
    missing = [name for name in missing if not optional(name)]
    unexpected = [name for name in unexpected if not optional(name)]
    parts = [_first('other shapes: ', reshaped), _first('missing: ', missing), _first('unexpected: ', unexpected)]
    return ' '.join(part for part in parts if part)


def _first(label: str, names: Sequence[str], count: int = 3) -> str:
    if not names:
        return ''
    more = f' and {len(names) - count} more' if len(names) > count else ''
    return f'{label}{", ".join(names[:count])}{more}.'
