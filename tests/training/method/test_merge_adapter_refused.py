"""Refusals and warnings of `merge_adapter` with PEMA, and the warning of `save_pretrained` about unmerged rows."""

import logging

import adapters
import pytest
from adapters import CompacterConfig, LoRAConfig, MTLLoRAConfig
from transformers import BitsAndBytesConfig as Quantization

from pema_adapters import restore_embeddings, shrink_embeddings
from pema_adapters.errors import SurgeryError
from pema_adapters.training.embedding.partial_embedding import PartialEmbedding
from tests.models import CONFIGS, MIXED, assert_same, outputs
from tests.training.method.test_merge_adapter import VOCABULARY, base, train, trained  # noqa: F401 - base: a fixture

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def ours(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("pema_adapters")]


def test_operations_are_refused_while_rows_are_merged(base):  # noqa: F811
    model = trained(base(CONFIGS["bert"]()))
    model.add_adapter("other", config="pema")
    shrink_embeddings(model, "other", VOCABULARY)
    model.merge_adapter("task")
    refused = {
        "shrink_embeddings": lambda: shrink_embeddings(model, "task", VOCABULARY),
        "restore_embeddings": lambda: restore_embeddings(model),
        r"merge_adapter\('other'\)": lambda: model.merge_adapter("other"),
        "resize_token_embeddings to 300": lambda: model.resize_token_embeddings(300),
        "average_adapter": lambda: model.average_adapter("mean", ["task", "other"]),
        r"delete_adapter\('task'\)": lambda: model.delete_adapter("task"),
        "training": lambda: train(model),
    }
    for what, call in refused.items():
        with pytest.raises(
            SurgeryError, match=f"^{what}: merge_adapter has written the rows of 'task' into the .* call"
        ):
            call()
    model.eval()
    refusal = pytest.raises(SurgeryError, match=r"computing with adapter 'other'.*model\.reset_adapter\(\) first")
    with adapters.AdapterSetup("other"), refusal:
        model(**MIXED)
    model.set_active_adapters("other")  # which resets, in adapters as well
    assert model.get_input_embeddings().is_shrunk
    model(**MIXED)


def test_unknown_names_and_multi_task_lora_are_refused(base):  # noqa: F811
    where = base(CONFIGS["bert"]())
    model = trained(where)
    with pytest.raises(SurgeryError, match=r"no adapter 'tsak' on this model \(found: task\)"):
        model.merge_adapter("tsak")
    model.add_adapter("many", config=MTLLoRAConfig(n_up_projection=2, r=2))
    with pytest.raises(SurgeryError, match="'many' is multi-task LoRA, which cannot be merged"):
        model.merge_adapter("many")
    assert isinstance(model.get_input_embeddings(), PartialEmbedding) and model.get_input_embeddings().is_shrunk


def test_a_quantised_base_is_left_to_pema_merge(base):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    config = CONFIGS["bert"]()
    config.hidden_size = config.intermediate_size = 64
    where = base(config)
    quantised = {"quantization_config": Quantization(load_in_8bit=True), "device_map": "cpu"}
    model = trained(where, LoRAConfig(r=2), steps=0, **quantised)
    with pytest.raises(SurgeryError, match=r"the base is quantised.*into the original checkpoint with pema-merge"):
        model.merge_adapter("task")


def test_methods_that_stay_adapters_are_named(base, caplog):  # noqa: F811
    model = trained(base(CONFIGS["bert"]()), CompacterConfig(reduction_factor=4, phm_dim=2))
    before = outputs(model, MIXED)
    with caplog.at_level(logging.WARNING, "pema_adapters"):
        model.merge_adapter("task")
    (line,) = ours(caplog)
    assert line.startswith("merge_adapter: BnConfig of adapter 'task' cannot be merged into weights")
    assert_same(outputs(model, MIXED), before)


def test_saving_without_the_rows_warns_once(base, tmp_path, caplog):  # noqa: F811
    model = trained(base(CONFIGS["bert"]()))
    with caplog.at_level(logging.WARNING, "pema_adapters"):
        model.save_pretrained(tmp_path / "out")
    (line,) = ours(caplog)
    assert "is the base's, without the trained rows of adapter 'task': call model.merge_adapter('task') before" in line
    caplog.clear()
    model.merge_adapter("task")
    model.save_pretrained(tmp_path / "out")
    assert not ours(caplog)
