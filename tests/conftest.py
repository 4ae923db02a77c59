"""For all tests."""

import signal

# A background job of a shell script starts with interrupts ignored; the tests send some.
signal.signal(signal.SIGINT, signal.default_int_handler)
