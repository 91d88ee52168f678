"""Write the pages of the methods from the code: python tools/write_method_pages.py [--check]

The tool writes docs/methods/NAME.md for every registered method and every rule, docs/hosts.md, and the tables in
README.md. The formulas, sources and options come from the docstrings and annotations, the numbers of parameters from
building the models, and the scores from the published tables. With --check it writes nothing, and its exit status says
whether all files are up to date.
"""

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import mona_mm  # imported first, because it makes the OpenMMLab libraries importable
from mona_mm.catalogue.hosts import backbone_rows, render_hosts, render_names
from mona_mm.catalogue.methods import CATALOGUE, method_name
from mona_mm.commands.cli import run
from mona_mm.frozen import rules
from mona_mm.frozen.count import count_trainable
from mona_mm.methods.base import NOT_OPTIONS, LinearModule, PeftModule
from mona_mm.nn.meta import meta_device
from mona_mm.options import accepted_values, widths
from mona_mm.registry import METHODS
from mona_mm.reproduce import build_tables
from mona_mm.reproduce.comparison import MINI
from mona_mm.reproduce.records import read_records, rows_of, spread

ROOT = Path(__file__).resolve().parents[1]
TOP = '<!-- Written by tools/write_method_pages.py: run it in place of editing this. -->'
START, END = '<!-- methods: written by tools/write_method_pages.py -->', '<!-- end of methods -->'
START_OF_HOSTS, END_OF_HOSTS = '<!-- hosts: written by tools/write_method_pages.py -->', '<!-- end of hosts -->'
_ABOUT_HOSTS = (
    "Every backbone class of the three libraries, the families of timm's and transformers' models that are declared, "
    'and the sites of their blocks at which a method can be. The picture of the [README](../README.md) shows the '
    'sites; `python tools/count_params.py --hosts` prints this table for the installed versions. Subclasses with '
    'blocks of their own are no hosts. [Extending](extending.md) says how to declare another one.'
)
_SWIN = dict(type='mmdet.SwinTransformer')
BACKBONES = {
    'Swin-T': dict(**_SWIN, embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    'Swin-B': dict(**_SWIN, embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    'Swin-L': dict(**_SWIN, embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
    'ViT-B/16': dict(type='mmpretrain.VisionTransformer', arch='base', img_size=224, patch_size=16),
}
SPT_MERGES = 'LoRA, DoRA, weights'


@dataclass(frozen=True)
class Page:
    """The contents of the page of a method.

    Args:
        name: the name of the page's file, without its extension.
        setting: the setting in a config that chooses the method.
        text: the text of the docstring before its arguments.
        arguments: the descriptions of the arguments in the docstring, by name.
        source: the function or class whose arguments are the options; None if there are no options.
        sites: the default sites, and all possible ones.
        merges: a word that says whether the method merges.
        folders: the folders of its configs.
        trained: the number of parameters that train, by backbone; empty if a plan decides.
    """

    name: str
    setting: str
    text: str
    arguments: dict[str, str]
    source: Callable | None
    sites: tuple[tuple[str, ...], tuple[str, ...]]
    merges: str
    folders: tuple[str, ...]
    trained: dict[str, int]

    @property
    def collections(self) -> list[dict[str, Any]]:
        """The entries of the methods of the folders in the model index."""
        files = [ROOT / 'configs' / folder / 'metafile.yml' for folder in self.folders]
        return [yaml.safe_load(file.read_text(encoding='utf-8'))['Collections'][0] for file in files]


# Docstrings ----------------------------------------------------------------------------------------------------------


def split_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """Split a docstring into the text before ``Args:`` and the descriptions of the arguments, by name."""
    text, _, rest = inspect.cleandoc(doc).partition('\nArgs:\n')
    block = re.split(r'\n(?=\S)', rest, maxsplit=1)[0]
    arguments = {}
    for entry in re.split(r'\n(?=    \w)', '\n' + block):
        name, _, description = ' '.join(entry.split()).partition(': ')
        if name:
            arguments[name] = description
    return text.partition('\nRaises:\n')[0].strip(), arguments


def to_markdown(text: str) -> str:
    """Convert the reStructuredText that docstrings use to Markdown, with formulas as GitHub writes them."""
    text = re.sub(r'^\.\. math::(.*(?:\n(?:[ ]+.*)?)*)', _math, text + '\n', flags=re.MULTILINE)
    text = re.sub(r':math:`(.+?)`', lambda match: f'${" ".join(match[1].split())}$', text, flags=re.DOTALL)
    text = re.sub(r':\w+:`~?([\w.]+)`(?: (?=\'s))?', r'`\1`', text)
    return text.replace('``', '`').strip()


def _math(match: re.Match) -> str:
    formula = textwrap.dedent(match[1].strip('\n')).strip()
    if r'\\' in formula:
        formula = f'\\begin{{aligned}}\n{textwrap.dedent(formula)}\n\\end{{aligned}}'
    return f'$$\n{formula}\n$$\n\n'


def rule_texts() -> dict[str, str]:
    """What each rule selects, by its published name, from the table in the docstring of :mod:`mona_mm.frozen.rules`."""
    _, table, _ = re.split(r'^=+ +=+$', inspect.cleandoc(rules.__doc__), flags=re.MULTILINE)[:3]
    texts: dict[str, str] = {}
    names, text = '', ''
    for line in table.strip().splitlines():
        left, right = line[:36], line[36:].strip()
        names, text = (names + left, text or right) if names.rstrip().endswith('or') else (left, right)
        for name in re.findall(r"``'(\w+)'``", names):
            texts[name] = text
    return {name: texts[name] for name in rules.METHOD_RULES}


# Pages ---------------------------------------------------------------------------------------------------------------


def count(**tuning: Any) -> dict[str, int]:
    """Count the parameters that train in each backbone."""
    counts = {}
    for name, base in BACKBONES.items():
        with meta_device():
            model = mona_mm.PeftBackbone(base=dict(base), **tuning)
        counts[name] = count_trainable(model).backbone_trainable
    return counts


def page_of_method(name: str, cls: type) -> Page:
    """Make the page of a registered method."""
    text, arguments = split_docstring(cls.__doc__)
    if not issubclass(cls, PeftModule):
        folders = tuple(sorted(path.name for path in (ROOT / 'configs').glob(f'{name.lower()}_*')))
        plan = "peft=dict(type='SPT', budget='0.4M', structured=dict(type='LoRA', rank=8))"
        return Page(name.lower(), plan, text, arguments, cls, ((), ()), SPT_MERGES, folders, {})
    module = cls(64, 64) if issubclass(cls, LinearModule) else cls(64)
    merges = 'yes' if getattr(module, 'is_weight_delta', False) else 'folds' if module.to_deploy() else 'no'
    sites = (cls.sites, cls.possible_sites)
    trained = count(peft=dict(type=name))
    setting = f"peft=dict(type='{name}')"
    own = method_name(name)
    return Page(own, setting, text, arguments, cls, sites, merges, (own,), trained)


def page_of_rule(name: str, text: str) -> Page:
    """Make the page of a method that only selects parameters of the base."""
    rule = rules.METHOD_RULES[name]
    text = f"What trains is {text}. It is the rule `'{rule}'` of `mona_mm.frozen.rules`, and adds no module."
    return Page(name, f"trainable='{name}'", text, {}, None, ((), ()), 'yes', (name,), count(trainable=name))


def all_pages() -> list[Page]:
    """Make the pages of all methods, with Mona first and the rules last."""
    METHODS.import_from_location()
    order = [entry.type for entry in CATALOGUE.values()]
    names = sorted(METHODS.module_dict, key=lambda name: (name != 'Mona', order.index(name)))
    return [
        *(page_of_method(name, METHODS.module_dict[name]) for name in names),
        *(page_of_rule(name, text) for name, text in rule_texts().items()),
    ]


def render(page: Page) -> str:
    """Convert a page to Markdown."""
    collections = page.collections
    title = ', '.join(collection['Name'] for collection in collections)
    papers = dict.fromkeys(f'[{c["Metadata"]["Paper Title"]}]({c["Paper"]})' for c in collections)
    parts = [TOP, f'# {title}', f'```python\n{page.setting.replace("=", " = ", 1)}\n```', to_markdown(page.text)]
    code = dict.fromkeys(f'`{collection["Code"]}`' for collection in collections)
    parts.append(f'Paper: {", ".join(papers)}. Code: {", ".join(code)}.')
    if page.source:
        parts += ['## Options', _options(page)]
    default, possible = page.sites
    if possible:
        also = ', '.join(f'`{site}`' for site in possible if site not in default)
        sites = ', '.join(f'`{site}`' for site in default)
        where = 'In all blocks, unless `blocks` names some ([configs.md](../configs.md)).'
        parts += ['## Sites', f'{sites}, unless `sites` names others: also possible are {also}. {where}']
    parts += ['## What trains', _trained(page)]
    merging = {
        'yes': 'It merges: after training, the backbone is a stock one again with the weights in it.',
        'folds': 'It does not merge into the base. `mona_mm.methods.deploy` puts a form with fewer operations in its '
        'place, for inference.',
        'no': 'It does not merge: its modules stay in the backbone.',
        SPT_MERGES: 'LoRA, DoRA and single weights merge into the base; Adapter, Adapter+ and Mona modules stay in the '
        'backbone.',
    }
    parts += ['## Merging', merging[page.merges], '## Published scores', _scores(page), '## Configs', _configs(page)]
    return '\n\n'.join(parts) + '\n'


def _table(header: list[str], rows: list[list[str]]) -> str:
    return '\n'.join(f'| {" | ".join(row)} |' for row in [header, ['---'] * len(header), *rows])


def _options(page: Page) -> str:
    accepted, narrow = accepted_values(page.source), widths(page.source)
    rows, described = [], ''
    for name, parameter in inspect.signature(page.source).parameters.items():
        if name in NOT_OPTIONS:
            continue
        value = accepted.get(name, '')
        if name in narrow:
            value += ', at most the widest block; or a dict of patterns of blocks'
        described = name if name in page.arguments else described
        meaning = to_markdown(page.arguments[name]) if name in page.arguments else f'see `{described}`'
        rows.append([f'`{name}`', f'`{parameter.default!r}`', value.replace('|', '\\|'), meaning.replace('|', '\\|')])
    return _table(['option', 'default', 'accepts', 'meaning'], rows)


def _trained(page: Page) -> str:
    if not page.trained:
        return 'What the plan says, within the budget.'
    rows = [[name, f'{number:,}'] for name, number in page.trained.items()]
    return _table(['backbone', 'parameters that train, with the default options'], rows)


def _scores(page: Page) -> str:
    rows = []
    for table in build_tables([]):
        title = table.title.removesuffix(' (published)')
        for row in table.rows if table.name != 'params' else ():
            if row.method in page.folders and row.published is not None:
                setting = '' if row.setting in title else row.setting
                rows.append([row.method, title, setting, row.metric, f'{row.published}', row.grade])
    if not rows:
        return 'None is known.'
    table = _table(['method', 'task', 'setting', 'metric', 'score', 'grade'], rows)
    return f'{table}\n\nThe grades are explained in [comparing.md](../comparing.md).'


def _configs(page: Page) -> str:
    files = sorted(path for folder in page.folders for path in (ROOT / 'configs' / folder).glob('*.py'))
    return '\n'.join(f'- [`{path.relative_to(ROOT)}`](../../{path.relative_to(ROOT)})' for path in files)


# README --------------------------------------------------------------------------------------------------------------


def readme_table(pages: list[Page]) -> str:
    """Make the table of methods in the README."""
    texts, coco, rows = rule_texts(), build_tables([], 'coco')[0].rows, []
    lines = {entry.type: entry.in_a_line for entry in CATALOGUE.values()}
    camvid = {
        row.method: row.test for row in rows_of(MINI, 'camvid', read_records(ROOT / 'docs/comparison/runs', 'cpu'))
    }
    for page in pages:
        name = page.setting.split("'")[1]
        score = next((row.published for row in coco if row.method == page.name and row.metric == 'box AP'), None)
        rows.append(
            [
                f'[`{name if page.source else page.setting}`](docs/methods/{page.name}.md)',
                lines.get(name) or f'trains {texts[name]}',
                ', '.join(f'`{site}`' for site in page.sites[0]) or ('from a plan' if page.source else ''),
                *(f'{page.trained[key]:,}' if page.trained else 'a budget' for key in ('Swin-B', 'ViT-B/16')),
                '' if score is None else f'{score}',
                spread(tested, digits=1) if len(tested := camvid.get(page.name, [])) == len(MINI.seeds) else '',
                page.merges,
            ]
        )
    columns = ['sites', 'trains on Swin-B', 'on ViT-B', 'COCO box AP', 'CamVid mIoU', 'mergeable']
    return _table(['`peft=dict(type=...)`', 'what it computes', *columns], rows)


def contents() -> dict[Path, str]:
    """Make the texts of all files that this tool writes, by path."""
    pages, hosts = all_pages(), backbone_rows()
    files = {ROOT / f'docs/methods/{page.name}.md': render(page) for page in pages}
    files[ROOT / 'docs/hosts.md'] = f'{TOP}\n# Backbones\n\n{_ABOUT_HOSTS}\n\n{render_hosts(hosts)}\n'
    readme = ROOT / 'README.md'
    text = _between(readme.read_text(encoding='utf-8'), START, END, readme_table(pages))
    files[readme] = _between(text, START_OF_HOSTS, END_OF_HOSTS, render_names(hosts))
    return files


def _between(text: str, start: str, end: str, written: str) -> str:
    """Replace what is between the lines ``start`` and ``end`` of a text."""
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f'README.md has no lines {start} and {end}, between which a table belongs.')
    return f'{before}{start}\n{written}\n{end}{after}'


def outdated() -> list[str]:
    """The files that differ from what would be written, and the pages of methods that no longer exist."""
    files = contents()
    gone = [path for path in (ROOT / 'docs/methods').glob('*.md') if path not in files]
    wrong = [path for path, text in files.items() if not path.is_file() or path.read_text(encoding='utf-8') != text]
    return [str(path.relative_to(ROOT)) for path in [*wrong, *gone]]


def main() -> None:
    parser = argparse.ArgumentParser(description='Write the pages of the methods, and the table in the README')
    parser.add_argument('--check', action='store_true', help='write nothing; exit status 1 if a file is out of date')
    args = parser.parse_args()
    if args.check:
        wrong = outdated()
        if wrong:
            print(f'out of date: {", ".join(wrong)}. Run: python tools/write_method_pages.py')
            sys.exit(1)
        return
    for path, text in contents().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    run(main)
