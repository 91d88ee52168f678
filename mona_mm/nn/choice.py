"""Several ways to compute the same, of which the fastest is found by timing them where they are used.

Which product, gradient or form of a block is fastest depends on the processor, the version of torch and the shape.
Therefore nothing in this package says what is fast: the functions that compute the same are the ways of a
:class:`Ways`, which at its first call for a shape runs each of them a few times, on the tensors at hand, and keeps the
fastest for the process. Numbers of tokens count by powers of two, so that a detector that meets many image sizes does
not measure at each of them.

Ways differ by rounding, and a measurement may end otherwise in another process. Where results must be the same bit for
bit, the first way is taken without a measurement: under ``torch.use_deterministic_algorithms`` (which mmengine's
``randomness=dict(deterministic=True)`` sets), or after ``measure(False)``, which ``PeftBackbone(fast='static')`` calls.
As ``torch.backends.cudnn.benchmark``, this setting is the process's. What was chosen is in every checkpoint
(:class:`mona_mm.hooks.ResumptionHook`), so that a resumed run goes on with the same ways.
"""

import copy
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

_ROUNDS = 5
_SECONDS = 0.02
"""Ways are timed in turns, once at least and :data:`_ROUNDS` times at most, until :data:`_SECONDS` seconds are over."""

_HOPELESS = 2.0
"""A way whose very first call took this many times as long as that of the fastest is not timed again, if the calls are
so long that the preparations of a first call do not count in them."""

_MARGIN = 0.03
"""Another way is taken in place of the first if it takes less of its time by more than this share."""

_PATIENCE = 5.0
"""The seconds for which a thread waits for another one to end its measurement. Then it takes the first way once: what
is being measured may itself wait for this thread, as a backward pass on a GPU waits for that of its device."""

_measures = True
_chosen: dict[tuple, str] = {}
_lock = threading.RLock()  # reentrant, since a way may itself choose between ways


def measure(on: bool) -> None:
    """Let every choice of this process be made by measurement, as it is by default, or take the first way always."""
    global _measures
    _measures = on


def measures() -> bool:
    """Whether choices are made by measurement now."""
    return _measures and not torch.are_deterministic_algorithms_enabled()


def bucket(count: int) -> int:
    """The power of two that counts of tokens or elements share in a key, as its exponent."""
    return int(count).bit_length()


