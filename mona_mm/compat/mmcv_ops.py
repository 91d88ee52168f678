"""A replacement for mmcv's compiled module, which :mod:`mona_mm.compat.mmcv_ext` imports as ``mmcv._ext``.

Each function has the name, the arguments and the in-place results that the Python code of ``mmcv.ops`` expects from
the compiled operator (mmcv 2.1.0, ``mmcv/ops/csrc/pytorch/pybind.cpp``). The module provides the operators that the
shipped configs of mmdet, mmseg and mmpretrain use, on the CPU and on CUDA. Any other name gives a function that raises
an error when it is called.

For half and bfloat16 inputs, the computation is in float32, and the result is rounded once, to the dtype of the output
that mmcv allocated. (The compiled operators compute entirely in half and do not accept bfloat16.)
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_INSTALL = (
    'This environment has mmcv without its compiled operators, and mona_mm stands in only for those that '
    'the shipped configs of mmdet, mmseg and mmpretrain reach. For the others install the full mmcv: '
    '`pip uninstall mmcv-lite`, then `mim install mmcv==2.1.0` (a prebuilt wheel, where there is one for '
    'your torch) or `pip install --no-build-isolation mmcv==2.1.0` (compiles them in about 10 minutes; needs '
    'a C++ compiler and, for CUDA, nvcc).'
)
_AHEAD = 64  # the number of boxes whose factors soft-NMS computes at once


def __getattr__(name: str):
    """Make a function that raises NotImplementedError and names the operator, for any operator not provided here.

    Importing ``mmcv.ops`` asserts that each of its operators exists, so the error may be raised only by the call.
    """
    if name.startswith('_'):  # never an operator: Python and its tools look for names such as __path__
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def missing_operator(*args, **kwargs):
        raise NotImplementedError(f'mmcv operator {name!r} is not available. {_INSTALL}')

    return missing_operator


def get_compiler_version() -> str:
    """The compiler, as shown in the environment report that the OpenMMLab libraries log."""
    return 'none (operators from mona_mm, on torchvision)'


def get_compiling_cuda_version() -> str:
    """The CUDA version, as shown in the environment report that the OpenMMLab libraries log."""
    return 'not available'


def _torchvision_ops():
    """The operators of torchvision, imported by the first call since the import alone takes about a second."""
    import torchvision  # noqa: F401  registers torch.ops.torchvision

    return torch.ops.torchvision


def _in_float32(*tensors: Tensor) -> list[Tensor]:
    """Convert ``tensors`` to their common dtype, at least float32.

    torchvision does not accept tensors of different dtypes, nor half on the CPU.
    """
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


_OUTSIDE = -1e6
"""A coordinate outside of every feature map, where a sample is zero and has no gradient."""


def _with_finite_boxes(rois: Tensor) -> Tensor:
    """RoIs ``(K, 5)``, of which those with a coordinate that is not finite are empty ones outside of the map.

    A model that diverges has such boxes, and torchvision's kernels read outside of the memory for them.
    """
    (rois,) = _in_float32(rois)
    outside = rois.new_tensor([0, *4 * [_OUTSIDE]])
    return torch.where(torch.isfinite(rois).all(1, keepdim=True), rois, outside)


def _add_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor, totals: Sequence[Tensor]
) -> None:
    """Add the gradients of ``function(*inputs)`` to ``totals`` by running the function again under autograd."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():  # needed since autograd disables gradients in the backward of a custom function
        output = function(*inputs)
    gradients = torch.autograd.grad(output, inputs, grad_output.to(output), materialize_grads=True)
    for total, gradient in zip(totals, gradients, strict=True):
        total += gradient


# ---- non-maximum suppression ----


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Perform greedy non-maximum suppression.

    The IoU and the threshold are compared in the dtype of the boxes, as in mmcv: a threshold of 0.3 is the float32
    value closest to 0.3, and so is the IoU of two boxes whose areas give 3 / 10, so both are kept.

    Args:
        boxes: the boxes ``(N, 4)`` as x1, y1, x2, y2.
        scores: the scores ``(N,)``.
        iou_threshold: the IoU with a kept box of higher score above which a box is removed.
        offset: 1 if x2 and y2 are the last pixel inside the box (its width is ``x2 - x1 + 1``), else 0.

    Returns:
        The indices of the kept boxes ``(K,)`` in descending order of score; equal scores keep the order of the input.
    """
    boxes, scores = _in_float32(boxes, scores)
    if offset:  # torchvision has no offset, and moving the far edges beforehand would round differently
        groups = _greedy_groups(boxes, scores, offset, lambda iou: iou > iou_threshold)
        return torch.tensor([group[0] for group in groups], dtype=torch.int64, device=boxes.device)
    threshold = boxes.new_tensor(iou_threshold).item()  # torchvision would compare in float64
    return _torchvision_ops().nms(boxes, scores, threshold)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Perform greedy non-maximum suppression, and list the boxes that each kept box has suppressed.

    Args:
        dets: the boxes and scores ``(N, 5)`` on the CPU, as x1, y1, x2, y2, score.
        iou_threshold: the IoU with a kept box of higher score at or above which a box is removed. (At exactly this
            IoU, :func:`nms` keeps the box; mmcv has the same difference.)

    Returns:
        A list for each kept box, in descending order of score. It holds the index of the box and then those of the
        boxes that it suppressed, in descending order of score.
    """
    (dets,) = _in_float32(dets)
    return _greedy_groups(dets[:, :4], dets[:, 4], 0, lambda iou: iou >= iou_threshold)


