"""SIGTERM and SIGINT: everything trained is saved, the command to go on is named, and the status is the signal's."""

import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from small_runs import by_iterations, config, finished, iterations, make_pictures, start, trained, with_validation

from mona_mm.checkpoint.delta_file import read_delta
from mona_mm.checkpoint.pretrained import read_checkpoint
from mona_mm.config.load import find_last_checkpoint
from mona_mm.hooks import PreemptionHook


@pytest.fixture
def pictures(tmp_path):
    return make_pictures(tmp_path / 'pictures', 16)


def seen(work_dir: Path) -> list[str]:
    """The numbers of the pictures of all iterations, of all runs in a work dir."""
    return Path(f'{work_dir}.seen').read_text().splitlines()


def assert_same(work_dir: Path, other: Path) -> None:
    ours, theirs = (read_checkpoint(str(next(folder.glob('epoch_2.pth')))) for folder in (work_dir, other))
    for part in ('state_dict', 'optimizer'):
        for name, value in theirs[part].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(ours[part][name], value), name
    moments = [
        tensor for run in (ours, theirs) for state in run['optimizer']['state'].values() for tensor in state.values()
    ]
    half = len(moments) // 2
    assert half and all(torch.equal(a, b) for a, b in zip(moments[:half], moments[half:], strict=True))
    assert ours['param_schedulers'] == theirs['param_schedulers'] and ours['meta']['iter'] == theirs['meta']['iter']


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(number, pictures, tmp_path):
    """Within the second epoch, with dropout: weights, moments, schedule and the order of the data are those of a run
    that was not stopped, bit for bit, and no picture is seen twice in an epoch."""
    made = config(pictures, tmp_path / 'straight')
    made['model']['layers']['base']['dropout'] = 0.3
    if number == signal.SIGTERM:
        finished(made)
    made['work_dir'], made['model']['seen'] = str(tmp_path / 'work'), str(tmp_path / 'work.seen')
    made['model']['delay'] = 0.1
    work = tmp_path / 'work'
    run = start(made)
    run.wait_for(lambda: Path(f'{work}.seen').exists() and len(seen(work)) >= 10)
    os.kill(run.pids[0], number)
    assert run.wait() == 128 + number, run.text[-3000:]
    assert 'Traceback' not in run.text
    said = [line for line in run.lines if 'stopped after iteration' in line]
    done = iterations(work)
    assert 10 <= done < 16 and len(seen(work)) == done
    assert len(said) == 1 and f'{number.name}: stopped after iteration {done}.' in said[0]
    assert f'The last good checkpoint is {work}/interrupted.pth; go on from it with: python ' in said[0]
    assert (work / 'last_checkpoint').read_text() == str(work / 'interrupted.pth')
    assert read_delta(work / 'interrupted.delta.safetensors').header.progress['iter'] == done
    assert not (work / '.run.lock').exists()
    if number == signal.SIGINT:
        return
    made['model']['delay'] = 0.0
    run = finished(made, '--resume')
    assert run.status == [0], run.text[-3000:]
    assert f'the first {done - 8} of the 8 iterations of epoch 2 are trained and skipped' in run.text
    assert '[2][8/8]' in run.text and f'[2][{done - 8}/8]' not in run.text
    assert seen(work) == seen(tmp_path / 'straight')
    assert_same(work, tmp_path / 'straight')
    left = {file.name for file in work.glob('*.*') if file.suffix in ('.pth', '.safetensors')}
    assert left == {f'epoch_{i}.{end}' for i in (1, 2) for end in ('pth', 'delta.safetensors')}


