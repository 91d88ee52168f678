"""Export models to ONNX, and compare what onnxruntime computes with what the model does, on real images."""

import importlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import Compose, pseudo_collate
from torch import Tensor, nn
from torch.nn import functional as F

from mona_mm.checkpoint.merge import merge, unmergeable
from mona_mm.errors import UnreadableImageError, UserError
from mona_mm.inference.predict import Loaded
from mona_mm.methods.base import deploy
from mona_mm.own_data.images import read_header

_LARGEST_RATIO = 16 / 1000  # of the sizes of a box and its anchor, the default of mmdet's coder
_ROIS = 16  # regions of an image with which the heads of a two-stage detector are compared
_EXPORTERS = dict(
    torchscript=dict(dynamo=False, opset_version=17),
    dynamo=dict(dynamo=True, opset_version=18, verbose=False),
)
"""torch's exporters to try, with their options; the second is the one of torch.export."""


@dataclass
class Part:
    """A part of a model that becomes one file.

    Args:
        name: its name within the model; empty for the part that begins with the image.
        module: maps tensors to a tuple of tensors.
        examples: the inputs of each comparison, the first of which are those that are exported with.
        inputs: the names of the inputs.
        outputs: the names of the outputs, for those that have one.
    """

    name: str
    module: nn.Module
    examples: list[tuple[Tensor, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()


@dataclass
class Exported:
    """A written file, the exporter that made it, and the largest difference to the model, relative to the largest value
    of each output."""

    file: Path
    exporter: str
    outputs: list[str]
    difference: float


class ImagesToOutputs(nn.Module):
    """A model from images to tensors: RGB from 0 to 255, normalised within, so that nothing has to be done outside.

    Args:
        model: the model.
        function: maps normalised images to a tuple of tensors.
        rgb: whether the model expects RGB, and not BGR.
    """

    def __init__(self, model: nn.Module, function: Callable[[Tensor], tuple[Tensor, ...]], rgb: bool) -> None:
        super().__init__()
        self.model = model
        self.rgb = rgb
        self._function = function
        preprocessor = model.data_preprocessor
        shape = (1, -1, 1, 1)
        mean, std = getattr(preprocessor, 'mean', None), getattr(preprocessor, 'std', None)
        self.register_buffer('mean', torch.zeros(shape[:1] + (3, 1, 1)) if mean is None else mean.float().view(shape))
        self.register_buffer('std', torch.ones(shape[:1] + (3, 1, 1)) if std is None else std.float().view(shape))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self._function(((images if self.rgb else images.flip(1)) - self.mean) / self.std)

    def images_of(self, normalised: Tensor) -> Tensor:
        """The images from which the model's own preprocessing has made these."""
        images = normalised * self.std + self.mean
        return images if self.rgb else images.flip(1)


def require_packages(*names: str) -> None:
    """Check that packages are there that only an export needs.

    Raises:
        UserError: if one is not; it names the command that installs it.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(f'Exporting needs {name}: pip install onnx onnxscript onnxruntime') from None


def settle(model: nn.Module) -> str:
    """Merge the method of a model into its weights, or make what cannot be merged as small as it gets, in place.

    Returns:
        What was done, in words.
    """
    left = unmergeable(model)
    if not left:
        merge(model)
        return 'the method, if there was one, is merged into the weights: a stock model'
    folded = deploy(model)
    form = f', {folded} of its modules in their form for inference' if folded else ''
    return f'{", ".join(left)} cannot be merged, and stays inside{form}'


def normalised_inputs(loaded: Loaded, images: Sequence[str], size: tuple[int, int] | None) -> list[Tensor]:
    """Images ``(1, 3, H, W)`` after the test pipeline and the model's preprocessing, all of one size.

    Args:
        loaded: the model.
        images: the files.
        size: the height and width; None for those of the first image.

    Raises:
        UnreadableImageError: if an image cannot be read.
    """
    pipeline, made = Compose(loaded.pipeline), []
    for number, image in enumerate(images):
        problem = read_header(image).problem
        if problem:
            raise UnreadableImageError(f'--images: {image} cannot be read: {problem}.')
        data = pipeline(dict(img_path=image, img_id=number))
        made.append(loaded.model.data_preprocessor(pseudo_collate([data]), False)['inputs'].float())
    size = size or tuple(made[0].shape[-2:])
    return [
        tensor if tuple(tensor.shape[-2:]) == size else F.interpolate(tensor, size, mode='bilinear') for tensor in made
    ]


def parts_of(library: str, model: nn.Module, rgb: bool, inputs: Sequence[Tensor]) -> Iterator[Part]:
    """The parts into which a model is exported.

    A classifier gives ``scores``; a segmentor ``logits`` of the size of the image; a detector with anchors ``boxes``
    and ``scores`` of all of them, before non-maximum suppression; a two-stage detector its feature maps and the
    ``boxes`` and ``scores`` of its proposals, and one part more for each head that maps the features of regions. Other
    detectors give the maps of their head.

    Args:
        library: the library of the model.
        model: the model.
        rgb: whether it expects RGB.
        inputs: normalised images.
    """
    functions = dict(mmpretrain=_classifier, mmseg=_segmentor, mmdet=_detector)
    function, names = functions[library](model, tuple(inputs[0].shape[-2:]))
    module = ImagesToOutputs(model, function, rgb).eval()
    yield Part('', module, [(module.images_of(tensor),) for tensor in inputs], ('images',), names)
    if hasattr(model, 'roi_head') and _decodes(getattr(model, 'rpn_head', None)):
        yield from _region_parts(model, inputs)


def _classifier(model: nn.Module, size: tuple[int, int]) -> tuple[Callable, tuple[str, ...]]:
    several = any('MultiLabel' in cls.__name__ for cls in type(model.head).__mro__)

    def function(images: Tensor) -> tuple[Tensor, ...]:
        logits = model(images, mode='tensor')
        logits = logits[-1] if isinstance(logits, list | tuple) else logits
        return (logits.sigmoid() if several else logits.softmax(1),)

    return function, ('scores',)


def _segmentor(model: nn.Module, size: tuple[int, int]) -> tuple[Callable, tuple[str, ...]]:
    def function(images: Tensor) -> tuple[Tensor, ...]:
        metas = [dict(img_shape=size, ori_shape=size, pad_shape=size)] * len(images)
        return (model.encode_decode(images, metas),)

    return function, ('logits',)


def _detector(model: nn.Module, size: tuple[int, int]) -> tuple[Callable, tuple[str, ...]]:
    two_stages = hasattr(model, 'roi_head')
    head = getattr(model, 'rpn_head' if two_stages else 'bbox_head', None)
    with_anchors = _decodes(head)

    def function(images: Tensor) -> tuple[Tensor, ...]:
        features = model.extract_feat(images)
        maps = head(features) if head is not None else model(images, None, mode='tensor')
        found = decoded(head, maps, size) if with_anchors else tuple(_tensors_in(maps))
        return (*found, *features) if two_stages else found

    return function, ('boxes', 'scores') if with_anchors else ()


def _decodes(head: Any) -> bool:
    """Whether :func:`decoded` can read the outputs of a head: scores and deltas of anchors, and nothing else."""
    coder = type(getattr(head, 'bbox_coder', None)).__name__
    return coder == 'DeltaXYWHBBoxCoder' and hasattr(head, 'prior_generator') and not hasattr(head, 'loss_centerness')


def decoded(head: nn.Module, maps: Sequence[Sequence[Tensor]], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The boxes ``(N, A, 4)`` and the scores ``(N, A, C)`` of all anchors.

    Args:
        head: a head with anchors.
        maps: its outputs, the scores and the deltas of each level.
        size: the height and width of the image, within which boxes are clipped.
    """
    scores, boxes = [], []
    priors = head.prior_generator.grid_priors([tuple(m.shape[-2:]) for m in maps[0]], device=maps[0][0].device)
    for of_level, deltas, anchors in zip(*maps, priors, strict=True):
        count = len(of_level)
        logits = of_level.permute(0, 2, 3, 1).reshape(count, -1, head.cls_out_channels)
        scores.append(logits.sigmoid() if head.use_sigmoid_cls else logits.softmax(-1)[..., :-1])
        flat = deltas.permute(0, 2, 3, 1).reshape(-1, 4)
        boxes.append(_moved(head.bbox_coder, anchors.repeat(count, 1), flat, size).reshape(count, -1, 4))
    return torch.cat(boxes, 1), torch.cat(scores, 1)


def _moved(coder: Any, anchors: Tensor, deltas: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes ``(N, 4)`` from anchors and their deltas, as in R-CNN (arXiv:1311.2524): the centre moves by shares of the
    anchor's size, and the size is multiplied by exponentials.

    mmdet's own decoding takes another way while it is exported, through a module that it has no more.
    """
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    centre, sides = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    shift, limit = sides * deltas[:, :2], abs(math.log(_LARGEST_RATIO))
    if coder.add_ctr_clamp:
        shift, growth = shift.clamp(-coder.ctr_clamp, coder.ctr_clamp), deltas[:, 2:].clamp(max=limit)
    else:
        growth = deltas[:, 2:].clamp(-limit, limit)
    centre, half = centre + shift, sides * growth.exp() / 2
    boxes = torch.cat([centre - half, centre + half], 1)
    return boxes.clamp(min=0).minimum(boxes.new_tensor(size[::-1] * 2)) if coder.clip_border else boxes


class _Tuple(nn.Module):
    """A module whose outputs, however they are nested, are one tuple of tensors."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(_tensors_in(self.module(*inputs)))


def _region_parts(model: nn.Module, inputs: Sequence[Tensor]) -> Iterator[Part]:
    """The heads of a two-stage detector, with the features of the best proposals of each image."""
    roi_head = model.roi_head
    size = tuple(inputs[0].shape[-2:])
    with torch.no_grad():
        features = [model.extract_feat(tensor) for tensor in inputs]
        proposals = []
        for maps in features:
            boxes, scores = decoded(model.rpn_head, model.rpn_head(maps), size)
            best = boxes[0, scores[0, :, 0].topk(min(_ROIS, scores.shape[1])).indices]
            proposals.append(torch.cat([torch.zeros(len(best), 1), best], 1))
    for kind in ('bbox', 'mask'):
        heads, extractors = (getattr(roi_head, f'{kind}_{part}', None) for part in ('head', 'roi_extractor'))
        if heads is None:
            continue
        several = isinstance(heads, nn.ModuleList)
        extractors = (
            extractors if isinstance(extractors, nn.ModuleList) else [extractors] * (len(heads) if several else 1)
        )
        for number, (head, extract) in enumerate(zip(heads if several else [heads], extractors, strict=True)):
            with torch.no_grad():
                examples = [
                    (extract(maps[: extract.num_inputs], rois),) for maps, rois in zip(features, proposals, strict=True)
                ]
            name = f'{kind}_head.{number}' if several else f'{kind}_head'
            outputs = ('scores', 'deltas') if kind == 'bbox' else ('masks',)
            yield Part(name, _Tuple(head).eval(), examples, ('regions',), outputs)


def _tensors_in(node: Any) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, list | tuple):
        for item in node:
            yield from _tensors_in(item)


def export_part(part: Part, file: Path, tolerance: float, metadata: dict[str, Any]) -> Exported:
    """Export a part by the first of torch's exporters whose file computes the same.

    Args:
        part: the part.
        file: the file to write.
        tolerance: the largest difference, relative to the largest value of each output.
        metadata: what to write into the file beside the graph.

    Raises:
        UserError: if none does; it says what was wrong with each.
    """
    with torch.no_grad():
        expected = [part.module(*example) for example in part.examples]
    names = [*part.outputs, *(f'output_{i}' for i in range(len(part.outputs), len(expected[0])))]
    problems = []
    for exporter, options in _EXPORTERS.items():
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter('ignore')
                torch.onnx.export(
                    part.module, part.examples[0], str(file), input_names=list(part.inputs), output_names=names,
                    **options,
                )  # fmt: skip
            difference = _compare(part, file, expected)
        except Exception as error:  # exporters and runtimes raise whatever their parts do
            lines = str(error).strip().splitlines() or ['']
            problems.append(f'{exporter}: {type(error).__name__}: {lines[0]}')
            continue
        if difference <= tolerance:
            _describe(file, metadata)
            return Exported(file, exporter, names, difference)
        problems.append(f'{exporter}: differs from the model by {difference:.1e} of the largest value')
    file.unlink(missing_ok=True)
    raise UserError(f'{part.name or "The model"} cannot be exported. {"; ".join(problems)}')


def _compare(part: Part, file: Path, expected: Sequence[Sequence[Tensor]]) -> float:
    """The largest difference between onnxruntime and the model, relative to the largest value of each output."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    inputs = [node.name for node in session.get_inputs()]
    largest = 0.0
    for example, outputs in zip(part.examples, expected, strict=True):
        given = {name: tensor.numpy() for name, tensor in zip(inputs, example, strict=True)}
        for found, own in zip(session.run(None, given), outputs, strict=True):
            own = own.numpy()
            if found.shape != own.shape:
                raise UserError(f'an output of shape {found.shape} in place of {own.shape}')
            largest = max(largest, float(np.abs(found - own).max()) / max(float(np.abs(own).max()), 1e-12))
    return largest


def _describe(file: Path, metadata: dict[str, Any]) -> None:
    """Write metadata into the file, as texts or JSON by name."""
    import onnx

    model = onnx.load(str(file))
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    onnx.helper.set_model_props(model, texts)
    onnx.save(model, str(file))
