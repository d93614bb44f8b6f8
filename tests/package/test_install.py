"""The ways to install, and the name `kernels`, which belongs to a package of that name on PyPI."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TORCH = f"torch=={torch.__version__.split('+')[0]}"

FIND_KERNELS = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
TRANSFORMERS_SEES = "from transformers.utils import is_kernels_available; print(is_kernels_available())"


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
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)], folder)
    (path,) = folder.glob("*.whl")
    return path


def make_environment(folder, *packages):
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    run([python, "-m", "pip", "install", "-q", TORCH, *packages], folder)
    return python


CHECK = """
import gpt4v_fast as gf, torch, re, pathlib
import gpt4v_fast.kernels, gpt4v_fast.benchmarks
q = torch.randn(1, 2, 9, 16)
print((gf.attention(q, q, q) - torch.nn.functional.scaled_dot_product_attention(q, q, q)).abs().max().item() < 1e-5)
print(len(set(re.findall(r"/\\S*lib(?:gomp|iomp5|omp)[-.]\\S*", pathlib.Path("/proc/self/maps").read_text()))))
print(pathlib.Path(gf.__file__).parent.parent)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_answers_a_question_in_a_new_environment(wheel, tmp_path):
    """Built in isolation, installed with its demo extra beside the PyPI package `kernels`, run outside the source."""
    import zipfile

    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("gpt4v_fast/kernels/") for name in names)
    assert not any(name.startswith(("kernels/", "benchmarks/", "tests/")) for name in names)
    python = make_environment(tmp_path / "env", f"gpt4v_fast[demo] @ {wheel.as_uri()}", "kernels")
    right, runtimes, place = run([python, "-c", CHECK], tmp_path).splitlines()
    assert (right, runtimes) == ("True", "1") and Path(place).is_relative_to(tmp_path)
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
    answer = run([str(tmp_path / "env/bin/gpt4v-fast"), "ask", str(image), "Which digit is this?"], tmp_path)
    assert "3" in answer


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_editable_install_works(tmp_path):
    """In a copy: it writes the extension into the source folder. (The wheel above is what a plain install makes.)"""
    source = tmp_path / "source"
    run(["git", "clone", "-q", str(ROOT), str(source)], tmp_path)
    python = make_environment(tmp_path / "env")
    quickly = {"GPT4V_FAST_SCALAR_ONLY": "1", "GPT4V_FAST_CUDA": "0"}
    run([python, "-m", "pip", "install", "-q", "-e", str(source)], tmp_path, **quickly)
    for where in (tmp_path, source):
        right, runtimes, place = run([python, "-c", CHECK], where).splitlines()
        assert (right, runtimes) == ("True", "1") and Path(place) == source
    code = "import gpt4v_fast._C as c; print(c.available_isas())"
    assert run([python, "-c", code], tmp_path) == "['scalar']"
