"""Measure speed and memory, as ratios, in one run: python tools/benchmark.py --suite module|backbone|detector|spt

With --against hf-peft, LoRA and that of Hugging Face's PEFT on the same networks; with --against plain, every method by
the faster forms and by the plain ones.

Every suite runs its variants in turns, such as the published formula, the stock host, the methods and full tuning. It
prints medians, quartiles, and the time that the operations and bytes would take at the measured rates of this machine.
"""

import argparse
import os.path as osp
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

import mona_mm  # noqa: F401  imported first, because it makes the OpenMMLab libraries importable
from mona_mm.benchmark import backbone, detector, hf_peft, module, plain, spt
from mona_mm.benchmark.records import SUITES, read_records, write_record
from mona_mm.commands.cli import run
from mona_mm.errors import ConfigError
from mona_mm.nn.choice import chosen
from mona_mm.report.memory import peak_of_process
from mona_mm.report.processor import processor_name

CONFIGS = osp.join(osp.dirname(osp.dirname(osp.abspath(__file__))), 'configs')
WHOLE = {'backbone', 'detector'}
AGAINST = ('hf-peft', 'plain')
# The options that only some suites have. Their default is None, so that check() can tell whether they were given.
OPTION_SUITES = dict(
    sizes={'module', *WHOLE, *AGAINST},
    arch={'module', *WHOLE, *AGAINST},
    methods={*WHOLE, 'plain'},
    precision={'module', *WHOLE, *AGAINST},
    inference=WHOLE,
    plot=WHOLE,
    counts={'spt'},
)


