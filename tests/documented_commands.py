"""Every command of README.md and docs/, checked, or run as written from a fresh clone.

    python tests/documented_commands.py                    # a table of all commands, checked against tools and configs
    python tests/documented_commands.py --run --work DIR   # clones the checkout into DIR and runs the quick ones there
    python tests/documented_commands.py --run --work DIR --slow   # the slow ones too

A run goes on where an earlier one with the same DIR stopped: results are kept in DIR/results.json. What cannot be run
everywhere says so in the document itself, in a comment on the line before the block of commands:

    <!-- slow -->                 takes minutes
    <!-- needs data: coco -->     data, checkpoints or runs that are not in a clone
    <!-- needs network -->        downloads
    <!-- needs GPU -->
    <!-- pattern -->              words in capitals stand for files
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ('python', 'make', 'mim', 'pip', 'torchrun', 'for', 'git', 'bash')
MARKER = re.compile(r'<!-- ((?:slow|pattern|needs (?:network|GPU|data: [^>]+?))) -->')
OPTION = re.compile(r'--[a-z][a-z-]*')


@dataclass(frozen=True)
class Command:
    """A command as it is documented.

    Args:
        place: file and line.
        text: what to hand to a shell, with the lines that it continues on, without comments.
        markers: what the document says that it needs.
    """

    place: str
    text: str
    markers: tuple[str, ...]

    @property
    def is_quick(self) -> bool:
        """Whether it runs anywhere, in seconds."""
        return not self.markers


def documents(root: Path) -> list[Path]:
    """The files whose commands are meant to be typed."""
    return [root / 'README.md', *sorted((root / 'docs').rglob('*.md'))]


def commands_of(path: Path, root: Path = ROOT) -> Iterator[Command]:
    """The commands of a document: lines of its fenced blocks without a language, or of a shell, that begin with a
    program."""
    lines, inside, markers = path.read_text(encoding='utf-8').splitlines(), False, ()
    i = 0
    while i < len(lines):
        fence = re.match(r' *```(\w*)', lines[i])
        if fence and not inside:
            inside, is_shell = True, fence[1] in ('', 'sh', 'bash', 'console')
            above = [line for line in lines[max(0, i - 3) : i] if line.strip()]
            markers = tuple(found[1] for line in above for found in MARKER.finditer(line))
        elif fence:
            inside = False
        elif inside and is_shell and lines[i].strip().split(' ')[0] in PROGRAMS:
            first, text = i, without_comment(lines[i])
            while text.endswith('\\') or (text.startswith('for ') and not text.endswith('done')):
                i += 1
                text = text.removesuffix('\\').rstrip() + ' ' + without_comment(lines[i])
            yield Command(f'{path.relative_to(root)}:{first + 1}', text, markers)
        i += 1


def without_comment(line: str) -> str:
    """A line of a shell without its indentation and without the comment at its end."""
    return re.split(r'(?:^|\s)#', line.strip())[0].strip()


def documented(root: Path = ROOT) -> list[Command]:
    """All commands of all documents."""
    return [command for path in documents(root) for command in commands_of(path, root)]


def faults(command: Command, root: Path = ROOT) -> list[str]:
    """What is wrong with a command that nobody has to run to see: a tool, an option, a config or a target of make that
    is not there."""
    try:
        words = shlex.split(command.text.replace(';', ' ; ').replace('&&', ' && '))
    except ValueError as error:
        return [f'no shell reads it: {error}']
    found = []
    for word in words:
        if 'pattern' not in command.markers and word.startswith('configs/') and not (root / word).exists():
            found.append(f'there is no {word}')
        if re.fullmatch(r'(tools|tests)/\w+\.py', word) and not (root / word).is_file():
            found.append(f'there is no {word}')
    tool = next((word for word in words if word.startswith('tools/') and (root / word).is_file()), None)
    if tool:
        after = words[words.index(tool) + 1 :]
        after = after[: next((i for i, word in enumerate(after) if word in (';', '&&')), len(after))]
        known = options_of(root / tool)
        found += [f'{tool} has no {word}' for word in after if OPTION.fullmatch(word) and word not in known]
    if words[0] == 'make':
        targets = re.findall(r'^([\w-]+):', (root / 'Makefile').read_text(), re.M)
        found += [f'make has no target {w}' for w in words[1:] if '=' not in w and w[0] != '-' and w not in targets]
    return found


@cache
def options_of(tool: Path) -> set[str]:
    """The options that a tool's source names, and those that all tools share."""
    rooms = [
        tool,
        *tool.parents[1].glob('mona_mm/commands/*.py'),
        *tool.parents[1].glob('mona_mm/config/*.py'),
        *([tool.with_name('train.py')] if tool.name == 'dist_train.sh' else []),  # it hands its options on
        *tool.parents[1].glob('mona_mm/benchmark/*.py'),
        *tool.parents[1].glob('mona_mm/reproduce/*.py'),
    ]
    return {option for file in rooms for option in re.findall(r"'(--[a-z][a-z-]*)'", file.read_text())}


def run_in(clone: Path, command: Command, timeout: float) -> dict:
    """Run a command by a shell in a clone: its status, seconds and last lines."""
    environment = {
        **os.environ,
        'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
        'PYTHONPATH': str(clone),
    }
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            ['bash', '-euo', 'pipefail', '-c', command.text],
            cwd=clone, env=environment, timeout=timeout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired:
        status, output = 124, ''
    return dict(status=status, seconds=round(time.perf_counter() - begin, 1), output=output[-1000:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--run', action='store_true', help='run the commands in a clone, not only check them')
    parser.add_argument('--work', type=Path, help='where the clone and the results of runs are kept')
    parser.add_argument('--slow', action='store_true', help='also those that are marked slow')
    parser.add_argument('--timeout', type=float, default=3600, help='seconds that a command may take')
    arguments = parser.parse_args()
    if arguments.run and arguments.work is None:
        parser.error('--run needs --work')
    results, file = {}, None
    if arguments.run:
        arguments.work.mkdir(parents=True, exist_ok=True)
        clone, file = arguments.work / 'clone', arguments.work / 'results.json'
        if not clone.exists():
            subprocess.run(['git', 'clone', '--quiet', str(ROOT), str(clone)], check=True)
        results = json.loads(file.read_text()) if file.exists() else {}
    bad = 0
    for command in documented():
        wrong, key = faults(command), command.text
        may_run = command.is_quick or (arguments.slow and set(command.markers) == {'slow'})
        if arguments.run and may_run and not wrong and key not in results:
            results[key] = run_in(clone, command, arguments.timeout)
            file.write_text(json.dumps(results, indent=1))
        result = results.get(key)
        said = '; '.join(wrong) or (
            f'{result["status"]} in {result["seconds"]} s' if result else ', '.join(command.markers)
        )
        bad += bool(wrong) or bool(result and result['status'])
        print(f'{command.place:28} {said or "checked":28} {command.text}')
    return int(bool(bad))


if __name__ == '__main__':
    raise SystemExit(main())