def _greedy_groups(
    boxes: Tensor, scores: Tensor, offset: int, suppresses: Callable[[np.ndarray], np.ndarray]
) -> list[list[int]]:
    """The groups of :func:`nms_match`; ``suppresses`` returns for each IoU whether the lower-scoring box goes."""
    remaining = scores.argsort(descending=True, stable=True).cpu().numpy()
    corners, areas = _corners_and_areas(boxes, offset)
    groups = []
    while len(remaining):
        best, remaining = remaining[0], remaining[1:]
        iou = _iou(corners[:, best, None], areas[best], corners[:, remaining], areas[remaining], offset)
        suppressed = suppresses(iou)
        groups.append([int(best), *remaining[suppressed].tolist()])
        remaining = remaining[~suppressed]
    return groups


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Perform soft-NMS (arXiv:1704.03503), where overlap with a better box lowers a box's score instead of removing it.

    At every step the boxes are in the same order as in mmcv, which decides between equal scores: the best box is
    swapped with the first remaining one, and the last box takes the place of a removed one. If two boxes are both
    empty, mmcv's IoU is NaN, and so are the scores that the Gaussian computes from it; here the IoU is zero.

    Args:
        boxes: the boxes ``(N, 4)`` as x1, y1, x2, y2. All tensors are on the CPU.
        scores: the scores ``(N,)``.
        dets: the output ``(N, 5)``, whose first K rows receive the kept boxes and their lowered scores.
        iou_threshold: the IoU at or above which methods 0 and 1 lower a score.
        sigma: the width of the Gaussian of method 2.
        min_score: the score below which a box is removed.
        method: 0 sets the score to zero, 1 multiplies it by ``1 - IoU``, 2 by ``exp(-IoU**2 / sigma)``.
        offset: the same as in :func:`nms`.

    Returns:
        The indices of the kept boxes ``(K,)`` in descending order of their lowered scores.
    """
    boxes, lowered = _in_float32(boxes, scores.clone())
    lowered, indices = lowered.numpy(), np.arange(len(boxes))  # in the current order, which changes at every step
    corners, areas = _corners_and_areas(boxes, offset)  # in the order of the input, like the factors

    def factors(rows: np.ndarray) -> np.ndarray:
        iou = _iou(corners[:, rows, None], areas[rows, None], corners[:, None], areas, offset)
        if method == 2:
            np.multiply(iou, -iou, out=iou)
            iou /= sigma
            # Computed in float64, since numpy's float32 exp is less accurate than C's and ties may depend on it.
            return np.exp(iou, dtype=np.float64).astype(iou.dtype)
        return np.where(iou >= iou_threshold, 1 - iou if method == 1 else 0, 1).astype(iou.dtype)

    ready, count, step = {}, len(boxes), 0
    while step < count:
        best = step + int(lowered[step:count].argmax())
        lowered[step], lowered[best] = lowered[best], lowered[step]
        indices[step], indices[best] = indices[best], indices[step]

        index = int(indices[step])
        if index not in ready:  # computed for the best remaining boxes as well, whose turn is likely to come soon
            next_best = indices[step + (-lowered[step:count]).argsort(kind='stable')[:_AHEAD]]
            ready = dict(zip(next_best.tolist(), factors(next_best), strict=True))
        other_scores, others = lowered[step + 1 : count], indices[step + 1 : count]
        other_scores *= ready[index][others]

        if len(other_scores) and other_scores.min() < min_score:
            is_removed = other_scores < min_score
            remaining = np.flatnonzero(~is_removed)
            holes = np.flatnonzero(is_removed[: len(remaining)])
            last = remaining[len(remaining) - len(holes) :][::-1]
            other_scores[holes], others[holes] = other_scores[last], others[last]
            count = step + 1 + len(remaining)
        step += 1
    kept = torch.from_numpy(indices[:count])
    dets[:count, :4] = boxes[kept]
    dets[:count, 4] = torch.from_numpy(lowered[:count])
    return kept


def _corners_and_areas(boxes: Tensor, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """The corners ``(4, N)`` of boxes ``(N, 4)``, as -x1, -y1, x2, y2, and their areas ``(N,)``."""
    corners = boxes.T.cpu().numpy() * np.array([[-1], [-1], [1], [1]], dtype=np.float32)
    width, height = corners[2:] + corners[:2] + offset
    return corners, width * height


def _iou(
    corners: np.ndarray, areas: np.ndarray, others: np.ndarray, other_areas: np.ndarray, offset: int
) -> np.ndarray:
    """The IoU of boxes with other boxes, given by corners ``(4, ...)`` and areas, which are broadcast.

    It is zero if both boxes are empty. The order of the operations is mmcv's, so that the results are rounded alike.
    """
    width, height = (np.minimum(corners[axis + 2], others[axis + 2]) for axis in range(2))
    for axis, side in enumerate((width, height)):  # in place, since allocating memory costs more than the arithmetic
        side += np.minimum(corners[axis], others[axis])
        if offset:
            side += offset
        np.maximum(side, 0, out=side)
    width *= height
    union = areas + other_areas
    union -= width
    width /= np.maximum(union, np.finfo(union.dtype).tiny, out=union)
    return width


# ---- RoIAlign and deformable RoI pooling ----


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Perform RoIAlign (arXiv:1703.06870) and write the result to ``output``.

    Args:
        input: the feature map ``(B, C, H, W)``.
        rois: the RoIs ``(K, 5)`` as batch index, x1, y1, x2, y2, in image coordinates.
        output: the output ``(K, C, aligned_height, aligned_width)``.
        argmax_y: a tensor in the shape of ``output`` that receives the y coordinates of the maxima if ``pool_mode`` is
            0, else an empty tensor. A cell without a maximum gets -1.
        argmax_x: the same for the x coordinates.
        spatial_scale: the factor from image coordinates to those of ``input``.
        sampling_ratio: the number of samples along each side of an output cell; 0 derives it from the size of the RoI.
        pool_mode: 0 for the maximum of a cell's samples, 1 for their average.
        aligned: whether coordinates are shifted by half a pixel, so that a sample at the centre of a pixel has the
            value of that pixel.
    """
    rois = _with_finite_boxes(rois)
    if pool_mode == 0:
        _roi_align_max(
            input,
            rois,
            (output, argmax_y, argmax_x),
            (aligned_height, aligned_width),
            spatial_scale,
            sampling_ratio,
            aligned,
        )
        return
    input, rois = _in_float32(input, rois)
    output.copy_(
        _torchvision_ops().roi_align(input, rois, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned)
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add the gradient of :func:`roi_align_forward` with respect to its input to ``grad_input`` ``(B, C, H, W)``.

    On CUDA, the sum uses atomic additions, as in mmcv. Unlike mmcv's operator, this one then raises the RuntimeError
    of ``torch.use_deterministic_algorithms(True)``.
    """
    grad_output, rois, argmax_y, argmax_x = _in_float32(grad_output, rois, argmax_y, argmax_x)
    rois = _with_finite_boxes(rois)
    if pool_mode == 0:
        channels, height, width = grad_input.shape[1:]
        positions, weights = _bilinear_taps(argmax_y.flatten(), argmax_x.flatten(), height, width)
        weights = weights * (argmax_y.flatten() != -1)[:, None] * grad_output.reshape(-1, 1)
        planes = rois[:, 0].long()[:, None] * channels + torch.arange(channels, device=rois.device)  # (K, C)
        planes = planes.flatten().repeat_interleave(aligned_height * aligned_width)
        gradient = weights.new_zeros(grad_input.numel())
        gradient.index_add_(0, (planes[:, None] * (height * width) + positions).flatten(), weights.flatten())
        grad_input += gradient.view_as(grad_input)
        return
    grad_input += _torchvision_ops()._roi_align_backward(
        grad_output,
        rois,
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )


def _roi_align_max(
    input: Tensor,
    rois: Tensor,
    results: tuple[Tensor, Tensor, Tensor],
    pooled_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> None:
    """Write the maxima of RoIAlign and their y and x coordinates to the three ``results`` ``(K, C, *pooled_size)``.

    mmcv starts from -10000 on the CPU and from the lowest float32 value on CUDA, which is therefore the result of a
    cell without a larger sample.
    """
    input, rois = _in_float32(input, rois)
    height, width = input.shape[2:]
    lowest = torch.finfo(torch.float32).min if input.is_cuda else -10000.0
    pixels = input.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H * W, C)
    # One RoI at a time, since the samples of an RoI are all held in memory for all channels.
    for roi, output, *arguments in zip(rois[:, None], *results, strict=True):
        cells, _, *points = _roi_samples(roi, pooled_size, spatial_scale, sampling_ratio, aligned)
        positions, weights = _bilinear_taps(*points, height, width)
        samples = F.embedding_bag(positions, pixels[int(roi[0, 0])], mode='sum', per_sample_weights=weights)  # (S, C)

        cells = cells[:, None].expand_as(samples)
        largest = samples.new_full((pooled_size[0] * pooled_size[1], samples.size(1)), lowest)
        largest = largest.scatter_reduce(0, cells, samples, 'amax')
        order = torch.arange(len(samples), device=samples.device)[:, None]
        order = torch.where((samples == largest.gather(0, cells)) & (samples > lowest), order, len(samples))
        first = torch.full_like(largest, len(samples), dtype=torch.int64).scatter_reduce(0, cells, order, 'amin')
        output.copy_(largest.T.view_as(output))
        for argument, coordinate in zip(arguments, points, strict=True):
            argument.copy_(F.pad(coordinate, (0, 1), value=-1.0)[first].T.view_as(argument))


def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Perform deformable RoI pooling (arXiv:1703.06211) and write the result to ``output``.

    It is RoIAlign with shifted cells.

    Args:
        input: the feature map ``(B, C, H, W)``.
        rois: the RoIs ``(K, 5)``, in the format of :func:`roi_align_forward` with ``aligned``.
        offset: the shifts ``(K, 2, pooled_height, pooled_width)``, x before y, in units of the size of the RoI; or an
            empty tensor.
        output: the output ``(K, C, pooled_height, pooled_width)``.
        spatial_scale: the factor from image coordinates to those of ``input``.
        sampling_ratio: the number of samples along each side of an output cell; 0 derives it from the size of the RoI.
        gamma: the factor by which every offset is multiplied.
    """
    pooled_size = (pooled_height, pooled_width)
    input, rois, offset = _in_float32(input, rois, offset)
    rois = _with_finite_boxes(rois)
    bags, points = _deform_roi_bags(input, rois, offset, pooled_size, spatial_scale, sampling_ratio, gamma)
    positions, weights = _bilinear_taps(*points, *input.shape[2:])
    output.copy_(_pool(input, bags, positions, weights).unflatten(0, (-1, *pooled_size)).permute(0, 3, 1, 2))


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Add the gradients of :func:`deform_roi_pool_forward` to ``grad_input`` and ``grad_offset``.

    The gradient with respect to the offset is the same as mmcv's. It is the derivative if a sample lies between the
    centres of pixels. Beyond the outermost centres, where the value is that of the border, mmcv continues the slopes
    from inside the map at the top and left borders, and sets both coordinates' gradients to zero at the bottom and
    right ones.
    """
    pooled_size = (pooled_height, pooled_width)
    grad_output, input, rois, offset = _in_float32(grad_output, input, rois, offset)
    rois = _with_finite_boxes(rois)
    bags, points = _deform_roi_bags(input, rois, offset, pooled_size, spatial_scale, sampling_ratio, gamma)
    positions, weights = _bilinear_taps(*points, *input.shape[2:])
    grad_cells = grad_output.permute(0, 2, 3, 1).flatten(0, 2)  # (cells, C)
    _add_gradients(lambda input: _pool(input, bags, positions, weights), [input], grad_cells, [grad_input])
    if not offset.numel():
        return

    (y, top, bottom, _), (x, left, right, _) = (
        (point, *_neighbours(point, size)) for point, size in zip(points, input.shape[2:], strict=True)
    )
    inside = weights.any(1, keepdim=True)
    sizes = (rois[:, 3:] - rois[:, 1:3]) * spatial_scale * gamma  # (K, 2), x before y
    for axis, slopes in enumerate(
        (
            torch.stack((y - bottom, bottom - y, top - y, y - top), 1),
            torch.stack((x - right, left - x, right - x, x - left), 1),
        )
    ):
        slope = (_pool(input, bags, positions, slopes * inside) * grad_cells).sum(1)
        grad_offset[:, axis] += slope.view(-1, *pooled_size) * sizes[:, axis, None, None]


def _deform_roi_bags(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    pooled_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    """The cells and images of the samples of deformable RoI pooling, as :func:`_pool` takes them, and their y and x."""
    cells, counts, *points = _roi_samples(rois, pooled_size, spatial_scale, sampling_ratio, aligned=True)
    roi_of_sample = cells // (pooled_size[0] * pooled_size[1])
    if offset.numel():
        sizes = (rois[:, 3:] - rois[:, 1:3]) * spatial_scale * gamma
        shifts = (offset * sizes[:, :, None, None]).transpose(0, 1).flatten(1)[:, cells]  # x before y
        points = [point + shift for point, shift in zip(points, shifts.flip(0), strict=True)]
    pixels = input.size(2) * input.size(3)
    return (counts, cells, rois[:, 0].long()[roi_of_sample] * pixels), points


def _pool(input: Tensor, bags: tuple[Tensor, Tensor, Tensor], positions: Tensor, weights: Tensor) -> Tensor:
    """The average ``(cells, C)`` of each cell's samples, each of which is a weighted sum of pixels of ``input``."""
    counts, cells, images = bags
    weights = weights / counts[cells, None]
    return F.embedding_bag(
        (positions + images[:, None]).flatten(),
        input.permute(0, 2, 3, 1).flatten(0, 2),
        4 * (counts.cumsum(0) - counts),
        mode='sum',
        per_sample_weights=weights.flatten(),
    )


def _roi_samples(
    rois: Tensor, pooled_size: tuple[int, int], spatial_scale: float, sampling_ratio: int, aligned: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the points at which RoIAlign samples.

    Returns:
        The index of each of the S samples' cell among the ``K * pooled_height * pooled_width`` cells, in the order of
        the kernel's loops; the number of samples in each cell; and the y and the x of each sample.
    """
    corners = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    start, size = corners[:, [1, 0]], corners[:, [3, 2]] - corners[:, [1, 0]]  # y before x
    if not aligned:
        size = size.clamp(min=1)
    cell_size = size / size.new_tensor(pooled_size)
    grid = torch.full_like(cell_size, sampling_ratio) if sampling_ratio > 0 else cell_size.ceil().clamp(min=0)

    cells_of_roi = pooled_size[0] * pooled_size[1]
    counts = grid.prod(1).long().repeat_interleave(cells_of_roi)
    cells = torch.arange(len(counts), device=rois.device).repeat_interleave(counts)
    in_cell = torch.arange(len(cells), device=rois.device) - (counts.cumsum(0) - counts)[cells]
    roi_of_sample = cells // cells_of_roi
    grid, start, cell_size = grid[roi_of_sample], start[roi_of_sample], cell_size[roi_of_sample]

    columns = grid[:, 1].long()
    sample = torch.stack((in_cell // columns, in_cell % columns), 1)
    cell = torch.stack((cells // pooled_size[1] % pooled_size[0], cells % pooled_size[1]), 1)
    y, x = (start + cell * cell_size + (sample + 0.5) * cell_size / grid).unbind(1)
    return cells, counts, y, x


def _bilinear_taps(y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four pixels around points ``(S,)``, as indices into ``height * width``, and their weights, ``(S, 4)`` each.

    The order is top left, top right, bottom left, bottom right. By the convention of RoIAlign, a point up to one pixel
    outside the map counts as a point on its border, and a point further outside has zero weights.
    """
    (top, bottom, below), (left, right, beside) = _neighbours(y, height), _neighbours(x, width)
    positions = torch.stack((top * width + left, top * width + right, bottom * width + left, bottom * width + right), 1)
    weights = torch.stack(
        ((1 - below) * (1 - beside), (1 - below) * beside, below * (1 - beside), below * beside), dim=1
    )
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    return positions, weights * inside[:, None]


def _neighbours(coordinate: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels before and after a coordinate, which is first clamped to the map, and its distance from the former."""
    coordinate = coordinate.nan_to_num().clamp(0, size - 1)
    before = coordinate.long()
    return before, (before + 1).clamp(max=size - 1), coordinate - before


# ---- focal loss ----


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Compute the focal loss (arXiv:1708.02002) of each element and write it to ``output``.

    The loss is ``-a * (1 - p)**gamma * log(p)``, where ``p`` is the probability of the element's label (this class is,
    or is not, the target) and ``a`` is ``alpha`` for the target and ``1 - alpha`` for the other classes.

    Args:
        input: the logits ``(N, C)``.
        target: the class indices ``(N,)``, int64; any value outside ``0 .. C - 1`` means background.
        weight: the weight of each class ``(C,)``, by which the loss of a row is multiplied according to its target, or
            an empty tensor. Rows of background keep their loss (for them, mmcv reads past the end of ``weight``).
        output: the losses ``(N, C)``.
        gamma: the exponent that reduces the loss of well classified elements.
        alpha: the weight of the target relative to the other classes.
    """
    logit, _, scale = _focal_terms(input, target, weight, alpha)
    output.copy_(-scale * torch.sigmoid(-logit) ** gamma * F.logsigmoid(logit))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of :func:`sigmoid_focal_loss_forward` for each element to ``grad_input`` ``(N, C)``."""
    logit, sign, scale = _focal_terms(input, target, weight, alpha)
    miss = torch.sigmoid(-logit)  # 1 - p, without cancellation error
    slope = miss**gamma * (gamma * (1 - miss) * F.logsigmoid(logit) - miss)
    grad_input.copy_(sign * scale * slope)


def _focal_terms(input: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """The logit of each element's label, the sign applied to get it, and the factor of the loss, each ``(N, C)``."""
    (input,) = _in_float32(input)
    is_target = target[:, None] == torch.arange(input.size(1), device=input.device)
    positive = is_target.to(input)
    sign = 2 * positive - 1
    scale = alpha * positive + (1 - alpha) * (1 - positive)
    if weight.numel():
        row_weight = torch.where(is_target.any(1), weight[target.clamp(0, len(weight) - 1)], 1.0)
        scale = scale * row_weight[:, None]
    return sign * input, sign, scale


# ---- deformable convolution ----


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **geometry
) -> None:
    """Perform deformable convolution (arXiv:1703.06211) and write the result to ``output``.

    It is modulated deformable convolution with a mask of ones.

    Args:
        input: the input ``(B, C_in, H, W)``.
        weight: the weight ``(C_out, C_in / group, kH, kW)``.
        offset: the offsets ``(B, 2 * deformable_group * kH * kW, H_out, W_out)``, y before x.
        output: the output ``(B, C_out, H_out, W_out)``.
        columns: an unused buffer of mmcv.
        ones: an unused buffer of mmcv.
        geometry: ``dH``, ``padH``, ``dilationH``, the same for W, and sizes that the tensors' shapes show as well.
    """
    output.copy_(_deform_conv(input, weight, offset, output.shape[2:], _deform_conv_geometry(geometry)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry,
) -> None:
    """Add the gradients of :func:`deform_conv_forward` to ``grad_input`` and ``grad_offset``."""
    _add_gradients(
        lambda input, offset: _deform_conv(
            input, weight, offset, grad_output.shape[2:], _deform_conv_geometry(geometry)
        ),
        inputs=(input, offset),
        grad_output=grad_output,
        totals=(grad_input, grad_offset),
    )


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float,
    **geometry,
) -> None:
    """Add ``scale`` times the gradient of :func:`deform_conv_forward` with respect to its weight to ``grad_weight``."""
    _add_gradients(
        lambda weight: _deform_conv(input, weight, offset, grad_output.shape[2:], _deform_conv_geometry(geometry)),
        inputs=(grad_weight,),  # the result is linear in the weight, so any weight gives the same gradient
        grad_output=grad_output * scale,
        totals=(grad_weight,),
    )


def _deform_conv_geometry(geometry: dict) -> tuple[tuple[int, int], ...]:
    return tuple((geometry[f'{name}H'], geometry[f'{name}W']) for name in ('d', 'pad', 'dilation'))


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    **geometry,
) -> None:
    """Perform modulated deformable convolution (arXiv:1811.11168) and write the result to ``output``.

    Args:
        input: the input ``(B, C_in, H, W)``.
        weight: the weight ``(C_out, C_in / group, kernel_h, kernel_w)``.
        bias: the bias ``(C_out,)``, or an empty tensor.
        ones: an unused buffer of mmcv.
        offset: the offsets ``(B, 2 * deformable_group * kernel_h * kernel_w, H_out, W_out)``, y before x.
        mask: the mask ``(B, deformable_group * kernel_h * kernel_w, H_out, W_out)``.
        output: the output ``(B, C_out, H_out, W_out)``.
        columns: an unused buffer of mmcv.
        geometry: ``stride_h``, ``pad_h``, ``dilation_h``, the same for w, ``with_bias``, and sizes that the shapes of
            the tensors show as well.
    """
    output.copy_(_modulated_deform_conv(input, weight, bias, offset, mask, output.shape[2:], geometry))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    **geometry,
) -> None:
    """Add each gradient of :func:`modulated_deform_conv_forward` to the ``grad_*`` tensor of the same shape."""
    _add_gradients(
        lambda *inputs: _modulated_deform_conv(*inputs, grad_output.shape[2:], geometry),
        inputs=(input, weight, bias, offset, mask),
        grad_output=grad_output,
        totals=(grad_input, grad_weight, grad_bias, grad_offset, grad_mask),
    )


