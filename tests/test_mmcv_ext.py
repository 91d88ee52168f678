"""The stand-in for ``mmcv._ext``: how it is installed, and each operator against its formula, written as loops.

The operators are called through the public Python of ``mmcv.ops``, as the models call them. The references
work on Python floats, which are float64.
"""

import ast
import importlib
import importlib.util
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

from mona_mm.compat import mmcv_ext

# isort: split
# Only here, as importing mona_mm is what makes mmcv.ops importable.
import mmcv._ext
import pytest
import torch
from conftest import needs_gpu
from mmcv import ops
from mmcv.ops.carafe import carafe_naive
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
from mmcv.ops.sync_bn import SyncBatchNormFunction
from mmengine.registry import MODELS
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.skipif(
    Path(mmcv._ext.__file__).name != 'mmcv_ops.py',
    reason='mmcv is compiled here, so nothing stands in for it',
)

DEVICES = ['cpu', pytest.param('cuda', marks=needs_gpu)]
LOW_PRECISION = [torch.float16, torch.bfloat16]


def rand(*shape, seed=0):
    """Uniform in 0 .. 1 and float64, the same on every machine."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rand_boxes(n, seed=0):
    """``(n, 4)`` boxes, crowded enough to overlap, and ``(n,)`` scores."""
    values = rand(n, 5, seed=seed)
    corners = values[:, :2] * 60
    return torch.cat((corners, corners + 1 + values[:, 2:4] * 30), 1), values[:, 4].clone()


def whole_boxes(boxes):
    """Fewer pixels and whole ones, on which many boxes have the same IoU; each has an area."""
    return (boxes / 6).round() + torch.tensor([0, 0, 1, 1])


# ---- references ----


def reference_iou(a, b, offset):
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    intersection = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    return intersection / (sum(areas) - intersection)


def reference_nms(boxes, scores, threshold, offset=0):
    boxes, scores, kept = boxes.tolist(), scores.tolist(), []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(reference_iou(boxes[i], boxes[k], offset) <= threshold for k in kept):
            kept.append(i)
    return kept


def reference_nms_match(dets, threshold):
    *boxes, scores = zip(*dets.tolist(), strict=True)
    boxes, groups = list(zip(*boxes, strict=True)), []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        for group in groups:
            if reference_iou(boxes[i], boxes[group[0]], 0) >= threshold:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def reference_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    """In the order of mmcv's kernel: the best changes places with the first one left, the last fills each gap."""
    boxes, scores = boxes.tolist(), scores.tolist()
    left, kept = list(range(len(boxes))), []
    while left:
        place = max(range(len(left)), key=lambda place: scores[left[place]])
        left[0], left[place] = left[place], left[0]
        best = left.pop(0)
        kept.append(best)
        place = 0
        while place < len(left):
            i = left[place]
            iou = reference_iou(boxes[best], boxes[i], offset)
            if method == 'gaussian':
                scores[i] *= math.exp(-iou * iou / sigma)
            elif iou >= threshold:
                scores[i] *= 1 - iou if method == 'linear' else 0
            if scores[i] < min_score:
                last = left.pop()
                if place < len(left):
                    left[place] = last
            else:
                place += 1
    return kept, [scores[i] for i in kept]


def bilinear(image, y, x):
    """``image`` ``(H, W)`` at one point, by the weights of the four pixels around it; zero outside."""
    height, width = image.shape
    value = 0.0
    for row, column in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
        if 0 <= row < height and 0 <= column < width:
            value += (1 - abs(y - row)) * (1 - abs(x - column)) * image[row, column].item()
    return value


def roi_align_sample(image, y, x):
    """As :func:`bilinear`, but up to a pixel outside counts as the border (the convention of RoIAlign)."""
    height, width = image.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    return bilinear(image, min(max(y, 0), height - 1), min(max(x, 0), width - 1))


def roi_cells(rois, output_size, scale, sampling_ratio, aligned, offset=None, gamma=0.1):
    """For each RoI, row and column: the RoI's image, width and height, and the (y, x) of the samples of its cell."""
    rows, columns = output_size
    for k, row, column in itertools.product(range(len(rois)), range(rows), range(columns)):
        batch, *corners = rois[k].tolist()
        left, top, right, bottom = (v * scale - (0.5 if aligned else 0.0) for v in corners)
        width, height = right - left, bottom - top
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        if offset is not None:
            left += gamma * width * offset[k, 0, row, column].item()
            top += gamma * height * offset[k, 1, row, column].item()
        nx = sampling_ratio or math.ceil(width / columns)
        ny = sampling_ratio or math.ceil(height / rows)
        samples = [
            (top + (row + (iy + 0.5) / ny) * height / rows, left + (column + (ix + 0.5) / nx) * width / columns)
            for iy, ix in itertools.product(range(ny), range(nx))
        ]
        yield (k, row, column), int(batch), (width, height), samples


def reference_roi_align(images, rois, output_size, *options, mode='avg', **deform):
    output = torch.zeros(len(rois), images.size(1), *output_size, dtype=torch.float64)
    for (k, row, column), batch, _, samples in roi_cells(rois, output_size, *options, **deform):
        for c in range(images.size(1)):
            values = [roi_align_sample(images[batch, c], y, x) for y, x in samples]
            if mode == 'max':
                output[k, c, row, column] = max(values, default=-10000)  # mmcv's start on the CPU
            else:
                output[k, c, row, column] = sum(values) / max(len(values), 1)
    return output


def reference_deform_roi_pool_slopes(images, rois, output_size, *options, grad_output, offset, gamma):
    """The gradient by the offset: mmcv's formula, whose corners are clamped while the coordinates are not."""
    gradient = torch.zeros_like(offset)
    height, width = images.shape[2:]
    for (k, row, column), batch, (roi_width, roi_height), samples in roi_cells(
        rois, output_size, *options, offset=offset, gamma=gamma
    ):
        for (y, x), c in itertools.product(samples, range(images.size(1))):
            if not (-1 <= y <= height and -1 <= x <= width):
                continue
            top, left = (min(int(max(v, 0)), size - 1) for v, size in ((y, height), (x, width)))
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            corner = images[batch, c]
            across = (
                corner[bottom, right] * (y - top)
                + corner[top, right] * (bottom - y)
                + corner[bottom, left] * (top - y)
                + corner[top, left] * (y - bottom)
            )
            down = (
                corner[bottom, right] * (x - left)
                + corner[bottom, left] * (right - x)
                + corner[top, right] * (left - x)
                + corner[top, left] * (x - right)
            )
            share = grad_output[k, c, row, column] / len(samples) * gamma
            gradient[k, 0, row, column] += share * roi_width * across
            gradient[k, 1, row, column] += share * roi_height * down
    return gradient


