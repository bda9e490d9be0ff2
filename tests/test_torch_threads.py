"""Two threads of Python on CPUs, and what they leave of torch's settings."""

from __future__ import annotations

import threading

import pytest
import torch

from focalkern.logps.torch_threads import in_two_threads, sums_in_two_threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def four_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(threads)


def in_a_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_each_part_has_a_thread_with_half_of_torch_s():
    both_began = threading.Barrier(2)

    def work(part):
        both_began.wait(60)
        return part, threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()

    parts, threads, counts, is_grad_enabled = zip(*in_two_threads(work, [5, 7], CPU), strict=True)
    assert parts == (5, 7)
    assert len({*threads, threading.get_ident()}) == 3
    assert counts == (2, 2)
    assert not any(is_grad_enabled)
    assert torch.get_num_threads() == in_a_thread(torch.get_num_threads) == 4


def test_an_exception_leaves_torch_s_threads_as_they_were():
    with pytest.raises(ZeroDivisionError):
        in_two_threads(lambda part: 1 // part, [1, 0], CPU)
    assert torch.get_num_threads() == in_a_thread(torch.get_num_threads) == 4
    assert threading.get_ident() not in in_two_threads(lambda _: threading.get_ident(), [1, 2], CPU)


def test_inference_mode_goes_with_the_work():
    with torch.inference_mode():
        assert all(in_two_threads(lambda _: torch.is_inference_mode_enabled(), [1, 2], CPU))
    assert not any(in_two_threads(lambda _: torch.is_inference_mode_enabled(), [1, 2], CPU))


@pytest.mark.parametrize("case", ["one part", "one thread", "other device", "beside another call"])
def test_other_work_stays_in_its_thread(case):
    parts, device = (
        [1] if case == "one part" else [1, 2],
        torch.device("meta" if case == "other device" else "cpu"),
    )

    def work(_):
        return threading.get_ident(), torch.get_num_threads()

    if case == "one thread":
        torch.set_num_threads(1)
    expected = [(threading.get_ident(), torch.get_num_threads())] * len(parts)
    if case == "beside another call":
        found = in_two_threads(lambda part: part or in_two_threads(work, parts, CPU), [0, 1], CPU)[0]
        assert len(set(found)) == 1
    else:
        assert in_two_threads(work, parts, device) == expected


def test_sums_of_both_halves():
    totals = [torch.ones(3), None]

    def add(half, own):
        assert own[1] is None
        own[0] += half

    sums_in_two_threads(add, (2.0, 5.0), totals, CPU)
    assert totals[0].tolist() == [8.0] * 3
