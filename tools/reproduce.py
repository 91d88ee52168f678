"""Compare published tables with your runs: python tools/reproduce.py collect|show|plan [PATH ...]

For tables whose cells are run on this machine: python tools/reproduce.py list | run TABLE | show TABLE | page TABLE
"""

import argparse
import importlib
import sys
from pathlib import Path

import mona_mm  # noqa: F401  imported first, because it makes the OpenMMLab libraries importable
from mona_mm.commands.cli import run
from mona_mm.commands.config import has_accelerator
from mona_mm.errors import ConfigError
from mona_mm.reproduce import (
    DEVICES,
    FORMATS,
    RUNS,
    TABLES,
    Composer,
    Queue,
    Run,
    build_tables,
    check_material,
    collect,
    draw_pictures,
    find_comparison,
    is_results,
    load_results,
    plan,
    read_records,
    render,
    render_comparison,
    save_results,
    table_names,
    write_page,
    write_text,
)
from mona_mm.reproduce.own_runs import find_own_runs, render_own_runs

_PATHS = 'work dirs, folders of them, logs of mmengine or mmcv 1.x'


def main() -> None:
    parser = argparse.ArgumentParser(description='Published tables and your runs side by side')
    commands = parser.add_subparsers(dest='command', required=True)
    collecting = commands.add_parser('collect', help='read runs into a file')
    collecting.add_argument('paths', nargs='+', metavar='PATH', help=_PATHS)
    collecting.add_argument('--out', default='results.json', help='file to write (default: %(default)s)')
    showing = commands.add_parser('show', help='print the tables; without PATH the published numbers alone')
    showing.add_argument(
        'paths',
        nargs='*',
        metavar='PATH',
        help=f'results.json of collect, or {_PATHS}; or a table that is run here: {", ".join(TABLES)}',
    )
    showing.add_argument('--runs', default=str(RUNS), metavar='DIR', help='results of run (default: %(default)s)')
    showing.add_argument('--format', choices=FORMATS, default='terminal')
    showing.add_argument('--out', help='write to this file in place of the terminal')
    planning = commands.add_parser('plan', help='print the command of every cell, and which are done')
    planning.add_argument('paths', nargs='*', metavar='PATH', help=f'results.json of collect, or {_PATHS}')
    for command in (showing, planning):
        command.add_argument('--task', metavar='TABLE', help=f'only this table: {", ".join(table_names())}')
    for command in (collecting, showing, planning):
        command.add_argument(
            '--import', dest='modules', action='append', default=[], metavar='MODULE', help='that registers more tasks'
        )
        command.add_argument(
            '--as', dest='cell', metavar='METHOD/TASK', help='the cell of logs that do not tell, e.g. mona/coco'
        )
    add_run(commands)
    args = parser.parse_args()
    if args.command == 'list':
        list_comparisons()
    elif args.command == 'run':
        run_comparison(args)
    elif args.command == 'page':
        make_page(args)
    elif args.command == 'show' and len(args.paths) == 1 and is_table(args.paths[0]):
        show_comparison(args)
    else:
        compare_with_published(args)


def add_run(commands: argparse._SubParsersAction) -> None:
    """Add the commands for tables whose cells are run on this machine."""
    commands.add_parser('list', help='the tables that can be run here')
    running = commands.add_parser('run', help='run the cells of a table; the same command again goes on')
    running.add_argument('table', metavar='TABLE', help=', '.join(TABLES))
    running.add_argument('--tasks', nargs='+', metavar='TASK', help='only these')
    running.add_argument('--methods', nargs='+', metavar='METHOD', help='only these')
    running.add_argument('--minutes', type=float, metavar='N', help='end within this time')
    running.add_argument('--jobs', type=int, default=1, metavar='N', help='cells at once (default: %(default)s)')
    running.add_argument('--threads', type=int, default=1, metavar='N', help='of each cell (default: %(default)s)')
    running.add_argument('--device', choices=DEVICES, help='by default cuda where there is one')
    running.add_argument(
        '--weights',
        default='data/dinov2_vits14.safetensors',
        metavar='FILE',
        help='the pretrained backbone (default: %(default)s)',
    )
    running.add_argument('--out', default=str(RUNS), metavar='DIR', help='folder of the results (default: %(default)s)')
    running.add_argument('--again', action='store_true', help='retry the cells that failed')
    page = commands.add_parser('page', help='write the results of a table as one HTML page')
    page.add_argument('table', metavar='TABLE', help=', '.join(TABLES))
    page.add_argument('--runs', default=str(RUNS), metavar='DIR', help='results of run (default: %(default)s)')
    page.add_argument(
        '--out',
        default=str(RUNS.parent),
        metavar='DIR',
        help='folder of the page and its charts (default: %(default)s)',
    )
    page.add_argument(
        '--pictures',
        action='store_true',
        help='draw the predictions anew, from the data and the work dirs of the tests',
    )
    for command in (running, page):
        command.add_argument(
            '--data', default='data', metavar='DIR', help='folder of the data sets (default: %(default)s)'
        )
        command.add_argument(
            '--work-dir', metavar='DIR', help='for logs and checkpoints (default: work_dirs/TABLE-DEVICE)'
        )


