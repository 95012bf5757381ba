"""Two processes of DistributedDataParallel train a language model as one process does with both of their batches."""

import subprocess
import sys

import pytest
import torch

from pema_adapters import PartialVocabulary, load_model
from tests.paths import REPOSITORY
from tests.training.output.families import USED, V, save_base

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

IDS = torch.tensor([[3, 5, 8, 13, 21], [21, 34, 55, 89, 100]])

WORKER = """
import sys, torch
from transformers import AutoModelForCausalLM
from pema_adapters import PartialVocabulary, load_model
from tests.slow.test_distributed import IDS, USED, V

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model = load_model(AutoModelForCausalLM, folder, PartialVocabulary(USED, V), dtype=torch.float64)
parallel = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(3):
    parallel(input_ids=IDS[rank : rank + 1], labels=IDS[rank : rank + 1]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
assert not any(V in tensor.shape and tensor.ndim > 1 for tensor in [*parallel.parameters(), *parallel.buffers()])
torch.save(model.state_dict(), f"{folder}/{rank}.pt")
"""


def test_two_processes_train_as_one(tmp_path):
    auto_class = save_base("gemma2", tmp_path)
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)], cwd=REPOSITORY) for rank in (0, 1)
    ]
    model = load_model(auto_class, tmp_path, PartialVocabulary(USED, V), dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [worker.wait(120) for worker in workers] == [0, 0]
    for rank in (0, 1):
        for name, found in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(found, model.state_dict()[name], rtol=1e-4, atol=1e-6, msg=name)
