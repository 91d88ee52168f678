"""Handle deltas: python tools/delta.py info FILE | extract CONFIG CHECKPOINT OUT | merge CONFIG DELTA OUT | diff A B"""

import argparse
import io
import json
import os.path as osp
import sys

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn

import mona_mm  # noqa: F401  imported first, because it makes the OpenMMLab libraries importable
from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.checkpoint.base import base_file, whole_model_base
from mona_mm.checkpoint.delta import apply_delta, part_sizes, save_delta
from mona_mm.checkpoint.delta_file import Delta, read_delta
from mona_mm.checkpoint.merge import (
    merged_state_dict,
    self_contained_config,
    self_contained_state_dict,
    set_deploy,
    stock_config,
    types_left,
    unmergeable,
)
from mona_mm.checkpoint.pretrained import compare, misfit, read_checkpoint
from mona_mm.checkpoint.rehearsal import model_state, rehearse
from mona_mm.commands.cli import add_cfg_options, data_of, new_file, run
from mona_mm.config.build import build_on_meta, freeze_by_hooks
from mona_mm.config.load import adapt_to_device, default_work_dir, load_config
from mona_mm.errors import CheckpointMismatchError, ConfigError
from mona_mm.methods import deploy
from mona_mm.spt_plans.plans import put_plan_in, require_plan
from mona_mm.type_names import enter_scope


def info(args: argparse.Namespace) -> None:
    """Print the contents of a delta."""
    delta = read_delta(args.file)
    header, sizes = delta.header, part_sizes(delta.header, delta.tensors)
    tensors = {name: tensor for name, tensor in delta.tensors.items() if name not in header.shared}
    stored = {part: sum(t.nbytes for n, t in tensors.items() if header.part(n) == part) for part in sizes}
    if args.json:
        shown = {key: value for key, value in vars(header).items() if key not in ('config', 'base')}
        print(json.dumps(dict(file=args.file, bytes=osp.getsize(args.file), values=sizes, stored=stored, **shown)))
        return
    print(f'{args.file}: {osp.getsize(args.file):,} bytes, {len(tensors)} tensors')
    for path, method in header.methods.items():
        options = ', '.join(f'{name}={value!r}' for name, value in method['options'].items())
        dtype = f', frozen_dtype={method["frozen_dtype"]!r}' if 'frozen_dtype' in method else ''
        print(f'{path or "model"}: {method["type"] or "no method"}({options}), trainable={method["trainable"]}{dtype}')
    width = max(map(len, sizes))
    for part, count in sizes.items():
        print(f'  {part.ljust(width)}  {count:>13,} values  {stored[part]:>13,} bytes')
    print(f'frozen base: {header.base["count"]} tensors' + (f' of {header.base_file}' if header.base_file else ''))
    for label, entries in (('metrics', header.metrics), ('versions', header.versions)):
        if entries:
            print(f'{label}: {", ".join(f"{name} {value}" for name, value in entries.items())}')
    if 'iter' in header.progress:
        print(f'written at epoch {header.progress.get("epoch")}, iteration {header.progress["iter"]}')
    if header.dataset_meta.get('classes'):
        print(f'classes: {", ".join(map(str, header.dataset_meta["classes"]))}')
    if args.config:
        print(header.config)


def build(args: argparse.Namespace, file: str) -> tuple[Config, nn.Module]:
    """Build the config and its model, with random weights, for a delta or checkpoint ``file``."""
    cfg = load_config(args.config, args.cfg_options, data_of(args), write_data=False)
    require_plan(cfg, (osp.dirname(file), default_work_dir(cfg, args.config)))
    adapt_to_device(cfg)
    enter_scope(cfg)
    model = MODELS.build(cfg.model)
    freeze_by_hooks(model, cfg)
    return cfg, model


def extract(args: argparse.Namespace) -> None:
    """Write a delta with the trained values of a whole checkpoint."""
    cfg, model = build(args, args.checkpoint)
    checkpoint = read_checkpoint(args.checkpoint)
    state = model_state(checkpoint)
    wrong = misfit(rehearse(model, state), optional=lambda name: False)
    if wrong:
        raise CheckpointMismatchError(f'{args.checkpoint} is no whole checkpoint of {args.config}: {wrong}')
    model.load_state_dict(state, strict=False)  # SwinV2 itself drops the buffers that it recomputes
    meta = checkpoint.get('meta', {})
    save_delta(
        model, args.out, args.parts, args.half, config=cfg.pretty_text, base_file=base_file(cfg),
        dataset_meta=meta.get('dataset_meta'),
        progress={key: meta[key] for key in ('epoch', 'iter', 'seed') if key in meta},
    )  # fmt: skip
    print(f'{args.out}: {osp.getsize(args.out):,} bytes of {osp.getsize(args.checkpoint):,}')


