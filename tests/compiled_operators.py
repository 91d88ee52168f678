"""Compare the stand-ins for mmcv's operators with mmcv's own C++ and CUDA sources, compiled for the CPU.

    python tests/compiled_operators.py --build-dir FOLDER

mmcv-lite brings the sources of the operators along. This compiles those that have a stand-in into one extension
module (about two minutes on one core; FOLDER keeps it): the CPU kernels as they are, and the CUDA kernels of operators
without one as plain loops, by defining away what CUDA adds to C++. Every stand-in is then called with random inputs
and with inputs on the edges (equal scores, IoUs equal to the threshold, taps and samples one pixel outside) beside the
compiled one. Printed are, for each operator, the number of comparisons and the largest difference, relative to the
largest value of the compiled result; and how long soft-NMS takes of both. Ends with 1 where a difference is above what
the order of summation explains.

It needs a C++ compiler and ninja.
"""

import argparse
import itertools
import sys
import time
from collections import defaultdict
from pathlib import Path

import mona_mm  # noqa: F401  first: it makes mmcv.ops importable

# isort: split
import mmcv._ext as ours
import torch
from mmcv import ops
from mmcv.ops.psa_mask import psa_mask
from torch.utils.cpp_extension import load

CUDA_FOR_THE_CPU = """
#pragma once
#include <torch/types.h>
#include <algorithm>
#include <cfloat>
#include <cmath>
using namespace at;
using std::max; using std::min;
struct Index { int x, y, z; };
static Index threadIdx{0, 0, 0}, blockIdx{0, 0, 0}, blockDim{1, 1, 1}, gridDim{1, 1, 1};
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __syncthreads()
template <typename T> static T atomicAdd(T* p, T v) { T old = *p; *p += v; return old; }
#include "common_cuda_helper.hpp"
using phalf = at::Half;
"""
BINDINGS = r"""
#include <torch/extension.h>
#include "pytorch_cpp_helper.hpp"
#include "pytorch_cuda_helper.hpp"
#include "pytorch_device_registry.hpp"
namespace nms {
#include "pytorch/cpu/nms.cpp"
}
namespace dcn {
#include "pytorch/cpu/deform_conv.cpp"
}
namespace dcnv2 {
#include "pytorch/cpu/modulated_deform_conv.cpp"
}
namespace roi {
#include "pytorch/cpu/roi_align.cpp"
}
namespace psa {
#include "pytorch/cpu/psamask.cpp"
}
namespace kernel {
#include "common/cuda/carafe_naive_cuda_kernel.cuh"
#include "common/cuda/masked_conv2d_cuda_kernel.cuh"
#include "common/cuda/deform_roi_pool_cuda_kernel.cuh"
#include "common/cuda/roi_align_cuda_kernel.cuh"
#include "common/cuda/sigmoid_focal_loss_cuda_kernel.cuh"
#include "common/cuda/sync_bn_cuda_kernel.cuh"
}
using torch::Tensor;
#define P(t) ((t).numel() ? (t).data_ptr<T>() : (T*)nullptr)
#define F(t) (t).data_ptr<float>()
#define L(t) (t).data_ptr<int64_t>()
#define BY_TYPE(t, ...) AT_DISPATCH_FLOATING_TYPES((t).scalar_type(), "", [&] { using T = scalar_t; __VA_ARGS__; })
#define BY_CHANNEL(t, call) for (blockIdx.x = 0; blockIdx.x < t.size(1); blockIdx.x++) { call; } blockIdx.x = 0
#define SIZES(t) t.size(0), t.size(1), t.size(2)
#define MAP(t) t.size(1), t.size(2), t.size(3)

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("nms", &nms::nms_cpu);
  m.def("softnms", &nms::softnms_cpu);
  m.def("nms_match", &nms::nms_match_cpu);
  m.def("dcn_im2col", &dcn::deformable_im2col_cpu);
  m.def("dcn_col2im", &dcn::deformable_col2im_cpu);
  m.def("dcn_col2im_coord", &dcn::deformable_col2im_coord_cpu);
  m.def("dcnv2_im2col", &dcnv2::modulated_deformable_im2col_cpu);
  m.def("dcnv2_col2im", &dcnv2::modulated_deformable_col2im_cpu);
  m.def("dcnv2_col2im_coord", &dcnv2::modulated_deformable_col2im_coord_cpu);
  m.def("psamask_forward", &psa::psamask_forward_cpu);
  m.def("psamask_backward", &psa::psamask_backward_cpu);
  m.def("roi_align_forward_cpu", &roi::ROIAlignForwardCPULauncher);
  m.def("roi_align_backward_cpu", &roi::ROIAlignBackwardCPULauncher);
  m.def("roi_align_forward_cuda", [](Tensor x, Tensor r, Tensor o, Tensor ay, Tensor ax, int h, int w, double scale,
                                     int ratio, int mode, bool aligned) {
    BY_TYPE(x, kernel::roi_align_forward_cuda_kernel<T>(o.numel(), P(x), P(r), P(o), P(ay), P(ax), h, w, (T)scale,
                                                        ratio, mode, aligned, MAP(x)));
  });
  m.def("roi_align_backward_cuda", [](Tensor go, Tensor r, Tensor ay, Tensor ax, Tensor g, int h, int w, double scale,
                                      int ratio, int mode, bool aligned) {
    BY_TYPE(g, kernel::roi_align_backward_cuda_kernel<T>(go.numel(), P(go), P(r), P(ay), P(ax), P(g), h, w, (T)scale,
                                                       ratio, mode, aligned, MAP(g)));
  });
  m.def("deform_roi_pool_forward", [](Tensor x, Tensor r, Tensor off, Tensor o, int h, int w, double scale, int ratio,
                                      double gamma) {
    BY_TYPE(x, kernel::deform_roi_pool_forward_cuda_kernel<T>(o.numel(), P(x), P(r), P(off), P(o), h, w, (T)scale,
                                                              ratio, (T)gamma, MAP(x)));
  });
  m.def("deform_roi_pool_backward", [](Tensor go, Tensor x, Tensor r, Tensor off, Tensor g, Tensor goff, int h, int w,
                                       double scale, int ratio, double gamma) {
    BY_TYPE(x, kernel::deform_roi_pool_backward_cuda_kernel<T>(go.numel(), P(go), P(x), P(r), P(off), P(g), P(goff), h,
                                                             w, (T)scale, ratio, (T)gamma, MAP(x)));
  });
  m.def("carafe_forward", [](Tensor f, Tensor m, Tensor o, int k, int g, int s) {
    BY_TYPE(f, kernel::carafe_naive_forward_cuda_kernel<T>(o.numel(), P(f), P(m), P(o), k, g, s, MAP(o)));
  });
  m.def("carafe_backward", [](Tensor go, Tensor f, Tensor m, Tensor gf, Tensor gm, int k, int g, int s) {
    BY_TYPE(f, kernel::carafe_naive_backward_cuda_kernel<T>(go.numel(), P(go), P(f), P(m), P(gf), P(gm), k, g, s,
                                                          MAP(go)));
  });
  m.def("masked_im2col_forward", [](Tensor x, Tensor h, Tensor w, Tensor col, int kh, int kw, int ph, int pw) {
    BY_TYPE(x, kernel::MaskedIm2colForward<T>(x.size(1) * h.numel(), P(x), x.size(2), x.size(3), kh, kw, ph, pw, L(h),
                                            L(w), h.numel(), P(col)));
  });
  m.def("masked_col2im_forward", [](Tensor col, Tensor h, Tensor w, Tensor x, int height, int width, int channels) {
    BY_TYPE(x, kernel::MaskedCol2imForward<T>(channels * h.numel(), P(col), height, width, channels, L(h), L(w),
                                            h.numel(), P(x)));
  });
  m.def("sigmoid_focal_loss_forward", [](Tensor x, Tensor t, Tensor w, Tensor o, double gamma, double alpha) {
    BY_TYPE(x, kernel::sigmoid_focal_loss_forward_cuda_kernel<T>(o.numel(), P(x), L(t), P(w), P(o), (T)gamma, (T)alpha,
                                                               x.size(1)));
  });
  m.def("sigmoid_focal_loss_backward", [](Tensor x, Tensor t, Tensor w, Tensor g, double gamma, double alpha) {
    BY_TYPE(x, kernel::sigmoid_focal_loss_backward_cuda_kernel<T>(g.numel(), P(x), L(t), P(w), P(g), (T)gamma, (T)alpha,
                                                                x.size(1)));
  });
  m.def("sync_bn_forward_mean", [](Tensor x, Tensor mean) {
    BY_CHANNEL(x, kernel::sync_bn_forward_mean_cuda_kernel<float>(F(x), F(mean), SIZES(x)));
  });
  m.def("sync_bn_forward_var", [](Tensor x, Tensor mean, Tensor var) {
    BY_CHANNEL(x, kernel::sync_bn_forward_var_cuda_kernel<float>(F(x), F(mean), F(var), SIZES(x)));
  });
  m.def("sync_bn_forward_output", [](Tensor x, Tensor mean, Tensor var, Tensor w, Tensor b, Tensor rm, Tensor rv,
                                     Tensor norm, Tensor std, Tensor o, double eps, double momentum, int group) {
    BY_CHANNEL(x, kernel::sync_bn_forward_output_cuda_kernel<float>(F(x), F(mean), F(var), F(rm), F(rv), F(w), F(b),
                                                                  F(norm), F(std), F(o), SIZES(x), eps, momentum,
                                                                  group));
  });
  m.def("sync_bn_backward_param", [](Tensor go, Tensor norm, Tensor gw, Tensor gb) {
    BY_CHANNEL(go, kernel::sync_bn_backward_param_cuda_kernel<float>(F(go), F(norm), F(gw), F(gb), SIZES(go)));
  });
  m.def("sync_bn_backward_data", [](Tensor go, Tensor w, Tensor gw, Tensor gb, Tensor norm, Tensor std, Tensor g) {
    kernel::sync_bn_backward_data_cuda_kernel<float>(go.numel(), F(go), F(w), F(gw), F(gb), F(norm), F(std), F(g),
                                                   SIZES(go));
  });
}
"""
# Relative to the largest value. Focal loss: mmcv rounds 1 - p in the dtype of the input, and its smallest p is a
# float32's.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6}
FOCAL_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4}


