"""Published tables and your runs side by side: python tools/reproduce.py collect|show|plan [PATH ...]"""

import argparse
import importlib
import sys
from pathlib import Path

import mona_mm  # noqa: F401  first: it makes the OpenMMLab libraries importable
from mona_mm.commands.cli import run
from mona_mm.errors import ConfigError
from mona_mm.reproduce import (
    FORMATS,
    Run,
    build_tables,
    collect,
    is_results,
    load_results,
    plan,
    render,
    save_results,
    table_names,
    write_text,
)

_PATHS = 'work dirs, folders of them, logs of mmengine or mmcv 1.x'


def main() -> None:
    parser = argparse.ArgumentParser(description='Published tables and your runs side by side')
    commands = parser.add_subparsers(dest='command', required=True)
    collecting = commands.add_parser('collect', help='read runs into a file')
    collecting.add_argument('paths', nargs='+', metavar='PATH', help=_PATHS)
    collecting.add_argument('--out', default='results.json', help='file to write (default: %(default)s)')
    showing = commands.add_parser('show', help='print the tables; without PATH the published numbers alone')
    showing.add_argument('paths', nargs='*', metavar='PATH', help=f'results.json of collect, or {_PATHS}')
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
    args = parser.parse_args()
    for module in args.modules:
        import_tasks(module)
    runs = read_runs([Path(path) for path in args.paths], args.cell)
    if args.command == 'collect':
        save_results(runs, Path(args.out))
        for each in runs:
            changed = f', differs from the published setting in {len(each.changed)} points' if each.changed else ''
            print(f'{each.path}: {each.method}/{each.task} ({each.config}), {each.status}{changed}')
        print(f'{len(runs)} runs in {args.out}')
    elif args.command == 'show':
        text = render(build_tables(runs, args.task), args.format)
        if args.out:
            write_text(text, Path(args.out))
        else:
            print(text, end='')
    else:
        print('\n'.join(plan(runs, args.task)))


def import_tasks(module: str) -> None:
    """Import a module that registers tasks.

    Raises:
        ConfigError: if there is none of that name, or one that it imports is missing.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f'--import {module}: {error}. Put the folder of the module into PYTHONPATH.') from None


def read_runs(paths: list[Path], cell: str | None) -> list[Run]:
    """The runs of results files and of everything else; logs whose cell is not clear are named on stderr."""
    runs = [each for path in paths if is_results(path) for each in load_results(path)]
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
