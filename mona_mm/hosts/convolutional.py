"""Convolutional backbones: ResNet, ResNeXt and HRNet of the three libraries.

A residual block has one branch. Its sites are ``post_ffn``, after the residual add and its activation, and the linear
sites of the 1x1 convolutions with which a bottleneck begins (``fc1``) and ends (``fc2``).
"""

from mona_mm.hosts.host import BlockSpec, Host, register_host, separate_linears

# There is no parallel_ffn: the input of a block may have another width than its output.
_STREAM = dict(branches={}, layout='BCHW', without=('parallel_ffn',))


def _basic(cls: str, width: str) -> BlockSpec:
    return BlockSpec(cls=cls, linears={}, width=width, **_STREAM)


def _bottleneck(cls: str) -> BlockSpec:
    return BlockSpec(cls=cls, linears=separate_linears(fc1='conv1', fc2='conv3'), **_STREAM)


for _library, _classes in dict(
    mmdet=dict(resnet=('ResNet', 'ResNetV1d'), resnext=('ResNeXt',), hrnet=('HRNet',)),
    mmseg=dict(resnet=('ResNet', 'ResNetV1c', 'ResNetV1d'), resnext=('ResNeXt',), hrnet=('HRNet',)),
    mmpretrain=dict(resnet=('ResNet', 'ResNetV1c', 'ResNetV1d'), resnext=('ResNeXt',), hrnet=('HRNet',)),
).items():
    _module = f'{_library}.models.backbones'
    _specs = (
        _basic(f'{_module}.resnet.BasicBlock', 'conv2.weight'),
        _bottleneck(f'{_module}.resnet.Bottleneck'),
        _bottleneck(f'{_module}.resnext.Bottleneck'),
    )
    for _file, _names in _classes.items():
        for _name in _names:
            register_host(f'{_module}.{_file}.{_name}', Host(specs=_specs))
