"""The model index that mim reads: complete, in a form that its parser takes, and true to the published numbers.

That the number of parameters in it is what each config trains is tested with the configs (test_configs.py).
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from metafiles import METHODS, PUBLISHED, TOOL, configs
from modelindex.load_model_index import load

DUE = 'run: python tools/write_metafiles.py'
NOT_METHODS = ('_base_', 'custom', 'demo')


@pytest.fixture(scope='module')
def index():
    return load(str(ROOT / 'model-index.yml'))


def test_every_config_is_listed_once(index):
    """Each file of a method's folder is one model, under its own name, and each model's config is a file."""
    assert {path.name for path in (ROOT / 'configs').iterdir()} - {*NOT_METHODS} == set(METHODS)
    names = Counter(model.name for model in index.models)
    assert names == Counter(name for method in METHODS for name in configs(method)), DUE
    for model in index.models:
        assert (ROOT / model.config).is_file()
        assert Path(model.config).stem == model.name == model.name.lower()  # mim compares with the lower-case name
        assert METHODS[Path(model.config).parent.name].title == model.in_collection


def test_the_parser_takes_it(index):
    """mim's own parser finds no fault, and every model is one of a collection."""
    assert index.check(silent=True) == []
    assert {collection.name for collection in index.collections} == {entry.title for entry in METHODS.values()}
    for collection in index.collections:
        assert collection.paper.startswith('https://')
        assert (ROOT / collection.data['Code']).is_file()


def test_files_are_as_written(tool, monkeypatch, capsys):
    """The files are what the tool makes of the configs and the published numbers of today; those that are not are
    named."""
    assert tool('write_metafiles.py', '--check') == (0, '', '')
    monkeypatch.setitem(TOOL.CATALOGUE, 'lora', replace(TOOL.CATALOGUE['lora'], title='Another name'))
    with pytest.raises(SystemExit) as stopped:
        TOOL.main()
    assert stopped.value.code == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ['configs/lora/metafile.yml']


def test_results_are_the_published_ones(index):
    """By method and data set the numbers in the index are the numbers in the evidence: none left out, none made up. The
    evidence is read here in another way than by the script."""
    published = json.loads(PUBLISHED.read_text())
    expected = set()

    def collect(data: str, method: str, node) -> None:
        if isinstance(node, dict):
            for child in node.values():
                collect(data, method, child)
        elif node is not None:
            value, grade = node
            assert grade in 'AFC'
            expected.add((data, method, value))

    for key, data in (
        ('coco_cascade_mask_rcnn_swin_b', 'COCO'),
        ('voc_retinanet_swin_l_ap50', 'PASCAL VOC 2007'),
        ('ade20k_upernet_swin_l_miou', 'ADE20K'),
        ('gta_cityscapes_mask2former_dinov2_miou', 'Cityscapes'),
    ):
        for method, node in published[key].items():
            collect(data, method, node)
    collect('PASCAL VOC 2007', 'mona', published['ablation_bottleneck_voc_swin_l'])
    for rows in published['ablation_backbone_voc'].values():
        for method, node in rows.items():
            collect('PASCAL VOC 2007', method, node)
    names = dict(flowers102='Oxford 102 Flowers', oxfordpets='Oxford-IIIT Pets', voc2007='PASCAL VOC 2007')
    for method, rows in published['classification_swin_l_top1'].items():
        for key, node in rows.items():
            collect(names[key], method, node)

    found = [
        (result.dataset, Path(model.config).parent.name, value)
        for model in index.models
        for result in model.results or ()
        for value in result.metrics.values()
    ]
    assert sorted(found) == sorted(expected)


def test_a_number_says_where_it_is_from(index):
    """Beside every number stands that others published it, and how well it is known."""
    for model in index.models:
        metrics = {metric for result in model.results or () for metric in result.metrics}
        sources = {key: text for key, text in model.metadata.data.items() if key.startswith('Source of ')}
        assert sources.keys() == {f'Source of {metric}' for metric in metrics}
        assert all(text.startswith('published by the authors') for text in sources.values())
        assert model.weights is None  # none are published
