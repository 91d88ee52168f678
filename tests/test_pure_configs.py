"""Pure-Python configs, in which types are classes, go through every tool as those do in which they are names."""

import json

import cv2
import mmengine
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.config.lazy import LazyObject
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import WEIGHT_INITIALIZERS
from pure_configs import LIBRARIES, write_pure_config
from torch import nn

from mona_mm import PeftBackbone
from mona_mm.checkpoint.config_text import parse_config
from mona_mm.checkpoint.delta_file import read_delta
from mona_mm.checkpoint.merge import stock_config, types_left
from mona_mm.config.build import build_on_meta
from mona_mm.config.load import adapt_to_device, fine_tune_from, load_config
from mona_mm.data_check.check import check_data
from mona_mm.errors import ConfigError
from mona_mm.hooks import LoadCheckHook
from mona_mm.methods import LoRA
from mona_mm.registry import METHODS, MODELS
from mona_mm.reproduce.cells import differences
from mona_mm.spt_plans.sensitivity import config_fingerprint
from mona_mm.type_names import _CLASSES, full_name, is_of_mona_mm, is_type, look_up, type_name, with_names


@pytest.fixture
def data(tmp_path, demo_data):
    """By library, the root of its data."""
    root = tmp_path / 'data'
    rng = np.random.default_rng(0)
    for folder in ('images', 'labels'):
        (root / folder).mkdir(parents=True)
    for i in range(2):
        cv2.imwrite(str(root / f'images/{i}.jpg'), rng.integers(0, 256, (32, 32, 3), np.uint8))
        cv2.imwrite(str(root / f'labels/{i}.png'), rng.integers(0, 3, (32, 32), np.uint8))
    (root / 'list.txt').write_text('0.jpg 0\n1.jpg 1\n')
    return dict(mmdet=demo_data, mmseg=root, mmpretrain=root)


@pytest.fixture(params=LIBRARIES)
def config(request, data, tmp_path):
    return write_pure_config(tmp_path, request.param, data[request.param], 'Mona', ', bottleneck=4')


@pytest.mark.parametrize(
    'type_',
    [
        'PeftBackbone',
        'mona_mm.PeftBackbone',
        'mona_mm.backbone.PeftBackbone',
        PeftBackbone,
        LazyObject('mona_mm', 'PeftBackbone'),
        LazyObject('mona_mm').PeftBackbone,
    ],
)
def test_every_spelling_of_a_type(type_):
    """Name, scoped name, full name, function, lazy object and lazy attribute are the same type."""
    assert is_type(type_, 'mona_mm.PeftBackbone') and is_type(dict(type=type_), 'mona_mm.PeftBackbone')
    assert type_name(type_) == 'PeftBackbone'
    assert is_of_mona_mm(type_) == (type_ != 'PeftBackbone')
    assert look_up(MODELS, type_) is PeftBackbone
    assert look_up(MODELS, with_names(dict(type=type_))['type']) is PeftBackbone
    assert not is_type(type_, 'mona_mm.FrozenModel')
    assert is_type(type_, 'mmdet.PeftBackbone') == (type_ == 'PeftBackbone')


def test_what_is_no_type():
    for value in (None, 3, [], {}, {'a': 1}, ''):
        assert type_name(value) == '' and not is_type(value, 'BN') and not is_of_mona_mm(value)
    assert all(look_up(METHODS, name) is None for name in ('', '.', 'a.', '.a', 'a.b', 'a b.c', 'a\0.b'))
    assert is_type('mmdet.SwinTransformer', 'SwinTransformer') and not is_type('mmdet.Mona', 'mona_mm.Mona')
    assert full_name(nn.SyncBatchNorm) == 'torch.nn.modules.batchnorm.SyncBatchNorm'


def test_names_that_are_no_classes_names():
    """The table of registered names agrees with the registries of mmengine and mmcv."""
    import mmcv.cnn  # noqa: F401

    for name, cls in _CLASSES.items():
        registry = WEIGHT_INITIALIZERS if name in WEIGHT_INITIALIZERS.module_dict else ROOT_MODELS
        assert registry.module_dict[name].__name__ == cls
    assert is_type(nn.SyncBatchNorm, 'SyncBN') and is_type('SyncBN', 'torch.nn.SyncBatchNorm')


def test_config_stays_text(config):
    """What the command line and the machine change of a pure-Python config leaves one that can be dumped and read."""
    cfg = load_config(config, {'data_root': '/x/', 'classes': ['p', 'q'], 'model.backbone.peft.bottleneck': 8})
    cfg.launcher = 'pytorch'
    cfg.model_wrapper_cfg = dict(type=LazyObject('mmengine.model', 'MMDistributedDataParallel'))
    adapt_to_device(cfg)
    fine_tune_from(cfg, 'a.pth')
    assert '<class' not in cfg.pretty_text and '.SyncBatchNorm' not in cfg.pretty_text and '/x/' in cfg.pretty_text
    assert [hook for hook in cfg.custom_hooks if hook.type is LoadCheckHook][0].other_classes
    assert len(cfg.custom_hooks) == 4
    again = Config.fromstring(cfg.pretty_text, '.py')
    assert cfg.model.backbone.peft.bottleneck == again.model.backbone.peft.bottleneck == 8
    assert config_fingerprint(cfg) == config_fingerprint(again)
    assert any(p.requires_grad for p in build_on_meta(again).backbone.parameters())


