"""Write the files that `mim search` reads: python tools/write_metafiles.py [--check]

model-index.yml names a metafile for the folder of each method in configs/. A metafile lists the configs of the folder
with the number of parameters that they train and with the published results. These are taken from the independent
evidence, every number with its grade there, and without a number if there is none. Run the tool after adding or
renaming a config. With --check it writes nothing, names the files that differ from what it would write, and exits with
status 1 if there are any.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import yaml

import mona_mm  # noqa: F401  imported first, because it makes the OpenMMLab libraries importable
from mona_mm.catalogue.methods import CATALOGUE
from mona_mm.commands.cli import run
from mona_mm.config.build import build_on_meta
from mona_mm.config.load import load_config
from mona_mm.frozen.count import count_trainable
from mona_mm.reproduce.cells import config_name
from mona_mm.reproduce.published import published_scores
from mona_mm.reproduce.tasks import task_of_config_name
from mona_mm.spt_plans.plans import spt_config

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / 'mona_mm/published.json'
TOP = '# Written by tools/write_metafiles.py: run it in place of editing this.\n'

# The training data of the configs without published numbers, by a part of their names. The table of tasks has those of
# the other configs.
DATA = {'vtab': 'VTAB-1k', 'fgvc': 'FGVC'}
GRADES = {
    'A': 'published by the authors (grade A)',
    'F': 'published by the authors, in a figure (grade F)',
    'C': 'published by the authors, second-hand (grade C)',
}
COUNT = 'Trainable Backbone Parameters'
BUDGET = 'Budget of Trainable Backbone Parameters'


def configs(method: str) -> list[str]:
    """The names of the configs of a method."""
    return sorted(path.stem for path in (ROOT / 'configs' / method).glob('*.py'))


def listed() -> dict[str, dict[str, Any]]:
    """Read the current entries of all metafiles, by the name of the config."""
    files = [ROOT / 'configs' / method / 'metafile.yml' for method in CATALOGUE]
    entries = [entry for file in files for entry in yaml.safe_load(file.read_text(encoding='utf-8'))['Models']]
    return {entry['Name']: entry for entry in entries}


def training_data(name: str) -> str:
    """The name of the training data of a config."""
    task = task_of_config_name(name)
    return (
        task.training_data if task else next(data for part, data in DATA.items() if re.search(rf'_{part}(_|$)', name))
    )


def published_entries(method: str, name: str, published: dict[str, Any]) -> dict[str, list | None]:
    """The published value and grade of a config, by metric.

    Only a config with the published settings has results: one with another learning rate, other labels or another
    design has none. On VTAB-1k and FGVC no config has results, because SPT's scores are the best of several budgets,
    and the learning rates of its baselines were not released.
    """
    task = task_of_config_name(name)
    if task is None or method.startswith('spt_'):
        return {}
    if name == config_name(method, task.name):
        return published_scores(task, method)
    if match := re.search('retinanet_(swin_[tb])_voc$', name):
        return {'ap50': published['ablation_backbone_voc'][match[1]].get(method)}
    if match := re.fullmatch(r'retinanet_swin_l_voc_bottleneck(\d+)', name):
        return {'ap50': published['ablation_bottleneck_voc_swin_l'].get(match[1])}
    return {}


def results_of(method: str, name: str, published: dict[str, Any]) -> list[tuple[str, str, str, list]]:
    """The published results of a config, each as (what is measured, data set, metric, (value, grade))."""
    entries = published_entries(method, name, published)
    task = task_of_config_name(name)
    return [
        (metric.measures, task.test_data or task.training_data, metric.index_label or metric.label, entry)
        for metric, entry in ((task.metrics[score], entry) for score, entry in entries.items())
        if entry is not None
    ]


def model(method: str, name: str, trainable: int | str, published: dict[str, Any]) -> dict[str, Any]:
    """Make the entry of one config."""
    results = results_of(method, name, published)
    # The plan of SPT, which training makes, says what trains; before training there is only a budget.
    count = BUDGET if isinstance(trainable, str) else COUNT
    metadata: dict[str, Any] = {'Training Data': training_data(name), count: trainable}
    for _, _, metric, (_, grade) in results:
        # The grade is given in words and in the metadata of the model, because mim keeps only the numbers of a result.
        source = GRADES[grade]
        if name == 'cascade_swin_b_coco':
            source += ', test-dev'
        metadata[f'Source of {metric}'] = source
    entry = {
        'Name': name,
        'In Collection': CATALOGUE[method].title,
        'Config': f'configs/{method}/{name}.py',
        'Metadata': metadata,
    }
    if results:
        entry['Results'] = [
            {'Task': measured, 'Dataset': data, 'Metrics': {metric: value}}
            for measured, data, metric, (value, _) in results
        ]
    return entry


def metafile(method: str, trainable: dict[str, int | str], published: dict[str, Any]) -> str:
    """Make the text of the metafile of a method.

    Args:
        method: the folder of the method.
        trainable: the number of backbone parameters that a config trains, or its budget, by the name of the config.
        published: the published numbers.
    """
    entry = CATALOGUE[method]
    collection = {
        'Name': entry.title,
        'Metadata': {'Paper Title': entry.paper.title},
        'Paper': entry.paper.address,  # not a mapping of URL and Title, of which `mim search` would print only the keys
        'README': '../../README.md',
        'Code': entry.code,
    }
    models = [model(method, config, trainable[config], published) for config in configs(method)]
    return TOP + dump({'Collections': [collection]}) + '\n' + dump({'Models': models})


def model_index() -> str:
    return TOP + dump({'Import': [f'configs/{method}/metafile.yml' for method in CATALOGUE]})


def dump(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)


def count(path: str) -> int | str:
    """The number of backbone parameters that a config trains, or the budget of a config of SPT."""
    cfg = load_config(path)
    spt = spt_config(cfg)
    return spt.budget if spt else count_trainable(build_on_meta(cfg)).backbone_trainable


def files(known: dict[str, int | str]) -> dict[Path, str]:
    """Make the text of every file; configs not in ``known`` are built, without weights, to count what trains."""
    published = json.loads(PUBLISHED.read_text())
    texts = {ROOT / 'model-index.yml': model_index()}
    for method in CATALOGUE:
        trainable = {
            name: known[name] if name in known else count(str(ROOT / f'configs/{method}/{name}.py'))
            for name in configs(method)
        }
        texts[ROOT / f'configs/{method}/metafile.yml'] = metafile(method, trainable, published)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description='Write the files that `mim search` reads.')
    parser.add_argument(
        '--check',
        action='store_true',
        help='write nothing; name the files that are not as they would be written, and exit with 1 if there are any. '
        'Numbers of parameters are taken as they are there: the tests of the configs count them',
    )
    arguments = parser.parse_args()
    known = {}
    if arguments.check:
        metadata = {name: entry['Metadata'] for name, entry in listed().items()}
        known = {name: m[COUNT] if COUNT in m else m[BUDGET] for name, m in metadata.items()}
    due = 0
    for path, text in files(known).items():
        if not arguments.check:
            path.write_text(text, encoding='utf-8')
        elif not path.is_file() or path.read_text(encoding='utf-8') != text:
            print(f'{path.relative_to(ROOT)} is not as written: run python tools/write_metafiles.py')
            due = 1
    raise SystemExit(due)


if __name__ == '__main__':
    run(main)
