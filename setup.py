"""Builds the two extensions: tinylm.kernels._cpu (C++17, OpenMP) and tinylm._bpe (Cython).

csrc/cpu/table.cpp is compiled once per instruction set, each time into a namespace of that name;
isa.cpp hears which of them compiled, and offers those that the processor runs. Both extensions are
optional: where they cannot be built, tinylm runs on its NumPy reference kernels and says so.
"""

import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
BF16 = [*AVX512, "-mavx512bf16"]
INSTRUCTION_SETS = {"baseline": []}  # best first
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS = {
        "amx": [*BF16, "-mamx-tile", "-mamx-bf16"], "avx512bf16": BF16, "avx512": AVX512,
        "avx2": AVX2, "baseline": [],
    }  # fmt: skip

if sys.platform == "darwin":  # for this processor, not for all that python.org's Python runs on
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")

# A kernel sums in a fixed order and may contract a*b+c into one rounding; nothing else is relaxed.
FLAGS = [
    "-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall",
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
]  # fmt: skip
# Flags for compiling and for linking, the first that work. Apple's compiler has OpenMP without its
# library, which Homebrew has.
OPENMP = [(["-fopenmp"], ["-fopenmp"])] + [
    (["-Xclang", "-fopenmp", f"-I{libomp}/include"], [f"-L{libomp}/lib", "-lomp"])
    for libomp in ("/opt/homebrew/opt/libomp", "/usr/local/opt/libomp")
]
WITHOUT_OPENMP = ["-Wno-unknown-pragmas"], []
SANITIZE = os.environ.get("TINYLM_SANITIZE", "")  # for example "address,undefined"
if SANITIZE:
    FLAGS += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1", "-O1"]
    FLAGS += ["-DPOOL_KEEPS_NOTHING=1"]


class BuildExtensions(build_ext):
    """build_ext that compiles all at once: both extensions, and each table of kernels."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = True
        self.force = True  # flags come from the environment too, which has no date

    def build_extension(self, ext: Extension) -> None:
        try:
            compiling, linking = self.openmp()
            ext.extra_compile_args += compiling
            ext.extra_link_args += linking
            if ext.name == "tinylm.kernels._cpu":
                self.compile_kernels(ext)
            super().build_extension(ext)
        except Exception as error:  # Cython's own errors would not count as "optional"
            raise CompileError(f"{ext.name}: {error}") from error

    def openmp(self) -> tuple[list[str], list[str]]:
        """Flags for compiling and for linking with OpenMP; without it kernels use one thread."""
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.cpp")
            with open(source, "w") as f:
                f.write("#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n")
            for compiling, linking in [] if os.environ.get("TINYLM_OPENMP") == "0" else OPENMP:
                try:
                    objects = self.compiler.compile([source], folder, extra_postargs=compiling)
                    self.compiler.link_executable(
                        objects, "probe", folder, extra_postargs=linking, target_lang="c++"
                    )
                    return compiling, linking
                except (CompileError, LinkError):
                    pass
        print("tinylm: without OpenMP, so the kernels will run on one thread", file=sys.stderr)
        return WITHOUT_OPENMP

    def compile_kernels(self, ext: Extension) -> None:
        """Compile all but isa.cpp, which is left to build_ext and told of the tables made here."""
        ext.extra_compile_args += FLAGS
        ext.extra_link_args += [f"-fsanitize={SANITIZE}"] if SANITIZE else []
        flags = {"bindings": [], **INSTRUCTION_SETS}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = pool.map(lambda name: self.compile_object(name, ext, flags[name]), flags)
            objects = {name: path for name, path in zip(flags, made) if path}
        ext.extra_objects = [*objects.values()]
        tables = ", ".join(f"&kernels_{name}" for name in INSTRUCTION_SETS if name in objects)
        ext.define_macros = [("TABLES", tables)]

    def compile_object(self, name: str, ext: Extension, flags: list[str]) -> str | None:
        """Compile bindings.cpp, or table.cpp for one instruction set; returns the object's path, or
        None where a table does not compile, as with an older compiler."""
        import pybind11

        source = "bindings" if name == "bindings" else "table"
        try:
            (built,) = self.compiler.compile(
                [f"csrc/cpu/{source}.cpp"],
                output_dir=os.path.join(self.build_temp, name),
                macros=[("ISA", name)],
                include_dirs=[pybind11.get_include()],
                extra_postargs=[*ext.extra_compile_args, *flags],
            )
        except CompileError:
            if name in ("bindings", "baseline"):
                raise
            print(f"tinylm: {name} did not compile here: left out", file=sys.stderr)
            return None
        return built


CPU = Extension(
    "tinylm.kernels._cpu",
    sources=["csrc/cpu/isa.cpp"],
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
