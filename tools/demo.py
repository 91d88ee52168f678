"""Train and evaluate a small model with Mona, and beside it the same one with a frozen backbone, on a CPU.

    python tools/demo.py                               # drawn shapes, on random weights
    python tools/demo.py --weights FILE --data FOLDER  # real images, on a pretrained DINOv2 ViT-S/14

The first form draws a small data set and trains configs/demo/demo_mona_shapes.py on it. The second one takes a folder
of boxes, masks, label maps or classes of any common layout (docs/own_data.md) and the quick config for what it holds.
Nothing is downloaded.
"""

import argparse
import contextlib
import io
import os
import os.path as osp
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import cv2
import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement, InstanceData

import mona_mm
from mona_mm.commands.cli import build_runner, read_run_config, run, run_parser
from mona_mm.config.load import find_last_checkpoint
from mona_mm.datasets.shapes import make_demo_dataset
from mona_mm.errors import MissingFileError, UserError
from mona_mm.report.run import read_results
from mona_mm.reproduce import SCORES, quick_config

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / 'configs/demo/demo_mona_shapes.py'
REAL_CONFIG = REPOSITORY / 'configs/mona/cascade_swin_b_coco.py'
OWN_DATA_CONFIG = REPOSITORY / 'configs/custom/custom_mask_rcnn_swin_t.py'

FROZEN = ('model.backbone.peft=None', 'model.backbone.trainable=none')

ZOOM = 3  # the factor by which pictures are larger than the images
SHEET_ROWS, SHEET_COLUMNS = 4, 2
GAP, MARGIN, TITLE = 4, 16, 40  # the space in pixels within a pair, around pairs and above all pairs
FONT, WHITE = cv2.FONT_HERSHEY_SIMPLEX, (255, 255, 255)
SCORE_THR = 0.5  # predictions with a lower score are not drawn
COLOURS = ((80, 170, 255), (120, 220, 90), (255, 160, 70), (220, 110, 255))  # the colours of the classes, BGR


class Task(NamedTuple):
    """What the demo trains.

    Args:
        config: the config file.
        options: settings that replace some of the config.
        data: a folder of images and annotations for ``--data``; None if the config names its data.
    """

    config: Path
    options: dict[str, Any]
    data: str | None

    def arguments(self, work_dir: str) -> list[str]:
        """The arguments of tools/train.py."""
        data = [] if self.data is None else ['--data', self.data]
        options = [f'{key}={value}' for key, value in self.options.items()]
        return [str(self.config), '--work-dir', work_dir, *data, '--cfg-options', *options]


