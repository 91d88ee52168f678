"""``tools/reproduce.py run own --data DIR``: methods side by side on a folder of one's own."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS
from own_folders import make_coco, make_folders, make_masks, make_yolo

from mona_mm.config.load import load_config
from mona_mm.errors import ConfigError, MissingFileError
from mona_mm.reproduce import MINI, Cell, Composer, extend_own_table, read_own_table, read_records
from mona_mm.type_names import enter_scope

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
_base_ = ['{root}/configs/custom/quick_classifier_dinov2_s.py']
model = dict(
    backbone=dict(
        base=dict(
            arch=dict(_delete_=True, embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32),
            img_size=56,
            init_cfg=None,
        ),
        peft=dict(bottleneck=8),
    ),
    head=dict(in_channels=16),
)
recipe = dict(iterations=(4, 4))
"""


@pytest.fixture
def config(tmp_path) -> Path:
    """A config of a narrow classifier that trains four steps."""
    (tmp_path / 'narrow.py').write_text(CONFIG.format(root=ROOT.as_posix()))
    return tmp_path / 'narrow.py'


@pytest.fixture
def weights(config, tmp_path) -> Path:
    """The file of a base for it, on which its deltas can be loaded again."""
    cfg = load_config(str(config))
    enter_scope(cfg)
    torch.save(MODELS.build(cfg.model.backbone.base).state_dict(), tmp_path / 'weights.pth')
    return tmp_path / 'weights.pth'


@pytest.mark.parametrize(
    ('make', 'options', 'expected'),
    [
        (make_coco, {}, ('quick_mask_rcnn_dinov2_s', 'coco/segm_mAP', 'mask AP')),
        (make_yolo, {}, ('quick_retinanet_dinov2_s', 'coco/bbox_mAP', 'box AP')),
        (make_masks, {}, ('quick_fcn_dinov2_s', 'mIoU', 'mIoU')),
        (lambda root: make_folders(root, 10), dict(test=0.3), ('quick_classifier_dinov2_s', 'accuracy/top1', 'top-1')),
    ],
)
def test_a_folder_becomes_a_task(make, options, expected, tmp_path):
    """The config, score and splits follow from what the folder holds; a part of the images is kept for the test."""
    folder = make(tmp_path / 'my data-1')
    found, tasks = extend_own_table(tmp_path / 'work', str(folder), options=options)
    (task,) = found.comparison().tasks
    assert tasks == ['my_data_1'] and (Path(task.config).stem, task.metric, task.label) == expected
    composer = Composer(found.comparison(), Path('data'), None, 'cpu', tmp_path / 'work/cpu')
    cfg = composer.compose(Cell('my_data_1', 'mona', 2.5e-3, 1))
    assert cfg.model.backbone.base.type == 'mona_mm.DINOv2' and cfg.model.backbone.peft.type == 'Mona'
    assert cfg.optim_wrapper.optimizer.lr == 2.5e-3 and cfg.randomness.seed == 1 and 'recipe' not in cfg
    assert set(cfg.own_data.images) == {'train', 'val', 'test'}
    assert cfg.own_data.test == options.get('test', 0.2)
    fixed = composer.compose(Cell('my_data_1', 'fixed', 2.5e-3, 1))
    assert fixed.model.backbone.trainable == 'fixed' and 'peft' not in fixed.model.backbone
    assert fixed.train_dataloader == cfg.train_dataloader and fixed.train_cfg == cfg.train_cfg


