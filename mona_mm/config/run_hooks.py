"""The hooks that every run of the command lines has, whether or not its config names them."""

from typing import Any

from mmengine.config import Config, ConfigDict

from mona_mm.type_names import is_type

_OF_OUR_MODELS = (
    'mona_mm.ParamFreezeHook',
    'mona_mm.LoadCheckHook',
    'mona_mm.DeltaCheckpointHook',
    'mona_mm.IterationSeedHook',
)
_OF_ALL = (
    'mona_mm.FiniteLossHook',
    'mona_mm.ResumptionHook',
    'mona_mm.ClockHook',
    'mona_mm.WorkDirHook',
    'mona_mm.RunReportHook',
    'mona_mm.PreemptionHook',  # last: it ends the run when all others have seen the iteration
)


def add_hooks(cfg: Config) -> None:
    """Add the hooks that a config does not name, in place.

    A model with a ``PeftBackbone``, ``PeftModel`` or ``FrozenModel`` gets the table of what trains, the check of
    checkpoints, deltas, exact resuming and, in place of mmengine's own checkpoint hook, the one whose files a stopped
    process cannot break. Every model gets the page of the run, and what lets a run survive losses that are not finite,
    signals, clocks that jump, a work dir that is deleted, and resuming under other circumstances.
    """
    ours = adapts(cfg.get('model'))
    hooks = list(cfg.get('custom_hooks') or [])
    for name in (*(_OF_OUR_MODELS if ours else ()), *_OF_ALL):
        if not any(is_type(hook, name) for hook in hooks):
            hooks.append(dict(type=name))
    cfg.custom_hooks = hooks
    if ours:
        checkpoint = checkpoint_hook(cfg)
        if _is_plain(checkpoint):
            checkpoint['type'] = 'mona_mm.SafeCheckpointHook'


def checkpoint_hook(cfg: Config) -> dict[str, Any]:
    """The config of the checkpoint hook within a config, in which it is put as mmengine would if it is missing.

    It is changed in place: whoever copies the hooks of a pure-Python config imports their classes, which mmengine
    cannot dump.
    """
    if not cfg.get('default_hooks'):
        cfg.default_hooks = dict()
    if not dict.get(cfg.default_hooks, 'checkpoint'):
        cfg.default_hooks['checkpoint'] = ConfigDict(type='CheckpointHook', interval=1)
    return cfg.default_hooks['checkpoint']


def adapts(node: Any) -> bool:
    """Whether a config, or anything in it, is a ``PeftBackbone``, ``PeftModel`` or ``FrozenModel``."""
    if isinstance(node, dict):
        if is_type(node, 'mona_mm.PeftBackbone', 'mona_mm.PeftModel', 'mona_mm.FrozenModel'):
            return True
        return any(adapts(value) for value in dict.values(node))
    return isinstance(node, list | tuple) and any(map(adapts, node))


def _is_plain(hook: dict[str, Any]) -> bool:
    """Whether a hook is mmengine's checkpoint hook with local files."""
    remote = hook.get('backend_args') or hook.get('file_client_args')
    return is_type(hook, 'mmengine.CheckpointHook') and not remote