def is_table(name: str) -> bool:
    """Whether an argument names a table that is run here, and no file or folder."""
    return name in TABLES and not Path(name).exists()


def list_comparisons() -> None:
    """Print the tables that can be run, with their tasks, methods, learning rates and numbers of seeds."""
    for table in map(find_comparison, TABLES):
        labels = {task.label for task in table.tasks}
        label = f' ({labels.pop()})' if len(labels) == 1 else ''
        names = ', '.join(task.name if label else f'{task.name} ({task.label})' for task in table.tasks)
        rates = ', '.join(map(str, table.learning_rates)) or 'those of the configs'
        print(f'{table.name}: {table.title}')
        print(f'  tasks{label}: {names}')
        print(f'  methods: {", ".join(table.methods)}')
        print(f'  learning rates: {rates}; seeds: {len(table.seeds)}')


def run_comparison(args: argparse.Namespace) -> None:
    """Run the missing cells of a table.

    Raises:
        ConfigError: if an argument has an unusable value.
    """
    table = find_comparison(args.table)
    tasks, methods = table.choose(args.tasks, args.methods)
    if args.jobs < 1 or args.threads < 1:
        raise ConfigError('--jobs and --threads are whole numbers of at least 1.')
    device = args.device or ('cuda' if has_accelerator() else 'cpu')
    if device == 'cuda' and not has_accelerator():
        raise ConfigError('--device cuda: there is no such device here. Leave it out, or say --device cpu.')
    work_dir = Path(args.work_dir or f'work_dirs/{table.name}-{device}')
    composer = Composer(table, Path(args.data), Path(args.weights), device, work_dir)
    check_material(composer, tasks)
    Queue(composer, Path(args.out), tasks, methods, args.jobs, args.threads, args.again).run(args.minutes)


def show_comparison(args: argparse.Namespace) -> None:
    """Print the results of a table, with one part for each kind of device."""
    table = find_comparison(args.paths[0])
    tasks, _ = table.choose([args.task] if args.task else None, None)
    found = {device: read_records(Path(args.runs), device) for device in DEVICES}
    shown = {device: records for device, records in found.items() if records} or {'cpu': {}}
    text = '\n'.join(render_comparison(table, records, tasks, device) for device, records in shown.items())
    if args.out:
        write_text(text, Path(args.out))
    else:
        print(text, end='')


def make_page(args: argparse.Namespace) -> None:
    """Write the HTML page of a table, with pictures of predictions if ``--pictures`` asks for them."""
    table = find_comparison(args.table)
    found = {device: read_records(Path(args.runs), device) for device in DEVICES}
    found = {device: records for device, records in found.items() if records}
    folder = Path(args.out)
    if args.pictures:
        for device, records in found.items():
            work_dir = Path(args.work_dir or f'work_dirs/{table.name}-{device}')
            composer = Composer(table, Path(args.data), Path('weights'), device, work_dir)
            drawn = draw_pictures(composer, records, folder / 'pictures')
            print(f'{len(drawn)} pictures of predictions on {device} in {folder / "pictures"}')
    print(write_page(table, found, folder))


def compare_with_published(args: argparse.Namespace) -> None:
    """Collect, show or plan the runs of the published tables."""
    for module in args.modules:
        import_tasks(module)
    paths = [Path(path) for path in args.paths]
    if args.command == 'show' and args.cell is None and (own := own_runs_of(paths)):
        print(own, end='')
        return
    runs = read_runs(paths, args.cell)
    if args.command == 'collect':
        save_results(runs, Path(args.out))
        for entry in runs:
            changed = f', differs from the published setting in {len(entry.changed)} points' if entry.changed else ''
            print(f'{entry.path}: {entry.method}/{entry.task} ({entry.config}), {entry.status}{changed}')
        print(f'{len(runs)} runs in {args.out}')
    elif args.command == 'show':
        text = render(build_tables(runs, args.task), args.format)
        if args.out:
            write_text(text, Path(args.out))
        else:
            print(text, end='')
    else:
        print('\n'.join(plan(runs, args.task)))


def own_runs_of(paths: list[Path]) -> str:
    """The table of runs on data of one's own; empty if there are none, or any of the runs is of a published table."""
    found = find_own_runs(paths)
    if not found or any(map(is_results, paths)) or collect(paths, count=False)[0]:
        return ''
    return render_own_runs(found)


def import_tasks(module: str) -> None:
    """Import a module that registers tasks.

    Raises:
        ConfigError: if there is no module of this name, or a module that it imports is missing.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f'--import {module}: {error}. Put the folder of the module into PYTHONPATH.') from None


def read_runs(paths: list[Path], cell: str | None) -> list[Run]:
    """Read the runs of results files, work dirs and logs; logs whose cell is not clear are named on stderr.

    Raises:
        ConfigError: if no run is found and the cell of a log is not clear.
    """
    runs = [entry for path in paths if is_results(path) for entry in load_results(path)]
    found, unclear = collect([path for path in paths if not is_results(path)], cell)
    runs += found
    if unclear and not runs:
        more = f' ({len(unclear) - 1} more logs do not tell, either.)' if unclear[1:] else ''
        raise ConfigError(f'{unclear[0]}{more}')
    for error in unclear:
        print(f'left out: {error}', file=sys.stderr)
    return runs


if __name__ == '__main__':
    run(main)
