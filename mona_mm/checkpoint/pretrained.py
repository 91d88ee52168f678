"""Load a pretrained base of any known format into any host, without skipping tensors silently."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from http.client import HTTPException
from os.path import basename, isdir, isfile, join
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
from mona_mm.hosts import Host, find_host, method_names, recomputed_names
from mona_mm.type_names import is_type

_CLASSIFIER = ('norm.', 'head.')  # parts of a classifier that are not the backbone's
FETCHED = ('.safetensors', '.npz')  # formats that are downloaded here, since torch.hub cannot read them
UNREACHABLE = (URLError, HTTPException, TimeoutError, ConnectionError)
_OPTION = '--cfg-options model.backbone.base.init_cfg.checkpoint=/path/to/the/file'


def pretrained_file(host: nn.Module) -> dict[str, str] | None:
    """The ``file`` (or address) and ``prefix`` of the ``Pretrained`` ``init_cfg`` of a supported backbone, or None.

    The ``init_cfg`` is read as mmengine reads it: it is a dict or a list of dicts, the last ``Pretrained`` one (by name
    or by class) counts, and an empty one means none. Hosts that read their checkpoint themselves (mmdet's and mmseg's)
    accept a dict without ``type``, as in mmdet's PVT configs.

    Raises:
        ConfigError: if ``init_cfg`` is malformed or names no file, so that the stock backbone would fail as well.
    """
    init_cfg = getattr(host, 'init_cfg', None)
    if not init_cfg:
        return None
    reads_itself, pretrained = find_host(host).reads_checkpoint, None
    for cfg in init_cfg if isinstance(init_cfg, list | tuple) else [init_cfg]:
        if not isinstance(cfg, Mapping) or not ('type' in cfg or (reads_itself and 'checkpoint' in cfg)):
            raise _invalid_init_cfg(host, "it must be a dict with a type, or a list of such dicts: "
                                          "dict(type='Pretrained', checkpoint='/path/or/address')")  # fmt: skip
        if is_type(cfg, 'Pretrained') or (reads_itself and 'checkpoint' in cfg):
            pretrained = cfg
    if pretrained is None:
        return None
    if not isinstance(pretrained.get('checkpoint'), str) or not isinstance(pretrained.get('prefix') or '', str):
        raise _invalid_init_cfg(host, "Pretrained needs checkpoint='/path/or/address', and may have prefix='backbone.'")
    return dict(file=pretrained['checkpoint'], prefix=pretrained.get('prefix') or '')


def initialise_as_stock(host: nn.Module) -> None:
    """Run the stock backbone's own ``init_weights``.

    Raises:
        ConfigError: if it cannot use its ``init_cfg``.
    """
    try:
        type(host).init_weights(host)
    except (AssertionError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if host.init_cfg is None or isinstance(error, UserError):
            raise
        raise _invalid_init_cfg(host, f'the stock backbone fails with it ({type(error).__name__}: {error})') from error


def _invalid_init_cfg(host: nn.Module, reason: str) -> ConfigError:
    return ConfigError(
        f'init_cfg={host.init_cfg!r} of the {type(host).__name__} is not valid: {reason}. Set init_cfg=None to start '
        'from random weights.'
    )


@dataclass(frozen=True)
class LoadReport:
    """The result of loading a file, by the names of tensors in the model.

    Args:
        file: the file.
        format: the format of the names in the file; see :mod:`mona_mm.checkpoint.convert`.
        loaded: the tensors of the model that were loaded from the file.
        missing: the tensors of the model that are not in the file and may be absent.
        unexpected: the tensors of the file that are not in the model and may be absent there.
        resized: the loaded tensors that were interpolated, as (name, shape in the file, shape in the model).
    """

    file: str
    format: str
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    resized: list[tuple[str, tuple[int, ...], tuple[int, ...]]]

    def lines(self, every: bool = False) -> list[str]:
        """Format the report as lines of text, with the first three names of each list, or all with ``every``."""
        resized = [f'{name} {old} to {new}' for name, old, new in self.resized]
        lines = [f'{self.file} (names: {self.format}): {len(self.loaded)} tensors loaded']
        for label, names in (('missing', self.missing), ('unexpected', self.unexpected), ('resized', resized)):
            if names:
                lines.append(_list_first(f'{label}, {len(names)}: ', names, len(names) if every else 3))
        return lines


def load_pretrained(backbone: nn.Module, file: str, prefix: str = '') -> LoadReport:
    """Load a pretrained base into a supported backbone, in place, and log a report.

    Relative-position tables of another window size are interpolated (bicubic); position embeddings of another image
    size are resized by the host. The parameters of a method and the norms of the backbone's outputs, which pretrained
    models do not have, may be absent from the file; everything else must be present.

    Args:
        backbone: an instance of one of :data:`mona_mm.hosts.HOSTS`, with or without a method.
        file: a path or an address that mmengine can read, or a folder with the weights of a model as Hugging Face's hub
            has them.
        prefix: the prefix of the backbone's names in the file; by default ``backbone.`` if names have it.

    Raises:
        MissingFileError: if the file does not exist or cannot be downloaded; the error tells where to put it.
        CheckpointMismatchError: if the file is not a checkpoint or does not fit; the error names the first tensors that
            do not fit.
    """
    host = find_host(backbone)
    form, state_dict = _converted(host, backbone, read_checkpoint(file), prefix)
    current = backbone.state_dict()
    in_file = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    if host.fit_checkpoint is not None:
        host.fit_checkpoint(state_dict, current)
    for name in state_dict.keys() & current.keys():
        shape = current[name].shape
        if state_dict[name].shape != shape and _squeezed(state_dict[name]) == _squeezed(current[name]):
            # a 1x1 convolution where the file has a linear layer, or vice versa
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
        f'Loaded {len(loaded)} tensors of the base from {file}; {len(absent)} others (of the method and the output '
        f'norms) keep their initial values.{" ".join(["", *report.lines()[1:]])}',
        logger='current',
    )
    return report


def _converted(host: Host, backbone: nn.Module, checkpoint: dict, prefix: str) -> tuple[str, dict[str, Tensor]]:
    """The name of a checkpoint's format, and its tensors by the names of the backbone as far as they are known."""
    tensors = backbone_tensors(checkpoint, prefix)
    if host.own_format is None:
        # unknown names are found when loading is rehearsed
        return recognise(tensors) or 'unknown', convert_state_dict(checkpoint, prefix, known=False)
    if tensors.keys() & backbone.state_dict().keys():
        return 'mm', tensors
    form, convert = host.own_format
    return form, convert(backbone, tensors)


