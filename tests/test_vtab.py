"""VTAB-1k and FGVC, the classification benchmarks of SPT: what trains, the published settings, the choice of the task,
the data in their original layouts, and small runs of every backbone with SPT and its baselines.

Numbers are the published ones (settings of SPT's code), held here a second time.
"""

import copy
import json
import math
import os
import runpy
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT
from helpers import strings
from metafiles import BUDGET, COUNT, listed
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, LOOPS, init_default_scope
from mmengine.runner import Runner
from PIL import Image
from torch import nn
from torchvision import transforms

from mona_mm.commands.cli import build_runner, read_run_config, run_parser
from mona_mm.config.build import build_on_meta
from mona_mm.config.load import adapt_to_device, load_config
from mona_mm.data_check.check import check_data
from mona_mm.errors import ConfigError, MissingFileError
from mona_mm.frozen.count import count_trainable
from mona_mm.nn.meta import meta_device
from mona_mm.optim.schedule import WarmupCosineLR
from mona_mm.spt import Plan
from mona_mm.spt.published import load_published_plan
from mona_mm.spt_plans.plans import make_plan
from mona_mm.spt_plans.sensitivity import build_loader

METHODS = ('full', 'fixed', 'bitfit', 'partial_1', 'adapter', 'lora', 'spt_lora', 'spt_adapter')
MODELS = {
    'vtab': ('vit_b', 'vit_b_mae', 'vit_b_mocov3', 'swin_b', 'convnext_b'),
    'fgvc': ('vit_b', 'vit_b_mae', 'vit_b_mocov3'),
}
VTAB = dict(
    cifar=100, caltech101=102, dtd=47, oxford_flowers102=102, oxford_iiit_pet=37, svhn=10, sun397=397,
    patch_camelyon=2, eurosat=10, resisc45=45, diabetic_retinopathy=5,
    clevr_count=8, clevr_dist=6, dmlab=6, kitti=4, dsprites_loc=16, dsprites_ori=16, smallnorb_azi=18, smallnorb_ele=9,
)  # fmt: skip
FGVC = dict(cub=200, nabirds=555, flowers=102, dogs=120, cars=196)
TASKS = dict(vtab=VTAB, fgvc=FGVC)
NAMES = [f'{method}_{model}_{data}' for data, models in MODELS.items() for model in models for method in METHODS]

# Trainable backbone parameters. ViT-B/16 has 12 blocks of width 768: LoRA 12*2*8*(768 + 768), Adapter 12*(2*768*8 + 768
# + 8), Partial-1 one block of 7,087,872, bias 12*(2304 + 3072 + 5*768) + 2*768.
TRAINABLE = {
    'vit_b': dict(full=85798656, fixed=0, bitfit=102912, partial_1=7087872, adapter=156768, lora=294912),
    'swin_b': dict(full=86743224, fixed=0, bitfit=200760, partial_1=12601632, adapter=204736, lora=385024),
    'convnext_b': dict(full=87566464, fixed=0, bitfit=130304, partial_1=8448000, adapter=307104, lora=1443840),
}


def file(name: str) -> str:
    return str(ROOT / f'configs/{method_of(name)}/{name}.py')


def method_of(name: str) -> str:
    return next(method for method in METHODS if name.startswith(f'{method}_'))


def architecture_of(name: str) -> str:
    return next(model for model in TRAINABLE if f'_{model}_' in name)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """As in test_configs.py."""
    monkeypatch.setattr('torch.accelerator.is_available', lambda: False)


# Settings --------------------------------------------------------------------------------------------------------


def test_every_method_on_every_model():
    """Each is one short file; there are no others."""
    found = {path.stem for path in (ROOT / 'configs').rglob('*.py') if path.stem.endswith(('_vtab', '_fgvc'))}
    assert found == set(NAMES)
    assert all(len(Path(file(name)).read_text().splitlines()) <= 15 for name in NAMES)


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name.startswith(('full', 'fixed')) or 'mocov3' in name))
        for name in NAMES
        if not name.startswith('spt_')
    ],
)
def test_what_trains(name):
    """At full size: the exact number of backbone parameters, the whole head, and an optimizer that has exactly those,
    with decay on matrices and kernels alone."""
    cfg = load_config(file(name))
    model = build_on_meta(cfg)
    count = count_trainable(model)
    assert count.backbone_trainable == TRAINABLE[architecture_of(name)][method_of(name)]
    assert listed()[name]['Metadata'][COUNT] == count.backbone_trainable
    assert count.trainable - count.backbone_trainable == (model.head.fc.in_features + 1) * model.head.num_classes
    check_optimizer(model, cfg)
    drop_path = max(m.drop_prob for m in model.backbone.modules() if type(m).__name__ == 'DropPath')
    assert drop_path == pytest.approx(0.1)


