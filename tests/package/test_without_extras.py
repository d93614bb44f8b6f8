"""The package without its extras: names that need them are absent, and say what to install when used."""

import builtins
import json
import subprocess
import sys

import pytest

LOOKS = {
    "star": "exec('from gpt4v_fast import *', space := {}); print('attention' in space, 'GPT4VConfig' in space)",
    "hasattr": "print(hasattr(gf, 'attention'), hasattr(gf, 'GPT4VConfig') or hasattr(gf, 'models'))",
    "help": "import pydoc as p; text = p.plain(p.render_doc(gf)); print('patch_embed' in text, 'GPT4VModel' in text)",
    "getmembers": "import inspect; names = dict(inspect.getmembers(gf)); print('Mask' in names, 'GPT4VModel' in names)",
    "dir": "print(all(hasattr(gf, name) for name in dir(gf)), 'models' in dir(gf))",
    "tab": "import rlcompleter as r; print(bool(r.Completer({'gf': gf}).attr_matches('gf.M')), False)",
    "submodules": "print(bool(gf.nn and gf.reference), False)",
}
USES = {
    "name": ("gf.GPT4VConfig", AttributeError),
    "from": ("from gpt4v_fast import GPT4VModel", ImportError),
    "submodule": ("gf.models", AttributeError),
    "import": ("import gpt4v_fast.models", ImportError),
}
PROGRAM = """
import contextlib, io, json, sys
for name in ("transformers", "tokenizers", "safetensors", "PIL", "jinja2", "sklearn", "matplotlib"):
    sys.modules[name] = None  # as if it were not installed
import gpt4v_fast as gf
results = {}
for name, code in json.loads(sys.argv[1]).items():
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code)
        results[name] = printed.getvalue().strip()
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}"
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """What each line prints, or the error that it ends with, in one process without the extras."""
    lines = {**LOOKS, **{name: code for name, (code, _) in USES.items()}}
    command = [sys.executable, "-c", PROGRAM, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", LOOKS)
def test_looking_around_needs_no_extra(results, name):
    assert results[name] == "True False"


@pytest.mark.parametrize("name", USES)
def test_using_the_model_says_what_to_install(results, name):
    kind, _, message = results[name].partition(": ")
    assert issubclass(getattr(builtins, kind), USES[name][1])
    if name == "from":  # Python's own words for a name that a module lacks
        assert "cannot import name 'GPT4VModel'" in message
    else:
        assert "needs transformers: " in message and 'pip install "gpt4v_fast[model]"' in message


def test_with_the_extra_every_name_is_there():
    import gpt4v_fast as gf

    assert "GPT4VModel" in gf.__all__ and all(getattr(gf, name) for name in gf.__all__)
