"""Convolutional backbones of the three libraries, from ResNet to EfficientNet, CSPNeXt and BiSeNetV2.

A residual block has one branch. Its sites are ``post_ffn``, on what the block returns, after the residual add and its
activation, and the linear sites of the 1x1 convolutions with which it begins (``fc1``) and ends (``fc2``). A block that
changes the resolution or the width and adds nothing has the same sites, with ``post_ffn`` on its output.
"""

from dataclasses import replace

from mona_mm.hosts.host import BlockSpec, Host, register_host, separate_linears

# There is no parallel_ffn: the input of a block may have another width than its output.
_STREAM = dict(branches={}, layout='BCHW', without=('parallel_ffn',))


def _block(cls: str, width: str = '', has: str | None = None, **linears: str) -> BlockSpec:
    """The description of a class of residual blocks, with the paths of its linear layers by site."""
    some = {} if has is None else dict(has=has)
    return BlockSpec(cls=cls, linears=separate_linears(**linears), width=width, **some, **_STREAM)


def _bottleneck(cls: str) -> BlockSpec:
    return _block(cls, fc1='conv1', fc2='conv3')


def _resnet(backbones: str) -> tuple[BlockSpec, ...]:
    return (
        _block(f'{backbones}.resnet.BasicBlock', 'conv2.weight'),
        _bottleneck(f'{backbones}.resnet.Bottleneck'),
        _bottleneck(f'{backbones}.resnext.Bottleneck'),
    )


def _inverted(cls: str) -> tuple[BlockSpec, ...]:
    """A block that widens, if it does, by ``expand_conv``, and ends with ``linear_conv``."""
    return (
        _block(cls, has='expand_conv', fc1='expand_conv.conv', fc2='linear_conv.conv'),
        _block(cls, fc2='linear_conv.conv'),
    )


def inverted_in_sequence(cls: str) -> tuple[BlockSpec, ...]:
    """The same block as a sequence of three convolutions, or of two if it does not widen."""
    return (
        _block(cls, has='conv.2', fc1='conv.0.conv', fc2='conv.2.conv'),
        _block(cls, fc2='conv.1.conv'),
    )


def _darknet(cls: str) -> tuple[BlockSpec, ...]:
    """A 1x1 and a 3x3 convolution, the latter possibly as a depthwise and a 1x1 one."""
    return (
        _block(cls, has='conv2.pointwise_conv', fc1='conv1.conv', fc2='conv2.pointwise_conv.conv'),
        _block(cls, 'conv2.conv.weight', fc1='conv1.conv'),
    )


_DET, _SEG, _PRE = (f'{library}.models' for library in ('mmdet', 'mmseg', 'mmpretrain'))
_DET_B, _SEG_B, _PRE_B = (f'{models}.backbones' for models in (_DET, _SEG, _PRE))

_CSP_NEXT = f'{_DET}.layers.csp_layer.CSPNeXtBlock'
# DDRNet and PIDNet add what another branch has computed to what a block returns, in place.
_SEG_RESIDUAL = tuple(
    replace(spec, changed_in_place=True)
    for spec in (
        _block(f'{_SEG}.utils.basic_block.BasicBlock', 'conv2.conv.weight'),
        _block(f'{_SEG}.utils.basic_block.Bottleneck', fc1='conv1.conv', fc2='conv3.conv'),
    )
)
_SHUFFLE = f'{_PRE_B}.shufflenet_v1.ShuffleUnit'
_EFFICIENT = (
    *_inverted(f'{_PRE}.utils.inverted_residual.InvertedResidual'),
    _block(f'{_PRE_B}.efficientnet.EdgeResidual', fc2='conv2.conv'),
)

