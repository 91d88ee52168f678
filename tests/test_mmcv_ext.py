"""The stand-in for ``mmcv._ext``: how it is installed, and each operator against its formula, written as loops.

The operators are called through the public Python of ``mmcv.ops``, as the models call them. The references
work on Python floats, which are float64.
"""

import importlib.util
import itertools
import math
import subprocess
import sys
from pathlib import Path

from mona_mm.compat import mmcv_ext

# isort: split
# Only here, as importing mona_mm is what makes mmcv.ops importable.
import mmcv._ext
import pytest
import torch
from mmcv import ops
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

pytestmark = pytest.mark.skipif(
    Path(mmcv._ext.__file__).name != 'mmcv_ops.py',
    reason='mmcv is compiled here, so nothing stands in for it',
)

DEVICES = [
    'cpu',
    pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')),
]
LOW_PRECISION = [torch.float16, torch.bfloat16]


def rand(*shape, seed=0):
    """Uniform in 0 .. 1 and float64, the same on every machine."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rand_boxes(n, seed=0):
    """``(n, 4)`` boxes, crowded enough to overlap, and ``(n,)`` scores."""
    values = rand(n, 5, seed=seed)
    corners = values[:, :2] * 60
    return torch.cat((corners, corners + 1 + values[:, 2:4] * 30), 1), values[:, 4].clone()


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


def reference_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    boxes, scores = boxes.tolist(), scores.tolist()
    left, kept = list(range(len(boxes))), []
    while left:
        best = max(left, key=lambda i: scores[i])
        kept.append(best)
        left.remove(best)
        for i in left:
            iou = reference_iou(boxes[best], boxes[i], offset)
            if method == 'gaussian':
                scores[i] *= math.exp(-iou * iou / sigma)
            elif iou >= threshold:
                scores[i] *= 1 - iou if method == 'linear' else 0
        left = [i for i in left if scores[i] >= min_score]
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


def reference_roi_align(images, rois, output_size, scale, sampling_ratio, aligned):
    rows, columns = output_size
    output = torch.zeros(len(rois), images.size(1), rows, columns, dtype=torch.float64)
    for k, c, row, column in itertools.product(*map(range, output.shape)):
        batch, *corners = rois[k].tolist()
        left, top, right, bottom = (v * scale - (0.5 if aligned else 0.0) for v in corners)
        width, height = right - left, bottom - top
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        nx = sampling_ratio or math.ceil(width / columns)
        ny = sampling_ratio or math.ceil(height / rows)
        total = sum(
            roi_align_sample(
                images[int(batch), c],
                top + (row + (iy + 0.5) / ny) * height / rows,
                left + (column + (ix + 0.5) / nx) * width / columns,
            )
            for iy, ix in itertools.product(range(ny), range(nx))
        )
        output[k, c, row, column] = total / max(nx * ny, 1)
    return output


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


def reference_modulated_deform_conv(x, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups):
    batch, channels, _, _ = x.shape
    out_channels, channels_per_group, kernel_h, kernel_w = weight.shape
    output = torch.zeros(batch, out_channels, *offset.shape[2:], dtype=torch.float64)
    for b, o, row, column in itertools.product(*map(range, output.shape)):
        total = bias[o].item() if bias is not None else 0.0
        for c, i, j in itertools.product(range(channels_per_group), range(kernel_h), range(kernel_w)):
            channel = o // (out_channels // groups) * channels_per_group + c
            tap = channel // (channels // deform_groups) * kernel_h * kernel_w + i * kernel_w + j
            y = row * stride[0] - padding[0] + i * dilation[0] + offset[b, 2 * tap, row, column].item()
            x_ = column * stride[1] - padding[1] + j * dilation[1] + offset[b, 2 * tap + 1, row, column].item()
            sample = bilinear(x[b, channel], y, x_)
            total += weight[o, c, i, j].item() * mask[b, tap, row, column].item() * sample
        output[b, o, row, column] = total
    return output


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


def test_max_pooling_is_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"'roi_align' with pool_mode='max'.*pip install"):
        ops.RoIAlign(2, pool_mode='max')(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5))


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
    expected = reference_modulated_deform_conv(*inputs, bias, **DEFORM)
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
