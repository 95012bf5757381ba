"""The data of recipes/causal_lm.py: pairs of token ids, packed into blocks, and what is refused."""

from argparse import Namespace

import pytest
from datasets import Dataset

from tests.recipes.conftest import RECIPES  # noqa: F401 - the recipes are on the path

from causal_lm import Pair, load_pairs, pack, parse, tokenize  # isort: skip

PAIRS = [Pair([1, 2], [3]), Pair([4], [5, 6]), Pair([7] * 8, [8, 9]), Pair([10], [11])]


def options(**more):
    return Namespace(**{"train_on_prompts": False, "length": 4, "data": "pairs.jsonl", "demo": False, **more})


def test_blocks_hold_the_pairs_one_after_another_with_labels_on_responses():
    found = pack(iter(PAIRS), options())
    kept = [[1, 2, 3, 4], [5, 6, 7, 7], [7, 7, 8, 9]]
    assert found["input_ids"][:] == kept, "the block of 7s has no label; 10 and 11 are the rest"
    assert found["labels"][:] == [[-100, -100, 3, -100], [5, 6, -100, -100], [-100, -100, 8, 9]]
    assert found["attention_mask"][:] == [[1] * 4] * 3
    found = pack(iter(PAIRS), options(train_on_prompts=True))
    assert found["labels"][:] == found["input_ids"][:] == [*kept[:2], [7] * 4, kept[2]]


def test_too_few_tokens_are_refused():
    with pytest.raises(SystemExit, match=r"pairs.jsonl: 18 tokens make fewer than two blocks of 16: lower --length"):
        pack(iter(PAIRS), options(length=16))


class Words:
    """A tokenizer whose tokens are characters."""

    chat_template, eos_token_id = None, 0

    def __call__(self, text, add_special_tokens):
        return Namespace(input_ids=[ord(each) for each in text])


def test_prompts_and_messages_without_a_chat_template():
    expected = [Pair([97, 10], [98, 0])]
    assert list(tokenize(Dataset.from_list([{"prompt": "a", "response": "b"}]), Words())) == expected
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert list(tokenize(Dataset.from_list([{"messages": messages}]), Words())) == expected


def test_other_columns_are_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(SystemExit, match=r"found columns question, answer; expected prompt and response, or messages"):
        load_pairs(options(data=str(path)))


def test_a_base_and_data_are_needed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["causal_lm.py", "--base", "x"])
    with pytest.raises(SystemExit):
        parse()
    assert capsys.readouterr().err.endswith("error: give --base and --data, or --demo\n")