def build(folder: Path):
    """The extension module with mmcv's kernels."""
    sources = Path(ops.__file__).with_name('csrc')
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ('cuda.h', ''),
        ('pytorch_cuda_helper.hpp', CUDA_FOR_THE_CPU),
        ('pytorch_device_registry.hpp', '#pragma once\n#define REGISTER_DEVICE_IMPL(key, device, value)\n'),
        ('kernels.cpp', BINDINGS),
    ):
        path = folder / name
        if not path.exists() or path.read_text() != text:  # else it would be compiled again
            path.write_text(text)
    return load(
        'mmcv_kernels',
        [str(folder / 'kernels.cpp')],
        extra_include_paths=[str(folder), *(str(sources / part) for part in ('common', 'common/cuda', '.'))],
        extra_cflags=['-O2', '-w'],
        build_directory=str(folder),
        with_cuda=False,
    )


class Report:
    """Counts comparisons and keeps the largest difference of each operator."""

    def __init__(self) -> None:
        self.counts, self.worst, self.failed = defaultdict(int), defaultdict(float), 0

    def same(self, name: str, got, expected) -> None:
        """Lists of indices, which must be equal."""
        self.counts[name] += 1
        if got != expected:
            self.failed += 1
            print(f'{name}: {got} instead of {expected}')

    def close(self, name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: dict = TOLERANCE) -> None:
        """Tensors, which may differ by rounding."""
        self.counts[name] += 1
        scale = expected.abs().max().clamp(min=1e-30)
        difference = ((got - expected).abs().max() / scale).item() if got.shape == expected.shape else float('inf')
        name = f'{name} {expected.dtype}'.replace('torch.', '')
        self.worst[name] = max(self.worst[name], difference)
        if not difference <= tolerance[expected.dtype]:
            self.failed += 1
            print(f'{name}: differs by {difference:.2g}')

    def print(self) -> None:
        for name, count in self.counts.items():
            of_type = [f'{key.split()[1]} {value:.1e}' for key, value in self.worst.items() if key.split()[0] == name]
            print(f'{name:32} {count:5} comparisons, {", ".join(of_type) or "all equal"}')
        print(f'{self.failed} above the tolerance')


