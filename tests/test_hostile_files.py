"""Damaged and forged files: refused with the error that says so, or as good as new. ``attack.py`` does more of it."""

import copy
import io
import pickle
import threading
import zipfile
from pathlib import Path

import attack
import numpy as np
import pytest
import torch
from conftest import HOSTS
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from mona_mm import PeftBackbone, load_delta, save_delta
from mona_mm.checkpoint import container
from mona_mm.checkpoint.delta_file import read_delta, write_delta
from mona_mm.checkpoint.pretrained import read_checkpoint
from mona_mm.compat.safe_globals import portable_names, weights_only
from mona_mm.errors import CheckpointMismatchError, PlanError
from mona_mm.hooks import SafeCheckpointHook
from mona_mm.spt import Plan
from mona_mm.spt.published import _read
from mona_mm.spt.sensitivity import KIND, Sensitivity

TENSOR = torch.ones(1)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    return attack.honest_files(tmp_path_factory.mktemp('honest'))


@pytest.mark.parametrize('kind', ['delta', 'plan', 'checkpoint (.pth)', 'checkpoint (.npz)'])
def test_damage(kind, files):
    """Of 300 damages, each is refused with one line that names the file, or hits nothing that is read."""
    found = attack.attack_by_damage(kind, *files[kind], count=300, seed=1)
    assert found['refused'] > 250 and found['refused'] + found['equal'] == 300, found


def test_forged_deltas(files):
    """Right digests over wrong contents: bombs, wrong names, shapes and places, tensors that are not announced."""
    found = attack.attack_by_forged_deltas(files['delta'][0][0])
    assert found['refused'] > 80 and set(found) == {'refused'}, found


@pytest.mark.parametrize('count', [120, pytest.param(400, marks=pytest.mark.slow)])
def test_forged_pickles(count):
    """Allowed globals under every opcode that can follow: refused or plain values, nothing run, written or crashed."""
    found = attack.attack_pickles(count, seed=1)
    assert set(found) == {'refused', 'plain'} and found['refused'] > 10 * found['plain'] > 0, found


def test_no_address_becomes_an_object(tmp_path):
    """A type with fields of objects over bytes of the file's choice is refused, under either name of numpy's."""
    for body in attack.forged_objects().values():
        (tmp_path / 'a.pth').write_bytes(attack.archive(body))
        with pytest.raises(pickle.UnpicklingError, match='which is not allowed'):
            torch.load(tmp_path / 'a.pth')
        with pytest.raises(CheckpointMismatchError, match='which is not allowed'):
            read_checkpoint(str(tmp_path / 'a.pth'))
        with pytest.raises(PlanError, match='which is not allowed'):
            _read(tmp_path / 'a.pth')


def test_no_memory_is_taken_from_under_a_tensor(tmp_path):
    """A tensor may share the memory of an array, which therefore cannot be filled anew."""
    array = attack.encoded(np.arange(1000.0))
    shared = attack.called('torch._utils._rebuild_device_tensor_from_numpy', pickle.BINGET + b'\xf0',
                           attack.named('torch.float64'), attack.encoded('cpu'), attack.encoded(False))  # fmt: skip
    state = attack.tuple_of(*map(attack.encoded, (1, (1,))), attack.encoded(np.dtype('f8')),
                            attack.encoded(False), attack.encoded(bytes(8)))  # fmt: skip
    body = array + pickle.BINPUT + b'\xf0' + shared + pickle.BINGET + b'\xf0' + state + pickle.BUILD + pickle.TUPLE2
    (tmp_path / 'a.pth').write_bytes(attack.archive(body))
    with pytest.raises(CheckpointMismatchError, match='filled twice'):
        read_checkpoint(str(tmp_path / 'a.pth'))
    (tmp_path / 'a.pth').write_bytes(attack.archive(array + pickle.BINPUT + b'\xf0' + shared + pickle.TUPLE2))
    first, tensor = read_checkpoint(str(tmp_path / 'a.pth'))['params']
    assert attack.same(first, np.arange(1000.0)) and torch.equal(tensor, torch.arange(1000.0, dtype=torch.float64))


NUMBERS = [
    np.arange(3.0), np.float64(1.5), np.arange(3).astype('>i4'), np.zeros((3, 0)), np.asfortranarray(np.ones((2, 3))),
    np.array(1.5), np.bool_(True), np.array([1 + 2j]), np.float16(3), np.dtype('f8'), b'', b'abc', np.uint8([1, 255]),
    np.array([True, False]), np.float32(2), np.int64(-1),
]  # fmt: skip