def test_the_table_grows(config, tmp_path):
    """Folders, methods, learning rates and seeds of later commands join what is there; another folder of a known name
    is refused, and so is what there is not."""
    work = tmp_path / 'work'
    with pytest.raises(MissingFileError, match='There is no table in .*run own --data DIR'):
        extend_own_table(work, None)
    first, _ = extend_own_table(work, str(make_folders(tmp_path / 'a')), str(config), methods=['mona', 'fixed'])
    assert list(first.comparison().methods) == ['fixed', 'mona']  # in the order of the table mini
    assert first.comparison().learning_rates == MINI.learning_rates and first.comparison().seeds == (0, 1, 2)
    extend_own_table(work, str(make_coco(tmp_path / 'b')), methods=['lora'], learning_rates=[1e-3], seeds=1)
    table = read_own_table(work).comparison()
    assert [task.name for task in table.tasks] == ['a', 'b'] and list(table.methods) == ['fixed', 'lora', 'mona']
    assert table.learning_rates == (1e-3,) and table.seeds == (0,)
    assert extend_own_table(work, None)[1] == ['a', 'b']
    with pytest.raises(ConfigError, match='by the name a. Name another --work-dir'):
        extend_own_table(work, str(make_folders(tmp_path / 'other/a')), str(config))
    with pytest.raises(ConfigError, match='--methods spt_lora: the table own has full, fixed'):
        extend_own_table(work, None, methods=['spt_lora'])
    with pytest.raises(ConfigError, match='--learning-rates are numbers between 0 and 1'):
        extend_own_table(work, None, learning_rates=[3.0])
    with pytest.raises(MissingFileError, match='it does not exist. Name the folder'):
        extend_own_table(work, str(tmp_path / 'nowhere'))


def test_a_moved_folder_keeps_its_results(config, tmp_path):
    """The digest of a cell does not depend on where data and work dir are, but on what the data hold."""
    prints = []
    for place, count in (('here', 5), ('there', 5), ('more', 9)):
        work = tmp_path / place / 'work'
        found, _ = extend_own_table(work, str(make_folders(tmp_path / place / 'set', count)), str(config))
        composer = Composer(found.comparison(), Path('data'), None, 'cpu', work / 'cpu')
        prints.append(composer.fingerprint(Cell('set', 'lora', 1e-3, 0)))
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.slow
def test_run_show_page(config, weights, tool, tmp_path):
    """One command from a folder to the records of two methods; then the table, and the page with it."""
    work, folder = tmp_path / 'work', make_folders(tmp_path / 'mine', 10)
    common = ['own', '--work-dir', str(work)]
    run = ['--data', str(folder), '--config', str(config), '--weights', str(weights), '--device', 'cpu']
    run += ['--methods', 'fixed', 'lora', '--seeds', '1', '--learning-rates', '1e-3']
    status, out, err = tool('reproduce.py', 'run', *common, *run)
    assert status == 0, err
    records = read_records(work / 'runs', 'cpu')
    assert set(records) == {Cell('mine', m, 1e-3, 0, split) for m in ('fixed', 'lora') for split in ('val', 'test')}
    for record in records.values():
        assert record.get('error') is None and 0 <= record['score'] <= 100 and record['metric'] == 'top-1'
    assert records[Cell('mine', 'lora', 1e-3, 0)]['trained_in_backbone'] > 0
    status, out, err = tool('reproduce.py', 'run', *common, '--weights', str(weights))
    assert status == 0 and 'none to go' in out, err
    status, out, err = tool('reproduce.py', 'show', *common)
    assert status == 0 and 'Methods on data of your own (on cpu)' in out, err
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(('fixed', 'lora', 'mona'))}
    assert set(rows) == {'fixed', 'lora'}
    assert rows['lora'][1] == f'{records[Cell("mine", "lora", 1e-3, 0, "test")]["score"]:.2f}'
    status, out, err = tool('reproduce.py', 'page', *common)
    text = (work / 'own.html').read_text()
    assert status == 0 and out.strip() == str(work / 'own.html'), err
    assert 'mine' in text and 'lora' in text and 'protocol' not in text and '<svg' in text
    assert json.loads((work / 'table.json').read_text())['tasks']['mine']['folder'] == str(folder)
    assert not list(folder.rglob('*.json')), 'nothing is written to the data'
