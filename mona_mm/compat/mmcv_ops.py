"""The stand-in for mmcv's compiled module. :mod:`mona_mm.compat.mmcv_ext` imports it as ``mmcv._ext``.

Each function has the name, the arguments and the in-place results that the Python of ``mmcv.ops`` expects of
the compiled operator (mmcv 2.1.0, ``mmcv/ops/csrc/pytorch/pybind.cpp``). Provided are the operators that the
shipped configs of mmdet, mmseg and mmpretrain reach, on the CPU and on CUDA. Any other name gives a function
that raises when it is called.

Half and bfloat16 inputs are computed in float32, and the result is rounded once, into the dtype of the output
that mmcv allocated. (The compiled operators compute in half throughout and refuse bfloat16.)
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
_AHEAD = 64  # boxes whose factors soft-NMS makes at once


def __getattr__(name: str):
    """Any operator without a stand-in, as a function that raises NotImplementedError and names it.

    Importing ``mmcv.ops`` asserts that each of its operators exists, so one may raise only when called.
    """
    if name.startswith('_'):  # __path__ and the like, which Python and its tools probe for: never an operator
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def missing_operator(*args, **kwargs):
        raise NotImplementedError(f'mmcv operator {name!r} is not available. {_INSTALL}')

    return missing_operator


def get_compiler_version() -> str:
    """For the environment report that the mm libraries log."""
    return 'none (operators from mona_mm, on torchvision)'


def get_compiling_cuda_version() -> str:
    """For the environment report that the mm libraries log."""
    return 'not available'


def _torchvision_ops():
    """torchvision's operators, imported with the first call because the import alone takes about a second."""
    import torchvision  # noqa: F401  registers torch.ops.torchvision

    return torch.ops.torchvision


def _in_float32(*tensors: Tensor) -> list[Tensor]:
    """``tensors`` in their common dtype, at least float32: torchvision refuses a mixture, and half on CPU."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


def _add_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor, totals: Sequence[Tensor]
) -> None:
    """Add the gradients of ``function(*inputs)`` to ``totals``, by running it again under autograd."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():  # autograd calls the backward of a custom function without it
        output = function(*inputs)
    gradients = torch.autograd.grad(output, inputs, grad_output.to(output), materialize_grads=True)
    for total, gradient in zip(totals, gradients, strict=True):
        total += gradient


# ---- non-maximum suppression ----


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy non-maximum suppression.

    The IoU and the threshold are compared in the dtype of the boxes, as in mmcv: a threshold of 0.3 is the
    float32 next to 0.3, and so is the IoU of two boxes whose areas give 3 / 10, which are both kept.

    Args:
        boxes: ``(N, 4)`` as x1, y1, x2, y2.
        scores: ``(N,)``.
        iou_threshold: a box goes when its IoU with a kept box of higher score is above this.
        offset: 1 if x2 and y2 are the last pixel inside the box (its width is ``x2 - x1 + 1``), else 0.

    Returns:
        The indices of the kept boxes ``(K,)``, by falling score; equal scores keep the order of the input.
    """
    boxes, scores = _in_float32(boxes, scores)
    if offset:  # torchvision has none, and moving the far edge first would round differently
        groups = _greedy_groups(boxes, scores, offset, lambda iou: iou > iou_threshold)
        return torch.tensor([group[0] for group in groups], dtype=torch.int64, device=boxes.device)
    threshold = boxes.new_tensor(iou_threshold).item()  # torchvision would compare in float64
    return _torchvision_ops().nms(boxes, scores, threshold)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Greedy non-maximum suppression that tells which boxes each kept box has suppressed.

    Args:
        dets: ``(N, 5)`` on the CPU, as x1, y1, x2, y2, score.
        iou_threshold: a box goes when its IoU with a kept box of higher score is this or above
            (:func:`nms` would still keep a box of exactly this IoU; so does mmcv).

    Returns:
        For each kept box, by falling score, its index and then those of the boxes it suppressed, by falling
        score.
    """
    (dets,) = _in_float32(dets)
    return _greedy_groups(dets[:, :4], dets[:, 4], 0, lambda iou: iou >= iou_threshold)


