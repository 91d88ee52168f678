"""Compare published tables with your runs: python tools/reproduce.py collect|show|plan [PATH ...]

For tables whose cells are run on this machine: python tools/reproduce.py list | run TABLE | show TABLE | page TABLE
The methods on data of your own: python tools/reproduce.py run own --data DIR | show own | page own
"""

import argparse
import importlib
import sys
from pathlib import Path

import mona_mm  # noqa: F401  imported first, because it makes the OpenMMLab libraries importable
from mona_mm.commands.cli import add_data_options, run
from mona_mm.config.load import has_accelerator
from mona_mm.errors import ConfigError
from mona_mm.reproduce import (
    DEVICES,
    FORMATS,
    OWN,
    RUNS,
    TABLES,
    Comparison,
    Composer,
    Queue,
    Run,
    build_tables,
    check_material,
    collect,
    draw_pictures,
    extend_own_table,
    find_comparison,
    is_results,
    load_results,
    plan,
    read_own_table,
    read_records,
    render,
    render_comparison,
    save_results,
    table_names,
    write_page,
    write_text,
)
from mona_mm.reproduce.own_runs import find_own_runs, render_own_runs
from mona_mm.reproduce.own_table import METHODS

_TABLES = (*TABLES, OWN)
_WEIGHTS = 'data/dinov2_vits14.safetensors'
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
        help=f'results.json of collect, or {_PATHS}; or a table that is run here: {", ".join(_TABLES)}',
    )
    add_places(showing)
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
    running.add_argument('table', metavar='TABLE', help=', '.join(_TABLES))
    running.add_argument('--tasks', nargs='+', metavar='TASK', help='only these')
    running.add_argument('--methods', nargs='+', metavar='METHOD', help='only these')
    running.add_argument('--minutes', type=float, metavar='N', help='end within this time')
    running.add_argument('--jobs', type=int, default=1, metavar='N', help='cells at once (default: %(default)s)')
    running.add_argument('--threads', type=int, default=1, metavar='N', help='of each cell (default: %(default)s)')
    running.add_argument('--device', choices=DEVICES, help='by default cuda where there is one')
    running.add_argument(
        '--weights',
        metavar='FILE',
        help=f"the pretrained backbone (default: {_WEIGHTS}; of {OWN} the config's own)",
    )
    running.add_argument('--out', metavar='DIR', help=f'folder of the results (default: {RUNS}; work_dirs/{OWN}/runs)')
    running.add_argument('--again', action='store_true', help='retry the cells that failed')
    add_own(running)
    page = commands.add_parser('page', help='write the results of a table as one HTML page')
    page.add_argument('table', metavar='TABLE', help=', '.join(_TABLES))
    add_places(page)
    page.add_argument(
        '--out',
        metavar='DIR',
        help=f'folder of the page and its charts (default: {RUNS.parent}; of {OWN} its work dir)',
    )
    page.add_argument(
        '--pictures',
        action='store_true',
        help='draw the predictions anew, from the data and the work dirs of the tests',
    )
    add_work_dir(running)
    for command in (running, page):
        command.add_argument(
            '--data', metavar='DIR', help=f'folder of the data sets (default: data); of {OWN} that of your data'
        )


def add_places(command: argparse.ArgumentParser) -> None:
    """Add the folders in which the results of a table are."""
    command.add_argument(
        '--runs', metavar='DIR', help=f'results of run (default: {RUNS}; of {OWN} runs/ in its work dir)'
    )
    add_work_dir(command)


def add_work_dir(command: argparse.ArgumentParser) -> None:
    """Add the folder of logs and checkpoints."""
    command.add_argument(
        '--work-dir', metavar='DIR', help=f'for logs and checkpoints (default: work_dirs/TABLE-DEVICE; work_dirs/{OWN})'
    )


