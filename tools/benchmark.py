"""Speed and memory as ratios, measured in one run: python tools/benchmark.py --suite module|backbone|detector|spt

Every suite compares in turns the published formula, the stock host, every method and full tuning, and gives medians,
quartiles, and the time that the operations and bytes would take at this machine's measured rates.
"""

import argparse
import json
import os.path as osp
import platform
import re
import time
from dataclasses import asdict

import torch

import mona_mm  # noqa: F401  first: it makes the OpenMMLab libraries importable
from mona_mm.benchmark import backbone, detector, module, spt
from mona_mm.cli import run
from mona_mm.errors import ConfigError

SUITES = ('module', 'backbone', 'detector', 'spt')
CONFIGS = osp.join(osp.dirname(osp.dirname(osp.abspath(__file__))), 'configs')


def main() -> None:
    parser = argparse.ArgumentParser(description='Measure speed and memory, as ratios, in one run')
    parser.add_argument('--suite', nargs='+', choices=SUITES, default=['backbone'], help='default: backbone')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--sizes', nargs='+', default=['224', '512'], metavar='SIZE', help='of images: 224, 800x1216 (default: 224 512)'
    )
    parser.add_argument('--arch', nargs='+', choices=('t', 'b', 'l'), default=['b'], help='of the Swin (default: b)')
    parser.add_argument(
        '--methods',
        nargs='+',
        choices=backbone.METHODS,
        default=backbone.METHODS,
        metavar='METHOD',
        help='default: all',
    )
    parser.add_argument('--batch', type=int, default=1, help='images (default: 1)')
    parser.add_argument('--repeats', type=int, default=9, help='rounds (default: 9)')
    parser.add_argument('--precision', choices=('fp32', 'bf16'), default='fp32', help='bf16: by autocast')
    parser.add_argument(
        '--inference', action='store_true', help='suites backbone and detector: inference, not training'
    )
    parser.add_argument('--threads', type=int, help='of torch on a CPU')
    parser.add_argument('--processor-time', action='store_true', help='of the one thread, instead of wall-clock time')
    parser.add_argument('--json', metavar='FILE', help='write all figures here')
    parser.add_argument('--plot', metavar='FILE', help='suites backbone and detector: cost against size, as a PNG')
    args = parser.parse_args()
    sizes = [parse_size(text) for text in args.sizes]
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16)[args.precision]
    clock = time.thread_time if args.processor_time else time.perf_counter

    machine = describe(args.device, dtype, clock)
    print(', '.join(f'{key} {value}' for key, value in machine.items()))
    print('Medians, and first to third quartile.', flush=True)
    results: dict[str, list] = {}
    options = dict(repeats=args.repeats, batch=args.batch, dtype=dtype, clock=clock)
    for suite in args.suite:
        if suite == 'module':
            hosts = [f'swin_{arch}' for arch in args.arch]
            rows = module.run(args.device, hosts=hosts, sizes=sizes, **options)
            tables = [module.table(rows)]
        elif suite == 'spt':
            rows = spt.run(args.device, args.repeats)
            tables = [spt.table(rows)]
        else:
            options_ = dict(options, archs=args.arch, sizes=sizes, methods=args.methods, inference=args.inference)
            if suite == 'backbone':
                rows = list(backbone.run(args.device, **options_))
            else:
                rows = list(detector.run(CONFIGS, args.device, **options_))
            tables = [backbone.table(rows), '\n'.join(backbone.targets(rows))]
        results[suite] = rows
        print(f'\n{suite}')
        print('\n\n'.join(text for text in tables if text), flush=True)
    if args.json:
        record = dict(machine=machine, **{suite: [asdict(row) for row in rows] for suite, rows in results.items()})
        with open(args.json, 'w') as file:
            json.dump(record, file, indent=1)
    if args.plot:
        from mona_mm.benchmark.plot import plot_cost

        plot_cost([row for suite in ('backbone', 'detector') for row in results.get(suite, [])], args.plot)


def parse_size(text: str) -> tuple[int, int]:
    """``'224'`` or ``'800x1216'`` to (height, width)."""
    if not re.fullmatch(r'\d+(x\d+)?', text) or 0 in (sides := [int(side) for side in text.split('x')]):
        raise ConfigError(f'--sizes {text}: a size is the side of a square, 224, or height and width, 800x1216.')
    return sides[0], sides[-1]


def check(args: argparse.Namespace) -> None:
    if args.repeats < 1 or args.batch < 1:
        raise ConfigError(f'--repeats {args.repeats} and --batch {args.batch} must be at least 1.')
    if torch.device(args.device).type == 'cuda' and not torch.cuda.is_available():
        raise ConfigError(f'--device {args.device}: torch finds no CUDA device here; use --device cpu.')
    if args.processor_time and (args.threads != 1 or torch.device(args.device).type != 'cpu'):
        raise ConfigError('--processor-time is that of one thread: give --threads 1, on a CPU.')
    if 'module' in args.suite and 't' in args.arch:
        raise ConfigError('--suite module has the Swins b and l; leave out --arch t.')
    if args.plot and not {'backbone', 'detector'}.intersection(args.suite):
        raise ConfigError('--plot is of the suites backbone and detector.')


def describe(device: str, dtype: torch.dtype, clock) -> dict[str, str]:
    """What the figures were measured on."""
    operations, moved = module.rates(device, dtype, clock)
    cuda = torch.device(device).type == 'cuda'
    return dict(
        device=torch.cuda.get_device_name(device) if cuda else f'{platform.machine()} CPU',
        threads=str(torch.get_num_threads()),
        torch=torch.__version__,
        products=f'{operations / 1e9:,.0f} GFLOP/s',
        copies=f'{moved / 1e9:,.1f} GB/s',
    )


if __name__ == '__main__':
    run(main)
