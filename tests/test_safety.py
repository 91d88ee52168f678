"""Nothing in a file is executed, nothing broken is loaded, and nothing good is lost."""

import functools
import http.server
import multiprocessing
import os
import pickle
import random
import resource
import signal
import struct
import threading
import traceback
from pathlib import Path

import attack
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import HOSTS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import CheckpointLoader, load_checkpoint
from small_models import METHODS, build, small_config, trained
from suite import plan_for

from mona_mm import FrozenModel, PeftBackbone, load_delta, save_delta
from mona_mm.checkpoint.delta import apply_delta
from mona_mm.checkpoint.delta_file import read_delta
from mona_mm.checkpoint.pretrained import download_place, read_checkpoint
from mona_mm.commands.cli import build_runner
from mona_mm.config.load import find_last_checkpoint, resume_from
from mona_mm.errors import CheckpointMismatchError, MissingFileError, PlanError, UserError
from mona_mm.spt import Plan
from mona_mm.spt.published import _read

DEMO = 'configs/demo/demo_mona_shapes.py'


class Attack:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.fixture
def attacks(tmp_path):
    """Malicious files of every kind, by suffix, and the proof that they would work."""
    attack = Attack(tmp_path / 'executed')
    files = {name: str(tmp_path / f'attack{name}') for name in ('.pth', '.raw.pth', '.delta.safetensors', '.npz')}
    torch.save({'state_dict': {'a': torch.ones(1)}, 'meta': attack}, files['.pth'])
    for name in ('.raw.pth', '.delta.safetensors'):
        Path(files[name]).write_bytes(pickle.dumps(attack))
    np.savez(files['.npz'], cls=np.array([attack], dtype=object))
    pickle.loads(pickle.dumps(attack))
    os.rmdir(attack.target)
    yield files
    assert not Path(attack.target).exists(), 'the pickle was executed'


def test_no_pickle_is_executed_by_the_package(attacks, base_file):
    """Every function that reads a file, and what mmengine's own loading becomes with the package."""
    model = build(base_file, METHODS['mona'])
    for file in attacks.values():
        for read in (read_checkpoint, read_delta, lambda f: load_delta(model, f), lambda f: load_checkpoint(model, f)):
            with pytest.raises(CheckpointMismatchError, match='cannot be read as a'):
                read(file)
        base = dict(HOSTS['mmdet-swin'], init_cfg=dict(type='Pretrained', checkpoint=file))
        with pytest.raises(CheckpointMismatchError, match='cannot be read as a'):
            PeftBackbone(base=base).init_weights()


@pytest.mark.parametrize('kind', ['.pth', '.raw.pth', '.delta.safetensors'])
def test_no_pickle_is_executed_by_the_tools(kind, attacks, tmp_path, tool, demo_data):
    """Every argument of every tool that is a file of weights: one line, status 2; the opt-in is one tool's alone."""
    file, out = attacks[kind], str(tmp_path / 'out.pth')
    data = ['--cfg-options', f'data_root={demo_data}']
    work = ['--work-dir', str(tmp_path / 'work')]
    commands = [
        ['train.py', DEMO, '--resume', file, *work, *data],
        ['train.py', DEMO, *work, *data, f'load_from={file}'],
        ['train.py', DEMO, *work, *data, f'model.backbone.base.init_cfg.checkpoint={file}',
         'model.backbone.base.init_cfg.type=Pretrained'],
        ['test.py', DEMO, file, *work, *data],
        ['delta.py', 'info', file],
        ['delta.py', 'extract', DEMO, file, str(tmp_path / 'out.delta.safetensors')],
        ['delta.py', 'merge', DEMO, file, out],
        ['delta.py', 'diff', file, file],
        ['convert_checkpoint.py', file, out],
        ['convert_checkpoint.py', file, out, '--config', DEMO],
    ]  # fmt: skip
    if kind != '.pth':  # what reads a file tells the kinds apart, and each command has its way to it
        commands = [command for command in commands if command[0] != 'train.py']
    for command in commands:
        status, _, err = tool(*command)
        last = err.rstrip().splitlines()[-1]
        assert status == 2 and last.startswith('error: '), (command, err[-500:])
        refused = 'cannot be read as a' in last or (command[0].startswith('convert') and 'is a delta' in last)
        assert refused and 'Traceback' not in err, command


