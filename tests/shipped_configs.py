"""Build and run every model config that mmdet, mmseg and mmpretrain ship, with the operators of this package.

    python tests/shipped_configs.py --minutes 30
    python tests/shipped_configs.py --minutes 30 --peft Mona LoRA

For each config: the model is built without its pretrained weights and with fewer boxes and queries, trained for one
step (loss and backward) and asked for one prediction, on small images of noise. Configs that describe the same model
are run once. One model of each outline (the config without its numbers) is run before the second of any, in all
libraries: the one of the smallest numbers. One outline of each type of model comes first, then one of each folder, then
the others, those that differ from another in the name of an ``arch`` only at last; among equals those that most configs
share.
``shipped_configs.json`` keeps what is finished, and the next call goes on from there.

An image has 64 x 64 pixels; a model that cannot take that gets a larger one, last of all the config's own size. A BERT
of the hub is replaced by a small one of random weights, where transformers is installed. What fails then is run again
without this package, where every operator of mmcv is missing or, with ``--reference DIR``, compiled (see
``upstream.py``). A config counts as

* ``passed``;
* ``stock``: it fails without this package too, and in the same way (with the reason);
* ``in the library``: it fails in code of the library that nothing of this package is called by; without this package
  it ends before that, where an operator is missing, so that nothing can be compared;
* ``too large``: the model and its gradients exceed ``--memory``, or a step takes longer than ``--timeout``;
* ``missing operator``: it needs an operator of mmcv for which there is no stand-in;
* ``ours``: all others. There must be none, and the exit status is 1 if there is one.

With ``--peft`` every backbone of the model is then put into a ``mona_mm.PeftBackbone`` with each of the methods named,
of few channels, and the model is built anew and trained for a step: the method's parameters must get finite gradients
and no other parameter of the backbone any. That counts as ``passed``; as ``refused``, with the reason, if one of our
errors says that the backbone is a host that lacks what the method needs; as ``not a host``; as ``as without`` if it
fails in the way in which the model fails without a method; as ``as another`` if the method has passed, or been refused,
in a model of the same classes of model and backbone, which are run once (``--again 'as another'`` runs them too); or as
above.
"""

import argparse
import collections
import contextlib
import copy
import gc
import glob
import hashlib
import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')
SIDE = 64  # of the smallest images, in pixels
PEFT = dict(Mona=dict(bottleneck=8), LoRA=dict(rank=4))  # fit for narrow backbones


# ---- the configs ----


def installed_configs(library: str) -> Path:
    """The folder above ``configs/`` in the installed ``library``."""
    return Path(importlib.util.find_spec(library).origin).parent / '.mim'


def without_pretrained(config):
    """A copy of a model config that loads nothing: every ``init_cfg`` of kind Pretrained and every path is gone."""
    if isinstance(config, (list, tuple)):
        return type(config)(without_pretrained(item) for item in config)
    if not isinstance(config, dict):
        return config
    result = {}
    for key, value in config.items():
        if key in ('pretrained', 'teacher_ckpt') and isinstance(value, (str, bool)):
            value = False if isinstance(value, bool) else None
        elif key == 'init_cfg':
            entries = value if isinstance(value, (list, tuple)) else [value]
            entries = [e for e in entries if isinstance(e, dict) and 'checkpoint' not in e]
            value = [without_pretrained(entry) for entry in entries] or None
        else:
            value = without_pretrained(value)
        result[key] = value
    return result


# What costs time in proportion and calls nothing that less of it would not.
PLENTIFUL = ('nms_pre', 'max_per_img', 'max_num', 'num_queries', 'sos_token_num', 'num_proposals', 'num')


def scaled_down(config, most: int = 16):
    """The config with at most so many boxes, samples and queries, for one process, without activation checkpoints."""
    if isinstance(config, (list, tuple)):
        return type(config)(scaled_down(item, most) for item in config)
    if not isinstance(config, dict):
        return config
    result = {}
    for key, value in config.items():
        if key in PLENTIFUL and isinstance(value, int):
            value = min(value, most)
        elif key == 'num_cp':  # needs fairscale
            value = -1
        elif key == 'batch_augments' and value:  # images are of one size here, and would be padded to a megapixel
            value = [step for step in value if 'FixedSizePad' not in str(step['type'])] or None
        elif key == 'type' and value == 'MMSyncBN':  # needs several processes
            value = 'BN'
        else:
            value = scaled_down(value, most)
        result[key] = value
    return result


def plain(config):
    """A config as JSON can hold it; a class stands by its name, as new-style configs name types by classes."""
    if isinstance(config, dict):
        return {str(key): plain(value) for key, value in sorted(config.items(), key=lambda item: str(item[0]))}
    if isinstance(config, (list, tuple)):
        return [plain(item) for item in config]
    if config is None or isinstance(config, (str, int, float, bool)):
        return config
    return getattr(config, '__name__', str(config))


def outline(config, without: Collection[str] = ()):
    """A plain config with each number replaced by 0: what says which parts a model has, but not of what size.

    The keys of ``without`` are left out.
    """
    if isinstance(config, dict):
        return {key: outline(value, without) for key, value in config.items() if key not in ('init_cfg', *without)}
    if isinstance(config, list):
        return [outline(item, without) for item in config]
    if isinstance(config, (int, float)) and not isinstance(config, bool):
        return 0
    return config


