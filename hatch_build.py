"""Builds the native kernels with the package where there is a C++ compiler, and leaves them out where there is none.

The sources are in native/, built by CMake; the result is one shared library without any part of Python in it, so that
one wheel serves all versions of Python. Where anything fails, the package is built without it, and works: the jnp twins
of the kernels are used. LLORCH_JAX_BUILD_KERNELS=required makes that an error, =off does not try.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMPILERS = ("c++", "g++", "clang++")
TOOLS = {"cmake": "cmake>=3.18", "ninja": "ninja>=1.10"}
HEADERS = "jaxlib>=0.10.1,<0.11"  # as in pyproject.toml: kernels of another version of XLA's interface are refused


class KernelsHook(BuildHookInterface):
    """Adds llorch_jax/kernels/_native.so to the wheel, or puts it there for an editable install."""

    def dependencies(self) -> list[str]:
        """What the build environment needs: nothing without a compiler, or where nothing has changed."""
        if self.target_name != "wheel" or not _wanted() or self._newest() is not None:
            return []
        return [HEADERS, *(requirement for tool, requirement in TOOLS.items() if shutil.which(tool) is None)]

    def initialize(self, version: str, build_data: dict) -> None:
        """Compiles and hands the library to the wheel."""
        if self.target_name != "wheel":
            return
        package = Path(self.root) / "llorch_jax" / "kernels"
        newest = self._newest()
        if newest is not None:
            self._hand_over(newest, version, build_data)
            return
        for stale in package.glob("_native.*"):
            stale.unlink()
        if not _wanted():
            self._go_without("no C++ compiler was found")
            return
        self.folder = tempfile.mkdtemp()
        try:
            library = _build(Path(self.root) / "native", Path(self.folder))
        except (OSError, subprocess.CalledProcessError, ModuleNotFoundError) as error:
            self._go_without(f"{error}\n{getattr(error, 'output', '') or ''}")
            return
        self._hand_over(library, version, build_data)

    def finalize(self, version: str, build_data: dict, artifact_path: str) -> None:
        """Removes the build's folder."""
        shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)

    def _hand_over(self, library: Path, version: str, build_data: dict) -> None:
        place = Path("llorch_jax") / "kernels" / library.name
        if version != "editable":
            build_data["force_include"][str(library)] = str(place)
        elif library != Path(self.root) / place:
            shutil.copy2(library, Path(self.root) / place)
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"

    def _newest(self) -> Path | None:
        """The library of an earlier editable install, if it is newer than all that it was built from."""
        if os.environ.get("LLORCH_JAX_BUILD_KERNELS") == "off":
            return None
        root = Path(self.root)
        sources = [root / "hatch_build.py", *(path for path in (root / "native").rglob("*") if path.is_file())]
        changed = max(path.stat().st_mtime for path in sources)
        built = sorted((root / "llorch_jax" / "kernels").glob("_native.*"))
        return next((path for path in built if path.stat().st_mtime > changed), None)

    def _go_without(self, reason: str) -> None:
        if os.environ.get("LLORCH_JAX_BUILD_KERNELS") == "required":
            sys.exit(f"llorch-jax: the native kernels cannot be built: {reason}")
        self.app.display_warning(f"llorch-jax is built without its native kernels: {reason}")


def _wanted() -> bool:
    if os.environ.get("LLORCH_JAX_BUILD_KERNELS") == "off":
        return False
    return "CXX" in os.environ or any(shutil.which(name) for name in COMPILERS)


def _build(source: Path, folder: Path) -> Path:
    """Compiles the library and returns its path."""
    jaxlib = importlib.util.find_spec("jaxlib")
    if jaxlib is None or not jaxlib.submodule_search_locations:
        raise ModuleNotFoundError("jaxlib, which has the headers of XLA's interface, is not in the build environment")
    headers = Path(jaxlib.submodule_search_locations[0]) / "include"
    _run("cmake", "-S", str(source), "-B", str(folder), "-G", "Ninja", f"-DLLORCH_JAXLIB_INCLUDE={headers}")
    _run("cmake", "--build", str(folder), "--target", "native")
    return next(path for path in folder.iterdir() if path.name.startswith("_native."))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
