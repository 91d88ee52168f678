"""What clusters and long nights do to a run, done for real: one line each that says what is kept and how to go on."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers import in_processes
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from small_runs import by_iterations, config, errors, finished, iterations, logged, make_pictures, start

from mona_mm.data_check import check as data_check
from mona_mm.errors import OutOfMemoryError, UserError, WorkDirError
from mona_mm.own_data.images import read_header
from mona_mm.reliability import lock_work_dir as locks
from mona_mm.reliability.failures import explained, in_one_line
from mona_mm.reliability.lock_work_dir import WorkDirLock, lock_work_dir
from mona_mm.reliability.unreadable_images import check_images


@pytest.fixture
def pictures(tmp_path):
    return make_pictures(tmp_path / 'pictures')


# Images ----------------------------------------------------------------------------------------------------------

DAMAGES = {
    'cut off': (lambda file: file.write_bytes(file.read_bytes()[:-200]), 'truncated'),
    'empty': (lambda file: file.write_bytes(b''), 'it is empty'),
    'missing': (lambda file: file.unlink(), 'there is no such file'),
    'no image': (lambda file: file.write_bytes(b'not an image at all'), 'cannot identify image file'),
    'a folder': (lambda file: (file.unlink(), file.mkdir()), 'it is not a file'),
}


def without_check_of_images() -> None:
    """The check before training looks at the headers of a part of the images of a large set alone."""
    data_check._check_images = lambda *_: None


@pytest.mark.parametrize(
    'damage', [pytest.param(name, marks=[] if name in ('cut off', 'empty') else [pytest.mark.slow]) for name in DAMAGES]
)
def test_an_image_that_cannot_be_read_is_named(damage, pictures, tmp_path):
    """By the worker that meets it, in the one line with which the run ends."""
    change, reason = DAMAGES[damage]
    change(pictures / '5.jpg')
    made = config(pictures, tmp_path / 'work', train_dataloader__num_workers=1 if damage == 'cut off' else 0)
    run = finished(made, before=without_check_of_images)
    (error,) = errors(run.text)
    assert run.status == [2] and f'The image {pictures}/5.jpg cannot be read: ' in error and reason in error
    assert '--skip-unreadable' in error


def test_images_that_cannot_be_read_are_left_out(pictures, tmp_path):
    """In training, all of those above at once; each is in the log, and another image takes its place."""
    for i, (change, _) in enumerate(DAMAGES.values()):
        change(pictures / f'{i}.jpg')
    run = finished(config(pictures, tmp_path / 'work', train_dataloader__num_workers=1), '--skip-unreadable')
    assert run.status == [0] and 'left out (train)' in run.text, run.text[-3000:]
    for i, (_, reason) in enumerate(DAMAGES.values()):
        assert any(f'{pictures}/{i}.jpg is left out: ' in line and reason in line for line in run.lines), i
    seen = {n for line in Path(f'{tmp_path}/work.seen').read_text().splitlines() for n in line.split()}
    assert seen <= {'5', '6', '7'} and len(logged(tmp_path / 'work')) == 8


def test_a_whole_image_with_more_behind_it_is_whole(tmp_path):
    """Some cameras and tools add bytes behind a JPEG, or leave out its last marker; decoders do not mind."""
    from mmcv.transforms import LoadImageFromFile

    folder = make_pictures(tmp_path / 'pictures', 3)
    whole = (folder / '0.jpg').read_bytes()
    (folder / '1.jpg').write_bytes(whole + bytes(10_000))
    assert whole.endswith(b'\xff\xd9')
    before = LoadImageFromFile.__call__
    check_images()
    try:
        loaded = [LoadImageFromFile()(dict(img_path=str(folder / f'{i}.jpg')))['img'] for i in (0, 1)]
        assert (loaded[0] == loaded[1]).all()
        assert LoadImageFromFile()(dict(img_path=str(folder / '2.jpg'))) is not None
    finally:
        LoadImageFromFile.__call__ = before
    assert [read_header(folder / f'{i}.jpg').problem for i in (0, 1)] == ['', ''], 'as the check before training'


class ElsewhereBackend(LocalBackend):
    """A backend that maps the paths of annotations to those of files, as those of clusters do."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def get(self, filepath):
        return super().get(Path(self.folder, Path(filepath).name))


