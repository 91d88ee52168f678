"""Let everything that loads checkpoints through mmengine load deltas: the Runner, ``init_detector``, the inferencers.

mmengine loads in two steps: it reads a file (:class:`CheckpointLoader`, by the form of its path), and it loads the
tensors into a model (``load_state_dict``). The second step must recognise a delta, since its base has to be loaded
first and checked. So the state dict carries the delta in its ``_metadata``, which mmengine passes on.
"""

import os
import os.path as osp
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any
from urllib.parse import urlparse

import numpy as np
import safetensors.torch
import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log
from mmengine.model import PretrainedInit, update_init_info
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import Tensor, nn

from mona_mm.checkpoint.delta import apply_delta
from mona_mm.checkpoint.delta_file import Delta, read_delta
from mona_mm.checkpoint.header import LONGEST_OF_OTHERS, check_length
from mona_mm.checkpoint.pretrained import (
    FETCHED,
    UNREACHABLE,
    download_place,
    misfit,
    read_checkpoint,
    unreachable,
    unreadable,
)
from mona_mm.checkpoint.rehearsal import load_state_dict as _load_state_dict
from mona_mm.checkpoint.rehearsal import model_state, rehearse
from mona_mm.compat.safe_globals import finished, weights_only
from mona_mm.errors import CheckpointMismatchError, ConfigError, UserError
from mona_mm.frozen.changes import changing
from mona_mm.hosts import PeftBlock, method_names, put_back
from mona_mm.methods.base import LinearModule
from mona_mm.nn.wrappers import innermost
from mona_mm.record import record_of

_WEB = ('http', 'https')
_CHUNK = 2**20
# The contents of a compressed archive may have this many bytes, or this many times the bytes of the file.
_LARGEST, _TIMES = 2**28, 20
_load_checkpoint = mmengine_checkpoint.CheckpointLoader.load_checkpoint.__func__


@wraps(_load_checkpoint)
def load_checkpoint(cls: type, filename: str, map_location: Any = None, logger: Any = 'current') -> dict[str, Any]:
    """mmengine's ``load_checkpoint``, with weights-only loading in every reader, and errors that are UserErrors.

    torch.hub, which downloads most addresses, calls torch.load without weights-only loading.
    """
    try:
        with weights_only():
            checkpoint = finished(_load_checkpoint(cls, _fetched(filename), map_location, logger))
    except (UserError, FileNotFoundError):
        raise
    except UNREACHABLE as error:
        raise unreachable(filename, error) from error
    except Exception as error:  # a damaged file can make a reader raise anything
        if urlparse(str(filename)).scheme in _WEB:
            filename = f'{filename} (kept at {download_place(filename)}; delete that file to download it again)'
        raise unreadable(filename, error) from error
    _check_state_dict(filename, checkpoint)
    return checkpoint


mmengine_checkpoint.CheckpointLoader.load_checkpoint = classmethod(load_checkpoint)
# A fork of mmengine allows getattr and numpy's classes in readers of other addresses, by which any object can be made.
if hasattr(mmengine_checkpoint, 'get_torch_safe_globals'):
    mmengine_checkpoint.get_torch_safe_globals = list


def _check_state_dict(filename: str, checkpoint: Any) -> None:
    """Refuse a checkpoint that is not a mapping of tensors by name, at each place where a reader looks for one."""
    found = [checkpoint]
    if isinstance(checkpoint, Mapping):
        if 'state_dict' in checkpoint:
            found.append(checkpoint['state_dict'])
        if isinstance(checkpoint.get('model'), Mapping):  # otherwise it may be the name of a model
            found.append(checkpoint['model'])
    for tensors in found:
        if not isinstance(tensors, Mapping):
            raise CheckpointMismatchError(
                f'{filename} is not a checkpoint: it holds a {type(tensors).__name__} and not tensors by name.'
            )
        wrong = [name for name, value in tensors.items() if isinstance(value, Tensor) and not isinstance(name, str)]
        if wrong:
            raise CheckpointMismatchError(
                f'{filename} is not a checkpoint: {str(wrong[0])[:80]} is not a name of a tensor.'
            )


def _fetched(filename: str) -> str:
    """The file itself, or for an address in a format of :data:`FETCHED` the path to which it was downloaded."""
    address = urlparse(str(filename))
    if address.scheme not in _WEB or not address.path.endswith(FETCHED):
        return filename
    file = download_place(filename)
    try:
        if is_main_process():
            _download(filename, file)
    finally:  # otherwise the other processes would wait, and report a lost connection to the main process
        barrier()
    _download(filename, file)  # for processes on other machines than the main process
    return file


def _download(address: str, file: str) -> None:
    if not osp.isfile(file):
        os.makedirs(osp.dirname(file), exist_ok=True)
        torch.hub.download_url_to_file(address, file, progress=False)


