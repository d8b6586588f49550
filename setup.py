"""Builds the two extensions: tinylm.kernels._cpu (C++17, OpenMP) and tinylm._bpe (Cython).

csrc/cpu/table.cpp is compiled once per instruction set, each time into a namespace of that name;
bindings.cpp is compiled once and picks a table when it is imported. Both extensions are optional:
where they cannot be built, tinylm runs on its NumPy reference kernels and says so.
"""

import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
BF16 = [*AVX512, "-mavx512bf16"]
INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS |= {
        "avx2": AVX2, "avx512": AVX512, "avx512bf16": BF16,
        "amx": [*BF16, "-mamx-tile", "-mamx-bf16"],
    }  # fmt: skip

# A kernel sums in a fixed order and may contract a*b+c into one rounding; nothing else is relaxed.
FLAGS = [
    "-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall",
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
]  # fmt: skip
WITHOUT_OPENMP = ["-Wno-unknown-pragmas"]
SANITIZE = os.environ.get("TINYLM_SANITIZE", "")  # for example "address,undefined"
if SANITIZE:
    FLAGS += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1", "-O1"]
    FLAGS += ["-DPOOL_KEEPS_NOTHING=1"]


def openmp_flags(compiler: list[str]) -> list[str]:
    """["-fopenmp"] where the compiler compiles and links it, else []: kernels use one thread."""
    if os.environ.get("TINYLM_OPENMP") == "0":
        return WITHOUT_OPENMP
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "probe.cpp")
        with open(source, "w") as f:
            f.write("#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n")
        command = [*compiler, "-fopenmp", source, "-o", os.path.join(folder, "probe")]
        found = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not found:
        print("tinylm: no OpenMP found, the kernels will run on one thread", file=sys.stderr)
    return ["-fopenmp"] if found else WITHOUT_OPENMP


class BuildExtensions(build_ext):
    """build_ext that compiles table.cpp once per instruction set."""

    def build_extension(self, ext: Extension) -> None:
        self.force = True  # flags come from the environment too, which has no date
        try:
            openmp = openmp_flags(self.compiler.compiler_so_cxx)
            ext.extra_compile_args += openmp
            ext.extra_link_args += openmp
            if ext.name == "tinylm.kernels._cpu":
                self.prepare_kernels(ext, openmp)
            super().build_extension(ext)
        except Exception as error:  # Cython's own errors would not count as "optional"
            raise CompileError(f"{ext.name}: {error}") from error

    def prepare_kernels(self, ext: Extension, openmp: list[str]) -> None:
        import pybind11

        ext.include_dirs.append(pybind11.get_include())
        ext.extra_compile_args += FLAGS
        ext.extra_link_args += [f"-fsanitize={SANITIZE}"] if SANITIZE else []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            flags = {isa: [*FLAGS, *openmp, *known] for isa, known in INSTRUCTION_SETS.items()}
            objects = list(pool.map(self.compile_table, flags, flags.values()))
        ext.extra_objects = [path for path in objects if path]
        ext.define_macros += [(f"HAVE_{i.upper()}", "1") for i, path in zip(flags, objects) if path]

    def compile_table(self, name: str, flags: list[str]) -> str | None:
        """Compile csrc/cpu/table.cpp for one instruction set; returns the object's path, or None
        where it does not compile, as with an older compiler."""
        try:
            (built,) = self.compiler.compile(
                ["csrc/cpu/table.cpp"],
                output_dir=os.path.join(self.build_temp, name),
                macros=[("ISA", name)],
                extra_postargs=flags,
            )
        except CompileError:
            if name == "baseline":
                raise
            print(f"tinylm: {name} did not compile here: left out", file=sys.stderr)
            return None
        return built


CPU = Extension(
    "tinylm.kernels._cpu",
    sources=["csrc/cpu/bindings.cpp"],
    language="c++",
    optional=True,
)
BPE = Extension(
    "tinylm._bpe",
    sources=["tinylm/_bpe.pyx"],
    language="c++",
    extra_compile_args=["-O3", "-std=c++17"],
    optional=True,
)

setup(
    ext_modules=[CPU, BPE],
    cmdclass={"build_ext": BuildExtensions},
)
