"""Test-time augmentation for any config: what the model says of an image and of its mirror image is merged."""

from copy import deepcopy
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS

from mona_mm.config.nodes import datasets
from mona_mm.errors import ConfigError
from mona_mm.type_names import enter_scope, look_up, type_name

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')

_MODELS = dict(mmdet='mmdet.DetTTAModel', mmseg='mmseg.SegTTAModel', mmpretrain='mmpretrain.AverageClsScoreTTA')
_FLIPS = dict(mmdet='mmdet.RandomFlip', mmseg='mmseg.RandomFlip', mmpretrain='mmpretrain.RandomFlip')


def library_of(cfg: Config) -> str:
    """The library of a config's model: ``'mmdet'``, ``'mmseg'`` or ``'mmpretrain'``.

    Raises:
        ConfigError: if it is of none of them.
    """
    enter_scope(cfg)
    model = cfg.model
    while 'backbone' not in model and (inside := model.get('base') or model.get('module')):
        model = inside  # a PeftModel or FrozenModel, or a wrapper for test-time augmentation
    with MODELS.switch_scope_and_registry(None) as registry:
        cls = look_up(registry, model.get('type'))
    for base in getattr(cls, '__mro__', ()):
        library = base.__module__.partition('.')[0]
        if library in LIBRARIES:
            return library
    raise ConfigError(f'{type_name(model.get("type"))} is a model of none of {", ".join(LIBRARIES)}.')


def use_tta(cfg: Config) -> None:
    """Set a config to test with test-time augmentation, in place: its own ``tta_model`` and ``tta_pipeline``, or else
    the image and its mirror image.

    Raises:
        ConfigError: if mmdet cannot merge what the model predicts (masks).
    """
    library = library_of(cfg)
    if library == 'mmdet' and _predicts_masks(cfg.model):
        raise ConfigError('--tta: mmdet merges boxes, but no masks, and this model predicts masks. Leave --tta out.')
    wrapper = dict(cfg.get('tta_model') or dict(type=_MODELS[library]))
    if library == 'mmdet':
        wrapper.setdefault('tta_cfg', dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=_most_boxes(cfg.model)))
    for dataset in datasets(cfg, 'test'):
        dataset['pipeline'] = deepcopy(cfg.get('tta_pipeline')) or mirrored(dataset['pipeline'], library)
    cfg.model = {**wrapper, 'module': cfg.model}


def mirrored(pipeline: list[dict[str, Any]], library: str) -> list[dict[str, Any]]:
    """A test pipeline whose last step packs the image as it is, and once more mirrored.

    The first view is the unchanged one, since its annotations are those that the result is compared with.
    """
    *steps, pack = deepcopy(list(pipeline))
    if pack.get('meta_keys') is not None:
        pack['meta_keys'] = tuple(dict.fromkeys([*pack['meta_keys'], 'flip', 'flip_direction']))
    elif library == 'mmdet':
        keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
        pack['meta_keys'] = keys
    flip = dict(type=_FLIPS[library], prob=1.0)
    if library != 'mmpretrain':
        flip['direction'] = 'horizontal'
    return [*steps, dict(type='TestTimeAug', transforms=[[{**flip, 'prob': 0.0}, flip], [pack]])]


def _predicts_masks(node: Any) -> bool:
    if isinstance(node, dict):
        return any((key == 'mask_head' and value) or _predicts_masks(value) for key, value in dict.items(node))
    return isinstance(node, list | tuple) and any(map(_predicts_masks, node))


def _most_boxes(model: dict[str, Any]) -> int:
    """The largest number of boxes of an image that a detector returns."""
    test_cfg = (model.get('base') or model).get('test_cfg') or {}
    return (test_cfg.get('rcnn') or test_cfg).get('max_per_img', 100)
