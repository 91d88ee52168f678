"""Tables whose cells are run here: planning, going on, several at once, what a run leaves.

The queue is tried with a program in the place of a cell that takes milliseconds; the cells themselves with a small ViT.
"""

import dataclasses
import json
import os
import shutil
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mona_mm.config.build import build_on_meta
from mona_mm.config.load import load_config
from mona_mm.errors import ConfigError, MissingFileError
from mona_mm.frozen.count import count_trainable
from mona_mm.reproduce import (
    MINI,
    TABLES,
    Cell,
    ComparedTask,
    Comparison,
    Composer,
    Queue,
    check_material,
    find_comparison,
    read_records,
    render_comparison,
)
from mona_mm.reproduce.cell_run import CellHook
from mona_mm.reproduce.cells import configs_folder
from mona_mm.reproduce.comparison import STOPPED
from mona_mm.spt.method import check_structured

SIZE = 28
CONFIG = """
_base_ = ['{root}/configs/_base_/mini_camvid.py']
classes = ('a', 'b')
size = (28, 28)
model = dict(
    data_preprocessor=dict(size=size),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32), img_size=28
    ),
    decode_head=dict(in_channels=16, channels=8, num_classes=2),
)
pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
train_dataloader = dict(batch_size=2, dataset=dict(metainfo=dict(classes=classes), pipeline=pipeline))
val_dataloader = dict(dataset=dict(metainfo=dict(classes=classes), pipeline=pipeline))
test_dataloader = dict(dataset=dict(metainfo=dict(classes=classes), pipeline=pipeline))
train_cfg = dict(max_iters=10, val_interval=10)
param_scheduler = [dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=10)]
default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=4))
"""

# What a cell leaves, made up: the score depends on the cell alone.
PROGRAM = """
import json, pathlib, runpy, sys, time
folder, step = pathlib.Path(sys.argv[1]), sys.argv[2]
with open(folder.parent / 'started', 'a') as file:
    file.write(f'{folder.name} {step}\\n')
time.sleep(float((folder.parent / 'seconds').read_text()) if (folder.parent / 'seconds').exists() else 0)
if (folder.parent / 'broken').exists() and (folder.parent / 'broken').read_text() in folder.name:
    (folder / f'{step}.error').write_text('ConfigError: made up')
    sys.exit(1)
lr = float(folder.name.split('-lr')[1].split('-seed')[0])
result = dict(scores={'8': {'mIoU': 50 - 1e4 * abs(lr - 5e-4)}}, seconds=dict(wall=100.0, processor=90.0), date='today')
if step == 'train':
    result |= dict(trained_parameters=10, trained_in_backbone=5, backbone_share=0.1, peak_memory=1 << 20, delta_bytes=9)
(folder / f'{step}.json').write_text(json.dumps(result))
with open(folder.parent / 'started', 'a') as file:
    file.write('end\\n') if (folder.parent / 'seconds').exists() else None
"""


@pytest.fixture
def material(tmp_path) -> Path:
    """A folder with data of two splits of drawn images, weights of a small ViT, and the config of a task."""
    root = Path(__file__).resolve().parents[1]
    (tmp_path / 'tiny.py').write_text(CONFIG.format(root=root.as_posix()))
    rng = np.random.default_rng(0)
    for split in ('train', 'val', 'test'):
        for kind in ('images', 'annotations'):
            (tmp_path / 'data/tiny' / kind / split).mkdir(parents=True)
        for i in range(4):
            label = np.zeros((SIZE, SIZE), np.uint8)
            label[: rng.integers(8, 20)] = 1
            image = (label * 150 + rng.integers(0, 90, label.shape)).astype(np.uint8)[..., None].repeat(3, 2)
            cv2.imwrite(str(tmp_path / f'data/tiny/images/{split}/{i}.jpg'), image)
            cv2.imwrite(str(tmp_path / f'data/tiny/annotations/{split}/{i}.png'), label)
    torch.save({}, tmp_path / 'weights.pth')
    return tmp_path


def small_table(material: Path) -> Comparison:
    task = ComparedTask('tiny', str(material / 'tiny.py'), 'tiny', 'mIoU', 'mIoU')
    methods = {
        'fixed': MINI.methods['fixed'],
        'lora': dict(peft=dict(type='LoRA', rank=2, alpha=2)),
        'spt_lora': dict(peft=dict(type='SPT', budget=300, num_batches=2, structured=dict(type='LoRA', rank=2))),
        'full': MINI.methods['full'],
    }
    return Comparison('small', 'A small one', (task,), methods, (1e-4, 5e-4, 2.5e-3), (0, 1, 2))


