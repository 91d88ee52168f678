"""Recipes for small data, and the batch: schedules by the number of images, learning rates, rare classes, memory."""

import argparse
import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS
from own_folders import CLASSES, image, make_coco, make_folders, make_masks
from tiny_tasks import classifier

from mona_mm.commands import batch as batch_module
from mona_mm.commands.batch import Batch, Probe, batch_argument, largest_batch, set_batch
from mona_mm.config.build import build_on_meta
from mona_mm.config.load import load_config
from mona_mm.config.recipe import apply_recipe, scale_learning_rate
from mona_mm.errors import ConfigError, UserError
from mona_mm.type_names import enter_scope

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30


def of_folder(name: str, root: Path, work: Path, images: int, options: dict | None = None) -> Config:
    """A shipped config set to a folder, with another number of images found there."""
    cfg = load_config(str(ROOT / f'configs/custom/{name}.py'), options, str(root), str(work))
    cfg.own_data.images.train = images
    return cfg


# The schedule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('images', 'steps'),
    [(10, 1000), (400, 4000), (20_000, 20_000)],  # the least; 40 passes in batches of 4; the most
)
def test_schedule_follows_from_the_images(images, steps, tmp_path):
    cfg = of_folder('custom_retinanet_swin_t', make_coco(tmp_path / 'data'), tmp_path / 'work', images)
    (line,) = apply_recipe(cfg)
    assert cfg.train_cfg.max_iters == steps
    assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval == steps // 10
    warm_up, decay = cfg.param_scheduler
    assert (warm_up.end, decay.begin, decay.end) == (steps // 40, steps // 40, steps)
    assert cfg.optim_wrapper.optimizer.lr == 5e-4 and 'recipe' not in cfg
    assert line == (
        f'Schedule for {images} training images: {steps} steps, batch 4, each image {steps * 4 / images:.3g} times, '
        f'evaluated every {steps // 10}.'
    )


def test_images_are_counted(tmp_path):
    """The training images of the folder, those that validate not among them."""
    cfg = load_config(
        str(ROOT / 'configs/custom/quick_classifier_dinov2_s.py'),
        {},
        dict(folder=str(make_folders(tmp_path / 'data', 10)), val=0.3),
        str(tmp_path / 'work'),
    )
    found = cfg.own_data.images
    assert found == dict(train=7 * len(CLASSES), val=3 * len(CLASSES))
    assert len((tmp_path / 'work/data/train.txt').read_text().splitlines()) == found['train']


def test_what_the_user_says_stays(tmp_path):
    """With a number of steps of the user's, the schedulers end with that."""
    options = {
        'train_cfg.max_iters': 600,
        'train_cfg.val_interval': 50,
        'optim_wrapper.optimizer.lr': 0.01,
        'train_dataloader.batch_size': 16,
        'default_hooks.logger.interval': 7,
    }
    cfg = of_folder('custom_retinanet_swin_t', make_coco(tmp_path / 'data'), tmp_path / 'work', 400, options)
    apply_recipe(cfg, options)
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (600, 50)
    assert cfg.param_scheduler[-1].end == 600 and cfg.param_scheduler[0].end == 15
    assert (cfg.optim_wrapper.optimizer.lr, cfg.default_hooks.logger.interval) == (0.01, 7)
    own = {'param_scheduler': [dict(type='ConstantLR', begin=0, end=5, by_epoch=False)]}
    cfg = of_folder('custom_retinanet_swin_t', tmp_path / 'data', tmp_path / 'work', 400, own)
    apply_recipe(cfg, own)
    assert cfg.param_scheduler[0].end == 5 and cfg.train_cfg.max_iters == 4000


@pytest.mark.parametrize('steps', [6, 30, 300])
def test_the_whole_rate_is_reached(steps, tmp_path):
    """However short the schedule: after the warm-up the rate is the config's, and at the end it is near zero."""
    options = {'train_cfg.max_iters': steps}
    cfg = of_folder('quick_fcn_dinov2_s', make_masks(tmp_path / 'data'), tmp_path / 'work', 80, options)
    apply_recipe(cfg, options)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = [PARAM_SCHEDULERS.build({**each, 'optimizer': optimizer}) for each in cfg.param_scheduler]
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert rates[0] < 0.1 and max(rates) == pytest.approx(1, abs=0.3 if steps == 6 else 0.02)
    assert optimizer.param_groups[0]['lr'] < 0.05


def test_no_recipe(tmp_path):
    """Without a folder, or with recipe=None, a config keeps its schedule."""
    plain = Config.fromfile(str(ROOT / 'configs/custom/custom_retinanet_swin_t.py'))
    assert apply_recipe(plain) == [] and plain.train_cfg.max_iters == 2000
    options = dict(recipe=None)
    cfg = of_folder('custom_retinanet_swin_t', make_coco(tmp_path / 'data'), tmp_path / 'work', 9000, options)
    assert apply_recipe(cfg, options) == [] and cfg.train_cfg.max_iters == 2000


def test_schedule_in_epochs(tmp_path):
    """The published configs keep their own, unless a recipe is asked for: then their epochs follow, and a warm-up that
    is longer than a tenth of the schedule does not stay."""
    options = {'recipe.passes': 30, 'recipe.evaluations': 5}
    root = make_coco(tmp_path / 'data')
    file = str(ROOT / 'configs/mona/cascade_swin_b_coco.py')
    cfg = load_config(file, options, str(root), str(tmp_path / 'work'))
    cfg.own_data.images.train = 100
    published = load_config(file)
    batch, epochs = cfg.train_dataloader.batch_size, published.train_cfg.max_epochs
    apply_recipe(cfg, options)
    assert (cfg.train_cfg.max_epochs, cfg.train_cfg.val_interval) == (30, 6)
    for old, new in zip(published.param_scheduler, cfg.param_scheduler, strict=True):
        if old.by_epoch:
            assert new.end == 30 and new.milestones == [round(n * 30 / epochs) for n in old.milestones]
        else:
            assert old.end > new.end == 30 * 100 // batch // 10


@pytest.mark.parametrize(
    ('recipe', 'message'),
    [
        (dict(passe=3), 'recipe.passe: a recipe has passes, iterations'),
        (dict(passes=0), 'recipe.passes=0: must be a number above 0'),
        (dict(iterations=100), 'recipe.iterations=100: must be the least and the largest'),
        (dict(rare=3), 'recipe.rare=3: must be a number between 0 and 1'),
        (dict(early_stopping=0), 'recipe.early_stopping=0: must be a number of evaluations'),
    ],
)
def test_mistakes_in_a_recipe(recipe, message):
    with pytest.raises(ConfigError, match=message):
        apply_recipe(Config(dict(recipe=recipe, own_data=dict(images=dict(train=5)))))


# The learning rate ---------------------------------------------------------------------------------------------------


def rated(optimizer: str, batch: int, **more) -> Config:
    wrapper = dict(optimizer=dict(type=optimizer, lr=0.001), **more.pop('wrapper', {}))
    return Config(dict(optim_wrapper=wrapper, train_dataloader=dict(batch_size=batch), **more))


@pytest.mark.parametrize(
    ('optimizer', 'factor'), [('AdamW', math.sqrt(8)), ('mmpretrain.Lamb', math.sqrt(8)), ('SGD', 8)]
)
def test_learning_rate_by_batch(optimizer, factor):
    """By the root with optimizers that divide a gradient by its size, in proportion with SGD."""
    cfg = rated(optimizer, 16)
    (line,) = scale_learning_rate(cfg, 2)
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(0.001 * factor, rel=1e-3)
    assert line.startswith(f'Learning rate {cfg.optim_wrapper.optimizer.lr:g}: 0.001 is for a batch of 2')
    accumulated = rated(optimizer, 2, wrapper=dict(accumulative_counts=8))
    scale_learning_rate(accumulated, 2)
    assert accumulated.optim_wrapper.optimizer.lr == cfg.optim_wrapper.optimizer.lr


def test_learning_rates_that_stay():
    for cfg, base, given in (
        (rated('AdamW', 2), 2, ()),
        (rated('AdamW', 16), None, ()),
        (rated('AdamW', 16), 2, ('optim_wrapper.optimizer.lr',)),
        (rated('AdamW', 16), 2, ('optim_wrapper',)),
        (rated('AdamW', 16, auto_scale_lr=dict(enable=True, base_batch_size=2)), 2, ()),  # mmengine does it
    ):
        assert scale_learning_rate(cfg, base, given) == [] and cfg.optim_wrapper.optimizer.lr == 0.001


@pytest.mark.parametrize(
    ('backbone', 'lr'),
    [
        ({'peft': None}, 1e-4),
        ({'peft': None, 'trainable': 'full'}, 1e-4),
        ({'peft': None, 'trainable': 'fixed'}, 2.5e-3),
        ({'trainable': 'bitfit'}, 2.5e-3),
        ({}, 2.5e-3),
    ],
)
def test_rate_where_the_backbone_trains(backbone, lr, tmp_path):
    """The quick segmentor has the best rates of docs/which_method.md: another one for full tuning."""
    options = {f'model.backbone.{key}': value for key, value in backbone.items()}
    cfg = of_folder('quick_fcn_dinov2_s', make_masks(tmp_path / 'data'), tmp_path / 'work', 80, options)
    apply_recipe(cfg, options)
    assert cfg.optim_wrapper.optimizer.lr == lr


# Rare classes, early stopping ----------------------------------------------------------------------------------------


def test_rare_classes_are_repeated(tmp_path):
    """In one of 16 images, with a share of a quarter: twice, the root of 4; all others once."""
    for i in range(16):
        image(tmp_path / f'data/train/{"rare" if i == 0 else "common"}/{i}.jpg')
        image(tmp_path / f'data/val/{"rare" if i == 0 else "common"}/v{i}.jpg')
    options = {'recipe.rare': 0.25, 'recipe.early_stopping': 3, 'custom_hooks': []}
    cfg = load_config(
        str(ROOT / 'configs/custom/quick_classifier_dinov2_s.py'), options, str(tmp_path / 'data'), str(tmp_path / 'w')
    )
    lines = apply_recipe(cfg, options)
    assert lines[-1] == 'Images with a class that fewer than 25% of the images have are repeated.'
    enter_scope(cfg)
    from mmengine.registry import DATASETS

    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    labels = [dataset.get_data_info(i)['gt_label'] for i in range(len(dataset))]
    rare = dataset.metainfo['classes'].index('rare')
    assert len(labels) == 17 and labels.count(rare) == 2
    (hook,) = cfg.custom_hooks
    assert (hook.type, hook.patience, hook.monitor) == ('EarlyStoppingHook', 3, 'accuracy/top1')


def test_label_maps_have_no_rare_classes(tmp_path):
    options = {'recipe.rare': 0.1}
    cfg = of_folder('quick_fcn_dinov2_s', make_masks(tmp_path / 'data'), tmp_path / 'work', 80, options)
    with pytest.raises(ConfigError, match='recipe.rare: label maps are not read before training'):
        apply_recipe(cfg, options)


# The quick configs ---------------------------------------------------------------------------------------------------

QUICK = {
    'quick_retinanet_dinov2_s': make_coco,
    'quick_mask_rcnn_dinov2_s': make_coco,
    'quick_fcn_dinov2_s': make_masks,
    'quick_classifier_dinov2_s': make_folders,
}


@pytest.mark.parametrize('name', QUICK)
def test_quick_configs(name, tmp_path):
    """Each takes a folder, has a method in its backbone, and at most 200 steps."""
    cfg = of_folder(name, QUICK[name](tmp_path / 'data'), tmp_path / 'work', 5000)
    apply_recipe(cfg)
    assert cfg.train_cfg.max_iters <= 200
    cfg.model.backbone.base.init_cfg = None
    model = build_on_meta(cfg)
    trained = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert trained and all('.peft.' in name for name in trained)
    assert {path.stem for path in (ROOT / 'configs/custom').glob('quick_*')} == set(QUICK)


# The batch -----------------------------------------------------------------------------------------------------------


def linear(base: float, each: float, most: float = math.inf):
    """Measures a made-up model: GiB of its own, GiB of each image; nothing above a number of images."""
    seen = []

    def measure(batch: int) -> Probe:
        seen.append(batch)
        return Probe(batch, None if batch > most else int((base + each * batch) * GIB))

    return measure, seen


@pytest.mark.parametrize(
    ('limit', 'most', 'measure_all', 'chosen', 'tried'),
    [
        (10, 1024, False, 8, [1, 2]),  # 2 + 8 = 10
        (9.9, 1024, False, 4, [1, 2]),
        (10, 4, False, 4, [1, 2]),  # no more than an eighth of the images
        (10, 1, False, 1, [1]),
        (3.5, 1024, False, 1, [1, 2]),
        (10, 1024, True, 8, [1, 2, 4, 8, 16]),  # on a GPU each one is tried
    ],
)
def test_largest_batch(limit, most, measure_all, chosen, tried):
    measure, seen = linear(2, 1)
    assert largest_batch(measure, int(limit * GIB), most, measure_all) == chosen and seen == tried


def test_out_of_memory_ends_the_search():
    measure, seen = linear(2, 1, most=5)
    assert largest_batch(measure, 100 * GIB, 1024, True) == 4 and seen == [1, 2, 4, 8]
    measure, _ = linear(2, 1, most=1)
    assert largest_batch(measure, 100 * GIB, 1024, False) == 1
    with pytest.raises(UserError, match=r'one image needs 3.00 GiB, and is too much for 2.00 GiB'):
        largest_batch(linear(2, 1)[0], 2 * GIB, 8, False)
    with pytest.raises(UserError, match=r'one image is too much for 2.00 GiB'):
        largest_batch(linear(2, 1, most=0)[0], 2 * GIB, 8, False)


def test_argument():
    assert batch_argument('8') == Batch(size=8) and batch_argument('auto') == Batch()
    assert batch_argument('auto:1.5') == Batch(limit=int(1.5 * GIB))
    for text in ('0', '-1', 'car', 'auto:x', 'auto:0', '8:2', 'auto:inf'):
        with pytest.raises(argparse.ArgumentTypeError, match='give a number of images, auto, or auto:GIB'):
            batch_argument(text)


def test_batch_and_rate(monkeypatch):
    """One line says the batch and what was measured, another the learning rate; several processes do not search."""
    monkeypatch.setattr(batch_module, 'has_accelerator', lambda: False)
    measure, _ = linear(2, 1)
    monkeypatch.setattr(batch_module, '_probe', lambda cfg, n: measure(n))
    cfg = rated('AdamW', 2)
    lines = set_batch(cfg, Batch(limit=10 * GIB))
    assert lines[0] == 'Batch 8 fits 10.00 GiB of memory (measured with batches of 1: 3.00 GiB, 2: 4.00 GiB).'
    assert cfg.train_dataloader.batch_size == 8 and lines[1].startswith('Learning rate 0.002: 0.001 is for')
    with pytest.raises(ConfigError, match='--batch auto looks for it in one process'):
        set_batch(rated('AdamW', 2, launcher='pytorch'), Batch())
    several = rated('AdamW', 2, launcher='pytorch')
    set_batch(several, Batch(size=8))
    assert several.train_dataloader.batch_size == 8


def test_control_groups(tmp_path):
    """The limit less what is used and cannot be given back, by version 2 or 1; none says no limit."""
    assert batch_module._of_control_group(tmp_path) is None
    (tmp_path / 'memory').mkdir()
    (tmp_path / 'memory/memory.limit_in_bytes').write_text('1000\n')
    (tmp_path / 'memory/memory.usage_in_bytes').write_text('300\n')
    assert batch_module._of_control_group(tmp_path) == 700
    (tmp_path / 'memory.max').write_text('max\n')
    (tmp_path / 'memory.current').write_text('100\n')
    assert batch_module._of_control_group(tmp_path) == 700
    (tmp_path / 'memory.max').write_text('500\n')
    (tmp_path / 'memory.stat').write_text('anon 10\ninactive_file 50\n')
    assert batch_module._of_control_group(tmp_path) == 450


@pytest.mark.slow
def test_batch_of_a_real_model(tool, tmp_path):
    """Measured in processes of their own: the batch that was chosen stays within the limit, the next one does not, by
    the tool's own line; the learning rate follows."""
    config = tmp_path / 'wide.py'
    text = classifier(tmp_path).read_text()
    config.write_text(text.replace("dict(type='Resize', scale=32)", "dict(type='Resize', scale=512)"))
    cfg = load_config(str(config))
    one, two = (batch_module._probe(cfg, n).memory for n in (1, 2))
    each = two - one
    assert each > 10 * 2**20
    limit = (one + 4.5 * each) / GIB  # room for five
    arguments = ['--work-dir', str(tmp_path / 'work'), '--dry-run', '--batch', f'auto:{limit}']
    status, out, err = tool('train.py', str(config), *arguments)
    assert status == 0, err
    assert 'Batch 4 fits' in out + err and 'a batch: 4 images' in out
    assert batch_module._probe(cfg, 4).memory <= limit * GIB * 1.05