def _greedy_groups(
    boxes: Tensor, scores: Tensor, offset: int, suppresses: Callable[[np.ndarray], np.ndarray]
) -> list[list[int]]:
    """The groups of :func:`nms_match`, where ``suppresses`` tells for each IoU whether the lesser box goes."""
    left = scores.argsort(descending=True, stable=True).cpu().numpy()
    corners, areas = _corners_and_areas(boxes, offset)
    groups = []
    while len(left):
        best, left = left[0], left[1:]
        gone = suppresses(_iou(corners[:, best, None], areas[best], corners[:, left], areas[left], offset))
        groups.append([int(best), *left[gone].tolist()])
        left = left[~gone]
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
    """Soft-NMS (arXiv:1704.03503): overlap with a better box lowers a score instead of removing the box.

    The boxes stand in mmcv's order at every step, which decides between equal scores: the best one changes
    places with the first one left, and the last one takes the place of a box that goes. Where both of two boxes
    are empty, mmcv's IoU is not a number, nor are the scores that the Gaussian makes of it. Here it is zero.

    Args:
        boxes: ``(N, 4)`` on the CPU, as are all tensors here, as x1, y1, x2, y2.
        scores: ``(N,)``.
        dets: ``(N, 5)``, receives the kept boxes and their lowered scores in its first K rows.
        iou_threshold: for methods 0 and 1, the IoU from which a score is lowered.
        sigma: for method 2, the width of the Gaussian.
        min_score: a box goes when its score falls below this.
        method: 0 sets the score to zero, 1 multiplies it by ``1 - IoU``, 2 by ``exp(-IoU**2 / sigma)``.
        offset: see :func:`nms`.

    Returns:
        The indices of the kept boxes ``(K,)``, by falling lowered score.
    """
    boxes, lowered = _in_float32(boxes, scores.clone())
    lowered, indices = lowered.numpy(), np.arange(len(boxes))  # in the present order, which changes
    corners, areas = _corners_and_areas(boxes, offset)  # in the order of the input, as are the rows of factors

    def factors(rows: np.ndarray) -> np.ndarray:
        iou = _iou(corners[:, rows, None], areas[rows, None], corners[:, None], areas, offset)
        if method == 2:
            np.multiply(iou, -iou, out=iou)
            iou /= sigma
            # By way of float64, as numpy's float32 rounds less well than C's, and equal scores may hang on it.
            return np.exp(iou, dtype=np.float64).astype(iou.dtype)
        return np.where(iou >= iou_threshold, 1 - iou if method == 1 else 0, 1).astype(iou.dtype)

    ready, count, step = {}, len(boxes), 0
    while step < count:
        best = step + int(lowered[step:count].argmax())
        lowered[step], lowered[best] = lowered[best], lowered[step]
        indices[step], indices[best] = indices[best], indices[step]

        index = int(indices[step])
        if index not in ready:  # made for the best of those left, as they are likely to follow soon
            next_best = indices[step + (-lowered[step:count]).argsort(kind='stable')[:_AHEAD]]
            ready = dict(zip(next_best.tolist(), factors(next_best), strict=True))
        rest, others = lowered[step + 1 : count], indices[step + 1 : count]
        rest *= ready[index][others]

        if len(rest) and rest.min() < min_score:
            goes = rest < min_score
            stays = np.flatnonzero(~goes)
            holes = np.flatnonzero(goes[: len(stays)])
            last = stays[len(stays) - len(holes) :][::-1]
            rest[holes], others[holes] = rest[last], others[last]
            count = step + 1 + len(stays)
        step += 1
    kept = torch.from_numpy(indices[:count])
    dets[:count, :4] = boxes[kept]
    dets[:count, 4] = torch.from_numpy(lowered[:count])
    return kept


