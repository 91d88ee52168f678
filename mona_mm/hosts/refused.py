"""Backbones of the libraries that cannot be hosts, and why."""

from mona_mm.hosts.host import REFUSED

_DET, _SEG, _PRE = (f'{library}.models.backbones' for library in ('mmdet', 'mmseg', 'mmpretrain'))

_SEQUENCE = 'it is one sequence of convolutions, without residual blocks'
_CONCATENATION = 'its blocks concatenate their outputs, and add nothing to a stream'
_PARALLEL = (
    'its blocks are sums of parallel convolutions of one input, which become one convolution for inference: there is '
    'no residual branch'
)
_SPARSE = (
    "it runs only within SparK's pre-training, whose mask its layers multiply by; its weights are fine-tuned in the "
    'dense class'
)
_AROUND = (
    'its own layers have no residual blocks, and its backbone is built from `backbone_cfg`: put '
    "`dict(type='mona_mm.PeftBackbone', base=..., peft=...)` there"
)

REFUSED.update(
    {
        f'{_DET}.detectors_resnet.DetectoRS_ResNet': 'its recursive pass runs the blocks by `rfp_forward`, where no '
        'stream site is reached, and the convolutions of its configs (`ConvAWS`) standardise their weights: none '
        'is a linear layer',
        f'{_DET}.ssd_vgg.SSDVGG': _SEQUENCE,
        f'{_SEG}.bisenetv1.BiSeNetV1': _AROUND,
        f'{_SEG}.icnet.ICNet': _AROUND,
        f'{_SEG}.stdc.STDCNet': _CONCATENATION + " (`bottleneck_type='cat'`, as published)",
        f'{_SEG}.stdc.STDCContextPathNet': 'it stands around an STDCNet, whose blocks concatenate their outputs, and '
        'add nothing to a stream',
        f'{_SEG}.unet.UNet': 'its blocks are sequences of two convolutions, without a residual add',
        f'{_SEG}.vpd.VPD': 'its network is the U-Net of Stable Diffusion, whose classes are in the package `ldm`',
        f'{_PRE}.alexnet.AlexNet': _SEQUENCE,
        f'{_PRE}.lenet.LeNet5': _SEQUENCE,
        f'{_PRE}.vgg.VGG': _SEQUENCE,
        f'{_PRE}.cspnet.CSPNet': 'it is the base class of CSPDarkNet, CSPResNet and CSPResNeXt, and in no registry',
        f'{_PRE}.densenet.DenseNet': _CONCATENATION,
        f'{_PRE}.inception_v3.InceptionV3': _CONCATENATION,
        f'{_PRE}.shufflenet_v2.ShuffleNetV2': 'its units concatenate and shuffle halves of the channels, and add '
        'nothing to a stream',
        f'{_PRE}.mobileone.MobileOne': _PARALLEL,
        f'{_PRE}.repvgg.RepVGG': _PARALLEL,
        f'{_PRE}.sparse_convnext.SparseConvNeXt': f'{_SPARSE} (ConvNeXt)',
        f'{_PRE}.sparse_resnet.SparseResNet': f'{_SPARSE} (ResNet)',
        f'{_PRE}.revvit.RevVisionTransformer': 'its training pass (`RevBackProp`) keeps no activations and inverts its '
        'layers, which a change of the stream prevents, and it computes no gradients where nothing before the layers '
        'trains',
    }
)
