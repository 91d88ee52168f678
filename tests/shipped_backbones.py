"""Put Mona and LoRA into the backbone of every config that mmdet, mmseg and mmpretrain ship, and train a step.

    python tests/shipped_backbones.py --minutes 30

``shipped_configs.py --peft`` does this for whole models, a few hundred of them in some hours. A method sees nothing of
a model but its backbone, so this script takes the backbones alone, every different one, in full depth and width: a
forward and a backward pass of the sum of its outputs, on small images of noise, first without a method. With a method,
its parameters must get finite gradients, and no other parameter any. ``--out`` keeps what is finished, and the next
call goes on from there. A backbone counts as

* ``passed``: with the linear layers that were given, where a host has no ``q`` and ``v`` for LoRA;
* ``refused``: one of our errors says why the method cannot be in it;
* ``not a host``: no host is declared for its class, or one is refused with the reason;
* ``stock``: it cannot be built or run without a method, with the reason;
* ``too large``: it has more parameters than ``--parameters``;
* ``ours``: all others. There must be none, and the exit status is 1 if there is one.
"""

import argparse
import collections
import gc
import glob
import json
import signal
import sys
import time
from pathlib import Path

import torch
from mmengine.logging import MMLogger
from shipped_configs import (
    LIBRARIES,
    PEFT,
    SIDE,
    backbones_in,
    digest,
    inside,
    own_sizes,
    plain,
    scaled_down,
    without_pretrained,
)
from torch import Tensor, nn


def different_backbones(library: str) -> dict[str, dict]:
    """``{digest: dict(config, scope, paths)}`` of all backbones in the shipped configs, without files of weights."""
    from mmengine.config import Config

    found: dict[str, dict] = {}
    with inside(library):
        for path in sorted(glob.glob('configs/**/*.py', recursive=True)):
            if '_base_' in Path(path).parts or path.endswith('__init__.py'):
                continue
            try:
                config = Config.fromfile(path)
                model = config.get('model')
                model = scaled_down(without_pretrained(model.to_dict())) if model else None
            except Exception:
                continue  # shipped_configs.py names it
            for base in backbones_in(model):
                base = {key: value for key, value in base.items() if key not in ('init_cfg', 'pretrained')}
                base = {key: value for key, value in base.items() if key != 'frozen_stages'}
                base = one_process(base)
                key = digest(plain(base))
                entry = found.setdefault(key, dict(config=base, scope=config.get('default_scope', library), paths=[]))
                entry['paths'].append(path)
    return found


def one_process(config):
    """The config with BatchNorm in place of SyncBN, and without activation checkpoints."""
    if isinstance(config, (list, tuple)):
        return type(config)(one_process(item) for item in config)
    if not isinstance(config, dict):
        return 'BN' if config == 'SyncBN' else config
    return {key: False if key == 'with_cp' else one_process(value) for key, value in config.items()}


def build(scope: str, config: dict, method: dict | None) -> nn.Module:
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(scope)
    torch.manual_seed(0)
    if method is not None:
        config = dict(type='mona_mm.PeftBackbone', base=config, peft=method)
    model = MODELS.build(config)
    model.train()
    return model


def step(model: nn.Module, size: tuple[int, int]) -> None:
    """A forward and a backward pass, whose gradients stay on the parameters, after a Runner's initialisation."""
    from mona_mm.frozen.reach import blank_image

    torch.manual_seed(0)
    model.init_weights()
    for module in model.modules():
        if type(module).__name__ == 'TridentConv':  # mmdet gives it no initial values: they are what was in memory
            nn.init.kaiming_normal_(module.weight)
    channels = blank_image(model, 'meta', size).shape[1]
    x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))
    sum(out.float().square().mean() for out in tensors(model(x)) if out.requires_grad).backward()


