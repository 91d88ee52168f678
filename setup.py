"""What pyproject.toml cannot say: the `.mim` folder in the package, where mim and `mona_mm::` configs are looked up."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.develop import develop

ROOT = Path(__file__).parent
MIM_FILES = ('configs', 'tools', 'model-index.yml')


def link_mim_files() -> None:
    """In a checkout, `.mim` holds links: it is always current."""
    folder = ROOT / 'mona_mm' / '.mim'
    folder.mkdir(exist_ok=True)
    for name in MIM_FILES:
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(Path('..', '..', name))


class BuildPy(build_py):
    """In a wheel, `.mim` holds copies."""

    def run(self):
        super().run()
        if self.editable_mode:
            link_mim_files()
            return
        folder = Path(self.build_lib, 'mona_mm', '.mim')
        shutil.rmtree(folder, ignore_errors=True)
        for source in self._mim_sources():
            target = folder / source
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
    def run(self):
        link_mim_files()
        super().run()


setup(cmdclass={'build_py': BuildPy, 'develop': Develop})
