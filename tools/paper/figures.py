"""Figures of the PEMA paper (Williams & Aletras), transcribed: Tables 2 to 6, and the row counts of Table 7.

TABLES[2].sections["Reduction in embedding parameters (%)"]["BERT"]     # one figure a column of TABLES[2].columns
"""

from collections.abc import Mapping
from dataclasses import dataclass

EMBEDDING = "Reduction in embedding parameters (%)"
MODEL = "Reduction in model parameters (%)"
MILLIONS = "Reduction in model parameters (millions)"
SIZES = "Parameters (millions), and the embedding's share (%)"

TASKS = ("CoLA", "MNLI", "MRPC", "QNLI", "QQP", "RTE", "SST-2", "STS-B", "WNLI")
LANGUAGES = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")
SUBSETS = {"en": ("en",), "en-de": ("en", "de"), "en-zh": ("en", "zh"), "All": LANGUAGES}
"""The columns of Table 4 and the languages of XNLI that each stands for."""
MEAN = "Mean"

Figures = tuple[float, ...]


@dataclass(frozen=True)
class Table:
    """A table of the paper: what it shows, by section and row; one figure a column, after those that are given.

    Args:
        title: what it is about.
        columns: names of the columns.
        sections: what a section's figures are -> row -> figures.
        given: names of further columns in front, of hyperparameters, which are not computed.
        settings: row -> their values.
    """

    title: str
    columns: tuple[str, ...]
    sections: Mapping[str, Mapping[str, Figures]]
    given: tuple[str, ...] = ()
    settings: Mapping[str, tuple[int, ...]] | None = None


