"""See it work, in minutes on a CPU: python tools/demo.py [--work-dir DIR] [--data-root DIR]

Draws a small data set, trains configs/demo/demo_mona_shapes.py on it, evaluates, and makes pictures of the predictions.
"""

import argparse
import contextlib
import io
import os
import os.path as osp
import sys
import time
import warnings
from pathlib import Path
from typing import TextIO

warnings.simplefilter('ignore')  # the libraries' deprecations are nothing that a newcomer can act on

import mona_mm  # noqa: E402  first: it makes the OpenMMLab libraries importable

# isort: split
import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

from mona_mm.cli import build_runner, read_run_config, run, run_parser  # noqa: E402
from mona_mm.config import find_last_checkpoint  # noqa: E402
from mona_mm.demo_data import make_demo_dataset  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / 'configs/demo/demo_mona_shapes.py'

ZOOM = 3  # pictures are drawn this much larger than the images
SHEET_ROWS, SHEET_COLUMNS = 4, 2
SCORE_THR = 0.3  # predictions below it are not drawn
COLOURS = ((80, 170, 255), (120, 220, 90), (255, 160, 70), (220, 110, 255))  # of the classes, BGR


class DemoHook(Hook):
    """Tells a newcomer how training goes, and keeps what the last validation gave.

    Args:
        terminal: where to write.
        every: seconds between two lines on the loss.
    """

    priority = 'LOWEST'  # after the checks of every other hook

    def __init__(self, terminal: TextIO, every: float = 10.0) -> None:
        self.terminal = terminal
        self.every = every
        self.metrics: dict[str, float] = {}
        self.outputs: list[DetDataSample] = []

    def before_train(self, runner: Runner) -> None:
        """Show what trains."""
        self._say(f'What trains:\n{mona_mm.count_trainable(runner.model).table()}\n')
        self._start = self._last = time.monotonic()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Show the loss, now and then."""
        now = time.monotonic()
        done, total = runner.iter + 1, runner.max_iters
        if now - self._last >= self.every or done == total:
            self._last = now
            seconds = now - self._start
            loss = runner.message_hub.get_scalar('train/loss').mean(50)
            self._say(
                f'iteration {done:4d} of {total}   loss {loss:5.2f}   '
                f'{seconds:3.0f} s, about {seconds / done * (total - done):.0f} s to go'
            )

    def before_val_epoch(self, runner: Runner) -> None:
        """Forget the validation before."""
        self.outputs.clear()

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Keep predictions and ground truth for the pictures."""
        self.outputs += outputs

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Show the average precisions."""
        self.metrics = metrics
        self._say(f'validation after {runner.iter} iterations: {describe(metrics)}')

    def after_train(self, runner: Runner) -> None:
        """Say what ParamFreezeHook has just proved."""
        self._say('The frozen weights are what they were before training, bit for bit.')

    def _say(self, text: str) -> None:
        print(text, file=self.terminal, flush=True)


def describe(metrics: dict[str, float]) -> str:
    """The average precisions in a line."""
    parts = [
        f'{name} AP {metrics[f"coco/{key}_mAP"]:.3f} (AP50 {metrics[f"coco/{key}_mAP_50"]:.3f})'
        for name, key in (('box', 'bbox'), ('mask', 'segm'))
    ]
    return ', '.join(parts)


def draw_pair(sample: DetDataSample, classes: tuple[str, ...]) -> np.ndarray:
    """Ground truth left, predictions right, ``(ZOOM * H, 2 * ZOOM * W + a gap, 3)`` uint8 BGR."""
    image = cv2.imread(sample.img_path)
    image = cv2.resize(image, None, fx=ZOOM, fy=ZOOM, interpolation=cv2.INTER_CUBIC)
    pred = sample.pred_instances
    panels = draw(image, sample.gt_instances, classes), draw(image, pred[pred.scores >= SCORE_THR], classes)
    gap = np.full((image.shape[0], 4, 3), 255, np.uint8)
    return np.hstack((panels[0], gap, panels[1]))


def draw(image: np.ndarray, instances: InstanceData, classes: tuple[str, ...]) -> np.ndarray:
    """A copy of ``image`` with masks, boxes and names; ``instances`` are in the scale before zooming."""
    image = image.copy()
    masks = instances.masks
    masks = masks.cpu().numpy() if hasattr(masks, 'cpu') else masks.masks  # predictions are tensors
    boxes = getattr(instances.bboxes, 'tensor', instances.bboxes).cpu().numpy()
    names = [classes[label] for label in instances.labels]
    if 'scores' in instances:
        names = [f'{name} {score:.2f}' for name, score in zip(names, instances.scores.tolist(), strict=True)]
    for mask, box, label, name in zip(masks, boxes, instances.labels.tolist(), names, strict=True):
        colour = COLOURS[label % len(COLOURS)]
        mask = cv2.resize(mask.astype(np.float32), image.shape[1::-1]) >= 0.5
        image[mask] = (0.5 * image[mask] + 0.5 * np.array(colour)).astype(np.uint8)
        outline, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(image, outline, -1, (255, 255, 255), 1, cv2.LINE_AA)
        x1, y1, x2, y2 = np.rint(box * ZOOM).astype(int).tolist()
        cv2.rectangle(image, (x1, y1), (x2, y2), colour, 1)
        (width, height), _ = cv2.getTextSize(name, cv2.FONT_HERSHEY_SIMPLEX, 0.42, 1)
        x, y = min(max(x1, 0), image.shape[1] - width - 4), max(y1, height + 6)
        cv2.rectangle(image, (x, y - height - 6), (x + width + 4, y), colour, cv2.FILLED)
        cv2.putText(image, name, (x + 2, y - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    return image


def write_pictures(outputs: list[DetDataSample], classes: tuple[str, ...], work_dir: str) -> str:
    """Write one picture per image into ``predictions/``, and the first few on one sheet; returns the sheet's path."""
    folder = osp.join(work_dir, 'predictions')
    os.makedirs(folder, exist_ok=True)
    pairs = []
    for sample in outputs:
        pair = draw_pair(sample, classes)
        cv2.imwrite(osp.join(folder, osp.basename(sample.img_path)), pair)
        pairs.append(pair)

    pairs = pairs[: SHEET_ROWS * SHEET_COLUMNS]
    border = 14
    pairs = [cv2.copyMakeBorder(p, 0, border, border, 0, cv2.BORDER_CONSTANT, value=(255,) * 3) for p in pairs]
    rows = [np.hstack(pairs[i : i + SHEET_COLUMNS]) for i in range(0, len(pairs), SHEET_COLUMNS)]
    rows = [row for row in rows if row.shape == rows[0].shape]
    title = np.full((40, rows[0].shape[1], 3), 255, np.uint8)
    for i in range(SHEET_COLUMNS):
        for j, text in enumerate(('ground truth', 'predictions')):
            x = i * pairs[0].shape[1] + border + j * (pairs[0].shape[1] - border) // 2
            cv2.putText(title, text, (x + 2, 27), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (60, 60, 60), 1, cv2.LINE_AA)
    sheet = cv2.copyMakeBorder(np.vstack((title, *rows)), 0, 0, 0, border, cv2.BORDER_CONSTANT, value=(255,) * 3)
    path = osp.join(work_dir, 'predictions.png')
    cv2.imwrite(path, sheet)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description='Train, evaluate and picture a small model on drawn shapes')
    parser.add_argument('--work-dir', default=osp.join('work_dirs', 'demo'), help='folder for what comes out')
    parser.add_argument('--data-root', default=osp.join('data', 'demo_shapes'), help='folder for the drawn images')
    args = parser.parse_args()
    start = time.monotonic()
    print(f'Drawing the data set, in {args.data_root} (nothing to do if it is there).', flush=True)
    make_demo_dataset(args.data_root)

    # The model is so small that a second thread costs more, in waiting, than it does.
    torch.set_num_threads(1)
    hook = DemoHook(sys.stdout)
    print(f'Training {osp.relpath(CONFIG)}; the whole log is in {args.work_dir}.\n', flush=True)
    with contextlib.redirect_stdout(io.StringIO()):  # the libraries' log lines, the config among them, fill screens
        run_args = run_parser('').parse_args([str(CONFIG), '--work-dir', args.work_dir])
        cfg = read_run_config(argparse.Namespace(**{**vars(run_args), 'cfg_options': {'data_root': args.data_root}}))
        runner = build_runner(cfg)
        runner.register_hook(hook)
        runner.train()
    sheet = write_pictures(hook.outputs, runner.val_dataloader.dataset.metainfo['classes'], args.work_dir)

    count = mona_mm.count_trainable(runner.model)
    checkpoint = osp.relpath(find_last_checkpoint(args.work_dir))
    tools, configs = osp.relpath(REPOSITORY / 'tools'), osp.relpath(REPOSITORY / 'configs')
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    print(f"""
Done in {minutes} min {seconds} s, on {len(hook.outputs)} images that training has not seen: {describe(hook.metrics)}
Trained:    {count.backbone_trainable:,} parameters of {count.method} = \
{100 * count.backbone_trainable / count.backbone_base_total:.1f}% of the frozen backbone; with neck and heads \
{count.trainable:,} of {count.total:,} ({100 * count.trainable / count.total:.0f}%)
Checkpoint: {checkpoint}
Pictures:   {sheet}, and all {len(hook.outputs)} in {osp.join(args.work_dir, 'predictions')}

Next:
- Evaluate again:       python {tools}/test.py {osp.join(args.work_dir, CONFIG.name)} {checkpoint}
- The real one, COCO:   python {tools}/train.py {configs}/mona/cascade_swin_b_coco.py --cfg-options data_root=path/to/coco
- Your own data:        a config with its folder and classes; README.md shows one in five lines""")


if __name__ == '__main__':
    run(main)
