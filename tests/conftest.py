"""Fixtures of all tests: the backends that run here, and NaN in every fresh allocation."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import interpreted  # noqa: F401
HAS_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
# Under the interpreter this process tests the kernels on the CPU; a second process tests the torch backend.
BACKENDS = ["triton"] if INTERPRETED else ["torch", "triton"] if HAS_GPU else ["torch"]
# The interpreter multiplies the raw bits of bf16; there it is covered by the torch backend, and on a GPU.
LOW_PRECISION = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]

settings.register_profile(
    "focalkern",
    deadline=None,
    derandomize=True,
    max_examples=10 if INTERPRETED else 50,
    # The fixtures poison allocations, which is as good for the second example as for the first.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("focalkern")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def same_threads_afterwards():
    """For tests of scripts that set the number of CPU threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(config, items) -> None:
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if INTERPRETED:  # what takes no backend is the same in the other process
        others = [item for item in items if "backend" not in item.fixturenames]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if "backend" in item.fixturenames]


def pytest_collection_finish() -> None:
    gc.freeze()  # every trainer collects garbage, and would look at all that was imported


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch) -> None:
    """Fill what torch.empty and torch.empty_like return with NaN: an output left unwritten is then seen."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.detach().fill_(torch.nan)  # also of a leaf that requires grad: inductor makes some
            return tensor

        return wrapper

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(scope="session", autouse=True)
def settled_exp() -> None:
    # PyTorch 2.13: the first multi-threaded exp of a process can be off by 1e-4 in one thread's share.
    torch.exp(torch.zeros(16))


@pytest.fixture(scope="session", autouse=True)
def torch_empty_of_the_meta_device() -> None:
    # The first `with torch.device` keeps a list of the functions that it is for. With the poisoned ones in
    # it, torch.empty would allocate on the CPU for good: 28 GB for a 7B model that is only to be counted.
    with torch.device("meta"):
        torch.empty(0)