def merge(args: argparse.Namespace) -> None:
    """Merge a delta and its base into one whole checkpoint."""
    if not args.out.endswith('.pth'):
        raise ConfigError(f'{args.out}: what is merged is written as .pth.')
    delta = read_delta(args.delta)
    if delta.header.parts is not None:
        raise ConfigError(f'{args.delta} holds only {", ".join(delta.header.parts)}: that makes no whole model.')
    cfg, model = build(args, args.delta)
    base = whole_model_base(cfg, args.delta)
    apply_delta(model, delta, args.allow_other_base, base_file=base)
    if cfg.get('resume'):  # the merged config must not resume a run
        cfg.merge_from_dict(dict(load_from=base, resume=False, base_checkpoint=None))
    left = unmergeable(model)
    if left or args.self_contained:
        folded = 0 if args.self_contained else deploy(model)
        state, config = self_contained_state_dict(model), self_contained_config(cfg)
        put_plan_in(config)
        reason = f'{", ".join(left)} computes what no stock model does' if left else 'as asked'
        print(f'One self-contained checkpoint with a config of its own in it ({reason}).')
        if folded:
            set_deploy(config)
            print(f'{folded} Mona modules are folded for inference; --self-contained keeps them as they are.')
    else:
        state, config = merged_state_dict(model), stock_config(cfg)
        print('A stock checkpoint: the stock config loads it, without mona_mm.')
        if types_left(config):
            print(f'Only the data of the config in it are read by mona_mm: {", ".join(types_left(config))}.')
    wrong = compare(build_on_meta(config).state_dict(), state, optional=lambda name: False)
    if wrong:
        raise CheckpointMismatchError(f'The merged weights would not fit the model of their config: {wrong}')
    config.load_from = osp.abspath(args.out)  # training with this config starts from the merged weights
    buffer = io.BytesIO()
    meta = dict(cfg=config.pretty_text)
    if delta.header.dataset_meta:  # without it, inference takes the class names from the config
        meta['dataset_meta'] = delta.header.dataset_meta
    torch.save(dict(state_dict=state, meta=meta), buffer)
    AtomicLocalBackend().put(buffer.getvalue(), args.out)
    if args.config_out:
        AtomicLocalBackend().put_text(config.pretty_text, args.config_out)


def diff(args: argparse.Namespace) -> None:
    """Print the differences of two deltas, and exit with status 1 if there are any."""
    first, second = read_delta(args.first), read_delta(args.second)
    lines = header_differences(first, second)
    for part in sorted({d.header.part(name) for d in (first, second) for name in d.tensors}):
        lines += tensor_differences(part, first, second)
    print('\n'.join(lines) or 'equal')
    sys.exit(1 if lines else 0)


def header_differences(first: Delta, second: Delta) -> list[str]:
    """List the differences in the headers of two deltas, one a line."""
    lines = []
    for key in ('methods', 'parts', 'half', 'base', 'base_file', 'versions', 'metrics', 'dataset_meta', 'config'):
        a, b = getattr(first.header, key), getattr(second.header, key)
        if a != b:
            lines.append(f'{key} differs' + ('' if key in ('base', 'config', 'dataset_meta') else f': {a} / {b}'))
    return lines


def tensor_differences(part: str, first: Delta, second: Delta) -> list[str]:
    """List the differences in the tensors of one part of the model, one a line."""
    a, b = ({n: t for n, t in d.tensors.items() if d.header.part(n) == part} for d in (first, second))
    lines = [f'{part}: {n} is only in the first' for n in a.keys() - b.keys()]
    lines += [f'{part}: {n} is only in the second' for n in b.keys() - a.keys()]
    common = sorted(a.keys() & b.keys())
    lines += [f'{part}: {n} is {tuple(a[n].shape)} / {tuple(b[n].shape)}' for n in common if a[n].shape != b[n].shape]
    changed = {n: distance(a[n], b[n]) for n in common if a[n].shape == b[n].shape and not torch.equal(a[n], b[n])}
    if changed:
        most = max(changed, key=changed.get)
        lines.append(f'{part}: {len(changed)} of {len(common)} tensors differ, most {most} by {changed[most]:.3g}')
    return sorted(lines)


def distance(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference of two tensors of the same shape."""
    return float((a.double() - b.double()).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description='Look into deltas, make them, merge them')
    commands = parser.add_subparsers(required=True, metavar='info|extract|merge|diff')

    command = commands.add_parser('info', help='what is inside')
    command.add_argument('file', help='delta')
    command.add_argument('--json', action='store_true', help='print one object')
    command.add_argument('--config', action='store_true', help='print the config of the run, too')
    command.set_defaults(function=info)

    command = commands.add_parser('extract', help='a delta from a whole checkpoint')
    command.add_argument('config')
    command.add_argument('checkpoint', help='whole checkpoint (.pth)')
    command.add_argument('out', type=new_file, help='delta to write (.delta.safetensors)')
    command.add_argument('--parts', nargs='+', help="of the model, e.g. 'method', 'neck', 'roi_head' (default: all)")
    command.add_argument('--half', action='store_true', help='round trained values to float16')
    add_cfg_options(command)
    command.set_defaults(function=extract)

    command = commands.add_parser(
        'merge', help='a stock checkpoint from a delta and its base, or a self-contained one where there can be none'
    )
    command.add_argument('config')
    command.add_argument('delta')
    command.add_argument('out', type=new_file, help='checkpoint to write (.pth)')
    command.add_argument('--self-contained', action='store_true', help='keep the method as it is')
    command.add_argument('--config-out', type=new_file, help='write the config that loads it here (.py)')
    command.add_argument('--allow-other-base', action='store_true', help='merge into another base than its own')
    add_cfg_options(command)
    command.set_defaults(function=merge)

    command = commands.add_parser('diff', help='how two deltas differ')
    command.add_argument('first')
    command.add_argument('second')
    command.set_defaults(function=diff)

    args = parser.parse_args()
    args.function(args)


if __name__ == '__main__':
    run(main)