def magnitude(config) -> float:
    """The sum of the logarithms of a plain config's numbers, which is smaller for the smaller of two like models."""
    if isinstance(config, dict):
        return sum(magnitude(value) for key, value in config.items() if key != 'init_cfg')
    if isinstance(config, list):
        return sum(map(magnitude, config))
    is_number = isinstance(config, (int, float)) and not isinstance(config, bool)
    return math.log1p(abs(config)) if is_number else 0.0


def digest(config) -> str:
    return hashlib.sha1(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def read_index(library: str, known: dict, extra: list[Path]) -> dict:
    """``{config: dict(model, outline, family, magnitude, type) or dict(error)}`` of every config; ``known`` is kept."""
    from mmengine.config import Config

    index = dict(known)
    with inside(library):
        paths = [path for path in glob.glob('configs/**/*.py', recursive=True) if '_base_' not in Path(path).parts]
        for root in extra:
            paths += [str(path) for path in sorted(root.rglob('*.py')) if '_base_' not in path.parts]
        for path in sorted(paths):
            if path in index or path.endswith('__init__.py'):
                continue
            try:
                config = Config.fromfile(path)
            except Exception as error:
                index[path] = dict(error=f'{type(error).__name__}: {error}'[:500])
                continue
            if config.get('model') is None or not config.model.get('type'):
                index[path] = dict(error='no model in it')
                continue
            model = plain(without_pretrained(config.model.to_dict()))
            index[path] = dict(
                model=digest(model),
                outline=digest(outline(model)),
                family=digest(outline(model, without=('arch',))),
                magnitude=round(magnitude(model), 2),
                type=str(model['type']),
            )
    return index


@contextlib.contextmanager
def inside(library: str):
    """The working directory is where the configs of a library are: some name others from there."""
    before = os.getcwd()
    os.chdir(installed_configs(library))
    try:
        yield
    finally:
        os.chdir(before)


# ---- generated data ----


def _numbers(config, key: str) -> list[int]:
    """Every number that stands under ``key`` anywhere in a config."""
    if isinstance(config, dict):
        own = [config[key]] if isinstance(config.get(key), int) else []
        return own + [n for value in config.values() for n in _numbers(value, key)]
    if isinstance(config, (list, tuple)):
        return [n for item in config for n in _numbers(item, key)]
    return []


def has_key(config, key: str) -> bool:
    """Whether ``key`` stands anywhere in a config."""
    if isinstance(config, dict):
        return key in config or any(has_key(value, key) for value in config.values())
    return isinstance(config, (list, tuple)) and any(has_key(item, key) for item in config)


def _image(size, generator) -> torch.Tensor:
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)


def detection_batch(config: dict, size: tuple[int, int], seed: int = 0, images: int = 2) -> dict:
    """Images with three objects each: boxes, a semantic map, a caption; masks if the model has to do with any, since
    RTMDet takes other centres with masks; proposals if nothing makes them."""
    import numpy as np
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData, PixelData

    generator = torch.Generator().manual_seed(seed)
    height, width = size
    things, stuff = _numbers(config, 'num_things_classes'), _numbers(config, 'num_stuff_classes')
    classes = min([n for n in _numbers(config, 'num_classes') + things if n > 0], default=1)
    batch = dict(inputs=[], data_samples=[])
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.9], [0.55, 0.05, 0.8, 0.3]])
    boxes = boxes * torch.tensor([width, height, width, height])
    for number in range(images):
        masks = np.zeros((3, height, width), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        sample = DetDataSample(
            metainfo=dict(
                img_id=number,
                img_shape=size,
                ori_shape=size,
                pad_shape=size,
                batch_input_shape=size,
                scale_factor=(1.0, 1.0),
                flip=False,
                flip_direction=None,
                border=[0, height, 0, width],
                homography_matrix=np.eye(3, dtype=np.float32),
                text=('cat', 'dog', 'bird'),
                custom_entities=False,
                img_path='noise.png',
            )
        )
        labels = torch.arange(3) % min(classes, 3)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=labels[:0])
        if 'mask' in json.dumps(plain(config)).lower():
            sample.gt_instances.masks = BitmapMasks(masks, height, width)
            sample.ignored_instances.masks = BitmapMasks(masks[:0], height, width)
        if not has_key(config, 'rpn_head'):
            sample.proposals = InstanceData(bboxes=boxes + 2, scores=torch.ones(3))
        total = (things + [classes])[0] + sum(stuff[:1])
        semantic = torch.full((1, height, width), total - 1)
        for label, (x1, y1, x2, y2) in zip(labels, boxes.int().tolist(), strict=True):
            semantic[:, y1:y2, x1:x2] = label
        sample.gt_sem_seg = PixelData(sem_seg=semantic)
        batch['inputs'].append(_image(size, generator))
        batch['data_samples'].append(sample)
    return batch