def check_optimizer(model, cfg):
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    given = {id(p): group for group in wrapper.optimizer.param_groups for p in group['params']}
    assert type(wrapper.optimizer) is torch.optim.AdamW
    assert given.keys() == {id(p) for p in model.parameters() if p.requires_grad}
    free = ('cls_token', 'pos_embed', 'relative_position_bias_table')
    for path, p in model.named_parameters():
        if p.requires_grad:
            decay = 0.0 if p.ndim == 1 or path.endswith(free) else 1e-4
            assert (given[id(p)]['lr'], given[id(p)]['weight_decay']) == (1e-3, decay), path


@pytest.mark.parametrize('method', ['lora', 'adapter'])
@pytest.mark.parametrize('task', ['cifar'])
def test_spt_at_full_size(method, task, tmp_path):
    """With a published plan the config of ViT-B/16 trains what that plan says, class token and head; single weights,
    vectors and class token without decay."""
    width = dict(lora='rank', adapter='bottleneck')[method]
    cfg = load_config(file(f'spt_{method}_vit_b_vtab'), dict(task=task))
    assert cfg.model.backbone.peft == dict(
        type='SPT', budget='0.4M', structured={'type': dict(lora='LoRA', adapter='Adapter')[method], width: 8}
    )
    init_default_scope(cfg.default_scope)
    with meta_device():
        stock = Runner.build_model(None, cfg.model.backbone.base)
    published = GOLDEN / f'spt_plans/{method}_{task}_0.4.pth'
    plan = load_published_plan(published, stock, dict(cfg.model.backbone.peft.structured))
    cfg.model.backbone.peft.plan = str(tmp_path / 'plan.safetensors')
    plan.save(cfg.model.backbone.peft.plan)
    model = build_on_meta(cfg)
    count = count_trainable(model)
    assert count.backbone_trainable == plan.counts.total == pytest.approx(4e5, rel=0.1)
    assert model.backbone.cls_token.requires_grad
    assert not model.backbone.pos_embed.requires_grad
    assert not any(p.requires_grad for p in model.backbone.patch_embed.parameters())
    check_optimizer(model, cfg)


@pytest.mark.parametrize('name', [name for name in NAMES if name.startswith('full_')])
def test_one_setting_for_all_methods(name):
    """Of a model and its data, methods differ in the backbone's `peft` and `trainable` alone. SPT plans 0.4M."""
    configs = [load_config(file(name.replace('full', method, 1))).to_dict() for method in METHODS]
    for cfg in configs:
        backbone = cfg['model'].pop('backbone')
        cfg['base'] = backbone['base']
        assert backbone.keys() in ({'type', 'base', 'peft'}, {'type', 'base', 'trainable'})
    assert all(cfg == configs[0] for cfg in configs)
    for method in ('spt_lora', 'spt_adapter'):
        assert listed()[name.replace('full', method, 1)]['Metadata'][BUDGET] == '0.4M'


