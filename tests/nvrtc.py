"""NVIDIA's run-time compiler out of its wheel (nvidia-cuda-nvrtc), by ctypes: it needs no GPU."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path


def library() -> ctypes.CDLL | None:
    """None where the wheel is not installed."""
    found = find_spec("nvidia")
    folders = map(Path, found.submodule_search_locations if found else ())
    paths = [path for folder in folders for path in folder.rglob("libnvrtc.so.*")]
    return ctypes.CDLL(str(paths[0])) if paths else None


def compile(nvrtc: ctypes.CDLL, text: str, architecture: str) -> str:
    """Compile for sm_NN to machine code -> the log, with registers and spills of each kernel.

    Raises AssertionError with the log if it does not compile.
    """
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    cupys = ["-std=c++17", "-ftz=true", "--device-as-default-execution-space"]
    options = [f"-arch={architecture}", *cupys, "--ptxas-options=-v"]
    given = (ctypes.c_char_p * len(options))(*map(str.encode, options))
    assert not nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None
    )
    failed = nvrtc.nvrtcCompileProgram(program, len(options), given)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    assert not failed, log.value.decode()
    return log.value.decode()
