"""Read training logs: the evaluations, the progress of the run, its config, and the number of trained parameters.

There are four formats: the ``scalars.json`` and the text log of mmengine, and the text log and ``.log.json`` of mmcv
1.x (mmdet 2.x, mmseg 0.x and mmcls 0.x, which the published code uses). Configs are parsed but never executed, since a
log may come from anyone.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mona_mm.checkpoint.config_text import parse_config
from mona_mm.reproduce.tasks import MMCV_SCORES, MMENGINE_SCORES

# The beginning of a log line. It may stand anywhere in a line of the file, since progress bars end without a newline.
_STAMP = re.compile(r'\d{4}[-/]\d\d[-/]\d\d \d\d:\d\d:\d\d(?:,\d+)? - (\S+) - [A-Z]+ - |^[A-Z]+:(\w+):')
_TRAIN = re.compile(r'(?:Epoch(?:\(train\))? +\[(\d+)\]|Iter(?:\(train\))? +)\[ *(\d+)/ *(\d+)\]')
_EVALUATION = re.compile(r'(Epoch|Iter)\((val|test)\) +(?:\[(\d+)\])?\[ *(\d+)(?:/ *(\d+))?\](.*)')
_SCORE = re.compile(r'([\w./-]+): +(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?![\w:])')
_TRAINABLE = re.compile(r'trainable in the backbone: ([\d,]+) =|^trained_backbone_num: *(\d+)\s*$')
_GPUS = re.compile(r'GPU number: (\d+)|nranks (\d+)')
# The parameter names in the published code that distinguish its methods.
_MODULES = ('adapter_conv', 'my_module_1', 'my_module_2', 'lora_A')


@dataclass
class Log:
    """The contents of one log. Scores are in percent; a step is an epoch if ``by_epoch`` is true, else an iteration."""

    by_epoch: bool | None = None
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    tested: dict[str, float] = field(default_factory=dict)
    first: int | None = None
    """The first step that was trained, at least in part."""
    trained: int = 0
    """The last iteration in the log, or the last epoch that is complete."""
    config: dict[str, Any] | None = None
    trainable: int | None = None
    """The number of parameters that train in the backbone."""
    gpus: int | None = None
    modules: set[str] = field(default_factory=set)

    @property
    def is_empty(self) -> bool:
        """Whether nothing in the file looked like a training or test log."""
        return self.first is None and not self.evaluations and not self.tested

    def _saw_training(self, step: int, complete: bool) -> None:
        self.first = step if self.first is None else self.first
        self.trained = max(self.trained, step if complete or not self.by_epoch else step - 1)

    def _saw_evaluation(self, step: int, scores: dict[str, float]) -> None:
        if scores:
            self.evaluations[step] = {**self.evaluations.get(step, {}), **scores}
            self.trained = max(self.trained, step)

    def _evaluated_iteration(self, number: int, once: bool = False) -> int:
        """The iteration of an evaluation, in a log that counts iterations.

        It is derived from the evaluation interval in the config, if there is one, since training is logged at
        intervals only.

        Args:
            number: the iteration or the number of evaluated batches, depending on the version that wrote the log.
            once: whether the log holds every evaluation only once.
        """
        config = self.config or {}
        if not self.trained:
            return number
        for section, key in (('evaluation', 'interval'), ('train_cfg', 'val_interval')):
            interval = (config.get(section) or {}).get(key)
            if isinstance(interval, int) and interval > 0:
                due = -(-self.trained // interval) * interval
                due += interval if once and due in self.evaluations else 0  # the evaluation after the last iteration
                longest = planned(config)[0]
                return min(due, longest) if longest else due
        return max(number, self.trained)

    def add(self, other: 'Log') -> None:
        """Complete this log with another log of the same run: its more exact scores, and values that this log lacks."""
        if other.evaluations:
            self.evaluations = other.evaluations
        self.tested |= other.tested
        self.first = other.first if self.first is None else self.first
        self.trained = max(self.trained, other.trained)
        for name in ('by_epoch', 'config', 'trainable', 'gpus'):
            if getattr(self, name) is None:
                setattr(self, name, getattr(other, name))
        self.modules |= other.modules

    def resume(self, later: 'Log') -> None:
        """Continue this log with the log of the resumed run, which replaces everything from its first step on."""
        if later.first is not None:
            self.evaluations = {step: s for step, s in self.evaluations.items() if step < later.first}
            self.trained = later.trained
            self.first = later.first if self.first is None else min(self.first, later.first)
        self.trained = max(self.trained, later.trained)
        self.evaluations |= later.evaluations
        self.tested |= later.tested
        for name in ('by_epoch', 'config', 'trainable', 'gpus'):
            if getattr(later, name) is not None:
                setattr(self, name, getattr(later, name))
        self.modules |= later.modules


def planned(config: dict[str, Any]) -> tuple[int | None, bool | None]:
    """The length of training in a config, and whether its unit is epochs (else iterations); None for unknown values."""
    for section in (config.get('train_cfg'), config.get('runner')):
        for key, by_epoch in (('max_epochs', True), ('max_iters', False)):
            if isinstance(section, dict) and isinstance(section.get(key), int):
                return section[key], by_epoch
    if isinstance(config.get('total_epochs'), int):
        return config['total_epochs'], True
    return None, None


def read_log(path: Path, config: dict[str, Any] | None = None) -> Log:
    """Read one file in any of the formats. For any other file, the result :attr:`~Log.is_empty`.

    Args:
        path: the file.
        config: the config of the run if it is already known, for example from another file of the run.
    """
    log = Log(config=config)
    with open(path, encoding='utf-8', errors='replace') as file:
        if path.suffix == '.json':
            _read_json(log, file)
        else:
            _read_text(log, file)
    return log


def _read_json(log: Log, lines: Iterable[str]) -> None:
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    for record in records:
        if isinstance(record.get('config'), str) and log.config is None:  # as in the first line of a log of mmdet 2.x
            log.config = parse_config(record['config'])
    log.by_epoch = planned(log.config)[1] if log.config else None
    if log.by_epoch is None:
        log.by_epoch = not any('mIoU' in record for record in records)  # only segmentation logs count iterations
    for record in records:
        if 'mode' in record:
            _mmcv_record(log, record)
        else:
            _mmengine_record(log, record)


def _mmcv_record(log: Log, record: dict[str, Any]) -> None:
    epoch, iteration = record.get('epoch'), record.get('iter')
    if not isinstance(epoch, int) or not isinstance(iteration, int):
        return
    if record['mode'] == 'train':
        log._saw_training(epoch if log.by_epoch else iteration, complete=not log.by_epoch)
    elif record['mode'] == 'val':
        step = epoch if log.by_epoch else log._evaluated_iteration(iteration)
        log._saw_evaluation(step, _scores(record.items(), MMCV_SCORES))


def _mmengine_record(log: Log, record: dict[str, Any]) -> None:
    scores = _scores(record.items(), MMENGINE_SCORES)
    step = record.get('step')
    if 'iter' in record and isinstance(step, int):
        log._saw_training(record.get('epoch', step) if log.by_epoch else step, complete=not log.by_epoch)
    elif scores and isinstance(step, int):
        # If iterations are counted but `log_metric_by_epoch` is still on, the step is always 0.
        known = log.by_epoch or step >= max(log.trained, 1)
        log._saw_evaluation(step if known else log._evaluated_iteration(step, once=True), scores)
    elif scores:
        log.tested |= scores  # written by tools/test.py


def _read_text(log: Log, lines: Iterable[str]) -> None:
    reader = _TextReader(log)
    for line in lines:
        reader.read(line.rstrip('\n').rpartition('\r')[2])
    reader.end()


class _TextReader:
    """A reader of text logs of mmengine or mmcv 1.x that adds their contents, line by line, to a :class:`Log`."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.config_lines: list[str] | None = None
        self.columns: list[str] = []
        self.pending: dict[str, float] = {}  # scores in a table of mmcv 1.x whose step is not known yet
        self.mmengine = False

    def read(self, line: str) -> None:
        """Read one line of the file."""
        stamp = _STAMP.search(line) if ' - ' in line or line.startswith('INFO:') else None
        if self.config_lines is not None:
            if stamp is None and line.strip():
                self.config_lines.append(line)
                return
            self._end_config(self.config_lines)
        self._read_facts(line)
        if line.startswith('|') and not self.mmengine:
            self.columns = _read_table_row(line, self.columns, self.pending)
        if stamp is not None:
            self.mmengine = (stamp[1] or stamp[2]) == 'mmengine'
            self._read_message(line[stamp.end() :])

    def end(self) -> None:
        """Add the scores that are still pending at the end of the file."""
        if self.pending:
            self._flush(self._next_step())

    def _end_config(self, lines: list[str]) -> None:
        self.log.config = parse_config('\n'.join(lines)) if self.log.config is None else self.log.config
        self.config_lines = None

    def _read_facts(self, line: str) -> None:
        """Read the values that any line may hold: numbers of parameters and GPUs, and names of modules."""
        match = _TRAINABLE.search(line)
        if match and self.log.trainable is None:
            self.log.trainable = int((match[1] or match[2]).replace(',', ''))
        match = _GPUS.search(line)
        if match:
            self.log.gpus = max(self.log.gpus or 0, int(match[1] or match[2]))
        self.log.modules.update(name for name in _MODULES if name in line)

    def _read_message(self, message: str) -> None:
        if message.strip() == 'Config:':
            self.config_lines = []
        elif match := _TRAIN.match(message):
            self.log.by_epoch = match[1] is not None
            if self.pending:
                self._flush(self._next_step())
            self.log._saw_training(int(match[1] or match[2]), complete=match[2] == match[3])
        elif match := _EVALUATION.match(message):
            self._read_evaluation(match)

    def _read_evaluation(self, match: re.Match) -> None:
        scores = _scores(_SCORE.findall(match[6]), MMENGINE_SCORES if self.mmengine else MMCV_SCORES)
        if match[2] == 'test':
            self.log.tested |= scores
        elif scores or self.pending:
            self.log.by_epoch = match[1] == 'Epoch'
            self.pending |= scores
            number = int(match[3] or match[4])
            if not self.log.by_epoch:
                number = self.log._evaluated_iteration(0 if self.mmengine else number, once=self.mmengine)
            self._flush(number)

    def _next_step(self) -> int:
        """The step of an evaluation whose scores are in the log without its step."""
        return self.log.trained + 1 if self.log.by_epoch else self.log._evaluated_iteration(self.log.trained)

    def _flush(self, step: int) -> None:
        self.log._saw_evaluation(step, dict(self.pending))
        self.pending.clear()


def _read_table_row(line: str, columns: list[str], pending: dict[str, float]) -> list[str]:
    """Read the mIoU in mmseg's summary table or the mAP in mmdet's last row; return the header for the next row."""
    cells = [cell.strip() for cell in line.strip('|').split('|')]
    if 'mIoU' in cells:
        return cells
    try:
        if len(cells) == len(columns):
            pending['miou'] = float(cells[columns.index('mIoU')])
        elif cells[0] == 'mAP':
            pending['ap50'] = round(100 * float(cells[-1]), 4)
    except ValueError:
        pass
    return []


def _scores(pairs: Iterable[tuple[str, Any]], names: dict[str, tuple[str, int]]) -> dict[str, float]:
    found = {}
    for name, value in pairs:
        if name not in names:
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        if number >= 0:  # -1 means that there was no object, NaN that no class was present
            # Rounded to a decimal number again, since 100 * 0.873 is 87.30000000000001
            found.setdefault(names[name][0], round(names[name][1] * number, 6))
    return found