def _modulated_deform_conv(
    input: Tensor, weight: Tensor, bias: Tensor, offset: Tensor, mask: Tensor, output_size: torch.Size, geometry: dict
) -> Tensor:
    # DyHead passes the offsets and mask of a larger feature map. For each image, mmcv's kernel then reads as many
    # values as it needs in memory order, and a model trained with mmcv expects this.
    offset, mask = (
        tensor.flatten(1)[:, : tensor.size(1) * output_size.numel()].unflatten(1, (tensor.size(1), *output_size))
        for tensor in (offset, mask)
    )
    steps = tuple((geometry[f'{name}_h'], geometry[f'{name}_w']) for name in ('stride', 'pad', 'dilation'))
    return _deform_conv(input, weight, offset, output_size, steps, mask, bias if geometry['with_bias'] else None)


def _deform_conv(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output_size: torch.Size,
    geometry: tuple[tuple[int, int], ...],
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Perform torchvision's deformable convolution with mmcv's gradients; ``geometry`` is stride, padding, dilation.

    The gradients of the two libraries differ at kernel taps that lie exactly one pixel outside the map, as those in the
    padding do while the offsets are zero. There the sample is zero and increases towards the map, and mmcv's gradient
    with respect to the offset is zero.
    """
    from torchvision.ops import deform_conv2d

    optional = [tensor for tensor in (mask, bias) if tensor is not None]
    input, weight, offset, *optional = _in_float32(input, weight, offset, *optional)
    mask = optional.pop(0) if mask is not None else None
    bias = optional.pop() if bias is not None else None
    # As in mmcv, a tap whose position is not a number is outside. torchvision would read outside of the memory.
    offset = offset.nan_to_num(_OUTSIDE, -_OUTSIDE, _OUTSIDE)

    if offset.requires_grad:
        taps = offset.detach().unflatten(1, (-1, *weight.shape[2:], 2))  # (B, groups, kh, kw, 2, H_out, W_out)
        inside = torch.ones_like(taps[:, :, :, :, 0], dtype=torch.bool)
        for axis in range(2):
            stride, padding, dilation = (pair[axis] for pair in geometry)
            start = torch.arange(output_size[axis], device=offset.device) * stride - padding
            step = torch.arange(weight.size(2 + axis), device=offset.device) * dilation
            position = start.view((-1, 1) if axis == 0 else (-1,)) + step.view(
                (-1, 1, 1, 1) if axis == 0 else (-1, 1, 1)
            )
            position = position + taps[:, :, :, :, axis]
            inside &= (position > -1) & (position < input.size(2 + axis))
        inside = inside.unsqueeze(4).expand_as(taps).reshape_as(offset)
        offset = torch.where(inside, offset, offset.detach())
    return deform_conv2d(input, offset, weight, bias, *geometry, mask)


# ---- masked convolution (guided anchoring) ----


def masked_im2col_forward(
    features: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    data_col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Write a convolution's windows around chosen pixels to ``data_col``.

    The stride is 1, and windows are zero outside the map.

    Args:
        features: the feature map ``(1, C, H, W)``.
        mask_h_idx: the rows of the pixels ``(M,)``.
        mask_w_idx: the columns of the pixels ``(M,)``.
        data_col: the output ``(C * kernel_h * kernel_w, M)``.
        kernel_h: the height of a window.
        kernel_w: the width of a window.
        pad_h: the number of rows from the top of a window to its pixel.
        pad_w: the number of columns from the left edge of a window to its pixel.
    """
    padded = F.pad(features[0], (pad_w, kernel_w - 1, pad_h, kernel_h - 1))
    rows = mask_h_idx + torch.arange(kernel_h, device=features.device)[:, None]
    columns = mask_w_idx + torch.arange(kernel_w, device=features.device)[:, None]
    data_col.copy_(padded[:, rows[:, None], columns[None]].view_as(data_col))


def masked_col2im_forward(
    masked_output: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    output: Tensor,
    height: int,
    width: int,
    channels: int,
) -> None:
    """Write ``masked_output`` ``(channels, M)`` to M pixels of ``output`` ``(1, channels, height, width)``."""
    output[0, :, mask_h_idx, mask_w_idx] = masked_output.to(output)


# ---- CARAFE ----


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Perform CARAFE (arXiv:1905.02188) and write the result to ``output``.

    CARAFE is upsampling with a separate kernel for every output pixel.

    Args:
        features: the feature map ``(B, C, H, W)``.
        masks: the kernels ``(B, group_size * kernel_size**2, H * scale_factor, W * scale_factor)``.
        rfeatures: a buffer in the shape of ``features``, which receives them and is passed to :func:`carafe_backward`.
        routput: an unused buffer of mmcv.
        rmasks: an unused buffer of mmcv.
        output: the output ``(B, C, H * scale_factor, W * scale_factor)``.
        kernel_size: the side of the window of ``features``, centred on the pixel to which an output pixel belongs.
        group_size: the number of groups of channels, each of which has its own kernels.
        scale_factor: the factor by which the map is enlarged.
    """
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    grad_output: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rgrad_output: Tensor,
    rgrad_input_hs: Tensor,
    rgrad_input: Tensor,
    rgrad_masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Add the gradients of :func:`carafe_forward` to ``grad_input`` and ``grad_masks``; ``rgrad_*`` are not used."""
    carafe_naive_backward(grad_output, rfeatures, masks, grad_input, grad_masks, kernel_size, group_size, scale_factor)


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """Perform CARAFE like :func:`carafe_forward`, without its buffers."""
    features, masks = _in_float32(features, masks)
    masks = _carafe_phases(masks, group_size, scale_factor)
    total = features.new_zeros(_carafe_phases(output, group_size, scale_factor).shape)
    for tap, window in enumerate(_carafe_windows(features, kernel_size, group_size)):
        total.addcmul_(window[:, :, :, None, None], masks[:, :, tap, None])
    output.copy_(_carafe_pixels(total))


def carafe_naive_backward(
    grad_output: Tensor,
    features: Tensor,
    masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Add the gradients of :func:`carafe_naive_forward` to ``grad_input`` and ``grad_masks``."""
    grad_output, features, masks = _in_float32(grad_output, features, masks)
    grad_output, masks = (_carafe_phases(tensor, group_size, scale_factor) for tensor in (grad_output, masks))
    border = (kernel_size - 1) // 2
    mask_total, feature_total = torch.zeros_like(masks), F.pad(torch.zeros_like(features), (border,) * 4)
    for tap, (window, window_total) in enumerate(
        zip(
            _carafe_windows(features, kernel_size, group_size),
            _windows(feature_total, kernel_size, group_size),
            strict=True,
        )
    ):
        mask_total[:, :, tap] = (window[:, :, :, None, None] * grad_output).sum(2)
        window_total += (masks[:, :, tap, None] * grad_output).sum((3, 4))
    grad_masks += _carafe_pixels(mask_total)
    grad_input += F.pad(feature_total, (-border,) * 4)


def _carafe_phases(tensor: Tensor, groups: int, scale: int) -> Tensor:
    """Copy ``(B, C, H * scale, W * scale)`` into a contiguous ``(B, groups, C / groups, scale, scale, H, W)``."""
    tensor = tensor.unflatten(1, (groups, -1)).unflatten(-1, (-1, scale)).unflatten(-3, (-1, scale))
    return tensor.permute(0, 1, 2, 4, 6, 3, 5).contiguous()


def _carafe_pixels(tensor: Tensor) -> Tensor:
    """Undo :func:`_carafe_phases`."""
    return tensor.permute(0, 1, 2, 5, 3, 6, 4).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def _carafe_windows(features: Tensor, kernel_size: int, groups: int) -> Iterator[Tensor]:
    """The features seen by each tap of the kernel at every pixel, ``(B, groups, C / groups, H, W)``."""
    border = (kernel_size - 1) // 2
    return _windows(F.pad(features, (border,) * 4), kernel_size, groups)


def _windows(padded: Tensor, kernel_size: int, groups: int) -> Iterator[Tensor]:
    """The views of a padded map that are shifted to each tap of a kernel."""
    padded = padded.unflatten(1, (groups, -1))
    height, width = (size - kernel_size + 1 for size in padded.shape[-2:])
    for row, column in itertools.product(range(kernel_size), repeat=2):
        yield padded[..., row : row + height, column : column + width]


# ---- point-wise spatial attention (PSANet) ----


def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Place the mask of every pixel on the whole map (PSANet, ECCV 2018) and write the result to ``output``.

    Args:
        input: the masks around each pixel ``(num_, h_mask * w_mask, h_feature, w_feature)``.
        output: the output ``(num_, h_feature * w_feature, h_feature, w_feature)``, which is zero outside the masks.
        psa_type: 0 to collect, so that a pixel's mask fills the channels of ``output`` at that pixel; 1 to distribute,
            so that it fills the map in the pixel's channel.
        num_: the number of images.
        h_feature: the height of the map.
        w_feature: the width of the map.
        h_mask: the height of a mask.
        w_mask: the width of a mask.
        half_h_mask: the row of the centre of a mask.
        half_w_mask: the column of the centre of a mask.
    """
    rows, columns = (
        torch.arange(size, device=input.device)[:, None] - torch.arange(size, device=input.device) + half
        for size, half in ((h_feature, half_h_mask), (w_feature, half_w_mask))
    )
    laid = _take_around(input.unflatten(1, (h_mask, w_mask)), rows, columns)
    _psa_maps(output, psa_type, h_feature, w_feature).copy_(laid)


def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Write the gradient of :func:`psamask_forward` with respect to its input to ``grad_input``."""
    rows, columns = (
        torch.arange(mask, device=grad_input.device)[:, None] + torch.arange(size, device=grad_input.device) - half
        for mask, size, half in ((h_mask, h_feature, half_h_mask), (w_mask, w_feature, half_w_mask))
    )
    maps = _psa_maps(grad_output, psa_type, h_feature, w_feature)
    grad_input.copy_(_take_around(maps, rows, columns).flatten(1, 2))


def _psa_maps(tensor: Tensor, psa_type: int, height: int, width: int) -> Tensor:
    """A view ``(B, H, W, H, W)`` of an output of PSA, with the other pixel's row and column before the pixel's own."""
    maps = tensor.view(-1, height, width, height, width)
    return maps.permute(0, 3, 4, 1, 2) if psa_type == 1 else maps


def _take_around(source: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Select from ``source`` ``(B, R, S, H, W)``, for each pixel, the given rows ``(A, H)`` and columns ``(C, W)``.

    Returns:
        The selected values ``(B, A, C, H, W)``, zero if a row is outside ``0 .. R - 1`` or a column outside
        ``0 .. S - 1``.
    """
    (row_count, column_count), (height, width) = source.shape[1:3], source.shape[3:]
    inside = ((rows >= 0) & (rows < row_count))[:, None, :, None] & ((columns >= 0) & (columns < column_count))[:, None]
    taken = source[
        :,
        rows.clamp(0, row_count - 1)[:, None, :, None],
        columns.clamp(0, column_count - 1)[:, None],
        torch.arange(height, device=source.device)[:, None],
        torch.arange(width, device=source.device),
    ]
    return taken.masked_fill(~inside, 0)


# ---- synchronized batch normalization (MMSyncBN) ----
# Between these calls, mmcv reduces the statistics over the processes. They are float32 for every input dtype.


def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """Write the mean of each channel of ``input`` ``(B, C, S)`` to ``mean`` ``(C,)``."""
    mean.copy_(input.float().mean((0, 2)))


def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Write each channel's mean squared distance from ``mean`` ``(C,)``, over ``input`` ``(B, C, S)``, to ``var``."""
    var.copy_((input.float() - mean[:, None]).square().mean((0, 2)))


def sync_bn_forward_output(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    norm: Tensor,
    std: Tensor,
    output: Tensor,
    eps: float,
    momentum: float,
    group_size: int,
) -> None:
    """Normalize ``input`` ``(B, C, S)`` into ``output``, and update the running statistics.

    Args:
        input: the input ``(B, C, S)``.
        mean: the mean over all processes ``(C,)``.
        var: the biased variance over all processes ``(C,)``.
        weight: the factor of the affine map ``(C,)``.
        bias: the shift of the affine map ``(C,)``.
        running_mean: the running mean ``(C,)``, changed in place.
        running_var: the running variance ``(C,)``, changed in place.
        norm: the tensor that receives the normalized input before the affine map, in float32.
        std: the tensor ``(C,)`` that receives the standard deviation.
        output: the tensor ``(B, C, S)`` that receives the result.
        eps: the value added to the variance before the square root.
        momentum: the weight of the new statistics in the running ones.
        group_size: the number of processes, which is needed to compute the unbiased variance.
    """
    std.copy_((var + eps).sqrt())
    norm.copy_((input.float() - mean[:, None]) / std[:, None])
    output.copy_(norm * weight[:, None] + bias[:, None])
    count = input.size(0) * input.size(2) * group_size
    unbiased = var * count / (count - 1) if count > 1 else var
    for running, new in ((running_mean, mean), (running_var, unbiased)):
        running.copy_(momentum * new + (1 - momentum) * running)


def sync_bn_backward_param(grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Write the gradients with respect to the affine map to ``grad_weight`` and ``grad_bias``, both ``(C,)``."""
    grad_weight.copy_((grad_output.float() * norm).sum((0, 2)))
    grad_bias.copy_(grad_output.float().sum((0, 2)))


def sync_bn_backward_data(
    grad_output: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    norm: Tensor,
    std: Tensor,
    grad_input: Tensor,
) -> None:
    """Write the gradient with respect to the input, including the path through its statistics, to ``grad_input``."""
    count = grad_output.size(0) * grad_output.size(2)
    common = (grad_weight[:, None] * norm + grad_bias[:, None]) / count
    grad_input.copy_(weight[:, None] * (grad_output.float() - common) / std[:, None])


# ---- multi-scale deformable attention (DINO, Mask2Former) ----


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Perform multi-scale deformable attention (arXiv:2010.04159).

    This is mmcv's own implementation in plain torch, which mmcv calls on the CPU. It needs more memory than the kernel,
    since it holds all sampled values at once.

    Args:
        value: the values ``(B, sum of H * W over the levels, heads, D)``.
        value_spatial_shapes: the H and W of each level ``(levels, 2)``.
        value_level_start_index: the start of each level in ``value`` ``(levels,)``; not used, as the shapes imply it.
        sampling_locations: the x and y of the points, in 0 .. 1, ``(B, Q, heads, levels, points, 2)``.
        attention_weights: the weights of the points ``(B, Q, heads, levels, points)``.
        im2col_step: the step by which mmcv's kernel splits the batch; not used.

    Returns:
        The output ``(B, Q, heads * D)``, in the dtype of ``value``.
    """
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    float_value, locations, weights = _in_float32(value, sampling_locations, attention_weights)
    if locations.requires_grad:
        # As in deformable convolution, a point exactly one pixel outside the map gets no gradient from mmcv's kernel.
        sizes = value_spatial_shapes.flip(1)[:, None]  # (levels, 1, 2), x before y
        positions = locations.detach() * sizes - 0.5
        inside = ((positions > -1) & (positions < sizes)).all(-1, keepdim=True)
        locations = torch.where(inside, locations, locations.detach())
    return multi_scale_deformable_attn_pytorch(float_value, value_spatial_shapes, locations, weights).to(value)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Add each gradient of :func:`ms_deform_attn_forward` to the ``grad_*`` tensor of the same shape."""
    _add_gradients(
        lambda value, locations, weights: ms_deform_attn_forward(
            value, value_spatial_shapes, value_level_start_index, locations, weights, im2col_step
        ),
        inputs=(value, sampling_locations, attention_weights),
        grad_output=grad_output,
        totals=(grad_value, grad_sampling_loc, grad_attn_weight),
    )