class Ways:
    """Functions that compute the same.

    Args:
        name: the name of what they compute.
        ways: the functions by name. The first is the one that is taken without a measurement; it should be the one
            that needs the least memory.
    """

    def __init__(self, name: str, **ways: Callable) -> None:
        self.name, self.ways, self.first = name, ways, next(iter(ways))

    def __call__(self, *args: Any, key: tuple = ()) -> Any:
        """Compute the result by the fastest way for a key, without gradients.

        Args:
            args: the arguments of the function, tensors among them.
            key: what the choice depends on: whole numbers, strings and dtypes.
        """
        return self.choose(key, lambda way: way(*args))(*args)

    def choose(self, key: tuple, run: Callable[[Callable], Any]) -> Callable:
        """The fastest way for a key.

        Args:
            key: what the choice depends on: whole numbers, strings and dtypes.
            run: runs the way that it gets, as it will be used. It must not change anything but random states, which
                are restored. A way that raises a ``RuntimeError``, as one that needs too much memory does, is not
                taken.
        """
        if not measures():
            return self.ways[self.first]
        key = (self.name, torch.get_num_threads(), *key)
        name = _chosen.get(key)
        if name is None:
            name = self._measure(key, run)
        return self.ways[name if name in self.ways else self.first]

    def choose_form(self, module: nn.Module, x: Tensor, *args: Any, key: tuple) -> Callable:
        """The fastest of the forms of a module's forward, functions of the module, ``x`` and ``args``.

        A trial runs forward and backward as training does, and changes no gradient. If parameters need one, it runs on
        a copy of the module, so that no hook of theirs is called.

        Args:
            module: the module.
            x: its input.
            args: the other arguments of the forms.
            key: what the choice depends on beside the device and dtype of ``x``, autocast, and whether ``x`` needs a
                gradient. Whether the parameters need one must be in it.
        """
        device = x.device.type
        gradients = torch.is_grad_enabled()
        key = (device, x.dtype, torch.is_autocast_enabled(device), gradients, gradients and x.requires_grad, *key)
        trials: list[nn.Module] = []

        def run(form: Callable) -> None:
            if not trials:
                trains = gradients and any(p.requires_grad for p in module.parameters())
                trials.append(copy.deepcopy(module) if trains else module)
            run_with_gradients(lambda tokens: form(trials[0], tokens, *args), x, trials[0].parameters())

        return self.choose(key, run)

    def _measure(self, key: tuple, run: Callable[[Callable], Any]) -> str:
        if not _lock.acquire(timeout=_PATIENCE):
            return self.first
        try:
            if key in _chosen:  # by another thread meanwhile
                return _chosen[key]
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return self.first
            best = self._times(run)
            fastest = min(best, key=best.get, default=self.first)
            first = best.get(self.first, float('inf'))
            is_worth_it = fastest in best and best[fastest] <= (1 - _MARGIN) * first
            _chosen[key] = fastest if is_worth_it or self.first not in best else self.first
            return _chosen[key]
        finally:
            _lock.release()

    def _times(self, run: Callable[[Callable], Any]) -> dict[str, float]:
        """The shortest time of each way that works, in seconds."""
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        best: dict[str, float] = {}
        # The hooks hide what a trial keeps from those around it, such as activation checkpointing's, which count it.
        with torch.random.fork_rng(devices), saved_tensors_hooks(Tensor.detach, lambda tensor: tensor):
            for name, way in self.ways.items():
                try:
                    before = len(_chosen)
                    best[name] = _seconds(run, way)
                    if len(_chosen) > before:  # the time of choices within it
                        best[name] = _seconds(run, way)
                except RuntimeError:
                    continue
            shortest = min(best.values(), default=0.0)
            limit = _HOPELESS * shortest if shortest > _SECONDS / 4 else float('inf')
            best = dict.fromkeys((name for name, seconds in best.items() if seconds <= limit), float('inf'))
            begin = time.perf_counter()
            for i in range(_ROUNDS if len(best) > 1 else 0):
                if i and time.perf_counter() - begin > _SECONDS:
                    break
                for name in best:
                    best[name] = min(best[name], _seconds(run, self.ways[name]))
        return best


def _seconds(run: Callable[[Callable], Any], way: Callable) -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        clock = time.perf_counter
    else:  # with one thread, the time of the thread, which other processes do not lengthen
        clock = time.perf_counter if torch.get_num_threads() > 1 else time.thread_time
    begin = clock()
    run(way)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return clock() - begin


def run_with_gradients(function: Callable[[Tensor], Tensor], x: Tensor, parameters: Iterable[Tensor] = ()) -> None:
    """Run a function of ``x`` as training does: forward, and backward if gradients are on and anything needs one.

    It neither changes gradients nor adds to the graph of ``x``. Hooks of the parameters are called.
    """
    wanted = [p for p in parameters if p.requires_grad]
    if not (torch.is_grad_enabled() and (x.requires_grad or wanted)):
        with torch.no_grad():
            function(x)
        return
    x = x.detach().requires_grad_(x.requires_grad)
    out = function(x)
    torch.autograd.grad(out, [*wanted, x] if x.requires_grad else wanted, out.detach(), allow_unused=True)


def chosen() -> list[list]:
    """What has been chosen in this process, as lists of a key's parts and the name of the way, for a checkpoint."""
    return [[*map(_plain, key), name] for key, name in list(_chosen.items())]  # other threads may choose meanwhile


def restore(choices: Any) -> None:
    """Take what :func:`chosen` returned, in place of all choices of this process; what has another form is left out."""
    _chosen.clear()
    for entry in choices if isinstance(choices, list | tuple) else ():
        if isinstance(entry, list | tuple) and entry and all(isinstance(part, str | int) for part in entry):
            *key, name = entry
            _chosen[tuple(map(_parse, key))] = name


def _plain(part: Any) -> Any:
    return str(part) if isinstance(part, torch.dtype) else part


def _parse(part: str | int) -> Any:
    dtype = getattr(torch, part.removeprefix('torch.'), None) if str(part).startswith('torch.') else None
    return dtype if isinstance(dtype, torch.dtype) else part
