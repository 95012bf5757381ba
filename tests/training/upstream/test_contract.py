"""The contract with adapters and Transformers: every private name, signature and behaviour that `upstream` relies on.

A failure here means that an installed version broke it: conftest.py adds the versions to the report.
"""

import ast
import importlib
import inspect
from pathlib import Path

import adapters
import pytest
import transformers
from adapters.loading import AdapterLoader
from adapters.methods.adapter_layer_base import AdapterLayerBase

import pema_adapters
from pema_adapters.training import patches, upstream
from pema_adapters.training.upstream import patching

PACKAGE = Path(pema_adapters.__file__).parent

SIGNATURES = {
    ("adapters.configuration.adapter_config", "AdapterConfig._get_config_class"): ["config_dict"],
    ("adapters.interface", "AdapterMethod.get_from_config"): ["config"],
    ("adapters.model_mixin", "ModelAdaptersMixin._add_adapter_weights"): ["self", "adapter_name"],
    ("adapters.model_mixin", "ModelAdaptersMixin.get_adapter"): ["self", "name"],
    ("adapters.model_mixin", "ModelAdaptersMixin.set_active_adapters"): ["self", "adapter_setup", "skip_layers"],
    ("adapters.model_mixin", "ModelWithHeadsAdaptersMixin.add_adapter"): [
        "self",
        "adapter_name",
        "config",
        "overwrite_ok",
        "set_active",
    ],
    ("adapters.model_mixin", "ModelAdaptersMixin.supports_adapter"): ["self", "type_or_config"],
    ("adapters.model_mixin", "ModelAdaptersMixin.adapter_summary"): ["self", "as_dict"],
    ("adapters.model_mixin", "ModelAdaptersMixin.forward_context"): ["self", "context", "args", "kwargs"],
    ("transformers.configuration_utils", "PretrainedConfig.get_config_dict"): [
        "cls",
        "pretrained_model_name_or_path",
        "kwargs",
    ],
    ("transformers.modeling_utils", "PreTrainedModel._tie_or_clone_weights"): [
        "self",
        "output_embeddings",
        "input_embeddings",
    ],
    ("adapters.loading", "WeightsLoaderHelper.state_dict"): ["self", "filter_func"],
    ("adapters.loading", "AdapterLoader.filter_func"): ["self", "adapter_name"],
    ("adapters.loading", "AdapterLoader.rename_func"): ["self", "old_name", "new_name"],
    ("adapters.loading", "PredictionHeadLoader.filter_func"): ["self", "head_name"],
    ("adapters.configuration.adapter_config", "AdapterConfig.to_dict"): ["self"],
    ("adapters.model_mixin", "ModelAdaptersMixin.merge_adapter"): ["self", "name"],
    ("adapters.model_mixin", "ModelAdaptersMixin.reset_adapter"): ["self"],
    ("adapters.model_mixin", "ModelAdaptersMixin.delete_adapter"): ["self", "adapter_name"],
    ("adapters.model_mixin", "ModelAdaptersMixin.save_pretrained"): ["self", "save_directory", "kwargs"],
    ("transformers.trainer", "Trainer.get_decay_parameter_names"): ["self", "model"],
    ("transformers.trainer", "Trainer._save_checkpoint"): ["self", "model", "trial"],
}


def find(module, dotted):
    found = importlib.import_module(module)
    for part in dotted.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(("module", "name"), SIGNATURES)
def test_patched_functions_have_the_expected_signature(module, name):
    signature = list(inspect.signature(inspect.unwrap(find(module, name))).parameters)
    assert signature == SIGNATURES[module, name]


def test_save_pretrained_takes_a_state_dict_and_resize_a_number():
    save = inspect.signature(inspect.unwrap(transformers.PreTrainedModel.save_pretrained)).parameters
    assert list(save)[:2] == ["self", "save_directory"] and save["state_dict"].default is None
    resize = inspect.signature(inspect.unwrap(transformers.PreTrainedModel.resize_token_embeddings)).parameters
    assert list(resize)[:2] == ["self", "new_num_tokens"]


def test_fused_projections_are_wrapped_with_the_module_as_first_argument():
    wrap = inspect.signature(inspect.unwrap(find("adapters.methods.lora", "LoRAMergedLinear.wrap").__func__)).parameters
    assert list(wrap)[:2] == ["cls", "module"]


def test_adapters_manages_the_children_of_the_base_model():
    managed = {"add_adapter", "average_adapter", "delete_adapter", "enable_adapters", "freeze_adapter", "get_adapter"}
    assert managed <= set(vars(AdapterLayerBase))
    source = inspect.getsource(adapters.ModelAdaptersMixin.apply_to_basemodel_childs)
    assert "add_base_adapters" in source and "AdapterLayerBase" in source


def test_saved_keys_are_selected_by_the_path_of_the_adapter(case):
    model = case.with_adapters()
    chosen = AdapterLoader(model).filter_func("task")
    assert chosen("bert.pema.adapters.task.weight")
    assert not chosen("bert.pema.adapters.task2.weight")


def test_every_target_is_patched_once():
    for name in upstream.PATCHED_MODULES:
        module = importlib.import_module(name)
        before = [vars(owner).get(attribute) for owner, attribute, _ in patching._originals]
        patches.register(module)
        assert [vars(owner).get(attribute) for owner, attribute, _ in patching._originals] == before


