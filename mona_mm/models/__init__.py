"""Backbones, necks and connections of parts that the OpenMMLab libraries lack."""

from mona_mm.models.dinov2 import DINOv2
from mona_mm.models.hf_backbone import HFBackbone
from mona_mm.models.linked_model import LinkedModel
from mona_mm.models.simple_feature_pyramid import SimpleFeaturePyramid
from mona_mm.models.sync_batch_norm import CPUSyncBatchNorm

__all__ = ['CPUSyncBatchNorm', 'DINOv2', 'HFBackbone', 'LinkedModel', 'SimpleFeaturePyramid']
