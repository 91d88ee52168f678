"""Run the missing cells of a table, each in a process of its own, in an order that soon makes the table useful."""

import fcntl
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mona_mm.errors import ConfigError
from mona_mm.reproduce.comparison import STOPPED, Cell, Comparison, Composer
from mona_mm.reproduce.records import Record, best_learning_rate, code_version, file_name, read_records, write_record

_TEST_SHARE = 0.2  # the assumed duration of a test relative to training, until a test has been measured
_GRACE = 45.0  # the seconds before the deadline in which a cell can still reach its next checkpoint
_POLL = 0.05  # the seconds between two looks at the running cells


@dataclass
class _Job:
    cell: Cell
    step: str
    """What the process does, ``'train'`` or ``'test'``."""
    process: subprocess.Popen
    started: float
    expected: float
    """The estimated time at which the process ends."""
    told: bool = False


@dataclass
class Queue:
    """The queue of a table, which determines the cells that are still to be run and runs them.

    Args:
        composer: the builder of the cells' configs, which also holds the table, the device and the work dir.
        out: the folder of the results files.
        tasks: the names of the tasks, in the order of the table.
        methods: the names of the methods, in the order of the table.
        jobs: the number of cells that run at once.
        threads: the number of threads of each cell.
        again: whether to retry failed cells.
        program: the command that runs a cell; the folder of the cell, the step and the process id of the queue are
            appended as arguments.
        say: a function that prints a line about the progress.
    """

    composer: Composer
    out: Path
    tasks: list[str]
    methods: list[str]
    jobs: int = 1
    threads: int = 1
    again: bool = False
    program: tuple[str, ...] = (sys.executable, '-m', 'mona_mm.reproduce.cell_run')
    say: Callable[[str], None] = field(default=lambda line: print(line, flush=True))

    def __post_init__(self) -> None:
        self.table: Comparison = self.composer.table
        self.device = self.composer.device
        self._retried: set[Cell] = set()
        self._running: list[_Job] = []
        self._stop = self._over = False
        self._code = code_version()

    # Planning ---------------------------------------------------------------------------------------------------------

    def records(self) -> dict[Cell, Record]:
        """The records of finished cells: those scored, or failed and not to be retried, with their current config."""
        found = {}
        for cell, record in read_records(self.out, self.device).items():
            if cell.task not in self.tasks or cell.method not in self.methods:
                continue
            retry = self.again and record['score'] is None and cell not in self._retried
            if record['fingerprint'] == self.composer.fingerprint(cell) and not retry:
                found[cell] = record
        return found

    def missing(self, records: dict[Cell, Record]) -> list[Cell]:
        """The cells that can be run now, in order.

        For each task, every method runs with the middle learning rate first, then with the other learning rates, then
        with the best one and the other seeds. The tests come last.
        """
        table, cells = self.table, []
        for task in self.tasks:
            methods = [method for method in self.methods if table.has(task, method)]
            rates = {method: table.rates(task, method) for method in methods}
            for number in range(max(map(len, rates.values()), default=0)):
                cells += [Cell(task, method, rates[method][number], table.seeds[0]) for method in methods]
            best = {method: best_learning_rate(table, task, method, records) for method in methods}
            best = {method: lr for method, lr in best.items() if lr is not None}
            for seed in table.seeds[1:]:
                cells += [Cell(task, method, lr, seed) for method, lr in best.items()]
            for method, lr in best.items() if table.has_tests else ():
                trained = [records.get(Cell(task, method, lr, seed)) for seed in table.seeds]
                if None not in trained:
                    done = [record['seed'] for record in trained if record['score'] is not None]
                    cells += [Cell(task, method, lr, seed, 'test') for seed in done]
        return [cell for cell in cells if cell not in records]

    def total(self, records: dict[Cell, Record]) -> int:
        """The number of cells that are still missing, including those that wait for others."""
        table, missing = self.table, len(self.missing(records))
        tests = len(table.seeds) if table.has_tests else 0
        for task in self.tasks:
            for method in [method for method in self.methods if table.has(task, method)]:
                rates = table.rates(task, method)
                search = [records.get(Cell(task, method, lr, table.seeds[0])) for lr in rates]
                lr = best_learning_rate(table, task, method, records)
                if lr is not None:
                    trained = [records.get(Cell(task, method, lr, seed)) for seed in table.seeds]
                    missing += tests if None in trained else 0
                elif None in search:
                    later = [cell for cell in records if (cell.task, cell.method) == (task, method)]
                    later = [cell.lr for cell in later if cell.split == 'test' or cell.seed != table.seeds[0]]
                    missing += len(table.seeds) - 1 + tests - max(map(later.count, later), default=0)
        return missing

    def estimate(self, cell: Cell, records: dict[Cell, Record]) -> float:
        """The estimated duration of a cell in seconds, from the measured cells of its method, or else of its task."""
        training = cell.split == 'val'
        for same in (
            lambda other: (other.task, other.method) == (cell.task, cell.method),
            lambda other: other.task == cell.task,
        ):
            measured = [
                record['seconds']['wall']
                for other, record in records.items()
                if other.split == cell.split and record.get('seconds') and same(other)
            ]
            if measured:
                return statistics.fmean(measured)
        return self.table.seconds if training else self.table.seconds * _TEST_SHARE

    def to_go(self, records: dict[Cell, Record]) -> tuple[int, float]:
        """The number of missing cells, and the estimated seconds until all are done."""
        ready = self.missing(records)
        waiting = self.total(records) - len(ready)
        seconds = sum(self.estimate(cell, records) for cell in ready)
        if waiting:  # two in five of them are training runs, and the others are tests
            seconds += waiting * seconds / max(len(ready), 1) * (0.4 + 0.6 * _TEST_SHARE)
        now = time.monotonic()
        seconds -= sum(min(now - job.started, self.estimate(job.cell, records)) for job in self._running)
        return len(ready) + waiting, max(seconds, 0.0) / self.jobs

    # Running ----------------------------------------------------------------------------------------------------------

    def run(self, minutes: float | None = None) -> int:
        """Run the missing cells until none is missing or the time is over.

        Args:
            minutes: the time limit. A cell starts only if its estimated duration fits in the remaining time, and a cell
                that takes longer is stopped at a checkpoint. None means no limit.

        Returns:
            The number of cells that are still missing. Failed cells do not count as missing.
        """
        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._over = False
        handlers = {number: signal.signal(number, self._end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with self._alone():
                records = self.records()
                self._progress(records)
                while True:
                    records = self._collect(records)
                    started = not (self._stop or self._over) and self._start(records, deadline)
                    if not self._running and not started:
                        break
                    self._watch(deadline)
                    time.sleep(_POLL)
        finally:
            for job in self._running:
                job.process.kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        missing = self.total(records)
        if missing:
            self.say(f'{missing} cells are missing; the same command goes on.')
        return missing

    def _end(self, *_: Any) -> None:
        self._stop = True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self.composer.work_dir.mkdir(parents=True, exist_ok=True)
        with (self.composer.work_dir / 'lock').open('w') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f'{self.composer.work_dir}: another run works there. Wait for it, or choose another --work-dir.'
                ) from None
            yield

    def _start(self, records: dict[Cell, Record], deadline: float | None) -> bool:
        """Start as many cells as the number of jobs and the deadline allow; return whether any was started."""
        started, running = False, {job.cell for job in self._running}
        for cell in self.missing(records) if len(running) < self.jobs else ():
            if len(self._running) >= self.jobs:
                break
            if cell in running:
                continue
            step = self._step(cell)
            seconds = self.estimate(replace(cell, split='val') if step == 'train' else cell, records)
            if deadline is None or time.monotonic() + seconds <= deadline:
                self._running.append(self._launch(cell, step, seconds))
                started = True
        return started

    def _step(self, cell: Cell) -> str:
        """What is to be done for a cell next.

        Weights that are tested but were trained elsewhere, where the records are from, are trained again first.
        """
        is_trained = self._is_prepared(cell) and (self._folder(cell) / 'train.json').is_file()
        return cell.step if is_trained else 'train'

    def _is_prepared(self, cell: Cell) -> bool:
        """Whether the folder of a cell was made, completely, for its current config."""
        stamp = self._folder(cell) / 'fingerprint'
        return stamp.is_file() and stamp.read_text() == self.composer.fingerprint(cell)

    def _launch(self, cell: Cell, step: str, seconds: float) -> _Job:
        folder = self._folder(cell)
        if not self._is_prepared(cell):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self.composer.compose(cell).dump(str(folder / 'config.py'))
            (folder / 'fingerprint').write_text(self.composer.fingerprint(cell))
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get('PYTHONPATH')])]
        environment = {**os.environ, 'OMP_NUM_THREADS': str(self.threads), 'PYTHONPATH': os.pathsep.join(paths)}
        environment |= dict.fromkeys(('MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'), str(self.threads))
        if self.device == 'cpu':
            environment['CUDA_VISIBLE_DEVICES'] = ''
        command = [*self.program, str(folder), step, str(os.getpid())]
        with (folder / f'{step}.log').open('a') as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        now = time.monotonic()
        return _Job(cell, step, process, now, now + seconds)

    def _folder(self, cell: Cell) -> Path:
        return self.composer.work_dir / cell.folder

    def _watch(self, deadline: float | None) -> None:
        """Tell the running cells to stop shortly before the deadline, and kill them at the deadline or on a signal."""
        remaining = math.inf if deadline is None else deadline - time.monotonic()
        self._over = remaining <= 0 or any(job.told for job in self._running) or self._over
        for job in self._running:
            if remaining <= 0:
                job.process.kill()
            elif remaining <= _GRACE and not job.told and not 0 <= job.expected - time.monotonic() <= remaining:
                job.process.terminate()
                job.told = True
        if self._stop:
            for job in self._running:
                job.process.kill()  # safe at any time, since checkpoints are written completely or not at all

    def _collect(self, records: dict[Cell, Record]) -> dict[Cell, Record]:
        """Write the records of the cells whose processes have ended, and return all records."""
        for job in [job for job in self._running if job.process.poll() is not None]:
            self._running.remove(job)
            status, cell = job.process.returncode, job.cell
            if status == STOPPED or (status < 0 and (self._stop or self._over or job.told)):
                self.say(f'{cell.name}: stopped; it goes on from its last checkpoint')
                continue
            if status == 0 and job.step != cell.step:
                self.say(f'{cell.name}: its weights were not in {self.composer.work_dir}; they have been trained again')
                continue
            record = self._record(cell, job.step, status, records)
            write_record(record, cell, self.out)
            self._retried.add(cell)
            records = {**records, cell: record}
            outcome = f'failed: {record["error"]}' if record['score'] is None else f'{record["score"]:.2f}'
            self.say(f'{cell.name}: {outcome}, {time.monotonic() - job.started:.0f} s')
            self._progress(records)
        return records

    def _record(self, cell: Cell, step: str, status: int, records: dict[Cell, Record]) -> Record:
        """The record of a cell whose process for ``step`` has ended with ``status``."""
        task, folder = self.table.task(cell.task), self._folder(cell)
        record = dict(
            table=self.table.name,
            task=cell.task,
            method=cell.method,
            lr=cell.lr,
            seed=cell.seed,
            split=cell.split,
            metric=task.label,
            score=None,
            device=self.device,
            fingerprint=self.composer.fingerprint(cell),
            code=self._code,
        )
        if status != 0:
            error = folder / f'{step}.error'
            signalled = f'ended by signal {-status}' if status < 0 else f'ended with status {status}, see {step}.log'
            record['error'] = error.read_text() if error.is_file() else signalled
            return record | dict(date=datetime.now(timezone.utc).isoformat(timespec='seconds'))
        result = json.loads((folder / f'{step}.json').read_text())
        if step == 'test':  # a test is recorded with the costs of its training
            trained = records[Cell(cell.task, cell.method, cell.lr, cell.seed)]
            result = {key: trained[key] for key in _COSTS} | result | dict(training_seconds=trained['seconds'])
        last = list(result['scores'].values())[-1]
        if last and task.metric not in last:
            return record | result | dict(error=f'the metrics have no {task.metric}, but {", ".join(last)}')
        score = last[task.metric] if last else 0.0  # CocoMetric returns nothing if there are no detections
        return record | result | dict(score=round(task.percent * score, 4))

    def _progress(self, records: dict[Cell, Record]) -> None:
        count, seconds = self.to_go(records)
        hours, minutes = divmod(round(seconds / 60), 60)
        if count:
            self.say(f'{len(records)} cells done, {count} to go, about {hours} h {minutes:02d} min')
        elif records:
            first = file_name(next(iter(records)), self.device)
            self.say(f'{len(records)} cells done, none to go: {first} and others are in {self.out}')
        else:
            self.say('nothing to do')


_COSTS = ('trained_parameters', 'trained_in_backbone', 'backbone_share', 'peak_memory', 'delta_bytes')
