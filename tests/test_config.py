"""Command-line options reach what depends on them; bad input is found before anything is built."""

import pytest
from conftest import ROOT
from helpers import strings
from mmengine.config import Config

from mona_mm.commands.cli import run_parser
from mona_mm.config.load import adapt_to_device, find_last_checkpoint, load_config, resume_from
from mona_mm.data_check.check import check_data
from mona_mm.errors import ConfigError, MissingFileError

DEMO_CLASSES = ('disc', 'square', 'triangle', 'star')
COCO = str(ROOT / 'configs/mona/cascade_swin_b_coco.py')


def test_data_root_is_one_variable():
    """`data_root=` on the command line reaches every dataset and evaluator; no old path is left anywhere."""
    cfg = load_config(COCO, dict(data_root='/my/coco'))
    assert not [s for s in strings(cfg._cfg_dict) if 'data/coco' in s]
    assert cfg.val_evaluator.ann_file == '/my/coco/annotations/instances_val2017.json'
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.data_root == '/my/coco/'


def test_classes_reach_every_head():
    """`classes=` sets the data sets' classes and each `num_classes` of the three box heads and the mask head."""
    cfg = load_config(COCO, {'classes': ['cat', 'dog'], 'train_dataloader.batch_size': 3})
    assert [head.num_classes for head in cfg.model.roi_head.bbox_head] == [2, 2, 2]
    assert cfg.model.roi_head.mask_head.num_classes == 2
    for split in ('train', 'val', 'test'):
        assert tuple(cfg[f'{split}_dataloader'].dataset.metainfo.classes) == ('cat', 'dog')
    assert cfg.train_dataloader.batch_size == 3
    assert load_config(COCO, dict(classes='cat')).model.roi_head.mask_head.num_classes == 1


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('/my data/a (1).pth', '/my data/a (1).pth'),
        ('[traffic light, cat ,(1, 2.5), [ true,None ]]', ['traffic light', 'cat', (1, 2.5), [True, None]]),
        ('"a b, c"', ['a b', 'c']),
        (' 3 ', 3),
    ],
)
def test_spaces_in_options(text, value):
    """Paths and names of classes keep the spaces within them; around brackets and commas they mean nothing."""
    assert run_parser('').parse_args(['config', '--cfg-options', f'key={text}']).cfg_options == dict(key=value)


def test_config_that_is_not_there():
    with pytest.raises(MissingFileError, match='no config file configs/nowhere.py'):
        load_config('configs/nowhere.py')


@pytest.mark.parametrize('split', ['train', 'val'])
def test_missing_data(split, demo_data, monkeypatch):
    """A missing root, annotation file or image folder is named before training, with the option that mends it."""
    with pytest.raises(MissingFileError, match=rf'{split} data.*/nowhere/.*--cfg-options data_root='):
        check_data(load_config(COCO, dict(data_root='/nowhere')), (split,))
    cfg = load_config(COCO, dict(data_root=str(demo_data), classes=list(DEMO_CLASSES)))
    check_data(cfg, (split,))
    monkeypatch.chdir(demo_data.parent)
    check_data(load_config(COCO, dict(data_root=demo_data.name, classes=list(DEMO_CLASSES))), (split,))
    cfg[f'{split}_dataloader'].dataset.ann_file = 'annotations/mine.json'
    with pytest.raises(MissingFileError, match=r'annotations/mine\.json'):
        check_data(cfg, (split,))
    cfg = load_config(COCO, {'data_root': str(demo_data), f'{split}_dataloader.dataset.data_prefix.img': 'pictures/'})
    wrapped = Config(
        {f'{split}_dataloader': dict(dataset=dict(type='RepeatDataset', dataset=cfg[f'{split}_dataloader'].dataset))}
    )
    with pytest.raises(MissingFileError, match='pictures'):
        check_data(wrapped, (split,))


