"""The native kernels' build; everything else about the package is in pyproject.toml.

One shared library with a plain C interface: no Python or torch headers, so it compiles in seconds and fits any version
of either. Each source file is compiled once for every instruction set it has a variant for, with the flags of that set
alone. Without a compiler, or with one that lacks a set, the install goes on: tessera then uses its PyTorch kernels, and
`tessera doctor` says so.
"""

import os
import platform
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

SOURCE = Path("src/tessera/native/source")
IN_PLACE = SOURCE.parent / "kernels.so"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-psabi"]
FLAGS += ["-Wno-maybe-uninitialized"]  # GCC 12, of its own headers
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"]
SETS = {  # instruction sets and their flags; features.cpp finds what the machine has
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
VARIANTS = re.compile(r"^// Variants: (.+)$", re.MULTILINE)  # a source file's own line; absent: compiled once, as it is


class BuildNative(build_ext):
    """Compiles and links without distutils' rules for extension modules: this is a library that ctypes opens."""

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            objects = [o for o in workers.map(self.compile_one, self.jobs()) if o]
        temporary = out.with_suffix(".building")
        self.compiler.link_shared_object(objects, str(temporary), extra_postargs=self.extra(), target_lang="c++")
        os.replace(temporary, out)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]  # what could not be built is no output

    def extra(self) -> list[str]:
        return os.environ.get("CXXFLAGS", "").split()  # sanitizers, for instance

    def jobs(self) -> list[tuple[Path, str | None]]:
        x86 = platform.machine() in ("x86_64", "AMD64")
        found = []
        for path in sorted(SOURCE.glob("*.cpp")):
            named = VARIANTS.search(path.read_text())
            sets = named.group(1).split() if named else [None]
            found += [(path, one) for one in sets if x86 or one in (None, "portable")]
        return found

    def compile_one(self, job: tuple[Path, str | None]) -> str | None:
        path, name = job
        folder = Path(self.build_temp) / (name or "any")
        flags = [*FLAGS, *self.extra(), *(["-DTESSERA_ISA=" + name, *SETS[name]] if name else [])]
        try:
            (made,) = self.compiler.compile([str(path)], output_dir=str(folder), extra_preargs=flags)
        except CompileError:
            if name in (None, "portable"):
                raise
            self.warn(f"this compiler cannot build {path.name} for {name}; machines with it use the next lower set")
            return None
        return made

    def run(self) -> None:
        IN_PLACE.unlink(missing_ok=True)  # where the build fails, a library of older sources must not stay
        try:
            super().run()
        except (CompileError, LinkError, OSError) as error:
            self.warn(f"no native kernels: {error}; tessera will use its slower PyTorch kernels")


setup(
    ext_modules=[Extension("tessera.native.kernels", sorted(map(str, SOURCE.glob("*.cpp"))))],
    cmdclass={"build_ext": BuildNative},
)
