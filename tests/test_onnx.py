"""What onnxruntime computes from exported files, against the model's own predictions of the same images."""

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from tiny_tasks import checkpoint_of, classifier, segmentor, write

from mona_mm.config.load import load_config
from mona_mm.inference.export import decoded, settle
from mona_mm.inference.predict import load_model, predict
from mona_mm.inference.sources import find_sources

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')


def run(file, images) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    return session.run(None, {session.get_inputs()[0].name: images})


@pytest.mark.parametrize(('make', 'method'), [(classifier, 'Mona'), (segmentor, 'LoRA')])
def test_a_file_computes_what_the_model_predicts(make, method, tool, tmp_path):
    """From the image file to the class scores, or to the label map: the normalisation is in the file. A LoRA is merged,
    a Mona stays inside."""
    config = make(tmp_path)
    if method == 'LoRA':
        config.write_text(config.read_text().replace("type='Mona', bottleneck=8", "type='LoRA', rank=4"))
    weights, out = checkpoint_of(config), tmp_path / 'out.onnx'
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    write(tmp_path / 'in/a.png', image)
    status, printed, err = tool(
        'export.py', str(config), str(weights), str(out), '--images', str(tmp_path / 'in'), str(tmp_path / 'images')
    )
    assert status == 0, err
    assert ('Mona cannot be merged' in printed) == (method == 'Mona') and 'of the model on' in printed
    loaded = load_model(load_config(str(config)), str(weights))
    (item,) = predict(loaded, find_sources([str(tmp_path / 'in')]))
    (found,) = run(out, image[..., ::-1].transpose(2, 0, 1)[None].astype(np.float32))
    if make is classifier:
        np.testing.assert_allclose(found[0], item.sample.pred_score.numpy(), atol=1e-4)
    else:
        logits = item.sample.seg_logits.data.numpy()
        np.testing.assert_allclose(found[0], logits, atol=1e-4 * np.abs(logits).max())
    texts = {entry.key: entry.value for entry in onnx.load(str(out)).metadata_props}
    assert texts['classes'] == '["x", "y", "z"]' and texts['library'] in ('mmpretrain', 'mmseg')
    status, _, err = tool('export.py', str(config), str(weights), str(out), '--images', str(tmp_path / 'in'))
    assert status == 2 and 'already exists' in err


@pytest.mark.slow
def test_a_detector_of_two_stages(detector_config, demo_data, tool, tmp_path):
    """The file of the image and one for each head, each within 1e-4 of the model."""
    config = tmp_path / 'mine.py'
    detector_config.custom_hooks = []
    detector_config.dump(config)
    weights = checkpoint_of(config, noise=0.02)
    images = sorted(map(str, demo_data.glob('val2017/*')))
    status, printed, err = tool('export.py', str(config), str(weights), str(tmp_path / 'out.onnx'), '--images', *images)
    assert status == 0, err
    written = {file.name for file in tmp_path.glob('out*.onnx')}
    heads = {f'out.bbox_head.{i}.onnx' for i in range(3)} | {f'out.mask_head.{i}.onnx' for i in range(3)}
    assert written == {'out.onnx', *heads}
    assert 'Not in it: non-maximum suppression' in printed


def test_boxes_of_all_anchors_hold_the_predicted_ones(tmp_path):
    """Every box that a RetinaNet predicts is among the decoded ones, with its score."""
    from mmdet.structures import DetDataSample
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope('mmdet')
    head = MODELS.build(
        dict(
            type='mmdet.RetinaHead', num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1,
            anchor_generator=dict(
                type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1, ratios=[0.5, 2.0], strides=[8, 16]
            ),
            test_cfg=ConfigDict(
                nms_pre=-1, min_bbox_size=0, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=20
            ),
        )
    )  # fmt: skip
    torch.manual_seed(0)
    maps = head([torch.randn(1, 8, 8, 6), torch.randn(1, 8, 4, 3)])
    boxes, scores = decoded(head, maps, (64, 48))
    assert boxes.shape == (1, 2 * (48 + 12), 4) and scores.shape == (1, 2 * (48 + 12), 3)
    sample = DetDataSample(metainfo=dict(img_shape=(64, 48), scale_factor=(1.0, 1.0)))
    (found,) = head.predict_by_feat(*maps, batch_img_metas=[sample.metainfo])
    assert len(found) == 20
    for box, score, label in zip(found.bboxes, found.scores, found.labels, strict=True):
        distance = (boxes[0] - box).abs().amax(1) + (scores[0, :, label] - score).abs()
        assert distance.min() < 1e-4


def test_settling_merges_what_it_can(tmp_path):
    """A LoRA is gone afterwards, and the model computes the same."""
    config = segmentor(tmp_path)
    config.write_text(config.read_text().replace("type='Mona', bottleneck=8", "type='LoRA', rank=4"))
    model = load_model(load_config(str(config)), str(checkpoint_of(config))).model
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(x, mode='tensor')
        assert 'stock model' in settle(model)
        torch.testing.assert_close(model(x, mode='tensor'), before, rtol=1e-4, atol=1e-5)
    assert not any('.peft.' in name for name, _ in model.named_parameters())
