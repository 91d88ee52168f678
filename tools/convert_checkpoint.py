"""Convert a checkpoint: python tools/convert_checkpoint.py SRC DST [--config CONFIG] [--to mm|published|colin]"""

import argparse
import io
import re
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from mmengine.registry import MODELS
from torch import Tensor

import mona_mm  # noqa: F401  imported first, because it makes the OpenMMLab libraries importable
from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.checkpoint.convert import (
    backbone_tensors,
    convert_model,
    left_out,
    recognise,
    to_colin,
    to_published,
    unwrap_checkpoint,
)
from mona_mm.checkpoint.delta_file import SUFFIX
from mona_mm.checkpoint.pretrained import load_pretrained, read_checkpoint
from mona_mm.commands.cli import new_file, run
from mona_mm.config.load import load_config
from mona_mm.errors import CheckpointMismatchError, ConfigError, MissingFileError
from mona_mm.hosts import method_names
from mona_mm.type_names import enter_scope

CONVERTERS = dict(mm=convert_model, published=to_published, colin=to_colin)


def read(args: argparse.Namespace) -> dict:
    """Read the checkpoint; with ``--trust-pickle``, its pickle may execute any code.

    Raises:
        MissingFileError: if there is no such file.
        CheckpointMismatchError: if the file cannot be read as a checkpoint.
    """
    if not args.trust_pickle:
        return read_checkpoint(args.src)
    if args.src.endswith(('.npz', '.safetensors')):
        return read_checkpoint(args.src)  # these formats have no pickle
    print(f'Executing whatever {args.src} says, as asked.')
    try:
        checkpoint = torch.load(args.src, map_location='cpu', weights_only=False)
    except FileNotFoundError:
        raise MissingFileError(f'There is no checkpoint {args.src}.') from None
    except Exception as error:  # a damaged file can make torch raise anything, and so can a pickle
        reason = f'{type(error).__name__}: {str(error).partition(chr(10))[0]}'
        raise CheckpointMismatchError(f'{args.src} cannot be read as a checkpoint: {reason}.') from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointMismatchError(f'{args.src} is no checkpoint: it holds a {type(checkpoint).__name__}.')
    return checkpoint


def for_config(args: argparse.Namespace) -> dict[str, Tensor]:
    """Load the weights into the backbone of the config as training would, and print a report of every tensor."""
    cfg = load_config(args.config)
    enter_scope(cfg)
    config = cfg.model
    while 'backbone' not in config and 'base' in config:  # a PeftModel or FrozenModel around the model
        config = config.base
    backbone = MODELS.build(config.backbone)
    report = load_pretrained(backbone, args.src)
    print('\n'.join(report.lines(every=True)))
    method = method_names(backbone)
    return {f'backbone.{name}': tensor for name, tensor in backbone.state_dict().items() if name not in method}


def main() -> None:
    parser = argparse.ArgumentParser(
        description='Bring a checkpoint into the names and layouts of mmdet, mmseg and mmpretrain, or back. The format '
        'is recognised: Swin and SwinV2 (Microsoft, timm), the published Mona and ParaX code, CoLin and LoRand in the '
        'CoLin release, ViT (timm, MAE, MoCo v3, .npz), ConvNeXt (official, timm), PVT'
    )
    parser.add_argument('src', help='checkpoint (.pth, .safetensors or .npz)')
    parser.add_argument('dst', type=new_file, help='file to write (.pth or .safetensors)')
    parser.add_argument('--to', choices=CONVERTERS, default='mm', help='names to write (default: mm)')
    parser.add_argument('--config', help='fit the weights to the backbone of this config, resizing position tables')
    parser.add_argument('--trust-pickle', action='store_true', help='execute the pickle of a file that needs it')
    args = parser.parse_args()
    if not args.dst.endswith(('.pth', '.safetensors')) or args.dst.endswith('.delta.safetensors'):
        raise ConfigError(f'{args.dst}: what is converted is written as .pth or .safetensors.')
    if args.src.endswith(SUFFIX):
        raise ConfigError(
            f'{args.src} is a delta, without its base: python tools/delta.py merge CONFIG {args.src} OUT makes a '
            'checkpoint of it.'
        )
    if args.config:
        if args.to != 'mm' or args.trust_pickle:
            raise ConfigError(
                '--config is for converting to the names of mm; --to and --trust-pickle do not go with it.'
            )
        checkpoint = dict(state_dict=for_config(args))
    else:
        checkpoint = without_config(args)
    tensors = checkpoint['state_dict']
    if args.dst.endswith('.pth'):
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        data = buffer.getvalue()
    else:
        data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    AtomicLocalBackend().put(data, args.dst)


def without_config(args: argparse.Namespace) -> dict:
    """Convert the weights by their names alone.

    With ``--trust-pickle``, the weights of an unknown format keep their names, and the plain part of the checkpoint's
    ``meta`` is kept, too.

    Raises:
        CheckpointMismatchError: if the format of the checkpoint is unknown and may not be kept.
    """
    checkpoint = read(args)
    form = recognise(backbone_tensors(checkpoint))
    if form is None and (not args.trust_pickle or args.to != 'mm' or not unwrap_checkpoint(checkpoint)):
        names = ', '.join(list(backbone_tensors(checkpoint))[:3]) or 'no tensors at all'
        raise CheckpointMismatchError(
            f'{args.src}: these names are of no known format ({names}, ...). Known are Swin and SwinV2 (Microsoft, '
            'timm), the published Mona and CoLin code, ViT (timm, MAE, MoCo v3, .npz), ConvNeXt, PVT, and mmdet, '
            'mmseg, mmpretrain.'
        )
    if form is None:
        tensors = unwrap_checkpoint(checkpoint)
    else:
        tensors = CONVERTERS[args.to](checkpoint)
    parts = sorted({re.sub(r'\..*', '', name) for name in tensors})
    print(f'{args.src} (names: {form or "unknown, kept"}): {len(tensors)} tensors of {", ".join(parts)}')
    gone = left_out(form, backbone_tensors(checkpoint)) if args.to == 'mm' else []
    if gone:
        print(f'left out, because no backbone has them: {", ".join(gone)}')
    meta = plain(checkpoint.get('meta')) if args.trust_pickle else None
    return dict(state_dict=tensors, **dict(meta=meta) if meta else {})


def plain(value: Any) -> Any:
    """The part of a checkpoint's ``meta`` that weights-only loading reads: numbers, texts, dicts, lists and tuples."""
    if isinstance(value, Mapping):
        kept = {key: plain(entry) for key, entry in value.items() if isinstance(key, str | int)}
        return {key: entry for key, entry in kept.items() if entry is not None}
    if isinstance(value, list | tuple):
        return type(value)(plain(entry) for entry in value) if type(value) in (list, tuple) else None
    return value if type(value) in (str, int, float, bool) else None


if __name__ == '__main__':
    run(main)
