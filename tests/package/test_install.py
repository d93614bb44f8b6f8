"""The ways to install, and the name `kernels`, which belongs to a package of that name on PyPI.

Everything is built from a copy of the source tree, so that two runs do not meet in its build/ and egg-info.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TORCH = f"torch=={torch.__version__.split('+')[0]}"

FIND_KERNELS = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
TRANSFORMERS_SEES = "from transformers.utils import is_kernels_available; print(is_kernels_available())"


SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "ld-linux-x86-64.so.2"}


def run(command, cwd, **environment):
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", **environment}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout.strip()


@pytest.mark.parametrize("cwd", ["root", "elsewhere"])
def test_the_folder_kernels_is_not_taken_for_the_package_kernels(cwd, tmp_path):
    """Without the PyPI package: transformers must not believe it is there."""
    where = ROOT if cwd == "root" else tmp_path
    assert run([sys.executable, "-c", FIND_KERNELS], where) == "None"
    assert run([sys.executable, "-c", TRANSFORMERS_SEES], where) == "False"
    assert run([sys.executable, "-c", "import gpt4v_fast.kernels; print('ok')"], where) == "ok"


@pytest.mark.parametrize("cwd", ["root", "elsewhere"])
def test_the_package_kernels_wins_over_the_folder(cwd, tmp_path):
    """With a regular package `kernels` on sys.path behind the working directory, as pip would install it."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("THE_REAL_ONE = True\n")
    where = ROOT if cwd == "root" else tmp_path
    code = (
        f"import sys; sys.path.append({str(site)!r}); import kernels; assert kernels.THE_REAL_ONE; "
        "import gpt4v_fast.kernels.configs as c; assert 'gpt4v_fast' in c.__name__; print('ok')"
    )
    assert run([sys.executable, "-c", code], where) == "ok"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what git knows of the source tree, changes included."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).splitlines():
        if (ROOT / name).is_file() and not name.startswith("benchmarks/results/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    """The path of the archive."""
    folder = tmp_path_factory.mktemp("sdist")
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", str(folder), str(checkout)], folder)
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def source(sdist, tmp_path_factory):
    """The folder that the archive unpacks to."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    return folder / sdist.name.removesuffix(".tar.gz")


def test_the_sdist_holds_what_a_build_needs(source):
    def files(folder, root):
        found = {str(path.relative_to(root)) for path in (root / folder).rglob("*") if path.is_file()}
        return {name for name in found if "__pycache__" not in name and not name.endswith(".so")}

    for folder in ("csrc", "kernels", "gpt4v_fast"):
        assert files(folder, source) == files(folder, ROOT)
    assert {name for name in files("benchmarks", ROOT) if name.endswith(".py")} == files("benchmarks", source)
    assert not (source / "tests").exists()


def test_without_a_compiler_the_error_says_what_to_install(tmp_path):
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path),
    ]
    environment = {**os.environ, "CXX": "no-such-compiler -m64"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "'no-such-compiler -m64' cannot be run" in result.stderr and "apt-get install g++" in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("clang++") is None, reason="builds with clang++, which is not on the PATH")
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
def test_clang_takes_the_kernels(isa):
    """Without a warning, for each instruction set that it can target."""
    code = f"import setup; print(*setup.COMMON_FLAGS, *setup.ISA_FLAGS[{isa!r}])"
    flags = run([sys.executable, "-c", code], ROOT)
    run(["clang++", *flags.split(), "-Werror", "-fsyntax-only", "-Icsrc", f"csrc/isa/{isa}.cpp"], ROOT)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("clang++") is None, reason="builds with clang++, which is not on the PATH")
