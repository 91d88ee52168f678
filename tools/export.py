"""Export to ONNX: python tools/export.py CONFIG WEIGHTS OUT.onnx --images IMAGE... [--size H W]"""

import argparse
from pathlib import Path

import mona_mm
from mona_mm.commands.cli import add_cfg_options, new_file, run
from mona_mm.config.load import load_config
from mona_mm.config.tta import library_of
from mona_mm.errors import ConfigError, UserError
from mona_mm.inference.export import export_part, normalised_inputs, parts_of, require_packages, settle
from mona_mm.inference.predict import load_model
from mona_mm.inference.sources import find_sources

_NOT_EXPORTED = dict(
    mmdet='Not in it: non-maximum suppression, and in a detector of two stages the choice of regions and RoIAlign.',
    mmseg='Not in it: sliding windows, and the resizing to the size of the original image.',
    mmpretrain='',
)


def main() -> None:
    parser = argparse.ArgumentParser(description='Export a model to ONNX, checked against the model on real images')
    parser.add_argument('config', help='config file')
    parser.add_argument('weights', help='whole checkpoint (.pth) or delta (.delta.safetensors)')
    parser.add_argument('out', type=new_file, help='the .onnx file to write')
    parser.add_argument('--images', nargs='+', required=True, help='images to compare the file with the model on')
    parser.add_argument('--size', nargs=2, type=int, metavar=('H', 'W'), help="default: the first image's in a test")
    parser.add_argument('--tolerance', type=float, default=1e-4, help='relative to the largest value of each output')
    parser.add_argument(
        '--allow-other-base',
        action='store_true',
        help='load a delta although the frozen base is not the one on which it was trained',
    )
    add_cfg_options(parser)
    args = parser.parse_args()
    if not args.out.endswith('.onnx'):
        raise ConfigError(f'{args.out}: the file to write must end with .onnx.')
    if args.size and min(args.size) < 1:
        raise ConfigError(f'--size {args.size[0]} {args.size[1]}: height and width must be at least 1.')
    require_packages('onnx', 'onnxruntime')
    images = [source.path for source in find_sources(args.images) if not source.is_video]
    if not images:
        raise ConfigError(f'--images {" ".join(args.images)}: these are videos, and the comparison needs images.')
    cfg = load_config(args.config, args.cfg_options)
    library = library_of(cfg)
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    rgb = bool(preprocessor.get('bgr_to_rgb') or preprocessor.get('to_rgb'))
    loaded = load_model(cfg, args.weights, args.allow_other_base)
    model = loaded.model.cpu().eval()
    print(settle(model))
    inputs = normalised_inputs(loaded, images, args.size and tuple(args.size))
    metadata = dict(
        config=Path(args.config).name, weights=Path(args.weights).name, classes=loaded.classes, library=library,
        input='RGB from 0 to 255, (1, 3, H, W)', mona_mm=mona_mm.__version__,
    )  # fmt: skip
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in parts_of(library, model, rgb, inputs):
        file = out.with_suffix(f'.{part.name}.onnx') if part.name else out
        try:
            made = export_part(part, file, args.tolerance, metadata)
        except UserError as error:
            failed.append(str(error))
            continue
        shapes = ', '.join(f'{name} {tuple(x.shape)}' for name, x in zip(part.inputs, part.examples[0], strict=True))
        print(
            f'{made.file}: {shapes} -> {", ".join(made.outputs)}; by the {made.exporter} exporter, within '
            f'{made.difference:.1e} of the model on {len(inputs)} images'
        )
    if _NOT_EXPORTED[library]:
        print(_NOT_EXPORTED[library])
    if failed:
        raise UserError(' '.join(failed))


if __name__ == '__main__':
    run(main)
