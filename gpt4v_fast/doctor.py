"""What this machine has and which kernel every op runs on it: `gpt4v-fast doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import gpt4v_fast as gf
from gpt4v_fast import backends
from gpt4v_fast._native import _C

PACKAGES = ("torch", "numpy", "triton", "transformers", "tokenizers", "safetensors", "pillow", "scikit-learn")
ENVIRONMENT = (
    "GPT4V_FAST_ISA",
    "GPT4V_FAST_BACKEND",
    "GPT4V_FAST_STRICT",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "OMP_PROC_BIND",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "LD_PRELOAD",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPENMP = re.compile(r"lib(?:gomp|iomp5|omp)(?:[-.][\w.-]*)?\.(?:so[\w.]*|dylib)$")


def report() -> dict[str, Any]:
    """Everything that `gpt4v-fast doctor --json` prints."""
    found = {
        "gpt4v_fast": gf.__version__,
        **machine(),
        "versions": versions(),
        "openmp": openmp_runtimes(),
        "environment": environment(),
        "kernels": list(kernels()),
    }
    return {**found, "hints": hints(found)}


def machine() -> dict[str, Any]:
    """The processor, the ISAs and the GPUs."""
    return {
        "cpu": cpu_name(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "isas": {"built": built_isas(), "available": backends.available_isas()},
        "isa": _C.isa(),
        "gpus": gpus(),
        "cuda_object": Path(__file__).with_name("_cuda.so").exists(),
    }


def built_isas() -> list[str]:
    """The ISAs that this build holds, whether or not this processor runs them, slowest first."""
    return list(_C.built_isas())


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("model name", "cpu model")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def versions() -> dict[str, str | None]:
    """Python, the compiler of the extension, and the packages that matter; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "compiler": _C.compiler}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__
    return found


