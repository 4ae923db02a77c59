"""For all tests."""

import os
import signal
import sys

import pytest
import torch

# A background job of a shell script starts with interrupts ignored; the tests send some.
signal.signal(signal.SIGINT, signal.default_int_handler)
# All tests are of the CPU, also where there is a GPU, but for test_cuda.py with --cuda.
if "--cuda" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_addoption(parser):
    parser.addoption("--cuda", action="store_true", help="for tests/algorithms/test_cuda.py")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny networks are fastest on one thread, and sums are those of the child processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
