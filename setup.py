"""Package the Python code, and the compiled libraries if torch and a compiler are there.

EXTROPE_CUDA=0 leaves the CUDA library out; EXTROPE_CUDA=1 fails if it cannot be built. A missing
library is built on first use (extrope_kernels/_ext.py). An editable install never packages one: it
would go stale with the first edit, while the first-use cache follows the sources.
"""

import importlib
import os
import sys
import types
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_build_module():
    """Import `extrope_kernels._build` without the package's `__init__`, which needs torch."""
    package = types.ModuleType("extrope_kernels")
    package.__path__ = [str(ROOT / "extrope_kernels")]
    sys.modules[package.__name__] = package
    return importlib.import_module("extrope_kernels._build")


_build = load_build_module()


class BuildWithLibraries(build_py):
    """Copy the Python files, and build the libraries that can be built."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "extrope_kernels"
        cuda = os.environ.get("EXTROPE_CUDA", "")
        for name, file_name in _build.LIBRARIES.items():
            target = package / file_name
            target.unlink(missing_ok=True)  # an earlier build's
            if name == "cuda" and cuda == "0":
                continue
            try:
                temp = Path(self.get_finalized_command("build").build_temp) / name
                _build.build(name, target, temp, temp / "build.log")
            except _build.BuildError as error:
                if name == "cuda" and cuda == "1":
                    raise SystemExit(f"EXTROPE_CUDA=1, but no CUDA library: {error}") from error
                print(
                    f"extrope_kernels: {name} library left to first use: {error}", file=sys.stderr
                )
            else:
                self.distribution.libraries_built = True


class WheelTaggedByContent(bdist_wheel):
    """Tag the wheel cp310-abi3-PLATFORM if it holds a library, else py3-none-any."""

    def finalize_options(self):
        self.py_limited_api = "cp310"
        super().finalize_options()

    def run(self):
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


class LibraryDistribution(Distribution):
    """A distribution that has extension modules if a library was built."""

    libraries_built = False

    def has_ext_modules(self):
        return self.libraries_built


setup(
    packages=[*find_packages(include=["extrope_kernels*"]), "extrope_kernels.csrc"],
    py_modules=["extrope_cli"],  # the command, which answers before torch is imported
    package_dir={"extrope_kernels.csrc": "csrc"},
    # By its name alone: otherwise setuptools would take the folders below csrc for packages.
    include_package_data=False,
    package_data={
        "extrope_kernels": ["py.typed", "ops/**/*.json"],
        "extrope_kernels.csrc": ["**/*.h", "**/*.cpp", "**/*.cu"],
    },
    distclass=LibraryDistribution,
    cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": WheelTaggedByContent},
)