def openmp_runtimes() -> list[str] | None:
    """The OpenMP runtimes mapped into this process, one path each; None where the system does not tell."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    paths = {line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if line.count("/")}
    return sorted({os.path.realpath(path) for path in paths if OPENMP.search(path)})


def environment() -> dict[str, str]:
    """The environment variables in force that change what runs or how fast."""
    return {name: os.environ[name] for name in ENVIRONMENT if os.environ.get(name)}


def kernels() -> Iterator[dict[str, Any]]:
    """Which kernel serves a plain call of every op, by device and dtype, as `gf.explain` says."""
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for name, example in _EXAMPLES.items():
            for dtype_name, dtype in DTYPES.items():
                args, kwargs = example(dtype, device)
                choice = gf.explain(getattr(gf, name), *args, **kwargs)
                yield {
                    "op": name,
                    "dtype": dtype_name,
                    "device": device,
                    "backend": choice.backend,
                    "kernel": choice.kernel,
                    "on": choice.on,
                    "reason": choice.reason,
                    "fallback": choice.is_fallback,
                    "rejected": [{"kernel": kernel, "why": why} for kernel, why in choice.rejected],
                }


Example = Callable[[torch.dtype, str], tuple[tuple[Any, ...], dict[str, Any]]]


def _attention(dtype: torch.dtype, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = torch.zeros(1, 2, 4, 16, dtype=dtype, device=device)
    return (x, x, x), {"mask": gf.Mask(causal=True)}


def _varlen(dtype: torch.dtype, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = torch.zeros(4, 2, 16, dtype=dtype, device=device)
    ends = torch.tensor([0, 4], dtype=torch.int32, device=device)
    return (x, x, x, ends, ends), {"causal": True}


def _kvcache(dtype: torch.dtype, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    cache = torch.zeros(1, 8, 2, 16, dtype=dtype, device=device)
    return (cache[:, :1], cache, cache, torch.tensor([4], dtype=torch.int32, device=device)), {}


def _cross_entropy(dtype: torch.dtype, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (
        torch.zeros(2, 8, dtype=dtype, device=device),
        torch.zeros(2, dtype=torch.int64, device=device),
    ), {}


def _linear_cross_entropy(dtype: torch.dtype, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden, weight = (torch.zeros(n, 16, dtype=dtype, device=device) for n in (2, 8))
    return (hidden, weight, torch.zeros(2, dtype=torch.int64, device=device)), {}


def _patch_embed(dtype: torch.dtype, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device=device)
    return (pixels, torch.zeros(16, 3, 4, 4, dtype=dtype, device=device)), {}


def _patch_embed_packed(dtype: torch.dtype, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (pixels, weight), _ = _patch_embed(dtype, device)
    return ([pixels[0]], weight), {}


_EXAMPLES: dict[str, Example] = {
    "attention": _attention,
    "attention_varlen": _varlen,
    "attention_kvcache": _kvcache,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "patch_embed": _patch_embed,
    "patch_embed_packed": _patch_embed_packed,
}


def hints(found: dict[str, Any]) -> list[str]:
    """What is missing or in the way, each with what to do about it."""
    versions, environment = found["versions"], found["environment"]
    available, openmp = found["isas"]["available"], found["openmp"] or []
    backend, cores, threads = environment.get("GPT4V_FAST_BACKEND"), found["cores"], found["threads"]
    fallbacks = sorted({f"{k['op']} ({k['dtype']}, {k['device']})" for k in found["kernels"] if k["fallback"]})
    no_bf16 = available[-1] not in ("scalar", "avx512_bf16", "amx_bf16")
    no_cuda_object = found["gpus"] and torch.version.cuda is not None and not found["cuda_object"]
    by_condition = (
        (
            found["isa"] != available[-1],
            f"the CPU kernels use {found['isa']}, this machine could use {available[-1]}: unset GPT4V_FAST_ISA",
        ),
        (
            available == ["scalar"],
            "only the portable CPU kernels run here: the processor has no AVX2, or the build left it out",
        ),
        (no_bf16, "this processor has no bf16 products: bf16 runs at the speed of fp32"),
        (
            len(openmp) > 1,
            f"{len(openmp)} OpenMP runtimes are in this process and compete for the cores ({', '.join(openmp)}): "
            "reinstall torch and gpt4v_fast in one environment",
        ),
        (threads > cores, f"torch uses {threads} threads on {cores} cores: set OMP_NUM_THREADS={cores}"),
        (backend, f"GPT4V_FAST_BACKEND={backend} forces a backend: unset it to use the fastest"),
        (
            environment.get("TRITON_INTERPRET") == "1",
            "TRITON_INTERPRET=1 runs Triton kernels in its slow interpreter: unset it unless you test them",
        ),
        (
            versions["transformers"] is None,
            'the model needs transformers: pip install "gpt4v_fast[model]"',
        ),
        (
            found["gpus"] and versions["triton"] is None,
            'the GPU kernels need Triton: pip install "gpt4v_fast[gpu]"',
        ),
        (no_cuda_object, "the CUDA kernel was not built: install with nvcc on the PATH"),
        (
            fallbacks,
            f"served by the slow reference: {', '.join(fallbacks)}; `gpt4v-fast doctor --json` has the reasons",
        ),
    )
    return [hint for condition, hint in by_condition if condition]


def text(found: dict[str, Any]) -> str:
    """The report for people."""
    built, available = (", ".join(found["isas"][name]) for name in ("built", "available"))
    openmp, cuda = found["openmp"], "built" if found["cuda_object"] else "not built"
    versions = ", ".join(f"{name} {version or '(not installed)'}" for name, version in found["versions"].items())
    lines = [
        f"gpt4v_fast {found['gpt4v_fast']} on {found['platform']}",
        f"CPU          {found['cpu']}, {found['cores']} cores, {found['threads']} threads",
        f"ISAs         built {built}; available {available}; in use {found['isa']}",
        f"GPUs         {', '.join(found['gpus']) or 'none'}; CUDA object {cuda}",
        f"OpenMP       {'unknown' if openmp is None else ', '.join(openmp) or 'none'}",
        f"versions     {versions}",
        f"environment  {' '.join(f'{k}={v}' for k, v in found['environment'].items()) or 'nothing set'}",
        "",
        f"{'op':<22} {'dtype':<6} {'device':<7} kernel",
    ]
    for kernel in found["kernels"]:
        lines.append(
            f"{kernel['op']:<22} {kernel['dtype']:<6} {kernel['device']:<7} {kernel['kernel']} on {kernel['on']}"
            + (" (SLOW FALLBACK)" if kernel["fallback"] else "")
        )
    lines += ["", *(f"hint: {hint}" for hint in found["hints"])]
    return "\n".join(lines).rstrip()
