"""Classify patches of CamVid's images by their nearest neighbours among the patch tokens of DINOv2 ViT-S/14.

    python tests/nearest_patches.py --data CAMVID --weights FILE

This shows without any training that a published file of weights is read right: a wrong name, order of heads or position
table costs many points. The tokens of the last layer, after its norm, are compared by their cosine. A patch has the
class of most of its pixels; patches without a labelled pixel are left out. A test patch gets the class with most votes
among its nearest training patches, which weigh ``exp(cosine / 0.07)`` (as in DINO, Caron et al., ICCV 2021). Random
weights tell what the images alone give.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from torch import Tensor, nn

import mona_mm  # noqa: F401  registers DINOv2
from mona_mm.checkpoint.pretrained import load_pretrained

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of RGB values, as in pretraining
PATCH = 14
CLASSES = 11


def features(
    backbone: nn.Module, folder: Path, split: str, size: tuple[int, int], images: int | None
) -> tuple[Tensor, Tensor]:
    """Normalised tokens ``(patches, 384)`` of the first images of a split, and their classes ``(patches,)``."""
    tokens, classes = [], []
    for path in sorted((folder / 'images' / split).iterdir())[:images]:
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
        labels = cv2.imread(str(folder / 'annotations' / split / f'{path.stem}.png'), cv2.IMREAD_UNCHANGED)
        labels = torch.from_numpy(cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST)).long()
        pixels = torch.from_numpy((image - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            map_ = backbone(pixels)[-1]
        votes = F.one_hot(labels.clamp(max=CLASSES), CLASSES + 1)[..., :CLASSES]  # void: no vote
        votes = votes.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).sum((-1, -2)).flatten(0, 1)
        known = votes.sum(1) > 0
        tokens.append(F.normalize(map_[0].flatten(1).T, dim=1)[known])
        classes.append(votes.argmax(1)[known])
    return torch.cat(tokens), torch.cat(classes)


def classify(queries: Tensor, tokens: Tensor, classes: Tensor, neighbours: int) -> Tensor:
    """The class with most votes for each of the ``queries``."""
    answers = []
    for chunk in queries.split(1024):
        cosine, index = (chunk @ tokens.T).topk(neighbours, dim=1)
        votes = torch.zeros(len(chunk), CLASSES).scatter_add_(1, classes[index], (cosine / 0.07).exp())
        answers.append(votes.argmax(1))
    return torch.cat(answers)


def scores(answers: Tensor, classes: Tensor) -> tuple[float, float]:
    """The accuracy and the mean IoU of the patches, in percent."""
    confusion = torch.bincount(classes * CLASSES + answers, minlength=CLASSES**2).reshape(CLASSES, CLASSES).double()
    hits = confusion.diagonal()
    iou = hits / (confusion.sum(0) + confusion.sum(1) - hits)
    return 100 * float(hits.sum() / confusion.sum()), 100 * float(iou.nanmean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--data', type=Path, required=True, help='CamVid: images/{train,val,test}, annotations/ likewise'
    )
    parser.add_argument('--weights', required=True, help="ViT-S/14 under Meta's names")
    parser.add_argument('--size', type=int, nargs=2, default=(168, 224), help='height and width, multiples of 14')
    parser.add_argument('--neighbours', type=int, default=20)
    parser.add_argument('--split', default='test', help='the images that are classified')
    parser.add_argument(
        '--images', type=int, nargs=2, default=(None, None), help='of train, and of the split: the first'
    )
    args = parser.parse_args()
    MMLogger.get_current_instance().setLevel('WARNING')
    for weights in (args.weights, None):
        torch.manual_seed(0)
        backbone = MODELS.build(dict(type='mona_mm.DINOv2', arch='small'))
        if weights:
            load_pretrained(backbone, weights)
        else:
            backbone.init_weights()
        backbone.eval()
        tokens, classes = features(backbone, args.data, 'train', tuple(args.size), args.images[0])
        queries, truth = features(backbone, args.data, args.split, tuple(args.size), args.images[1])
        accuracy, iou = scores(classify(queries, tokens, classes, args.neighbours), truth)
        print(
            f'{Path(weights).name if weights else "random weights"}: {len(queries)} patches of {args.split}, '
            f'{len(tokens)} of the training images: accuracy {accuracy:.1f}%, mean IoU {iou:.1f}'
        )


if __name__ == '__main__':
    main()