def test_missing_evaluation_file_and_load_from(demo_data):
    options = {'data_root': str(demo_data), 'classes': list(DEMO_CLASSES)}
    cfg = load_config(COCO, {**options, 'val_evaluator.ann_file': '/no/gt.json'})
    with pytest.raises(MissingFileError, match='no /no/gt.json'):
        check_data(cfg, ('val',))
    with pytest.raises(MissingFileError, match='load_from=/no/model.pth'):
        resume_from(load_config(COCO, {**options, 'load_from': '/no/model.pth'}), None)


@pytest.mark.parametrize(
    ('classes', 'message'),
    [
        (None, 'it has no person, '),
        (['disc', 'squire', 'triangle', 'star'], 'it has no squire'),
        (['star', 'disc', 'square', 'triangle'], 'disc, square, triangle, star'),
    ],
)
def test_classes_that_do_not_fit_the_annotations(classes, message, demo_data):
    """Missing, misspelt or re-ordered classes, which mmdet drops or misnames in silence; a subset in order is fine."""
    options = {'data_root': str(demo_data)}
    cfg = load_config(COCO, {**options, **({'classes': classes} if classes else {})})
    with pytest.raises(ConfigError, match=rf'{message}.*classes="\[disc,square,triangle,star\]"'):
        check_data(cfg, ('train',))
    check_data(load_config(COCO, {**options, 'classes': ['square', 'star']}), ('train', 'val'))


def test_cpu_fallback_is_said_and_complete(monkeypatch, capsys):
    """Without an accelerator no SyncBN, AMP or nccl is left, and one line says so; with one nothing changes."""
    monkeypatch.setattr('mona_mm.config.load.get_device', lambda: 'cuda')
    cfg = load_config(COCO)
    untouched = cfg.pretty_text
    adapt_to_device(cfg)
    assert cfg.pretty_text == untouched

    monkeypatch.setattr('mona_mm.config.load.get_device', lambda: 'cpu')
    cfg.launcher = 'pytorch'
    cfg.optim_wrapper.update(dtype='float16')
    capsys.readouterr()
    adapt_to_device(cfg)
    assert {'SyncBN', 'AmpOptimWrapper', 'nccl'}.isdisjoint(strings(cfg._cfg_dict))
    assert {'loss_scale', 'dtype', 'use_fsdp'}.isdisjoint(cfg.optim_wrapper)
    assert cfg.model_wrapper_cfg == dict(type='MMDistributedDataParallel', device_ids=None)
    assert capsys.readouterr().out.count('No accelerator here') == 1


def test_resume_needs_a_checkpoint(tmp_path):
    """`--resume` finds the last checkpoint, also in a work dir that moved; with none it says what to do."""
    cfg = Config(dict(work_dir=str(tmp_path)))
    with pytest.raises(MissingFileError, match=f'--resume: .*{tmp_path}.*--work-dir'):
        resume_from(cfg, 'auto')
    with pytest.raises(MissingFileError, match='--resume: there is no checkpoint /no/epoch_1.pth'):
        resume_from(cfg, '/no/epoch_1.pth')
    (tmp_path / 'epoch_3.pth').touch()
    (tmp_path / 'last_checkpoint').write_text('/where/it/was/epoch_3.pth')
    assert find_last_checkpoint(str(tmp_path)) == str(tmp_path / 'epoch_3.pth')
    resume_from(cfg, 'auto')
    assert cfg.resume and cfg.load_from == str(tmp_path / 'epoch_3.pth')
    cfg = Config(dict(work_dir=str(tmp_path)))
    resume_from(cfg, None)
    assert 'resume' not in cfg


def test_data_root_of_a_config_without_one(tmp_path):
    (tmp_path / 'mine.py').write_text('model = dict(type="X")\n')
    with pytest.raises(ConfigError, match='no top-level data_root'):
        load_config(str(tmp_path / 'mine.py'), dict(data_root='/x'))
