"""A loss that is not finite stops a run or is left out, and nothing that is not finite is written over what is good."""

import math

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from small_runs import config, errors, finished, iterations, logged, make_pictures, trained

from mona_mm.errors import DivergedError
from mona_mm.hooks import FiniteLossHook
from mona_mm.hooks.stop_messages import image_names, resume_command


@pytest.fixture
def pictures(tmp_path):
    return make_pictures(tmp_path / 'pictures', 8, black=(5,))


@pytest.fixture
def orderly(pictures, tmp_path):
    """Pictures in their order: the black one, 5, is in the third iteration of every epoch."""
    made = config(pictures, tmp_path / 'work', train_dataloader__sampler=dict(type='DefaultSampler', shuffle=False))
    return made


def test_it_stops_and_says_where(orderly, tmp_path):
    """The iteration, the term, the images, the status; the run before it stays as it was."""
    whole = make_pictures(tmp_path / 'whole')
    orderly['train_dataloader']['dataset']['data_root'] = str(whole)
    assert finished(orderly).status == [0]
    before = {file.name: file.read_bytes() for file in (tmp_path / 'work').glob('*.*') if file.is_file()}
    orderly['train_dataloader']['dataset']['data_root'] = str(tmp_path / 'pictures')
    orderly['train_cfg']['max_epochs'] = 4
    run = finished(orderly, '--resume')
    assert run.status == [2]
    (error,) = errors(run.text)
    assert 'The loss of iteration 11 is not finite: loss=inf, loss_dark=inf.' in error
    assert all(str(tmp_path / 'pictures' / f'{i}.jpg') in error for i in (4, 5)) and '3.jpg' not in error
    assert f'The last good checkpoint is {tmp_path / "work" / "epoch_2.pth"}; go on from it with: python ' in error
    assert error.endswith(' --resume') and error.count('--resume') == 1
    after = {name: (tmp_path / 'work' / name).read_bytes() for name in before if not name.endswith('.py')}
    assert after == {name: content for name, content in before.items() if name in after}
    assert iterations(tmp_path / 'work') == 8


@pytest.mark.parametrize('processes', [1, 2])
def test_it_is_left_out_and_counted(processes, orderly, tmp_path):
    """One bad picture in an epoch of four iterations: as if it had not been there, in every process; with two, the
    process without the picture leaves its batch out as well, and both go on with the same weights."""
    orderly['default_hooks']['logger']['interval'] = 1
    run = finished(orderly, '--skip-nonfinite', count=processes)
    assert run.status == [0] * processes, run.text[-3000:]
    assert 'loss=inf' in run.text and str(tmp_path / 'pictures/5.jpg') in run.text
    assert '2 iterations were left out' in run.text and '2 so far' in run.text
    assert all(torch.isfinite(tensor).all() for tensor in trained(tmp_path / 'work').values())
    assert len(logged(tmp_path / 'work')) == 8 // processes
    assert all(math.isfinite(loss) for loss in logged(tmp_path / 'work'))
    if processes == 1:  # the weights are those of a run without the iteration
        names = [f'{i}.jpg' for i in (0, 1, 2, 3, 6, 7)]
        (tmp_path / 'pictures/images.txt').write_text('\n'.join(names))
        orderly['work_dir'] = str(tmp_path / 'without')
        finished(orderly)
        ours, theirs = trained(tmp_path / 'work'), trained(tmp_path / 'without')
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_accumulated_gradients_keep_their_other_parts(orderly, tmp_path):
    """Of four iterations two each make a step. The third is left out, so the fourth and the next epoch's first do."""
    orderly['optim_wrapper']['accumulative_counts'] = 2
    run = finished(orderly, '--skip-nonfinite')
    assert run.status == [0] and '2 iterations were left out' in run.text
    names = [f'{i}.jpg' for i in (0, 1, 2, 3, 6, 7)]
    (tmp_path / 'pictures/images.txt').write_text('\n'.join(names))
    orderly['work_dir'] = str(tmp_path / 'without')
    finished(orderly)
    ours, theirs = trained(tmp_path / 'work'), trained(tmp_path / 'without')
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_run_that_leaves_everything_out_stops(tmp_path):
    made = config(make_pictures(tmp_path / 'pictures', 8, black=range(8)), tmp_path / 'work')
    made['custom_hooks'].append(dict(type='mona_mm.FiniteLossHook', most=3))
    run = finished(made, '--skip-nonfinite')
    (error,) = errors(run.text)
    assert run.status == [2] and 'The losses of 3 iterations in a row, up to 3, are not finite' in error
    assert 'No checkpoint had been written yet.' in error