def test_no_pickle_is_executed_by_the_apis(attacks, served, detector_config):
    """mmdet's init_detector and inferencer, of a file and of an address, in a process that has imported the package."""
    from mmdet.apis import DetInferencer, init_detector

    for file in (*attacks.values(), f'{served}/attack.pth', f'{served}/attack.npz'):
        for load in (init_detector, DetInferencer):
            with pytest.raises(CheckpointMismatchError, match='cannot be read as a'):
                load(detector_config.copy(), file, device='cpu')


@pytest.fixture
def served(attacks, monkeypatch, tmp_path):
    """The address of a server that has the malicious files, on this machine, and an empty cache of downloads."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    for name in ('http_proxy', 'HTTP_PROXY'):
        monkeypatch.delenv(name, raising=False)
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_no_pickle_behind_an_address_is_executed(served, base_file, monkeypatch):
    """mmengine downloads through torch.hub, which executes pickles: not with the package, for any scheme (one that was
    registered since, too), in whatever loads; what is not there is said to be missing; an honest file of any format
    loads."""
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False)  # the command lines set it
    monkeypatch.setattr('mmengine.runner.checkpoint.get_torchvision_models', lambda: {'a': f'{served}/attack.pth'})
    monkeypatch.setattr('mmengine.runner.checkpoint.get_external_models', lambda: {'a': f'{served}/attack.raw.pth'})
    model, file = build(base_file, METHODS['mona']), Path(torch.hub.get_dir()).parent / 'attack.raw.pth'
    CheckpointLoader.register_scheme('mine://', lambda name, map_location: torch.load(file, weights_only=False))
    names = ('.pth', '.raw.pth', '.npz', '.delta.safetensors')
    for address in (*(f'{served}/attack{name}' for name in names), 'torchvision://a', 'openmmlab://a', 'mine://a'):
        pretrained = dict(type='Pretrained', checkpoint=address)
        base = dict(HOSTS['mmdet-swin'], init_cfg=pretrained)
        for load in (
            lambda: load_checkpoint(model, address),  # noqa: B023
            lambda: read_checkpoint(address),  # noqa: B023
            build(base_file, METHODS['mona'], init_cfg=pretrained).init_weights,
            PeftBackbone(base=base).init_weights,
            FrozenModel(base=dict(type='mmdet.FPN', in_channels=[8], out_channels=8, num_outs=1, init_cfg=pretrained),
                        trainable='none').init_weights,
        ):  # fmt: skip
            with pytest.raises(CheckpointMismatchError, match='cannot be read as a'):
                load()
    del CheckpointLoader._schemes['mine://']
    with pytest.raises(MissingFileError, match='Cannot download .*/nothing.pth .*404'):
        load_checkpoint(model, f'{served}/nothing.pth')
    trained_model = trained(base_file, METHODS['mona'])
    state = trained_model.state_dict()
    torch.save(state, file.with_name('good.pth'))
    safetensors.torch.save_file(state, file.with_name('good.safetensors'))
    np.savez(file.with_name('good.npz'), **{name: tensor.numpy() for name, tensor in state.items()})
    save_delta(trained_model, file.with_name('good.delta.safetensors'))
    for name in ('good.pth', 'good.safetensors?download=true', 'good.npz', 'good.delta.safetensors'):
        model = build(base_file, METHODS['mona'])
        load_checkpoint(model, f'{served}/{name}')
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert os.environ.get('TORCH_FORCE_WEIGHTS_ONLY_LOAD') is None


def test_downloads(served, base_file, monkeypatch):
    """Deltas of one name from two addresses are two files; one at an address may be the base of another. Other
    processes wait for the main one, and fetch for themselves what its machine has and theirs has not. A damaged
    download is named with its place, and once that is gone it is fetched again."""
    folder = Path(torch.hub.get_dir()).parent
    models = [trained(base_file, METHODS['mona']) for _ in range(2)]
    with torch.no_grad():
        models[1].head[0].weight.add_(1)
    for name, model in zip('ab', models, strict=True):
        (folder / name).mkdir()
        save_delta(model, folder / name / 'epoch_1.delta.safetensors')
    addresses = [f'{served}/{name}/epoch_1.delta.safetensors' for name in 'ab']
    for address, source in zip(addresses, models, strict=True):
        model = build(base_file, METHODS['mona'])
        load_checkpoint(model, address)
        assert torch.equal(model.head[0].weight, source.head[0].weight)

    model = build(base_file, METHODS['mona'])
    apply_delta(model, read_delta(folder / 'b/epoch_1.delta.safetensors'), base_file=addresses[0])
    assert torch.equal(model.head[0].weight, models[1].head[0].weight)

    safetensors.torch.save_file(dict(a=torch.ones(1)), folder / 'a.safetensors')
    place = Path(download_place(f'{served}/a.safetensors'))
    for main in (True, False):
        there = []
        monkeypatch.setattr('mona_mm.checkpoint.loading.is_main_process', lambda: main)  # noqa: B023
        monkeypatch.setattr('mona_mm.checkpoint.loading.barrier', lambda: there.append(place.is_file()))  # noqa: B023
        assert read_checkpoint(f'{served}/a.safetensors').keys() == {'a'}
        assert there == [main]
        place.write_bytes(b'cut short')
        with pytest.raises(CheckpointMismatchError, match=f'{place}.*download it again'):
            read_checkpoint(f'{served}/a.safetensors')
        place.unlink()
        with pytest.raises(MissingFileError, match='404'):
            read_checkpoint(f'{served}/nothing.safetensors')
        assert len(there) == 3
    with pytest.raises(MissingFileError, match=f'put it at {download_place(served + "/no.pth?a=b")},'):
        read_checkpoint(f'{served}/no.pth?a=b')
    assert download_place(f'{served}/no.pth?a=b') == f'{torch.hub.get_dir()}/checkpoints/no.pth'


@pytest.mark.parametrize('count', [100, pytest.param(400, marks=pytest.mark.slow)])
def test_damaged_checkpoints(count, tmp_path):
    """Whatever a damage makes of torch's old format or a compressed .npz, the error is the package's own; so it is of
    a plan of the published code, and of a file that holds no names."""
    tensors = {f'layer.{i}.weight': torch.arange(40.0) + i for i in range(4)}
    torch.save({'state_dict': tensors, 'meta': {'epoch': 1}}, tmp_path / 'a.pth', _use_new_zipfile_serialization=False)
    np.savez_compressed(tmp_path / 'a.npz', **{name: t.numpy() for name, t in tensors.items()})
    rng, kinds = random.Random(1), set()
    for name in ('a.pth', 'a.npz'):
        data, bad = (tmp_path / name).read_bytes(), tmp_path / f'bad.{name}'
        for _ in range(count):
            damaged = bytearray(data)
            for _ in range(rng.randrange(1, 4)):
                damaged[rng.randrange(len(data))] = rng.randrange(256)
            bad.write_bytes(damaged if rng.random() < 0.8 else damaged[: rng.randrange(len(data))])
            try:
                read_checkpoint(str(bad))
            except CheckpointMismatchError as error:
                kinds.add(type(error.__cause__).__name__)
                assert 'bad.a' in str(error)
            if name == 'a.pth':
                with pytest.raises(PlanError):
                    _read(bad)
    assert len(kinds) > 5, kinds
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(CheckpointMismatchError, match='holds a list and not tensors by name'):
        read_checkpoint(str(tmp_path / 'list.pth'))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float8_e4m3fn])
def test_a_plan_of_types_that_numpy_lacks(dtype, tmp_path):
    """It is refused as any other damaged plan."""
    safetensors.torch.save_file({'weights/a': torch.ones(3).to(dtype)}, tmp_path / 'a.safetensors', dict(format='x'))
    with pytest.raises(PlanError, match=r'a\.safetensors'):
        Plan.load(tmp_path / 'a.safetensors')


def test_the_opt_in(tmp_path, tool):
    """--trust-pickle reads what weights-only loading refuses, and what it writes needs no trust."""
    state = {f'layers.{i}.ln1.weight': torch.ones(3) for i in range(2)}
    torch.save({'state_dict': state, 'args': Config(dict(a=1))}, tmp_path / 'a.pth')
    status, _, err = tool('convert_checkpoint.py', str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth'))
    assert status == 2 and '--trust-pickle' in err
    assert tool('convert_checkpoint.py', str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth'), '--trust-pickle')[0] == 0
    assert read_checkpoint(str(tmp_path / 'b.pth'))['state_dict'].keys() == state.keys()


def corrupted(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One random damage: cut, bytes flipped, changed or doubled, or the header of one file on the data of another."""
    kind = rng.randrange(6)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:  # the length of the header
        return struct.pack('<Q', rng.choice([0, 1, 2**63, len(data), rng.randrange(2**20)])) + data[8:]
    if kind == 2:
        mine, its = (8 + struct.unpack('<Q', d[:8])[0] for d in (data, other))
        return other[:its] + data[mine:]
    if kind == 3:
        at = rng.randrange(len(data))
        return data[:at] + data[at : at + rng.randrange(1, 99)] + data[at:]
    damaged = bytearray(data)
    # half of the flips where the header is, which is a small part of the file
    end = 8 + struct.unpack('<Q', data[:8])[0] if kind == 4 else len(data)
    for _ in range(rng.randrange(1, 4)):
        damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


