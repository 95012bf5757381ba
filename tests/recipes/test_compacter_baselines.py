"""The Compacter paper's methods with and without PEMA: what trains is what should, it is as many as the formulas of the
paper's section 4 say, and what is saved is all of it.
"""

import logging

import adapters
import pytest
import torch
from adapters import PromptTuningConfig
from transformers import AutoModelForSequenceClassification, BertConfig, BertTokenizerFast

import compacter_baselines as baselines
from compacter_baselines import COLUMNS, FROZEN, METHODS, PAPER, TRAINED
from pema_adapters import PartialVocabulary, load_model

V, D, F, L = 120, 48, 64, 2
"""Rows of the matrix, hidden size, inner size, layers of a tiny BERT."""
K_IDS = [0, 3, 5, 8, 13, 21, 34, 55, 89, 118]
"""The vocabulary: the padding id, and what the batch uses."""
BATCH = {
    "input_ids": torch.tensor([[3, 5, 8, 13, 21], [34, 55, 89, 118, 3]]),
    "attention_mask": torch.ones(2, 5, dtype=torch.long),
    "labels": torch.tensor([0, 1]),
}
VOCABULARY = PartialVocabulary(K_IDS, V)
MATRIX = "bert.embeddings.word_embeddings.weight"
ROWS = {MATRIX, "bert.prompt_tuning.base_model_embeddings.weight"}
"""Names of the matrix: adapters registers it a second time."""
HEAD = {"classifier.weight", "classifier.bias"}

k, p, r = baselines.BOTTLENECK, baselines.PROMPT_LENGTH, 8


def dense(d):
    """An adapter of two matrices with biases."""
    return 2 * d * k + k + d


