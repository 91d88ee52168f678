"""A run that goes on under other circumstances: carried out and said where it is sound, refused where it is not."""

import pytest
import torch
from small_runs import by_iterations, config, errors, finished, iterations, logged, make_pictures, trained

from mona_mm.hooks.resumption import _Begun


@pytest.fixture
def pictures(tmp_path):
    return make_pictures(tmp_path / 'pictures')


WARM_UP = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=6),
    dict(type='CosineAnnealingLR', by_epoch=True, T_max=4, begin=0, end=4),
]


def said(run) -> str:
    """The one line on what changed."""
    (line,) = [line for line in run.lines if 'WARNING - Resuming ' in line]
    return line


def rates(work_dir) -> list[float]:
    return logged(work_dir, 'lr')


def test_without_changes_nothing_is_said(pictures, tmp_path):
    """And nothing is changed: the second epoch ends as it did before, bit for bit. More workers are no change."""
    made = config(pictures, tmp_path / 'work', param_scheduler=WARM_UP)
    finished(made)
    before = trained(tmp_path / 'work')
    made['train_dataloader']['num_workers'] = 1
    run = finished(made, '--resume', str(tmp_path / 'work/epoch_1.pth'))
    assert run.status == [0] and 'WARNING - Resuming' not in run.text
    assert all(torch.equal(trained(tmp_path / 'work')[name], tensor) for name, tensor in before.items())
    made['train_cfg']['max_epochs'] = 3
    run = finished(made, '--resume')
    assert run.status == [0] and said(run).endswith('(train_cfg.max_epochs: 2 -> 3), which hold from here on.')


@pytest.mark.parametrize('schedule', [pytest.param('steps', marks=pytest.mark.slow), 'warm-up'])
def test_another_learning_rate_and_schedule(schedule, pictures, tmp_path):
    """The rates of the resumed iterations are those that a run with the new settings has there, from the start."""
    new = dict(optim_wrapper__optimizer=dict(type='AdamW', lr=0.002, weight_decay=0.3))
    new['param_scheduler'] = WARM_UP if schedule == 'warm-up' else [
        dict(type='MultiStepLR', by_epoch=True, milestones=[1, 2, 3], gamma=0.1)
    ]  # fmt: skip
    finished(config(pictures, tmp_path / 'work'))
    finished(config(pictures, tmp_path / 'straight', train_cfg__max_epochs=4, **new))
    run = finished(config(pictures, tmp_path / 'work', train_cfg__max_epochs=4, **new), '--resume')
    assert run.status == [0], run.text[-3000:]
    assert rates(tmp_path / 'work')[8:] == pytest.approx(rates(tmp_path / 'straight')[8:], rel=1e-12)
    assert 'optim_wrapper.optimizer.lr: 0.01 -> 0.002' in said(run) and 'weight_decay: 0.1 -> 0.3' in said(run)
    assert 'the learning rate goes on at ' in said(run) and "the optimizer's moments are kept" in said(run)


@pytest.mark.parametrize(('batch', 'processes'), [(4, 1), pytest.param(1, 1, marks=pytest.mark.slow), (2, 2)])
def test_another_number_of_images(batch, processes, pictures, tmp_path):
    """Epochs go on counting, iterations are counted anew, and the schedule of iterations stands where it belongs."""
    changes = dict(param_scheduler=WARM_UP, train_cfg__max_epochs=2)
    finished(config(pictures, tmp_path / 'work', **changes))
    changes |= dict(train_dataloader__batch_size=batch, train_cfg__max_epochs=4)
    run = finished(config(pictures, tmp_path / 'work', **changes), '--resume', count=processes)
    assert run.status == [0] * processes, run.text[-3000:]
    length = 8 // batch // processes
    assert f'an epoch has {length} iterations of {batch} images on {processes} process' in said(run)
    assert f', in the checkpoint 4 of 2 images on 1 process: they are counted on from {2 * length} in' in said(run)
    assert f'[3][1/{length}]' in run.text and 'day' not in run.text
    assert iterations(tmp_path / 'work') == 4 * length
    finished(config(pictures, tmp_path / 'straight', **changes), count=processes)
    assert rates(tmp_path / 'work')[8:] == pytest.approx(rates(tmp_path / 'straight')[2 * length :], rel=1e-12)