def test_with_workers_and_a_signal_to_all(pictures, tmp_path):
    """Ctrl-C, and the end of a job on many clusters, reach the processes that load data as well, which go on until
    their parent ends them; and iteration-based loops start them before any hook runs."""
    changes = by_iterations(60, every=50) | dict(train_dataloader__num_workers=2)
    made = config(pictures, tmp_path / 'work', **changes, model__delay=0.05)
    run = start(made)
    run.wait_for(lambda: Path(f'{tmp_path}/work.seen').exists() and len(seen(tmp_path / 'work')) >= 3)
    children = Path(f'/proc/{run.pids[0]}/task/{run.pids[0]}/children').read_text().split()
    assert len(children) >= 2
    os.killpg(run.pids[0], signal.SIGTERM)
    assert run.wait() == 143, run.text[-3000:]
    assert 'Traceback' not in run.text and 'killed' not in run.text
    assert 3 <= iterations(tmp_path / 'work') < 50 and (tmp_path / 'work/interrupted.pth').exists()
    assert not any(Path(f'/proc/{child}').exists() for child in children), 'its workers are gone'


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('during', [True, False], ids=['during a run', 'after it'])
def test_other_processes_get_their_signals(during, number):
    """Workers alone are kept from them: another process of a program that trains, or has trained, ends as it would
    without the hook."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # pytest's own raises KeyboardInterrupt
    hook, runner = PreemptionHook(), SimpleNamespace(hooks=[])
    hook.before_train(runner)
    if not during:
        hook.after_train(runner)
    context = multiprocessing.get_context('fork')
    started = context.Event()

    def wait():
        started.set()
        time.sleep(60)

    process = context.Process(target=wait)
    process.start()
    assert started.wait(30)
    os.kill(process.pid, number)
    process.join(10)
    ended, code = not process.is_alive(), process.exitcode
    process.kill()
    hook.after_train(runner)
    signal.signal(signal.SIGINT, before)
    assert ended and code == -number


def test_workers_of_a_pool():
    """During a run they ignore signals from elsewhere, behind which their parent would wait for them without end, and
    obey the SIGTERM of their parent, by which VOC's evaluation ends them."""
    hook = PreemptionHook()
    hook.before_train(SimpleNamespace(hooks=[]))
    pool = multiprocessing.get_context('fork').Pool(2)
    try:
        pids = set(pool.map(_own_pid, range(20), chunksize=1))
        for pid in pids:
            os.kill(pid, signal.SIGINT)
            subprocess.run(['kill', '-TERM', str(pid)], check=True)
        assert set(pool.map_async(_own_pid, range(20), chunksize=1).get(20)) == pids
        pool.map_async(time.sleep, (60, 60), chunksize=1)
        time.sleep(0.5)  # until both are at it
        ending = threading.Thread(target=pool.terminate, daemon=True)
        ending.start()
        ending.join(20)
        assert not ending.is_alive()
    finally:
        for worker in pool._pool:
            worker.kill()
        hook.after_train(None)


def _own_pid(_: int) -> int:
    time.sleep(0.02)
    return os.getpid()


def test_a_second_signal_ends_at_once(pictures, tmp_path):
    """More than two seconds after the first; before that it counts as the same one, sent by terminal and launcher."""
    made = config(pictures, tmp_path / 'work', model__delay=6.0)
    run = start(made)
    run.wait_for(lambda: Path(f'{tmp_path}/work.seen').exists())
    os.kill(run.pids[0], signal.SIGTERM)
    os.kill(run.pids[0], signal.SIGTERM)
    run.processes[0].join(2.5)
    assert run.processes[0].exitcode is None and 'a second signal ends at once' in run.text
    os.kill(run.pids[0], signal.SIGTERM)
    run.processes[0].join(2)
    assert run.processes[0].exitcode == -signal.SIGTERM and not list((tmp_path / 'work').glob('*.pth'))


def test_two_processes_save_at_the_same_iteration(pictures, tmp_path):
    """One of them is signalled. Both end, with the same status, behind the same iteration."""
    made = config(pictures, tmp_path / 'work', model__delay=0.1, train_cfg__max_epochs=20)
    run = start(made, count=2)
    run.wait_for(lambda: Path(f'{tmp_path}/work.seen').exists() and len(seen(tmp_path / 'work')) >= 5)
    os.kill(run.pids[1], signal.SIGTERM)
    run.wait()
    assert run.status == [143, 143], run.text[-3000:]
    assert 'Traceback' not in run.text and run.text.count('stopped after iteration') == 1
    done = iterations(tmp_path / 'work')
    assert len(seen(tmp_path / 'work')) == 2 * done


@HOOKS.register_module()
class SignalHook(Hook):
    """Signals its own process in a given place."""

    def __init__(self, place: str, iteration: int) -> None:
        self.place, self.iteration = place, iteration

    def _send(self, place: str, iteration: int) -> None:
        if (place, iteration) == (self.place, self.iteration):
            os.kill(os.getpid(), signal.SIGTERM)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self._send('iteration', runner.iter + 1)

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self._send('validation', runner.iter)


@pytest.mark.parametrize(
    ('place', 'iteration', 'changes', 'kept', 'done'),
    [
        pytest.param(
            'iteration', 8, {}, 'epoch_1', 8, marks=pytest.mark.slow
        ),  # in the last iteration of an epoch: the usual checkpoint is enough
        ('iteration', 8, dict(default_hooks__checkpoint__interval=2), 'interrupted', 8),
        pytest.param('validation', 8, {}, 'epoch_1', 8, marks=pytest.mark.slow),
        ('validation', 8, dict(default_hooks__checkpoint__interval=2), 'interrupted', 8),
        ('iteration', 3, dict(optim_wrapper__accumulative_counts=4), 'interrupted', 4),  # the gradient is whole then
        pytest.param('iteration', 4, by_iterations(16, every=4), 'iter_4', 4, marks=pytest.mark.slow),
    ],
)
def test_where_a_signal_comes(place, iteration, changes, kept, done, pictures, tmp_path):
    """Nothing is saved twice, and a run that is resumed ends as one that was not stopped."""
    made = with_validation(config(pictures, tmp_path / 'work', **changes))
    made['custom_hooks'].append(dict(type='SignalHook', place=place, iteration=iteration))
    run = finished(made)
    assert run.status == [143], run.text[-3000:]
    assert Path((tmp_path / 'work/last_checkpoint').read_text()).stem == kept
    assert iterations(tmp_path / 'work') == done
    assert ('within a validation, which is lost' in run.text) == (place == 'validation')