def test_data_are_checked(config):
    check_data(load_config(config), ('train', 'val'))
    names = dict(mmdet='circle', mmseg='z', mmpretrain='z')
    library = next(name for name in names if name in config)
    classes = dict(mmdet=['disc', 'circle'], mmseg=['one'], mmpretrain=['one'])[library]
    with pytest.raises(ConfigError, match='class'):
        check_data(load_config(config, dict(classes=classes)), ('train',))


def test_count_params(config, tool):
    status, out, error = tool('count_params.py', config, '--json')
    assert status == 0, error
    row = json.loads(out[out.index('[') :])[0]
    assert row['method'] == 'Mona' and 0 < row['backbone_trainable'] < row['backbone_total']


def test_stock_config_is_of_no_type_of_ours(config, data, tmp_path):
    library = next(name for name in LIBRARIES if name in config)
    cfg = load_config(write_pure_config(tmp_path, library, data[library], 'LoRA', ', rank=4'))
    stock = stock_config(cfg)
    assert types_left(stock) == [] and 'mona_mm' not in stock.pretty_text
    build_on_meta(Config.fromstring(stock.pretty_text, '.py'))


def test_settings_are_those_of_the_config_with_names(config):
    """A run of a pure-Python config does not differ from one of the same config with names."""
    pure = load_config(config)
    logged = parse_config(pure.pretty_text)
    named = json.loads(json.dumps(with_names(pure._cfg_dict), default=str).replace('torch.nn.SyncBatchNorm', 'SyncBN'))
    for node in _dicts(named):
        if isinstance(node.get('type'), str):
            node['type'] = node['type'].rpartition('.')[2]
    assert differences(logged, named, None) == [] and differences(named, logged, None) == []


def _dicts(node):
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    for child in node if isinstance(node, list | tuple) else ():
        yield from _dicts(child)


@pytest.mark.slow
@pytest.mark.parametrize(
    'library', ['mmdet', *(pytest.param(name, marks=pytest.mark.slow) for name in ('mmseg', 'mmpretrain'))]
)
def test_every_tool(library, data, tmp_path, tool):
    """Train an iteration, test, take the delta apart and put it together, and collect the run."""
    method, options = ('LoRA', ', rank=4') if library == 'mmdet' else ('Mona', ', bottleneck=4')
    config = write_pure_config(tmp_path, library, data[library], method, options)
    work = tmp_path / 'work'

    def run(*arguments):
        status, out, error = tool(*arguments)
        assert status == 0, error
        return out

    run('train.py', config, '--work-dir', str(work))
    delta = work / 'epoch_1.delta.safetensors'
    header = read_delta(delta).header
    assert header.methods['backbone']['type'] == method and json.dumps(header.methods)
    assert f'{method}(' in run('delta.py', 'info', str(delta))
    other = '--allow-other-base'  # a base without pretrained weights is another one in every process
    shown = ['--show-dir', str(tmp_path / 'shown'), '--out', str(tmp_path / 'out.pkl')] if library == 'mmdet' else []
    run('test.py', config, str(delta), '--work-dir', str(work / 'test'), other, *shown)
    if shown:
        assert len(mmengine.load(tmp_path / 'out.pkl')) == len(list((tmp_path / 'shown').rglob('*.jpg'))) == 2
    run('test.py', config, str(work / 'epoch_1.pth'), '--work-dir', str(work / 'test'))
    run('delta.py', 'extract', config, str(work / 'epoch_1.pth'), str(tmp_path / 'b.delta.safetensors'))
    merged = tmp_path / 'merged.pth'
    run('delta.py', 'merge', config, str(delta), str(merged), other, '--config-out', str(tmp_path / 'merged.py'))
    again = build_on_meta(Config.fromfile(str(tmp_path / 'merged.py')))
    assert again.state_dict().keys() == torch.load(merged, weights_only=True)['state_dict'].keys()
    dumped = next(work.glob('*/vis_data/config.py'))
    run('train.py', str(dumped), '--work-dir', str(tmp_path / 'dumped'))


def test_sensitivity_and_plan(data, tmp_path, tool):
    """SPT as a class, its structured module as one; training takes the plan that the tool has left."""
    options = ', structured=dict(type=LoRA, rank=2), budget=2000, num_batches=1'
    config = write_pure_config(tmp_path, 'mmpretrain', data['mmpretrain'], 'SPT', options)
    with open(config) as file:
        text = file.read()
    with open(config, 'w') as file:
        file.write(text.replace('import SPT', 'import SPT\nfrom mona_mm.methods import LoRA'))
    work = ('--work-dir', str(tmp_path / 'work'))
    status, out, error = tool('spt_sensitivity.py', config, '--budget', '2000', '--num-batches', '1', *work)
    assert status == 0 and 'LoRA modules' in out, error
    status, out, error = tool('train.py', config, *work)
    assert status == 0 and f'Plan: {tmp_path}' in out and 'measuring' not in out, error
    plan = str(tmp_path / 'work/plan.safetensors')
    base = load_config(config).model.backbone.base
    assert PeftBackbone(base=base, peft=dict(type='SPT', plan=plan, structured=dict(type=LoRA)))