MANY = pytest.mark.parametrize('count', [300, pytest.param(2000, marks=pytest.mark.slow)])


@MANY
def test_many_corruptions(count, base_file, tmp_path):
    """Each is refused with the error that says so, and the model is what it was."""
    model = build(base_file, METHODS['lora'])
    model.init_weights()
    files = [tmp_path / f'{i}.delta.safetensors' for i in range(2)]
    for i, file in enumerate(files):
        save_delta(trained(base_file, METHODS['lora'], **dict(classes=5) if i == 0 else {}), file, metrics=dict(a=i))
    with torch.no_grad():
        model.head[0].weight.add_(1)
    save_delta(model, files[1])
    data, other = (file.read_bytes() for file in files)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng, bad, harmless = random.Random(0), tmp_path / 'bad.delta.safetensors', 0
    for _ in range(count):
        damaged = corrupted(data, other, rng)
        if damaged == data:
            harmless += 1
            continue
        bad.write_bytes(damaged)
        with pytest.raises(CheckpointMismatchError, match='cannot be read as a delta'):
            load_delta(model, bad)
    assert harmless < 20
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    load_delta(model, files[0])


@MANY
def test_many_corruptions_of_a_plan(count, tmp_path):
    """Each is refused with the error that says so: the checksum is over indices, sites and counts alike."""
    hosts = HOSTS['mmpretrain-vit'], HOSTS['mmdet-swin']
    files = [tmp_path / f'{i}.safetensors' for i in range(2)]
    for host, file in zip(hosts, files, strict=True):
        plan_for(host, dict(type='LoRA', rank=2)).save(file)
    data, other = (file.read_bytes() for file in files)
    rng, bad, harmless = random.Random(0), tmp_path / 'bad.safetensors', 0
    for _ in range(count):
        damaged = corrupted(data, other, rng)
        if damaged == data:
            harmless += 1
            continue
        bad.write_bytes(damaged)
        with pytest.raises(PlanError, match=r'bad\.safetensors'):
            Plan.load(bad)
    assert harmless < 20
    Plan.load(files[0])


