"""The stand-in for mmcv's compiled module. :mod:`mona_mm.compat.mmcv_ext` imports it as ``mmcv._ext``.

Each function has the name, the arguments and the in-place results that the Python of ``mmcv.ops`` expects of
the compiled operator (mmcv 2.1.0, ``mmcv/ops/csrc/pytorch/pybind.cpp``). Provided are the operators that
stock configs with a Swin or ViT backbone call, on the CPU and on CUDA. Any other name gives a function that
raises when it is called.

Half and bfloat16 inputs are computed in float32, and the result is rounded once, into the dtype of the output
that mmcv allocated. (The compiled operators compute in half throughout and refuse bfloat16.)
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_INSTALL = (
    'This environment has mmcv without its compiled operators, and mona_mm stands in only for those that '
    'stock configs with a Swin or ViT backbone call. For the others install the full mmcv: '
    '`pip uninstall mmcv-lite`, then `mim install mmcv==2.1.0` (a prebuilt wheel, where there is one for '
    'your torch) or `pip install --no-build-isolation mmcv==2.1.0` (compiles them in about 10 minutes; needs '
    'a C++ compiler and, for CUDA, nvcc).'
)


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

    Args:
        boxes: ``(N, 4)`` as x1, y1, x2, y2.
        scores: ``(N,)``.
        iou_threshold: a box goes when its IoU with a kept box of higher score is above this.
        offset: 1 if x2 and y2 are the last pixel inside the box (its width is ``x2 - x1 + 1``), else 0.

    Returns:
        The indices of the kept boxes ``(K,)``, by falling score; equal scores keep the order of the input.
    """
    boxes, scores = _in_float32(boxes, scores)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])  # the same box with an open far edge
    return _torchvision_ops().nms(boxes, scores, iou_threshold)


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
    """Soft-NMS (arXiv:1704.04503): overlap with a better box lowers a score instead of removing the box.

    Args:
        boxes: ``(N, 4)`` as x1, y1, x2, y2.
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
    boxes, scores = _in_float32(boxes, scores.clone())
    left, kept = torch.arange(len(boxes), device=boxes.device), []
    while len(left):
        position = scores[left].argmax()
        best = left[position]
        dets[len(kept), :4] = boxes[best]
        dets[len(kept), 4] = scores[best]
        kept.append(best)
        left = torch.cat((left[:position], left[position + 1 :]))

        iou = _iou(boxes[best], boxes[left], offset)
        if method == 2:
            decay = torch.exp(-(iou**2) / sigma)
        else:
            decay = torch.where(iou >= iou_threshold, 1 - iou if method == 1 else 0.0, 1.0)
        scores[left] *= decay
        left = left[scores[left] >= min_score]
    return torch.stack(kept) if kept else left


def _iou(box: Tensor, boxes: Tensor, offset: int) -> Tensor:
    """IoU ``(N,)`` of a box ``(4,)`` with each of ``boxes`` ``(N, 4)``; zero where both are empty."""
    top_left = torch.maximum(box[:2], boxes[:, :2])
    bottom_right = torch.minimum(box[2:], boxes[:, 2:])
    intersection = (bottom_right - top_left + offset).clamp(min=0).prod(-1)
    area, areas = ((b[..., 2:] - b[..., :2] + offset).prod(-1) for b in (box, boxes))
    return intersection / (area + areas - intersection).clamp(min=torch.finfo(boxes.dtype).tiny)


# ---- RoIAlign ----


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
    """RoIAlign (arXiv:1703.06870) with average pooling, into ``output``.

    Args:
        input: ``(B, C, H, W)``.
        rois: ``(K, 5)`` as batch index, x1, y1, x2, y2, in the coordinates of the image.
        output: ``(K, C, aligned_height, aligned_width)``.
        argmax_y: empty, as is ``argmax_x``: only max pooling needs them.
        spatial_scale: from the coordinates of the image to those of ``input``.
        sampling_ratio: samples along each side of an output cell; 0 chooses it by the size of the RoI.
        pool_mode: 1 for the average.
        aligned: shifts by half a pixel, so that a sample at a pixel's centre is that pixel.

    Raises:
        NotImplementedError: ``pool_mode`` asks for the maximum, which torchvision does not have.
    """
    _refuse_max_pooling(pool_mode)
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
    _refuse_max_pooling(pool_mode)
    grad_output, rois = _in_float32(grad_output, rois)
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


def _refuse_max_pooling(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError(f"mmcv operator 'roi_align' with pool_mode='max' is not available. {_INSTALL}")


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


# ---- modulated deformable convolution (DyHead, GLIP) ----


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
    from torchvision.ops import deform_conv2d

    # DyHead passes the offsets and mask of a larger feature map. mmcv's kernel then takes, of each image, as many
    # values as it needs in the order of memory, and a model trained with mmcv expects that.
    offset, mask = (
        tensor.flatten(1)[:, : tensor.size(1) * output_size.numel()].unflatten(1, (tensor.size(1), *output_size))
        for tensor in (offset, mask)
    )
    input, weight, bias, offset, mask = _in_float32(input, weight, bias, offset, mask)
    stride, padding, dilation = (
        (geometry[f'{name}_h'], geometry[f'{name}_w']) for name in ('stride', 'pad', 'dilation')
    )
    return deform_conv2d(
        input, offset, weight, bias if geometry['with_bias'] else None, stride, padding, dilation, mask
    )


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