class DemoHook(Hook):
    """A hook that shows the progress of training, and keeps the results of the last validation.

    Args:
        terminal: the stream to write to.
        every: the time in seconds between two lines on the loss.
    """

    priority = 'LOWEST'  # after the checks of every other hook

    def __init__(self, terminal: TextIO, every: float = 10.0) -> None:
        self.terminal = terminal
        self.every = every
        self.metrics: dict[str, float] = {}
        self.outputs: list[BaseDataElement] = []

    def before_train(self, runner: Runner) -> None:
        """Show the table of the parameters that train."""
        self._say(f'What trains:\n{mona_mm.count_trainable(runner.model).table()}\n')
        self._say('(The loss may rise for a while: the more objects are found, the more boxes and masks it is about.)')
        self._start = self._last = time.monotonic()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Show the loss from time to time."""
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
        """Drop the results of the previous validation."""
        self.outputs.clear()

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Keep the predictions and the ground truth for the pictures."""
        self.outputs += outputs

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Show the scores."""
        self.metrics = metrics
        self._say(f'validation after {runner.iter} iterations: {describe(metrics)}')

    def after_train(self, runner: Runner) -> None:
        """Say that the frozen weights did not change, which ParamFreezeHook has just checked."""
        self._say('The frozen weights are what they were before training, bit for bit.')

    def _say(self, text: str) -> None:
        print(text, file=self.terminal, flush=True)


def describe(metrics: dict[str, float]) -> str:
    """Format the scores as one line."""
    parts = []
    for key, name, _ in SCORES.values():
        if key in metrics:
            half = metrics.get(f'{key}_50')
            digits = 3 if key.startswith('coco') else 1
            parts.append(f'{name} {metrics[key]:.{digits}f}' + ('' if half is None else f' (AP50 {half:.3f})'))
    return ', '.join(parts)


def draw_pair(sample: BaseDataElement, classes: tuple[str, ...]) -> np.ndarray:
    """Draw the ground truth on the left and the predictions on the right.

    Returns:
        The picture ``(ZOOM * H, 2 * ZOOM * W + GAP, 3)``, uint8 and BGR.
    """
    image = cv2.imread(sample.img_path)
    image = cv2.resize(image, None, fx=ZOOM, fy=ZOOM, interpolation=cv2.INTER_CUBIC)
    predictions = sample.pred_instances
    predictions = predictions[predictions.scores >= SCORE_THR]
    predictions = predictions[predictions.scores.argsort()]  # the most confident comes last and so lies on top
    panels = draw(image, sample.gt_instances, classes), draw(image, predictions, classes)
    return np.hstack((panels[0], np.full((image.shape[0], GAP, 3), 255, np.uint8), panels[1]))


def draw(image: np.ndarray, instances: InstanceData, classes: tuple[str, ...]) -> np.ndarray:
    """Draw the masks, boxes and names on a copy of ``image``; ``instances`` have the scale before zooming."""
    image = image.copy()
    masks = instances.masks.cpu().numpy() if torch.is_tensor(instances.masks) else instances.masks.masks
    boxes = getattr(instances.bboxes, 'tensor', instances.bboxes).tolist()
    labels = instances.labels.tolist()
    names = [classes[label] for label in labels]
    if 'scores' in instances:
        names = [f'{name} {score:.2f}' for name, score in zip(names, instances.scores.tolist(), strict=True)]
    for mask, box, label in zip(masks, boxes, labels, strict=True):
        mask = cv2.resize(mask.astype(np.float32), image.shape[1::-1]) >= 0.5
        image[mask] = (0.5 * image[mask] + 0.5 * np.array(COLOURS[label])).astype(np.uint8)
        outline, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(image, outline, -1, WHITE, 1, cv2.LINE_AA)
        cv2.rectangle(image, _corner(box[:2]), _corner(box[2:]), COLOURS[label], 1)
    for box, label, name in zip(boxes, labels, names, strict=True):  # so that names lie over all the masks
        (width, height), _ = cv2.getTextSize(name, FONT, 0.42, 1)
        x, y = _corner(box[:2])
        x, y = min(max(x, 0), image.shape[1] - width - 4), max(y, height + 6)
        cv2.rectangle(image, (x, y - height - 6), (x + width + 4, y), COLOURS[label], cv2.FILLED)
        cv2.putText(image, name, (x + 2, y - 4), FONT, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    return image


def _corner(point: list[float]) -> tuple[int, int]:
    return round(ZOOM * point[0]), round(ZOOM * point[1])


def draw_sheet(pairs: list[np.ndarray]) -> np.ndarray:
    """Draw as many of the pairs as fit in :data:`SHEET_ROWS` rows under a title.

    Returns:
        The sheet ``(H, W, 3)``, uint8 and BGR.
    """
    height, width = pairs[0].shape[:2]
    step_y, step_x = height + MARGIN, width + MARGIN
    sheet = np.full((TITLE + SHEET_ROWS * step_y, MARGIN + SHEET_COLUMNS * step_x, 3), 255, np.uint8)
    for i, pair in enumerate(pairs[: SHEET_ROWS * SHEET_COLUMNS]):
        y, x = TITLE + i // SHEET_COLUMNS * step_y, MARGIN + i % SHEET_COLUMNS * step_x
        sheet[y : y + height, x : x + width] = pair
    for column in range(SHEET_COLUMNS):
        for offset, text in ((0, 'ground truth'), ((width + GAP) // 2, f'predictions, score {SCORE_THR} and up')):
            place = MARGIN + column * step_x + offset, TITLE - 12
            cv2.putText(sheet, text, place, FONT, 0.6, (60, 60, 60), 1, cv2.LINE_AA)
    return sheet


def write_pictures(outputs: list[BaseDataElement], classes: tuple[str, ...], work_dir: str) -> tuple[str, str]:
    """Write one picture per image into a folder, and the first few on one sheet.

    Returns:
        The paths of the sheet and of the folder.
    """
    sheet, folder = osp.join(work_dir, 'predictions.png'), osp.join(work_dir, 'predictions')
    os.makedirs(folder, exist_ok=True)
    pairs = [draw_pair(sample, classes) for sample in outputs]
    for sample, pair in zip(outputs, pairs, strict=True):
        cv2.imwrite(osp.join(folder, osp.basename(sample.img_path)), pair)
    cv2.imwrite(sheet, draw_sheet(pairs))
    return sheet, folder


def train(task: Task, work_dir: str, terminal: TextIO) -> tuple[Runner, DemoHook]:
    """Train and validate as ``tools/train.py`` does, but with only a few lines on the terminal."""
    # A second thread makes models so small a sixth faster at best, and on a busy machine half as fast.
    torch.set_num_threads(1)
    hook = DemoHook(terminal)
    args = run_parser('').parse_args(task.arguments(work_dir))
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        # The log file has the rest: the config and hundreds of lines. The warnings are about the code of the libraries.
        warnings.simplefilter('ignore')
        runner = build_runner(read_run_config(args))
        runner.register_hook(hook)
        runner.train()
    return runner, hook


@contextlib.contextmanager
def frozen_run(task: Task, work_dir: str) -> Iterator[subprocess.Popen]:
    """Train the same model without a method, its backbone frozen, in a process beside this one."""
    os.makedirs(work_dir, exist_ok=True)
    command = [sys.executable, str(REPOSITORY / 'tools/train.py'), *task.arguments(work_dir), *FROZEN]
    with open(osp.join(work_dir, 'output.txt'), 'w', encoding='utf-8') as log:
        environment = dict(os.environ, OMP_NUM_THREADS='1')
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def scores_of_frozen(process: subprocess.Popen, work_dir: str) -> dict[str, float]:
    """Wait until the frozen run ends; return its last scores.

    Raises:
        UserError: if it has failed.
    """
    rows = read_results(Path(work_dir, 'results.csv'), sys.maxsize) if process.wait() == 0 else []
    if not rows:
        raise UserError(f'The run with a frozen backbone failed: {osp.join(work_dir, "output.txt")} says why.')
    return rows[-1]


def choose(args: argparse.Namespace) -> Task:
    """Say what is trained, and on what images; draw them if none were named.

    Raises:
        UserError: if only one of ``--weights`` and ``--data`` is given, or they do not exist.
    """
    if (args.weights is None) != (args.data is None):
        raise UserError('--weights FILE (of a DINOv2 ViT-S/14) and --data FOLDER go together.')
    if args.weights is None:
        print(
            f'Data: drawn shapes in {args.data_root}, and random weights. (Real images: --weights, a file of DINOv2 '
            'ViT-S/14, and --data, a folder of images and annotations.)',
            flush=True,
        )
        make_demo_dataset(args.data_root)
        return Task(CONFIG, dict(data_root=args.data_root), None)
    if not osp.isfile(args.weights):
        raise MissingFileError(f'--weights {args.weights}: there is no such file.')
    task = Task(
        REPOSITORY / 'configs' / quick_config(args.data),
        {'model.backbone.base.init_cfg.checkpoint': osp.abspath(args.weights), 'randomness.seed': 0},
        args.data,
    )
    print(f'Data: {args.data}; a DINOv2 ViT-S/14 from {args.weights}', flush=True)
    return task


def main() -> None:
    parser = argparse.ArgumentParser(description='Train, evaluate and picture a small model, with Mona and without')
    parser.add_argument('--work-dir', default=osp.join('work_dirs', 'demo'), help='folder for what comes out')
    parser.add_argument('--data-root', default=osp.join('data', 'demo_shapes'), help='folder for the drawn images')
    parser.add_argument(
        '--weights', metavar='FILE', help='a DINOv2 ViT-S/14, in the names of Meta, timm or Hugging Face'
    )
    parser.add_argument('--data', metavar='FOLDER', help='real images with annotations of any common layout')
    args = parser.parse_args()

    start = time.monotonic()
    task = choose(args)
    frozen_dir = osp.join(args.work_dir, 'frozen')
    print(f'Training {osp.relpath(task.config)}, log in {args.work_dir}')
    print(f'and beside it the same with a frozen backbone, in {frozen_dir}\n', flush=True)
    with frozen_run(task, frozen_dir) as process:
        runner, hook = train(task, args.work_dir, sys.stdout)
        frozen = scores_of_frozen(process, frozen_dir)
    pictures = ''
    if task.data is None:
        classes = runner.val_dataloader.dataset.metainfo['classes']
        sheet, folder = write_pictures(hook.outputs, classes, args.work_dir)
        pictures = f'\nPictures:   {sheet}, and every image in {folder}'

    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    count = mona_mm.count_trainable(runner.model)
    share = 100 * count.backbone_trainable / count.backbone_base_total
    checkpoint = osp.relpath(find_last_checkpoint(args.work_dir))
    tools, config = osp.relpath(REPOSITORY / 'tools'), osp.relpath(REAL_CONFIG)
    own_data_config = osp.relpath(OWN_DATA_CONFIG)
    print(f"""
Done in {minutes} min {seconds} s. On {len(hook.outputs)} images that training has not seen:
  {count.method}:{' ' * (6 - len(count.method))} {describe(hook.metrics)}
  frozen: {describe(frozen)}
Trained:    {count.backbone_trainable:,} parameters of {count.method}, {share:.1f}% of the frozen backbone;
            with neck and heads {count.trainable:,} of the model's {count.total:,}
Checkpoint: {checkpoint}{pictures}
Page:       {osp.relpath(osp.join(args.work_dir, 'report.html'))}: curves, classes, confusion, best and worst images

Next:
  evaluate the checkpoint again
    python {tools}/test.py {osp.join(args.work_dir, task.config.name)} {checkpoint}
  the real one: Swin-B on COCO
    python {tools}/train.py {config} --cfg-options data_root=path/to/coco
  your own data, in a folder of any common layout
    python {tools}/train.py {own_data_config} --data path/to/folder""")


if __name__ == '__main__':
    run(main)