def queue(material: Path, methods: list[str] | None = None, name: str = 'work', **options) -> Queue:
    """A queue of the made-up program."""
    (material / 'program.py').write_text(PROGRAM)
    composer = Composer(small_table(material), material / 'data', material / 'weights.pth', 'cpu', material / name)
    options = dict(program=(sys.executable, str(material / 'program.py'))) | options
    lines = []
    made = Queue(
        composer, material / f'{name}-out', ['tiny'], methods or ['fixed', 'lora'], say=lines.append, **options
    )
    made.lines = lines
    return made


def started(material: Path, name: str = 'work') -> list[str]:
    file = material / name / 'started'
    return file.read_text().splitlines() if file.is_file() else []


def names(*entries: str) -> list[str]:
    return [f'tiny-{entry}' for entry in entries]


# Planning ------------------------------------------------------------------------------------------------------------


def test_order_is_soon_of_use(material):
    """Every method's middle learning rate comes first, then the higher and the lower one, then the seeds of the best,
    at the end the tests."""
    assert queue(material).run() == 0
    assert started(material) == names(
        *(f'{method}-lr{lr}-seed0 train' for lr in ('0.0005', '0.0025', '0.0001') for method in ('fixed', 'lora')),
        *(f'{method}-lr0.0005-seed{seed} train' for seed in (1, 2) for method in ('fixed', 'lora')),
        *(f'{method}-lr0.0005-seed{seed} test' for method in ('fixed', 'lora') for seed in (0, 1, 2)),
    )


def test_what_is_finished_is_skipped(material):
    queue(material).run()
    done = started(material)
    again = queue(material)
    assert again.run() == 0
    assert started(material) == done
    (material / 'work-out/tiny-lora-lr0.0001-seed0-val.json').unlink()
    queue(material).run()
    assert started(material)[len(done) :] == ['tiny-lora-lr0.0001-seed0 train']


def test_weights_that_are_elsewhere_are_trained_again(material):
    """Records may come from another machine, and its weights do not: a test that is missing trains them first."""
    queue(material, ['lora']).run()
    done, record = started(material), material / 'work-out/tiny-lora-lr0.0005-seed1-val.json'
    before = record.read_bytes()
    (material / 'work-out/tiny-lora-lr0.0005-seed1-test.json').unlink()
    shutil.rmtree(material / 'work/tiny-lora-lr0.0005-seed1')
    again = queue(material, ['lora'])
    assert again.run() == 0
    assert started(material)[len(done) :] == names('lora-lr0.0005-seed1 train', 'lora-lr0.0005-seed1 test')
    assert any('its weights were not in' in line for line in again.lines)
    assert json.loads((material / 'work-out/tiny-lora-lr0.0005-seed1-test.json').read_text())['score'] == 50
    assert record.read_bytes() == before


def test_another_config_is_run_anew(material):
    """A result counts for the config that it was made with, wherever data and weights were."""
    queue(material, ['lora']).run()
    done = len(started(material))
    (material / 'data').rename(material / 'elsewhere')
    moved = queue(material, ['lora'])
    moved.composer.data = material / 'elsewhere'
    assert moved.run() == 0 and len(started(material)) == done
    changed = queue(material, ['lora'])
    changed.composer.data = material / 'elsewhere'
    changed.composer.table.methods['lora']['peft']['rank'] = 4
    changed.run()
    assert len(started(material)) == 2 * done


def test_goes_on_when_one_fails(material):
    """What failed is recorded with its error and retried with ``again`` only; the best of the rest is taken."""
    (material / 'work').mkdir()
    (material / 'work/broken').write_text('lora-lr0.0005')
    first = queue(material)
    assert first.run() == 0
    record = json.loads((material / 'work-out/tiny-lora-lr0.0005-seed0-val.json').read_text())
    assert record['score'] is None and record['error'] == 'ConfigError: made up'
    assert 'tiny-lora-lr0.0001-seed2 test' in started(material)  # of two the better
    assert 'tiny-fixed-lr0.0005-seed2 test' in started(material)
    text = render_comparison(first.table, first.records(), ['tiny'], 'cpu')
    assert 'lr 0.0005 seed 0 val failed: ConfigError: made up' in text
    done = len(started(material))
    assert queue(material).run() == 0 and len(started(material)) == done
    (material / 'work/broken').unlink()
    assert queue(material, again=True).run() == 0
    assert started(material)[done] == 'tiny-lora-lr0.0005-seed0 train'
    assert 'tiny-lora-lr0.0005-seed2 test' in started(material)[done:]