def segmentation_batch(config: dict, size: tuple[int, int], seed: int = 0) -> dict:
    """Two images with a map of classes in blocks, and a map of depths."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(seed)
    classes = min((n for n in _numbers(config, 'num_classes') if n > 0), default=2)
    batch = dict(inputs=[], data_samples=[])
    for _ in range(2):
        sample = SegDataSample(
            metainfo=dict(
                img_shape=size,
                ori_shape=size,
                pad_shape=size,
                scale_factor=(1.0, 1.0),
                flip=False,
                flip_direction=None,
                img_path='noise.png',
            )
        )
        blocks = torch.randint(0, max(classes, 2), (1, 4, 4), generator=generator).float()[None]
        labels = torch.nn.functional.interpolate(blocks, size, mode='nearest')[0].long()
        sample.gt_sem_seg = PixelData(data=labels)
        sample.gt_edge_map = PixelData(data=(labels == 0).long())
        sample.gt_depth_map = PixelData(data=labels.float() + 1)
        batch['inputs'].append(_image(size, generator))
        batch['data_samples'].append(sample)
    return batch


TEXTS = dict(gt_caption='cat', text='cat', question='cat ?', gt_answer=['cat'], gt_answer_weight=[1.0], is_matched=True)


def classification_batch(config: dict, size: tuple[int, int], seed: int = 0) -> dict:
    """Two images, each with a class and, where the head wants several, a score for every class; and texts."""
    from mmpretrain.structures import DataSample

    generator = torch.Generator().manual_seed(seed)
    classes = min((n for n in _numbers(config, 'num_classes') if n > 1), default=2)
    batch = dict(inputs=[], data_samples=[])
    for number in range(2):
        sample = DataSample(metainfo=dict(img_shape=size, ori_shape=size, num_classes=classes))
        sample.set_gt_label([number] if 'MultiLabel' in json.dumps(plain(config)) else number)
        sample.set_data(dict(TEXTS, image_id=number))
        batch['inputs'].append(_image(size, generator))
        batch['data_samples'].append(sample)
    return dict(batch, inputs=torch.stack(batch['inputs']))  # as these libraries' loaders collate them


def self_supervised_batch(path: str, seed: int = 0) -> dict:
    """Two images of noise through the training pipeline of the config, which knows the views and the masks."""
    import numpy as np
    from mmengine.config import Config
    from mmengine.dataset import Compose, default_collate
    from mmpretrain.registry import TRANSFORMS

    np.random.seed(seed)
    pipeline = without_hue(Config.fromfile(path).train_dataloader.dataset.pipeline)
    steps = [TRANSFORMS.build(dict(step)) for step in pipeline if 'LoadImage' not in str(step['type'])]
    pipeline, images = Compose(steps), np.random.randint(0, 256, (2, 256, 256, 3), np.uint8)
    return default_collate(
        [
            pipeline(dict(img=image, img_path='noise.png', gt_label=0, img_shape=(256, 256), ori_shape=(256, 256)))
            for image in images
        ]
    )


def without_hue(pipeline):
    """The transforms without a change of hue, for which mmcv casts negative numbers to uint8: numpy 2 refuses that."""
    if isinstance(pipeline, (list, tuple)):
        return type(pipeline)(without_hue(step) for step in pipeline)
    if not isinstance(pipeline, dict):
        return pipeline
    return {key: 0.0 if key == 'hue' else without_hue(value) for key, value in pipeline.items()}


def small_bert(folder: Path) -> str:
    """A BERT of two layers and random weights with its tokenizer, as transformers loads one from a folder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    letters = [chr(number) for number in range(ord('a'), ord('z') + 1)]
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', '?', ',', 'cat', 'dog', 'bird']
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'vocab.txt').write_text('\n'.join([*words, *letters, *(f'##{letter}' for letter in letters)]))
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=200, num_hidden_layers=2, intermediate_size=64)).save_pretrained(folder)
    BertTokenizerFast(str(folder / 'vocab.txt')).save_pretrained(folder)
    return str(folder)


def with_bert(config, bert: str):
    """The config with every BERT of the hub replaced by the one in a folder."""
    if isinstance(config, dict):
        return type(config)({key: with_bert(value, bert) for key, value in config.items()})
    if isinstance(config, (list, tuple)):
        return type(config)(with_bert(item, bert) for item in config)
    return bert if config == 'bert-base-uncased' else config


# ---- one model ----


class Stage(Exception):
    """In which part of the run a model failed; the cause is chained."""


@contextlib.contextmanager
def stage(name: str):
    try:
        yield
    except Exception as error:
        raise Stage(name) from error


def own_sizes(config: dict, side: int = SIDE) -> list[tuple[int, int]]:
    """The sizes to try, the smallest, ``side``, first; the last is that of the config itself."""
    own = []
    for key in ('size', 'img_size', 'crop_size', 'input_size', 'image_size'):
        own += _sizes(config.get('data_preprocessor') or {}, key) + _sizes(config, key)
    own = [size for size in own if side < max(size) <= 800]
    return [(side, side), *own[:1], *([] if own else [(s, s) for s in (128, 224, 320, 512) if s > side])]


def _sizes(config, key: str) -> list[tuple[int, int]]:
    if isinstance(config, dict):
        value = config.get(key)
        own = []
        if isinstance(value, int) and not isinstance(value, bool):
            own = [(value, value)]
        elif isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(n, int) for n in value):
            own = [tuple(value)]
        return own + [size for item in config.values() for size in _sizes(item, key)]
    if isinstance(config, (list, tuple)):
        return [size for item in config for size in _sizes(item, key)]
    return []