@HOOKS.register_module()
class SpoilsWeights(Hook):
    """After an iteration, something of the run is no longer finite, although its loss was."""

    def __init__(self, what: str, iteration: int) -> None:
        self.what, self.iteration = what, iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iteration:
            (weight,) = [p for name, p in runner.model.named_parameters() if p.requires_grad and p.ndim == 2]
            optimizer = runner.optim_wrapper.optimizer
            (weight.data if self.what == 'weight' else optimizer.state[weight]['exp_avg'])[3, 2] = float('nan')


@pytest.mark.parametrize('what', ['weight', pytest.param('moment', marks=pytest.mark.slow)])
def test_a_checkpoint_that_is_not_finite_is_not_written(what, tmp_path):
    """In the last iteration of an epoch a weight, or a moment of the optimizer, becomes NaN: the loss was fine."""
    made = config(make_pictures(tmp_path / 'pictures'), tmp_path / 'work')
    made['custom_hooks'].insert(0, dict(type='SpoilsWeights', what=what, iteration=8))
    run = finished(made)
    (error,) = errors(run.text)
    assert run.status == [2] and 'No checkpoint is written' in error and 'backbone.2.weight' in error
    assert ('exp_avg of ' in error) == (what == 'moment')
    assert {file.name for file in (tmp_path / 'work').glob('*.pth')} == {'epoch_1.pth'}
    assert iterations(tmp_path / 'work') == 4


def test_what_was_not_finite_from_the_beginning_is_saved(make_runner):
    """A mask of infinities is a buffer of some models."""
    from toy_runs import mona_swin

    runner = make_runner(mona_swin(), [dict(type='mona_mm.FiniteLossHook')])
    runner.model.register_buffer('mask', torch.full((2, 2), -math.inf))
    runner.train()
    runner.model.register_buffer('other', torch.full((2, 2), math.nan))
    hook = next(hook for hook in runner.hooks if isinstance(hook, FiniteLossHook))
    with pytest.raises(DivergedError, match='first other'):
        hook.before_save_checkpoint(runner, {})


def test_names_of_images():
    """In batches of every form that the libraries' loaders make, nested ones of several branches included."""
    from mmengine.structures import BaseDataElement

    samples = [BaseDataElement(metainfo=dict(img_path=f'{i}.jpg')) for i in range(3)]
    assert image_names(dict(inputs=torch.ones(3), data_samples=samples)) == '0.jpg, 1.jpg, 2.jpg'
    assert image_names(dict(data_samples=dict(teacher=samples[:1], student=samples[1:2]))) == '0.jpg, 1.jpg'
    assert image_names([dict(img_metas=[dict(filename='a.png')])]) == 'a.png'
    assert image_names(torch.ones(3)) == ''
    many = [BaseDataElement(metainfo=dict(img_path=f'{i}.jpg')) for i in range(30)]
    assert image_names(dict(data_samples=many)).endswith('15.jpg and 14 more')


def test_the_command_to_go_on(monkeypatch):
    """It is the command of this run, without what starts one, with --resume once."""

    def said(*arguments, **variables):
        for name in ('TORCHELASTIC_RUN_ID', 'LOCAL_WORLD_SIZE', 'GROUP_WORLD_SIZE'):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr('sys.argv', ['tools/train.py', *arguments])
        return resume_command()

    assert said('c.py') == 'python tools/train.py c.py --resume'
    assert said('c.py', '--resume', 'x.pth', '--amp') == 'python tools/train.py c.py --amp --resume'
    assert said('c.py', '--resume', '--amp') == 'python tools/train.py c.py --amp --resume'
    assert said('--fine-tune', 'x.pth', 'c.py') == 'python tools/train.py c.py --resume'
    assert said('c.py', '--fine-tune=x.pth', '--resume=y') == 'python tools/train.py c.py --resume'
    assert said('c.py', '--cfg-options', 'a=b c') == "python tools/train.py c.py --cfg-options 'a=b c' --resume"
    assert (
        said('c.py', '--local-rank=1', '--launcher', 'pytorch', TORCHELASTIC_RUN_ID='1', LOCAL_WORLD_SIZE='4')
        == 'torchrun --nproc_per_node=4 tools/train.py c.py --launcher pytorch --resume'
    )
    monkeypatch.setattr('sys.argv', ['my_script.py'])
    assert resume_command() is None