def reference_focal_loss(logits, target, gamma, alpha, weight=None):
    output = torch.zeros_like(logits)
    for n, c in itertools.product(*map(range, logits.shape)):
        p = 1 / (1 + math.exp(-logits[n, c].item()))
        if target[n] == c:
            loss = -alpha * (1 - p) ** gamma * math.log(p)
        else:
            loss = -(1 - alpha) * p**gamma * math.log(1 - p)
        row_weight = weight[target[n]].item() if weight is not None and target[n] < logits.size(1) else 1
        output[n, c] = row_weight * loss
    return output


def deform_taps(x, offset, weight, stride, padding, dilation, groups, deform_groups):
    """Every product of a deformable convolution: output index, channel, tap, weight index, and the sample's y and x."""
    channels, (out_channels, channels_per_group, kernel_h, kernel_w) = x.size(1), weight.shape
    output_shape = (len(x), out_channels, *offset.shape[2:])
    for b, o, row, column in itertools.product(*map(range, output_shape)):
        for c, i, j in itertools.product(range(channels_per_group), range(kernel_h), range(kernel_w)):
            channel = o // (out_channels // groups) * channels_per_group + c
            tap = channel // (channels // deform_groups) * kernel_h * kernel_w + i * kernel_w + j
            y = row * stride[0] - padding[0] + i * dilation[0] + offset[b, 2 * tap, row, column].item()
            x_ = column * stride[1] - padding[1] + j * dilation[1] + offset[b, 2 * tap + 1, row, column].item()
            yield (b, o, row, column), channel, tap, (o, c, i, j), y, x_


def reference_modulated_deform_conv(x, offset, mask, weight, bias, *options):
    output = torch.zeros(len(x), len(weight), *offset.shape[2:], dtype=torch.float64)
    if bias is not None:
        output += bias[:, None, None]
    for at, channel, tap, of, y, x_ in deform_taps(x, offset, weight, *options):
        sample = bilinear(x[at[0], channel], y, x_)
        output[at] += weight[of] * mask[at[0], tap, at[2], at[3]] * sample
    return output


def reference_offset_gradient(x, offset, mask, weight, grad_output, *options):
    """By the offset: the slope above and below the row (or column) of a sample, and none from a pixel outside."""
    gradient = torch.zeros_like(offset)
    height, width = x.shape[2:]
    for at, channel, tap, of, y, x_ in deform_taps(x, offset, weight, *options):
        if not (-1 < y < height and -1 < x_ < width):
            continue
        image, (b, _, row, column) = x[at[0], channel], at
        top, left = math.floor(y), math.floor(x_)
        down = bilinear(image, top + 1, x_) - bilinear(image, top, x_)
        across = bilinear(image, y, left + 1) - bilinear(image, y, left)
        share = grad_output[at] * weight[of] * mask[b, tap, row, column]
        gradient[b, 2 * tap, row, column] += share * down
        gradient[b, 2 * tap + 1, row, column] += share * across
    return gradient


def reference_ms_deform_attn(value, shapes, locations, weights):
    batch, _, heads, channels = value.shape
    queries, points = locations.size(1), locations.size(4)
    output = torch.zeros(batch, queries, heads, channels, dtype=torch.float64)
    levels = [
        level.transpose(1, 3).unflatten(-1, (h, w))  # (B, D, heads, H, W)
        for level, (h, w) in zip(value.split([h * w for h, w in shapes], 1), shapes, strict=True)
    ]
    for b, q, head, d in itertools.product(*map(range, output.shape)):
        for index, level in enumerate(levels):
            h, w = level.shape[-2:]
            for p in range(points):
                x, y = locations[b, q, head, index, p].tolist()
                sample = bilinear(level[b, d, head], y * h - 0.5, x * w - 0.5)
                output[b, q, head, d] += weights[b, q, head, index, p].item() * sample
    return output.flatten(2)


# ---- installation ----


def run_python(code, *paths):
    """What ``code`` prints in a fresh interpreter, which has ``install_mmcv_ext`` but has not imported torch."""
    load = f"""
import importlib.util, sys
sys.path[:0] = {[str(path) for path in paths]}
spec = importlib.util.spec_from_file_location('mmcv_ext', {mmcv_ext.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
install_mmcv_ext = module.install_mmcv_ext
"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', load + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_stand_in_has_a_real_spec_and_mmengine_sees_it():
    """mmengine asks for the module's spec to decide whether mmcv has operators, and raises without one."""
    from mmengine.utils.dl_utils import mmcv_full_available

    spec = importlib.util.find_spec('mmcv._ext')
    assert spec is mmcv._ext.__spec__
    assert spec.name == 'mmcv._ext' and spec.loader is not None
    assert mmcv_full_available()


def test_installing_again_changes_nothing():
    before = list(sys.meta_path)
    mmcv_ext.install_mmcv_ext()
    assert sys.meta_path == before


@pytest.mark.slow
def test_installing_is_cheap_and_torchvision_waits_for_the_first_call():
    """Installing imports nothing heavy, and importing mmcv.ops does not yet import torchvision."""
    printed = run_python("""
install_mmcv_ext()
print([name for name in ('torch', 'mmcv', 'torchvision') if name in sys.modules])
import mmcv.ops, torch
print('torchvision' in sys.modules)
mmcv.ops.nms(torch.zeros(1, 4), torch.ones(1), 0.5)
print('torchvision' in sys.modules)
""")
    assert printed == ['[]', 'False', 'True']


def test_a_compiled_module_is_left_untouched(tmp_path):
    """With an importable mmcv._ext of its own, mmcv keeps that one, and a missing name stays an AttributeError."""
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv' / '__init__.py').touch()
    (tmp_path / 'mmcv' / '_ext.py').write_text('nms = "compiled"')
    code = 'install_mmcv_ext(); import mmcv._ext; print(mmcv._ext.nms, hasattr(mmcv._ext, "softnms"))'
    assert run_python(code, tmp_path) == ['compiled', 'False']


def test_a_missing_operator_names_itself_and_the_install():
    with pytest.raises(NotImplementedError, match=r"'roi_pool_forward'.*mim install mmcv==.*pip install"):
        ops.roi_pool(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), 2)


# Of the modules that the libraries import, what no shipped config reaches: mmdet's focal loss is the sigmoid one, its
# boxes are upright, and it imports RoIPool only to recognise it.
UNREACHED = {
    'nms_quadri',
    'nms_rotated',
    'roi_pool_backward',
    'roi_pool_forward',
    'softmax_focal_loss_backward',
    'softmax_focal_loss_forward',
}