def phm(d, n):
    """n^3 of the rules, d k / n of the rest, for each of two matrices."""
    return 2 * (n**3 + d * k // n) + k + d


def rank_one(d):
    """Two vectors for each of two matrices, and biases; the shared rule not counted."""
    return 2 * (d + k) + k + d


LAYER_NORMS = (2 * L + 1) * 2 * D
LAYER = 4 * (D * D + D) + 2 * D * F + F + D + 2 * 2 * D
BODY = (V + 40 + 2) * D + 2 * D + L * LAYER + D * D + D
"""Everything: tokens, positions and types, a layer norm, layers, pooler."""
FORMULAS = {
    "Full fine-tuning": None,  # everything
    "Adapter": 2 * L * dense(D) + LAYER_NORMS,
    "Pfeiffer-Adapter": L * dense(D) + LAYER_NORMS,
    "AdapterDrop": 2 * (L - 1) * dense(D) + LAYER_NORMS,
    "Adapter-LowRank": 2 * L * rank_one(D) + LAYER_NORMS,
    "Prompt Tuning-R": p * D,
    "Prompt Tuning-T": p * D,
    "BitFit": L * (4 * D + F + D + 2 * D) + D + D,  # attention, inner, outer, layer norms; embeddings' norm, pooler
    "PHM-Adapter": 2 * L * phm(D, 12) + LAYER_NORMS,
    "Compacter": 2 * L * rank_one(D) + 4**3 + LAYER_NORMS,
    "Compacter++": L * rank_one(D) + 4**3 + LAYER_NORMS,
    "LoRA": L * 2 * (2 * r * D),
    "(IA)^3": L * (2 * D + F),
}

T5_BASE, T5_NORMS, T5_ADAPTERS, T5_D = 222_903_552, 62 * 768, 48, 768
"""Of 12 + 12 layers with two adapters each; 2, 3 and 1 layer norms in encoder and decoder layers and at the ends."""
PAPER_PERCENT = {
    0.832: T5_ADAPTERS * dense(T5_D) + T5_NORMS,
    0.427: T5_ADAPTERS // 2 * dense(T5_D) + T5_NORMS,
    0.494: (T5_ADAPTERS - 20) * dense(T5_D) + T5_NORMS,
    0.073: T5_ADAPTERS * rank_one(T5_D) + 4**3 + T5_NORMS,
    0.179: T5_ADAPTERS * phm(T5_D, 12) + T5_NORMS,
    0.047: T5_ADAPTERS // 2 * rank_one(T5_D) + 4**3 + T5_NORMS,
    0.034: baselines.PROMPT_LENGTH * T5_D,
}

CASES = [
    pytest.param(method, column, id=f"{method}-{column}")
    for method in METHODS
    for column in COLUMNS
    if column != FROZEN or baselines.can_freeze_rows()
]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(logging.getLogger("adapters"), "level", logging.ERROR)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The matrices are so small that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=2,
        max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def fresh(base):
    torch.manual_seed(7)
    return AutoModelForSequenceClassification.from_pretrained(base)


def prepared(base, method, column):
    model = fresh(base)
    baselines.prepare(model, method, column, VOCABULARY)
    return model


def train(model, steps=2):
    """Two steps: LoRA's first moves only one of its factors."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def rows(model):
    """All V rows as the model embeds them."""
    with torch.no_grad():
        return model.eval().get_input_embeddings()(torch.arange(V)).clone()


def formula(method, column):
    everything = BODY if column == PAPER else BODY - V * D
    count = everything if FORMULAS[method] is None else FORMULAS[method]
    return count + len(K_IDS) * D if column == TRAINED else count


def should_change(model, method):
    """The names of what is to change, apart from the embedding; independent of the recipe's own predicates."""
    names = {name for name in model.state_dict() if not name.endswith(("token_ids", "fingerprint"))} - ROWS
    added = {name for name in names if ".task." in name and ".pema." not in name}
    own = {name for name in names if ".task." not in name} - HEAD
    norms = {name for name in own if ".LayerNorm." in name}
    if method == "Full fine-tuning":
        return HEAD | own
    if method == "BitFit":
        return HEAD | {name for name in own if name.endswith(".bias")}
    if method == "Adapter-LowRank":
        return HEAD | norms | {name for name in added if not name.endswith("phm_rule")}
    if method in ("LoRA", "(IA)^3") or method.startswith("Prompt"):
        return HEAD | added
    return HEAD | norms | added


@pytest.mark.parametrize(("method", "column"), CASES)
def test_steps_change_what_should_train_and_nothing_else(base, method, column):
    model = prepared(base, method, column)
    assert baselines.trained_parameters(model) == (formula(method, column), 2 * D + 2)
    expected, before, rows_before = should_change(model, method), state(model), rows(model)
    train(model.train())
    changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert changed - ROWS - {name for name in changed if ".pema." in name} == expected

    moved = (rows(model) != rows_before).any(dim=1).nonzero().flatten().tolist()
    trains = column == TRAINED or (column == PAPER and method == "Full fine-tuning")
    assert moved == (K_IDS[1:] if trains else [])


@pytest.mark.parametrize(("percent", "count"), PAPER_PERCENT.items())
def test_the_same_formulas_give_the_percentages_of_the_papers_table_3(percent, count):
    assert round(100 * count / T5_BASE, 3) == percent


@pytest.mark.parametrize(("method", "column"), CASES)
def test_what_is_saved_is_all_that_trained(base, method, column, tmp_path):
    model = prepared(base, method, column)
    train(model)
    baselines.save(model, tmp_path / "run")
    loaded = fresh(base)
    with torch.no_grad():
        loaded.classifier.weight.zero_()
    baselines.load(loaded, method, column, VOCABULARY, tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**BATCH).logits, model.eval()(**BATCH).logits)
    assert torch.equal(rows(loaded), rows(model))


@pytest.mark.parametrize("column", [column for column in COLUMNS if column != FROZEN or baselines.can_freeze_rows()])
def test_a_prompt_of_tokens_starts_as_their_rows_and_leaves_them(base, column):
    model = prepared(base, "Prompt Tuning-T", column)
    ids = torch.from_numpy(baselines.prompt_ids(VOCABULARY))
    assert set(ids.tolist()) == set(K_IDS)
    matrix = fresh(base).bert.embeddings.word_embeddings.weight.detach()
    prompt = baselines.prompt_embedding(model).weight
    assert torch.equal(prompt.detach(), matrix[ids])
    with torch.no_grad():
        prompt.zero_()
    assert torch.equal(rows(model), matrix)


def test_the_prompt_of_adapters_own_from_string_reads_the_shrunk_matrix(base, tmp_path):
    """adapters asks the embedding for the rows of a text, of which some are in memory and some on disk."""
    words = [f"word{i}" for i in range(V)]
    for place, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]):
        words[place] = token
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    model = load_model(AutoModelForSequenceClassification, base, VOCABULARY)
    adapters.init(model)
    model.config.tokenizer_name_or_path = str(tmp_path)
    config = PromptTuningConfig(prompt_length=4, prompt_init="from_string", prompt_init_text="word13 word99")
    model.add_adapter("task", config=config)
    matrix = fresh(base).bert.embeddings.word_embeddings.weight.detach()
    assert torch.equal(baselines.prompt_embedding(model).weight.detach(), matrix[[2, 13, 99, 3]])
