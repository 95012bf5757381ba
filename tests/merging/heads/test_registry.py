"""The table of standard heads agrees with what adapters and Transformers say."""

import inspect
import subprocess
import sys

import transformers
from adapters.head_utils import STATIC_TO_FLEX_HEAD_MAP
from adapters.heads.model_mixin import MODEL_HEAD_MAP
from transformers import AutoConfig

from pema_adapters.merging.heads.convert import _OTHERS
from pema_adapters.merging.heads.registry import DEFAULTS, HIDDEN, STANDARD, Standard

NOT_OURS = ("DebertaFor", "Beit", "ViT", "Whisper", "Xmod")
PAIRS = [(m, family, s) for m, family in STANDARD.items() for s in family.heads.values() if isinstance(s, Standard)]


def test_contract_the_layers_are_those_that_adapters_knows():
    ours = {family.name + standard.suffix: list(standard.layers) for _, family, standard in PAIRS}
    for name, layers in ours.items():
        assert layers == [layer for layer in STATIC_TO_FLEX_HEAD_MAP[name]["layers"] if layer not in (None, "dropout")]
    left = [name for name in STATIC_TO_FLEX_HEAD_MAP.keys() - ours.keys() if not name.startswith(NOT_OURS)]
    assert sorted(left) == [f"{name}ForSequenceClassification" for name in ("GPT2", "GPTJ", "Llama", "Mistral")]


def test_contract_defaults_are_those_of_adapters_and_transformers():
    for kind, defaults in DEFAULTS.items():
        found = inspect.signature(MODEL_HEAD_MAP[kind]).parameters
        assert {key: found[key].default for key in defaults} == defaults
        assert found.keys() - defaults.keys() - {"id2label"} <= _OTHERS | {"model", "head_name"}
    for model_type, family in STANDARD.items():
        config = AutoConfig.for_model(model_type)
        assert config.tie_word_embeddings == family.tied and family.hidden in config.to_diff_dict()
        assert getattr(transformers, f"{family.name}PreTrainedModel").base_model_prefix == family.prefix
    for model_type, _, standard in PAIRS:
        for key, default in (pair for pair in (standard.activation, standard.inner) if isinstance(pair, tuple)):
            assert default == HIDDEN or getattr(AutoConfig.for_model(model_type), key) == default


def test_a_head_needs_no_torch():
    code = "import sys, pema_adapters.merging.heads.convert; print({'torch', 'transformers', 'adapters'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
