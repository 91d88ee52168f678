"""What pyproject.toml cannot say: the `.mim` folder, where mim looks for configs, tools and the model index."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.develop import develop

ROOT = Path(__file__).parent
MIM_FILES = ('configs', 'tools', 'model-index.yml', 'README.md')


def mim_sources() -> list[Path]:
    files = [path for name in MIM_FILES for path in [ROOT / name, *(ROOT / name).rglob('*')] if path.is_file()]
    return sorted(path.relative_to(ROOT) for path in files if '__pycache__' not in path.parts)


class BuildPy(build_py):
    def run(self):
        if not self.editable_mode:
            # An earlier build's files would end up in the wheel.
            shutil.rmtree(Path(self.build_lib, 'mona_mm'), ignore_errors=True)
        super().run()

    def get_source_files(self):
        # A source distribution takes its files from here, so that a wheel can be built from it.
        return [*super().get_source_files(), *map(str, mim_sources())]


class BdistWheel(bdist_wheel):
    """In a wheel, `.mim` holds copies: in mona_mm/ for openmim, in the metadata folder for onedl-mim.

    onedl-mim takes the folder of RECORD's first entry for the package. pip sorts RECORD when it installs, and there
    `mona_mm-<version>.dist-info/` comes before `mona_mm/`: no order in the wheel can help, but with `.mim` in both
    folders either order does. Installers copy what they find in a metadata folder as it is.
    """

    def write_wheelfile(self, wheelfile_base, **kwargs):
        # The last step before the archive is made, and the only one that every way of building takes: what a frontend
        # has prepared as metadata replaces the folder before it. Copied here and not by build_py, nothing of it stays
        # in build/, where an editable install's onedl-mim would meet each config a second time.
        super().write_wheelfile(wheelfile_base, **kwargs)
        metadata = Path(wheelfile_base)
        package = metadata.parent / 'mona_mm'
        if not package.is_dir():  # an editable wheel, which has nothing but metadata
            return
        for folder in (package, metadata):
            for source in mim_sources():
                target = folder / '.mim' / source
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / source, target)


class Develop(develop):
    """In a checkout, `.mim` holds links, so that it is always current. Only openmim needs them: onedl-mim searches the
    whole checkout of an editable install by pip, and there it must meet a config only once."""

    def run(self):
        folder = ROOT / 'mona_mm' / '.mim'
        folder.mkdir(exist_ok=True)
        for name in MIM_FILES:
            link = folder / name
            link.unlink(missing_ok=True)
            link.symlink_to(Path('..', '..', name))
        super().run()


setup(cmdclass={'bdist_wheel': BdistWheel, 'build_py': BuildPy, 'develop': Develop})