@pytest.mark.parametrize(
    ('model', 'checkpoint'),
    [
        ('vit_b', 'vit_models/imagenet21k/ViT-B_16.npz'),
        ('vit_b_mae', 'mae/pretrain/mae_pretrain_vit_base.pth'),
        ('vit_b_mocov3', 'moco-v3/vit-b-300ep/linear-vit-b-300ep.pth.tar'),
        ('swin_b', 'v1.0.0/swin_base_patch4_window7_224_22k.pth'),
        ('convnext_b', 'convnext-base_3rdparty_in21k_20220124-13b83eec.pth'),
    ],
)
def test_model(model, checkpoint):
    """The pretrained file by its address, the published normalisation, a head from a truncated normal, fp32, no clip,
    seed 0, batches of 64."""
    names = [f'full_{model}_{data}' for data, models in MODELS.items() if model in models]
    for cfg in (load_config(file(name)) for name in names):
        base = cfg.model.backbone.base
        assert base.init_cfg.type == 'Pretrained' and base.init_cfg.checkpoint.endswith(checkpoint)
        assert cfg.model.data_preprocessor.mean == pytest.approx([255 * m for m in (0.485, 0.456, 0.406)])
        assert cfg.model.data_preprocessor.std == pytest.approx([255 * s for s in (0.229, 0.224, 0.225)])
        assert cfg.model.head.init_cfg == dict(type='TruncNormal', layer='Linear', std=0.02)
        assert cfg.optim_wrapper.type == 'OptimWrapper' and 'clip_grad' not in cfg.optim_wrapper
        assert cfg.randomness.seed == 0 and cfg.train_dataloader.batch_size == 64
    if model.startswith('vit'):
        backbone = build_on_meta(cfg).backbone
        assert len(backbone.layers) == 12 and backbone.layers[0].attn.num_heads == 12
        assert {m.eps for m in backbone.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def published_rate(epoch: int) -> float:
    if epoch < 10:
        return 1e-6 + epoch * (1e-3 - 1e-6) / 10
    return 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 100)) / 2


def runner_of(cfg, work_dir):
    """A Runner with a config's schedule over 16 iterations an epoch."""
    runner = Runner(
        model=nn.Linear(1, 1),
        work_dir=str(work_dir),
        experiment_name=os.urandom(4).hex(),
        default_scope=cfg.default_scope,
        train_dataloader=dict(dataset=range(1000), batch_size=64, sampler=dict(type='DefaultSampler')),
        train_cfg=cfg.train_cfg,
        optim_wrapper=dict(optimizer=cfg.optim_wrapper.optimizer),
        param_scheduler=cfg.param_scheduler,
    )
    assert len(runner.train_loop.dataloader) == 16
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    return runner


def test_learning_rate(tmp_path):
    """The schedule as a Runner builds it is the published rule in every epoch, exactly; with fewer epochs by an option
    it ends with them; it can be resumed."""
    cfg = load_config(file('spt_lora_vit_b_vtab'))
    runner = runner_of(cfg, tmp_path)
    (scheduler,) = runner.build_param_scheduler(runner.param_schedulers)
    rates = []
    for _ in range(100):
        rates.append(runner.optim_wrapper.get_lr()['lr'][0])
        scheduler.step()
    points = (0, 1, 9, 10, 11, 50, 99)
    assert {e: rates[e] for e in points} == {e: pytest.approx(published_rate(e), rel=1e-9) for e in points}
    assert rates == [pytest.approx(published_rate(e), rel=1e-9) for e in range(100)]

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    options = dict(warmup=2, start_ratio=0.1, end_ratio=0.5, begin=0, end=10)
    scheduler = WarmupCosineLR(optimizer, **options)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_value() == [pytest.approx(1.5)]  # half way from 2 to 1
    resumed = WarmupCosineLR(optimizer, **options)
    resumed.load_state_dict(scheduler.state_dict())
    resumed.step()
    assert optimizer.param_groups[0]['lr'] == pytest.approx(1 + (1 + math.cos(0.6 * math.pi)) / 2)

    short = load_config(file('spt_lora_vit_b_vtab'), {'train_cfg.max_epochs': 20})
    runner = runner_of(short, tmp_path)
    (scheduler,) = runner.build_param_scheduler(runner.param_schedulers)
    assert scheduler.end == 20


def test_evaluated_every_ten_epochs_and_in_the_last_ten():
    """As mmengine's own loop decides it."""
    runner, evaluated = MagicMock(), []
    given = dict(runner=runner, dataloader=MagicMock())
    loop = LOOPS.build(load_config(file('full_vit_b_vtab')).train_cfg, default_args=given)
    runner.val_loop.run.side_effect = lambda: evaluated.append(loop.epoch)

    def epoch():
        loop._epoch += 1

    loop.run_epoch = epoch
    loop.run()
    assert evaluated == [*range(10, 91, 10), *range(91, 101)]


