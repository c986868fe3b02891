import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Inputs as small as those of the tests lose more time in handing work to threads than these save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