def test_every_operator_that_the_libraries_reach_has_a_stand_in():
    """From what the sources of mmdet, mmseg and mmpretrain import, and the types that their configs name."""
    imported, named, modules = set(), {'nms', 'soft_nms'}, set()
    for library in ('mmdet', 'mmseg', 'mmpretrain'):
        folder = Path(importlib.util.find_spec(library).submodule_search_locations[0])
        for path in folder.rglob('*.py'):
            source = path.read_text()
            for module, names in re.findall(r'^\s*from (mmcv\.ops[.\w]*) import ([\w, ]+)', source, re.MULTILINE):
                modules.add(module)
                imported.update(re.findall(r'\w+', names))
            named.update(re.findall(r"type='(\w+)'", source))
    for name in imported | named:
        operator = vars(ops).get(name) or MODELS.get(name)
        modules.add(getattr(getattr(operator, '__self__', operator), '__module__', ''))

    needed = set()
    for module in modules:
        if not module.startswith('mmcv.ops.'):
            continue
        for call in ast.walk(ast.parse(Path(importlib.import_module(module).__file__).read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == 'ext_loader.load_ext':
                needed |= set(ast.literal_eval(call.args[1]))
    assert {'carafe_forward', 'deform_conv_forward', 'psamask_forward', 'sync_bn_forward_mean'} < needed
    assert needed - UNREACHED <= set(vars(mmcv._ext))


def test_the_environment_report_says_where_the_operators_come_from():
    assert 'mona_mm' in ops.get_compiler_version()
    assert ops.get_compiling_cuda_version() == 'not available'


# ---- nms ----


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.1, 0.5, 0.9])
def test_nms_matches_the_loop(device, offset, threshold):
    for seed in range(3):
        boxes, scores = rand_boxes(60, seed=seed)
        expected = reference_nms(boxes, scores, threshold, offset)
        dets, kept = ops.nms(boxes.to(device), scores.to(device), threshold, offset=offset)
        assert kept.dtype == torch.int64 and kept.tolist() == expected
        assert torch.equal(dets.cpu(), torch.cat((boxes, scores[:, None]), 1)[expected])


def test_nms_offset_counts_the_last_pixel():
    """Two boxes whose IoU is 0.5 without the last pixel and 6 / 11 with it, around a threshold of 0.52."""
    boxes, scores = torch.tensor([[0.0, 0, 10, 9], [0, 0, 5, 9]]), torch.tensor([0.9, 0.8])
    assert ops.nms(boxes, scores, 0.52, offset=0)[1].tolist() == [0, 1]
    assert ops.nms(boxes, scores, 0.52, offset=1)[1].tolist() == [0]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('tenths', range(1, 10))
@pytest.mark.parametrize('offset', [0, 1])
def test_nms_keeps_a_box_whose_iou_equals_the_threshold(device, tenths, offset):
    """As floats of the boxes' own precision, of which only some thresholds are rounded up."""
    threshold = tenths / 10
    sides = [[1000.0, 10], [100.0 * tenths, 10], [100.0 * tenths + 1, 10]]  # IoU with the first: 1, equal, above
    boxes = torch.tensor([[0.0, 0, *side] for side in sides], device=device) - torch.tensor([0, 0, offset, offset])
    scores = torch.tensor([0.9, 0.8, 0.7], device=device)
    for dtype in (torch.float32, torch.float64):
        for other, kept in ((1, [0, 1]), (2, [0])):
            pair = boxes[[0, other]].to(dtype), scores[[0, other]].to(dtype)
            assert ops.nms(*pair, threshold, offset)[1].tolist() == kept
            assert ops.nms(*(t.flip(0) for t in pair), threshold, offset)[1].tolist() == [1, 0][: len(kept)]
            if offset == 0:
                labels = torch.zeros(2, dtype=torch.int64, device=device)
                for split_thr in (10000, 1):
                    cfg = dict(type='nms', iou_threshold=threshold, split_thr=split_thr)
                    assert ops.batched_nms(*pair, labels, cfg)[1].tolist() == kept


@pytest.mark.parametrize('threshold', [0.1, 0.3, 0.7])
def test_nms_match_groups_by_the_box_that_suppresses(threshold):
    """Unlike nms, an IoU equal to the threshold suppresses; integer boxes have many."""
    for seed in range(5):
        boxes, scores = rand_boxes(60, seed=seed)
        dets = torch.cat((whole_boxes(boxes), scores[:, None]), 1)
        groups = ops.nms_match(dets, threshold)
        assert [group.tolist() for group in groups] == reference_nms_match(dets, threshold)
        assert [group.tolist() for group in ops.nms_match(dets.numpy(), threshold)] == [g.tolist() for g in groups]
    boxes = torch.tensor([[0.0, 0, 10, 10, 0.9], [0, 0, 10, 10 * threshold, 0.8]])
    assert [group.tolist() for group in ops.nms_match(boxes, threshold)] == [[0, 1]]