_SPECS: dict[str, tuple[BlockSpec, ...]] = {
    **{f'{_DET_B}.{name}': _resnet(_DET_B) for name in ('resnet.ResNet', 'resnet.ResNetV1d', 'resnext.ResNeXt')},
    f'{_DET_B}.hrnet.HRNet': _resnet(_DET_B),
    f'{_DET_B}.hourglass.HourglassNet': _resnet(_DET_B)[:1],
    f'{_DET_B}.res2net.Res2Net': (_bottleneck(f'{_DET_B}.res2net.Bottle2neck'),),
    f'{_DET_B}.resnest.ResNeSt': (_bottleneck(f'{_DET_B}.resnest.Bottleneck'),),
    f'{_DET_B}.trident_resnet.TridentResNet': (
        _bottleneck(f'{_DET_B}.resnet.Bottleneck'),
        # Its streams are lists of one tensor for each dilation, so only its linear layers are sites.
        BlockSpec(
            cls=f'{_DET_B}.trident_resnet.TridentBottleneck',
            linears=separate_linears(fc1='conv1', fc2='conv3'),
            branches={},
            without=('post_ffn', 'parallel_ffn'),
        ),
    ),
    f'{_DET_B}.darknet.Darknet': (_block(f'{_DET_B}.darknet.ResBlock', 'conv2.conv.weight', fc1='conv1.conv'),),
    f'{_DET_B}.csp_darknet.CSPDarknet': _darknet(f'{_DET}.layers.csp_layer.DarknetBottleneck'),
    f'{_DET_B}.cspnext.CSPNeXt': (
        _block(
            _CSP_NEXT,
            has='conv1.pointwise_conv',
            fc1='conv1.pointwise_conv.conv',
            fc2='conv2.pointwise_conv.conv',
        ),
        _block(_CSP_NEXT, fc2='conv2.pointwise_conv.conv'),
    ),
    f'{_DET_B}.efficientnet.EfficientNet': (
        *_inverted(f'{_DET}.layers.inverted_residual.InvertedResidual'),
        _block(f'{_DET_B}.efficientnet.EdgeResidual', fc2='conv2.conv'),
    ),
    f'{_DET_B}.mobilenet_v2.MobileNetV2': _inverted(f'{_DET}.layers.inverted_residual.InvertedResidual'),
    **{
        f'{_SEG_B}.{name}': _resnet(_SEG_B)
        for name in ('resnet.ResNet', 'resnet.ResNetV1c', 'resnet.ResNetV1d', 'resnext.ResNeXt', 'hrnet.HRNet')
    },
    f'{_SEG_B}.resnest.ResNeSt': (_bottleneck(f'{_SEG_B}.resnest.Bottleneck'),),
    f'{_SEG_B}.mobilenet_v2.MobileNetV2': inverted_in_sequence(f'{_SEG}.utils.inverted_residual.InvertedResidual'),
    f'{_SEG_B}.fast_scnn.FastSCNN': inverted_in_sequence(f'{_SEG}.utils.inverted_residual.InvertedResidual'),
    f'{_SEG_B}.mobilenet_v3.MobileNetV3': _inverted(f'{_SEG}.utils.inverted_residual.InvertedResidualV3'),
    f'{_SEG_B}.ddrnet.DDRNet': _SEG_RESIDUAL,
    f'{_SEG_B}.pidnet.PIDNet': _SEG_RESIDUAL,
    f'{_SEG_B}.bisenetv2.BiSeNetV2': (_block(f'{_SEG_B}.bisenetv2.GELayer', fc2='conv2.0.conv'),),
    f'{_SEG_B}.erfnet.ERFNet': (_block(f'{_SEG_B}.erfnet.NonBottleneck1d', 'convs_layers.0.weight'),),
    f'{_SEG_B}.cgnet.CGNet': (
        _block(f'{_SEG_B}.cgnet.ContextGuidedBlock', has='bottleneck', fc2='bottleneck'),  # begins with a 3x3 one
        _block(f'{_SEG_B}.cgnet.ContextGuidedBlock', 'bn.weight', fc1='conv1x1.conv'),
    ),
    **{
        f'{_PRE_B}.{name}': _resnet(_PRE_B)
        for name in ('resnet.ResNet', 'resnet.ResNetV1c', 'resnet.ResNetV1d', 'resnext.ResNeXt', 'hrnet.HRNet')
    },
    f'{_PRE_B}.res2net.Res2Net': (_bottleneck(f'{_PRE_B}.res2net.Bottle2neck'),),
    f'{_PRE_B}.resnest.ResNeSt': (_bottleneck(f'{_PRE_B}.resnest.Bottleneck'),),
    f'{_PRE_B}.seresnet.SEResNet': (_bottleneck(f'{_PRE_B}.seresnet.SEBottleneck'),),
    f'{_PRE_B}.seresnext.SEResNeXt': (_bottleneck(f'{_PRE_B}.seresnext.SEBottleneck'),),
    f'{_PRE_B}.cspnet.CSPDarkNet': _darknet(f'{_PRE_B}.cspnet.DarknetBottleneck')[1:],  # it has no depthwise ones
    f'{_PRE_B}.cspnet.CSPResNet': (_bottleneck(f'{_PRE_B}.resnet.Bottleneck'),),
    f'{_PRE_B}.cspnet.CSPResNeXt': (_bottleneck(f'{_PRE_B}.resnext.Bottleneck'),),
    f'{_PRE_B}.efficientnet.EfficientNet': _EFFICIENT,
    f'{_PRE_B}.efficientnet_v2.EfficientNetV2': (
        *_EFFICIENT,
        _block(f'{_PRE_B}.efficientnet_v2.EnhancedConvModule', 'conv.weight'),
    ),
    f'{_PRE_B}.mobilenet_v2.MobileNetV2': inverted_in_sequence(f'{_PRE_B}.mobilenet_v2.InvertedResidual'),
    f'{_PRE_B}.mobilenet_v3.MobileNetV3': _inverted(f'{_PRE}.utils.inverted_residual.InvertedResidual'),
    f'{_PRE_B}.shufflenet_v1.ShuffleNetV1': (
        # A unit that halves the resolution concatenates its branch to the input, and has no site. The 1x1 convolutions
        # are in groups, which makes none of them a linear layer.
        BlockSpec(cls=_SHUFFLE, has='avgpool', linears={}, branches={}, without=('post_ffn', 'parallel_ffn')),
        _block(_SHUFFLE, 'g_conv_1x1_expand.conv.weight'),
    ),
    # Residual is its depthwise convolution; the 1x1 convolution after that is in no block.
    f'{_PRE_B}.convmixer.ConvMixer': (_block(f'{_PRE_B}.convmixer.Residual', 'fn.0.weight'),),
}

for _backbone, _specs in _SPECS.items():
    register_host(_backbone, Host(specs=_specs))
