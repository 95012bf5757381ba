"""Pushes while others push: nothing that another commit brought is lost, and no repository is a mixture of two."""

import json
import threading

import pytest
from transformers import AutoModelForSequenceClassification

from pema_adapters import push_merged_to_hub
from pema_adapters.errors import FormatError, MergeError
from tests.publishing.repositories import BASE, MERGED

CARD = b"---\nlicense: apache-2.0\n---\n\n# Mine\n"
SECTION = b"\n## Intended use\n\nWritten by hand.\n"
COMMIT = "POST .*/commit/"


@pytest.fixture
def shards(base, tmp_path):
    """The same base in several files."""
    folder = tmp_path / "shards"
    AutoModelForSequenceClassification.from_pretrained(base.folder).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def commit(hub, **files):
    """Put files on top of what the repository holds, as somebody else would."""
    changed = {name.replace("_", "."): content for name, content in files.items()}
    hub.publish(MERGED, {**hub.files(MERGED), **changed})


def check_weights(files):
    """The weights are those of one push: a single file, or an index and its shards."""
    weights = {name for name in files if name.endswith(".safetensors") and "/" not in name}
    if "model.safetensors.index.json" not in files:
        assert weights == {"model.safetensors"}
    else:
        assert weights == set(json.loads(files["model.safetensors.index.json"])["weight_map"].values())


def test_a_section_written_just_before_survives(account, delta):
    account.publish(MERGED, {"README.md": CARD})
    account.fail(COMMIT, before=lambda: commit(account, README_md=CARD + SECTION))
    push_merged_to_hub(BASE, delta, MERGED)
    files = account.files(MERGED)
    assert SECTION.strip() in files["README.md"] and b"## Merged with pema_adapters" in files["README.md"]
    assert "model.safetensors" in files
    assert [request.status for request in account.asked("/commit/")] == [412, 200]
    assert [one.title for one in account.commits(MERGED)][:2] == [
        "Upload a checkpoint merged with pema_adapters",
        "published",
    ]


def test_what_is_uploaded_is_not_sent_again_after_a_conflict(account, delta):
    account.publish(MERGED, {"README.md": CARD})
    account.fail(COMMIT, before=lambda: commit(account, README_md=CARD + SECTION))
    push_merged_to_hub(BASE, delta, MERGED)
    assert len(account.asked("PUT ")) == 1


@pytest.mark.parametrize("is_first_sharded", [True, False])
def test_a_push_during_a_push(account, delta, shards, is_first_sharded):
    first, second = (shards, BASE) if is_first_sharded else (BASE, shards)
    account.fail(COMMIT, before=lambda: push_merged_to_hub(second, delta, MERGED))
    push_merged_to_hub(first, delta, MERGED)
    files = account.files(MERGED)
    check_weights(files)
    assert ("model.safetensors.index.json" in files) == is_first_sharded
    assert len(account.commits(MERGED)) == 3


def test_two_pushes_at_once(account, delta, shards):
    """However the two interleave."""
    account.publish(MERGED, {"README.md": CARD})
    start, errors = threading.Barrier(2), []

    def push(base):
        start.wait()
        try:
            push_merged_to_hub(base, delta, MERGED, progress=False)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=push, args=(one,)) for one in (BASE, shards)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    check_weights(account.files(MERGED))


def test_a_file_that_is_gone_need_not_be_deleted(account, delta):
    account.publish(MERGED, {"README.md": CARD, "pytorch_model.bin": b"old"})
    account.fail(COMMIT, before=lambda: account.publish(MERGED, {"README.md": CARD}))
    push_merged_to_hub(BASE, delta, MERGED)
    check_weights(account.files(MERGED))


def test_weights_that_came_meanwhile_are_deleted(account, delta):
    account.publish(MERGED, {"README.md": CARD})
    account.fail(COMMIT, before=lambda: account.publish(MERGED, {"README.md": CARD, "pytorch_model.bin": b"new"}))
    push_merged_to_hub(BASE, delta, MERGED)
    assert "pytorch_model.bin" not in account.files(MERGED)
    check_weights(account.files(MERGED))


def test_others_push_all_the_time(account, delta):
    account.publish(MERGED, {"README.md": CARD})
    texts = iter(range(99))
    account.fail(COMMIT, before=lambda: commit(account, notes_txt=b"%d" % next(texts)), times=99)
    with pytest.raises(MergeError, match=r"^team/merged: somebody else pushed to it during each of 5 tries; run again"):
        push_merged_to_hub(BASE, delta, MERGED)
    assert account.files(MERGED) == {"README.md": CARD, "notes.txt": b"4"}


def test_the_folder_is_written_once(account, delta, tmp_path):
    account.publish(MERGED, {"README.md": CARD})
    account.fail(COMMIT, before=lambda: commit(account, README_md=CARD + SECTION))
    push_merged_to_hub(BASE, delta, MERGED, tmp_path / "copy")
    files = account.files(MERGED)
    assert SECTION.strip() in files["README.md"]
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_pull_request_starts_where_it_was_planned(account, delta):
    account.publish(MERGED, {"README.md": CARD, "pytorch_model.bin": b"old"})
    planned = account.commits(MERGED)[0].id
    account.fail(COMMIT, before=lambda: account.publish(MERGED, {"README.md": CARD}))
    push_merged_to_hub(BASE, delta, MERGED, create_pr=True)
    assert account.commits(MERGED, "refs/pr/1")[1].id == planned
    check_weights(account.files(MERGED, "refs/pr/1"))


def test_a_card_in_another_encoding_is_not_lost(account, delta):
    card = CARD + "Größe".encode("latin-1")
    account.publish(MERGED, {"README.md": card})
    with pytest.raises(FormatError, match=r"team/merged: README.md is not UTF-8 \(byte 38 of 41\).*; convert it"):
        push_merged_to_hub(BASE, delta, MERGED)
    assert account.files(MERGED) == {"README.md": card}


def test_weights_that_came_before_a_push_of_the_same(account, delta):
    """Nothing is left to add, and only what was there when the push was planned is known to need no deletion."""
    push_merged_to_hub(BASE, delta, MERGED)
    new = {**account.files(MERGED), "pytorch_model.bin": b"new"}
    account.fail("POST .*/preupload/", before=lambda: account.publish(MERGED, new))
    push_merged_to_hub(BASE, delta, MERGED)
    assert "pytorch_model.bin" not in account.files(MERGED)