def test_patches_can_be_undone_and_redone():
    wrapped = [(owner, name) for owner, name, _ in patching._originals]
    assert len(wrapped) == len(upstream.PATCH_TARGETS)
    upstream.unpatch()
    try:
        assert not any(getattr(getattr(owner, name), "_pema", False) for owner, name in wrapped)
    finally:
        for name in upstream.PATCHED_MODULES:
            patches.register(importlib.import_module(name))
    assert all(getattr(getattr(owner, name), "_pema", False) for owner, name in wrapped)


def test_no_other_module_imports_private_names():
    def private_imports(path):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("adapters", "transformers"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                yield from (name for name in names if name.startswith("_"))

    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "upstream":
            assert list(private_imports(path)) == [], path


def test_other_modules_import_upstream_as_a_whole():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "upstream":
            assert "pema_adapters.training.upstream" not in path.read_text(), path


def test_weights_are_loaded_after_they_are_tied():
    """`load_model` detaches the matrix between the two."""
    load = inspect.signature(inspect.unwrap(transformers.PreTrainedModel.__dict__["_load_pretrained_model"].__func__))
    assert list(load.parameters)[:2] == ["cls", "model"]
    source = inspect.getsource(transformers.PreTrainedModel.from_pretrained)
    assert source.index("model.tie_weights()") < source.index("cls._load_pretrained_model(")


def test_load_functions_have_the_expected_arguments():
    infer = inspect.signature(transformers.modeling_utils._infer_parameter_dtype)
    assert list(infer.parameters) == ["model", "param_name", "empty_param", "keep_in_fp32_regex", "hf_quantizer"]
    needs = inspect.signature(transformers.quantizers.HfQuantizer.param_needs_quantization)
    assert list(needs.parameters)[:3] == ["self", "model", "param_name"]
    load = inspect.signature(inspect.unwrap(transformers.PreTrainedModel.__dict__["_load_pretrained_model"].__func__))
    how = {"device_map", "hf_quantizer", "keep_in_fp32_regex", "device_mesh", "key_mapping"}
    assert list(load.parameters)[2:5] == ["state_dict", "checkpoint_files", "pretrained_model_name_or_path"]
    assert how <= set(load.parameters)


def test_weights_are_offloaded_after_all_are_loaded():
    """`load_model` fingerprints the newly initialized ones between the two."""
    source = inspect.getsource(transformers.PreTrainedModel.from_pretrained)
    assert source.index("cls._load_pretrained_model(") < source.index("dispatch_model(model")


def test_save_all_adapters_calls_save_adapter_with_folder_and_name():
    mixin = adapters.ModelAdaptersMixin
    assert list(inspect.signature(inspect.unwrap(mixin.save_adapter)).parameters)[:3] == [
        "self", "save_directory", "adapter_name",
    ]  # fmt: skip
    for one in (mixin, adapters.model_mixin.ModelWithHeadsAdaptersMixin):
        assert "self.save_adapter(" in inspect.getsource(inspect.unwrap(one.save_all_adapters))


def test_merge_adapter_leaves_what_merged_layers_completes(case):
    """`merged_layers` corrects `LoRALinear.merge_adapter`, and finds DoRA's original weight in `dora_w_o`."""
    lora = importlib.import_module("adapters.methods.lora")
    model = case.with_adapters()
    model.add_adapter("task", config=adapters.DoRAConfig(r=2, alpha=8), set_active=True)
    layer = next(each for each in upstream.find_lora_layers(model) if "task" in each.loras)
    assert layer.merged is False and layer.loras["task"].scaling == 4 and layer.loras["task"].use_dora
    model.merge_adapter("task")
    assert layer.merged == "task" and layer.loras["task"].dora_w_o.shape == layer.weight.shape
    assert issubclass(lora.LoRAMergedLinear, lora.LoRALayer) and hasattr(lora.LoRAMergedLinear, "pad")
    assert issubclass(lora.MTLLoRA, lora.LoRA)
    assert list(inspect.signature(lora.dora_merge).parameters) == ["weights", "added", "m"]  # no scaling


def test_activating_an_adapter_resets_merged_layers():
    source = inspect.getsource(inspect.unwrap(adapters.ModelAdaptersMixin.set_active_adapters))
    assert "self.reset_adapter()" in source


def test_saving_unlinks_prefix_tuning_from_its_pool(case):
    model = case.with_adapters()
    assert {id(pool) for _, pool in upstream.find_prefix_pools(model)} == {id(model.base_model.prefix_tuning)}
    source = inspect.getsource(inspect.unwrap(adapters.ModelAdaptersMixin.save_pretrained))
    assert "layer.set_pool(None)" in source


def test_reset_adapter_opens_a_context_with_an_empty_input():
    """adapters warns there that no adapter is active, though no forward follows."""
    assert "ForwardContext(self, torch.empty(0, 1))" in inspect.getsource(adapters.ModelAdaptersMixin.reset_adapter)


def test_a_config_keeps_its_attention_where_find_hub_kernel_looks():
    config = transformers.BertConfig(_attn_implementation_internal="org/kernel")
    assert config._attn_implementation == "org/kernel" == vars(config)["_attn_implementation_internal"]
    assert upstream.find_hub_kernel(config) == ("_attn_implementation_internal", "org/kernel")
