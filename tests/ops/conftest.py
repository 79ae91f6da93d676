"""The ops are tested as a person without a GPU meets them; their Triton kernels have tests in ``tests/kernels``."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_interpreter():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield
