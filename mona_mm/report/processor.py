"""The name of the processor, on which speeds depend."""

import platform
from pathlib import Path

import torch


def processor_name() -> str:
    """The processor's name, where the system tells it, and the instructions of it that torch uses."""
    name = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.is_file():
        lines = [line.partition(':')[2].strip() for line in info.read_text().splitlines() if 'model name' in line]
        name = lines[0] if lines else name
    return f'{name} ({torch.backends.cpu.get_cpu_capability()})'