def test_images_that_a_backend_has_elsewhere(tmp_path):
    """Their paths name no files here, so only what the backend returns is judged."""
    from mmcv.transforms import LoadImageFromFile

    register_backend('elsewhere', ElsewhereBackend, force=True)
    folder = make_pictures(tmp_path / 'pictures', 1)
    before = LoadImageFromFile.__call__
    check_images()
    try:
        transform = LoadImageFromFile(backend_args=dict(backend='elsewhere', folder=str(folder)))
        assert transform(dict(img_path='cluster:mine/0.jpg'))['img'].any()
    finally:
        LoadImageFromFile.__call__ = before


# Workers, memory ---------------------------------------------------------------------------------------------------


@HOOKS.register_module()
class KillsWorkers(Hook):
    """Kills a process of the loader, as the system does when the memory is full."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 4:
            children = Path(f'/proc/self/task/{os.getpid()}/children').read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            time.sleep(0.2)


def test_a_worker_that_is_killed(pictures, tmp_path):
    made = config(pictures, tmp_path / 'work', train_dataloader__num_workers=1, train_cfg__max_epochs=9)
    made['custom_hooks'].append(dict(type='KillsWorkers'))
    made['train_dataloader']['persistent_workers'] = True
    run = finished(made)
    (error,) = errors(run.text)
    # On a busy machine the loader can miss its worker before it hears of the signal.
    assert re.search("A process that loads data (was ended by the signal 'Killed'|ended unexpectedly)", error)
    assert run.status == [2] and re.search(r'[Ll]ower train_dataloader\.num_workers .*\(now 1\)', error)
    assert f'The last good checkpoint is {tmp_path}/work/epoch_1.pth; go on from it with: python ' in error


@HOOKS.register_module()
class Greedy(Hook):
    """Allocates more than the machine has."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 5:
            torch.empty(2**50, dtype=torch.uint8)


def test_out_of_memory(pictures, tmp_path):
    """What to lower, with the figures of this run, which keep the number of images of a step."""
    made = config(pictures, tmp_path / 'work')
    made['custom_hooks'].append(dict(type='Greedy'))
    run = finished(made)
    (error,) = errors(run.text)
    assert run.status == [2] and 'a batch of 2 images do not fit into the memory of this machine' in error
    assert 'train_dataloader.batch_size=1 optim_wrapper.accumulative_counts=2' in error and 'with_cp=True' in error
    assert 'epoch_1.pth; go on from it with: ' in error


def test_other_errors_keep_their_traceback(make_runner):
    """A bug is not made a line that hides it."""
    from toy_runs import mona_swin

    runner = make_runner(mona_swin())
    with pytest.raises(RuntimeError, match='size mismatch'), explained(runner):
        raise RuntimeError('size mismatch')
    with pytest.raises(OutOfMemoryError, match='lacks 20.00 MiB'), explained(runner):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...')
    with pytest.raises(UserError, match='Shared memory is too small'), explained(runner):
        raise RuntimeError('DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that ...')
    worker = (
        'Caught FileNotFoundError in DataLoader worker process 0.\nOriginal Traceback:\n  x\nFileNotFoundError: no a'
    )
    assert in_one_line(FileNotFoundError(worker)) == 'no a'


# Disks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip('only the administrator can mount a small disk')
    yield folder
    subprocess.run(['umount', '-l', str(folder)], check=True)