def _loader(pattern: str) -> Callable:
    """Decorate a reader of local files, to register it with mmengine for paths that match ``pattern``."""

    def register(read: Callable[[str, Any], dict[str, Any]]) -> Callable[[str, Any], dict[str, Any]]:
        @wraps(read)
        def local(filename: str, map_location: Any = None) -> dict[str, Any]:
            filename = osp.expanduser(filename)
            if not osp.isfile(filename):
                raise FileNotFoundError(f'{filename} cannot be found.')
            return read(filename, map_location)

        mmengine_checkpoint.CheckpointLoader.register_scheme(pattern, local, force=True)
        return local

    return register


@_loader('')
def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Load a file by torch, weights only, after checking its checksums, which torch writes but does not check.

    A fork of mmengine would try again without weights-only loading, and execute the pickle.
    """
    if zipfile.is_zipfile(filename):
        _check_archive(filename)
    return torch.load(filename, map_location=map_location, weights_only=True)


def _check_archive(filename: str, compressed: bool = False) -> None:
    """Refuse an archive that is damaged or would take much more memory than it has bytes.

    Neither torch nor numpy checks the checksums. Archives of torch are not compressed.
    """
    with zipfile.ZipFile(filename) as archive:
        infos, most = archive.infolist(), osp.getsize(filename)
        if compressed:
            most = max(_LARGEST, _TIMES * most)
        elif any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise zipfile.BadZipFile('its records are compressed, which torch never does')
        size = sum(info.file_size for info in infos)
        if size > most:
            raise zipfile.BadZipFile(f'its records would take {size:,} bytes, far more than the file')
        for info in infos:
            if info.CRC:  # it is 0 if the record is empty or torch was told not to write checksums
                with archive.open(info) as record:
                    while record.read(_CHUNK):  # raises at the end if the checksum differs
                        pass


@_loader(r'.*(?<!\.delta)\.safetensors$')
def load_from_safetensors(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Load tensors by name, as timm publishes them."""
    check_length(filename, LONGEST_OF_OTHERS)
    return safetensors.torch.load_file(filename)


