"""Runs beside the published tables: real work dirs, logs of mmcv 1.x in their documented formats, the tables' text."""

import csv
import io
import json
import runpy
import shutil
import sys

import pytest
from conftest import ROOT
from mmengine.config import Config
from mmengine.hooks import Hook

from mona_mm.checkpoint.config_text import parse_config
from mona_mm.commands.cli import build_runner
from mona_mm.config.load import adapt_to_device, load_config, resume_from
from mona_mm.errors import ConfigError, MissingFileError
from mona_mm.reproduce import (
    build_tables,
    collect,
    load_results,
    plan,
    render,
    save_results,
    write_text,
)
from mona_mm.reproduce.cells import METHODS, config_name, shipped_config
from mona_mm.reproduce.logs import Log, read_log
from mona_mm.reproduce.published import published_trainable
from mona_mm.reproduce.tasks import TASKS


def only(runs_and_unclear):
    runs, unclear = runs_and_unclear
    assert unclear == [] and len(runs) == 1
    return runs[0]


def rows(runs, table, **wanted):
    """Rows of the CSV."""
    found = csv.DictReader(io.StringIO(render(build_tables(runs, table), 'csv')))
    return [row for row in found if all(row[key] == value for key, value in wanted.items())]


def command(monkeypatch, *arguments):
    """tools/reproduce.py; returns its exit status."""
    monkeypatch.setattr(sys, 'argv', ['reproduce.py', *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / 'tools/reproduce.py'), run_name='__main__')
    except SystemExit as stop:
        return stop.code
    return 0


# Published numbers ---------------------------------------------------------------------------------------------------


def test_every_row_has_a_config():
    """Each cell of the tables is one shipped config, so that `plan` has a command for each."""
    stems = {path.stem for path in (ROOT / 'configs').rglob('*.py')}
    tables = [table for table in build_tables([]) if table.comparable]
    configs = {row.config for table in tables for row in table.rows}
    assert configs <= stems
    assert stems & {config_name(m, t) for m in METHODS for t in list(TASKS)[:6]} <= configs
    assert {config_name('rein', f'dinov2_{size}_cityscapes') for size in 'lbs'} <= configs
    assert {f'retinanet_swin_l_voc_bottleneck{n}' for n in (32, 128)} <= configs
    assert len(plan([])) == len(configs) and all(line.startswith('missing ') for line in plan([]))


def test_without_runs_the_published_tables_alone():
    """Numbers as published, '-' where there is none, the legend, and the footnotes; no empty columns."""
    text = render(build_tables([]), 'terminal')
    assert 'last' not in text.splitlines()[4] and 'test-dev' in text and 'grade: A = ' in text
    text = ' '.join(text.split())
    assert 'mona box AP 53.4 A 3,667,456' in text and 'fixed mask AP - - 0' in text
    for row in ('colin box AP 52.9 C 1,703,424', 'colin mask AP 45.5 C', 'colin AP50 87.5 C', 'colin mIoU 51.28 C'):
        assert row in text
    assert 'best epoch on the test set' in text and '51.18 best, at iteration 96000' in text


def test_published_trainable_follows_the_task():
    assert published_trainable('bitfit', 'voc') == 301908
    assert published_trainable('bitfit', 'ade20k') == 302484
    assert published_trainable('full', 'flowers102') == 194995476
    assert published_trainable('mona', 'coco') == 3667456
    assert published_trainable('mona', 'voc', 'swin_t') == 1408128


# A real run ----------------------------------------------------------------------------------------------------------


class _Stopped(Exception):
    pass


class _StopAfterTwoEpochs(Hook):
    def before_train_epoch(self, runner):
        if runner.epoch == 2:
            raise _Stopped


@pytest.fixture(scope='module')
def work_dirs(demo_data, tmp_path_factory):
    """The demo's detector, really trained: for three epochs, stopped after two; the same, resumed."""
    root = tmp_path_factory.mktemp('runs')
    cfg = load_config(str(ROOT / 'configs/demo/demo_mona_shapes.py'), dict(data_root=str(demo_data)))
    cfg.train_dataloader.batch_size = 1
    cfg.train_dataloader.dataset.indices = 2
    cfg.train_cfg.update(max_epochs=3, val_interval=1)
    cfg.default_hooks.logger.interval = 2
    cfg.work_dir = str(root / 'resumed')
    adapt_to_device(cfg)

    def train(name, hook=None):
        part = Config(dict(cfg._cfg_dict.to_dict(), experiment_name=f'reproduce_{name}'), filename=cfg.filename)
        part.visualizer.name = name  # mmengine would take the first one's, which another process has not
        resume_from(part, None if name == 'first' else 'auto')
        runner = build_runner(part)
        if hook:
            runner.register_hook(hook)
        runner.train()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmengine.runner.runner.collect_env', dict)  # slow: it asks compilers for their versions
        with pytest.raises(_Stopped):
            train('first', _StopAfterTwoEpochs())
        shutil.copytree(root / 'resumed', root / 'stopped')
        train('second')
    return root


def scalars(work_dir):
    """What mmengine itself wrote for evaluations."""
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {r['step']: r['coco/bbox_mAP'] for r in records if 'coco/bbox_mAP' in r}


def test_a_real_run_unfinished(work_dirs):
    """Recognised by its config; every evaluation; how far it came; what it trained, from the hook's table."""
    run = only(collect([work_dirs / 'stopped'], count=False))
    assert (run.method, run.task, run.config, run.unit) == ('mona', 'coco', 'cascade_swin_b_coco', 'epochs')
    assert run.status == '2/3 epochs'
    assert {s: scores['box_ap'] for s, scores in run.evaluations.items()} == pytest.approx(
        {s: 100 * ap for s, ap in scalars(work_dirs / 'stopped').items()}
    )
    assert list(run.evaluations) == [1, 2] and 'mask_ap' in run.evaluations[2]
    assert run.trainable == 97664