def read_checkpoint(file: str, map_location: Any = 'cpu') -> dict:
    """Read a checkpoint by mmengine's loaders, with the checks of :mod:`mona_mm.checkpoint.loading`.

    Of a folder, the file of weights that it has under one of the usual names of Hugging Face's hub is read, or the
    files that its index names.

    Raises:
        MissingFileError: if the file does not exist or cannot be downloaded; the error tells where to put it.
        CheckpointMismatchError: if the file is not a checkpoint that weights-only loading can read.
    """
    try:
        if isdir(file):
            parts = [CheckpointLoader.load_checkpoint(part, map_location=map_location) for part in _weights_in(file)]
            return {name: tensor for part in parts for name, tensor in part.items()}
        return CheckpointLoader.load_checkpoint(file, map_location=map_location)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(
            f'There is no checkpoint {file}. Name another one in init_cfg (in the shipped configs with {_OPTION}), or '
            'set model.backbone.base.init_cfg=None to start from random weights.'
        ) from error


def _weights_in(folder: str) -> list[str]:
    """The files of weights in a folder, as Hugging Face's hub names them."""
    for name in ('model.safetensors', 'pytorch_model.bin'):
        if isfile(join(folder, name)):
            return [join(folder, name)]
        index = join(folder, f'{name}.index.json')
        if isfile(index):
            try:
                with open(index, encoding='utf-8') as file:
                    parts = sorted(set(json.load(file)['weight_map'].values()))
                return [join(folder, basename(part)) for part in parts]
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise CheckpointMismatchError(f'{index} is no index of a checkpoint ({reason(error)}).') from error
    raise MissingFileError(
        f'The folder {folder} has no model.safetensors, no pytorch_model.bin and no index of either.'
    )


