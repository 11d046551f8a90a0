"""How pytest runs the tests: on which device, and from which random state."""

from __future__ import annotations

import signal
from typing import Any, Iterator

import pytest
from hypothesis import settings

import helpers

# No test asserts a time.
settings.register_profile("chainer_accum", deadline=None)
settings.load_profile("chainer_accum")


def pytest_addoption(parser: Any) -> None:
    parser.addoption(
        "--device", help="device on which to train, as in --device=@cupy:0; make test-gpu has the tests for that"
    )


def pytest_configure(config: Any) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for programs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    helpers.DEVICE = config.getoption("--device")
    if helpers.DEVICE is not None and helpers.DEVICE.startswith("@cupy") and not helpers.has_gpu():
        pytest.exit(f"nothing was tested: --device={helpers.DEVICE} needs CuPy and a GPU", returncode=0)


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    helpers.seed(0)
    yield