def _corners_and_areas(boxes: Tensor, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Of boxes ``(N, 4)``: their corners ``(4, N)`` as -x1, -y1, x2, y2, and their areas ``(N,)``."""
    corners = boxes.T.cpu().numpy() * np.array([[-1], [-1], [1], [1]], dtype=np.float32)
    width, height = corners[2:] + corners[:2] + offset
    return corners, width * height


def _iou(
    corners: np.ndarray, areas: np.ndarray, others: np.ndarray, other_areas: np.ndarray, offset: int
) -> np.ndarray:
    """IoU of boxes, by their corners ``(4, ...)`` and areas, with others, broadcast; zero where both are empty.

    The operations are in mmcv's order, so that the results are rounded alike.
    """
    width, height = (np.minimum(corners[axis + 2], others[axis + 2]) for axis in range(2))
    for axis, side in enumerate((width, height)):  # in place, as new memory costs more than the arithmetic
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
    """RoIAlign (arXiv:1703.06870), into ``output``.

    Args:
        input: ``(B, C, H, W)``.
        rois: ``(K, 5)`` as batch index, x1, y1, x2, y2, in the coordinates of the image.
        output: ``(K, C, aligned_height, aligned_width)``.
        argmax_y: for the maximum, receives where it was found, in the shape of ``output``; else empty, as is
            ``argmax_x``. Both are -1 where nothing was found.
        spatial_scale: from the coordinates of the image to those of ``input``.
        sampling_ratio: samples along each side of an output cell; 0 chooses it by the size of the RoI.
        pool_mode: 0 for the maximum of a cell's samples, 1 for their average.
        aligned: shifts by half a pixel, so that a sample at a pixel's centre is that pixel.
    """
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
    """The gradient of :func:`roi_align_forward` by its input, added to ``grad_input`` ``(B, C, H, W)``.

    On CUDA it sums with atomic additions, as mmcv's does; unlike mmcv's it then raises the RuntimeError of
    ``torch.use_deterministic_algorithms(True)``.
    """
    grad_output, rois, argmax_y, argmax_x = _in_float32(grad_output, rois, argmax_y, argmax_x)
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
    """RoIAlign by the maximum, and the y and x where it is, into the three ``results`` ``(K, C, *pooled_size)``.

    mmcv starts from -10000 on the CPU and from the lowest float32 on CUDA, and that is the result of a cell
    without a sample above it.
    """
    input, rois = _in_float32(input, rois)
    height, width = input.shape[2:]
    lowest = torch.finfo(torch.float32).min if input.is_cuda else -10000.0
    pixels = input.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H * W, C)
    # One RoI at a time, as every sample of every RoI is held for all channels.
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
    """Deformable RoI pooling (arXiv:1703.06211), into ``output``: RoIAlign with each cell shifted.

    Args:
        input: ``(B, C, H, W)``.
        rois: ``(K, 5)``, as those of :func:`roi_align_forward` with ``aligned``.
        offset: ``(K, 2, pooled_height, pooled_width)``, x before y, in sizes of the RoI; or empty.
        output: ``(K, C, pooled_height, pooled_width)``.
        spatial_scale: from the coordinates of the image to those of ``input``.
        sampling_ratio: samples along each side of an output cell; 0 chooses it by the size of the RoI.
        gamma: by which every offset is multiplied.
    """
    pooled_size = (pooled_height, pooled_width)
    input, rois, offset = _in_float32(input, rois, offset)
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
    """The gradients of :func:`deform_roi_pool_forward`, added to ``grad_input`` and ``grad_offset``.

    The gradient by the offset is mmcv's. It is the derivative where a sample lies between pixels' centres.
    Beyond the outermost ones, where the value is that of the border, mmcv continues the slopes from inside the
    map at the near borders, and has zero for both coordinates at the far ones.
    """
    pooled_size = (pooled_height, pooled_width)
    grad_output, input, rois, offset = _in_float32(grad_output, input, rois, offset)
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
    """The samples of deformable RoI pooling: to which cell and image each belongs, for :func:`_pool`, and y and x."""
    cells, counts, *points = _roi_samples(rois, pooled_size, spatial_scale, sampling_ratio, aligned=True)
    roi_of_sample = cells // (pooled_size[0] * pooled_size[1])
    if offset.numel():
        sizes = (rois[:, 3:] - rois[:, 1:3]) * spatial_scale * gamma
        shifts = (offset * sizes[:, :, None, None]).transpose(0, 1).flatten(1)[:, cells]  # x before y
        points = [point + shift for point, shift in zip(points, shifts.flip(0), strict=True)]
    pixels = input.size(2) * input.size(3)
    return (counts, cells, rois[:, 0].long()[roi_of_sample] * pixels), points


def _pool(input: Tensor, bags: tuple[Tensor, Tensor, Tensor], positions: Tensor, weights: Tensor) -> Tensor:
    """The average ``(cells, C)`` of each cell's samples, which are sums of weighted pixels of ``input``."""
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
    """Where RoIAlign samples.

    Returns:
        For each of S samples, in the order of the kernel's loops, the index of its cell among the
        ``K * pooled_height * pooled_width`` cells; for each cell, how many it has; for each sample, y and x.
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

    The order is top left, top right, bottom left, bottom right. Up to a pixel outside the map counts as its
    border, and a point further outside has no weights: the convention of RoIAlign.
    """
    (top, bottom, below), (left, right, beside) = _neighbours(y, height), _neighbours(x, width)
    positions = torch.stack((top * width + left, top * width + right, bottom * width + left, bottom * width + right), 1)
    weights = torch.stack(
        ((1 - below) * (1 - beside), (1 - below) * beside, below * (1 - beside), below * beside), dim=1
    )
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    return positions, weights * inside[:, None]


def _neighbours(coordinate: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels before and after a coordinate, which is first moved into the map, and its distance from the former."""
    coordinate = coordinate.nan_to_num().clamp(0, size - 1)
    before = coordinate.long()
    return before, (before + 1).clamp(max=size - 1), coordinate - before


# ---- focal loss ----


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss (arXiv:1708.02002), per element, into ``output``.

    ``-a * (1 - p)**gamma * log(p)``, where ``p`` is the probability of the element's label (this class is, or
    is not, the target) and ``a`` is ``alpha`` for the target and ``1 - alpha`` for the other classes.

    Args:
        input: logits ``(N, C)``.
        target: class indices ``(N,)``, int64; anything but ``0 .. C - 1`` is background.
        weight: empty, or ``(C,)``, by which the loss of a row is multiplied according to its target. Rows of
            background keep their loss (for them mmcv reads past the end of ``weight``).
        output: ``(N, C)``.
        gamma: how fast the loss of well classified elements falls.
        alpha: the share of the target against the other classes.
    """
    logit, _, scale = _focal_terms(input, target, weight, alpha)
    output.copy_(-scale * torch.sigmoid(-logit) ** gamma * F.logsigmoid(logit))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """The derivative of :func:`sigmoid_focal_loss_forward`, per element, into ``grad_input`` ``(N, C)``."""
    logit, sign, scale = _focal_terms(input, target, weight, alpha)
    miss = torch.sigmoid(-logit)  # 1 - p, without the cancellation
    slope = miss**gamma * (gamma * (1 - miss) * F.logsigmoid(logit) - miss)
    grad_input.copy_(sign * scale * slope)


def _focal_terms(input: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Per element ``(N, C)``: the logit of its label, the sign in that, and the factor of its loss."""
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
    """Deformable convolution (arXiv:1703.06211), into ``output``: the modulated one with a mask of ones.

    Args:
        input: ``(B, C_in, H, W)``.
        weight: ``(C_out, C_in / group, kH, kW)``.
        offset: ``(B, 2 * deformable_group * kH * kW, H_out, W_out)``, y before x.
        output: ``(B, C_out, H_out, W_out)``.
        columns: a buffer of mmcv's, unused, as is ``ones``.
        geometry: ``dH``, ``padH``, ``dilationH``, the same for W, and sizes that the tensors tell as well.
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
    """The gradients of :func:`deform_conv_forward` by input and offset, added to ``grad_input``, ``grad_offset``."""
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
    """``scale`` times the gradient of :func:`deform_conv_forward` by its weight, added to ``grad_weight``."""
    _add_gradients(
        lambda weight: _deform_conv(input, weight, offset, grad_output.shape[2:], _deform_conv_geometry(geometry)),
        inputs=(grad_weight,),  # the result is linear in the weight, so any will do
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
    """Modulated deformable convolution (arXiv:1811.11168), into ``output``.

    Args:
        input: ``(B, C_in, H, W)``.
        weight: ``(C_out, C_in / group, kernel_h, kernel_w)``.
        bias: ``(C_out,)``, or empty.
        ones: a buffer of mmcv's, unused, as is ``columns``.
        offset: ``(B, 2 * deformable_group * kernel_h * kernel_w, H_out, W_out)``, y before x.
        mask: ``(B, deformable_group * kernel_h * kernel_w, H_out, W_out)``.
        output: ``(B, C_out, H_out, W_out)``.
        geometry: ``stride_h``, ``pad_h``, ``dilation_h``, the same for w, and sizes that the tensors tell as well.
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
    """The gradients of :func:`modulated_deform_conv_forward`, each added to its ``grad_*`` of equal shape."""
    _add_gradients(
        lambda *inputs: _modulated_deform_conv(*inputs, grad_output.shape[2:], geometry),
        inputs=(input, weight, bias, offset, mask),
        grad_output=grad_output,
        totals=(grad_input, grad_weight, grad_bias, grad_offset, grad_mask),
    )


def _modulated_deform_conv(
    input: Tensor, weight: Tensor, bias: Tensor, offset: Tensor, mask: Tensor, output_size: torch.Size, geometry: dict
) -> Tensor:
    # DyHead passes the offsets and mask of a larger feature map. mmcv's kernel then takes, of each image, as many
    # values as it needs in the order of memory, and a model trained with mmcv expects that.
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
    """torchvision's deformable convolution with the gradients of mmcv's; ``geometry`` is stride, padding, dilation.

    They differ at taps that lie exactly one pixel outside the map, as those in the padding do while the offsets
    are zero. The sample is zero there and rises towards the map, and mmcv gives the offset a gradient of zero.
    """
    from torchvision.ops import deform_conv2d

    optional = [tensor for tensor in (mask, bias) if tensor is not None]
    input, weight, offset, *optional = _in_float32(input, weight, offset, *optional)
    mask = optional.pop(0) if mask is not None else None
    bias = optional.pop() if bias is not None else None

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
    """The windows of a convolution of stride 1 around chosen pixels, with zeros outside, into ``data_col``.

    Args:
        features: ``(1, C, H, W)``.
        mask_h_idx: the rows of the pixels ``(M,)``, and ``mask_w_idx`` their columns.
        data_col: ``(C * kernel_h * kernel_w, M)``.
        pad_h: how far above its pixel a window begins, and ``pad_w`` how far left.
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
    """Put ``masked_output`` ``(channels, M)`` to M pixels of ``output`` ``(1, channels, height, width)``."""
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
    """CARAFE (arXiv:1905.02188), into ``output``: upsampling with a kernel of its own for every output pixel.

    Args:
        features: ``(B, C, H, W)``.
        masks: the kernels, ``(B, group_size * kernel_size**2, H * scale_factor, W * scale_factor)``.
        rfeatures: a buffer in the shape of ``features``, of which :func:`carafe_backward` gets what this leaves.
        routput: a buffer of mmcv's, unused, as is ``rmasks``.
        output: ``(B, C, H * scale_factor, W * scale_factor)``.
        kernel_size: pixels of ``features``, around the one that an output pixel belongs to, that it is made of.
        group_size: in how many groups of channels; each has kernels of its own.
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
    """The gradients of :func:`carafe_forward`, added to ``grad_input`` and ``grad_masks``; ``rgrad_*`` are unused."""
    carafe_naive_backward(grad_output, rfeatures, masks, grad_input, grad_masks, kernel_size, group_size, scale_factor)


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """:func:`carafe_forward` without its buffers."""
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
    """The gradients of :func:`carafe_naive_forward`, added to ``grad_input`` and ``grad_masks``."""
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
    """``(B, C, H * scale, W * scale)`` as ``(B, groups, C / groups, scale, scale, H, W)``, rows of W in memory."""
    tensor = tensor.unflatten(1, (groups, -1)).unflatten(-1, (-1, scale)).unflatten(-3, (-1, scale))
    return tensor.permute(0, 1, 2, 4, 6, 3, 5).contiguous()


def _carafe_pixels(tensor: Tensor) -> Tensor:
    """The inverse of :func:`_carafe_phases`."""
    return tensor.permute(0, 1, 2, 5, 3, 6, 4).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def _carafe_windows(features: Tensor, kernel_size: int, groups: int) -> Iterator[Tensor]:
    """For each tap of the kernel, what the pixels of ``features`` have there, ``(B, groups, C / groups, H, W)``."""
    border = (kernel_size - 1) // 2
    return _windows(F.pad(features, (border,) * 4), kernel_size, groups)


def _windows(padded: Tensor, kernel_size: int, groups: int) -> Iterator[Tensor]:
    """The views of a padded map, shifted by each tap of a kernel."""
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
    """Lay the mask of every pixel over the whole map (PSANet, ECCV 2018), into ``output``.

    Args:
        input: ``(num_, h_mask * w_mask, h_feature, w_feature)``: for each pixel, the mask around it.
        output: ``(num_, h_feature * w_feature, h_feature, w_feature)``, zero where a mask does not reach.
        psa_type: 0 to collect, where a pixel's mask lies over the channels of ``output`` at that pixel, or 1 to
            distribute, where it lies over the map in the pixel's channel.
        half_h_mask: the row of the mask's centre, and ``half_w_mask`` its column.
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
    """The gradient of :func:`psamask_forward` by its input, into ``grad_input``."""
    rows, columns = (
        torch.arange(mask, device=grad_input.device)[:, None] + torch.arange(size, device=grad_input.device) - half
        for mask, size, half in ((h_mask, h_feature, half_h_mask), (w_mask, w_feature, half_w_mask))
    )
    maps = _psa_maps(grad_output, psa_type, h_feature, w_feature)
    grad_input.copy_(_take_around(maps, rows, columns).flatten(1, 2))


def _psa_maps(tensor: Tensor, psa_type: int, height: int, width: int) -> Tensor:
    """A view ``(B, H, W, H, W)`` of an output of PSA: the row and column of the other pixel, then the pixel's own."""
    maps = tensor.view(-1, height, width, height, width)
    return maps.permute(0, 3, 4, 1, 2) if psa_type == 1 else maps


def _take_around(source: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """For each pixel, what ``source`` ``(B, R, S, H, W)`` has of it at rows ``(A, H)`` and columns ``(C, W)``.

    Returns:
        ``(B, A, C, H, W)``, zero where the row or the column is outside ``0 .. R - 1`` or ``0 .. S - 1``.
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
# mmcv reduces the statistics over the processes between these calls. They are float32 for every input.


def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """The mean of each channel of ``input`` ``(B, C, S)``, into ``mean`` ``(C,)``."""
    mean.copy_(input.float().mean((0, 2)))


def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """The mean squared distance of each channel of ``input`` ``(B, C, S)`` from ``mean`` ``(C,)``, into ``var``."""
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
    """Normalize ``input`` ``(B, C, S)`` into ``output``, and move the running statistics.

    Args:
        mean: the statistics over all processes ``(C,)``, as is ``var``.
        weight: the affine map ``(C,)``, as is ``bias``.
        running_mean: the running statistics ``(C,)``, as is ``running_var``, changed in place.
        norm: receives the normalized input before the affine map, in float32.
        std: receives the standard deviation ``(C,)``.
        momentum: the share of the new statistics in the running ones.
        group_size: the number of processes, by which the variance is made unbiased.
    """
    std.copy_((var + eps).sqrt())
    norm.copy_((input.float() - mean[:, None]) / std[:, None])
    output.copy_(norm * weight[:, None] + bias[:, None])
    count = input.size(0) * input.size(2) * group_size
    unbiased = var * count / (count - 1) if count > 1 else var
    for running, new in ((running_mean, mean), (running_var, unbiased)):
        running.copy_(momentum * new + (1 - momentum) * running)


def sync_bn_backward_param(grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """The gradients of :func:`sync_bn_forward_output` by the affine map, into ``grad_weight`` and ``grad_bias``."""
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
    """The gradient of :func:`sync_bn_forward_output` by its input and the statistics of it, into ``grad_input``."""
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
    """Multi-scale deformable attention (arXiv:2010.04159).

    This is mmcv's own formula in plain torch, which mmcv calls on the CPU. Against the kernel it needs more
    memory, as it holds all sampled values at once.

    Args:
        value: ``(B, sum of H * W over the levels, heads, D)``.
        value_spatial_shapes: H and W of each level, ``(levels, 2)``.
        value_level_start_index: where each level begins in ``value``, ``(levels,)``; follows from the shapes.
        sampling_locations: x, y in 0 .. 1, ``(B, Q, heads, levels, points, 2)``.
        attention_weights: ``(B, Q, heads, levels, points)``.
        im2col_step: how mmcv's kernel splits the batch, unused.

    Returns:
        ``(B, Q, heads * D)``, in the dtype of ``value``.
    """
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    float_value, locations, weights = _in_float32(value, sampling_locations, attention_weights)
    if locations.requires_grad:
        # As in deformable convolution, mmcv's kernel gives a point exactly one pixel outside no gradient.
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
    """The gradients of :func:`ms_deform_attn_forward`, each added to its ``grad_*`` of equal shape."""
    _add_gradients(
        lambda value, locations, weights: ms_deform_attn_forward(
            value, value_spatial_shapes, value_level_start_index, locations, weights, im2col_step
        ),
        inputs=(value, sampling_locations, attention_weights),
        grad_output=grad_output,
        totals=(grad_value, grad_sampling_loc, grad_attn_weight),
    )