def history(*values: float) -> HistoryBuffer:
    made = HistoryBuffer()
    for value in values:
        made.update(value)
    return made


def in_the_names_of(core: str, file: Path) -> None:
    """Make a checkpoint one that another numpy wrote: the pickles differ in the module's name alone."""
    with zipfile.ZipFile(file) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, 'w') as archive:
        for name, content in contents.items():
            for other in (b'cnumpy._core.multiarray\n', b'cnumpy.core.multiarray\n'):
                content = content.replace(other, f'cnumpy.{core}.multiarray\n'.encode())
            archive.writestr(name, content)


@pytest.mark.parametrize('core', ['core', '_core'])
def test_checkpoints_of_either_numpy_load_exactly(core, tmp_path):
    """What mmengine writes, and any plain number or array beside, comes back as unpickling itself gives it."""
    buffer = history(1.5, 3)
    hub = dict(log_scalars={'loss': buffer, 'again': buffer, 'none yet': HistoryBuffer()}, runtime_info={'x': NUMBERS})
    torch.save(dict(state_dict={'a': torch.ones(2)}, message_hub=hub, pair=(NUMBERS[0], 1)), tmp_path / 'a.pth')
    in_the_names_of(core, tmp_path / 'a.pth')
    loaded = read_checkpoint(str(tmp_path / 'a.pth'))
    found = loaded['message_hub']['runtime_info']['x']
    for actual, number in zip(found, NUMBERS, strict=True):
        expected = pickle.loads(pickle.dumps(number, 2))
        assert type(actual) is type(expected)
        assert attack.same(actual, expected)
        assert str(getattr(actual, 'flags', '')) == str(getattr(expected, 'flags', ''))
    assert loaded['pair'][0] is found[0]
    scalars = loaded['message_hub']['log_scalars']
    assert type(scalars['loss']) is HistoryBuffer and scalars['again'] is scalars['loss']
    assert attack.same([*scalars['loss'].data], [*buffer.data]) and scalars['loss'].statistics('mean') == 2.25
    assert len(scalars['none yet'].data[0]) == 0
    direct = torch.load(tmp_path / 'a.pth')['message_hub']  # as others load it
    assert attack.same(np.asarray(direct['runtime_info']['x'][0]), NUMBERS[0])
    for copied in (pickle.loads(pickle.dumps(direct)), copy.deepcopy(direct)):
        assert np.array_equal(copied['runtime_info']['x'][0], NUMBERS[0])
    assert type(pickle.loads(pickle.dumps(direct))['runtime_info']['x'][0]) is np.ndarray


def test_checkpoints_are_written_for_either_numpy(tmp_path):
    """The hook's files name numpy's functions as numpy 1 does; this numpy unpickles them without a warning, and writes
    its own names afterwards."""
    with portable_names():
        data = pickle.dumps([np.ones(2), np.float64(1)], 2)
    assert b'numpy.core.multiarray' in data and b'numpy._core' not in data
    assert attack.same(pickle.loads(data), [np.ones(2), np.float64(1)])
    own = pickle.dumps(np.ones(2), 2)
    assert (b'numpy._core' in own) == (int(np.__version__.split('.')[0]) > 1)

    class Runner:
        def save_checkpoint(self, folder, name, **kwargs):
            Path(folder, name).write_bytes(pickle.dumps(np.ones(2), 2))

        message_hub = type('Hub', (), dict(update_info=lambda *args: None))()
        work_dir = str(tmp_path)

    hook = SafeCheckpointHook(interval=1)
    hook.out_dir, hook.file_backend = str(tmp_path), type('Files', (), dict(
        join_path=lambda self, *parts: str(Path(*parts)), put_text=lambda self, text, path: None))()  # fmt: skip
    hook.filename_tmpl, hook.args = 'epoch_{}.pth', {}
    hook._save_checkpoint_with_step(Runner(), 1, {})
    assert isinstance(hook, CheckpointHook) and b'numpy._core' not in (tmp_path / 'epoch_1.pth').read_bytes()