def test_a_real_run_resumed_is_one_run(work_dirs):
    """Two timestamped folders, one run, done."""
    assert len(list((work_dirs / 'resumed').glob('*/vis_data'))) == 2
    run = only(collect([work_dirs / 'resumed']))
    assert run.status == 'done' and list(run.evaluations) == [1, 2, 3] and run.trainable == 97664


def test_a_smaller_run_is_marked_as_changed(work_dirs):
    """Nothing of another size is put beside a published number as its equal: each difference is named."""
    run = only(collect([work_dirs / 'resumed']))
    for difference in (
        'backbone width: 32 (published setting: 128)',
        'backbone depths: (2, 2, 2, 2) (published setting: (2, 2, 18, 2))',
        'drop path: 0 (published setting: 0.3)',
        'schedule: 3 epochs (published setting: 36 epochs)',
        'lr: 0.003 (published setting: 0.0001)',
        'batch size: 1 (published setting: 16)',
        'classes: 4 (published setting: 80)',
        'test image sizes: [128] (published setting: [800, 1333])',
        'peft.bottleneck: 16 (published setting: 64)',
    ):
        assert difference in run.changed
    text = render(build_tables([run], 'coco'), 'terminal')
    (line,) = [line for line in text.splitlines() if line.split()[:3] == ['mona', 'box', 'AP']]
    assert '*' in line and '97,664' in line and 'done, changed [1]' in line and 'changed: backbone width: 32' in text


def test_folders_are_walked(work_dirs, tmp_path):
    """Both runs under the folder; the same run given twice counts once; checkpoints and others' files are no runs."""
    shutil.copytree(work_dirs, tmp_path / 'all')
    (tmp_path / 'all/requirements.txt').write_text('torch\n')
    (tmp_path / 'all/notes.log').write_text('- INFO - nothing of ours\n')
    runs, unclear = collect([tmp_path / 'all', tmp_path / 'all/resumed'])
    assert [run.path.rpartition('/')[2] for run in runs] == ['resumed', 'stopped'] and unclear == []


def test_text_log_alone(work_dirs, tmp_path):
    """Of somebody who sends only the .log: the same cell, scores to its four digits, what trains."""
    (log,) = (work_dirs / 'stopped').glob('*/*.log')
    copy = shutil.copy(log, tmp_path / 'theirs.log')
    run, whole = only(collect([copy])), only(collect([work_dirs / 'stopped']))
    assert (run.config, run.status, run.trainable, run.changed) == (
        *(whole.config, whole.status, whole.trainable),
        whole.changed,
    )
    for step, scores in whole.evaluations.items():
        assert run.evaluations[step] == pytest.approx(scores, abs=0.0051)


def test_counted_where_the_log_does_not_say(work_dirs, tmp_path):
    """Without the text log, what trains is counted by building the dumped config without weights."""
    shutil.copytree(work_dirs / 'stopped', tmp_path / 'run')
    for log in (tmp_path / 'run').glob('*/*.log'):
        log.unlink()
    assert only(collect([tmp_path / 'run'], count=False)).trainable is None
    run = only(collect([tmp_path / 'run']))
    assert run.trainable == 97664
    assert any('number of GPUs' in note for note in run.notes)


# Work dirs of shipped configs, as mmengine writes them ---------------------------------------------------------------


def write_work_dir(folder, config, evaluations, stamp='20260101_000000', gpus=16, iterations=(), options=None):
    """A work dir of a shipped config: its dump, its scalars, and the lines of its text log that matter."""
    cfg = load_config(str(next((ROOT / 'configs').rglob(f'{config}.py'))), options)
    vis_data = folder / stamp / 'vis_data'
    vis_data.mkdir(parents=True)
    items = cfg._cfg_dict.to_dict().items()
    (vis_data / 'config.py').write_text('\n'.join(f'{key} = {value!r}' for key, value in items))
    by_epoch = 'max_epochs' in cfg.train_cfg
    records = [dict(lr=1.0, loss=2.0, iter=n, step=n, **(dict(epoch=n) if by_epoch else {})) for n in iterations]
    records += [dict(scores, step=step) for step, scores in evaluations.items()]
    records.sort(key=lambda record: record['step'])
    (vis_data / 'scalars.json').write_text('\n'.join(map(json.dumps, records)))
    (folder / stamp / f'{stamp}.log').write_text(f'    GPU number: {gpus}\n')
    return folder


@pytest.mark.parametrize('method', ['colin', 'adapter_plus'])
def test_a_later_method_is_recognised(method, tmp_path):
    """By the class in the config, whose name differs from that of the folder by underscores."""
    scores = {4: {'pascal_voc/mAP': 0.88}}
    run = only(collect([write_work_dir(tmp_path / 'x', f'{method}_retinanet_swin_l_voc', scores, gpus=2)], count=False))
    assert (run.method, run.task, run.changed) == (method, 'voc', [])
    (row,) = rows([run], 'voc', method=method, metric='AP50')
    assert (row['best'], row['published']) == ('88.0', '87.5' if method == 'colin' else '')


def test_published_setting_is_not_changed(tmp_path):
    """A run of a shipped config on as many GPUs as published, data elsewhere and checkpoints of its own: equal.
    Last and best apart, and their differences from the published."""
    scores = {e: {'coco/bbox_mAP': 0.5 + e / 1000, 'coco/segm_mAP': 0.4 + e / 1000} for e in range(1, 35)}
    scores |= {35: {'coco/bbox_mAP': 0.536, 'coco/segm_mAP': 0.455}, 36: {'coco/bbox_mAP': 0.531, 'coco/segm_mAP': 0.5}}
    options = {'data_root': '/data/COCO', 'default_hooks.checkpoint.interval': 3, 'train_dataloader.num_workers': 8}
    run = only(collect([write_work_dir(tmp_path / 'x', 'cascade_swin_b_coco', scores, options=options)]))
    assert (run.changed, run.notes, run.status, run.trainable) == ([], [], 'done', 3667456)
    box, mask = rows([run], 'coco', method='mona')
    assert [box[key] for key in ('last', 'last_step', 'best', 'best_step')] == ['53.1', '36', '53.6', '35']
    assert [box[key] for key in ('last_minus_published', 'best_minus_published')] == ['-0.3', '0.2']
    assert mask['best'] == '45.5'  # of the best checkpoint by box AP, not the best mask AP
    assert (box['trained'], box['trained_published'], box['changed']) == ('3667456', '3667456', '')