@HOOKS.register_module()
class FillsDisk(Hook):
    """Leaves no room on a disk."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def after_train_epoch(self, runner):
        if runner.epoch == 1:
            try:
                Path(self.folder, 'filler').write_bytes(bytes(4 << 20))
            except OSError:
                assert os.statvfs(self.folder).f_bavail == 0


def test_a_disk_that_fills(small_disk, pictures, tmp_path):
    """One line, the checkpoint before stays whole, and with room again the run goes on from it."""
    made = config(pictures, small_disk / 'work', model__seen=None)
    made['custom_hooks'].insert(0, dict(type='FillsDisk', folder=str(small_disk)))
    shutil.copytree(pictures, small_disk / 'pictures')
    made_file_beside = tmp_path / 'beside'
    made_file_beside.mkdir()
    run = start(made, '--work-dir', str(small_disk / 'work'), beside=made_file_beside)
    run.wait()
    (error,) = errors(run.text)
    assert run.status == [2] and 'Training ended because the disk is full' in error, run.text[-3000:]
    assert f'The last good checkpoint is {small_disk}/work/epoch_1.pth; go on from it with: ' in error
    assert not list((small_disk / 'work').glob('*.partial')) and iterations(small_disk / 'work') == 4
    (small_disk / 'filler').unlink()
    made['custom_hooks'].pop(0)
    run = start(made, '--resume', beside=made_file_beside)
    assert run.wait() == 0 and iterations(small_disk / 'work') == 8


def test_a_limit_on_the_size_of_files(pictures, tmp_path):
    """A quota of files' sizes fails a write as a full disk does."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    made = config(pictures, tmp_path / 'work')
    made['log_level'] = 'WARNING'  # whose file is below the limit
    run = finished(made, before=limit)
    errors_of_logging = run.text.count('--- Logging error ---')
    assert run.status == [2] and run.lines[-1].startswith('error: Training ended because a limit on the size of files')
    assert 'while ' in run.lines[-1] and '.pth was written' in run.lines[-1] and errors_of_logging == 0
    assert not list((tmp_path / 'work').glob('*.pth*'))


# Work dirs ---------------------------------------------------------------------------------------------------------


def test_a_work_dir_that_another_run_uses(pictures, tmp_path):
    """The second run is refused and named the first; the first is killed, and its lock does not hold another one up."""
    work = tmp_path / 'work'
    made = config(pictures, work, model__delay=0.1, train_cfg__max_epochs=50, train_dataloader__num_workers=1)
    first = start(made)
    first.wait_for(lambda: Path(f'{work}.seen').exists())
    second = finished(made)
    (error,) = errors(second.text)
    assert second.status == [2] and f'Another run uses this work dir (process {first.pids[0]} on ' in error
    assert socket.gethostname() in error and '--work-dir' in error
    assert first.processes[0].is_alive() and len(list(work.glob('2*'))) == 1, 'the second one has written nothing'
    os.kill(first.pids[0], signal.SIGKILL)
    first.processes[0].join()
    assert (work / locks.NAME).exists()
    made['model']['delay'], made['train_cfg']['max_epochs'] = 0, 1
    assert finished(made).status == [0] and not (work / locks.NAME).exists()


def hold(folder: str) -> None:
    """Each of the processes of a run enters the lock of their work dir, twice."""
    torch.distributed.init_process_group('gloo')
    for _ in range(2):
        with lock_work_dir(folder):
            assert Path(folder, locks.NAME).exists()
            torch.distributed.barrier()
        torch.distributed.barrier()
        assert not Path(folder, locks.NAME).exists()
        torch.distributed.barrier()


def test_the_processes_of_a_run_share_its_work_dir(tmp_path):
    in_processes(2, tmp_path, hold, str(tmp_path / 'work'))


@pytest.fixture
def left(tmp_path):
    """Write the lock of a process that is gone."""

    def write(**changes) -> Path:
        owner = dict(host=socket.gethostname(), pid=1, started=5, since='2026-01-01 00:00:00', command='x') | changes
        (tmp_path / locks.NAME).write_text(json.dumps(owner))
        return tmp_path / locks.NAME

    return write


def test_stale_locks_are_recognised(left, tmp_path, monkeypatch):
    """Of a process that is gone, whose number another one has; of one that wrote half; of another machine, silent."""
    for file in (left(pid=2**22 + 1), left()):
        with WorkDirLock(str(tmp_path)):
            assert json.loads(file.read_text())['pid'] == os.getpid()
        assert not file.exists()
    (tmp_path / locks.NAME).write_text('{"host": "a')
    with WorkDirLock(str(tmp_path)):
        pass
    monkeypatch.setattr(locks, '_SILENCE', 0.5)
    left(host='elsewhere')
    with WorkDirLock(str(tmp_path)):
        pass