def download_place(address: str) -> str:
    """The path under which a downloaded file is kept.

    It is torch.hub's path, but with a folder for every address in the formats of :data:`FETCHED`, since deltas and
    safetensors files of different models often have the same name.
    """
    folder, path = join(torch.hub.get_dir(), 'checkpoints'), urlparse(address).path
    if path.endswith(FETCHED):
        folder = join(folder, sha256(address.encode()).hexdigest()[:8])
    return join(folder, basename(path))


def unreachable(file: str, error: Exception) -> MissingFileError:
    """Make the error for an address that could not be downloaded, with the reason and the place for the file."""
    return MissingFileError(
        f'Cannot download {file} ({error}). Download it on a machine with network access, and either put it at '
        f'{download_place(file)}, where the next run finds it, or name its path in init_cfg: {_OPTION}'
    )


def unreadable(file: str, error: Exception) -> CheckpointMismatchError:
    """Make the error for a file that could not be read, with the reason and the way to convert it."""
    return CheckpointMismatchError(
        f'{file} cannot be read as a checkpoint of weights: it is damaged, not a checkpoint, or contains more than '
        f'weights-only loading allows ({reason(error)}). No pickle in it was executed. If you trust its source, '
        'python tools/convert_checkpoint.py --trust-pickle FILE OUT executes it once and writes only the weights.'
    )


def reason(error: Exception) -> str:
    """The first line of an error, without the advice with which torch's errors about weights-only loading begin."""
    message = str(error).rpartition('WeightsUnpickler error: ')[2].lstrip()
    return f'{type(error).__name__}: {message.partition(chr(10))[0]}'


def _squeezed(tensor: Tensor) -> tuple[int, ...]:
    return tuple(length for length in tensor.shape if length > 1)


def compare(current: Mapping[str, Tensor], given: Mapping[str, Tensor], optional: Callable[[str], bool]) -> str:
    """Describe how the keys and shapes of ``given`` differ from ``current``; the empty string if they fit.

    Keys that are ``optional`` may be in only one of the two.
    """
    missing = [name for name in current if name not in given]
    unexpected = [name for name in given if name not in current]
    reshaped = [
        f'{name} {tuple(given[name].shape)} instead of {tuple(tensor.shape)}'
        for name, tensor in current.items()
        if name in given and given[name].shape != tensor.shape
    ]
    return _describe_misfit(missing, unexpected, reshaped, optional)


def misfit(rehearsal: Rehearsal, optional: Callable[[str], bool]) -> str:
    """Describe the tensors that do not fit in a rehearsal of loading; the empty string if all of them fit.

    Keys that are ``optional`` may be missing in the file or in the model. The tensors that a host computes from its
    configuration are not compared.
    """
    reshaped = [f'{n} {shapes}' for n, shapes in rehearsal.reshaped.items() if not n.endswith(recomputed_names())]
    missing = [name for name in rehearsal.missing if not name.endswith(recomputed_names())]
    unexpected = [name for name in rehearsal.unexpected if not name.endswith(recomputed_names())]
    wrong = _describe_misfit(missing, unexpected, reshaped, optional)
    return f'{wrong} The model cannot load it: {rehearsal.problem}.'.strip() if rehearsal.problem else wrong


def _describe_misfit(
    missing: Sequence[str], unexpected: Sequence[str], reshaped: Sequence[str], optional: Callable[[str], bool]
) -> str:
    missing = [name for name in missing if not optional(name)]
    unexpected = [name for name in unexpected if not optional(name)]
    parts = [
        _list_first('other shapes: ', reshaped),
        _list_first('missing: ', missing),
        _list_first('unexpected: ', unexpected),
    ]
    return ' '.join(part for part in parts if part)


def _list_first(label: str, names: Sequence[str], count: int = 3) -> str:
    if not names:
        return ''
    more = f' and {len(names) - count} more' if len(names) > count else ''
    return f'{label}{", ".join(names[:count])}{more}.'