def test_resumed_in_an_epoch_of_fewer_iterations(pictures, tmp_path):
    """Seven of eight iterations are three and a half of four: three are skipped, and the fourth ends the epoch."""
    made = config(pictures, tmp_path / 'work')
    made['custom_hooks'].append(dict(type='SignalHook', place='iteration', iteration=7))
    assert finished(made).status == [143] and iterations(tmp_path / 'work') == 7
    made['custom_hooks'].pop()
    made['train_dataloader']['batch_size'] = 4
    run = finished(made, '--resume')
    assert run.status == [0], run.text[-3000:]
    assert 'the first 3 of the 4 iterations of epoch 1 are trained and skipped' in run.text
    assert iterations(tmp_path / 'work') == 2 * 4


@pytest.mark.slow
def test_averaged_weights_are_not_saved_in_place_of_the_models(pictures, tmp_path):
    """Within a validation of averaged weights no checkpoint can be written: the validation ends first."""
    made = with_validation(config(pictures, tmp_path / 'work', default_hooks__checkpoint__interval=2))
    made['custom_hooks'] += [dict(type='EMAHook'), dict(type='SignalHook', place='validation', iteration=8)]
    run = finished(made)
    assert run.status == [143] and 'within a validation' not in run.text
    straight = config(pictures, tmp_path / 'straight', default_hooks__checkpoint__interval=1)
    straight['custom_hooks'] += [dict(type='EMAHook')]
    finished(straight)
    ours = read_checkpoint(str(tmp_path / 'work/interrupted.pth'))
    theirs = read_checkpoint(str(tmp_path / 'straight/epoch_1.pth'))
    for part in ('state_dict', 'ema_state_dict'):
        assert all(torch.equal(ours[part][name], tensor) for name, tensor in theirs[part].items())
    assert trained(tmp_path / 'work')


KILLS = int(os.environ.get('KILLS', 100))
"""How often the run below is stopped; docs/reliability.md has the figures of one measurement."""


@pytest.mark.slow
def test_stopped_at_random_and_moved(pictures, tmp_path):
    """SIGKILL, SIGTERM or SIGINT to one or to all processes of a run at random moments, which goes on each time on one
    or two processes: what is there is whole, no checkpoint is older than the one before, what was signalled is saved to
    the iteration, no lock holds the next one up, and the end is reached."""
    rng, work = random.Random(3), tmp_path / 'work'
    epochs = 2 * KILLS
    made = config(pictures, work, model__delay=0.02, train_cfg__max_epochs=epochs, model__seen=f'{work}.seen')
    made['param_scheduler'] = []
    stopped, at = 0, 0.0  # the last checkpoint in epochs, since processes change the number of iterations in one
    while stopped < KILLS:
        count, number = rng.choice((1, 2)), rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        Path(f'{work}.seen').unlink(missing_ok=True)
        run = start(made, *(['--resume'] if at else []), count=count)
        run.wait_for(lambda: Path(f'{work}.seen').exists(), 300)
        time.sleep(rng.uniform(0, 1))
        before = len(seen(work))
        chosen = run.pids if number == signal.SIGKILL or rng.random() < 0.5 else [rng.choice(run.pids)]
        for pid in chosen:
            os.kill(pid, number)
        run.wait(300)
        stopped += 1
        assert set(run.status) == {-9 if number == signal.SIGKILL else 128 + number}, run.text[-3000:]
        for file in work.glob('*.pth'):
            read_checkpoint(str(file))
        for file in work.glob('*.delta.safetensors'):
            read_delta(file)
        if (work / 'last_checkpoint').exists():
            length = 16 // 2 // count
            now = iterations(work) / length if number != signal.SIGKILL else at
            assert now >= at, (now, at)
            if number != signal.SIGKILL:
                assert iterations(work) >= int(at * length) + before // count
            else:
                meta = read_checkpoint(find_last_checkpoint(str(work)))['meta']
                now = max(at, float(meta['epoch']))
            at = now
    made['model']['delay'] = 0.0
    made['train_cfg']['max_epochs'] = int(at) + 2
    run = finished(made, '--resume')
    assert run.status == [0] and iterations(work) == 8 * (int(at) + 2)
    print(f'{stopped} stops, {at:.2f} epochs trained')