def test_locks_where_the_system_has_none(left, tmp_path, monkeypatch):
    """The owner in the file counts: a process that lives, and one of another machine that touches the file."""

    def no_locks(*arguments):
        raise OSError(37, 'No locks available')

    monkeypatch.setattr(locks.fcntl, 'lockf', no_locks)
    parent = os.getppid()
    left(pid=parent, started=locks._started(parent))
    with pytest.raises(WorkDirError, match=rf'Another run uses this work dir \(process {parent} on .*delete'):
        WorkDirLock(str(tmp_path))
    left(pid=parent, started=locks._started(parent) + 1)
    WorkDirLock(str(tmp_path)).release()
    file = left(host='elsewhere')
    monkeypatch.setattr(locks, '_SILENCE', 30)
    process = subprocess.Popen(['sh', '-c', f'sleep 1; touch {file}'])
    with pytest.raises(WorkDirError, match='process 1 on elsewhere, since 2026-01-01 00:00:00'):
        WorkDirLock(str(tmp_path))
    process.wait()


def test_a_work_dir_that_cannot_be_used(pictures, tmp_path, small_disk):
    """A file, a folder in a file, a read-only disk: one line, before anything is built."""
    (tmp_path / 'file').write_text('')
    for place, reason in (('file', 'File exists'), ('file/inner', 'Not a directory')):
        made = config(pictures, tmp_path / 'plain')
        run = finished(made, '--work-dir', str(tmp_path / place))
        (error,) = errors(run.text)
        assert run.status == [2] and f'The work dir {tmp_path}/{place} cannot be used: {reason}' in error
    subprocess.run(['mount', '-o', 'remount,ro', str(small_disk)], check=True)
    with pytest.raises(WorkDirError, match='cannot be used: Read-only file system. Name another one with --work-dir'):
        WorkDirLock(str(small_disk / 'work'))


@HOOKS.register_module()
class DeletesWorkDir(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 5:
            shutil.rmtree(runner.work_dir)


@pytest.mark.parametrize('counts', ['epochs', pytest.param('iterations', marks=pytest.mark.slow)])
def test_a_work_dir_that_is_deleted_is_written_anew(counts, pictures, tmp_path):
    """With its checkpoint, its delta and the rest of its log."""
    changes = {} if counts == 'epochs' else by_iterations(8, every=4)
    made = config(pictures, tmp_path / 'work', **changes)
    made['custom_hooks'].append(dict(type='DeletesWorkDir'))
    run = finished(made)
    assert run.status == [0], run.text[-3000:]
    name = 'epoch_2' if counts == 'epochs' else 'iter_8'
    work = tmp_path / 'work'
    assert {file.name for file in work.glob(f'{name}.*')} == {f'{name}.pth', f'{name}.delta.safetensors'}
    assert iterations(work) == 8 and len(logged(work)) == 3


# Clocks ------------------------------------------------------------------------------------------------------------


@HOOKS.register_module()
class SetsClock(Hook):
    """Sets the clock that Python shows."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 3:
            real = time.time
            time.time = lambda: real() + self.seconds


@pytest.mark.parametrize('seconds', [-86_400, pytest.param(86_400, marks=pytest.mark.slow)])
def test_a_clock_that_jumps(seconds, pictures, tmp_path):
    """The log has the real times, and one line on the jump."""
    made = config(pictures, tmp_path / 'work')
    made['custom_hooks'].append(dict(type='SetsClock', seconds=seconds, priority='HIGHEST'))
    run = finished(made)
    assert run.status == [0] and run.text.count('The clock of this machine was set') == 1
    assert f'was set {"back" if seconds < 0 else "forward"} by 86400 s' in run.text and 'day' not in run.text
    for key in ('time', 'data_time'):
        assert all(0 <= value < 60 for value in logged(tmp_path / 'work', key))


# The tools ---------------------------------------------------------------------------------------------------------


def test_errors_of_the_system_are_one_line(tool, monkeypatch):
    """In any tool, unless --traceback asks for the whole."""

    def broken(*arguments):
        raise PermissionError(13, 'Permission denied', '/some/file')

    monkeypatch.setattr('mona_mm.config.load.Config.fromfile', broken)
    config_file = 'configs/demo/demo_mona_shapes.py'
    status, _, err = tool('count_params.py', config_file)
    assert status == 2 and err == "error: [Errno 13] Permission denied: '/some/file'\n"
    with pytest.raises(PermissionError):
        tool('count_params.py', config_file, '--traceback')
    monkeypatch.setattr('mona_mm.config.load.Config.fromfile', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert tool('count_params.py', config_file)[::2] == (130, 'error: interrupted\n')
