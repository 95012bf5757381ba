"""Several threads that train one model, and replicas of nn.DataParallel."""

import threading

import pytest
import torch

from pema_adapters import PartialVocabulary, load_model
from pema_adapters.errors import SurgeryError
from tests.models import SEEN, USED, V, matrix_of, outputs
from tests.training.test_shrink import shrunk

ROUNDS = 40


def in_threads(count, work):
    """Run `work(i)` in `count` threads at once; returns the errors."""
    errors, barrier = [], threading.Barrier(count)

    def run(i):
        try:
            barrier.wait()
            work(i)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_several_threads_can_add_rows(case):
    """Rows are sorted and equal the base's, and each token has the gradient of all its uses."""
    base = matrix_of(case.plain()).detach()
    for seed in range(5):
        embedding = load_model(case.auto_class, case.folder, "grow").get_input_embeddings().train()
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, V, (8, ROUNDS, 3), generator=generator)

        def work(i, embedding=embedding, ids=ids):
            for some in ids[i]:
                found = embedding(some)
                assert torch.equal(found.detach(), base[some])
                found.sum().backward()

        assert in_threads(8, work) == []
        tokens, uses = torch.unique(ids, return_counts=True)
        assert embedding.token_ids.tolist() == [0, *tokens.tolist()]
        assert torch.equal(embedding.weight.detach(), base[embedding.token_ids.long()])
        assert embedding.weight.grad[:, 0].tolist() == [0, *uses.tolist()]


@pytest.mark.parametrize(
    "make", [shrunk, lambda case: load_model(case.auto_class, case.folder, PartialVocabulary(USED, V))]
)
def test_a_replica_of_data_parallel_is_refused_with_the_command_to_use(case, make):
    embedding = make(case).get_input_embeddings()
    replica = embedding._replicate_for_data_parallel()
    with pytest.raises(SurgeryError, match=r"^nn\.DataParallel cannot .*torchrun --nproc_per_node=gpu SCRIPT\.py.*$"):
        replica(SEEN["input_ids"])


def test_data_parallel_on_one_device_needs_no_replica(case):
    model = shrunk(case)
    assert torch.equal(outputs(torch.nn.DataParallel(model), SEEN)[0], outputs(model, SEEN)[0])
