"""Text that a base or a delta brings reaches the terminal, the card and the Python lines escaped."""

import ast
import json
import re

import pytest
import yaml

from pema_adapters import merge_checkpoint, push_merged_to_hub
from pema_adapters.cli.merge import main
from tests.merging.conftest import T, noise

ESCAPES = "\x1b[2J\x1b[31mred\x07\u202e"
FORGED = "x\n  verified: every byte is the base's or the delta's"
CODE = '"); __import__("os"); ("'
MARKER = "<!-- pema: end -->"
NAMES = [ESCAPES, FORGED, CODE, MARKER, "<script>alert(1)<script>", "```", "a`b", "| a | b |", "# x"]


@pytest.fixture
def made(make_base, make_adapter):
    """A base and an adapter of any name, whose other weights stay an adapter."""

    def make(name, **more):
        base = make_base(**more)
        rest = {f"bert.encoder.layer.0.adapters.{'task'}.down": T.of(noise(1, 4))}
        delta = make_adapter(base, rest=rest, name="task")
        config = json.loads((delta.folder / "adapter_config.json").read_bytes()) | {"name": name}
        (delta.folder / "adapter_config.json").write_text(json.dumps(config))
        rename(delta.folder / "adapter.safetensors", name)
        return base.folder, delta.folder

    return make


def rename(path, name):
    """Call the adapter in the weights as the config does."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = {key.replace(".task.", f".{name}."): value for key, value in json.loads(data[8 : 8 + size]).items()}
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + size :])


@pytest.mark.parametrize("name", NAMES)
def test_the_terminal(made, capsys, name):
    base, delta = made(name)
    assert main(["--base", str(base), "--delta", str(delta)]) == 0
    out, err = capsys.readouterr()
    assert all(line.isprintable() for line in out.splitlines())
    assert err == "" and "\n  verified:" not in out
    start = "  load both, in Python (import adapters, transformers):\n"
    code = [line.strip() for line in out.partition(start)[2].splitlines()]
    assert len(code) == 2
    assert strings(code[1])[0] == f"{delta}/merged/adapters/{name}"


def strings(code):
    """The string literals of one call."""
    call = ast.parse(code).body[0].value
    assert isinstance(call, ast.Call)
    return [argument.value for argument in call.args]


@pytest.mark.parametrize("name", NAMES)
def test_the_card(made, hub, monkeypatch, name):
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    base, delta = made(name)
    push_merged_to_hub(base, delta, "team/merged")
    first = hub.files("team/merged")["README.md"].decode()
    push_merged_to_hub(base, delta, "team/merged")
    assert hub.files("team/merged")["README.md"].decode() == first
    assert first.count(MARKER) == 1 and first.rstrip().endswith(MARKER)
    assert all(line.isprintable() for line in first.splitlines())
    outside = re.sub(r"^(`{3,}).*?^\1$|(`+).*?\2", "", first.replace("\\<", ""), flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in outside
    code = re.search(r"^(`{3,})python\n(.*?)^\1$", first, re.MULTILINE | re.DOTALL)[2].splitlines()
    assert code[-1].startswith("model.load_adapter(folder + ")
    assert ast.literal_eval(ast.parse(code[-1]).body[0].value.args[0].right) == f"/adapters/{name}"


def test_methods_and_classes(made, capsys, hub, monkeypatch):
    """Names that adapter_config.json and config.json give."""
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    base, delta = made("task", config={"architectures": [CODE]})
    config = json.loads((delta / "adapter_config.json").read_bytes())
    config["config"]["configs"][1] = {"architecture": f"{ESCAPES}\n## Owned <script>"}
    (delta / "adapter_config.json").write_text(json.dumps(config | {"model_class": None}))
    assert main(["--base", str(base), "--delta", str(delta), "--push-to-hub", "team/merged"]) == 0
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())
    card = hub.files("team/merged")["README.md"].decode()
    text = card.partition("\n---\n")[2]
    assert r"\#\# Owned \<script\>" in text and "\n## Owned" not in text and "__import__" not in text
    assert all(line.isprintable() for line in text.splitlines())


def test_names_of_folders(made, tmp_path, capsys):
    base, delta = made("task")
    output = tmp_path / f'out{ESCAPES}"'
    assert main(["--base", str(base), "--delta", str(delta), "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    assert strings(lines[-1].strip()) == [f"{output}/adapters/task"]


BASE_CARD = """---
license: mit
language:
- en
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
---