def test_a_crafted_header_is_refused(base_file, tmp_path):
    """Headers with a right digest but wrong contents: JSON that nests without end, that unpacks without end, fields of
    other types, tensors that do not lie where they should."""
    save_delta(trained(base_file, METHODS['lora']), tmp_path / 'a.delta.safetensors')
    header, said, body = attack.taken_apart((tmp_path / 'a.delta.safetensors').read_bytes())

    def write(fields: dict, texts: dict | None = None, **changes) -> Path:
        content = attack.forged({**header, **changes}, {**said, **fields}, body, **(texts or {}))
        (tmp_path / 'bad.delta.safetensors').write_bytes(content)
        return tmp_path / 'bad.delta.safetensors'

    read_delta(write({}))  # so built, a right one is read
    first = next(name for name in header if name != '__metadata__')
    for fields, texts, changes in [
        ({}, dict(metrics='[' * 10**6), {}),
        ({}, dict(metrics='{"a": "' + ' ' * 10**8 + '"}'), {}),
        (dict(methods=[]), {}, {}),
        (dict(more=1), {}, {}),
        ({}, {}, {first: {**header[first], 'shape': [1, 2]}}),
        ({}, {}, {first: {**header[first], 'data_offsets': [0, 2**62]}}),
    ]:
        with pytest.raises(CheckpointMismatchError, match='cannot be read as a delta'):
            read_delta(write(fields, texts, **changes))
    model = build(base_file, METHODS['lora'])
    for change in (dict(base={}), dict(base=dict(said['base'], short='~~~', all='')), dict(methods={'x': 3})):
        with pytest.raises(CheckpointMismatchError):
            load_delta(model, write(change))


