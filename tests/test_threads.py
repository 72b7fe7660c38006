"""Tasks on threads of their own: each is done once, in the order that sums need, and no setting leaves its thread."""

from __future__ import annotations

import itertools
import os
import threading
import time

import pytest
import torch

from genscl_loss import gen_supcon_loss
from genscl_loss._backends import threads, tiled

needs_lanes = pytest.mark.skipif(not threads._can_limit(), reason="this build of torch has no setting for a thread")


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_each_task_is_done_once_and_those_that_add_to_the_same_in_order(lanes):
    adds_to = [(i, j) for i, j in tiled._pairs(7)] * 2
    done, inside = [], set()

    def work(task: int, lane: int) -> None:
        assert lane < lanes
        assert not inside & set(adds_to[task])
        inside.update(adds_to[task])
        time.sleep(0.0005 * (task % 3))
        done.append(task)
        inside.difference_update(adds_to[task])

    threads.run(adds_to, work, lanes)
    assert sorted(done) == list(range(len(adds_to)))
    for key in range(7):
        of_key = [task for task in done if key in adds_to[task]]
        assert of_key == sorted(of_key)


@pytest.mark.parametrize("count", range(9))
def test_pairs_are_all_there_and_rounds_share_nothing(count):
    pairs = tiled._pairs(count)
    assert sorted(pairs) == [(i, j) for i in range(count) for j in range(i, count)]
    each = count // 2
    for turn in range((len(pairs) - count) // each if each else 0):
        of_round = pairs[count + turn * each :][:each]
        assert len(set(itertools.chain(*of_round))) == 2 * each


@pytest.mark.parametrize("rows, cols", [(1, 5), (3, 5), (4, 4), (5, 2), (0, 3), (3, 0)])
def test_rounds_of_a_rectangle(rows, cols):
    order = tiled._rounds(rows, cols)
    assert sorted(order) == list(itertools.product(range(rows), range(cols)))
    size = min(rows, cols)
    for first in range(0, len(order), max(1, size)):
        i, j = zip(*order[first : first + size], strict=True)
        assert len(set(i)) == len(set(j)) == size


def test_what_a_task_raises_is_raised_and_ends_the_others():
    done = []

    def work(task: int, lane: int) -> None:
        if task == 3:
            raise ZeroDivisionError("of task 3")
        done.append(task)

    with pytest.raises(ZeroDivisionError, match="of task 3"):
        threads.run([(0,)] * 9, work, 2)
    assert done == [0, 1, 2]
    threads.run([(0,)] * 9, lambda task, lane: done.append(task), 2)  # the threads are still there
    assert len(done) == 12


@needs_lanes
def test_no_setting_leaves_the_threads(three_threads):
    seen = []

    def look(task: int = 0, lane: int = 0) -> None:
        seen.append((torch.get_num_threads(), torch.is_grad_enabled()))

    threads.run([(0,)] * 4, look, threads.lanes_for(4))
    assert threads.lanes_for(4) == 3
    assert seen == [(1, False)] * 4
    look()
    other = threading.Thread(target=look)
    other.start()
    other.join()
    assert seen[4:] == [(3, True)] * 2


@needs_lanes
@pytest.mark.parametrize("norm", [1.0, 1e3], ids=["one shift", "running maximum"])
@pytest.mark.parametrize("contrasts", [None, 30, 400])
def test_results_do_not_depend_on_the_number_of_threads(contrasts, norm, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 16)
    monkeypatch.setattr(tiled, "_WORK", 0)
    generator = torch.Generator().manual_seed(0)
    z = norm * torch.nn.functional.normalize(torch.randn(70, 8, generator=generator))
    others = None if contrasts is None else torch.randn(contrasts, 8, generator=generator)
    scale, left_out = torch.tensor(10.0), [0] if contrasts is None else []

    def results() -> list[torch.Tensor]:
        given = z, others, scale, None, left_out, True
        lse, sums, *_ = tiled.row_lse(*given, "highest")
        grads = tiled.row_lse_grad(torch.ones_like(lse), sums, *given, contrasts or 70, 8, contrasts or 0)
        return [lse, *(x for x in grads if x is not None)]

    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            found.append(results())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_lanes
def test_within_inference_mode_and_for_several_callers_at_a_time(three_threads, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 16)
    x, labels = torch.randn(100, 8), torch.arange(100) % 7
    together = gen_supcon_loss(x, labels, backend="tiled")
    monkeypatch.setattr(tiled, "_WORK", 0)
    with torch.inference_mode():
        torch.testing.assert_close(gen_supcon_loss(x, labels, backend="tiled"), together)
    found = []
    callers = [
        threading.Thread(target=lambda: found.append(gen_supcon_loss(x, labels, backend="tiled"))) for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    torch.testing.assert_close(found, 4 * [together])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    threads.run([(0,), (1,)], lambda task, lane: None, 2)
    child = os.fork()
    if child == 0:
        done: list[int] = []
        threads.run([(0,), (1,)], lambda task, lane: done.append(task), 2)
        os._exit(len(done))
    for _ in range(600):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the forked process waits for threads that it does not have")
    assert os.waitstatus_to_exitcode(status) == 2
