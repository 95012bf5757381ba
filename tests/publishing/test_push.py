"""Base and adapter from the Hub, merged model and adapter to the Hub: the real client against a server on loopback."""

import json

import adapters
import pytest
import torch
from adapters import AutoAdapterModel, ConfigUnion, LoRAConfig
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification

from pema_adapters import PartialVocabulary, PEMAConfig, merge_checkpoint, push_merged_to_hub, shrink_embeddings
from pema_adapters.cli.merge import main
from pema_adapters.errors import FormatError
from tests.models import MIXED, USED, V, outputs
from tests.publishing.repositories import ADAPTER, BASE, MERGED, trained
from tests.training.test_shrink import COMPACTER, perturb


def test_round_trip(account, base, tmp_path):
    model = trained(BASE, ConfigUnion(PEMAConfig(), LoRAConfig(r=2)))
    model.push_adapter_to_hub(ADAPTER, "task", datasets_tag="glue", adapter_card_kwargs={"metrics": ["accuracy"]})
    pushed = account.files(ADAPTER)
    assert {"adapter.safetensors", "adapter_config.json", "README.md"} <= set(pushed)
    assert not any(name.endswith(".bin") for name in pushed)
    report = push_merged_to_hub(BASE, ADAPTER, MERGED)
    assert report.output == f"{account.url}/{MERGED}"
    card = ModelCard(account.files(MERGED)["README.md"].decode()).data
    assert (card.datasets, card.metrics) == (["glue"], ["accuracy"])
    assert "pushed: " in report.notes[-1]
    merged = AutoModelForSequenceClassification.from_pretrained(MERGED)
    for one, other in zip(outputs(merged, MIXED), outputs(model, MIXED), strict=True):
        torch.testing.assert_close(one, other)
    assert account.commits(MERGED)[0].title == "Upload a checkpoint merged with pema_adapters"
    assert len(account.commits(MERGED)) == 2