# The task --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('data', TASKS)
def test_every_task_is_one_option(data):
    """`task=` reaches the number of classes and every path, with `data_root=` and without."""
    name = f'spt_lora_vit_b_{data}'
    default = load_config(file(name))
    first, *others = TASKS[data]
    assert default.task == first and list(default.tasks) == list(TASKS[data])
    assert default.model.head.num_classes == TASKS[data][first]
    assert load_config(file(name), dict(task=first)).to_dict() == default.to_dict()
    prefixes = dict(cub='images', nabirds='images', flowers='', dogs='Images', cars='')
    for task, classes in TASKS[data].items():
        cfg = load_config(file(name), {'task': task, 'data_root': 'data/other', 'train_cfg.max_epochs': 3})
        assert (cfg.task, cfg.model.head.num_classes, cfg.train_cfg.max_epochs) == (task, classes, 3)
        for split in ('train', 'val', 'test', 'sensitivity'):
            dataset = cfg[f'{split}_dataloader'].dataset
            assert dataset.data_root == f'data/other/{task}/'
            assert dataset.get('data_prefix') == (prefixes[task] if data == 'fgvc' else None)
        assert not any(s.startswith(default.data_root) for s in strings(cfg._cfg_dict))
    last = load_config(file(name), dict(task=others[-1]))
    assert last.train_dataloader.dataset.data_root == f'{default.data_root}{others[-1]}/'


def test_tasks_that_are_none():
    """An unknown task is refused with the known ones; so is any in a config for one task."""
    with pytest.raises(ConfigError, match=r'task=clevr: .*cifar, caltech101, .*smallnorb_ele\.'):
        load_config(file('full_vit_b_vtab'), dict(task='clevr'))
    with pytest.raises(ConfigError, match='task=cars: .*full_swin_l_flowers102.py'):
        load_config(str(ROOT / 'configs/full/full_swin_l_flowers102.py'), dict(task='cars'))


def test_work_dirs_of_tasks():
    """The default work dir has the task's name, so that 19 runs do not overwrite each other."""

    def work_dir(*arguments):
        return read_run_config(run_parser('').parse_args([*arguments])).work_dir

    name = file('spt_lora_vit_b_vtab')
    assert work_dir(name) == 'work_dirs/spt_lora_vit_b_vtab/cifar'
    assert work_dir(name, '--cfg-options', 'task=svhn') == 'work_dirs/spt_lora_vit_b_vtab/svhn'
    assert work_dir(name, '--work-dir', 'mine', '--cfg-options', 'task=svhn') == 'mine'
    assert work_dir(str(ROOT / 'configs/full/full_swin_l_flowers102.py')) == 'work_dirs/full_swin_l_flowers102'


# Data ------------------------------------------------------------------------------------------------------------


def picture(path: Path, seed: int, hw: tuple[int, int] = (40, 60), mode: str = 'RGB') -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*hw, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def make_vtab(root: Path, task: str, classes: int = 4) -> None:
    """Twelve images for training, of which eight are in train800, and four for the test; grey ones among them."""
    lines = {}
    for folder, count in (('train800val200', 12), ('test', 4)):
        lines[folder] = [f'images/{folder}/{k:06d}.png {k % classes}\n' for k in range(count)]
        for k, line in enumerate(lines[folder]):
            picture(root / task / line.split()[0], k, mode='L' if k == 1 else 'RGB')
    lists = dict(
        train800val200=lines['train800val200'],
        train800=lines['train800val200'][:8],
        val200=lines['train800val200'][8:],
        test=lines['test'],
    )
    for name, content in lists.items():
        (root / task / f'{name}.txt').write_text(''.join(content))


def make_fgvc(root: Path, task: str, prefix: str) -> None:
    """Ids of classes that are neither contiguous nor in order; the test has not all of them."""
    for split, ids in dict(train=[31, 7, 31, 10, 7, 10], val=[7, 31], test=[31, 31, 10]).items():
        names = {f'{id_:03d}.class/{split}_{k}.jpg': id_ for k, id_ in enumerate(ids)}
        for k, name in enumerate(names):
            picture(root / task / prefix / name, k, (300, 270))
        (root / task / f'{split}.json').write_text(json.dumps(names))


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> dict[str, Path]:
    """The roots of both benchmarks, with some of the tasks, in their original layouts."""
    root = tmp_path_factory.mktemp('data')
    for task in ('cifar', 'clevr_count'):
        make_vtab(root / 'vtab', task)
    for task, prefix in dict(cub='images', dogs='Images', flowers='').items():
        make_fgvc(root / 'fgvc', task, prefix)
    return dict(vtab=root / 'vtab', fgvc=root / 'fgvc')


def built(cfg, split):
    init_default_scope(cfg.default_scope)
    return DATASETS.build(cfg[f'{split}_dataloader'].dataset)