def random_boxes(count: int, whole: bool) -> torch.Tensor:
    if whole:
        corners, sides = torch.randint(0, 20, (count, 2)).float(), torch.randint(1, 12, (count, 2)).float()
    else:
        corners, sides = torch.rand(count, 2) * 60, torch.rand(count, 2) * 30
    return torch.cat((corners, corners + sides), 1)


def compare_nms(kernels, report: Report) -> None:
    for seed, threshold in itertools.product(range(40), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)):
        torch.manual_seed(seed)
        boxes, scores = random_boxes(60, whole=seed % 2 == 0), torch.rand(60)
        if seed % 4 > 1:
            scores = (scores * 8).round() / 8
        # mmcv leaves the order of equal scores to an unstable sort, so it gets the ranks of a stable one.
        ranks = torch.empty(60)
        ranks[scores.argsort(descending=True, stable=True)] = torch.linspace(1, 0, 60)
        for offset in range(2):
            expected = kernels.nms(boxes, ranks, threshold, offset).tolist()
            report.same('nms', ours.nms(boxes, scores, threshold, offset).tolist(), expected)
        dets, ranked = (torch.cat((boxes, column[:, None]), 1) for column in (scores, ranks))
        report.same('nms_match', ours.nms_match(dets, threshold), kernels.nms_match(ranked, threshold))
        for method, offset, min_score in itertools.product(range(3), range(2), (0.001, 0.05, 0.3)):
            dets = torch.zeros(2, 60, 5)
            kept = [
                module.softnms(boxes, scores, out, threshold, 0.5, min_score, method, offset).tolist()
                for module, out in ((ours, dets[0]), (kernels, dets[1]))
            ]
            report.same('softnms', *kept)
            report.close('softnms', *dets[:, : len(kept[1])])