def draw_cheaply() -> None:
    """Draw the values of large tensors from a short sequence, over and over, and keep no log of the initialisation.

    Random weights take a third of the time of a step on a small image otherwise.
    """
    import mmengine.model.base_module

    length = 65537  # a prime, so that the rows of a matrix differ
    uniform, normal = torch.Tensor.uniform_, torch.Tensor.normal_

    def fill(tensor, short):
        flat = tensor.detach().view(-1)
        whole = len(flat) // length * length
        flat[:whole].view(-1, length).copy_(short)
        flat[whole:].copy_(short[: len(flat) - whole])
        return tensor

    def is_long(tensor):
        return tensor.numel() > 4 * length and tensor.is_contiguous() and tensor.device.type == 'cpu'

    def uniform_(self, low=0, high=1, *, generator=None):
        if not is_long(self):
            return uniform(self, low, high, generator=generator)
        return fill(self, uniform(torch.empty(length), low, high, generator=generator))

    def normal_(self, mean=0, std=1, *, generator=None):
        if not is_long(self):
            return normal(self, mean, std, generator=generator)
        return fill(self, normal(torch.empty(length), mean, std, generator=generator))

    torch.Tensor.uniform_, torch.Tensor.normal_ = uniform_, normal_
    mmengine.model.base_module.update_init_info = lambda *args, **kwargs: None
    mmengine.model.BaseModule._dump_init_info = lambda self: None