def test_vtab_images_are_the_published_ones(data):
    """Training and test images are torchvision's: decoded by PIL, resized to 224x224, bicubic with antialiasing; labels
    and order are the lists'."""
    cfg = load_config(file('full_vit_b_vtab'), dict(data_root=str(data['vtab']), task='clevr_count'))
    resize = transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC)
    for split, name, count in (('train', 'train800val200', 12), ('sensitivity', 'train800', 8), ('val', 'test', 4)):
        dataset = built(cfg, split)
        lines = (data['vtab'] / f'clevr_count/{name}.txt').read_text().splitlines()
        assert len(dataset) == len(lines) == count
        for i, line in enumerate(lines):
            path, label = line.split()
            sample = dataset[i]
            assert sample['data_samples'].gt_label.item() == int(label)
            expected = resize(Image.open(data['vtab'] / 'clevr_count' / path).convert('RGB'))
            assert np.array_equal(sample['inputs'].flip(0).permute(1, 2, 0).numpy(), np.array(expected))


@pytest.mark.slow
def test_fgvc_images_are_the_published_ones(data):
    """Test images are torchvision's: 256x256, bicubic, the centre; training images are a crop of that, flipped or not.
    Labels are the places of the ids among those of train.json, whatever the split holds."""
    cfg = load_config(file('full_vit_b_fgvc'), dict(data_root=str(data['fgvc']), task='dogs'))
    resize = transforms.Resize((256, 256), transforms.InterpolationMode.BICUBIC)
    places = {7: 0, 10: 1, 31: 2}
    for split, name in (('train', 'train'), ('sensitivity', 'train'), ('test', 'test')):
        dataset = built(cfg, split)
        annotations = json.loads((data['fgvc'] / f'dogs/{name}.json').read_text())
        assert len(dataset) == len(annotations)
        for i, (path, id_) in enumerate(annotations.items()):
            sample = dataset[i]
            assert sample['data_samples'].gt_label.item() == places[id_]
            image = np.array(resize(Image.open(data['fgvc'] / 'dogs/Images' / path)))
            found = sample['inputs'].flip(0).permute(1, 2, 0).numpy()
            if split == 'test':
                assert np.array_equal(found, image[16:-16, 16:-16])
            else:
                if i > 1:  # two will do
                    continue
                for crop in (found, found[:, ::-1]):
                    corners = np.argwhere((image[:33, :33] == crop[0, 0]).all(2))
                    if any(np.array_equal(image[y : y + 224, x : x + 224], crop) for y, x in corners):
                        break
                else:
                    pytest.fail(f'image {i} of {split} is no crop of the resized one')


def test_sensitivity_has_data_of_its_own(data):
    """The first images of train800 in their order, batches of 32, whatever the training's loader says."""
    cfg = load_config(file('spt_lora_vit_b_vtab'), dict(data_root=str(data['vtab'])))
    assert cfg.sensitivity_dataloader.batch_size == 32 and cfg.model.backbone.peft.get('num_batches', 16) == 16
    cfg.sensitivity_dataloader.update(batch_size=3, num_workers=0)
    init_default_scope(cfg.default_scope)
    batches = list(build_loader(cfg, 2, seed=5))
    paths = [sample.img_path for batch in batches for sample in batch['data_samples']]
    lines = (data['vtab'] / 'cifar/train800.txt').read_text().split()[::2]
    assert [str(Path(path).relative_to(data['vtab'] / 'cifar')) for path in paths] == lines[:6]


@pytest.mark.parametrize(
    ('data_name', 'task', 'lists', 'missing'),
    [('vtab', 'svhn', 'train800val200.txt', 'svhn'), ('fgvc', 'cars', 'train.json', 'cars')],
)
def test_missing_data(data_name, task, lists, missing, data, tmp_path):
    """A task that is not in data_root, a list or the images that are not in its folder: each named."""
    cfg = load_config(file(f'full_vit_b_{data_name}'), dict(data_root=str(data[data_name]), task=task))
    for split in ('train', 'val', 'sensitivity'):
        with pytest.raises(MissingFileError, match=rf'{split} data .*no .*{missing}/.*the folder that holds {task}/'):
            check_data(cfg, (split,))
    (tmp_path / task).mkdir()
    cfg = load_config(file(f'full_vit_b_{data_name}'), dict(data_root=str(tmp_path), task=task))
    with pytest.raises(MissingFileError, match=f'no .*{task}/{lists}'):
        check_data(cfg, ('train',))
    (tmp_path / task / lists).write_text('{"a.jpg": 1}' if data_name == 'fgvc' else 'a.jpg 1\n')
    with pytest.raises(MissingFileError, match='a.jpg'):
        check_data(cfg, ('train',))


