"""Build csrc/ into shared objects beside ldm_sg/ops, where a compiler is; every other fact is in pyproject.toml.

A part that cannot be built is left out, with a line that says why: the package works without it (docs/kernels.md).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11 and newer
CPU_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno", "-Wno-psabi"]
X86 = platform.machine() in ("x86_64", "AMD64")
CPU = {"avx2": "-march=x86-64-v3", "avx512": "-march=x86-64-v4"} if X86 else {"default": ""}
CUDA_ARCHITECTURES = ("80", "90", "100")


def files(pattern: str) -> list[str]:
    """List files of csrc/."""
    return sorted(map(str, Path("csrc").glob(pattern)))


def sources_id() -> str:
    """Name the state of csrc/, as ldm_sg/ops/extension.py does: a part of other sources is never loaded."""
    return hashlib.sha256(b"".join(Path(f).read_bytes() for f in files("*/*"))).hexdigest()[:8]


def torch_folder() -> Path:
    """Find torch's headers and libraries, also from pip's isolated build environment."""
    spec = importlib.util.find_spec("torch")
    beside = Path(sysconfig.get_path("purelib"), "torch")
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else beside
    if not (folder / "include").is_dir():
        raise CompileError("torch is not installed yet: afterwards, python setup.py build_ext --inplace")
    return folder


def cpu_command(name: str) -> list[str]:
    """The C++ compiler and its flags for one instruction set."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if compiler is None:
        raise CompileError("there is no C++ compiler: install g++, or name one in CXX")
    return [*compiler.split(), *CPU_FLAGS, *filter(None, [CPU[name]])]


def cuda_command() -> list[str]:
    """The CUDA compiler and its flags."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise CompileError("there is no nvcc")
    if not (os.environ.get("LDM_SG_CUDA") or Path("/dev/nvidia0").exists()):
        raise CompileError("no GPU is visible; LDM_SG_CUDA=1 builds it all the same")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    asked = re.findall(r"(\d+)\.(\d)", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))  # "8.0;9.0", as torch reads it
    wanted = ["".join(version) for version in asked] or CUDA_ARCHITECTURES
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in wanted if f"compute_{a}" in known]
    flags = ["-O3", "-std=c++20", "-shared", "-Xcompiler=-fPIC", "--cudart=shared", "--threads=0", "-DUSE_CUDA"]
    return [nvcc, *flags, *codes, "-Xptxas=-v", "-ltorch_cuda"]


class BuildParts(build_ext):
    """Call a compiler once per part; setuptools leaves out the optional part that fails."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = True

    def get_ext_filename(self, fullname: str) -> str:
        return f"{Path(*fullname.split('.'))}.{sources_id()}.so"  # LibTorch's stable ABI: no version of Python here

    def run(self) -> None:
        super().run()
        for old in Path("ldm_sg/ops").glob("_*.so") if self.inplace else ():
            if sources_id() not in old.name:
                old.unlink()

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except (OSError, subprocess.CalledProcessError) as error:  # a compiler that is not there, or does not answer
            raise CompileError(str(error)) from error

    def _build(self, ext: Extension) -> None:
        part = ext.name.split("._")[1]
        if not ext.sources:
            raise CompileError("it has no sources")
        torch, target = torch_folder(), Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        command = cuda_command() if part == "cuda" else cpu_command(part.removeprefix("cpu_"))
        command += [STABLE_ABI, f"-I{torch / 'include'}", *ext.sources, f"-L{torch / 'lib'}", "-ltorch_cpu"]
        done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"{' '.join(command)}\n{done.stderr}")
        print(f"built {target}\n{done.stderr}".rstrip(), flush=True)


sources = {f"cpu_{name}": files("cpu/*.cpp") for name in CPU} | {"cuda": files("cuda/*.cu")}
parts = [Extension(f"ldm_sg.ops._{p}", s, depends=files("*/*.h"), optional=True) for p, s in sources.items()]
setup(ext_modules=parts, cmdclass={"build_ext": BuildParts})