def add_own(running: argparse.ArgumentParser) -> None:
    """Add what only a table of one's own lets the user choose."""
    options = running.add_argument_group(f'of the table {OWN}')
    options.add_argument(
        '--config', metavar='FILE', help='whose model is compared (default: the quick one for the data)'
    )
    add_data_options(options)
    options.add_argument('--learning-rates', nargs='+', type=float, metavar='LR', help='to try with every method')
    options.add_argument('--seeds', type=int, metavar='N', help='how many runs each method has at its best rate')


def is_table(name: str) -> bool:
    """Whether an argument names a table that is run here, and no file or folder."""
    return name in _TABLES and not Path(name).exists()


def places(args: argparse.Namespace, table: str, device: str = 'cpu') -> tuple[Path, Path]:
    """The folder of the logs and checkpoints of a table, and that of its results."""
    own = table == OWN
    work_dir = Path(args.work_dir or (f'work_dirs/{OWN}' if own else f'work_dirs/{table}-{device}'))
    given = args.out if args.command == 'run' else args.runs
    return work_dir, Path(given or (work_dir / 'runs' if own else RUNS))


def table_of(args: argparse.Namespace, name: str) -> Comparison:
    """The table of a name; that of the user's own data as it is kept in its work dir."""
    return read_own_table(places(args, name)[0]).comparison() if name == OWN else find_comparison(name)


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
    print(f'{OWN}: methods on data of your own: run {OWN} --data DIR')
    print(f'  methods: {", ".join(METHODS)}')


def run_comparison(args: argparse.Namespace) -> None:
    """Run the missing cells of a table.

    Raises:
        ConfigError: if an argument has an unusable value.
    """
    if args.jobs < 1 or args.threads < 1:
        raise ConfigError('--jobs and --threads are whole numbers of at least 1.')
    device = args.device or ('cuda' if has_accelerator() else 'cpu')
    if device == 'cuda' and not has_accelerator():
        raise ConfigError('--device cuda: there is no such device here. Leave it out, or say --device cpu.')
    work_dir, out = places(args, args.table, device)
    if args.table == OWN:
        found, tasks = extend_own_table(
            work_dir, args.data, args.config, args.data_options, args.methods, args.learning_rates, args.seeds
        )
        table, work_dir, weights = found.comparison(), work_dir / device, args.weights
    else:
        table, tasks, weights = find_comparison(args.table), args.tasks, args.weights or _WEIGHTS
    tasks, methods = table.choose(args.tasks or tasks, args.methods)
    composer = Composer(table, Path(args.data or 'data'), Path(weights) if weights else None, device, work_dir)
    check_material(composer, tasks)
    Queue(composer, out, tasks, methods, args.jobs, args.threads, args.again).run(args.minutes)


def show_comparison(args: argparse.Namespace) -> None:
    """Print the results of a table, with one part for each kind of device."""
    table = table_of(args, args.paths[0])
    tasks, _ = table.choose([args.task] if args.task else None, None)
    runs = places(args, table.name)[1]
    found = {device: read_records(runs, device) for device in DEVICES}
    shown = {device: records for device, records in found.items() if records} or {'cpu': {}}
    text = '\n'.join(render_comparison(table, records, tasks, device) for device, records in shown.items())
    if args.out:
        write_text(text, Path(args.out))
    else:
        print(text, end='')


def make_page(args: argparse.Namespace) -> None:
    """Write the HTML page of a table, with pictures of predictions if ``--pictures`` asks for them."""
    table = table_of(args, args.table)
    own = table.name == OWN
    work_dir, runs = places(args, table.name)
    found = {device: read_records(runs, device) for device in DEVICES}
    found = {device: records for device, records in found.items() if records}
    folder = Path(args.out or (work_dir if own else RUNS.parent))
    if args.pictures:
        for device, records in found.items():
            place = work_dir / device if own else places(args, table.name, device)[0]
            composer = Composer(table, Path(args.data or 'data'), Path('weights'), device, place)
            drawn = draw_pictures(composer, records, folder / 'pictures')
            print(f'{len(drawn)} pictures of predictions on {device} in {folder / "pictures"}')
    print(write_page(table, found, folder, None if own else 'protocol.md'))


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