def test_lists_that_do_not_fit(data, tmp_path):
    """Labels and ids beyond the task's classes, empty lines, what is no list, classes without training images: each is
    one clear error before training."""
    make_vtab(tmp_path, 'cifar', classes=4)
    make_fgvc(tmp_path, 'cub', 'images')

    def check(benchmark, message, error=ConfigError, split='train', **options):
        cfg = load_config(file(f'full_vit_b_{benchmark}'), dict(data_root=str(tmp_path), **options))
        with pytest.raises(error, match=message):
            check_data(cfg, (split,))

    vtab, cub = tmp_path / 'cifar/train800val200.txt', tmp_path / 'cub'
    check_data(load_config(file('full_vit_b_vtab'), dict(data_root=str(tmp_path))), ('train', 'val', 'sensitivity'))
    good = vtab.read_text()
    vtab.write_text(good + '\n')
    check('vtab', 'line 13')
    vtab.write_text(good.replace(' 3', ' 100', 1))
    check('vtab', r'line 4: .* 0 to 99.* 100 classes')
    check('fgvc', '3 classes.* 2.*task=', classes=['a', 'b'])
    (cub / 'test.json').write_text('{"a.jpg": 5}')
    check('fgvc', 'test.json .*5.*train.json', split='val')
    for content in ('[1]', '{"a.jpg": 1, "b.jpg": "x"}', '{}'):
        (cub / 'train.json').write_text(content)
        check('fgvc', 'train.json')
    (cub / 'train.json').write_text('a.jpg 1')
    check('fgvc', 'train.json .*JSON')
    (cub / 'train.json').unlink()
    (cub / 'val.json').write_text('{"a.jpg": 5}')
    cfg = load_config(
        file('full_vit_b_fgvc'), {'data_root': str(tmp_path), 'val_dataloader.dataset.ann_file': 'val.json'}
    )
    with pytest.raises(MissingFileError, match='train.json'):
        check_data(cfg, ('val',))


# Runs ------------------------------------------------------------------------------------------------------------

NARROW = {
    'model.backbone.base.init_cfg': None,
    'train_cfg.max_epochs': 2,
    'train_cfg.val_interval': 1,
    'param_scheduler.0.warmup': 1,
    'train_dataloader.batch_size': 4,
    'sensitivity_dataloader.batch_size': 4,
    **{f'{split}_dataloader.num_workers': 0 for split in ('train', 'val', 'sensitivity')},
    **{f'{split}_dataloader.persistent_workers': False for split in ('train', 'val')},
}
NARROW_MODEL = {
    'vit_b': dict(arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32), width=16),
    'swin_b': dict(arch=dict(embed_dims=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2]), width=96),
    'convnext_b': dict(arch=dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 32]), width=32),
}


def narrow(name: str, budget: str = '20%') -> dict:
    model = copy.deepcopy(NARROW_MODEL[architecture_of(name)])
    options = {**NARROW, 'model.head.in_channels': model['width']}
    options['model.backbone.base.arch'] = dict(_delete_=True, **model['arch'])
    if architecture_of(name) == 'convnext_b':
        options['model.backbone.base.layer_scale_init_value'] = 0.5  # at 1e-6 nothing in a block is sensitive
    if method_of(name).startswith('spt_'):
        options['model.backbone.peft.budget'] = budget
    return options


# A rule, a method, every architecture with SPT, both benchmarks.
SMALL_RUNS = (
    *('partial_1_vit_b_vtab', 'lora_vit_b_mae_fgvc', 'spt_lora_vit_b_vtab'),
    *('spt_adapter_swin_b_vtab', 'spt_lora_convnext_b_vtab'),
)