def tensors(outputs) -> list[Tensor]:
    """Every floating-point tensor in the outputs of a backbone."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    return [t for out in outputs or () for t in tensors(out)] if isinstance(outputs, (list, tuple)) else []


def run_stock(entry: dict, most: float) -> dict:
    """Find a size of image that the backbone takes; the outcome if there is none."""
    from mona_mm.nn.meta import meta_device

    try:
        with meta_device():
            size = sum(p.numel() for p in build(entry['scope'], entry['config'], None).parameters())
        if size > most:
            return dict(outcome='too large', reason=f'{size:,} parameters')
    except Exception:
        pass  # a backbone that computes with the values of its weights as it is built
    reason = ''
    for config, image in forms(entry['config']):
        try:
            model = build(entry['scope'], config, None)
            step(model, image)
        except TimeoutError:
            raise
        except Exception as error:
            reason = reason or f'{type(error).__name__}: {error}'[:300]
        else:
            entry['config'] = config
            return dict(size=image, cls=type(model).__name__)
    return dict(outcome='stock', reason=reason)


def forms(config: dict) -> list[tuple[dict, tuple[int, int]]]:
    """The config and a size of image, the cheapest first: one that is made for images of one size is made for a small
    one before it is tried as it is."""
    small = [({**config, 'img_size': (SIDE, SIDE)}, (SIDE, SIDE))] if config.get('img_size') else []
    return small + [(config, image) for image in own_sizes(dict(backbone=config))]


def run_method(entry: dict, name: str, image: tuple[int, int]) -> dict:
    from mona_mm.errors import UnsupportedHostError, UserError
    from mona_mm.hosts import LINEAR_SITES, find_host, method_names
    from mona_mm.nn.meta import meta_device

    method = dict(type=f'mona_mm.{name}', **PEFT[name])
    try:
        try:
            model = build(entry['scope'], entry['config'], method)
        except UnsupportedHostError as error:
            return dict(outcome='not a host', reason=str(error)[:200])
        except UserError as error:
            if name != 'LoRA' or 'no such site' not in str(error):
                return dict(outcome='refused', reason=str(error)[:400])
            with meta_device():
                host = find_host(build(entry['scope'], entry['config'], None))
            sites = [site for site in LINEAR_SITES if site in host.sites]
            if not sites:
                return dict(outcome='refused', reason=str(error)[:400])
            try:
                model = build(entry['scope'], entry['config'], dict(method, sites=sites))
            except UserError as again:
                return dict(outcome='refused', reason=str(again)[:400])
            method['sites'] = sites
        step(model, image)
        added = method_names(model)
        own = [p for n, p in model.named_parameters() if n in added and p.requires_grad]
        others = [n for n, p in model.named_parameters() if n not in added and p.grad is not None]
        reached = [p for p in own if p.grad is not None]
        assert reached, 'no parameter of the method has a gradient'
        assert not others, f'frozen parameters have gradients: {others[:3]}'
        assert all(p.grad.isfinite().all() for p in reached), 'a gradient is not finite'
        return dict(outcome='passed', with_gradient=len(reached), of=len(own), sites=method.get('sites'))
    except TimeoutError:
        raise
    except UserError as error:
        return dict(outcome='refused', reason=f'in its forward: {error}'[:400])
    except Exception as error:
        return dict(outcome='ours', reason=f'{type(error).__name__}: {error}'[:400])


def run(entry: dict, arguments: argparse.Namespace) -> dict:
    signal.alarm(arguments.timeout)
    try:
        result = run_stock(entry, arguments.parameters)
        if 'outcome' not in result:
            result['methods'] = {name: run_method(entry, name, result['size']) for name in PEFT}
        return result
    except TimeoutError:
        return dict(outcome='too large', reason=f'longer than {arguments.timeout} s')
    finally:
        signal.alarm(0)
        gc.collect()


def summary(state: dict) -> tuple[str, int]:
    lines, ours = [], 0
    for method in PEFT:
        for library, part in state.items():
            counts, configs = collections.Counter(), collections.Counter()
            for key, result in part['results'].items():
                outcome = result.get('outcome') or result['methods'][method]['outcome']
                counts[outcome] += 1
                configs[outcome] += len(set(part['backbones'][key]))
            ours += counts['ours']
            text = ', '.join(f'{outcome} {n} ({configs[outcome]} configs)' for outcome, n in counts.most_common())
            lines.append(f'{method} in {library}: {sum(counts.values())} of {len(part["backbones"])} backbones: {text}')
    return '\n'.join(lines), ours


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=1e9)
    parser.add_argument('--timeout', type=int, default=300, help='seconds for one backbone (default: %(default)s)')
    parser.add_argument('--parameters', type=float, default=4e8, help='of the largest (default: %(default)s)')
    parser.add_argument('--libraries', nargs='+', default=LIBRARIES)
    parser.add_argument('--out', type=Path, default=Path('shipped_backbones.json'))
    arguments = parser.parse_args()
    until = time.time() + 60 * arguments.minutes

    def stop(*_) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    import mona_mm  # noqa: F401, it registers its models and stands in for operators

    MMLogger.get_current_instance().setLevel('WARNING')  # it would list every initial value
    state = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for library in arguments.libraries:
        __import__(f'{library}.models')
        found = different_backbones(library)
        part = state.setdefault(library, dict(results={}))
        part['backbones'] = {key: entry['paths'] for key, entry in found.items()}
        part['results'] = {key: result for key, result in part['results'].items() if key in found}
        for key, entry in found.items():
            if key in part['results']:
                continue
            if time.time() > until:
                break
            result = part['results'][key] = run(entry, arguments)
            arguments.out.write_text(json.dumps(state))
            told = result.get('outcome') or {name: m['outcome'] for name, m in result['methods'].items()}
            print(f'{library} {entry["paths"][0]}: {told}', flush=True)
    text, ours = summary(state)
    print(text)
    return 1 if ours else 0


if __name__ == '__main__':
    sys.exit(main())