_BATCH_OF_4 = 'batch size: 4 (published setting: 16)'


@pytest.mark.parametrize(
    'options, gpus, expected',
    [
        ({'optim_wrapper.optimizer.lr': 5e-5}, 16, ['lr: 5e-05 (published setting: 0.0001)']),
        ({}, 4, [_BATCH_OF_4]),
        ({'train_dataloader.batch_size': 4}, 4, []),
        ({'train_dataloader.batch_size': 2, 'optim_wrapper.accumulative_counts': 2}, 4, []),
        ({'train_cfg.max_epochs': 12}, 16, ['schedule: 12 epochs (published setting: 36 epochs)']),
        ({'model.backbone.base.drop_path_rate': 0.1}, 16, ['drop path: 0.1 (published setting: 0.3)']),
        ({'model.backbone.base.init_cfg.checkpoint': '/w/swin_base_patch4_window7_224_22k.pth'}, 16, []),
        (
            {'model.backbone.base.init_cfg': None},
            16,
            ['pretrained: none (published setting: swin_base_patch4_window7_224_22k.pth)'],
        ),
        (
            {'train_dataloader.dataset.indices': 100},
            16,
            ['train_dataloader.dataset.indices: 100 (published setting: none)'],
        ),
        ({'auto_scale_lr.enable': True}, 4, ['lr: 2.5e-05 (published setting: 0.0001)', _BATCH_OF_4]),
        ({'model.backbone.base.frozen_stages': 0}, 16, ['frozen stages: 0 (published setting: -1)']),
        ({'load_from': 'other.pth'}, 16, ['load_from: other.pth (published setting: none)']),
    ],
)
def test_each_change_is_named(tmp_path, options, gpus, expected):
    """One option each: exactly that difference, or none where the result must be the same."""
    folder = write_work_dir(tmp_path, 'cascade_swin_b_coco', {36: {'coco/bbox_mAP': 0.5}}, gpus=gpus, options=options)
    assert only(collect([folder], count=False)).changed == expected


@pytest.mark.parametrize(
    'config, metric, unit_steps, expected',
    [
        ('lora_retinanet_swin_l_voc', {'pascal_voc/mAP': 0.8542, 'coco/bbox_mAP': 0.6}, 4, ('voc', 'lora', 85.42)),
        ('retinanet_swin_t_voc', {'pascal_voc/AP50': 0.8, 'pascal_voc/mAP': 0.1}, 4, ('voc', 'mona', 80.0)),
        ('retinanet_swin_l_voc_bottleneck32', {'pascal_voc/mAP': 0.868}, 4, ('voc', 'mona', 86.8)),
        ('bitfit_upernet_swin_l_ade20k', {'mIoU': 0.4837}, 160000, ('ade20k', 'bitfit', 0.4837)),
        ('swin_l_flowers102', {'accuracy/top1': 99.5}, 100, ('flowers102', 'mona', 99.5)),
        ('norm_tuning_swin_l_oxfordpets', {'accuracy/top1': 90.0}, 100, ('oxfordpets', 'norm_tuning', 90.0)),
        ('partial_1_swin_l_voc2007', {'accuracy/top1': 80.0}, 100, ('voc2007', 'partial_1', 80.0)),
        ('full_swin_l_voc2007_multilabel', {'multi-label/mAP': 90.0}, 100, ('voc2007_multilabel', 'full', 90.0)),
    ],
)
def test_cells_are_known_by_their_configs(tmp_path, config, metric, unit_steps, expected):
    """Task, method, ablation and metric, from the dumped config whatever the folder's name. mmengine's mIoU is in
    percent already, and is not taken for a fraction where it is small."""
    task, method, score = expected
    gpus = {'voc': 2, 'ade20k': 8}.get(task, 4)
    folder = write_work_dir(tmp_path / 'run_of_yesterday', config, {unit_steps: metric}, gpus=gpus)
    run = only(collect([folder], count=False))
    assert (run.config, run.task, run.method, run.status) == (config, task, method, 'done')
    assert run.changed == []
    assert run.last == (unit_steps, run.evaluations[unit_steps])
    assert run.last[1][next(iter(TASKS[task].metrics))] == score
    tables = [row['table'] for row in rows([run], None) if row['run']]
    assert tables  # wherever it belongs: an ablation, a main table, or the one of configs without a published number
    assert ('other' in tables) == (task == 'voc2007_multilabel')
    assert ('ablation' in tables) == ('swin_t' in config or 'bottleneck' in config)


def test_coco_style_ap_of_voc_has_its_row(tmp_path):
    """Measured but not published: a row of its own."""
    scores = {4: {'pascal_voc/mAP': 0.87, 'coco/bbox_mAP': 0.61}}
    run = only(collect([write_work_dir(tmp_path, 'retinanet_swin_l_voc', scores, gpus=2)], count=False))
    assert [row['last'] for row in rows([run], 'voc', method='mona')] == ['87.0', '61.0']


