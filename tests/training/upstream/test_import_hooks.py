"""Failed imports: the next attempt applies all patches, and none are applied in part."""

import subprocess
import sys
import textwrap

import pytest

ONE_INTERRUPTION = """
import importlib.abc
import sys

class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {at!r}:
            sys.meta_path.remove(self)
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
"""

MISSING = """
import adapters.model_mixin, transformers.modeling_utils, transformers.trainer, adapters.loading
del adapters.model_mixin.ModelAdaptersMixin.get_adapter
del adapters.model_mixin.ModelAdaptersMixin.adapter_summary
def patched():
    return [hasattr(adapters.loading.AdapterLoader.filter_func, "_pema"),
            hasattr(transformers.PreTrainedModel.save_pretrained, "_pema")]
"""

MISSING_AT_IMPORT = """
import importlib.abc, sys
import pema_adapters

class Lacking(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "transformers.modeling_utils":
            return None
        from importlib.machinery import PathFinder
        spec = PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            del module.PreTrainedModel._load_pretrained_model
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(1, Lacking())  # behind the hook, before Python's own
"""


def run(*programs):
    program = "\n".join(textwrap.dedent(program) for program in programs)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "name",
    [
        "PEMAConfig",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("load_model", "shrink_embeddings", "parameter_groups")
        ),
    ],
)
def test_every_public_name_can_be_the_first_import(name):
    found = run(
        f"from pema_adapters import {name}",
        "from adapters import AdapterConfig",
        "print(AdapterConfig.load('pema').unseen)",
    )
    assert found == ["base"]


@pytest.mark.parametrize("at", ["adapters.utils", "adapters.composition"])
@pytest.mark.slow
def test_an_interrupted_import_completes_when_repeated(at):
    found = run(
        "import pema_adapters",
        ONE_INTERRUPTION.format(at=at),
        """
        try:
            from adapters.interface import AdapterMethod
            print("not interrupted")
        except KeyboardInterrupt:
            pass
        import adapters
        from adapters import AdapterConfig
        import adapters.loading, adapters.model_mixin, adapters.interface
        print(type(AdapterConfig.load("pema")).__name__, hasattr(adapters.interface.AdapterMethod.get_from_config, "_pema"))
        print(AdapterConfig.load({"architecture": "pema"}).unseen)
        """,
    )
    assert found == ["PEMAConfig True", "base"]


@pytest.mark.slow
def test_a_missing_name_is_the_same_error_each_time_and_nothing_is_patched():
    found = run(
        MISSING,
        """
        for _ in range(2):
            try:
                import pema_adapters
            except Exception as error:
                print(type(error).__name__, error)
        print(*patched())
        """,
    )
    assert found[0] == found[1] and found[2:] == ["False False"]
    assert found[0].startswith("PemaError pema_adapters does not work with adapters 1.")
    assert (
        "adapters.model_mixin has no ModelAdaptersMixin.get_adapter, ModelAdaptersMixin.adapter_summary; " in found[0]
    )
    assert found[0].endswith("(pip install --upgrade pema-adapters)")


@pytest.mark.slow
def test_a_name_missing_in_a_module_imported_later_is_the_same_error_each_time():
    found = run(
        MISSING_AT_IMPORT,
        """
        for _ in range(2):
            try:
                from transformers import PreTrainedModel
                print("imported")
            except Exception as error:
                print(type(error).__name__, error)
        """,
    )
    assert found[0] == found[1]
    assert "transformers.modeling_utils has no PreTrainedModel._load_pretrained_model" in found[0]
    assert found[0].startswith("PemaError pema_adapters does not work with adapters 1.")
