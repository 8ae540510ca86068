"""Whatever is looked at, no function mode is left behind."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_mode_is_left() -> Iterator[None]:
    before = torch._C._len_torch_function_stack()
    yield
    assert torch._C._len_torch_function_stack() == before