def test_fair_runs_are_not_the_published_cell(tmp_path):
    """Mona with everybody's learning rate stands beside its number with a mark that says so."""
    folder = write_work_dir(tmp_path, 'fair_upernet_swin_l_ade20k', {160000: {'mIoU': 51.0}}, gpus=8)
    run = only(collect([folder], count=False))
    assert run.config == 'upernet_swin_l_ade20k'
    assert 'lr: 6e-05 (published setting: 0.0003)' in run.changed
    assert 'drop path: 0.3 (published setting: 0.2)' in run.changed


def test_resumed_parts(tmp_path):
    """Later values win for the same step, and scores of a branch that resuming gave up are gone."""
    first = {s: {'mIoU': 10.0 + s / 16000} for s in (16000, 32000, 48000)}
    second = {32000: {'mIoU': 40.0}}
    write_work_dir(tmp_path, 'upernet_swin_l_ade20k', first, iterations=(50, 15950, 48000), gpus=8)
    write_work_dir(tmp_path, 'upernet_swin_l_ade20k', second, '20260102_000000', 8, iterations=(16050, 33000))
    run = only(collect([tmp_path], count=False))
    assert run.evaluations == {16000: {'miou': 11.0}, 32000: {'miou': 40.0}}
    assert run.status == '33000/160000 iterations'


def test_equal_best_is_the_first(tmp_path):
    scores = {s: {'mIoU': v} for s, v in ((16000, 50.0), (32000, 51.0), (48000, 51.0), (64000, 49.0))}
    run = only(collect([write_work_dir(tmp_path, 'upernet_swin_l_ade20k', scores)], count=False))
    assert run.best[0] == 32000 and run.last[0] == 64000


def test_tested_only(tmp_path):
    """A work dir of tools/test.py: its scores, and that nothing was trained."""
    folder = write_work_dir(tmp_path, 'cascade_swin_b_coco', {})
    (folder / '20260101_000000/20260101_000000.json').write_text('{"coco/bbox_mAP": 0.52, "time": 0.1}')
    run = only(collect([folder], count=False))
    assert run.status == 'tested' and run.last == (None, {'box_ap': 52.0}) and run.best == (None, {})


# Logs of mmcv 1.x ----------------------------------------------------------------------------------------------------

_VOC_CONFIG = """dataset_type = 'VOCDataset'
data = dict(
    samples_per_gpu=1,
    train=dict(
        type='RepeatDataset',
        times=3,
        dataset=dict(
            type='VOCDataset',
            ann_file=['/d/VOC2007/ImageSets/Main/trainval.txt', '/d/VOC2012/ImageSets/Main/trainval.txt'],
            pipeline=[
                dict(type='Resize', img_scale=(1000, 600), keep_ratio=True),
                dict(type='Pad', size_divisor=32)
            ])),
    val=dict(
        type='VOCDataset',
        pipeline=[dict(type='MultiScaleFlipAug', img_scale=(1000, 600), flip=False, transforms=[])]))
evaluation = dict(interval=1, metric='mAP')
fp16 = None
load_from = '/pretrained_model/swin_large_patch4_window7_224_22k.pth'
model = dict(
    type='RetinaNet',
    backbone=dict(
        type='BACKBONE',
        embed_dim=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=7,
        drop_path_rate=0.2,
        out_indices=(1, 2, 3),
        frozen_stages=1),
    bbox_head=dict(type='RetinaHead', num_classes=20))
optimizer = dict(type='AdamW', lr=0.0001, betas=(0.9, 0.999), weight_decay=0.05)
runner = dict(type='EpochBasedRunnerAmp', max_epochs=4)
optimizer_config = dict(type='DistOptimizerHook', use_fp16=True)
gpu_ids = range(0, 2)
"""

_ADE_CONFIG = """model = dict(
    type='EncoderDecoder',
    backbone=dict(
        type='BACKBONE',
        embed_dim=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=7,
        drop_path_rate=0.2),
    decode_head=dict(type='UPerHead', num_classes=150))
crop_size = (512, 512)
load_from = '/pretrained_model/swin_large_patch4_window7_224_22k.pth'
data = dict(
    samples_per_gpu=2,
    train=dict(
        type='ADE20KDataset',
        pipeline=[
            dict(type='Resize', img_scale=(2048, 512), ratio_range=(0.5, 2.0)),
            dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75),
            dict(type='Pad', size=(512, 512), pad_val=0)
        ]),
    val=dict(
        type='ADE20KDataset',
        pipeline=[dict(type='MultiScaleFlipAug', img_scale=(2048, 512), flip=False)]))
optimizer = dict(type='AdamW', lr=0.00030000000000000003, weight_decay=0.01)
runner = dict(type='IterBasedRunner', max_iters=160000)
evaluation = dict(interval=16000, metric='mIoU')
gpu_ids = range(0, 1)
"""


def stamp(library):
    return f'2023-10-28 14:08:33,021 - {library} - INFO - '


def voc_log(backbone='SwinTransformer_mona', extra='', epochs=(0.85, 0.873, 0.86, 0.87), config=_VOC_CONFIG):
    """An mmdet 2.x text log, with the progress bars, tables and prints that come between its lines."""
    lines = ['fatal: Not a git repository', f'{stamp("mmdet")}Distributed training: True']
    lines += [f'{stamp("mmdet")}Config:', config.replace('BACKBONE', backbone), extra]
    for epoch, score in enumerate(epochs, 1):
        for i in (50, 24800):
            lines.append(
                f'{stamp("mmdet")}Epoch [{epoch}][{i}/24827]\tlr: 1.000e-04, eta: 19:45:33, time: 0.717, '
                'data_time: 0.358, memory: 4212, loss_cls: 1.1484, loss_bbox: 0.6527, loss: 1.8011'
            )
        lines += [
            f'[>>>] 4952/4952, 6.2 task/s, elapsed: 804s, ETA:     0s{stamp("mmdet")}',
            '+-------+------+------+--------+-------+',
            '| class | gts  | dets | recall | ap    |',
            '| train | 282  | 1749 | 0.979  | 0.894 |',
            f'| mAP   |      |      |        | {score:.3f} |',
            '+-------+------+------+--------+-------+',
            f'{stamp("mmdet")}Exp name: 10_voc.py',
            f'{stamp("mmdet")}Epoch(val) [{epoch}][24827]\tAP50: {score:.4f}, mAP: {score:.4f}',
        ]
    return '\n'.join(lines) + '\n'


