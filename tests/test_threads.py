"""Work in pieces on torch's threads: all of it once, undivided operations, nothing left behind."""

import threading

import pytest
import torch

from nvfp4lab import threads


@pytest.fixture(params=[1, 2, 5])
def count(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("items", [0, 1, 2, 100])
def test_every_item_is_worked_on_once(items, count):
    done = []
    threads.for_each(done.append, range(items))
    assert sorted(done) == list(range(items))


def test_there_are_as_many_threads_as_torch_has(count):
    together = threading.Barrier(count)  # passed only if so many are at it at once
    seen = set()

    def work(_):
        seen.add(threading.get_ident())
        together.wait(timeout=60)

    threads.for_each(work, range(count))
    assert len(seen) == count


def test_operations_of_a_piece_are_not_split(count):
    seen = []
    threads.for_each(lambda _: seen.append(torch.get_num_threads()), range(2 * count))
    assert set(seen) == {1}


def test_torch_has_its_threads_again(count):
    seen = []
    threads.for_each(lambda _: None, range(10))
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert (torch.get_num_threads(), seen) == (count, [count])


def test_what_work_raises_is_raised(count):
    def work(item):
        if item == 3:
            raise ValueError("item 3")

    with pytest.raises(ValueError, match="item 3"):
        threads.for_each(work, range(10))
    assert torch.get_num_threads() == count


def test_work_may_write_into_what_the_caller_made(count):
    for made in (torch.zeros(8), torch.zeros(8).requires_grad_().detach()):
        threads.for_each(lambda i, made=made: made[i].fill_(i), range(8))
        assert made.tolist() == list(range(8))
    with torch.inference_mode():
        made = torch.zeros(8)
        threads.for_each(lambda i: made[i].fill_(i), range(8))
        assert made.tolist() == list(range(8))