def test_clang_builds_a_package_that_works(source, tmp_path):
    """Its OpenMP runtime stands beside torch's."""
    options = ["-q", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site"), str(source)]
    settings = {"GPT4V_FAST_SCALAR_ONLY": "1", "GPT4V_FAST_CUDA": "0", "CXX": "clang++"}
    run([sys.executable, "-m", "pip", "install", *options], tmp_path, **settings)
    right, _, isas, place = run([sys.executable, "-c", CHECK], tmp_path / "site").splitlines()
    assert (right, isas, place) == ("True", "['scalar']", str(tmp_path / "site"))


# Installs


@pytest.fixture(scope="module")
def quickly(tmp_path_factory):
    """Settings for a build of the portable kernels, unoptimized: a tenth of the time of a whole one."""
    compiler = tmp_path_factory.mktemp("compiler") / "quick"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    return {"GPT4V_FAST_SCALAR_ONLY": "1", "GPT4V_FAST_CUDA": "0", "CXX": str(compiler)}


@pytest.fixture(scope="module")
def wheel(source, quickly, tmp_path_factory):
    """Built in isolation, from the sdist."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)], folder, **quickly)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Of an environment with torch, the demo extra and the PyPI package `kernels`; tests install gpt4v_fast anew."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    packages = [f"gpt4v_fast[demo] @ {wheel.as_uri()}", "kernels", "setuptools>=77", "pybind11", "ninja"]
    run([python, "-m", "pip", "install", "-q", TORCH, *packages], folder)
    return python


def install(python, where, *options, **environment):
    command = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--force-reinstall"]
    run([*command, *options, str(where)], Path(python).parent, **environment)


CHECK = """
import gpt4v_fast as gf, torch, re, pathlib
import gpt4v_fast.kernels.loss.plans, gpt4v_fast.benchmarks.command
import gpt4v_fast._C as native
q = torch.randn(1, 2, 9, 16)
print((gf.attention(q, q, q) - torch.nn.functional.scaled_dot_product_attention(q, q, q)).abs().max().item() < 1e-5)
print(len(set(re.findall(r"/\\S*lib(?:gomp|iomp5|omp)[-.]\\S*", pathlib.Path("/proc/self/maps").read_text()))))
print(native.available_isas())
print(pathlib.Path(gf.__file__).parent.parent)
"""


def check_import(python, cwd):
    """The folder that gpt4v_fast is imported from, in a process in `cwd`."""
    *facts, place = run([python, "-c", CHECK], cwd).splitlines()
    assert facts == ["True", "1", "['scalar']"]  # the right numbers, one OpenMP runtime, the kernels of this build
    return Path(place)


@pytest.mark.slow
def test_the_wheel_is_a_manylinux_one(wheel):
    """By the symbols it needs; libgomp is torch's, so the wheel must not bring one of its own (auditwheel's repair)."""
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("gpt4v_fast/kernels/") for name in names)
    assert not any(name.startswith(("kernels/", "benchmarks/", "tests/", "csrc/")) for name in names)
    found = json.loads(run([sys.executable, "-m", "auditwheel", "show", "--json", str(wheel)], wheel.parent))
    assert re.fullmatch(r"manylinux_2_\d+_\w+", found["sym_tag"])
    assert set(found["versioned_symbols"]) <= {*SYSTEM_LIBRARIES, "libgomp.so.1"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_answers_a_question_in_a_new_environment(wheel, python, tmp_path):
    """Installed with its demo extra beside the PyPI package `kernels`, run outside the source."""
    install(python, wheel)
    assert check_import(python, tmp_path).is_relative_to(Path(python).parents[1])
    # What transformers thinks of this version of `kernels` is its own matter; the source folder must not change it.
    assert run([python, "-c", TRANSFORMERS_SEES], ROOT) == run([python, "-c", TRANSFORMERS_SEES], tmp_path)
    for where in (ROOT, tmp_path):
        assert "site-packages" in run([python, "-c", FIND_KERNELS], where)

    image = tmp_path / "three.png"
    code = (
        "import sys; from sklearn.datasets import load_digits; from PIL import Image; d = load_digits(); "
        "i = int((d.target == 3).nonzero()[0][0]); "
        "Image.fromarray((d.images[i] * 15.9).astype('uint8')).resize((64, 64)).save(sys.argv[1])"
    )
    run([python, "-c", code, str(image)], tmp_path)
    answer = run([str(Path(python).with_name("gpt4v-fast")), "ask", str(image), "Which digit is this?"], tmp_path)
    assert "3" in answer


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_source_folder_installs(source, python, quickly, tmp_path):
    install(python, source, **quickly)
    assert check_import(python, tmp_path).is_relative_to(Path(python).parents[1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_editable_install_works(checkout, python, quickly, tmp_path):
    """It writes the extension into the source folder."""
    install(python, checkout, "-e", **quickly)
    assert check_import(python, tmp_path) == check_import(python, checkout) == checkout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_strict_editable_install_is_seen_by_type_checkers(checkout, python, quickly, tmp_path):
    """They read no import hooks, but the folder that a .pth file names: here laid out as a wheel, file by file."""
    install(python, checkout, "--config-settings=editable_mode=strict", "-e", **quickly)
    assert check_import(python, tmp_path).is_relative_to(checkout / "build")
    (site,) = Path(python).parents[1].glob("lib/python*/site-packages")
    (link,) = site.glob("__editable__.gpt4v_fast*.pth")
    package = Path(link.read_text().strip(), "gpt4v_fast")
    for name in ("py.typed", "ops/attention.py", "kernels/loss/plans.py", "benchmarks/__init__.py"):
        assert (package / name).resolve().is_relative_to(checkout)


PROJECT = (ROOT / "pyproject.toml").read_text()
DECLARED = [int(minor) for minor in re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', PROJECT)]


def test_the_declared_pythons_agree():
    """The oldest is what requires-python and ruff's target say, and none between is left out."""
    (oldest,) = re.findall(r'^requires-python = ">=3\.(\d+)"$', PROJECT, flags=re.MULTILINE)
    assert list(range(int(oldest), DECLARED[-1] + 1)) == DECLARED
    assert f'target-version = "py3{oldest}"' in PROJECT


def other_pythons():
    """Every declared version but this one, as it is on the PATH or installed by pyenv; a missing one is skipped."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for minor in DECLARED:
        found = sorted(root.glob(f"versions/3.{minor}.*/bin/python"))
        path = str(found[-1]) if found else shutil.which(f"python3.{minor}")
        missing = pytest.mark.skipif(path is None, reason=f"Python 3.{minor} is not installed here")
        if minor != sys.version_info.minor:
            yield pytest.param(path, id=f"3.{minor}", marks=missing)


LOAD = """
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("_C", sys.argv[1])
native = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
loader.exec_module(native)
print(native.available_isas())
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", list(other_pythons()))
def test_other_pythons_build_and_load_it(path, source, quickly, tmp_path):
    """Without torch, which is hundreds of megabytes for each: the extension loads and every module compiles."""
    command = [path, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)]
    run(command, tmp_path, **quickly)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    (native,) = tmp_path.glob("unpacked/gpt4v_fast/_C.*.so")
    assert run([path, "-c", LOAD, str(native)], tmp_path) == "['scalar']"
    run([path, "-W", "error", "-m", "compileall", "-q", str(tmp_path / "unpacked")], tmp_path)