def test_mmdet_text_log(tmp_path):
    """The published setting as mmdet 2.x prints it equals the shipped config; each epoch's AP50; done."""
    path = tmp_path / 'log.txt'
    path.write_text(voc_log(extra='trained_backbone_num:5267712\n2.7 % original backbone'))
    run = only(collect([path]))
    assert (run.config, run.status, run.changed, run.notes) == ('retinanet_swin_l_voc', 'done', [], [])
    assert run.evaluations == {1: {'ap50': 85.0}, 2: {'ap50': 87.3}, 3: {'ap50': 86.0}, 4: {'ap50': 87.0}}
    assert run.trainable == 5267712
    (row,) = rows([run], 'voc', method='mona')
    assert (row['last_minus_published'], row['best_minus_published'], row['best_step']) == ('-0.3', '0.0', '2')


@pytest.mark.parametrize(
    'backbone, extra, method',
    [
        ('SwinTransformer_adapter', '', 'adapter'),
        ('SwinTransformer_lora_64', '', 'lora'),
        ('SwinTransformer_norm_tuning', '', 'norm_tuning'),
        ('SwinTransformer_partial_1', '', 'partial_1'),
        ('SwinTransformer', '', 'full'),
        ('SwinTransformer_X_v1_6_64', 'trained_backbone_num:5267712', 'mona'),
        ('SwinTransformer_X_v1_6_64', 'trained_backbone_num:2329728', 'adaptformer'),
        ('SwinTransformer_X', 'missing keys: backbone.layers.0.blocks.0.my_module_1.adapter_conv.conv1.weight', 'mona'),
        ('SwinTransformer_X', 'missing keys: backbone.layers.0.blocks.0.attn.qkv.lora_A', 'lora'),
        ('SwinTransformer_X', 'missing keys: my_module_1.project1.weight, my_module_2.project1.weight', 'adapter'),
        ('SwinTransformer_X', 'missing keys: my_module_1.project1.weight', 'adaptformer'),
    ],
)
def test_methods_of_mmcv_logs(tmp_path, backbone, extra, method):
    """By the class's name, else by how many parameters train, else by the modules' names."""
    path = tmp_path / 'log.txt'
    path.write_text(voc_log(backbone, extra))
    assert only(collect([path])).method == method


def test_published_settings_of_mmcv_equal_the_shipped(tmp_path):
    """COCO and classification, as the published code writes them: no difference is made up between generations."""
    short = ', '.join(f'({n}, 1333)' for n in range(480, 801, 32))
    swin = 'embed_dim={}, depths=[2, 2, 18, 2], num_heads={}, window_size=7, drop_path_rate=0.3'
    coco = f"""model = dict(type='CascadeRCNN', backbone=dict(type='SwinTransformer_adapter',
    {swin.format(128, [4, 8, 16, 32])}),
    roi_head=dict(type='CascadeRoIHead', bbox_head=[dict(type='A', num_classes=80)]))
load_from = '/pretrained_model/swin_base_patch4_window7_224_22k.pth'
data = dict(samples_per_gpu=1, train=dict(type='CocoDataset', pipeline=[dict(type='AutoAugment', policies=[
    [dict(type='Resize', img_scale=[{short}], multiscale_mode='value')],
    [dict(type='Resize', img_scale=[(400, 1333), (500, 1333), (600, 1333)]),
     dict(type='RandomCrop', crop_size=(384, 600)), dict(type='Resize', img_scale=[{short}])]])]),
    val=dict(type='CocoDataset', pipeline=[dict(type='MultiScaleFlipAug', img_scale=(1333, 800))]))
optimizer = dict(type='AdamW', lr=0.0001, weight_decay=0.05)
runner = dict(type='EpochBasedRunnerAmp', max_epochs=36)
optimizer_config = dict(use_fp16=True)
gpu_ids = range(0, 16)
"""
    pets = f"""model = dict(type='ImageClassifier', backbone=dict(type='SwinTransformer_mona',
    {swin.format(192, [6, 12, 24, 48])}), head=dict(type='LinearClsHead', num_classes=37))
load_from = '/pretrained_model/swin_large_patch4_window7_224_22k.pth'
data = dict(samples_per_gpu=4, train=dict(type='OxfordPetMona', pipeline=[dict(type='RandomResizedCrop', size=224)]),
    val=dict(type='OxfordPetMona', pipeline=[
        dict(type='Resize', size=(256, -1)), dict(type='CenterCrop', crop_size=224)]))
optimizer = dict(type='AdamW', lr=3.125e-05, weight_decay=0.05, eps=1e-08)
runner = dict(type='EpochBasedRunner', max_epochs=100)
fp16 = dict(loss_scale='dynamic')
gpu_ids = range(0, 4)
"""
    for config, score, name in (
        (coco, 'bbox_mAP: 0.5210, segm_mAP: 0.4500', 'adapter_cascade_swin_b_coco'),
        (pets, 'accuracy_top-1: 95.4765', 'swin_l_oxfordpets'),
    ):
        path = tmp_path / f'{name}.log'
        path.write_text(f'{stamp("mmdet")}Config:\n{config}\n{stamp("mmdet")}Epoch(val) [1][230]\t{score}\n')
        run = only(collect([path]))
        assert (run.config, run.changed, run.notes) == (name, [], [])