def test_nms_match_has_the_groups_of_mmcvs_own_test():
    dets = torch.tensor(
        [
            [49.1, 32.4, 51.0, 35.9, 0.9],
            [49.3, 32.9, 51.0, 35.3, 0.9],
            [35.3, 11.5, 39.9, 14.5, 0.4],
            [35.2, 11.7, 39.7, 15.7, 0.3],
        ]
    )
    assert [group.tolist() for group in ops.nms_match(dets, 0.6)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize('device', DEVICES)
def test_nms_keeps_the_best_and_maps_indices_back(device):
    """``max_num`` keeps the highest scores, and with a score threshold the indices are those of the input."""
    boxes, scores = rand_boxes(60)
    expected = [i for i in reference_nms(boxes, scores, 0.5) if scores[i] > 0.4]
    kept = ops.nms(boxes.to(device), scores.to(device), 0.5, score_threshold=0.4, max_num=7)[1]
    assert len(expected) > 7 and kept.tolist() == expected[:7]


@pytest.mark.parametrize('device', DEVICES)
def test_nms_keeps_the_order_of_equal_scores(device):
    """Otherwise which detections survive ``max_num`` could differ from run to run."""
    boxes = torch.arange(200.0, device=device)[:, None] * 10 + torch.tensor([0.0, 0, 5, 5], device=device)
    kept = ops.nms(boxes, torch.full((200,), 0.5, device=device), 0.5)[1]
    assert kept.tolist() == list(range(200))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('split_thr', [10000, 10])
def test_batched_nms_suppresses_within_a_class_only(device, split_thr):
    """On both of mmcv's ways: all classes at once, shifted apart, and one by one when there are many boxes."""
    boxes, scores = rand_boxes(60)
    labels = torch.arange(60) % 3
    expected = [
        i
        for label in range(3)
        for i in (labels == label)
        .nonzero()[:, 0][reference_nms(boxes[labels == label], scores[labels == label], 0.3)]
        .tolist()
    ]
    expected.sort(key=lambda i: -scores[i])
    cfg = dict(type='nms', iou_threshold=0.3, split_thr=split_thr)
    dets, kept = ops.batched_nms(boxes.to(device), scores.to(device), labels.to(device), cfg)
    assert kept.tolist() == expected
    assert torch.equal(dets[:, 4].cpu(), scores[expected])


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', LOW_PRECISION)
def test_nms_takes_the_dtypes_of_mixed_precision(device, dtype):
    """Under AMP mmdet has scores in half and decoded boxes in float32; all in half also works."""
    boxes, scores = (t.to(device) for t in rand_boxes(60))
    scores = scores.to(dtype)
    expected = reference_nms(boxes.float(), scores.float(), 0.5)
    assert ops.nms(boxes.float(), scores, 0.5)[1].tolist() == expected
    boxes = boxes.round().to(dtype)
    expected = reference_nms(boxes.float(), scores.float(), 0.5)
    assert ops.nms(boxes, scores, 0.5)[1].tolist() == expected


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('offset', [0, 1])
def test_nms_of_nothing_is_nothing(device, offset):
    """No boxes at all, and boxes that all fall below the score threshold."""
    boxes, scores = (t.to(device) for t in rand_boxes(5))
    for arguments in ((boxes[:0], scores[:0], 0.5, offset), (boxes, scores, 0.5, offset, 2.0)):
        dets, kept = ops.nms(*arguments)
        assert dets.shape == (0, 5) and kept.shape == (0,) and kept.dtype == torch.int64


# ---- soft-nms ----


@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
@pytest.mark.parametrize('offset', [0, 1])
def test_soft_nms_matches_the_loop(method, offset):
    boxes, scores = rand_boxes(40)
    expected, lowered = reference_soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
    given = scores.clone()
    dets, kept = ops.soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
    assert kept.tolist() == expected and len(expected) < 40
    torch.testing.assert_close(dets, torch.cat((boxes[expected], torch.tensor(lowered)[:, None].double()), 1))
    assert torch.equal(scores, given), 'the scores of the caller were changed'


@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
@pytest.mark.parametrize('offset', [0, 1])
def test_soft_nms_orders_equal_scores_as_the_kernel(method, offset):
    """Scores of one digit and integer boxes: which of equal ones is taken first changes what is lowered."""
    for seed in range(5):
        boxes, scores = rand_boxes(150, seed=seed)
        boxes, scores = whole_boxes(boxes), (scores * 10).round() / 10
        expected, lowered = reference_soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
        dets, kept = ops.soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
        assert kept.tolist() == expected
        torch.testing.assert_close(dets[:, 4], torch.tensor(lowered, dtype=torch.float64))


@pytest.mark.parametrize('threshold', [0.1, 0.3, 0.7])
def test_soft_nms_lowers_at_an_iou_equal_to_the_threshold(threshold):
    boxes, scores = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10 * threshold]]), torch.tensor([0.9, 0.8])
    dets, _ = ops.soft_nms(boxes, scores, threshold, method='linear')
    torch.testing.assert_close(dets[1, 4], torch.tensor(0.8 * (1 - threshold)))


def test_soft_nms_does_not_call_torch_for_every_box():
    """That made it 27 to 74 times as slow as the compiled operator."""
    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    boxes, scores = rand_boxes(100)
    with Count():
        kept = ops.soft_nms(boxes, scores, 0.3, method='linear')[1]
    assert len(kept) > 50 and len(calls) < 50


def test_soft_nms_of_degenerate_and_of_no_boxes():
    """The first example is mmcv's own: boxes without an area overlap nothing."""
    boxes = torch.tensor([[4.0, 3, 5, 3], [4, 3, 5, 4], [3, 1, 3, 1], [3, 1, 3, 1], [3, 1, 3, 1], [3, 1, 3, 1]])
    scores = torch.tensor([0.9, 0.9, 0.5, 0.5, 0.4, 0.0])
    for method in ('linear', 'gaussian'):
        dets, kept = ops.soft_nms(boxes, scores, 0.6, sigma=0.5, method=method)
        assert kept.tolist() == [0, 1, 2, 3, 4]
        assert torch.equal(dets[:, 4], scores[:5])
    dets, kept = ops.soft_nms(boxes[:0], scores[:0])
    assert dets.shape == (0, 5) and kept.shape == (0,)


# ---- RoIAlign ----

# (batch index, x1, y1, x2, y2): inside, across each border, far outside, below a pixel, and without an area
ROIS = torch.tensor(
    [
        [0, 2.3, 1.1, 9.7, 8.9],
        [1, -3.2, -2.1, 5.5, 6.4],
        [0, 7.9, 5.2, 17.3, 15.8],
        [1, 60.0, 60.0, 70.0, 70.0],
        [0, 4.2, 4.1, 4.6, 4.4],
        [1, 5.0, 5.0, 5.0, 5.0],
    ],
    dtype=torch.float64,
)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
@pytest.mark.parametrize('scale', [1.0, 0.5])
def test_roi_align_matches_the_loop(device, aligned, sampling_ratio, scale):
    images = rand(2, 2, 9, 11)
    expected = reference_roi_align(images, ROIS, (3, 2), scale, sampling_ratio, aligned)
    pool = ops.RoIAlign((3, 2), scale, sampling_ratio, aligned=aligned)
    torch.testing.assert_close(pool(images.to(device), ROIS.to(device)).cpu(), expected)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_roi_align_has_the_right_gradient(device, aligned, sampling_ratio):
    images = rand(2, 2, 6, 7).to(device).requires_grad_()

    def pool(images):
        # transposed, so that the backward meets a gradient that is not contiguous
        return ops.roi_align(images, ROIS.to(device), (3, 2), 0.5, sampling_ratio, 'avg', aligned).transpose(2, 3)

    # atomic additions on CUDA sum in any order
    assert torch.autograd.gradcheck(pool, images, nondet_tol=1e-12 if device == 'cuda' else 0.0)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_roi_align_by_the_maximum(device, aligned, sampling_ratio):
    """The forward against the loop, and the gradient, which goes to the pixels around the largest sample."""
    images, rois = rand(2, 2, 9, 11).to(device), ROIS.to(device)
    expected = reference_roi_align(images, ROIS, (3, 2), 0.5, sampling_ratio, aligned, mode='max')
    if device == 'cuda':
        expected[expected == -10000] = torch.finfo(torch.float32).min  # mmcv's other start
    pool = ops.RoIAlign((3, 2), 0.5, sampling_ratio, pool_mode='max', aligned=aligned)
    torch.testing.assert_close(pool(images, rois).cpu(), expected)
    assert torch.autograd.gradcheck(
        lambda images: pool(images, rois),
        images.requires_grad_(),
        nondet_tol=1e-12 if device == 'cuda' else 0.0,
        fast_mode=True,
    )
    assert pool(images, rois[:0]).shape == (0, 2, 3, 2)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', LOW_PRECISION)
