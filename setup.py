"""Builds gpt4v_fast._C (and gpt4v_fast/_cuda.so where there is nvcc) with ninja.

Each CPU kernel is written once and compiled once per ISA, so every translation unit has its own flags; the
dispatch table in csrc/dispatch.cpp picks one at run time. Neither torch nor CUDA is needed to build.

Environment: GPT4V_FAST_CUDA=0 leaves the CUDA object out, NVCC names the compiler, CXX the C++ compiler,
GPT4V_FAST_SANITIZE=address,undefined makes a sanitizer build, GPT4V_FAST_SCALAR_ONLY=1 one for no processor in
particular that takes a fifth of the time, MAX_JOBS limits parallel compilation.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"

COMMON_FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
    # Contraction is left to explicit FMA in csrc/simd, so that every ISA rounds where the source says so.
    "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",  # GCC 12's own AVX-512 header, at every intrinsic
    "-Wno-unknown-warning-option",  # clang, of the one above
]  # fmt: skip

AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]
ISA_FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [*AVX512_FLAGS, "-mprefer-vector-width=512"],
    "avx512_bf16": [*AVX512_FLAGS, "-mavx512bf16", "-mprefer-vector-width=512"],
    "amx_bf16": [*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mprefer-vector-width=512"],
}
CUDA_ARCHITECTURES = ("80", "90", "100")


NO_COMPILER = """
gpt4v_fast builds its CPU kernels with a C++17 compiler, and {program!r} cannot be run.
  Debian, Ubuntu:  apt-get install g++
  Fedora:          dnf install gcc-c++
  conda:           conda install gxx
Another compiler is named by CXX, for example CXX=g++-13.
"""


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "g++"))
    if not command or shutil.which(command[0]) is None:
        raise SystemExit(NO_COMPILER.format(program=" ".join(command)))
    return command


def has_tiles() -> bool:
    """Whether compiler and assembler know AMX: GCC 11, clang 12, binutils 2.34 and later."""
    command = [*compiler(), *ISA_FLAGS["amx_bf16"], "-x", "c++", "-c", "-o", os.devnull, "-"]
    source = 'void f() { asm volatile("tdpbf16ps %tmm0, %tmm1, %tmm2"); }'
    return subprocess.run(command, input=source, text=True, capture_output=True, check=False).returncode == 0


def host_isas() -> list[str]:
    """The ISAs to build: all that this compiler can target on x86-64 (an old one has no AMX), else the portable one."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if not is_x86 or os.environ.get("GPT4V_FAST_SCALAR_ONLY", "0") != "0":
        return ["scalar"]
    return [isa for isa in ISA_FLAGS if isa != "amx_bf16" or has_tiles()]


def find_nvcc() -> str | None:
    if os.environ.get("GPT4V_FAST_CUDA", "1") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    return os.environ.get("NVCC") or shutil.which("nvcc") or (home and shutil.which(f"{home}/bin/nvcc")) or None


class NinjaFile:
    """The few lines of a build.ninja that this build needs."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.10", ""]
        self.targets: list[str] = []

    def rule(self, name: str, command: str, depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]
        self.lines.append("")

    def build(self, output: Path, rule: str, inputs: list[Path], **variables: str) -> Path:
        escape = lambda path: str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")  # noqa: E731
        self.lines.append(f"build {escape(output)}: {rule} {' '.join(map(escape, inputs))}")
        self.lines += [f"  {key} = {value}" for key, value in variables.items()]
        self.targets.append(escape(output))
        return output

    def text(self) -> str:
        return "\n".join([*self.lines, f"default {' '.join(self.targets)}", ""])


class NinjaBuildExt(build_ext):
    """Writes build.ninja, runs it, and puts the results where setuptools expects them."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        build_dir = Path(self.build_temp).resolve() / "gpt4v_fast"
        build_dir.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)

        isas = host_isas()
        sanitize = os.environ.get("GPT4V_FAST_SANITIZE", "")
        flags = list(COMMON_FLAGS)
        if sanitize:
            flags += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
        flags += [f"-DGPT4V_FAST_HAS_{isa.upper()}=1" for isa in isas] + [f"-I{CSRC}"]
        python_flags = [f"-I{path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())]
        cxx = compiler()

        ninja = NinjaFile()
        ninja.rule("cxx", f"{shlex.join(cxx)} $flags -MMD -MF $out.d -c $in -o $out", depfile=True)
        ninja.rule("link", f"{shlex.join(cxx)} -shared $in -o $out $flags")
        objects = []
        for source in sorted(CSRC.glob("*.cpp")):
            unit = [*flags, *(python_flags if source.stem.startswith("bindings") else [])]
            target = build_dir / f"{source.stem}.o"
            objects.append(ninja.build(target, "cxx", [source], flags=shlex.join(unit)))
        for isa in isas:
            unit = [*flags, *ISA_FLAGS[isa]]
            target = build_dir / f"isa_{isa}.o"
            objects.append(ninja.build(target, "cxx", [CSRC / "isa" / f"{isa}.cpp"], flags=shlex.join(unit)))
        link_flags = ["-fopenmp", "-Wl,--no-undefined-version"] if sys.platform == "linux" else ["-fopenmp"]
        if sanitize:
            link_flags.append(f"-fsanitize={sanitize}")
        ninja.build(output, "link", objects, flags=shlex.join(link_flags))
        self.add_cuda(ninja, output.parent / "_cuda.so")

        ninja_path = build_dir / "build.ninja"
        ninja_path.write_text(ninja.text())
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run(
            [*ninja_command(), "-f", str(ninja_path), *(["-j", jobs] if jobs else [])], cwd=build_dir, check=True
        )

    def add_cuda(self, ninja: NinjaFile, output: Path) -> None:
        source, nvcc = CSRC / "cuda" / "patch_embed.cu", find_nvcc()
        if nvcc is None:
            print("gpt4v_fast: no nvcc found, the CUDA object is left out", file=sys.stderr)
            return
        arches = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
        arches.append(f"-gencode=arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}")
        # The CUDA runtime is linked statically: the object loads beside any torch and needs only the driver.
        flags = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "2",
                 "-cudart", "static", f"-I{CSRC}", *arches]  # fmt: skip
        ninja.rule("cuda", f"{shlex.quote(nvcc)} $flags -MD -MF $out.d $in -o $out", depfile=True)
        ninja.build(output, "cuda", [source], flags=shlex.join(flags))

    def get_outputs(self) -> list[str]:
        outputs = super().get_outputs()
        cuda = [str(Path(path).with_name("_cuda.so")) for path in outputs]
        return outputs + [path for path in cuda if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """For editable installs: setuptools copies _C, and the CUDA object goes along."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "gpt4v_fast" / "_cuda.so"
        if built.exists():
            shutil.copy(built, Path(self.get_finalized_command("build_py").get_package_dir("gpt4v_fast")))


def ninja_command() -> list[str]:
    """The ninja of the build environment, else one on the PATH."""
    try:
        import ninja
    except ImportError:
        return ["ninja"]
    return [str(Path(ninja.BIN_DIR) / "ninja")]


if __name__ == "__main__":  # tests import this file for its flags
    setup(ext_modules=[Extension("gpt4v_fast._C", sources=[])], cmdclass={"build_ext": NinjaBuildExt})
