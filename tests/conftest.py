"""For all tests."""

import os
import signal
import sys

# A background job of a shell script starts with interrupts ignored; the tests send some.
signal.signal(signal.SIGINT, signal.default_int_handler)
# All tests are of the CPU, also where there is a GPU, but for test_cuda.py with --cuda.
if "--cuda" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_addoption(parser):
    parser.addoption("--cuda", action="store_true", help="for tests/algorithms/test_cuda.py")