@pytest.mark.parametrize('rois_dtype', ['same', torch.float32])
def test_roi_align_in_low_precision_rounds_once(device, dtype, rois_dtype):
    """Output and gradient come in the dtype of the input, and are those of float32 computed from the same values."""
    rois = ROIS.to(device, dtype if rois_dtype == 'same' else rois_dtype)
    results = []
    for cast, cast_rois in ((dtype, rois), (torch.float32, rois.float())):
        images = rand(2, 4, 9, 11).to(dtype).to(device, cast).requires_grad_()
        output = ops.roi_align(images, cast_rois, 3, 0.5, 0, 'avg', True)
        output.backward(torch.ones_like(output))
        assert output.dtype == images.grad.dtype == cast
        results.append((output.detach().to(dtype), images.grad.to(dtype)))
    tolerance = 0 if device == 'cpu' else 1e-2  # on CUDA the backward sums in any order, and can round differently
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('device', DEVICES)
def test_roi_align_under_autocast(device):
    """The forward of mmcv's autograd function runs with autocast on; the result is that of autocast off."""
    images, rois = rand(2, 4, 9, 11).to(device, torch.bfloat16), ROIS.to(device, torch.bfloat16)
    expected = ops.roi_align(images, rois, 3, 0.5, 0, 'avg', True)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = ops.roi_align(images, rois, 3, 0.5, 0, 'avg', True)
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected)


@pytest.mark.parametrize('device', DEVICES)
def test_roi_align_of_no_rois(device):
    """A pyramid level that no RoI falls on gives an empty result, and a gradient of zeros."""
    images = rand(2, 4, 9, 11).to(device).requires_grad_()
    output = ops.roi_align(images, ROIS[:0].to(device), 7)
    output.sum().backward()
    assert output.shape == (0, 4, 7, 7)
    assert images.grad.shape == images.shape and not images.grad.any()


# ---- deformable RoI pooling ----

INNER_ROIS = torch.tensor([[0, 2.3, 1.4, 7.7, 6.9], [1, 1.7, 2.6, 5.5, 6.4]], dtype=torch.float64)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('sampling_ratio', [0, 2])
@pytest.mark.parametrize('shifted', [True, False])
def test_deform_roi_pool_matches_the_loop(device, sampling_ratio, shifted):
    """Also the gradient by the offset, across the borders too."""
    images, offset = rand(2, 2, 9, 11), (rand(len(ROIS), 2, 3, 2, seed=1) * 8 - 4).requires_grad_(shifted)
    options = (3, 2), 0.5, sampling_ratio
    expected = reference_roi_align(images, ROIS, *options, True, offset=offset if shifted else None)
    output = ops.deform_roi_pool(
        images.to(device), ROIS.to(device), offset.to(device) if shifted else None, *options, 0.1
    )
    torch.testing.assert_close(output.cpu(), expected)
    if shifted:
        grad_output = rand(*output.shape, seed=2)
        output.backward(grad_output.to(device))
        slopes = reference_deform_roi_pool_slopes(
            images, ROIS, *options, True, grad_output=grad_output, offset=offset.detach(), gamma=0.1
        )
        torch.testing.assert_close(offset.grad.cpu(), slopes)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_deform_roi_pool_has_the_right_gradients(device, sampling_ratio):
    images = rand(2, 2, 9, 11).to(device).requires_grad_()
    offset = (rand(2, 2, 3, 2, seed=1) * 2 - 1).to(device).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *inputs: ops.deform_roi_pool(inputs[0], INNER_ROIS.to(device), inputs[1], (3, 2), 1.0, sampling_ratio),
        (images, offset),
        nondet_tol=1e-12 if device == 'cuda' else 0.0,
        fast_mode=True,
    )


@pytest.mark.parametrize('device', DEVICES)
def test_deform_roi_pool_has_the_values_of_mmcvs_own_test(device):
    """Whose offsets are zero, with gradients at the corners of the map."""
    images = torch.arange(1.0, 17).view(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(1, 1, 4, 4).to(device).requires_grad_()
    rois = torch.tensor([[0.0, 0, 0, 3, 3]], device=device)
    for pack in (ops.DeformRoIPoolPack, ops.ModulatedDeformRoIPoolPack):
        images.grad = None
        output = pack((2, 2), 1, spatial_scale=1.0, sampling_ratio=2).to(device)(images, rois)
        output.sum().backward()
        share = 0.5 if pack is ops.ModulatedDeformRoIPoolPack else 1.0  # its mask is the sigmoid of zero
        torch.testing.assert_close(output.flatten().tolist(), [v * share for v in (1.9375, 4.75, 7.5625, 10.375)])
        edge = torch.tensor([0.6875, 0.625, 0.625, 0.0625])
        torch.testing.assert_close(images.grad.cpu().view(4, 4), torch.outer(edge, edge) * share)


@pytest.mark.parametrize('dtype', LOW_PRECISION)
def test_deform_roi_pool_in_low_precision_rounds_once(dtype):
    results = []
    for cast in (dtype, torch.float32):
        images = rand(2, 2, 9, 11).to(dtype).to(cast).requires_grad_()
        offset = (rand(len(ROIS), 2, 3, 2, seed=1) * 8 - 4).to(dtype).to(cast).requires_grad_()
        output = ops.deform_roi_pool(images, ROIS.to(dtype).to(cast), offset, (3, 2), 0.5)
        output.backward(torch.ones_like(output))
        assert output.dtype == images.grad.dtype == offset.grad.dtype == cast
        results.append([t.detach().to(dtype) for t in (output, images.grad, offset.grad)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize('device', DEVICES)
def test_deform_roi_pool_of_no_rois(device):
    images = rand(2, 4, 9, 11).to(device).requires_grad_()
    offset = torch.zeros(0, 2, 7, 7, dtype=torch.float64, device=device)
    output = ops.deform_roi_pool(images, ROIS[:0].to(device), offset, 7)
    output.sum().backward()
    assert output.shape == (0, 4, 7, 7)
    assert images.grad.shape == images.shape and not images.grad.any()


# ---- focal loss ----

LOGITS = rand(6, 4) * 12 - 6
TARGET = torch.tensor([0, 3, 4, 1, 4, 2])  # 4 is background
CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.5, 3.0], dtype=torch.float64)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('weight', [None, CLASS_WEIGHT], ids=['unweighted', 'weighted'])
@pytest.mark.parametrize(('gamma', 'alpha'), [(2.0, 0.25), (0.0, 0.5), (1.5, 0.3)])
def test_focal_loss_matches_the_loop(device, weight, gamma, alpha):
    expected = reference_focal_loss(LOGITS, TARGET, gamma, alpha, weight)
    arguments = (
        LOGITS.to(device),
        TARGET.to(device),
        gamma,
        alpha,
        weight if weight is None else weight.to(device),
    )
    torch.testing.assert_close(ops.sigmoid_focal_loss(*arguments, 'none').cpu(), expected)
    torch.testing.assert_close(ops.sigmoid_focal_loss(*arguments, 'mean').cpu(), expected.sum() / 6)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('weight', [None, CLASS_WEIGHT], ids=['unweighted', 'weighted'])
@pytest.mark.parametrize('gamma', [2.0, 0.0, 1.5])
def test_focal_loss_has_the_right_gradient(device, weight, gamma):
    def loss(logits):
        weight_ = weight if weight is None else weight.to(device)
        return ops.sigmoid_focal_loss(logits, TARGET.to(device), gamma, 0.3, weight_, 'none')

    assert torch.autograd.gradcheck(loss, LOGITS.to(device, copy=True).requires_grad_())


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', LOW_PRECISION)
def test_focal_loss_in_low_precision_rounds_once(device, dtype):
    results = []
    for cast in (dtype, torch.float32):
        logits = LOGITS.to(device, dtype).to(cast).requires_grad_()
        output = ops.sigmoid_focal_loss(logits, TARGET.to(device), 2.0, 0.25, None, 'none')
        output.backward(torch.ones_like(output))
        assert output.dtype == logits.grad.dtype == cast
        results.append((output.detach().to(dtype), logits.grad.to(dtype)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_focal_loss_of_extreme_logits_is_finite():
    """Where ``log(sigmoid(x))`` overflows, a sure mistake costs its logit and a sure hit nothing."""
    logits = torch.tensor([[-200.0, 200.0], [200.0, -200.0]], requires_grad=True)
    loss = ops.sigmoid_focal_loss(logits, torch.tensor([0, 0]), 2.0, 0.25, None, 'none')
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([[50.0, 150.0], [0.0, 0.0]]))
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25, 0.75], [0.0, 0.0]]))


