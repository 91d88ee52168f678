"""Predict images without annotations with any trained model of the three libraries."""

import os.path as osp
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from logging import WARNING
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mona_mm.checkpoint.base import whole_model_base
from mona_mm.checkpoint.delta_file import SUFFIX
from mona_mm.commands.cli import build_runner, close_log_file, use_temporary
from mona_mm.config.load import adapt_to_device
from mona_mm.config.nodes import datasets
from mona_mm.config.run_hooks import add_hooks
from mona_mm.errors import ConfigError, MissingFileError
from mona_mm.inference.sources import Source, frames
from mona_mm.own_data.images import truncation
from mona_mm.report.evaluator import ignores_orientation
from mona_mm.report.pictures import reading_flags
from mona_mm.spt_plans.plans import require_plan
from mona_mm.type_names import enter_scope, is_type, look_up

_READERS = 4  # processes that read images, on a machine with a GPU
_WAITING = 4  # batches of images that wait for others of their size


@dataclass
class Loaded:
    """A model with its weights, ready to predict.

    Args:
        model: the model, in a wrapper with test-time augmentation.
        classes: the names of its classes.
        pipeline: the configs of the transforms of an image, without those that load annotations.
    """

    model: nn.Module
    classes: list[str]
    pipeline: list[dict[str, Any]]


@dataclass
class Predicted:
    """A prediction: the name of what to write for it, the image file or video, and the model's sample; or what was
    wrong with the file. An image is read as it is ``stored`` if the pipeline leaves the rotation in EXIF data out."""

    name: str
    path: str
    sample: Any = None
    frame: np.ndarray | None = None
    error: str | None = None
    stored: bool = False

    def image(self) -> np.ndarray:
        """The image in BGR, read as the libraries read it."""
        if self.frame is not None:
            return self.frame
        return cv2.imread(self.path, reading_flags(self.stored))


def load_model(cfg: Config, weights: str, allow_other_base: bool = False) -> Loaded:
    """Build the model of a config and load a whole checkpoint or a delta into it, checked as for a test.

    Args:
        cfg: the config, which is changed.
        weights: the file, or an address.
        allow_other_base: whether a delta may be loaded on another base than its own.

    Raises:
        MissingFileError: if there is no such file.
        UserError: if it does not fit.
    """
    if '://' not in weights and not osp.isfile(weights):
        raise MissingFileError(f'There is no checkpoint {weights}.')
    adapt_to_device(cfg)
    add_hooks(cfg)
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if not is_type(hook, 'mona_mm.RunReportHook')]
    if not any(is_type(hook, 'mona_mm.LoadCheckHook') for hook in cfg.custom_hooks):
        cfg.custom_hooks = [*cfg.custom_hooks, dict(type='mona_mm.LoadCheckHook')]
    require_plan(cfg, (osp.dirname(weights),))
    pipeline = _pipeline(cfg)
    cfg.load_from, cfg.resume, cfg.launcher, cfg.log_level = weights, False, 'none', 'WARNING'
    base = whole_model_base(cfg, weights) if weights.endswith(SUFFIX) else None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        use_temporary(cfg, folder)
        runner = build_runner(cfg, base, allow_other_base)
        checkpoint = runner.load_checkpoint(weights)
        close_log_file(runner)
    meta = ((checkpoint or {}).get('meta') or {}).get('dataset_meta') or {}
    classes = meta.get('classes') or meta.get('CLASSES') or _classes(cfg)
    model = runner.model.eval()
    return Loaded(model, [str(name) for name in classes or ()], pipeline)


def _pipeline(cfg: Config) -> list[dict[str, Any]]:
    """The transforms of the test data, without those that load annotations."""
    dataset = next(datasets(cfg, 'test'), None)
    if dataset is None or not dataset.get('pipeline'):
        raise ConfigError(f'{cfg.filename} has no test_dataloader with a pipeline, which would say how to load images.')
    return _without_annotations(dataset['pipeline'])


def _without_annotations(steps: Sequence[Any]) -> list[Any]:
    kept = []
    for step in steps:
        if isinstance(step, dict) and is_type(step, 'TestTimeAug'):
            branches = [_without_annotations(branch) for branch in step['transforms']]
            kept.append({**step, 'transforms': [branch for branch in branches if branch]})
        elif not is_type(step, 'LoadAnnotations', 'LoadPanopticAnnotations', 'FilterAnnotations'):
            kept.append(step)
    return kept