ITERATIONS = 40


def run_config(base_file, work_dir) -> Config:
    """A run that does little but write checkpoints: one an iteration, averaged weights, deltas."""
    return Config(
        dict(
            model=small_config(base_file, METHODS['mona']),
            work_dir=str(work_dir),
            train_dataloader=dict(
                batch_size=2,
                num_workers=0,
                dataset=dict(type='Images'),
                sampler=dict(type='InfiniteSampler', shuffle=True),
            ),
            train_cfg=dict(by_epoch=False, max_iters=ITERATIONS, val_interval=1000),
            optim_wrapper=dict(
                constructor='mona_mm.PeftOptimWrapperConstructor', optimizer=dict(type='AdamW', lr=1e-3)
            ),
            default_hooks=dict(
                checkpoint=dict(type='mona_mm.SafeCheckpointHook', interval=1, by_epoch=False, max_keep_ckpts=2)
            ),
            custom_hooks=[
                dict(type='mona_mm.IterationSeedHook'),
                dict(type='mona_mm.ParamFreezeHook'),
                dict(type='mona_mm.LoadCheckHook'),
                dict(type='mona_mm.DeltaCheckpointHook'),
                dict(type='EMAHook', momentum=0.1),
            ],
            experiment_name=os.urandom(4).hex(),
            log_level='ERROR',
            randomness=dict(seed=0),
        )
    )


def train_on(base_file, work_dir, hook=None) -> None:
    cfg = run_config(base_file, work_dir)
    resume_from(cfg, 'auto' if find_last_checkpoint(str(work_dir)) else None)
    runner = build_runner(cfg)
    if hook:
        runner.register_hook(hook)
    runner.train()