TABLE_2_EMBEDDING = {
    "DistilBERT": (80.1, 14.8, 54.9, 13.1, 11.5, 41.5, 57.9, 57.2, 94.3, 47.3),
    "DistilRoBERTa": (86.1, 14.8, 64.0, 17.7, 5.9, 51.6, 68.6, 64.4, 96.0, 52.1),
    "DistilmBERT": (94.9, 76.9, 88.2, 73.8, 72.7, 85.0, 91.9, 88.8, 98.4, 85.6),
    "BERT": (80.1, 14.8, 54.9, 13.1, 11.5, 41.5, 57.9, 57.2, 94.3, 47.3),
    "RoBERTa": (86.1, 14.8, 64.0, 17.7, 5.9, 51.6, 68.6, 64.4, 96.0, 52.1),
    "DeBERTaV3": (95.0, 44.3, 85.7, 47.1, 28.5, 79.0, 87.5, 85.9, 98.6, 72.4),
    "mBERT": (94.9, 76.9, 88.2, 73.8, 72.7, 85.0, 91.9, 88.8, 98.4, 85.6),
    "XLM-RoBERTa": (97.8, 88.8, 94.9, 87.6, 85.4, 93.3, 96.3, 94.9, 99.3, 93.1),
    "XLM-V": (99.3, 93.2, 98.0, 92.8, 90.5, 97.1, 98.3, 98.0, 99.8, 96.3),
}
TABLE_2_MODEL = {
    "DistilBERT": (28.0, 5.2, 19.2, 4.6, 4.0, 14.5, 20.3, 20.0, 33.0, 16.5),
    "DistilRoBERTa": (40.5, 7.0, 30.1, 8.3, 2.8, 24.3, 32.3, 30.3, 45.1, 24.5),
    "DistilmBERT": (64.4, 52.2, 59.9, 50.1, 49.3, 57.7, 62.3, 60.2, 66.8, 58.1),
    "BERT": (17.1, 3.2, 11.8, 2.8, 2.5, 8.9, 12.4, 12.2, 20.2, 10.1),
    "RoBERTa": (26.7, 4.6, 19.8, 5.5, 1.8, 16.0, 21.2, 19.9, 29.7, 16.1),
    "DeBERTaV3": (50.7, 23.6, 45.7, 25.1, 15.2, 42.1, 46.7, 45.8, 52.6, 38.6),
    "mBERT": (49.0, 39.7, 45.5, 38.1, 37.5, 43.9, 47.4, 45.8, 50.8, 44.2),
    "XLM-RoBERTa": (67.5, 61.3, 65.5, 60.5, 59.0, 64.4, 66.5, 65.5, 68.5, 64.3),
    "XLM-V": (88.3, 82.9, 87.2, 82.6, 80.5, 86.4, 87.5, 87.2, 88.8, 85.7),
}
TABLE_3 = {
    "XSmall": (46.7, 21.8, 42.2, 23.2, 14.0, 38.8, 43.1, 42.3, 48.5, 35.6),
    "Small": (93.4, 43.6, 84.3, 46.3, 28.0, 77.7, 86.1, 84.5, 97.0, 71.2),
    "Base": (93.4, 43.6, 84.3, 46.3, 28.0, 77.7, 86.1, 84.5, 97.0, 71.2),
    "Large": (124.6, 58.1, 112.4, 61.8, 37.3, 103.6, 114.8, 112.7, 129.4, 95.0),
}
TABLE_4_EMBEDDING = {
    "DistilmBERT": (77.1, 71.7, 73.0, 44.6),
    "mBERT": (77.1, 71.7, 73.0, 44.6),
    "XLM-RoBERTa": (89.2, 86.0, 84.4, 56.9),
    "XLM-V": (93.6, 90.0, 90.0, 65.7),
}
TABLE_4_MODEL = {
    "DistilmBERT": (52.3, 48.6, 49.6, 30.3),
    "mBERT": (39.8, 37.0, 37.7, 23.0),
    "XLM-RoBERTa": (61.6, 59.4, 58.3, 39.3),
    "XLM-V": (83.2, 80.0, 80.0, 58.4),
}
TABLE_5_ROWS = {
    "DistilBERT": (28_996,),
    "DistilRoBERTa": (50_265,),
    "DistilmBERT": (119_547,),
    "BERT": (28_996,),
    "RoBERTa": (50_265,),
    "DeBERTaV3": (128_100,),
    "mBERT": (119_547,),
    "XLM-RoBERTa": (250_002,),
    "XLM-V": (901_629,),
}
TABLE_5 = {
    "DistilBERT": (22.3, 65.8, 33.9),
    "DistilRoBERTa": (38.6, 82.1, 47.0),
    "DistilmBERT": (91.8, 135.3, 67.8),
    "BERT": (22.3, 108.3, 20.6),
    "RoBERTa": (38.6, 124.6, 31.0),
    "DeBERTaV3": (98.4, 184.4, 53.3),
    "mBERT": (91.8, 177.9, 51.6),
    "XLM-RoBERTa": (192.0, 278.0, 69.1),
    "XLM-V": (692.5, 778.5, 88.9),
}
TABLE_6_SHAPES = {"XSmall": (12, 6, 384), "Small": (6, 12, 768), "Base": (12, 12, 768), "Large": (24, 16, 1024)}
TABLE_6 = {
    "XSmall": (49.2, 70.8, 69.4),
    "Small": (98.4, 141.9, 69.3),
    "Base": (98.4, 184.4, 53.3),
    "Large": (131.2, 435.1, 30.2),
}
TABLE_7 = {  # rows of train + validation + test
    "CoLA": 10_657,
    "MNLI": 431_992,
    "MRPC": 5_801,
    "QNLI": 115_669,
    "QQP": 795_241,
    "RTE": 5_767,
    "SST-2": 70_042,
    "STS-B": 8_628,
    "WNLI": 852,
}

WITH_MEAN = (*TASKS, MEAN)
SIZE_COLUMNS = ("N_emb", "N", "N_emb/N")
TABLES = {
    2: Table("models on GLUE", WITH_MEAN, {EMBEDDING: TABLE_2_EMBEDDING, MODEL: TABLE_2_MODEL}),
    3: Table("sizes of DeBERTaV3 on GLUE", WITH_MEAN, {MILLIONS: TABLE_3}),
    4: Table("models on subsets of XNLI", tuple(SUBSETS), {EMBEDDING: TABLE_4_EMBEDDING, MODEL: TABLE_4_MODEL}),
    5: Table("models", SIZE_COLUMNS, {SIZES: TABLE_5}, ("V",), TABLE_5_ROWS),
    6: Table("sizes of DeBERTaV3", SIZE_COLUMNS, {SIZES: TABLE_6}, ("l", "h", "d"), TABLE_6_SHAPES),
}