def test_an_adapter_comes_back(account, base):
    model = trained(BASE, ConfigUnion(PEMAConfig(), COMPACTER))
    model.push_adapter_to_hub(ADAPTER, "task", datasets_tag="glue", adapter_card_kwargs={"license": "mit"})
    again = AutoModelForSequenceClassification.from_pretrained(BASE)
    adapters.init(again)
    again.load_adapter(ADAPTER, set_active=True)
    for one, other in zip(outputs(again, MIXED), outputs(model, MIXED), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    card = ModelCard(account.files(ADAPTER)["README.md"].decode())
    found = card.data.to_dict()
    assert found["base_model"] == BASE and found["base_model_relation"] == "adapter"
    assert (
        found["library_name"] == "adapter-transformers" and found["license"] == "mit" and found["datasets"] == ["glue"]
    )
    assert {"adapter-transformers", "bert", "pema", "compacter"} == set(found["tags"])
    assert f"{len(USED) + 1} of {V} embedding rows" in card.text or f"{len(USED)} of {V} embedding rows" in card.text
    assert "import pema_adapters\nfrom adapters import AutoAdapterModel" in card.text
    assert "## Evaluation results" in card.text
    card.validate()


def test_other_adapters_are_pushed_as_before(account, base):
    model = AutoModelForSequenceClassification.from_pretrained(BASE)
    adapters.init(model)
    model.add_adapter("task", config=LoRAConfig(r=2))
    model.push_adapter_to_hub(ADAPTER, "task")
    assert "pytorch_adapter.bin" in account.files(ADAPTER)
    assert "pema" not in account.files(ADAPTER)["README.md"].decode()


def test_the_push_equals_the_merge_on_disk(account, delta, tmp_path):
    merge_checkpoint(BASE, delta, tmp_path / "merged")
    push_merged_to_hub(BASE, delta, MERGED)
    both = push_merged_to_hub(BASE, delta, "team/both", tmp_path / "copy")
    assert both.output == str(tmp_path / "copy")
    on_disk = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    del on_disk["pema_merge.json"], on_disk["README.md"]
    for name in (MERGED, "team/both"):
        found = account.files(name)
        del found["README.md"]
        assert found == on_disk
    assert (tmp_path / "copy" / "README.md").read_bytes() == account.files("team/both")["README.md"]


def test_the_card(account, delta, tmp_path):
    push_merged_to_hub(BASE, delta, MERGED)
    card = ModelCard(account.files(MERGED)["README.md"].decode())
    assert card.data.to_dict() == {
        "language": ["en"], "license": "mit", "library_name": "transformers", "base_model": BASE,
        "base_model_relation": "finetune", "tags": ["pema", "lora"],
    }  # fmt: skip
    for text in ("# merged", "embedding rows were trained", "updates of 4 weights were folded in",
                 f'transformers.BertForSequenceClassification.from_pretrained("{MERGED}")',
                 f"pema-merge --base {BASE} --delta run", "- `adapter.safetensors`: `"):  # fmt: skip
        assert text in card.text, text
    assert str(tmp_path) not in card.content
    card.validate()


def test_the_card_of_a_cast(account, delta):
    push_merged_to_hub(BASE, delta, MERGED, dtype="bfloat16")
    card = account.files(MERGED)["README.md"].decode()
    assert " are the base's, in bfloat16." in card and "--dtype bfloat16" in card and "byte for byte" not in card


def test_a_card_that_is_there_survives(account, delta):
    mine = "---\nlicense: apache-2.0\ntags:\n- mine\nmodel-index:\n- name: x\n---\n\n# Mine\n\nWords.\n"
    account.publish(MERGED, {"README.md": mine.encode()})
    push_merged_to_hub(BASE, delta, MERGED)
    once = account.files(MERGED)["README.md"].decode()
    push_merged_to_hub(BASE, delta, MERGED)
    assert account.files(MERGED)["README.md"].decode() == once
    assert "# Mine\n\nWords." in once and once.count("## Merged with pema_adapters") == 1
    assert "license: apache-2.0" in once and "- mine\n- pema\n- lora\n" in once and "model-index:\n- name: x\n" in once


def test_a_card_that_cannot_be_read_is_not_lost(account, delta):
    account.publish(MERGED, {"README.md": b"---\n[a: b\n---\n\nWords.\n"})
    with pytest.raises(
        FormatError, match=r"team/merged: README.md: its metadata cannot be read .*; fix the YAML front matter"
    ):
        push_merged_to_hub(BASE, delta, MERGED)
    assert account.files(MERGED) == {"README.md": b"---\n[a: b\n---\n\nWords.\n"}


def test_what_stays_an_adapter_goes_along(account, base, tmp_path):
    model = trained(BASE, ConfigUnion(PEMAConfig(), COMPACTER))
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    push_merged_to_hub(BASE, tmp_path / "run", MERGED)
    card = account.files(MERGED)["README.md"].decode()
    code = card.split("```python\n")[1].split("```")[0]
    names = {}
    exec(code, names)
    for one, other in zip(outputs(names["model"], MIXED), outputs(model, MIXED), strict=True):
        torch.testing.assert_close(one, other)


def test_weights_of_an_earlier_push_go(account, delta):
    weights = ("pytorch_model.bin", "model-00001-of-00002.safetensors", "model.safetensors.index.json")
    others = ("notes.txt", "other/model.safetensors", "adapters/x/adapter.safetensors")
    old = dict.fromkeys(weights + others, b"old")
    account.publish(MERGED, old)
    push_merged_to_hub(BASE, delta, MERGED)
    assert set(old) & set(account.files(MERGED)) == {
        "notes.txt",
        "other/model.safetensors",
        "adapters/x/adapter.safetensors",
    }
    account.publish("team/again", {**account.files(MERGED), "adapters/x/adapter.safetensors": b"old"})
    push_merged_to_hub(BASE, delta, "team/again")
    assert "adapters/x/adapter.safetensors" not in account.files("team/again")


def test_a_pull_request(account, delta):
    push_merged_to_hub(BASE, delta, MERGED, create_pr=True, commit_message="Please", private=True)
    assert account.files(MERGED) == {}
    assert "model.safetensors" in account.files(MERGED, "refs/pr/1")
    assert account.commits(MERGED, "refs/pr/1")[0].title == "Please"
    assert account.repositories[MERGED].private


def test_a_dry_run_asks_for_nothing_but_the_base(account, delta):
    before = len(account.requests)
    report = push_merged_to_hub(BASE, delta, MERGED, dry_run=True)
    assert report.bytes_written > 0 and MERGED not in account.repositories
    assert all(request.method in ("GET", "HEAD") for request in account.requests[before:])


def test_the_command(account, delta, capsys):
    arguments = [
        "--base",
        BASE,
        "--delta",
        str(delta),
        "--push-to-hub",
        MERGED,
        "--private",
        "--commit-message",
        "Hello",
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"pushed to {account.url}/{MERGED}" in out and f"pushed: {account.url}/{MERGED}/commit/" in out
    assert account.commits(MERGED)[0].title == "Hello" and account.repositories[MERGED].private
    assert main([*arguments, "--json", "--output", str(delta.parent / "copy")]) == 0
    assert json.loads(capsys.readouterr().out)["output"] == str(delta.parent / "copy")
    assert main([*arguments, "--dry-run"]) == 0
    assert f"would push to {MERGED}" in capsys.readouterr().out


def test_a_flexible_head_on_the_hub(account, base, tmp_path):
    model = AutoAdapterModel.from_pretrained(BASE)
    model.add_adapter("task", config=PEMAConfig())
    model.add_classification_head("task", num_labels=3, layers=3)
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    model.train_adapter("task")
    perturb(model)
    model.push_adapter_to_hub(ADAPTER, "task")
    push_merged_to_hub(BASE, ADAPTER, MERGED)
    names = {}
    exec(account.files(MERGED)["README.md"].decode().split("```python\n")[1].split("```")[0], names)
    names["model"].active_head = "task"
    for one, other in zip(outputs(names["model"], MIXED), outputs(model, MIXED), strict=True):
        torch.testing.assert_close(one, other)