@pytest.mark.slow
def test_another_batch_by_iterations(pictures, tmp_path):
    finished(config(pictures, tmp_path / 'work', **by_iterations(4)))
    changes = by_iterations(6) | dict(train_dataloader__batch_size=4)
    run = finished(config(pictures, tmp_path / 'work', **changes), '--resume')
    assert run.status == [0] and iterations(tmp_path / 'work') == 6
    assert 'an iteration has 4 images on 1 process, in the checkpoint 2 images on 1 process' in said(run)


def test_dropout_holds_from_here_on(pictures, tmp_path):
    made = config(pictures, tmp_path / 'work', train_cfg__max_epochs=1)
    finished(made)
    made['model']['layers']['base']['dropout'] = 0.5
    run = finished(made | dict(train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=2)), '--resume')
    assert run.status == [0] and 'model.layers.base.dropout: None -> 0.5' in said(run)


@pytest.mark.parametrize('counts', ['epochs', pytest.param('iterations', marks=pytest.mark.slow)])
def test_nothing_is_left_to_train(counts, pictures, tmp_path):
    """A run that is started again behind its end has status 0, for whoever starts jobs until they are done."""
    changes = {} if counts == 'epochs' else by_iterations(8, every=4)
    made = config(pictures, tmp_path / 'work', **changes)
    finished(made)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / 'work').glob('*.pth')}
    run = finished(made, '--resume')
    assert run.status == [0] and not errors(run.text)
    name = 'max_epochs' if counts == 'epochs' else 'max_iters'
    done = 2 if counts == 'epochs' else 8
    assert f'Nothing is left to train: {tmp_path}/work/' in run.text
    assert f'has all {done} {counts if counts == "epochs" else "iters"} of train_cfg.{name}' in run.text
    assert before == {file.name: file.stat().st_mtime_ns for file in (tmp_path / 'work').glob('*.pth')}
    made['train_cfg'][name] = 1
    (error,) = errors((run := finished(made, '--resume')).text)
    assert run.status == [2] and f'train_cfg.{name}=1: it is beyond the end of this run' in error


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            dict(model__layers__trainable=['0', '2']),
            'trained 2 tensors in 1 groups of the optimizer, and this config trains 4 in 1',
        ),
        (
            dict(optim_wrapper__optimizer=dict(type='SGD', lr=0.01)),
            'holds the moments of AdamW and optim_wrapper.optimizer.type is SGD',
        ),
        (by_iterations(20), 'was trained by epochs and this config trains by iterations'),
    ],
    ids=['trainable', 'optimizer', 'loop'],
)
def test_what_is_refused(changes, message, pictures, tmp_path):
    """Both values and the way out, in one line, and the run is as it was."""
    ours = dict(optim_wrapper__constructor='mona_mm.PeftOptimWrapperConstructor')  # leaves out what is frozen
    finished(config(pictures, tmp_path / 'work', **ours))
    run = finished(config(pictures, tmp_path / 'work', **ours, **changes), '--resume')
    (error,) = errors(run.text)
    assert run.status == [2] and message in error
    assert f'--cfg-options load_from={tmp_path}/work/epoch_2.pth, without --resume' in error
    assert ("model.layers.trainable: ['2'] -> ['0', '2']" in error) == ('tensors' in message)
    assert iterations(tmp_path / 'work') == 8


def test_a_sampler_that_begins_later():
    """Only in its first pass; a loader keeps it for the others, also in workers that persist."""
    sampler = torch.utils.data.BatchSampler(range(10), 2, drop_last=False)
    begun = _Begun(sampler, 3)
    assert list(begun) == [[6, 7], [8, 9]] and list(begun) == list(sampler)
    assert len(begun) == 5 and begun.batch_size == 2 and begun.sampler == range(10)
