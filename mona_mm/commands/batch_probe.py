"""Measure the memory of a few training steps: python -m mona_mm.commands.batch_probe CONFIG RESULT."""

import json
import sys
from pathlib import Path

import torch
from mmengine.config import Config

import mona_mm  # noqa: F401  imported first, because it makes the OpenMMLab libraries importable
from mona_mm.commands.dry_run import try_steps
from mona_mm.report.memory import peak_of_process


def main() -> None:
    cfg = Config.fromfile(sys.argv[1])
    try:
        try_steps(cfg)
        memory = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else peak_of_process()
    except (MemoryError, torch.OutOfMemoryError):
        memory = None
    except RuntimeError as error:  # torch's allocator on a CPU
        if "can't allocate memory" not in str(error) and 'not enough memory' not in str(error):
            raise
        memory = None
    Path(sys.argv[2]).write_text(json.dumps(dict(memory=memory)))


if __name__ == '__main__':
    main()