def build_model(scope: str, config: dict, size: tuple[int, int]) -> torch.nn.Module:
    """The model of a shipped config, with random weights, fit for images of ``size`` and for one process.

    Args:
        scope: the config's ``default_scope``, a library that need not be the one that ships it.
        config: the model.
        size: height and width in pixels.
    """
    from mmengine.config import ConfigDict
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(scope)
    config = ConfigDict(scaled_down(without_pretrained(config)))  # some detectors look options up as attributes
    if scope == 'mmseg':
        if (config.get('data_preprocessor') or {}).get('size') is not None:
            config['data_preprocessor']['size'] = size
        if (config.get('test_cfg') or {}).get('mode') == 'slide':
            config['test_cfg'].update(crop_size=size, stride=tuple(side * 2 // 3 for side in size))
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(config))
    model.init_weights()
    return model


def run_model(
    model: torch.nn.Module, config: dict, size: tuple[int, int], path: str | None = None, predict: bool = True
) -> dict:
    """One step of training and one prediction; the loss, and how many of the trained parameters got a gradient.

    Gradients stay on the parameters without the prediction.
    """
    from mmengine.logging import MessageHub

    kind = {cls.__name__ for cls in type(model).__mro__}
    MessageHub.get_current_instance().update_info_dict(dict(iter=0, epoch=0, max_iters=10, max_epochs=10))
    result = {}
    train, test = _batches(kind, config, size, path)
    torch.manual_seed(1)
    model.train()
    if train is not None:
        with stage('loss'):
            data = train if 'BaseReID' in kind else model.data_preprocessor(train, True)
            losses = model(**data, mode='loss')
            total, _ = model.parse_losses(losses)
        with stage('backward'):
            total.backward()
        result.update(
            loss=total.item(),
            trained=sum(p.requires_grad for p in model.parameters()),
            with_gradient=sum(p.grad is not None for p in model.parameters()),
        )
        gradients = [p.grad.detach() for p in model.parameters() if p.grad is not None]
        result['finite'] = bool(torch.stack([*torch._foreach_norm(gradients), total.detach()]).isfinite().all())
    if test is not None and predict:
        model.zero_grad(set_to_none=True)
        model.eval()
        with stage('predict'), torch.no_grad():
            data = test if 'BaseReID' in kind else model.data_preprocessor(test, False)
            model(**data, mode='predict')
    return result


# ---- the same model with a method in its backbones ----


def with_peft(config, method: str):
    """The config with every backbone in it in a PeftBackbone, which freezes all of it but for the method.

    A PeftBackbone asks for a base that does not freeze stages by itself.
    """
    if isinstance(config, (list, tuple)):
        return type(config)(with_peft(item, method) for item in config)
    if not isinstance(config, dict):
        return config
    result = {key: with_peft(value, method) for key, value in config.items()}
    base = result.get('backbone')
    if isinstance(base, dict) and 'type' in base:
        base = {key: value for key, value in base.items() if key != 'frozen_stages'}
        peft = dict(type=f'mona_mm.{method}', **PEFT.get(method, {}))
        result['backbone'] = dict(type='mona_mm.PeftBackbone', base=base, peft=peft)
    return result


def backbones_in(config) -> list[dict]:
    """The config of every backbone in that of a model, as it stands."""
    if isinstance(config, (list, tuple)):
        return [base for item in config for base in backbones_in(item)]
    if not isinstance(config, dict):
        return []
    base = config.get('backbone')
    own = [base] if isinstance(base, dict) and 'type' in base else []
    return own + [inner for value in config.values() for inner in backbones_in(value)]


def backbone_classes(scope: str, config) -> list[type]:
    """The class of every backbone in the config of a model."""
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(scope)
    with MODELS.switch_scope_and_registry(None) as registry:
        types = [base['type'] for base in backbones_in(config)]
        return [registry.get(type_) if isinstance(type_, str) else type_ for type_ in types]


def may_be_host(cls: type) -> bool:
    """Whether the class of a backbone, or one that it derives from, is declared as a host."""
    from mona_mm.hosts import HOSTS

    return any(f'{base.__module__}.{base.__qualname__}' in HOSTS for base in cls.__mro__)


def run_with_peft(scope: str, config: dict, method: str, size: tuple[int, int], path: str) -> dict:
    """Build the model with a method, train it for a step, and check which parameters of its backbones have gradients.

    Raises:
        Stage: if a part of that fails; the cause is chained.
    """
    from mona_mm.hosts import method_names

    classes = backbone_classes(scope, config)
    strange = sorted({cls.__name__ for cls in classes if not may_be_host(cls)})
    if strange or not classes:
        return dict(outcome='not a host', reason=', '.join(strange) or 'no backbone')
    config = with_peft(config, method)
    with stage('build'):
        model = build_model(scope, config, size)
    added = method_names(model)
    result = run_model(model, config, size, path, predict=False)
    if 'loss' not in result:
        return dict(result, outcome='not a host', reason='the model has no loss of its own')
    with stage('gradients'):
        parameters = dict(model.named_parameters())
        own = {name: p for name, p in parameters.items() if name in added and p.requires_grad}
        reached = {name for name, p in own.items() if p.grad is not None}
        frozen = [name for name, p in parameters.items() if not p.requires_grad and p.grad is not None]
        assert reached, 'no parameter of the method has a gradient'
        assert not frozen, f'frozen parameters have gradients: {frozen[:3]}'
        assert all(own[name].grad.isfinite().all() for name in reached) or not result['finite'], 'not finite'
    return dict(result, outcome='passed', method=len(own), method_with_gradient=len(reached))


def _batches(kind: set[str], config: dict, size: tuple[int, int], path: str | None):
    """What a model of this kind learns from and predicts on; None for what it does not do."""
    if 'BaseSelfSupervisor' in kind:
        return self_supervised_batch(path), None
    if 'BaseReID' in kind:
        from mmdet.structures import ReIDDataSample

        inputs = torch.rand(1, 4, 3, 256, 128, generator=torch.Generator().manual_seed(0))
        batch = dict(inputs=inputs, data_samples=[ReIDDataSample().set_gt_label(label) for label in (0, 0, 1, 1)])
        return batch, batch
    if 'BaseMOTModel' in kind:
        from mmdet.testing import demo_track_inputs

        video = dict(batch_size=1, num_frames=2, image_shapes=[(3, *size)], num_classes=1, with_mask=True)
        train = demo_track_inputs(**video, key_frames_inds=[0])
        if kind & {'ByteTrack', 'OCSORT'}:  # they train their detector
            train = detection_batch(config, size)
        elif kind & {'DeepSORT', 'StrongSORT'}:  # their parts are trained one by one
            train = None
        return train, demo_track_inputs(**video)
    if 'SemiBaseDetector' in kind:
        batch = detection_batch(config, size)
        branches = ('sup', 'unsup_teacher', 'unsup_student')
        train = {key: {branch: copy.deepcopy(value) for branch in branches} for key, value in batch.items()}
        return train, detection_batch(config, size, images=1)
    if 'GLIP' in kind and not has_key(config, 'loss_bbox'):  # its default loss does not take the head's weights
        return None, detection_batch(config, size, seed=1, images=1)
    if 'BaseDetector' in kind:
        # Some heads take one image only when they predict, as mmdet's test loaders have it.
        return detection_batch(config, size), detection_batch(config, size, seed=1, images=1)
    if 'BaseSegmentor' in kind:
        return segmentation_batch(config, size), segmentation_batch(config, size, seed=1)
    predicted = None if 'BaseRetriever' in kind else classification_batch(config, size, seed=1)
    return classification_batch(config, size), predicted


# ---- in the worker: models one after another, until the process ends or is ended ----


def work(job: dict) -> None:
    """Run the configs of ``job`` and append what happened to its record, a line each."""
    import resource
    import warnings

    warnings.simplefilter('ignore')
    resource.setrlimit(resource.RLIMIT_DATA, (job['memory'], job['memory']))
    if job['ours']:
        sys.path.insert(0, str(ROOT))
        import mona_mm  # first: its operators are what all below runs on
    else:
        from upstream import bare_mmcv_ext

        if job['reference']:
            sys.path.insert(0, job['reference'])
        bare_mmcv_ext()
    from mmengine.logging import MMLogger

    torch.set_num_threads(1)
    draw_cheaply()
    if job['peft']:
        import mona_mm.frozen.rules

        # Which parameters reach the output, found when a backbone is built, is seen in the gradients here.
        mona_mm.frozen.rules.unreached = lambda module: set()
    MMLogger.get_instance('shipped', log_level='ERROR')
    for library in LIBRARIES:
        # Configs of one library use another's models. Where one cannot be imported, those configs say so.
        with contextlib.suppress(ImportError):
            importlib.import_module(f'{library}.utils').register_all_modules(init_default_scope=False)
    with (
        tempfile.TemporaryDirectory() as folder,
        inside(job['library']),
        open(job['record'], 'a', buffering=1) as record,
    ):
        bert = small_bert(Path(folder)) if importlib.util.find_spec('transformers') else None
        for path in job['configs']:
            if time.time() > job['until']:
                return
            record.write(json.dumps(dict(event='start', config=path)) + '\n')
            entry = run_config(job['library'], path, bert, job['timeout'], job['peft'])
            for method, found in entry.get('peft', {}).items():
                if found['outcome'] == 'passed' or is_refused(found):
                    job['peft'][method].append(entry['classes'])
            record.write(json.dumps(dict(event='end', config=path, **entry)) + '\n')


def run_config(library: str, path: str, bert: str | None, timeout: float, peft: dict[str, list[str]]) -> dict:
    """Build and run the model of one config, on larger images where it fails on small ones, and say how it went.

    ``peft`` has by method the classes of models that need not be run with it again.
    """
    from mmengine.config import Config

    began = time.process_time()
    shipped = Config.fromfile(path)
    scope, config = shipped.get('default_scope') or library, shipped.model.to_dict()
    if bert:
        config = with_bert(config, bert)

    def run_plain(size):
        with stage('build'):
            model = build_model(scope, config, size)
        parameters = sum(p.numel() for p in model.parameters())
        return dict(run_model(model, config, size, path), outcome='passed', parameters=parameters)

    tried = []
    for size in own_sizes(config):
        entry = dict(attempt(partial(run_plain, size), timeout), size=size)
        if entry['outcome'] == 'passed' or entry['stage'] == 'build' or final(entry['error']):
            break
        if any(failed['error'] == entry['error'] for failed in tried):  # the size does not matter
            break
        if sum(failed['where'] == entry['where'] for failed in tried) > 1:
            break
        tried.append(entry)
    entry['seconds'] = round(time.process_time() - began, 1)
    if len(tried) > (entry in tried):
        entry['smaller'] = [[failed['size'][0], failed['error'][:200]] for failed in tried if failed is not entry]
    if peft:
        entry['classes'] = f'{config["type"]} {sorted({cls.__name__ for cls in backbone_classes(scope, config)})}'
        entry['peft'] = {}
    for method, known in peft.items():
        if entry['classes'] in known:
            entry['peft'][method] = dict(outcome='as another')
            continue
        if entry['outcome'] == 'failed' and final(entry['error']):
            entry['peft'][method] = {key: entry[key] for key in ('outcome', 'stage', 'error', 'kinds')}
            continue
        run = partial(run_with_peft, scope, config, method, entry['size'], path)
        entry['peft'][method] = attempt(run, timeout)
    return entry


def is_refused(entry: dict) -> bool:
    """Whether one of this package's errors has ended a run."""
    return 'UserError' in entry.get('kinds', ())


def attempt(run: Callable[[], dict], timeout: float) -> dict:
    """What ``run`` returns, or how it failed: after so many seconds of the processor's time at the latest."""
    import signal

    def stop(*_):
        raise TimeoutError(f'more than {timeout} seconds of the processor')

    began = time.process_time()
    signal.signal(signal.SIGPROF, stop)  # the processor's time: a busy machine is no fault of a model
    signal.setitimer(signal.ITIMER_PROF, timeout)
    try:
        entry = run()
    except Exception as error:
        cause = error.__cause__ if isinstance(error, Stage) else error
        frames = traceback.extract_tb(cause.__traceback__)
        where = frames[-1]
        entry = dict(
            outcome='failed',
            stage=str(error) if isinstance(error, Stage) else 'data',
            error=f'{type(cause).__name__}: {cause}'[:600],
            kinds=[cls.__name__ for cls in type(cause).__mro__],
            in_our_code=any(str(ROOT / 'mona_mm') in frame.filename for frame in frames),
            where=f'{where.filename.split("site-packages/")[-1]}:{where.lineno}',
        )
        del error, cause
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        gc.collect()
    return dict(entry, seconds=round(time.process_time() - began, 1))


def final(error: str) -> bool:
    """Whether a larger image cannot help against ``error``."""
    return bool(
        re.match(r'NotImplementedError|ImportError|ModuleNotFoundError|TimeoutError|MemoryError|OSError', error)
    )


# ---- in the parent ----


def run_configs(library: str, configs: list[str], ours: bool, arguments, until: float, keep) -> None:
    """Run ``configs`` in workers, handing each entry to ``keep(config, entry)``; a config that kills one is noted."""
    record = arguments.out.with_suffix(f'.{os.getpid()}.jsonl')
    left = list(configs)
    while left and time.time() < until:
        record.write_text('')
        job = dict(
            library=library,
            configs=left,
            ours=ours,
            peft=arguments.known if ours else {},
            reference=arguments.reference,
            record=str(record),
            until=until,
            timeout=arguments.timeout,
            memory=int(arguments.memory * 2**30),
        )
        process = subprocess.Popen(
            ['nice', '-n', '10', sys.executable, '-W', 'ignore', __file__, '--worker', json.dumps(job)],
            env=dict(os.environ, OMP_NUM_THREADS='1'),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        errors = process.communicate()[1]
        started = None
        for line in record.read_text().splitlines():
            entry = json.loads(line)
            config, event = entry.pop('config'), entry.pop('event')
            started = config if event == 'start' else None
            if event == 'end':
                keep(config, entry)
                left.remove(config)
        if started is not None:
            keep(started, dict(outcome='failed', stage='process', error=f'died with {process.returncode}'))
            left.remove(started)
        elif process.returncode:
            raise RuntimeError(f'the worker ended with {process.returncode}:\n{errors[-3000:]}')
    record.unlink(missing_ok=True)


def order(index: dict, done: Collection[str]) -> list[list[str]]:
    """One config of each model that is not done: the first of each type, folder, family and outline; the others.

    Each list is ordered by how many configs share the outline. The first of an outline is the one of the smallest
    numbers, unless a config of it is done; the first of a type or folder is of the outline that most configs share.
    """
    models = {}
    for path in [*done, *index]:
        if 'model' in index.get(path, ()):
            models.setdefault(index[path]['model'], path)
    common = collections.Counter(entry['outline'] for entry in index.values() if 'model' in entry)

    def keys(path):
        return index[path]['type'], Path(path).parts[:2], index[path]['family'], index[path]['outline']

    seen = {key for path in done if path in index for key in keys(path)}
    left = sorted(
        set(models.values()) - set(done),
        key=lambda path: (-common[index[path]['outline']], index[path]['magnitude'], path),
    )
    lists = []
    for number in range(4):
        lists.append([])
        for path in left:
            if keys(path)[number] not in seen:
                lists[-1].append(path)
                seen.update(keys(path))
        left = [path for path in left if path not in lists[-1]]
    return [*lists, left]


def classify(entry: dict) -> tuple[str, str]:
    """What the result of a config means, and the reason: see the head of this file."""
    from upstream import MISSING_OPERATOR, STOCK_REASONS, normalised

    if entry['outcome'] != 'failed':
        return entry['outcome'], entry.get('reason', '')
    missing = MISSING_OPERATOR.search(entry['error'])
    if missing:
        return 'missing operator', missing[1] or missing[2]
    if re.search(r'MemoryError|allocate memory|alloc_cpu|died with -9', entry['error']):
        return 'too large', 'memory'
    if entry['error'].startswith('TimeoutError'):
        return 'too large', 'time'
    stock = entry.get('stock')
    if stock and stock['outcome'] == 'failed':
        reasons = [
            next((reason for reason, pattern in STOCK_REASONS.items() if re.search(pattern, error)), normalised(error))
            for error in (entry['error'], stock['error'])
        ]
        same = normalised(stock['error']) == normalised(entry['error'])
        if same or reasons == ['needs the network'] * 2:  # which this package says in other words
            return 'stock', reasons[0]
        if MISSING_OPERATOR.search(stock['error']) and not entry.get('in_our_code', True):
            return 'in the library', f'{entry["where"]}: {normalised(entry["error"])}'
    return 'ours', f'{entry["stage"]}: {entry["error"]}'


KINDS = ('passed', 'stock', 'in the library', 'too large', 'missing operator', 'ours')
PEFT_KINDS = ('passed', 'refused', 'as another', 'not a host', 'as without', 'too large', 'missing operator', 'ours')


def classify_peft(entry: dict, method: str) -> tuple[str, str]:
    """The same for the run with a method, which may fail as the run without one has failed."""
    from upstream import normalised

    with_method = entry['peft'][method]
    if with_method['outcome'] == entry['outcome'] == 'failed' and with_method['error'] == entry['error']:
        return 'as without', classify(entry)[0]
    if is_refused(with_method):
        kind = 'not a host' if 'UnsupportedHostError' in with_method['kinds'] else 'refused'
        return kind, normalised(re.sub(r"^\w+: |'[^']*'", '', with_method['error']))
    return classify(with_method)


def verdicts(part: dict, method: str | None = None) -> dict[str, tuple[str, str]]:
    """``{config: (kind, reason)}`` of the configs of a library that have been run, plainly or with a method."""
    results = {path: entry for path, entry in part['results'].items() if path in part['index']}
    if method is None:
        return {path: classify(entry) for path, entry in results.items()}
    return {path: classify_peft(entry, method) for path, entry in results.items() if method in entry.get('peft', ())}


def summary(state: dict, peft: Collection[str] = ()) -> tuple[str, int]:
    """The Markdown summary and the number of models that fail for a reason that is ours."""
    lines, reasons, bad = [], collections.Counter(), []
    for method in (None, *peft):
        kinds = KINDS if method is None else PEFT_KINDS
        lines.append(f'| {method or "library"} | configs | models | run | outlines | run | ' + ' | '.join(kinds) + ' |')
        lines.append('|---|' + '---:|' * (lines[-1].count('|') - 2))
        for library, part in state.items():
            index, found = part['index'], verdicts(part, method)
            counts = collections.Counter(kind for kind, _ in found.values())
            models = [entry for entry in index.values() if 'model' in entry]
            sizes = (
                len(models),
                len({entry['model'] for entry in models}),
                len({index[path]['model'] for path in found}),
                len({entry['outline'] for entry in models}),
                len({index[path]['outline'] for path in found}),
            )
            lines.append(f'| {library} | ' + ' | '.join(map(str, (*sizes, *(counts[kind] for kind in kinds)))) + ' |')
            for path, (kind, reason) in found.items():
                if kind == 'ours':
                    bad.append(f'- {library}{f", {method}" if method else ""}: `{path}`: {reason}')
                elif reason:
                    reasons[library, method or '', kind, reason] += 1
        lines.append('')
    lines += ['The columns after "run" count models.', '', '| library | method | kind | reason | models |']
    lines += [
        '|---|---|---|---|---:|',
        *(f'| {" | ".join(key)} | {number} |' for key, number in sorted(reasons.items())),
    ]
    for library, part in state.items():
        errors = [entry['error'] for entry in part['index'].values() if 'error' in entry]
        read = collections.Counter(error[:100].split('\n')[0] for error in errors if error != 'no model in it')
        lines += [f'| {library} | | not a config | {error} | {number} |' for error, number in sorted(read.items())]
    return '\n'.join([*lines, '', *bad]), len(bad)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    parser.add_argument('--libraries', nargs='+', choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument('--only', metavar='REGEX', help='of the configs, those whose path matches')
    parser.add_argument('--new-style', nargs='+', type=Path, default=[], help='folders of more configs, of mmdet')
    parser.add_argument('--minutes', type=float, default=60, help='stop after so long; the next call goes on')
    parser.add_argument('--peft', nargs='+', default=[], metavar='TYPE', help='train with these methods, too')
    parser.add_argument('--batch', type=int, default=50, help='configs after which results are written')
    parser.add_argument('--again', metavar='KIND', help='forget the results of this kind first, such as "ours"')
    parser.add_argument('--reference', metavar='DIR', help='a folder with a compiled mmcv, for the run without us')
    parser.add_argument('--timeout', type=int, default=180, help='seconds of processor time a model may take')
    parser.add_argument('--memory', type=float, default=8, help='GiB that a model and its gradients may take')
    parser.add_argument('--report', action='store_true', help='only print the summary of what is there')
    parser.add_argument('--out', type=Path, default=Path('shipped_configs.json'))
    arguments = parser.parse_args()
    if arguments.worker:
        work(json.loads(arguments.worker))
        return 0

    until = time.time() + 60 * arguments.minutes
    arguments.out = arguments.out.resolve()
    state = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    sys.path.insert(0, str(ROOT))
    for library in () if arguments.report else arguments.libraries:
        part = state.setdefault(library, dict(index={}, results={}))
        if not part['index'] or arguments.new_style:
            import mona_mm  # noqa: F401  some configs import their library's models when they are read

            extra = [path.resolve() for path in arguments.new_style] if library == 'mmdet' else []
            part['index'] = read_index(library, part['index'], extra)
            arguments.out.write_text(json.dumps(state))
        for path in [p for p, kind in verdicts(part).items() if kind[0] == arguments.again]:
            del part['results'][path]
        for method in arguments.peft:
            for path in [p for p, kind in verdicts(part, method).items() if kind[0] == arguments.again]:
                del part['results'][path]['peft'][method]
    for rank in () if arguments.report else range(5):  # one of each type, folder, family, outline; then the others
        for library in arguments.libraries:
            part = state[library]
            done = [p for p, entry in part['results'].items() if set(arguments.peft) <= set(entry.get('peft', ()))]
            todo = [p for p in order(part['index'], done)[rank] if re.search(arguments.only or '', p)]
            while todo and time.time() < until:
                batch, todo = todo[: arguments.batch], todo[arguments.batch :]
                for _ in run_batch(library, part, batch, arguments, until):
                    arguments.out.write_text(json.dumps(state))
    text, ours = summary(state, arguments.peft)
    print(text)
    return 1 if ours else 0


def run_batch(
    library: str, part: dict, batch: list[str], arguments: argparse.Namespace, until: float
) -> Iterator[None]:
    """Run configs, and those whose failure may be ours again without this package; the results go into ``part``.

    Yields after each of the two, for the results to be written.
    """
    results = part['results']
    arguments.known = {
        method: sorted(
            {entry['classes'] for path, entry in results.items() if verdict.get(path) in ('passed', 'refused')}
        )
        for method in arguments.peft
        for verdict in [{path: kind for path, (kind, _) in verdicts(part, method).items()}]
    }

    def keep(path, entry):
        results[path] = entry
        found = [classify(entry), *(classify_peft(entry, method) for method in entry.get('peft', ()))]
        text = '; '.join(' '.join(verdict).strip() for verdict in found)
        print(f'{time.strftime("%X")} {entry.get("seconds")}s {path} {text}', flush=True)

    def keep_stock(path, entry):
        results[path]['stock'] = entry

    run_configs(library, batch, True, arguments, until, keep)
    yield
    doubtful = [p for p, entry in results.items() if 'stock' not in entry and classify(entry)[0] == 'ours']
    run_configs(library, doubtful, False, arguments, until + 600, keep_stock)
    yield


if __name__ == '__main__':
    sys.exit(main())
