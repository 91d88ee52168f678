"""What `import mona_mm` costs: what mmengine's Runner costs, which everything needs, and next to nothing more."""

import json
import sys

from helpers import command

CODE = """
import json, sys
import mmengine.runner
before = set(sys.modules)
import mona_mm
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, PARAM_SCHEDULERS
registries = (MODELS, HOOKS, OPTIM_WRAPPER_CONSTRUCTORS, PARAM_SCHEDULERS)
names = ('PeftBackbone', 'ParamFreezeHook', 'PeftOptimWrapperConstructor', 'WarmupCosineLR')
after = set(sys.modules)
registered = [registry.get(f'mona_mm.{name}') is not None for registry, name in zip(registries, names)]
import torch
from mona_mm.methods import Mona
Mona(32, 16)(torch.randn(1, 64, 32, requires_grad=True), (8, 8)).sum().backward()
kernels = [name for name in sys.modules if name == 'mona_mm.methods.triton_mona']
print(json.dumps([sorted(after - before), registered, kernels]))
"""


def test_import_adds_only_its_own_modules():
    """Beside mmengine.runner, which takes seconds, only modules of this package and safetensors are imported: no
    torchvision, no mmcv, none of the libraries' models, nothing that draws. Everything is registered all the same.
    A CPU alone imports no kernel of Triton either, even where a Mona runs in its fast form."""
    done = command('-c', CODE)
    assert done.returncode == 0, done.stderr[-2000:]
    added, registered, kernels = json.loads(done.stdout)
    assert 'mona_mm.backbone' in added
    packages = {name.partition('.')[0] for name in added} - set(sys.stdlib_module_names)
    assert packages == {'mona_mm', 'safetensors'}
    optional = ('mona_mm.benchmark', 'mona_mm.reproduce', 'mona_mm.datasets', 'mona_mm.datasets.shapes')
    assert not [name for name in added if name.startswith(optional)]
    assert all(registered)
    assert kernels == []