def test_changed_mmcv_run(tmp_path):
    """The same comparison across generations of configs."""
    config = _VOC_CONFIG
    for old, new in (('lr=0.0001', 'lr=0.001'), ('(1000, 600)', '(640, 480)'), ('range(0, 2)', 'range(0, 8)')):
        config = config.replace(old, new)
    for old, new in (('times=3', 'times=1'), ('max_epochs=4', 'max_epochs=2'), ('frozen_stages=1', 'frozen_stages=3')):
        config = config.replace(old, new)
    config = config.replace('224_22k', '224_1k')
    path = tmp_path / 'log.txt'
    path.write_text(voc_log(config=config, epochs=(0.5,), extra='trained_backbone_num:1'))
    run = only(collect([path]))
    assert run.status == '1/2 epochs'
    assert run.changed == [
        'frozen stages: 2 (published setting: 0)',
        'pretrained: swin_large_patch4_window7_224_1k.pth (published setting: swin_large_patch4_window7_224_22k.pth)',
        'schedule: 2 epochs (published setting: 4 epochs)',
        'lr: 0.001 (published setting: 0.0001)',
        'batch size: 8 (published setting: 2)',
        'training image sizes: [480, 640] (published setting: [600, 1000])',
        'test image sizes: [480, 640] (published setting: [600, 1000])',
        'training data repeated: 1 (published setting: 3)',
        'trained parameters: 1 (published: 5267712)',
    ]


def ade_log(numbers, evaluated=None, backbone='SwinTransformer_mona', last_line=True):
    """An mmseg 0.x text log; every line twice, as apex makes it, and mIoU in a table and (by version) a line.
    ``evaluated``: what stands in ``Iter(val) [..]``, the iteration if None."""
    lines = [f'{stamp("mmseg")}Config:', _ADE_CONFIG.replace('BACKBONE', backbone)]
    lines += ['INFO:mmseg:Config:', _ADE_CONFIG.replace('BACKBONE', backbone)]
    lines += ['host:76:76 [0] NCCL INFO comm 0x7f rank 0 nranks 8 cudaDev 0 busId 56000 - Init COMPLETE']
    for i, number in enumerate(numbers, 1):
        step = 16000 * i
        for text in (
            f'Iter [{step - 50}/160000]\tlr: 9.8e-07, eta: 1 day, 12:18:25, time: 0.409, decode.loss_seg: 4.0467',
            f'\n+--------+-------+-------+\n| Scope  | mIoU  | aAcc  |\n+--------+-------+-------+\n'
            f'| global | {number} | 83.45 |\n+--------+-------+-------+',
            f'Iter(val) [{evaluated or step}]\tmIoU: {number / 100:.4f}, mAcc: 0.6254' if last_line else 'Exp name: x',
        ):
            lines += [stamp('mmseg') + text, f'INFO:mmseg:{text}']
    return '\n'.join(lines) + '\n'


@pytest.mark.parametrize('evaluated', [None, 2000], ids=['iteration', 'batches'])
@pytest.mark.parametrize('last_line', [True, False], ids=['line', 'table'])
def test_mmseg_text_log(tmp_path, evaluated, last_line):
    """mIoU in percent, at the right iteration, whatever a version writes in brackets, and wherever the score is."""
    path = tmp_path / 'log.txt'
    path.write_text(ade_log([*[40.0] * 5, 51.5, 50.0, 50.0, 50.0, 51.36], evaluated, last_line=last_line))
    run = only(collect([path]))
    assert (run.config, run.status, run.changed) == ('upernet_swin_l_ade20k', 'done', [])
    assert list(run.evaluations) == [16000 * i for i in range(1, 11)]
    assert run.last == (160000, {'miou': 51.36}) and run.best == (96000, {'miou': 51.5})


def test_mmcv_json_logs_and_their_text(tmp_path):
    """.log.json with the config in its first line (mmdet), beside its text (mmseg); timestamped parts are one run."""
    first = dict(env_info='x', config=_VOC_CONFIG.replace('BACKBONE', 'SwinTransformer_mona'), seed=0)
    train = dict(mode='train', epoch=4, iter=50, lr=1e-4, memory=4212, loss=1.8)
    val = dict(mode='val', epoch=4, iter=4952, lr=1e-5, AP50=0.8731, mAP=0.8731)
    alone = tmp_path / 'a' / 'mona.log.json'
    alone.parent.mkdir()
    alone.write_text('\n'.join(map(json.dumps, (first, train, val))))
    run = only(collect([alone]))
    assert (run.config, run.evaluations, run.status) == ('retinanet_swin_l_voc', {4: {'ap50': 87.31}}, 'done')

    work_dir = tmp_path / 'b'
    work_dir.mkdir()
    (work_dir / '20230101_000000.log').write_text(ade_log([30.0, 31.0]))
    (work_dir / '20230102_000000.log').write_text(ade_log([32.0]))  # begun anew: nothing of the first counts
    records = (
        dict(mode='train', epoch=1, iter=15950, lr=1e-4, loss=1.0),
        dict(mode='val', epoch=1, iter=2000, lr=1e-4, mIoU=0.320123),
    )
    (work_dir / '20230102_000000.log.json').write_text('\n'.join(map(json.dumps, records)))
    run = only(collect([work_dir]))
    assert run.evaluations == {16000: {'miou': 32.0123}} and run.status == '16000/160000 iterations'


