"""A factory that a file cannot have is told before a recipe asks for it, and none that it may have is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeship.calibration.errors import InputError
from edgeship.pipeline.defined_names import check_factory
from projects import run


def source(folder: Path, text: str) -> Path:
    path = folder / "net.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "def build(): ...",
        "async def build(): ...",
        "class build: ...",
        "build = lambda: None",
        "build: object = print",
        "first, (build, *rest) = nets()",
        "import build",
        "import torchvision.models.resnet as build",
        "from torchvision.models import resnet18 as build",
        "from torchvision.models import (\n    other,\n    build,\n)",
        "import build.inner",
        "if cuda:\n    def build(): ...\nelse:\n    build = None",
        "try:\n    from fast import build\nexcept ImportError:\n    pass",
        "for build in (print, max):\n    pass",
        "with made() as build:\n    pass",
        "match made():\n    case [build]:\n        pass",
        "print(build := max)",
        "def make():\n    global build\n    build = print\nmake()",
        "import re\nbuild = re.compile('\\d')",
        "# -*- coding: latin-1 -*-\ndef build(): ...",
    ],
)
def test_a_name_that_the_text_defines_is_taken(tmp_path: Path, text: str) -> None:
    assert check_factory(source(tmp_path, text), "build") is None


@pytest.mark.parametrize(
    "text",
    [
        "from nets import *",
        "globals()['build'] = print",
        "exec('def build(): ...')",
        "import sys\nsetattr(sys.modules[__name__], 'build', print)",
        "import sys\nsys.modules[__name__].build = print",
        "def __getattr__(name): ...",
    ],
)
def test_a_name_that_the_file_may_make_as_it_runs_is_a_note(tmp_path: Path, text: str) -> None:
    assert check_factory(source(tmp_path, text), "build") == (
        "the text of net.py does not define 'build'; it may do so as it runs"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "; it has no functions or classes"),
        ("def built(): ...\nclass Net: ...", "; there are: Net, built; did you mean 'built'?"),
        ("class Net:\n    def build(self): ...", "; there are: Net"),
        ("def outer():\n    build = 1\n    def build(): ...", "; there are: outer"),
        ("print(build)", "; it has no functions or classes"),
        ("def net(m):\n    m.eval()\n    return [*m.modules()]", "; there are: net"),
    ],
)
def test_a_name_that_the_file_cannot_have_is_refused_with_those_it_has(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InputError) as caught:
        check_factory(source(tmp_path, text), "build")
    assert str(caught.value) == f"{tmp_path / 'net.py'} defines no 'build'{told}"


@pytest.mark.parametrize("text", ["def build(:", "a = '\0'", "\N{LATIN SMALL LETTER E WITH ACUTE} = = 1"])
def test_a_file_that_is_no_python_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"net\.py cannot be read as Python: "):
        check_factory(source(tmp_path, text), "build")


def test_init_writes_no_recipe_for_a_factory_that_there_is_not(tmp_path: Path) -> None:
    path = source(tmp_path, "raise SystemExit('it ran')\ndef build(): ...")
    refused = run("init", tmp_path, "--model", f"{path}:Nope")
    assert refused.exit_code == 2
    assert refused.stderr == f"edgeship: {path} defines no 'Nope'; there are: build\n"
    assert not (tmp_path / "recipe.toml").exists()
    assert run("init", tmp_path, "--model", f"{path}:build").exit_code == 0


def test_init_notes_a_factory_that_the_text_does_not_show(tmp_path: Path) -> None:
    result = run("init", tmp_path, "--model", f"{source(tmp_path, 'from nets import *')}:build")
    assert result.exit_code == 0
    assert "note: the text of net.py does not define 'build'" in result.stderr
    assert (tmp_path / "recipe.toml").exists()
