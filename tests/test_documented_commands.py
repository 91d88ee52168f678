"""Commands in README.md and docs/: what they name is there, and the quick ones run as written."""

import shlex

import pytest
from conftest import ROOT
from documented_commands import Command, commands_of, documented, faults

COMMANDS = documented()


def test_commands_are_found():
    """Every page that shows how to use a tool has some; each line of README's that starts a tool is one."""
    places = {command.place.partition(':')[0] for command in COMMANDS}
    assert {'README.md', 'docs/spt.md', 'docs/training.md', 'docs/checkpoints.md'} <= places
    tools = {word for command in COMMANDS for word in command.text.split() if word.startswith('tools/')}
    assert len(tools) >= 7 and any(command.is_quick for command in COMMANDS)


@pytest.mark.parametrize('command', COMMANDS, ids=lambda command: command.place)
def test_what_a_command_names_is_there(command):
    """Tools, their options, configs and targets of make."""
    assert faults(command) == []


@pytest.mark.parametrize('command', [c for c in COMMANDS if c.is_quick], ids=lambda command: command.place)
def test_quick_commands_run(command, tool):
    """As written, in this process: every command without a marker in the document is one of a tool, and succeeds."""
    program, script, *arguments = shlex.split(command.text)
    assert program == 'python' and script.startswith('tools/')
    status, out, err = tool(script.removeprefix('tools/'), *arguments)
    assert status in (0, None) and out, err


def test_faults_are_found(tmp_path):
    """Each kind of wrong command is seen, and markers are read."""
    page = tmp_path / 'page.md'
    page.write_text(
        'Text.\n\n<!-- slow -->\n```\nmake demmo  # a comment\n'
        'python tools/train.py configs/none.py \\\n    --wrok-dir x\n```\n'
        '```python\nmake nothing\n```\n```\npython tools/none.py\npython tools/test.py "x\n```\n'
    )
    found = list(commands_of(page, tmp_path))
    assert [command.text for command in found] == [
        'make demmo', 'python tools/train.py configs/none.py --wrok-dir x', 'python tools/none.py',
        'python tools/test.py "x',
    ]  # fmt: skip
    assert [command.markers for command in found] == [('slow',), ('slow',), (), ()]
    wrong = [' '.join(faults(command, ROOT)) for command in found]
    for text, part in zip(wrong, ('demmo', 'configs/none.py', 'tools/none.py', 'shell'), strict=True):
        assert part in text
    assert '--wrok-dir' in wrong[1]
    assert faults(Command('', 'python tools/train.py CONFIG --resume', ('pattern',)), ROOT) == []
