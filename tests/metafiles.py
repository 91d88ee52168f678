"""tools/write_metafiles.py as a module: what is listed for `mim search`."""

import functools
import importlib.util
import sys

from conftest import ROOT

_SPEC = importlib.util.spec_from_file_location('write_metafiles', ROOT / 'tools/write_metafiles.py')
TOOL = sys.modules.setdefault('write_metafiles', importlib.util.module_from_spec(_SPEC))
_SPEC.loader.exec_module(TOOL)

BUDGET, COUNT, METHODS, PUBLISHED = TOOL.BUDGET, TOOL.COUNT, TOOL.CATALOGUE, TOOL.PUBLISHED
configs = TOOL.configs
listed = functools.cache(TOOL.listed)  # reading all of the files takes a second