@_loader(r'.*\.npz$')
def load_from_npz(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Load arrays by name, as Google publishes its ViT. Arrays of Python objects, which are pickles, are refused."""
    _check_archive(filename, compressed=True)
    with np.load(filename, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}


class _DeltaMetadata(OrderedDict):
    """The ``_metadata`` of a state dict that is a delta."""

    delta: Delta

    def __deepcopy__(self, memo: dict) -> '_DeltaMetadata':
        return self  # EMAHook copies state dicts; the delta is never changed


def is_delta(state_dict: Any) -> bool:
    """Whether a state dict that mmengine has read is a delta."""
    return isinstance(getattr(state_dict, '_metadata', None), _DeltaMetadata)


@_loader(r'.*\.delta\.safetensors$')
def load_from_delta(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Load a delta in the form of an mmengine checkpoint.

    The config in it is left out, since readers of checkpoints execute a config that they find there.
    """
    delta = read_delta(filename)
    header, progress = delta.header, dict(delta.header.progress)
    device = map_location if isinstance(map_location, str | torch.device) else 'cpu'
    state_dict = OrderedDict((name, tensor.to(device)) for name, tensor in delta.tensors.items())
    state_dict._metadata = _DeltaMetadata()
    state_dict._metadata.delta = delta
    meta = {key: progress[key] for key in ('epoch', 'iter', 'seed') if key in progress}
    if header.dataset_meta:
        meta['dataset_meta'] = {key: _tuple(value) for key, value in header.dataset_meta.items()}
    checkpoint = dict(
        state_dict=state_dict,
        meta=meta,
        message_hub=dict(log_scalars={}, runtime_info=_RuntimeInfo(progress.get('runtime_info', {})), resumed_keys={}),
    )
    if 'param_groups' in progress:
        checkpoint['optimizer'] = _optimizer(progress)
    if 'param_schedulers' in progress:
        checkpoint['param_schedulers'] = progress['param_schedulers']
    return checkpoint


class _RuntimeInfo(dict):
    """What a delta says about its run, for mmengine; who asks it for a config to execute is told that there is none."""

    def __missing__(self, key: str) -> Any:
        if key == 'cfg':
            raise ConfigError(
                'A delta holds no config that may be executed, so it cannot be a model alone: name its config as well, '
                "DetInferencer('config.py', 'epoch_1.delta.safetensors')."
            )
        raise KeyError(key)


def _tuple(value: Any) -> Any:
    """A value with tuples in place of lists, as it was before it became JSON (the names of classes, for instance)."""
    return tuple(_tuple(item) for item in value) if isinstance(value, list) else value


def _optimizer(progress: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer with its settings and without moments."""
    param_groups, count = [], 0
    for group in progress['param_groups']:
        size = group['params']
        param_groups.append({**group, 'params': list(range(count, count + size))})
        count += size
    state = dict(state={}, param_groups=param_groups)
    if 'base_param_settings' in progress:
        state['base_param_settings'] = {**progress['base_param_settings'], 'params': torch.zeros(1)}
    return state


Check = Callable[[nn.Module, Mapping, bool], tuple[Mapping, bool]]


class _CheckedMetadata(OrderedDict):
    """The ``_metadata`` of a state dict that is checked immediately before it is loaded."""

    check: Check

    def __deepcopy__(self, memo: dict) -> '_CheckedMetadata':
        return self  # EMAHook copies state dicts; the check is never changed


def check_loading(checkpoint: dict[str, Any], check: Check) -> None:
    """Call ``check(module, state_dict, strict)`` immediately before mmengine loads this checkpoint into a model.

    The check returns the state dict and the strictness with which to load. It is attached to the state dict as its
    ``_metadata``; for that the tensors are put into an ``OrderedDict`` under ``'state_dict'``, where mmengine looks
    first.
    """
    given = checkpoint.get('state_dict', checkpoint)
    state_dict = OrderedDict(given)
    state_dict._metadata = _CheckedMetadata(getattr(given, '_metadata', None) or {})
    state_dict._metadata.check = check
    checkpoint['state_dict'] = state_dict


@wraps(_load_state_dict)
def load_state_dict(module: nn.Module, state_dict: Mapping, strict: bool = False, logger: Any = None) -> None:
    metadata = getattr(state_dict, '_metadata', None)
    if not is_delta(state_dict):
        if isinstance(metadata, _CheckedMetadata):
            state_dict, strict = metadata.check(module, state_dict, strict)
        _load_state_dict(module, state_dict, strict, logger)
        _start_absent_methods(innermost(module), state_dict)
        return
    model, delta = innermost(module), metadata.delta
    expected = record_of(model)
    loaded = apply_delta(
        model,
        replace(delta, tensors=dict(state_dict)),
        expected.allow_other_base,
        base_file=expected.delta_base,
    )
    print_log(
        f'Loaded {delta.file}: {", ".join(f"{count:,} values of {part}" for part, count in loaded.parts.items())}.',
        logger=logger,
    )


mmengine_checkpoint.load_state_dict = load_state_dict


def _start_absent_methods(model: nn.Module, state_dict: Mapping) -> None:
    """Let the modules of a method that begin with the weights of their base begin with those that were loaded, unless
    their own tensors were loaded as well."""
    names = {name.removeprefix('module.') for name in state_dict}
    for path, block in model.named_modules():
        for site, module in block.peft.items() if isinstance(block, PeftBlock) else ():
            linear, prefix = block.spec.linears.get(site), f'{path}.' if path else ''
            own = {f'{prefix}peft.{site}.{name}' for name in module.state_dict()}
            is_beside_loaded = linear is not None and f'{prefix}{linear.weight}' in names
            if is_beside_loaded and own.isdisjoint(names) and isinstance(module, LinearModule):
                weight = block.get_parameter(linear.weight)
                module.start_from(weight.detach()[linear.rows(weight)].flatten(1))


def pretrained_init(self: PretrainedInit, module: nn.Module) -> None:
    """mmengine's initialisation from a file, in its own steps, with an error if frozen tensors would stay random."""
    target = 'model' if self.prefix is None else f'{self.prefix} in model'
    print_log(f'load {target} from: {self.checkpoint}', logger='current')
    checkpoint = read_checkpoint(self.checkpoint, self.map_location)
    if self.prefix is None:
        state_dict = model_state(checkpoint)
    else:
        given, prefix = checkpoint.get('state_dict', checkpoint), f'{self.prefix.removesuffix(".")}.'
        state_dict = {name.removeprefix(prefix): t for name, t in given.items() if name.startswith(prefix)}
        if not state_dict:
            raise CheckpointMismatchError(f'{self.checkpoint} has no tensor whose name begins with {prefix!r}.')
    with put_back(module):
        if not is_delta(state_dict):
            _check_frozen(self.checkpoint, module, state_dict)
        load_state_dict(module, state_dict, strict=False, logger='current')
    if hasattr(module, '_params_init_info'):  # it exists only while mmengine initialises a whole model
        update_init_info(module, f'{type(self).__name__}: load from {self.checkpoint}')


PretrainedInit.__call__ = pretrained_init


def _check_frozen(file: str, module: nn.Module, state_dict: Mapping) -> None:
    """Refuse a ``Pretrained`` ``init_cfg`` whose file lacks frozen tensors, of which mmengine only warns."""
    if not all(p.requires_grad for p in module.parameters()):
        trains = changing(module) | method_names(module)
        found = rehearse(module, state_dict)
        frozen = {name: tensor for name, tensor in found.reshaped.items() if name not in trains}
        wrong = misfit(replace(found, unexpected=[], reshaped=frozen), optional=lambda name: name in trains)
        if wrong:
            raise CheckpointMismatchError(
                f'{file} lacks frozen tensors of this {type(module).__name__}, which would stay random: {wrong} Name '
                'a checkpoint of the same architecture in init_cfg, or select these parameters in `trainable`.'
            )