def test_scores_that_are_not_there(material):
    """A detector that detects nothing, for which CocoMetric returns no metrics, scores 0; a wrong name is an error."""
    for scores, expected in (('{}', 0.0), ("{'aAcc': 1.0}", None)):
        made = queue(material, ['lora'], f'work{len(scores)}')
        program = material / f'program{len(scores)}.py'
        program.write_text(PROGRAM.replace("{'mIoU': 50 - 1e4 * abs(lr - 5e-4)}", scores))
        made.program = (sys.executable, str(program))
        assert made.run() == 0
        record = made.records()[Cell('tiny', 'lora', 5e-4, 0)]
        assert record['score'] == expected
        assert expected is not None or record['error'] == 'the metrics have no mIoU, but aAcc'


def test_a_second_failure_is_not_retried_without_end(material):
    (material / 'work').mkdir()
    (material / 'work/broken').write_text('lora')
    queue(material, ['lora']).run()
    assert queue(material, ['lora'], again=True).run() == 0
    assert len(started(material)) == 6


def test_minutes(material):
    """A cell that would not end in time by what was measured does not start; the message says how many are missing."""
    short = queue(material)
    assert short.run(minutes=1) == 16  # before the first was measured: 6 minutes
    assert started(material) == []
    assert short.lines[-1] == '16 cells are missing; the same command goes on.'
    assert queue(material).run(minutes=6.1) == 0
    (material / 'work-out/tiny-lora-lr0.0025-seed0-val.json').unlink()
    count = len(started(material))
    assert queue(material).run(minutes=1.5) == 1 and len(started(material)) == count  # measured: 100 s
    assert queue(material).run(minutes=2) == 0 and len(started(material)) == count + 1


def test_time_to_go(material):
    """16 cells of two methods: ten train, six test; what was measured is what is expected of the rest."""
    made = queue(material)
    assert made.to_go({}) == (16, pytest.approx(10 * 360 + 6 * 72))
    made.run()
    assert made.lines[0] == '0 cells done, 16 to go, about 1 h 07 min'
    records = dict(list(made.records().items()))
    gone = Cell('tiny', 'lora', 5e-4, 1)
    del records[gone]
    count, seconds = made.to_go(records)
    assert count == 4 and seconds > 100  # and its tests, which wait for it
    made.jobs = 2
    assert made.to_go(records)[1] == pytest.approx(seconds / 2)


def test_ends_in_time_whatever_a_cell_does(material):
    """One that lasts longer than was measured is ended at the time, and not recorded as failed."""
    (material / 'work').mkdir()
    made = queue(material)
    made.table = made.composer.table = dataclasses.replace(made.table, seconds=0.1)
    (material / 'work/seconds').write_text('600')  # as long as this test would last otherwise
    assert made.run(minutes=0.1) == 16
    assert len(set(started(material))) <= 1  # its process may have been ended before it began
    assert not list((material / 'work-out').glob('*'))


def test_jobs_run_at_once(material):
    (material / 'work').mkdir()
    (material / 'work/seconds').write_text('0.5')
    queue(material, jobs=4).run()
    lines = started(material)  # a cell's name when it begins, and `end` when it ends
    running = [i - 2 * lines[:i].count('end') for i in range(len(lines) + 1)]
    assert len(lines) == 32 and running[-1] == 0
    assert 2 <= max(running) <= 4


def test_two_queues_in_one_folder_are_refused(material):
    first, second = queue(material), queue(material)
    with first._alone(), pytest.raises(ConfigError, match='another run works there'):
        second.run()


def test_choice_and_material_are_checked(material):
    with pytest.raises(ConfigError, match='--methods moan: the table mini has full, fixed'):
        MINI.choose(None, ['moan'])
    assert MINI.choose(None, ['mona', 'full'])[1] == ['full', 'mona']
    composer = Composer(small_table(material), material / 'nowhere', material / 'weights.pth', 'cpu', material)
    with pytest.raises(MissingFileError, match='--data DIR'):
        check_material(composer, ['tiny'])
    (material / 'work-out').mkdir()
    (material / 'work-out/mine.json').write_text('{}')
    with pytest.raises(ConfigError, match='is not a result'):
        read_records(material / 'work-out', 'cpu')