@pytest.mark.parametrize('device', DEVICES)
def test_focal_loss_of_no_rows(device):
    logits = torch.zeros(0, 4, device=device, requires_grad=True)
    loss = ops.sigmoid_focal_loss(logits, TARGET[:0].to(device), 2.0, 0.25, None, 'sum')
    loss.backward()
    assert loss == 0 and logits.grad.shape == (0, 4)


# ---- modulated deformable convolution ----

DEFORM = dict(stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, deform_groups=4)


def deform_inputs():
    """x, offset, mask, weight, bias: kernel 2 x 2, from 5 x 5 to 3 x 3; each input channel has offsets of its own."""
    return (
        rand(2, 4, 5, 5, seed=1),
        rand(2, 4 * 2 * 4, 3, 3, seed=2) * 4 - 2,
        rand(2, 4 * 4, 3, 3, seed=3),
        rand(4, 2, 2, 2, seed=4),
        rand(4, seed=5),
    )


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('with_bias', [True, False])
def test_modulated_deform_conv_matches_the_loop(device, with_bias):
    *inputs, bias = deform_inputs()
    bias = bias if with_bias else None
    expected = reference_modulated_deform_conv(*inputs, bias, *DEFORM.values())
    on_device = [t if t is None else t.to(device) for t in (*inputs, bias)]
    output = ops.modulated_deform_conv2d(*on_device, *DEFORM.values())
    torch.testing.assert_close(output.cpu(), expected)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('with_bias', [True, False])
def test_modulated_deform_conv_has_the_right_gradients(device, with_bias):
    inputs = [t.to(device).requires_grad_() for t in deform_inputs()]
    inputs = inputs if with_bias else [*inputs[:4], None]
    assert torch.autograd.gradcheck(
        lambda *inputs: ops.modulated_deform_conv2d(*inputs, *DEFORM.values()),
        inputs,
        nondet_tol=1e-12 if device == 'cuda' else 0.0,
        fast_mode=True,  # 20 seconds else
    )


@pytest.mark.parametrize('device', DEVICES)
def test_modulated_deform_conv_with_the_offsets_of_a_larger_map(device):
    """DyHead does this. As in mmcv's kernel the first values of each image count, in the order of memory."""
    x, offset, mask, weight, bias = (t.to(device) for t in deform_inputs())
    larger = [t.flatten(1).repeat(1, 2).unflatten(1, (-1, 3, 6)).requires_grad_() for t in (offset, mask)]
    output = ops.modulated_deform_conv2d(x, *larger, weight, bias, *DEFORM.values())
    assert torch.equal(output, ops.modulated_deform_conv2d(x, offset, mask, weight, bias, *DEFORM.values()))

    output.sum().backward()
    for tensor, small in zip(larger, (offset, mask), strict=True):
        used, unused = tensor.grad.flatten(1).chunk(2, 1)
        assert used.any() and used.shape == small.flatten(1).shape and not unused.any()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', LOW_PRECISION)
def test_modulated_deform_conv_in_low_precision_rounds_once(device, dtype):
    """Under AMP only the offset is in half; mmcv casts the others to it."""
    tensors = [t.to(device, dtype).float() for t in deform_inputs()]
    x, offset, mask, weight, bias = tensors
    output = ops.modulated_deform_conv2d(x, offset.to(dtype), mask, weight, bias, *DEFORM.values())
    expected = ops.modulated_deform_conv2d(*tensors, *DEFORM.values())
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected.to(dtype), rtol=0, atol=0)


# offsets that leave the taps on pixels, so that some lie exactly one outside; and any
OFFSETS = {'zero': lambda o: o * 0, 'whole': lambda o: o.round(), 'any': lambda o: o}


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('modulated', [True, False])
@pytest.mark.parametrize('kind', OFFSETS)
def test_deform_conv_gives_no_offset_gradient_one_pixel_outside(device, modulated, kind):
    """Every deformable convolution starts with offsets of zero, and its taps in the padding are at -1 or at H."""
    x, weight = rand(1, 2, 5, 5, seed=1), rand(2, 2, 3, 3, seed=2)
    offset = OFFSETS[kind](rand(1, 18, 5, 5, seed=3) * 4 - 2)
    mask = rand(1, 9, 5, 5, seed=4) if modulated else torch.ones(1, 9, 5, 5)
    grad_output = rand(1, 2, 5, 5, seed=5)
    options = (1, 1), (1, 1), (1, 1), 1, 1
    leaf = offset.to(device, copy=True).requires_grad_()
    if modulated:
        output = ops.modulated_deform_conv2d(x.to(device), leaf, mask.to(device), weight.to(device), None, *options)
    else:
        output = ops.deform_conv2d(x.to(device), leaf, weight.to(device), *options)
    output.backward(grad_output.to(device))
    expected = reference_offset_gradient(x, offset, mask, weight, grad_output, *options)
    assert (expected == 0).any() and expected.any()
    torch.testing.assert_close(leaf.grad.cpu(), expected)


