"""What pyproject.toml cannot say: the `.mim` folder in the package, where mim looks for configs and tools."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.develop import develop

ROOT = Path(__file__).parent
MIM_FILES = ('configs', 'tools', 'model-index.yml')


class BuildPy(build_py):
    """In a wheel, `.mim` holds copies. (An editable install by pip has none: openmim would not find it, and onedl-mim
    searches the whole checkout, where it must meet a config only once.)"""

    def run(self):
        if self.editable_mode:
            return super().run()
        package = Path(self.build_lib, 'mona_mm')
        shutil.rmtree(package, ignore_errors=True)  # an earlier build's files would end up in the wheel
        super().run()
        for source in self._mim_sources():
            target = package / '.mim' / source
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / source, target)

    def get_source_files(self):
        # A source distribution takes its files from here, so that a wheel can be built from it.
        return [*super().get_source_files(), *map(str, self._mim_sources())]

    @staticmethod
    def _mim_sources() -> list[Path]:
        files = [path for name in MIM_FILES for path in [ROOT / name, *(ROOT / name).rglob('*')] if path.is_file()]
        return sorted(path.relative_to(ROOT) for path in files if '__pycache__' not in path.parts)


class Develop(develop):
    """In a checkout, `.mim` holds links, so that it is always current."""

    def run(self):
        folder = ROOT / 'mona_mm' / '.mim'
        folder.mkdir(exist_ok=True)
        for name in MIM_FILES:
            link = folder / name
            link.unlink(missing_ok=True)
            link.symlink_to(Path('..', '..', name))
        super().run()


setup(cmdclass={'build_py': BuildPy, 'develop': Develop})