def test_spt_has_the_budget_of_its_module(tmp_path):
    """In the table mini, SPT may train in the backbone what its structured module trains there alone."""
    composer = Composer(MINI, tmp_path, tmp_path / 'weights', 'cpu', tmp_path)
    for method in ('lora', 'adapter', 'mona'):
        cfg = composer.compose(Cell('camvid', method, 1e-3, 0))
        spt = MINI.methods[f'spt_{method}']['peft']
        check_structured(spt['structured'])
        alone = MINI.methods[method]['peft']
        sizes = 'type', 'rank', 'bottleneck'
        assert all(spt['structured'].get(key) == alone.get(key) for key in sizes)
        assert method == 'mona' or spt['structured']['drop_path'] == 0  # as in the protocol
        assert count_trainable(build_on_meta(cfg)).backbone_trainable == spt['budget']


def test_bfloat16_on_a_gpu(tmp_path):
    """The config of a cell says so, and so has another fingerprint."""
    cell = Cell('camvid', 'lora', 1e-3, 0)
    cpu, cuda = (Composer(MINI, tmp_path, tmp_path / 'w', device, tmp_path) for device in ('cpu', 'cuda'))
    wrapper = cuda.compose(cell).optim_wrapper
    assert (wrapper.type, wrapper.dtype) == ('AmpOptimWrapper', 'bfloat16')
    assert cpu.compose(cell).optim_wrapper.type == 'OptimWrapper'
    assert cpu.fingerprint(cell) != cuda.fingerprint(cell)


# The published tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', [name for name in TABLES if name != 'mini'])
def test_published_tables(name, tmp_path):
    """A cell is the shipped config with a seed, scaled for one device and its data elsewhere; there is no search."""
    table = find_comparison(name)
    assert table.name == name and table.tasks and table.methods and not table.has_tests
    composer = Composer(table, tmp_path / 'sets', tmp_path / 'none', 'cuda', tmp_path)
    task, method = table.tasks[-1], list(table.methods)[-1]
    assert all((configs_folder() / path).is_file() for path in task.configs.values())
    (lr,) = table.rates(task.name, method)
    cfg = composer.compose(Cell(task.name, method, lr, 0)).to_dict()
    shipped = load_config(str(configs_folder() / task.configs[method]), dict(task.options)).to_dict()
    assert cfg.pop('randomness') == dict(seed=0)
    if 'auto_scale_lr' in shipped:
        assert cfg['auto_scale_lr'].pop('enable') and shipped['auto_scale_lr'].pop('enable', False) is False
    own = json.dumps(cfg, default=str, sort_keys=True).replace(str(tmp_path / 'sets'), 'data')
    shipped.pop('randomness', None)
    assert own == json.dumps(shipped, default=str, sort_keys=True)
    with pytest.raises(MissingFileError, match='--data DIR'):
        check_material(composer, [task.name])


def test_a_published_table_is_run(material):
    """Every method once, without tests; a method without a config for a task has no cell there."""
    made = queue(material)
    table = find_comparison('classification')
    assert table.has('flowers102', 'mona')
    tasks = tuple(dataclasses.replace(task, metric='mIoU') for task in table.tasks)
    configs = {'mona': tasks[0].configs['mona']}
    tasks = (dataclasses.replace(tasks[0], configs=configs), *tasks[1:])
    made.table = made.composer.table = dataclasses.replace(table, tasks=tasks)
    made.tasks, made.methods = ['flowers102', 'oxfordpets'], ['lora', 'mona']
    assert made.to_go({})[0] == 3
    assert made.run() == 0
    ran = [line.split('-lr')[0] for line in started(material)]
    assert ran == ['flowers102-mona', 'oxfordpets-lora', 'oxfordpets-mona']
    text = render_comparison(made.table, made.records(), made.tasks, 'cpu')
    assert text.count('2 seeds') == 0 and 'edge' not in text and 'tests' not in text


# Cells ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def real(material):
    """Makes queues of real cells, of the best learning rate alone."""
    composer = Composer(small_table(material), material / 'data', material / 'weights.pth', 'cpu', material / 'init')
    cfg = composer.compose(Cell('tiny', 'fixed', 5e-4, 0))
    from mmengine.registry import MODELS

    from mona_mm.type_names import enter_scope

    enter_scope(cfg)
    torch.manual_seed(0)
    backbone = MODELS.build({**cfg.model.backbone.base, 'init_cfg': None})
    torch.save(backbone.state_dict(), material / 'weights.pth')

    def make(name: str, methods: list[str], **options) -> Queue:
        made = queue(material, methods, name, program=Queue.program, **options)
        made.table = made.composer.table = dataclasses.replace(made.table, learning_rates=(5e-4,), seeds=(0,))
        return made

    return make