def test_what_others_register_does_not_come_in(tmp_path):
    """numpy's own classes, registered with torch as many a workaround says, do not replace the stand-ins in a load
    through mmengine; what else is registered stays allowed, and all of it afterwards, for threads, too."""

    class Mine:
        pass

    real = [np.dtype, np.ndarray, np.dtypes.VoidDType, np.dtypes.ObjectDType, np._core.multiarray._reconstruct]
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([*real, (Mine, 'tests.Mine')])
    try:
        (tmp_path / 'a.pth').write_bytes(attack.archive(attack.forged_objects()['_core: array of f8, 0']))
        with pytest.raises(CheckpointMismatchError, match='which is not allowed'):
            read_checkpoint(str(tmp_path / 'a.pth'))
        assert set(map(str, torch.serialization.get_safe_globals())) >= set(map(str, real))
        entered, leave = threading.Event(), threading.Event()

        def other() -> None:
            with weights_only():
                entered.set()
                leave.wait(60)

        thread = threading.Thread(target=other)
        with weights_only():
            thread.start()
            assert entered.wait(60)
            assert (Mine, 'tests.Mine') in torch.serialization.get_safe_globals()
        with pytest.raises(CheckpointMismatchError, match='which is not allowed'):  # the other one is still in it
            read_checkpoint(str(tmp_path / 'a.pth'))
        leave.set()
        thread.join()
        assert np.dtype in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_loading_weights_only_whatever_the_environment_says(tmp_path, monkeypatch):
    """A workaround of many, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, neither lets a pickle run nor stops loading."""
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False)
    torch.save({'a': torch.ones(1)}, tmp_path / 'a.pth')
    assert read_checkpoint(str(tmp_path / 'a.pth')).keys() == {'a'}
    (tmp_path / 'a.pth').write_bytes(attack.archive(attack.called('os.getpid')))
    with pytest.raises(CheckpointMismatchError):
        read_checkpoint(str(tmp_path / 'a.pth'))


@pytest.mark.parametrize(
    'content',
    [{1: torch.ones(1)}, {'state_dict': {1: torch.ones(1)}}, {'state_dict': 3}, {'model': {(1,): torch.ones(1)}}],
)
def test_names_that_are_no_strings(content, tmp_path):
    """One clear error, and not one from within a conversion or mmengine."""
    torch.save(content, tmp_path / 'a.pth')
    with pytest.raises(CheckpointMismatchError, match=r'a\.pth is not a checkpoint'):
        read_checkpoint(str(tmp_path / 'a.pth'))


def test_archives_that_are_larger_than_they_look(tmp_path, monkeypatch):
    """Compressed records in a .pth, which torch never writes; arrays of an .npz far larger than the file."""
    data = io.BytesIO()
    torch.save({'a': torch.zeros(10**6)}, data)
    with zipfile.ZipFile(data) as source, zipfile.ZipFile(tmp_path / 'a.pth', 'w', zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    with pytest.raises(CheckpointMismatchError, match='compressed'):
        read_checkpoint(str(tmp_path / 'a.pth'))
    with zipfile.ZipFile(tmp_path / 'a.npz', 'w', zipfile.ZIP_DEFLATED) as target, target.open('a.npy', 'w') as file:
        np.lib.format.write_array_header_1_0(file, dict(descr='<f4', fortran_order=False, shape=(2**24,)))
        for _ in range(2**6):
            file.write(bytes(2**20))
    assert len(read_checkpoint(str(tmp_path / 'a.npz'))['a']) == 2**24  # small enough for any ratio
    monkeypatch.setattr('mona_mm.checkpoint.loading._LARGEST', 2**25)
    with pytest.raises(CheckpointMismatchError, match='records would take'):
        read_checkpoint(str(tmp_path / 'a.npz'))


@pytest.fixture(scope='module')
def tuned() -> PeftBackbone:
    torch.manual_seed(0)
    return PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(type='LoRA', rank=2))


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
def test_values_that_are_not_finite(value, tuned, tmp_path):
    """They are refused on saving and on loading, the tensor is named, and whoever means them can have them."""
    model, file = copy.deepcopy(tuned), tmp_path / 'a.delta.safetensors'
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        parameter.flatten()[3] = value
    with pytest.raises(CheckpointMismatchError, match=f'is not written: {name} holds 1 of'):
        save_delta(model, file)
    assert not file.exists()
    save_delta(model, file, allow_nonfinite=True)
    before = {key: tensor.clone() for key, tensor in tuned.state_dict().items()}
    for read in (read_delta, lambda f: load_delta(tuned, f), lambda f: CheckpointLoader.load_checkpoint(str(f))):
        with pytest.raises(CheckpointMismatchError, match=f'{name} holds 1 of'):
            read(file)
    assert attack.same(dict(tuned.state_dict()), before)
    other = copy.deepcopy(tuned)
    load_delta(other, file, allow_nonfinite=True)
    assert other.get_parameter(name).flatten()[3].isnan() == parameter.flatten()[3].isnan()