def _classes(cfg: Config) -> Sequence[str] | None:
    """The classes of the config's test data, by its config or by its class."""
    dataset = next(datasets(cfg, 'test'))
    enter_scope(cfg)
    with DATASETS.switch_scope_and_registry(None) as registry:
        cls = look_up(registry, dataset.get('type'))
    given = (dataset.get('metainfo') or {}).get('classes')
    return given if isinstance(given, list | tuple) else getattr(cls, 'METAINFO', {}).get('classes')


def predict(loaded: Loaded, sources: Sequence[Source], batch: int = 1, every: int = 1) -> Iterator[Predicted]:
    """Predict images and the frames of videos.

    Images of the same size after the test pipeline are predicted together, so that none is padded for another and the
    result does not depend on the batch. The order is that in which batches are full.

    Args:
        loaded: the model.
        sources: the images and videos.
        batch: the largest number of images at a time.
        every: of a video, every n-th frame is predicted.
    """
    pipeline = Compose(loaded.pipeline)
    waiting: dict[tuple, list[tuple[Predicted, dict]]] = {}
    for item, data in _prepared(pipeline, sources, every):
        if data is None:
            yield item
            continue
        group = waiting.setdefault(_shape(data), [])
        group.append((item, data))
        if len(group) == batch:
            yield from _run(loaded.model, waiting.pop(_shape(data)))
        elif sum(map(len, waiting.values())) >= _WAITING * batch:
            yield from _run(loaded.model, waiting.pop(max(waiting, key=lambda shape: len(waiting[shape]))))
    for group in waiting.values():
        yield from _run(loaded.model, group)


def _run(model: nn.Module, group: list[tuple[Predicted, dict]]) -> Iterator[Predicted]:
    with torch.no_grad():
        samples = model.test_step(pseudo_collate([data for _, data in group]))
    for (item, _), sample in zip(group, samples, strict=True):
        item.sample = sample
        yield item


def _prepared(pipeline: Compose, sources: Sequence[Source], every: int) -> Iterator[tuple[Predicted, dict | None]]:
    """Yield images after the pipeline; None in place of those that cannot be read."""
    files = [source for source in sources if not source.is_video]
    readers = min(_READERS, len(files) // 16) if torch.cuda.is_available() else 0
    yield from DataLoader(_Files(pipeline, files), batch_size=None, num_workers=readers)
    for source in sources:
        if source.is_video:
            number = None
            for number, image in frames(source.path, every):
                item = Predicted(osp.join(source.name, f'{number:06d}'), source.path, frame=image)
                yield item, _after_loading(pipeline)(_frame(image, source.path))
            if number is None:
                yield Predicted(source.name, source.path, error='no frame of this video can be read'), None


class _Files(Dataset):
    """Image files after a pipeline."""

    def __init__(self, pipeline: Compose, sources: Sequence[Source]) -> None:
        self.pipeline = pipeline
        self.sources = sources
        self.stored = ignores_orientation(self)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[Predicted, dict | None]:
        source = self.sources[index]
        item = Predicted(source.name, source.path, stored=self.stored)
        try:
            item.error = truncation(source.path) or None
            data = None if item.error else self.pipeline(dict(img_path=source.path, img_id=index))
        except Exception as error:  # a damaged file can make a reader raise anything
            data, item.error = None, f'{type(error).__name__}: {error}'.splitlines()[0]
        if data is None and item.error is None:
            item.error = 'the file is not an image that can be read'
        return item, data


def _after_loading(pipeline: Compose) -> Compose:
    """A pipeline without its first transform, which reads the file."""
    return Compose(pipeline.transforms[1:])


def _frame(image: np.ndarray, path: str) -> dict[str, Any]:
    shape = image.shape[:2]
    return dict(img=image, img_path=path, img_id=0, img_shape=shape, ori_shape=shape, height=shape[0], width=shape[1])


def _shape(data: dict[str, Any]) -> tuple:
    inputs = data['inputs']
    return tuple(map(_shape_of, inputs)) if isinstance(inputs, list | tuple) else _shape_of(inputs)


def _shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


class Clock:
    """Count images and measure their time, without that of loading the model."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.images = 0

    def text(self) -> str:
        """How many images there were, in what time."""
        seconds = time.perf_counter() - self.begin
        return f'{self.images} images in {seconds:.1f} s, {self.images / max(seconds, 1e-9):.2f} images a second'


def warn(item: Predicted) -> None:
    """Log what is wrong with an image."""
    print_log(f'{item.path} is left out: {item.error}', logger='current', level=WARNING)