def in_a_child(function, *arguments) -> multiprocessing.Process:
    """Run a function in a forked process, quietly, with 0 as its exit code if it ends well."""

    def body():
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        try:
            function(*arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    process = multiprocessing.get_context('fork').Process(target=body)
    process.start()
    return process


def check_folder(work_dir: Path) -> int | None:
    """Whatever has a checkpoint's name is whole; returns the last one's iteration."""
    for file in work_dir.glob('*.pth'):
        read_checkpoint(str(file))
    for file in work_dir.glob('*.delta.safetensors'):
        read_delta(file)
    last = find_last_checkpoint(str(work_dir))
    return read_checkpoint(last)['meta']['iter'] if last else None


class Started(Hook):
    """Says that training has begun, so that a kill falls into it and not into building the model."""

    def __init__(self, event) -> None:
        self.event = event

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.event.set()


@pytest.mark.slow
def test_killed_at_fifty_moments(base_file, tmp_path):
    """SIGKILL at 50 random moments of a run that writes a checkpoint and a delta every iteration: whenever something
    has a checkpoint's name it is whole, --resume goes on from it, and the end equals an undisturbed run."""
    train_on(base_file, tmp_path / 'straight')
    work, rng, kills, reached = tmp_path / 'killed', random.Random(1), 0, []
    while kills < 50:
        event = multiprocessing.get_context('fork').Event()
        process = in_a_child(train_on, base_file, work, Started(event))
        assert event.wait(120)
        process.join(rng.uniform(0, 1))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
        iteration = check_folder(work) if work.exists() else None
        reached.append(iteration or 0)
        if iteration == ITERATIONS and kills < 50:  # it got to the end: once more, from a random earlier one
            for file in work.iterdir():
                if file.is_file():
                    file.unlink()
    assert len(set(reached)) > 5, f'the kills must hit different moments: {reached}'
    process = in_a_child(train_on, base_file, work)
    process.join()
    assert process.exitcode == 0 and check_folder(work) == ITERATIONS
    assert not list(work.glob('*.partial'))
    folders = (work, tmp_path / 'straight')
    actual, expected = (read_checkpoint(str(folder / f'iter_{ITERATIONS}.pth')) for folder in folders)
    for part in ('state_dict', 'ema_state_dict'):
        assert all(torch.equal(actual[part][name], tensor) for name, tensor in expected[part].items())
    deltas = (read_delta(folder / f'iter_{ITERATIONS}.delta.safetensors') for folder in folders)
    actual, expected = (delta.tensors for delta in deltas)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


class FullDisk(Hook):
    """From an iteration on, files can be only so long (the limit of a process, which fails a write as a full disk)."""

    def __init__(self, iteration: int, limit: int) -> None:
        self.iteration, self.limit = iteration, limit

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))


@pytest.mark.parametrize(
    'limit', [100_000, pytest.param(10_000, marks=pytest.mark.slow)], ids=['checkpoint', 'everything']
)
def test_full_disk(limit, base_file, tmp_path):
    """No room for the fourth checkpoint: training stops, the third stays, nothing half-written is left, and with room
    again --resume ends as an undisturbed run."""
    work = tmp_path / 'work'
    process = in_a_child(train_on, base_file, work, FullDisk(3, limit))
    process.join()
    assert process.exitcode == 1, 'it stops, and says so'
    assert check_folder(work) == 3
    assert not list(work.glob('*.partial'))
    assert {file.name.partition('.')[0] for file in work.glob('iter_*')} == {'iter_2', 'iter_3'}


def test_one_error_line_for_a_damaged_checkpoint(tmp_path, tool, demo_data):
    """Half a .pth ends every tool with one line."""
    (tmp_path / 'half.pth').write_bytes(b'PK\x03\x04' + bytes(1000))
    status, _, err = tool('test.py', DEMO, str(tmp_path / 'half.pth'), '--work-dir', str(tmp_path / 'w'),
                          '--cfg-options', f'data_root={demo_data}')  # fmt: skip
    assert status == 2 and 'half.pth cannot be read' in err.rstrip().splitlines()[-1]
    assert issubclass(CheckpointMismatchError, UserError)