def test_mmcls_and_coco_logs(tmp_path):
    """mmcls's accuracy is in percent; mmdet's COCO scores are fractions with their copy-paste forms behind them."""
    cls = tmp_path / 'cls.log'
    config = (
        "model = dict(type='ImageClassifier', backbone=dict(type='SwinTransformer_bitfit', embed_dim=192, "
        "depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48]), head=dict(type='LinearClsHead', num_classes=102))\n"
        "data = dict(samples_per_gpu=4, train=dict(type='OxfordFlower_mona', pipeline=[]))\n"
        "runner = dict(type='EpochBasedRunner', max_epochs=100)\n"
    )
    cls.write_text(
        f'{stamp("mmcls")}Config:\n{config}\n{stamp("mmcls")}Epoch [30][50/510]\tlr: 1e-05, loss: 0.1\n'
        f'{stamp("mmcls")}Epoch(val) [30][1538]\taccuracy_top-1: 95.4225, accuracy_top-5: 99.1\n'
    )
    run = only(collect([cls]))
    assert (run.method, run.task, run.last) == ('bitfit', 'flowers102', (30, {'top1': 95.4225}))

    coco = tmp_path / 'coco.log'
    coco.write_text(
        f'{stamp("mmdet")}Epoch [2][50/803]\tlr: 1e-04, loss: 0.76\n'
        f'{stamp("mmdet")}Epoch(val) [2][599]    bbox_mAP: 0.2620, bbox_mAP_50: 0.6310, bbox_mAP_copypaste: 0.262 '
        '0.631 0.192 0.343 -1.000 -1.000, segm_mAP: 0.2740, segm_mAP_s: -1.0000\n'
    )
    run = only(collect([coco], 'mona/coco'))
    assert run.last == (2, {'box_ap': 26.2, 'mask_ap': 27.4})
    assert 'no config in the log' in ' '.join(run.notes) and run.status.startswith('1 epochs') is False


# Errors --------------------------------------------------------------------------------------------------------------


def test_a_log_that_does_not_tell(tmp_path):
    """One clear error naming the file, the reason and --as; with it the log is collected; among others it is named."""
    path = tmp_path / 'theirs.txt'
    path.write_text(voc_log('SwinTransformer_secret'))
    runs, (error,) = collect([path])
    assert runs == []
    for part in (str(path), 'SwinTransformer_secret', '--as METHOD/TASK', 'norm_tuning', 'oxfordpets'):
        assert part in str(error)
    run = only(collect([path], 'lora/voc'))
    assert run.config == 'lora_retinanet_swin_l_voc' and '--as lora/voc' in run.notes[0]
    _, (error,) = collect([path], 'lora/coco')
    assert 'its task is voc' in str(error) and 'not lora/coco' in str(error)


def test_as_must_not_contradict_the_log(tmp_path):
    path = tmp_path / 'theirs.txt'
    path.write_text(voc_log())
    with pytest.raises(ConfigError, match=r'--as lora/voc: .*theirs.txt is mona/voc'):
        collect([path], 'lora/voc')
    with pytest.raises(ConfigError, match=r'--as mona: METHOD/TASK is one of full, .* / one of coco'):
        collect([path], 'mona')


def test_no_log_at_all(tmp_path):
    (tmp_path / 'notes.txt').write_text('2023-01-01 00:00:00,000 - mmdet - INFO - Set random seed\n')
    for path in (tmp_path, tmp_path / 'notes.txt'):
        with pytest.raises(ConfigError, match='holds no training log'):
            collect([path])
    with pytest.raises(MissingFileError, match='There is no .*nothing'):
        collect([tmp_path / 'nothing'])


def test_configs_are_not_executed(tmp_path):
    """A log's config is somebody else's text: it is read as values; what is no value stays text."""
    marker = tmp_path / 'executed'
    config = parse_config(
        f"a = dict(b=[1, (2, -3.5)], c={{'d': None}})\ne = open({str(marker)!r}, 'w')\nf = range(0, 3)"
    )
    assert config['a'] == dict(b=[1, (2, -3.5)], c=dict(d=None)) and config['f'] == [0, 1, 2]
    assert isinstance(config['e'], str) and not marker.exists()
    assert parse_config('model = dict(type=') is None  # a log cut off


def test_missing_scores_are_not_zero(tmp_path):
    """-1 of COCO (nothing to find) and NaN are no scores."""
    path = tmp_path / 'scalars.json'
    path.write_text('{"coco/bbox_mAP": -1.0, "coco/segm_mAP": NaN, "step": 1}\n{"iter": 1, "epoch": 1, "step": 1}')
    assert read_log(path).evaluations == {}


# Text ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    """Two runs of one cell, one of them changed, and one of another."""
    one = write_work_dir(tmp_path / 'a', 'retinanet_swin_l_voc', {3: {'pascal_voc/mAP': 0.88}}, gpus=2)
    two = write_work_dir(tmp_path / 'b', 'retinanet_swin_l_voc', {4: {'pascal_voc/mAP': 0.87}}, gpus=1)
    three = write_work_dir(tmp_path / 'c', 'full_upernet_swin_l_ade20k', {160000: {'mIoU': 51.0}}, gpus=8)
    return collect([one, two, three], count=False)[0]


def test_markdown_parses_back(runs):
    text = render(build_tables(runs, 'voc'), 'markdown')
    table = [line.strip('|').split('|') for line in text.splitlines() if line.startswith('|')]
    header, *body = [[cell.strip() for cell in row] for row in table if set(row[0]) != {'-'}]
    assert all(len(row) == len(header) for row in body)
    mona = [dict(zip(header, row, strict=True)) for row in body if row[0] == 'mona']
    assert [row['best'] for row in mona] == ['88.00 @3', '87.00\\* @4']
    assert [row['published'] for row in mona] == ['87.3', '87.3']
    assert [row['best - publ.'] for row in mona] == ['+0.70', '-0.30\\*']
    assert [row['run'] for row in mona] == ['3/4 epochs [1]', 'done, changed [2]']
    assert len(body) == len(METHODS) + 1 and '- [2] ' in text and 'batch size: 1 (published setting: 2)' in text


def test_csv_parses_back(runs):
    """One table of one header for everything, numbers as numbers."""
    everything = rows(runs, None)
    assert {row['table'] for row in everything} == {
        'coco',
        'voc',
        'ade20k',
        'classification',
        'cityscapes',
        'ablation',
        'params',
        'spt',
    }
    a, b = rows(runs, 'voc', method='mona')
    assert (float(a['best']), float(b['last']), a['status'], b['status']) == (88.0, 87.0, '3/4 epochs', 'done')
    assert a['changed'] == '' and b['changed'] == 'batch size: 1 (published setting: 2)'
    (full,) = rows(runs, 'ade20k', method='full')
    assert float(full['last_minus_published']) == pytest.approx(-0.18)