def test_sensitivities_that_are_not_finite(tmp_path):
    """No plan is made of them."""
    backbone = PeftBackbone(base=HOSTS['mmpretrain-vit'], trainable='full')
    architecture = attack.Architecture.of(backbone)
    squares = {part.name: torch.ones(architecture.shapes[part.name]) for part in architecture.parts}
    Sensitivity(architecture, squares).save(tmp_path / 'a.safetensors')
    Sensitivity.load(tmp_path / 'a.safetensors')
    name = next(iter(squares))
    squares[name].flatten()[0] = torch.nan
    with pytest.raises(PlanError, match=f'is not written: {name} holds 1 of'):
        Sensitivity(architecture, squares).save(tmp_path / 'b.safetensors')
    assert not (tmp_path / 'b.safetensors').exists()
    _, fields = container.read(tmp_path / 'a.safetensors', KIND)
    container.write(tmp_path / 'a.safetensors', KIND, squares, fields, allow_nonfinite=True)
    with pytest.raises(PlanError, match=f'{name} holds 1 of'):
        Sensitivity.load(tmp_path / 'a.safetensors')


def test_tensors_beside_what_a_delta_announces(tuned, tmp_path):
    """More tensors or fewer than its header says are refused."""
    file = tmp_path / 'a.delta.safetensors'
    save_delta(tuned, file)
    header, said, body = attack.taken_apart(file.read_bytes())
    size = max(entry['data_offsets'][1] for name, entry in header.items() if name != '__metadata__')
    last = next(name for name, e in header.items() if name != '__metadata__' and e['data_offsets'][1] == size)
    more = {**header, 'head.weight': dict(dtype='F32', shape=[1], data_offsets=[size, size + 4])}
    fewer = {name: entry for name, entry in header.items() if name != last}
    start = header[last]['data_offsets'][0]
    for content in (attack.forged(more, said, body + bytes(4)), attack.forged(fewer, said, body[:start])):
        file.write_bytes(content)
        with pytest.raises(CheckpointMismatchError, match='announce'):
            read_delta(file)


def test_no_module_is_imported_because_a_delta_names_it(tuned, tmp_path, monkeypatch):
    """A registry of mmengine imports what a name begins with, so what a file calls a method is never looked up."""
    (tmp_path / 'surprise_of_a_delta.py').write_text('raise SystemExit("imported")')
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / 'a.delta.safetensors'
    save_delta(tuned, file)
    delta = read_delta(file)
    for method in delta.header.methods.values():
        method['type'] = 'surprise_of_a_delta.Method'
    write_delta(file, delta.header, delta.tensors)
    with pytest.raises(CheckpointMismatchError, match='delta of another method'):
        load_delta(tuned, file)


def test_a_header_that_is_too_long_to_be_read(tuned, tmp_path):
    """A config of megabytes is left out, and anything else refused when it is written, not when it is needed."""
    file = tmp_path / 'a.delta.safetensors'
    text = np.random.default_rng(0).bytes(2**19).hex()
    save_delta(tuned, file, config=text)
    assert read_delta(file).header.config == ''
    with pytest.raises(CheckpointMismatchError, match='is not written: its header .* for dataset_meta'):
        save_delta(tuned, tmp_path / 'b.delta.safetensors', dataset_meta=dict(classes=[text]))


def test_a_plan_with_a_long_header(files, tmp_path):
    """It is refused before it is parsed; a plan holds indices of weights and nothing else."""
    data = files['plan'][0][0].read_bytes()
    bad = tmp_path / 'bad.safetensors'
    text = b'{"__metadata__":{"a":"' + b' ' * 2**21 + b'"}}'
    bad.write_bytes(len(text).to_bytes(8, 'little') + text + data)
    with pytest.raises(PlanError, match=r'bad\.safetensors cannot be read as a plan.*header'):
        Plan.load(bad)