# The base

It embeds sentences.
"""


def front(text):
    return yaml.safe_load(text.split("---")[1])


def test_a_merged_folder_has_a_card_of_its_own(make_base, make_adapter):
    base = make_base()
    (base.folder / "README.md").write_text(BASE_CARD)
    delta = make_adapter(base, head={"classifier.weight": T.of(noise(3, 4))})
    report = merge_checkpoint(base.folder, delta.folder, verify=True)
    text = (delta.folder / "merged" / "README.md").read_text()
    assert front(text) == {
        "language": ["en"], "license": "mit", "library_name": "transformers", "base_model_relation": "finetune",
        "tags": ["pema"],
    }  # fmt: skip
    for part in ("# base, fine-tuned\n", "the adapter `task` (pema)", "6 of 20 embedding rows were trained",
                 'transformers.BertForSequenceClassification.from_pretrained(".")', "pema-merge --base base --delta run"):  # fmt: skip
        assert part in text, part
    assert "embeds sentences" not in text and str(base.folder.parent) not in text
    written = sum(path.stat().st_size for path in (delta.folder / "merged").iterdir() if path.name != "pema_merge.json")
    assert report.bytes_written == written


def test_the_card_does_not_depend_on_the_name_of_the_folder(make_base, make_adapter, tmp_path):
    base = make_base()
    delta = make_adapter(base)
    for name in ("one", "another"):
        merge_checkpoint(base.folder, delta.folder, tmp_path / name)
    assert (tmp_path / "one" / "README.md").read_bytes() == (tmp_path / "another" / "README.md").read_bytes()


def test_what_was_written_into_the_card_survives_the_next_merge(make_base, make_adapter):
    base = make_base()
    delta = make_adapter(base)
    merge_checkpoint(base.folder, delta.folder)
    card = delta.folder / "merged" / "README.md"
    card.write_text(card.read_text() + "\n## Results\n\nGood ones: 97,3 % Größe.\n", encoding="utf-8")
    merge_checkpoint(base.folder, delta.folder, overwrite=True)
    text = card.read_text(encoding="utf-8")
    assert "Good ones: 97,3 % Größe." in text and text.count("## Merged with pema_adapters") == 1


def test_a_card_of_the_base_that_cannot_be_read_is_no_obstacle(make_base, make_adapter):
    base = make_base()
    delta = make_adapter(base)
    for content in (
        b"---\nlicense: [\n---\n",
        b"---\n" + b"[" * 20_000 + b"\n---\n",
        b"\xff\xfe---\n",
        b"---\n- a\n---\n",
    ):
        (base.folder / "README.md").write_bytes(content)
        merge_checkpoint(base.folder, delta.folder, overwrite=True)
        assert "license" not in front((delta.folder / "merged" / "README.md").read_text())


def test_metadata_that_are_no_text_are_not_taken_over(make_base, make_adapter):
    """YAML can name a list a billion times over in a few lines."""
    base = make_base()
    delta = make_adapter(base)
    lines = ["a: &a0 [x, x]", *(f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
    bomb = "\n".join(["---", *lines, "license: *a11", "datasets: *a11", "metrics: [f1, *a11]", "---", ""])
    (base.folder / "README.md").write_text(bomb)
    (delta.folder / "README.md").write_text(bomb)
    merge_checkpoint(base.folder, delta.folder)
    found = front((delta.folder / "merged" / "README.md").read_text())
    assert "license" not in found and not found.get("datasets") and found["metrics"] == ["f1"]


def test_in_place_the_card_stays_and_is_told_of(make_base, make_adapter):
    base = make_base()
    (base.folder / "README.md").write_text(BASE_CARD)
    report = merge_checkpoint(base.folder, make_adapter(base).folder, in_place=True)
    assert (base.folder / "README.md").read_text() == BASE_CARD
    assert "README.md was left as it is: it describes the base" in report.notes