def test_results_file_round_trip(runs, tmp_path):
    path = tmp_path / 'out' / 'results.json'
    save_results(runs, path)
    assert load_results(path) == runs
    save_results(runs[:1], path)  # over its own
    assert load_results(path) == runs[:1]
    path.write_text('{"runs": []}')
    with pytest.raises(ConfigError, match='left alone'):
        save_results(runs, path)


def test_tables_are_not_written_over_other_files(runs, tmp_path):
    for form in ('terminal', 'markdown', 'csv'):
        path = tmp_path / form
        text = render(build_tables(runs), form)
        write_text(text, path)
        write_text(text, path)
        assert path.read_text() == text
    (tmp_path / 'thesis.md').write_text('# Results\n')
    with pytest.raises(ConfigError, match='thesis.md is not a table of this program'):
        write_text(text, tmp_path / 'thesis.md')


def test_plan(runs):
    """What is done, begun, only done in another setting, and missing; the command that goes on resumes."""
    lines = plan(runs)
    (voc,) = [line for line in lines if 'configs/mona/retinanet_swin_l_voc.py' in line]
    assert voc.startswith('partial ') and voc.endswith(f'--work-dir {runs[0].path} --resume')
    (ade,) = [line for line in lines if 'full_upernet_swin_l_ade20k.py' in line]
    assert ade.startswith('done ')
    (voc,) = [line for line in plan(runs[1:2]) if 'configs/mona/retinanet_swin_l_voc.py' in line]
    assert voc.startswith('changed only ') and voc.endswith('--work-dir work_dirs/retinanet_swin_l_voc')


def test_command_line(tmp_path, monkeypatch, capsys):
    """collect, show from its file and from a log, and the errors: one line, exit status 2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'good.txt').write_text(voc_log())
    (tmp_path / 'bad.txt').write_text(voc_log('SwinTransformer_secret'))
    assert command(monkeypatch, 'collect', 'good.txt', 'bad.txt') == 0
    out, err = capsys.readouterr()
    assert 'good.txt: mona/voc (retinanet_swin_l_voc), done' in out and '1 runs in results.json' in out
    assert err.startswith('left out: bad.txt: the log does not tell') and err.count('\n') == 1

    assert command(monkeypatch, 'show', 'results.json', '--task', 'voc') == 0
    shown = capsys.readouterr().out
    assert command(monkeypatch, 'show', 'good.txt', '--task', 'voc') == 0
    assert capsys.readouterr().out == shown and '87.30 @2' in shown

    assert command(monkeypatch, 'show', '--format', 'csv', '--out', 'table.csv') == 0
    assert (tmp_path / 'table.csv').read_text().startswith('table,method,setting,metric,last,')

    assert command(monkeypatch, 'show', 'bad.txt') == 2
    err = capsys.readouterr().err
    assert err.startswith('error: bad.txt: the log does not tell') and err.count('\n') == 1
    assert command(monkeypatch, 'collect', 'good.txt', '--out', 'bad.txt') == 2
    assert 'left alone' in capsys.readouterr().err


def test_shipped_config_of_another_width_is_the_main_one():
    """A bottleneck that has no config of its own is compared with the main one; one that has, with that."""
    cfg = load_config(str(ROOT / 'configs/mona/retinanet_swin_l_voc.py'))._cfg_dict.to_dict()
    for bottleneck, name in ((64, ''), (32, '_bottleneck32'), (16, '')):
        cfg['model']['backbone']['peft']['bottleneck'] = bottleneck
        assert shipped_config(cfg, Log(), 'mona', 'voc')[0] == f'retinanet_swin_l_voc{name}'


@pytest.mark.parametrize('by_epoch', [True, False])
def test_iterations_of_mmengine(tmp_path, by_epoch):
    """mmengine counts evaluations of a run by iteration as step 0 unless told otherwise, and its text not at all: the
    config's interval says which they were, also that at the end, which no logged training step comes before."""
    folder = write_work_dir(
        tmp_path,
        'upernet_swin_l_ade20k',
        {},
        gpus=8,
        options={'train_cfg.max_iters': 7, 'train_cfg.val_interval': 3},
    )
    evaluations = ((0, 0.4), (0, 0.5), (0, 0.6)) if by_epoch else ((3, 0.4), (6, 0.5), (7, 0.6))
    records = [dict(iter=2, step=2), *(dict(iter=n, step=n) for n in (4, 6))]
    for place, (step, miou) in zip((1, 4, 5), evaluations, strict=True):
        records.insert(place, dict(mIoU=miou, step=step))
    (folder / '20260101_000000/vis_data/scalars.json').write_text('\n'.join(map(json.dumps, records)))
    run = only(collect([folder], count=False))
    expected = {3: {'miou': 0.4}, 6: {'miou': 0.5}, 7: {'miou': 0.6}}
    assert run.evaluations == expected and run.status == 'done'

    lines = ['Config:', (folder / '20260101_000000/vis_data/config.py').read_text(), '']
    for record in records:
        if 'mIoU' in record:
            lines.append(f'{stamp("mmengine")}Iter(val) [2/2]    aAcc: 80.0000  mIoU: {record["mIoU"]:.4f}  time: 0.1')
        else:
            lines.append(f'{stamp("mmengine")}Iter(train) [{record["iter"]}/7]  lr: 3.0000e-03  eta: 0:00:03')
    (tmp_path / 'text.log').write_text('\n'.join([stamp('mmengine') + lines[0], *lines[1:]]))
    assert only(collect([tmp_path / 'text.log'], count=False)).evaluations == expected
