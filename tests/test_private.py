"""Private names of torch and mmengine: known in one place each, and not needed."""

import re
import subprocess
import sys
import threading

import pytest
import torch
from helpers import ROOT
from torch import nn

from mona_mm.compat import runner as runner_names
from mona_mm.compat.safe_globals import weights_only
from mona_mm.nn import private, products, tracing
from mona_mm.nn.replaced import replaced

IMPORTED = re.compile(r'^\s*from (torch|mmengine)[\w.]* import (.*, ?)?_[a-z]\w*', re.IGNORECASE)
USED = re.compile(r'\b(torch(\.\w+)*\._[a-z]\w*|(runner|t|p|tensor)\._(resume|load_from|train_loop|version)\b)')
KNOWN = {
    'nn/private.py',
    'compat/runner.py',
    'optim/schedule.py',  # _ParamScheduler, which mmengine.optim exports in __all__
}


def test_private_names_are_in_one_place():
    found = set()
    for file in (ROOT / 'mona_mm').rglob('*.py'):
        if any(IMPORTED.search(line) or USED.search(line) for line in file.read_text().splitlines()):
            found.add(str(file.relative_to(ROOT / 'mona_mm')))
    assert found == KNOWN
    assert not [f for f in (ROOT / 'mona_mm').rglob('*.py') if 'unittest' in f.read_text()]


WITHOUT = """
import sys, torch
from torch.autograd import forward_ad
import torch.nn.modules as m, torch.utils._python_dispatch as dispatch
for owner, name in [(m.batchnorm, '_BatchNorm'), (m.batchnorm, '_NormBase'), (m.conv, '_ConvNd'),
                    (m.dropout, '_DropoutNd'), (torch._C, '_are_functorch_transforms_active'),
                    (dispatch, 'is_in_torch_dispatch_mode'), (forward_ad, '_current_level')]:
    if '--delete' in sys.argv:
        delattr(owner, name)
from mona_mm.nn import private
print(private.may_be_transformed(), *(isinstance(each, kinds) for each, kinds in [
    (torch.nn.BatchNorm2d(1), private.BATCH_NORMS), (torch.nn.InstanceNorm1d(1), private.NORMS_WITH_STATISTICS),
    (torch.nn.SyncBatchNorm(1), private.NORMS_WITH_STATISTICS), (torch.nn.Conv2d(1, 1, 1), private.CONVOLUTIONS),
    (torch.nn.ConvTranspose1d(1, 1, 1), private.CONVOLUTIONS), (torch.nn.Dropout2d(), private.DROPOUTS)]))
"""


@pytest.mark.slow
def test_a_torch_without_the_private_names():
    """The plain forms are taken, and torch's own layers are still known for what they are."""
    package = str(ROOT / 'mona_mm')  # without its __init__, which imports everything
    code = f"""
import sys
mona_mm = sys.modules['mona_mm'] = type(sys)('mona_mm')
mona_mm.__path__ = [{package!r}]
"""
    for argument, first in (([], 'False'), (['--delete'], 'True')):
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', code + WITHOUT, *argument], capture_output=True, text=True
        )
        assert done.stdout.split() == [first, *['True'] * 6], done.stderr


def test_what_is_not_known_of_a_module_or_tensor(monkeypatch):
    """Hooks are taken to be there, changes to have happened, and products to be torch's own."""
    linear = nn.Linear(2, 3)
    assert not tracing.is_hooked(linear)
    monkeypatch.setattr(private, '_HOOKS', ('_renamed',))
    assert tracing.is_hooked(linear)

    class Uncounted:
        def is_inference(self) -> bool:
            return False

    assert (private.change_count(linear.weight),) == (private.change_count(linear.weight),)
    assert (private.change_count(Uncounted()),) != (private.change_count(Uncounted()),)
    monkeypatch.setattr(products, 'HAS_ONEDNN_LINEAR', False)
    assert not products.has_ways(torch.ones(1, 1))


def test_a_runner_without_the_private_names():
    class Runner:
        cfg = dict(resume=True, load_from='a.pth')
        optim_wrapper = None

    assert runner_names.resumes(Runner()) and runner_names.loaded_file(Runner()) == 'a.pth'
    assert not runner_names.trains(Runner())


def test_an_attribute_comes_back():
    owner = type('Owner', (), dict(value=1))()
    with pytest.raises(ZeroDivisionError), replaced(owner, 'value', 2):
        assert owner.value == 2
        1 / 0  # noqa: B018
    assert owner.value == 1


class Runs:
    def __reduce__(self) -> tuple:
        return list, ((1, 2),)


def test_weights_only_holds_in_its_own_thread(tmp_path):
    """Whatever is asked for in it; another thread may execute a pickle that it trusts meanwhile."""
    torch.save(Runs(), tmp_path / 'a.pth')
    found = []
    with weights_only():
        with pytest.raises(Exception, match='(?i)weights'):
            torch.load(tmp_path / 'a.pth', weights_only=False)
        thread = threading.Thread(target=lambda: found.append(torch.load(tmp_path / 'a.pth', weights_only=False)))
        thread.start()
        thread.join()
    assert found == [[1, 2]] and torch.load(tmp_path / 'a.pth', weights_only=False) == [1, 2]
