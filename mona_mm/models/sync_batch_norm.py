"""Synchronized batch normalization on CPUs, where torch's refuses its input, and DistributedDataParallel its class."""

from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce

from mona_mm.registry import MODELS


@MODELS.register_module()
class CPUSyncBatchNorm(nn.BatchNorm2d):
    """A ``SyncBatchNorm`` for the CPU: the statistics of a batch are those of the images of all processes.

    The input is ``(N, C, ...)`` of any number of dimensions, and each process may have another number of images, of
    other sizes. In one process it is a BatchNorm, whose names it has in the state dict.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(N, C, ...)`` by the mean and variance of every channel over the batches of all processes."""
        synchronised = self.training and distributed.is_initialized() and distributed.get_world_size() > 1
        if not synchronised:
            uses_batch = self.training or self.running_mean is None
            if self.training and self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, uses_batch, self._factor(), self.eps
            )
        others = [i for i in range(x.dim()) if i != 1]
        shape = [-1 if i == 1 else 1 for i in range(x.dim())]
        count = x.new_tensor(float(x.numel() // x.shape[1]))
        distributed.all_reduce(count)
        mean = all_reduce(x.sum(others)) / count
        centred = x - mean.view(shape)
        variance = all_reduce(centred.square().sum(others)) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        normed = centred * (variance + self.eps).rsqrt().view(shape)
        return normed if self.weight is None else normed * self.weight.view(shape) + self.bias.view(shape)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None:
            return
        self.num_batches_tracked.add_(1)
        factor = self._factor()
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(variance, factor)

    def _factor(self) -> float:
        """The weight of a batch in the running statistics; without ``momentum`` they are plain averages."""
        if self.momentum is None:
            return 1.0 / max(int(self.num_batches_tracked), 1) if self.training else 0.0
        return self.momentum