@pytest.mark.parametrize('device', DEVICES)
def test_deform_conv_matches_the_loop(device):
    x, offset, mask, weight, _ = deform_inputs()
    expected = reference_modulated_deform_conv(x, offset, torch.ones_like(mask), weight, None, *DEFORM.values())
    output = ops.deform_conv2d(*(t.to(device) for t in (x, offset, weight)), *DEFORM.values())
    torch.testing.assert_close(output.cpu(), expected)


@pytest.mark.parametrize('device', DEVICES)
def test_deform_conv_has_the_right_gradients(device):
    x, offset, _, weight, _ = (t.to(device).requires_grad_() for t in deform_inputs())
    assert torch.autograd.gradcheck(
        lambda *inputs: ops.deform_conv2d(*inputs, *DEFORM.values()),
        (x, offset, weight),
        nondet_tol=1e-12 if device == 'cuda' else 0.0,
        fast_mode=True,
    )


@pytest.mark.parametrize('device', DEVICES)
def test_deform_conv_has_the_values_of_mmcvs_own_test(device):
    """The published numbers of its pack, offset convolution included, over a batch of ten in steps of two."""
    x = torch.tensor([[[1.0, 2, 3], [0, 1, 2], [3, 5, 2]]]).repeat(10, 1, 1, 1).to(device).requires_grad_()
    pack = ops.DeformConv2dPack(1, 1, 2, stride=1, padding=0, im2col_step=2)
    offset_weight = [
        [0.1, 0.4, 0.6, 0.1],
        [0.3, 0.2, 0.1, 0.3],
        [0.5, 0.5, 0.2, 0.8],
        [0.8, 0.3, 0.9, 0.1],
        [0.3, 0.1, 0.2, 0.5],
        [0.3, 0.7, 0.5, 0.3],
        [0.6, 0.2, 0.5, 0.3],
        [0.4, 0.1, 0.8, 0.4],
    ]
    pack.conv_offset.weight.data = torch.tensor(offset_weight).view(8, 1, 2, 2)
    pack.conv_offset.bias.data = torch.tensor([0.7, 0.1, 0.8, 0.5, 0.6, 0.5, 0.4, 0.7])
    pack.weight.data = torch.tensor([0.4, 0.2, 0.1, 0.9]).view(1, 1, 2, 2)
    pack.to(device)
    output = pack(x)
    output.mean().backward()
    close = dict(rtol=1e-3, atol=1e-3)  # the numbers have three digits
    torch.testing.assert_close(output[0, 0].cpu(), torch.tensor([[1.65, 0], [0, 0]]), **close)
    expected = torch.tensor([[-0.666, 0.204, 0], [0.03, -0.416, 0.012], [0, 0.252, 0.129]]) / 40
    torch.testing.assert_close(x.grad[3, 0].cpu(), expected, **close)
    torch.testing.assert_close(pack.weight.grad.flatten().cpu(), torch.tensor([3.62, 0, 0.4, 0.18]) / 4, **close)
    bias_grad = torch.tensor([1.44, -0.72, 0, 0, -0.1, -0.08, -0.54, -0.54]) / 4
    torch.testing.assert_close(pack.conv_offset.bias.grad.cpu(), bias_grad, **close)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', LOW_PRECISION)
def test_deform_conv_in_low_precision_rounds_once(device, dtype):
    """Under AMP only the offset is in half; mmcv casts the others to it."""
    x, offset, _, weight, _ = (t.to(device, dtype).float() for t in deform_inputs())
    output = ops.deform_conv2d(x, offset.to(dtype), weight, *DEFORM.values())
    expected = ops.deform_conv2d(x, offset, weight, *DEFORM.values())
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected.to(dtype), rtol=0, atol=0)


# ---- masked convolution ----


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(('kernel', 'padding'), [((3, 3), (1, 1)), ((1, 1), (0, 0)), ((3, 5), (1, 2))])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float16])
def test_masked_conv_is_the_convolution_where_the_mask_is_positive(device, kernel, padding, dtype):
    conv = ops.MaskedConv2d(3, 4, kernel, padding=padding).to(device, torch.float64)
    x, mask = rand(1, 3, 6, 7).to(dtype), rand(1, 6, 7, seed=1) - 0.5
    mask[0, 0, 0] = mask[0, 5, 6] = 1
    x, mask = x.to(device), mask.to(device)
    with torch.no_grad():
        expected = conv(x.double()) * (mask > 0)
        output = conv.to(dtype)(x, mask)
        tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == torch.float16 else {}
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), expected, **tolerance)
        assert not conv(x, mask * 0).any()


# ---- CARAFE ----

CARAFE = [(5, 1, 2), (3, 2, 3), (1, 4, 1)]  # kernel size, groups, scale


