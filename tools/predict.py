"""Predict images and videos: python tools/predict.py CONFIG WEIGHTS INPUT... [--out DIR] [--score S] [--batch N]"""

import argparse
from pathlib import Path

import mona_mm  # noqa: F401  imported first, because it makes the OpenMMLab libraries importable
from mona_mm.commands.cli import add_cfg_options, run
from mona_mm.config.load import load_config
from mona_mm.config.tta import library_of, use_tta
from mona_mm.errors import ConfigError, UserError
from mona_mm.inference.predict import Clock, load_model, predict, warn
from mona_mm.inference.sources import find_sources
from mona_mm.inference.writers import WRITERS

_SCORES = dict(mmdet=0.3, mmseg=0.0, mmpretrain=0.0)
"""The least score of what is drawn and written, by the library of the model."""


def main() -> None:
    parser = argparse.ArgumentParser(description='Predict images and videos, without annotations')
    parser.add_argument('config', help='config file')
    parser.add_argument('weights', help='whole checkpoint (.pth) or delta (.delta.safetensors)')
    parser.add_argument('inputs', nargs='+', metavar='input', help='image, video, folder or pattern')
    parser.add_argument('--out', type=Path, default=Path('predictions'), help='folder to write into')
    parser.add_argument('--batch', type=int, default=1, help='the largest number of images at a time')
    parser.add_argument('--score', type=float, help='the least score of what is drawn and written (detectors: 0.3)')
    parser.add_argument('--tta', action='store_true', help='merge the predictions of each image and its mirror image')
    parser.add_argument('--every', type=int, default=1, help='predict every n-th frame of a video')
    parser.add_argument('--no-pictures', action='store_true', help='write no pictures')
    parser.add_argument(
        '--allow-other-base',
        action='store_true',
        help='load a delta although the frozen base is not the one on which it was trained',
    )
    add_cfg_options(parser)
    args = parser.parse_args()
    for name in ('batch', 'every'):
        if getattr(args, name) < 1:
            raise ConfigError(f'--{name} {getattr(args, name)}: must be at least 1.')
    if args.out.exists() and not args.out.is_dir():
        raise ConfigError(f'--out {args.out}: it is a file, not a folder. Name a folder to write into.')
    sources = find_sources(args.inputs, args.out)
    cfg = load_config(args.config, args.cfg_options)
    library = library_of(cfg)
    if args.tta:
        if library == 'mmseg' and args.score:
            raise ConfigError('--score and --tta: of merged views mmseg keeps no probabilities. Leave one of them out.')
        use_tta(cfg)
    loaded = load_model(cfg, args.weights, args.allow_other_base)
    score = _SCORES[library] if args.score is None else args.score
    writer = WRITERS[library](args.out, loaded.classes, score, not args.no_pictures)
    clock, left_out = Clock(), 0
    for item in predict(loaded, sources, args.batch, args.every):
        if item.error:
            warn(item)
            left_out += 1
        else:
            writer.add(item)
            clock.images += 1
    if not clock.images:
        raise UserError(f'None of the {left_out} images and videos can be read.')
    print(writer.finish())
    if writer.pictures:
        print(f'pictures: {args.out / "pictures"}')
    print(clock.text() + (f'; {left_out} left out' if left_out else ''))


if __name__ == '__main__':
    run(main)
