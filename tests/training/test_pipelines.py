"""Transformers pipelines give the same answers on shrunk models as on merged ones."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, pipeline

from pema_adapters import merge_checkpoint
from tests.training.output.test_tied_head import V, make, train, with_adapter  # noqa: F401 - a fixture among them

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def tokenizer():
    words = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2} | {f"w{i}": i for i in range(3, V)}
    core = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")


@pytest.mark.parametrize(("name", "task", "text", "options"), [
    ("bert", "fill-mask", "w3 [MASK] w8 w200", {}),
    ("gpt2", "text-generation", "w3 w5 w200", {"max_new_tokens": 5, "do_sample": False}),
    ("t5", "text2text-generation", "w3 w5 w200", {"max_new_tokens": 5, "do_sample": False}),
])  # fmt: skip
def test_pipelines(make, tokenizer, tmp_path, name, task, text, options):  # noqa: F811
    folder, auto_class = make(name)
    model = with_adapter(folder, auto_class)
    train(model)
    model.eval()
    model.save_adapter(str(tmp_path / "run"), "task")
    merge_checkpoint(folder, tmp_path / "run", tmp_path / "merged")
    answers = [
        pipeline(task, model=one, tokenizer=tokenizer, device="cpu")(text, **options)
        for one in (model, auto_class.from_pretrained(tmp_path / "merged"))
    ]
    if task == "fill-mask":
        assert [one["token_str"] for one in answers[0]] == [one["token_str"] for one in answers[1]]
        assert [one["score"] for one in answers[0]] == pytest.approx([one["score"] for one in answers[1]], rel=1e-4)
    else:
        assert answers[0] == answers[1]