def test_a_cell_that_is_told_to_stop_ends_behind_its_next_checkpoint():
    """Not before, or what came since the last one would be lost."""
    hook = CellHook(os.getppid())
    hook.before_train_iter(None, 0)
    hook.stopping = True
    hook.before_train_iter(None, 1)
    hook.before_save_checkpoint(None, {})
    with pytest.raises(SystemExit) as ended:
        hook.before_train_iter(None, 2)
    assert ended.value.code == STOPPED
    hook.stopping = False  # a checkpoint alone ends nothing
    hook.before_train_iter(None, 2)
    with pytest.raises(SystemExit):  # the queue is gone
        CellHook(-1).before_train_iter(None, 0)


KEYS = {
    *('table', 'task', 'method', 'lr', 'seed', 'split', 'metric', 'score', 'device', 'fingerprint', 'code', 'scores'),
    *('losses', 'trained_parameters', 'trained_in_backbone', 'backbone_share', 'seconds', 'peak_memory'),
    *('delta_bytes', 'machine', 'date'),
}


@pytest.mark.slow
def test_real_cells(real, material):
    """Every kind of cell, two at once and one after the other: equal bit for bit. Their files say what they must."""
    methods = ['fixed', 'spt_lora', 'full']
    both = {}
    for name, jobs in (('one', 1), ('two', 2)):
        made = real(name, methods, jobs=jobs)
        assert made.run() == 0, made.lines
        both[name] = made.records()
        assert all('error' not in record for record in both[name].values()), both[name]
    assert len(both['one']) == len(both['two']) == 6
    for cell, record in both['one'].items():
        other = both['two'][cell]
        same = KEYS - {'seconds', 'peak_memory', 'date'}
        keys = same & record.keys()
        assert {key: record[key] for key in keys} == {key: other[key] for key in keys}
        assert KEYS - record.keys() == (set() if cell.split == 'val' else {'losses'})
        assert 0 < record['score'] < 100 and record['seconds']['wall'] > 0 and record['machine']['threads'] == 1
        text = (material / f'one-out/{cell.name}.json').read_text()
        assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + '\n' and len(text) < 4096
    for cell in [cell for cell in both['one'] if cell.split == 'val' and cell.method != 'full']:
        one, two = (load_file(material / name / cell.folder / 'trained.delta.safetensors') for name in ('one', 'two'))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
        assert not list((material / 'one' / cell.folder / 'run').glob('*.pth'))
    trained = {cell.method: r['trained_in_backbone'] for cell, r in both['one'].items() if cell.split == 'val'}
    assert trained['fixed'] == 0 and 0 < trained['spt_lora'] <= 300 < trained['full']
    text = render_comparison(made.table, both['two'], ['tiny'], 'cpu')
    assert all(method in text for method in methods) and 'mIoU test' in text


@pytest.mark.slow
def test_killed_and_continued(real, material):
    """A cell that was killed goes on from its last checkpoint and ends as one that was not, bit for bit."""
    whole = real('whole', ['lora'])
    whole.run()
    made = real('killed', ['lora'])
    cell = Cell('tiny', 'lora', 5e-4, 0)
    job = made._launch(cell, 'train', 60.0)
    pointer = material / 'killed' / cell.folder / 'run/last_checkpoint'
    while not pointer.is_file() and job.process.poll() is None:
        time.sleep(0.005)
    job.process.kill()
    job.process.wait()
    left = sorted((material / 'killed' / cell.folder / 'run').glob('iter_*.pth'))
    assert left and not (material / 'killed-out').exists()
    assert made.run() == 0
    log = (material / 'killed' / cell.folder / 'train.log').read_text()
    assert 'resumed' in log
    one, two = (whole.records(), made.records())
    assert one[cell]['scores'] == two[cell]['scores'] and one[cell]['losses'] == two[cell]['losses'] != []
    files = [material / name / cell.folder / 'trained.delta.safetensors' for name in ('whole', 'killed')]
    first, second = map(load_file, files)
    assert all(torch.equal(first[key], second[key]) for key in first)