class Remember(Hook):
    """Keeps the parameters that training starts from."""

    def before_train(self, runner):
        self.parameters = {path: p.detach().clone() for path, p in runner.model.named_parameters()}


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in SMALL_RUNS))
        for name in (
            *(f'{method}_vit_b_vtab' for method in METHODS),
            *(f'{method}_{model}_vtab' for model in ('swin_b', 'convnext_b') for method in METHODS[-4:]),
            'lora_vit_b_mae_fgvc',
            'spt_adapter_vit_b_fgvc',
        )
    ],
)
def test_trains_and_evaluates(name, data, tmp_path):
    """Narrow, on a few images in the original layout, as `tools/train.py` does it: SPT plans first, on data of its own.
    What trains changes, the rest does not, and the best checkpoint by top-1 is kept."""
    benchmark = name.rpartition('_')[2]
    task = dict(vtab='clevr_count', fgvc='dogs')[benchmark]
    cfg = load_config(file(name), dict(data_root=str(data[benchmark]), task=task, **narrow(name)))
    cfg.test_dataloader = cfg.val_dataloader
    cfg.work_dir, cfg.experiment_name = str(tmp_path), os.urandom(4).hex()
    adapt_to_device(cfg)
    check_data(cfg, ('train', 'val', 'test'))
    make_plan(cfg)
    runner = build_runner(cfg)
    remember = Remember()
    runner.register_hook(remember)
    runner.train()
    before = remember.parameters
    assert runner.epoch == 2 and math.isfinite(runner.message_hub.get_scalar('train/loss').current())
    assert 0 <= runner.message_hub.get_scalar('val/accuracy/top1').current() <= 100
    assert list(tmp_path.glob('best_accuracy_top1_*.pth'))
    for path, p in runner.model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, before[path]), path
    trained = [path for path, p in runner.model.named_parameters() if not torch.equal(p, before[path])]
    assert any(path.startswith('head.') for path in trained)
    assert any(path.startswith('backbone.') for path in trained) == (method_of(name) != 'fixed')
    if method_of(name).startswith('spt_'):
        plan = Plan.load(tmp_path / 'plan.safetensors')
        assert (plan.info['task'], plan.info['batch_size']) == (task, 4)
        assert plan.info['data'] == [dict(vtab='train800.txt', fgvc='train.json')[benchmark]]
        assert count_trainable(runner.model).backbone_trainable == plan.counts.total


@pytest.fixture
def tool(monkeypatch, capsys, tmp_path):
    """A command line, run in a folder of its own; returns its exit status and its output."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')
        except SystemExit as stop:
            return stop.code, ''.join(capsys.readouterr())
        return 0, ''.join(capsys.readouterr())

    return run


@pytest.mark.slow
def test_command_lines(tool, data, tmp_path):
    """Two tasks with one config, each in a folder of its own with its plan; testing finds that plan; a plan of another
    task is refused; an unknown task ends in one line."""
    name = 'spt_lora_vit_b_vtab'
    options = {key: value for key, value in narrow(name).items() if not key.endswith('.arch')}
    arch = NARROW_MODEL['vit_b']['arch'] | dict(_delete_=True)
    options |= {f'model.backbone.base.arch.{key}': value for key, value in arch.items()}
    options |= {'data_root': data['vtab'], 'train_cfg.max_epochs': 1, 'test_dataloader.num_workers': 0}
    options['test_dataloader.persistent_workers'] = False
    given = ['--cfg-options', *(f'{key}={value}' for key, value in options.items())]
    for task in ('cifar', 'clevr_count'):
        status, output = tool('train.py', file(name), *given, f'task={task}')
        assert status == 0, output
        work_dir = tmp_path / 'work_dirs' / name / task
        assert 'There is no plan yet' in output
        assert Plan.load(work_dir / 'plan.safetensors').info['task'] == task
        status, output = tool('test.py', file(name), work_dir / 'epoch_1.pth', *given, f'task={task}')
        assert status == 0 and 'accuracy/top1' in output, output
    status, output = tool('train.py', file(name), '--work-dir', work_dir, *given)
    assert status == 2 and 'task=clevr_count' in output and 'cifar' in output
    status, output = tool('spt_sensitivity.py', file(name), '--budget', '20%', '--out', 'p', *given, 'task=svhm')
    assert status == 2 and 'has no such task. Its tasks are cifar,' in output and 'Traceback' not in output
    status, output = tool('spt_sensitivity.py', file(name), '--budget', '20%', '--out', 'p', *given)
    assert status == 0 and Plan.load(tmp_path / 'p').info['data'] == ['train800.txt']
