"""The pages of the methods and the table in the README are what tools/write_method_pages.py writes."""

import re
import runpy
import sys

import pytest
from conftest import ROOT

from mona_mm.catalogue.methods import method_name
from mona_mm.frozen.rules import METHOD_RULES
from mona_mm.registry import METHODS

TOOL = str(ROOT / 'tools/write_method_pages.py')


@pytest.fixture
def tool():
    return runpy.run_path(TOOL)


def test_up_to_date_but_for_the_counts(tool, monkeypatch):
    """Formulas, options, scores, configs and the README's table are those of the tree. The numbers of parameters are
    taken from the pages: counting them takes a while (see the next test)."""

    def listed(peft=None, trainable=None):
        page = (ROOT / f'docs/methods/{method_name(peft["type"]) if peft else trainable}.md').read_text()
        rows = re.findall(r'^\| (\S+) \| ([\d,]+) \|$', page, re.MULTILINE)
        return {name: int(number.replace(',', '')) for name, number in rows}

    monkeypatch.setitem(tool['page_of_method'].__globals__, 'count', listed)
    assert tool['outdated']() == [], 'run: python tools/write_method_pages.py'


@pytest.mark.slow
def test_up_to_date(monkeypatch, capsys):
    """The command itself says so, having counted what trains."""
    monkeypatch.setattr(sys, 'argv', ['write_method_pages.py', '--check'])
    runpy.run_path(TOOL, run_name='__main__')
    assert capsys.readouterr().out == ''


def test_every_method_has_a_page():
    """Registered methods and rules, and no others."""
    METHODS.import_from_location()
    pages = {path.stem for path in (ROOT / 'docs/methods').glob('*.md')}
    own = {method_name(name) for name, cls in METHODS.module_dict.items() if cls.__module__.startswith('mona_mm.')}
    assert pages == {*own, *METHOD_RULES}


def test_formulas_become_markdown(tool):
    """A formula of one line, one of several, and what stands inside a sentence."""
    text = tool['to_markdown'](
        "A.\n\n.. math:: y = x\n\nWith :math:`m\n n` and :class:`~a.b.C` 's ``d``.\n\n"
        '.. math::\n    s &= 1 \\\\\n    t &= 2\n\nEnd.'
    )
    assert text == (
        "A.\n\n$$\ny = x\n$$\n\nWith $m n$ and `a.b.C`'s `d`.\n\n"
        '$$\n\\begin{aligned}\ns &= 1 \\\\\nt &= 2\n\\end{aligned}\n$$\n\nEnd.'
    )