def reference_carafe(features, masks, kernel_size, groups, scale):
    batch, channels, height, width = features.shape
    output = torch.zeros(batch, channels, height * scale, width * scale, dtype=torch.float64)
    for b, c, row, column in itertools.product(*map(range, output.shape)):
        for i, j in itertools.product(range(kernel_size), repeat=2):
            y, x = row // scale + i - kernel_size // 2, column // scale + j - kernel_size // 2
            if 0 <= y < height and 0 <= x < width:
                tap = (c // (channels // groups) * kernel_size + i) * kernel_size + j
                output[b, c, row, column] += features[b, c, y, x] * masks[b, tap, row, column]
    return output


def carafe_inputs(kernel_size, groups, scale):
    return rand(2, 4, 3, 4, seed=1), rand(2, groups * kernel_size**2, 3 * scale, 4 * scale, seed=2)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('options', CARAFE)
def test_carafe_matches_the_loop(device, options):
    features, masks = carafe_inputs(*options)
    expected = reference_carafe(features, masks, *options)
    torch.testing.assert_close(ops.carafe(features.to(device), masks.to(device), *options).cpu(), expected)
    torch.testing.assert_close(carafe_naive(features.to(device), masks.to(device), *options).cpu(), expected)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('options', CARAFE)
def test_carafe_has_the_right_gradients(device, options):
    inputs = [t.to(device).requires_grad_() for t in carafe_inputs(*options)]
    assert torch.autograd.gradcheck(lambda *inputs: ops.carafe(*inputs, *options), inputs, fast_mode=True)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', LOW_PRECISION)
def test_carafe_in_low_precision_rounds_once(device, dtype):
    results = []
    for cast in (dtype, torch.float32):
        leaves = [t.to(device, dtype).to(cast).requires_grad_() for t in carafe_inputs(5, 1, 2)]
        output = ops.carafe(*leaves, 5, 1, 2)
        output.backward(torch.ones_like(output))
        assert {t.dtype for t in (output, *(leaf.grad for leaf in leaves))} == {cast}
        results.append([t.detach().to(dtype) for t in (output, *(leaf.grad for leaf in leaves))])
    torch.testing.assert_close(*results, rtol=0, atol=0)


# ---- point-wise spatial attention ----


def reference_psa_mask(masks, kind, size):
    batch, _, height, width = masks.shape
    output = torch.zeros(batch, height * width, height, width, dtype=masks.dtype)
    for h, w, i, j in itertools.product(range(height), range(width), *map(range, size)):
        y, x = h + i - (size[0] - 1) // 2, w + j - (size[1] - 1) // 2
        if 0 <= y < height and 0 <= x < width:
            at = (y * width + x, h, w) if kind == 'collect' else (h * width + w, y, x)
            output[:, at[0], at[1], at[2]] = masks[:, i * size[1] + j, h, w]
    return output


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('kind', ['collect', 'distribute'])
@pytest.mark.parametrize('size', [(3, 5), (9, 7), (4, 2)], ids=['smaller', 'larger', 'even'])
def test_psa_mask_matches_the_loop(device, kind, size):
    masks = rand(2, size[0] * size[1], 5, 4).to(device).requires_grad_()
    output = ops.PSAMask(kind, size)(masks)
    assert torch.equal(output.detach().cpu(), reference_psa_mask(masks.detach().cpu(), kind, size))
    assert torch.autograd.gradcheck(ops.PSAMask(kind, size), masks, fast_mode=True)
    assert torch.equal(ops.PSAMask(kind, size)(masks.half()), output.half())


# ---- synchronized batch normalization ----


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('stats_mode', ['default', 'N'])
def test_sync_batch_norm_of_one_process_is_batch_norm(device, dtype, stats_mode):
    x = (rand(3, 4, 5, 2) * 4 - 1).to(device, dtype)
    norm = torch.nn.BatchNorm2d(4, momentum=0.3).to(device)
    torch.nn.init.uniform_(norm.weight)
    torch.nn.init.uniform_(norm.bias)
    grad_output = rand(*x.shape, seed=1).to(device, dtype)

    leaf = x.clone().float().requires_grad_()
    expected = norm(leaf)
    expected.backward(grad_output.float())
    results = [expected, leaf.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]

    ours = x.clone().requires_grad_()
    weight, bias = (p.detach().clone().requires_grad_() for p in (norm.weight, norm.bias))
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    output = SyncBatchNormFunction.apply(ours, mean, var, weight, bias, 0.3, norm.eps, None, 1, stats_mode)
    output.backward(grad_output)
    assert output.dtype == ours.grad.dtype == dtype
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == torch.float16 else dict(rtol=1e-5, atol=1e-5)
    for got, value in zip((output, ours.grad, weight.grad, bias.grad, mean, var), results, strict=True):
        torch.testing.assert_close(got.float(), value, **tolerance)


def test_sync_batch_norm_counts_the_pixels_of_all_processes():
    """For the running variance, which is the unbiased one: of 2 processes with 6 pixels each, 12 / 11."""
    x, zeros, ones = rand(2, 1, 3).float(), torch.zeros(1), torch.ones(1)
    running_var = torch.zeros(1)
    mmcv._ext.sync_bn_forward_output(
        x, zeros, ones, ones, zeros, torch.zeros(1), running_var, torch.zeros_like(x), torch.zeros(1),
        torch.zeros_like(x), eps=0.0, momentum=1.0, group_size=2,
    )  # fmt: skip
    torch.testing.assert_close(running_var, torch.tensor([12 / 11]))


# ---- multi-scale deformable attention ----

SHAPES = [(3, 4), (2, 2)]


def attention_inputs():
    """value, locations, weights: 2 images, 3 queries, 2 heads, 2 levels, 2 points; some points lie outside."""
    return rand(2, 16, 2, 3, seed=1), rand(2, 3, 2, 2, 2, 2, seed=2) * 1.4 - 0.2, rand(2, 3, 2, 2, 2, seed=3)


def deform_attention(value, locations, weights):
    """As mmcv calls its kernel on CUDA (on the CPU its module would take the plain formula directly)."""
    shapes = torch.tensor(SHAPES, device=value.device)
    starts = torch.tensor([0, 12], device=value.device)
    return MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)


@pytest.mark.parametrize('device', DEVICES)
def test_ms_deform_attn_matches_the_loop(device):
    value, locations, weights = attention_inputs()
    expected = reference_ms_deform_attn(value, SHAPES, locations, weights)
    output = deform_attention(*(t.to(device) for t in (value, locations, weights)))
    torch.testing.assert_close(output.cpu(), expected)


@pytest.mark.parametrize('device', DEVICES)
def test_ms_deform_attn_has_the_right_gradients(device):
    inputs = [t.to(device).requires_grad_() for t in attention_inputs()]
    nondet_tol = 1e-12 if device == 'cuda' else 0.0
    assert torch.autograd.gradcheck(deform_attention, inputs, nondet_tol=nondet_tol)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', LOW_PRECISION)
def test_ms_deform_attn_in_low_precision_rounds_once(device, dtype):
    """Under AMP only the value is in half; mmcv casts the others to it."""
    value, locations, weights = (t.to(device, dtype) for t in attention_inputs())
    leaf = value.clone().requires_grad_()
    output = deform_attention(leaf, locations.float(), weights.float())
    output.sum().backward()
    assert output.dtype == leaf.grad.dtype == dtype
    expected = deform_attention(value.float(), locations.float(), weights.float())
    torch.testing.assert_close(output, expected.to(dtype))


@pytest.mark.parametrize('device', DEVICES)
def test_ms_deform_attn_gives_no_gradient_one_pixel_outside(device):
    """As mmcv's kernel: of points on each side of a map of 4 x 4 at -1, at 0.5 and at 4 pixels, only the second."""
    pixels = torch.tensor([-1.0, 0.5, 4.0], dtype=torch.float64)
    points = torch.stack((torch.cat((pixels, torch.ones(3))), torch.cat((torch.ones(3), pixels))), 1)  # x, y
    locations = ((points + 0.5) / 4).view(1, 6, 1, 1, 1, 2).to(device).requires_grad_()
    value, weights = rand(1, 16, 1, 2).to(device), torch.ones(1, 6, 1, 1, 1, dtype=torch.float64, device=device)
    shapes, starts = torch.tensor([[4, 4]], device=device), torch.tensor([0], device=device)
    MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64).sum().backward()
    moved = locations.grad.view(6, 2).any(1).tolist()
    assert moved == [False, True, False, False, True, False]
