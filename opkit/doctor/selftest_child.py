"""What the self-test records: one NVTX range and, if there is a GPU, one empty kernel.

Run as a file by any interpreter, so it imports nothing of opkit. Its arguments: where to say what
it did (JSON), the range's text, the kernel's name.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import sys
from pathlib import Path

PTX = """
.version {version}
.target {target}
.address_size 64
.visible .entry {name}() {{ ret; }}
"""
# The driver compiles it for the GPU at hand (PTX ISA: code for an older target runs on every newer
# one); a driver that has given up the first target takes the second.
TARGETS = (("6.3", "sm_70"), ("7.0", "sm_80"))


class NoLaunchError(Exception):
    """The kernel was not launched; its text says why."""


def launch(name: str) -> None:
    """Compile and launch an empty kernel on the first visible GPU, by the driver's API.

    Raises:
        NoLaunchError: there is no driver, no GPU, or the driver refused a step.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NoLaunchError("no CUDA driver (libcuda.so.1)") from error

    def call(function: str, *arguments: object) -> None:
        code = getattr(cuda, function)(*arguments)
        if code:
            text = ctypes.c_char_p()
            cuda.cuGetErrorName(code, ctypes.byref(text))
            raise NoLaunchError(f"{function}: {(text.value or b'error').decode()} ({code})")

    device, context = ctypes.c_int(), ctypes.c_void_p()
    module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), 0)
    # The primary context, as frameworks use it.
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxSetCurrent", context)
    for version, target in TARGETS:
        text = PTX.format(version=version, target=target, name=name).encode() + b"\0"
        try:
            call("cuModuleLoadData", ctypes.byref(module), text)
            break
        except NoLaunchError:
            if (version, target) == TARGETS[-1]:
                raise
    call("cuModuleGetFunction", ctypes.byref(kernel), module, name.encode())
    one, none, nothing = ctypes.c_uint(1), ctypes.c_uint(0), ctypes.c_void_p()
    call("cuLaunchKernel", kernel, one, one, one, one, one, one, none, nothing, nothing, nothing)
    call("cuCtxSynchronize")


def main(told: Path, text: str, name: str) -> None:
    """Open the range, launch inside it, say what was done."""
    done: dict[str, object] = {"nvtx": "", "launched": False, "no_kernel": ""}
    try:
        import nvtx

        done["nvtx"] = importlib.metadata.version("nvtx")
        nvtx.push_range(text)
    except ImportError:
        pass  # said by its empty version
    try:
        launch(name)
        done["launched"] = True
    except NoLaunchError as error:
        done["no_kernel"] = str(error)
    if done["nvtx"]:
        nvtx.pop_range()
    told.write_text(json.dumps(done), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