def compare_deform_conv(kernels, report: Report) -> None:
    for dtype, kind, (stride, padding, dilation, groups), modulated in itertools.product(
        TOLERANCE, range(3), (((1, 1), (1, 1), (1, 1), 1), ((2, 1), (2, 1), (2, 1), 2)), (False, True)
    ):
        x, weight = torch.randn(2, 4, 7, 6, dtype=dtype), torch.randn(5, 4, 3, 3, dtype=dtype)
        size = [(s + 2 * p - d * 2 - 1) // t + 1 for s, p, d, t in zip((7, 6), padding, dilation, stride, strict=True)]
        offset = torch.randn(2, 2 * groups * 9, *size, dtype=dtype) * 2
        offset = (offset * 0, offset.round(), offset)[kind]
        mask, grad = torch.rand(2, groups * 9, *size, dtype=dtype), torch.randn(2, 5, *size, dtype=dtype)
        leaves = [t.clone().requires_grad_() for t in (x, offset, weight, *([mask] if modulated else []))]
        if modulated:
            output = ops.modulated_deform_conv2d(
                leaves[0], leaves[1], leaves[3], leaves[2], None, stride, padding, dilation, 1, groups
            )
        else:
            output = ops.deform_conv2d(*leaves, stride, padding, dilation, 1, groups)
        output.backward(grad)

        steps = (3, 3, *padding, *stride, *dilation)
        columns, gradients = x.new_zeros(36, 2 * size[0] * size[1]), [torch.zeros_like(leaf) for leaf in leaves]
        of_output = grad.transpose(0, 1).reshape(5, -1)
        of_columns = (weight.flatten(1).T @ of_output).contiguous()
        gradients[2] = None
        if modulated:
            sizes = (2, 4, 7, 6, *size, *steps, groups)
            kernels.dcnv2_im2col(x, offset, mask, *sizes, columns)
            kernels.dcnv2_col2im(of_columns, offset, mask, *sizes, gradients[0])
            kernels.dcnv2_col2im_coord(of_columns, x, offset, mask, *sizes, gradients[1], gradients[3])
        else:
            sizes = (4, 7, 6, *steps, 2, groups)
            kernels.dcn_im2col(x, offset, *sizes, columns)
            kernels.dcn_col2im(of_columns, offset, *sizes, gradients[0])
            kernels.dcn_col2im_coord(of_columns, x, offset, *sizes, gradients[1])
        gradients[2] = (of_output @ columns.T).view_as(weight)
        name = 'modulated_deform_conv' if modulated else 'deform_conv'
        report.close(name, output.detach(), (weight.flatten(1) @ columns).view(5, 2, *size).transpose(0, 1))
        for leaf, gradient in zip(leaves, gradients, strict=True):
            report.close(name, leaf.grad, gradient)


def compare_rois(kernels, report: Report) -> None:
    torch.manual_seed(0)
    corners, sides = torch.rand(40, 2) * 50 - 10, torch.rand(40, 2) * 60
    corners[::3], sides[::3], sides[5] = corners[::3].round(), (sides[::3] / 8).round() * 8, 0
    all_rois = torch.cat((torch.randint(0, 2, (40, 1)), corners, corners + sides), 1)
    for dtype, ratio in itertools.product(TOLERANCE, (0, 2, 3)):
        x, rois = torch.randn(2, 3, 9, 11, dtype=dtype), all_rois.to(dtype)
        grad = torch.randn(40, 3, 3, 2, dtype=dtype)
        for aligned, mode, device in itertools.product((False, True), range(2), ('cpu', 'cuda')):
            leaf, output = x.clone().requires_grad_(), torch.zeros_like(grad)
            result = ops.roi_align(leaf, rois, (3, 2), 0.25, ratio, ('max', 'avg')[mode], aligned)
            result.backward(grad)
            options, at, gradient = (3, 2, 0.25, ratio, mode, aligned), torch.zeros(2, *grad.shape), torch.zeros_like(x)
            at = at.to(dtype)
            getattr(kernels, f'roi_align_forward_{device}')(x, rois, output, *at, *options)
            getattr(kernels, f'roi_align_backward_{device}')(grad, rois, *at, gradient, *options)
            output[output < -10000] = -10000  # where nothing is sampled, the kernels' starts differ
            report.close('roi_align', result.detach(), output)
            report.close('roi_align', leaf.grad, gradient)
        for offset in (torch.zeros(0), torch.zeros(40, 2, 3, 2), torch.randn(40, 2, 3, 2) * 3):
            offset = offset.to(dtype)
            leaves = [t.clone().requires_grad_() for t in (x, offset)]
            options, output = (3, 2, 0.25, ratio, 0.125), torch.zeros_like(grad)
            gradients = [torch.zeros_like(leaf) for leaf in leaves]
            result = ops.deform_roi_pool(leaves[0], rois, leaves[1] if offset.numel() else None, (3, 2), *options[2:])
            result.backward(grad)
            kernels.deform_roi_pool_forward(x, rois, offset, output, *options)
            kernels.deform_roi_pool_backward(grad, x, rois, offset, *gradients, *options)
            report.close('deform_roi_pool', result.detach(), output)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                if leaf.numel():
                    report.close('deform_roi_pool', leaf.grad, gradient)


def compare_others(kernels, report: Report) -> None:
    for dtype, (kernel, groups, scale) in itertools.product(TOLERANCE, ((5, 1, 2), (3, 2, 3), (1, 4, 1))):
        features = torch.randn(2, 8, 5, 6, dtype=dtype)
        masks = torch.randn(2, groups * kernel**2, 5 * scale, 6 * scale, dtype=dtype)
        leaves = [t.clone().requires_grad_() for t in (features, masks)]
        result = ops.carafe(*leaves, kernel, groups, scale)
        grad, output = torch.randn_like(result), torch.zeros_like(result)
        result.backward(grad)
        gradients = [torch.zeros_like(leaf) for leaf in leaves]
        kernels.carafe_forward(features, masks, output, kernel, groups, scale)
        kernels.carafe_backward(grad, features, masks, *gradients, kernel, groups, scale)
        for got, expected in zip((result.detach(), *(t.grad for t in leaves)), (output, *gradients), strict=True):
            report.close('carafe', got, expected)

    for kind, size in itertools.product(range(2), ((3, 5), (13, 11), (4, 2))):
        leaf = torch.randn(2, size[0] * size[1], 6, 5, requires_grad=True)
        result = psa_mask(leaf, kind, size)
        grad, output, gradient = torch.randn_like(result), torch.zeros_like(result), torch.zeros_like(leaf)
        result.backward(grad)
        sizes = (2, 6, 5, *size, (size[0] - 1) // 2, (size[1] - 1) // 2)
        kernels.psamask_forward(kind, leaf.detach(), output, *sizes)
        kernels.psamask_backward(kind, grad, gradient, *sizes)
        report.close('psamask', result.detach(), output)
        report.close('psamask', leaf.grad, gradient)

    x, rows, columns = torch.randn(1, 4, 6, 7), torch.tensor([0, 5, 3, 2]), torch.tensor([0, 6, 3, 6])
    for kernel, padding in (((3, 3), (1, 1)), ((1, 1), (0, 0)), ((3, 5), (0, 2)), ((3, 3), (2, 2))):
        windows = torch.zeros(2, 4 * kernel[0] * kernel[1], 4)
        for module, out in zip((ours, kernels), windows, strict=True):
            module.masked_im2col_forward(x, rows, columns, out, *kernel, *padding)
        report.close('masked_conv2d', *windows)
    maps = torch.zeros(2, 1, 4, 6, 7)
    for module, out in zip((ours, kernels), maps, strict=True):
        module.masked_col2im_forward(x[0, :, 0, :4].contiguous(), rows, columns, out, 6, 7, 4)
    report.close('masked_conv2d', *maps)

    for dtype, (gamma, alpha), weighted in itertools.product(
        TOLERANCE, ((2.0, 0.25), (1.5, 0.4), (0.0, 0.5)), (False, True)
    ):
        logits, weight = torch.randn(50, 7, dtype=dtype) * 3, torch.rand(7 if weighted else 0, dtype=dtype)
        target = torch.randint(0, 7 if weighted else 8, (50,))
        for name in ('sigmoid_focal_loss_forward', 'sigmoid_focal_loss_backward'):
            out = torch.zeros(2, 50, 7, dtype=dtype)
            for module, result in zip((ours, kernels), out, strict=True):
                getattr(module, name)(logits, target, weight, result, gamma, alpha)
            report.close('sigmoid_focal_loss', *out, FOCAL_TOLERANCE)

    for group in (1, 2):
        results = []
        for module in (ours, kernels):
            torch.manual_seed(0)
            x, grad, norm, output, gradient = torch.randn(5, 3, 4, 10)
            mean, var, weight, bias, running_mean, running_var, std, of_weight, of_bias = torch.rand(9, 4)
            module.sync_bn_forward_mean(x[:], mean)
            module.sync_bn_forward_var(x, mean, var)
            module.sync_bn_forward_output(
                x, mean, var, weight, bias, running_mean, running_var, norm, std, output, 1e-5, 0.1, group
            )
            module.sync_bn_backward_param(grad, norm, of_weight, of_bias)
            module.sync_bn_backward_data(grad, weight, of_weight, of_bias, norm, std, gradient)
            results.append((mean, var, running_mean, running_var, norm, std, output, of_weight, of_bias, gradient))
        for got, expected in zip(*results, strict=True):
            report.close('sync_bn', got, expected)


def time_soft_nms(kernels) -> None:
    for count, method in itertools.product((100, 300, 1000, 3000), (1, 2)):
        torch.manual_seed(1)
        corners = torch.rand(count, 2) * 800
        boxes, scores = torch.cat((corners, corners + torch.rand(count, 2) * 200 + 5), 1), torch.rand(count)
        best = []
        for module in (ours, kernels):
            seconds = []
            for _ in range(5):
                start = time.process_time()
                module.softnms(boxes, scores, torch.zeros(count, 5), 0.5, 0.5, 0.05, method, 0)
                seconds.append(time.process_time() - start)
            best.append(min(seconds) * 1000)
        print(
            f'soft-NMS, {("linear", "gaussian")[method - 1]}, {count} boxes: {best[0]:.2f} ms, compiled '
            f'{best[1]:.2f} ms, {best[0] / best[1]:.1f} times'
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--build-dir', type=Path, required=True, help='where the compiled kernels are kept')
    kernels = build(parser.parse_args().build_dir)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    report = Report()
    for compare in (compare_nms, compare_deform_conv, compare_rois, compare_others):
        compare(kernels, report)
    report.print()
    time_soft_nms(kernels)
    return 1 if report.failed else 0


if __name__ == '__main__':
    sys.exit(main())
