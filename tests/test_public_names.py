"""The package as somebody sees it who has just installed it: its names, its help, and what the README shows first."""

import importlib
import inspect
import pkgutil
import pydoc
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import fedsea
from tests.conftest import RunningServer

README = Path(__file__).parent.parent / "README.md"
FOUND = [found.name for found in pkgutil.walk_packages(fedsea.__path__, "fedsea.")]
# Top-level modules of what the extras install.
EXTRAS = {"datasets", "flwr", "gguf", "matplotlib", "ray", "rouge_score"}
EXTRAS |= {"tensorboard"}


@pytest.mark.parametrize("name", [name for name in FOUND if not name.endswith("__main__")])
def test_a_module_imports_with_the_releases_that_are_installed(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in EXTRAS:
            raise
        pytest.skip(f"{error.name} is not installed")


def test_the_public_names_are_listed_and_described() -> None:
    assert {"SplitModelForCausalLM", "load_tokenizer", "Partition", "GaussianNoise"} <= set(fedsea.__all__)
    assert {"FedSEAError", "parse_mechanism", "Conversation"} <= set(fedsea.__all__)
    assert set(fedsea.__all__) <= set(dir(fedsea))
    text = pydoc.render_doc(fedsea)
    for name in fedsea.__all__:
        thing = getattr(fedsea, name)
        assert inspect.getdoc(thing)
        assert name in text


def test_the_readmes_lines_print_an_answer(
    start_server: Callable[..., RunningServer], small: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    here = {"smollm2-135m": small, "compute.example.org:7070": start_server(small).address}
    code = found[1].replace('credentials="client-a"', "insecure=True")
    for name, other in here.items():
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(other))
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(names["model"], fedsea.SplitModelForCausalLM)
    names["model"].close()
    assert capsys.readouterr().out.startswith("The capital of France is")