def main() -> None:
    parser = argparse.ArgumentParser(description='Measure speed and memory, as ratios, in one run')
    suites = [suite for suite in SUITES if suite not in AGAINST]
    parser.add_argument('--suite', nargs='+', choices=suites, help='default: backbone')
    parser.add_argument(
        '--against',
        choices=AGAINST,
        help="no suite, but LoRA beside that of Hugging Face's PEFT, or each method beside its plain form (fast=False)",
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--sizes', nargs='+', metavar='SIZE', help='of images: 224, 800x1216 (default: 224 512)')
    parser.add_argument(
        '--arch', nargs='+', choices=backbone.ARCHS, help='default: b; with --against all but b, l and dinov2_b'
    )
    parser.add_argument(
        '--methods',
        nargs='+',
        choices=backbone.VARIANTS,
        metavar='METHOD',
        help='suites backbone and detector: these, and the one that ratios are to (full; under --inference stock), of '
        f'{", ".join(backbone.VARIANTS)} (default: all)',
    )
    parser.add_argument('--batch', type=int, help='images (default: 1; suite spt: 8)')
    parser.add_argument(
        '--counts', nargs='+', type=int, metavar='K', help='suite spt: of single weights (default: 1024 16384 131072)'
    )
    parser.add_argument('--repeats', type=int, help='rounds, after one that does not count (default: 9)')
    parser.add_argument('--precision', choices=('fp32', 'bf16'), help='bf16: by autocast (default: fp32)')
    parser.add_argument(
        '--inference', action='store_true', default=None, help='suites backbone and detector: inference, not training'
    )
    parser.add_argument('--threads', type=int, help='of torch on a CPU')
    parser.add_argument(
        '--processor-time', action='store_true', help='of the one thread, instead of wall-clock time (--threads 1)'
    )
    parser.add_argument('--json', metavar='FILE', help='write all figures here, again after every row')
    parser.add_argument('--plot', metavar='FILE.png', help='suites backbone and detector: cost against size')
    parser.add_argument(
        '--from-json',
        nargs='+',
        metavar='FILE',
        help='measure nothing: table and --plot of what --json wrote, of several runs together',
    )
    args = parser.parse_args()
    check(args)
    if args.from_json:
        machines, results = read_records(args.from_json)
        if args.plot and not WHOLE.intersection(results):
            raise ConfigError(f'--plot is of the suites backbone and detector; the files have {", ".join(results)}.')
        for file, machine in zip(args.from_json, machines, strict=True):
            print(f'{file}: {describe(machine)}')
        for suite, rows in results.items():
            show(suite, iter(rows))
    else:
        results = measure(args)
    if args.plot:
        from mona_mm.benchmark.plot import plot_cost  # here, because matplotlib is slow to import

        plot_cost([row for suite, rows in results.items() if suite in WHOLE for row in rows], args.plot)
        print(f'\nPicture: {args.plot}')


def measure(args: argparse.Namespace) -> dict[str, list]:
    """Measure every suite, and print and write each row as it comes.

    Returns:
        The rows by suite.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16)[args.precision or 'fp32']
    clock = time.thread_time if args.processor_time else time.perf_counter
    machine = measure_machine(args, dtype, clock)
    print(describe(machine))
    results: dict[str, list] = {}

    def keep(rows: Iterator[Any], suite: str) -> Iterator[Any]:
        results[suite] = []
        for row in rows:
            results[suite].append(row)
            if args.json:
                write_record(args.json, machine, results)
            yield row

    if args.json:
        write_record(args.json, machine, results)  # fails here, before measuring, if the file cannot be written
    default = {'hf-peft': hf_peft.DEFAULT_ARCHS, 'plain': ('t', 'dinov2_s')}.get(args.against, ['b'])
    archs, batch = args.arch or default, args.batch or 1
    sizes = [parse_size(text) for text in args.sizes or (['224'] if args.against else ['224', '512'])]
    for suite in chosen_suites(args):
        options = dict(device=args.device, repeats=args.repeats or 9, clock=clock)
        if suite == 'spt':
            rows = spt.run(**options, counts=args.counts or spt.COUNTS, tokens=(args.batch or 8) * spt.IMAGE)
        elif suite == 'module':
            hosts = [f'swin_{arch}' for arch in archs]
            rows = module.run(**options, hosts=hosts, sizes=sizes, batch=batch, dtype=dtype)
        elif suite == 'plain':
            options |= dict(archs=archs, sizes=sizes, batch=batch, dtype=dtype)
            rows = plain.run(**options, methods=args.methods)
        elif suite == 'hf-peft':
            rows = hf_peft.run(**options, archs=archs, sizes=sizes, batch=batch, dtype=dtype)
        else:
            options |= dict(archs=archs, sizes=sizes, batch=batch, dtype=dtype)
            options |= dict(methods=args.methods, inference=bool(args.inference))
            rows = backbone.run(**options) if suite == 'backbone' else detector.run(CONFIGS, **options)
        show(suite, keep(rows, suite))
    print(f'\nForms that were chosen by measurement: {describe_choices() or "none"}')
    print(f'The process used {peak_of_process() / 2**30:.1f} GiB of memory at most.')
    return results


def describe_choices() -> str:
    """For each kind of computation, how many shapes every form was chosen for."""
    counts: dict[str, Counter] = {}
    for name, *_, form in chosen():
        counts.setdefault(name, Counter())[form] += 1
    return '; '.join(
        f'{name}: ' + ', '.join(f'{form} {count}' for form, count in forms.most_common())
        for name, forms in sorted(counts.items())
    )


def chosen_suites(args: argparse.Namespace) -> list[str]:
    """The suites to measure, each once."""
    return [args.against] if args.against else list(dict.fromkeys(args.suite or ['backbone']))


def show(suite: str, rows: Iterator[Any]) -> None:
    """Print the table of a suite row by row, and then the targets."""
    print(f'\n{suite}: medians (first to third quartile)\n', flush=True)
    seen: list[Any] = []
    for row in rows:
        head = SUITES[suite].header(row)
        if not seen or head != SUITES[suite].header(seen[-1]):
            print(head)
        print(SUITES[suite].line(row), flush=True)
        seen.append(row)
    if suite in WHOLE or suite == 'plain':
        print('\n' + '\n'.join(SUITES[suite].targets(seen)))


def parse_size(text: str) -> tuple[int, int]:
    """Convert ``'224'`` or ``'800x1216'`` to ``(height, width)``.

    Raises:
        ConfigError: if the text has neither form, or a side is 0.
    """
    if not re.fullmatch(r'\d+(x\d+)?', text) or 0 in (sides := [int(side) for side in text.split('x')]):
        raise ConfigError(f'--sizes {text}: a size is the side of a square, 224, or height and width, 800x1216.')
    return sides[0], sides[-1]


def check(args: argparse.Namespace) -> None:
    """Check all options before anything that takes time.

    Raises:
        ConfigError: if an option has an unusable value, or does not go with the others.
    """
    if args.plot and not (args.plot.endswith('.png') and not osp.isdir(args.plot)):
        raise ConfigError(f'--plot {args.plot}: the picture is a file whose name ends in .png.')
    if args.from_json:
        names = ('suite', 'against', 'sizes', 'arch', 'methods', 'batch', 'counts', 'repeats', 'precision', 'inference')
        given = [n for n in (*names, 'threads', 'processor_time', 'json') if getattr(args, n) not in (None, False)]
        if given:
            raise ConfigError(f'--from-json measures nothing: leave out --{given[0].replace("_", "-")}.')
        return
    for text in args.sizes or ():
        parse_size(text)
    for name in ('repeats', 'batch', 'threads'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f'--{name} {getattr(args, name)} must be at least 1.')
    if args.counts and not all(1 <= count <= spt.VIT_B[0] * spt.VIT_B[1] for count in args.counts):
        raise ConfigError(f'--counts must be from 1 to {spt.VIT_B[0] * spt.VIT_B[1]}, all weights of the layer.')
    if args.against and args.suite:
        raise ConfigError('--against measures no suite: leave out --suite.')
    suites = chosen_suites(args)
    vits = [arch for arch in args.arch or () if arch in backbone.VITS]
    if vits and not {'backbone', *AGAINST}.issuperset(suites):
        raise ConfigError(f'--arch {vits[0]} is of the suite backbone and of --against; the others measure Swins.')
    for name, having in OPTION_SUITES.items():
        if getattr(args, name) is not None and not having.intersection(suites):
            raise ConfigError(f'--{name} is of the suites {", ".join(s for s in SUITES if s in having)}; give --suite.')
    if args.against == 'hf-peft':
        hf_peft.import_peft()
    device = check_device(args.device)
    if args.processor_time and (args.threads != 1 or device.type != 'cpu'):
        raise ConfigError('--processor-time is that of one thread: give --threads 1, on a CPU.')
    backbone.choose_variants(args.methods, bool(args.inference))


def check_device(name: str) -> torch.device:
    """Convert the name of a device, and check that this machine has it.

    Raises:
        ConfigError: if the device is unknown, is neither a CPU nor CUDA, or does not exist on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f'--device {name}: torch knows no such device; use cpu or cuda.') from None
    if device.type not in ('cpu', 'cuda'):
        raise ConfigError(f'--device {name}: measured are cpu and cuda.')
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f'--device {name}: torch finds no such CUDA device here; use --device cpu.')
    return device


def measure_machine(args: argparse.Namespace, dtype: torch.dtype, clock) -> dict[str, str]:
    """Describe the machine on which the figures are measured, including its measured rates."""
    operations, moved = module.rates(args.device, dtype, clock)
    cuda = torch.device(args.device).type == 'cuda'
    return dict(
        device=torch.cuda.get_device_name(args.device) if cuda else processor_name(),
        threads=str(torch.get_num_threads()),
        clock='processor time' if args.processor_time else 'wall-clock time',
        torch=torch.__version__,
        products=f'{operations / 1e9:,.0f} GFLOP/s',
        copies=f'{moved / 1e9:,.1f} GB/s',
    )


def describe(machine: dict[str, str]) -> str:
    return ', '.join(f'{key} {value}' for key, value in machine.items())


if __name__ == '__main__':
    run(main)
