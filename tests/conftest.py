import os

import pytest
import torch

# what takes a minute and more begins first, longest first, so that pytest's processes end together
LONGEST = ("interruption", "processes", "export", "hub", "demo", "train", "model", "timm", "heads", "predict_script",
           "loading", "original", "draw", "evaluate", "push", "losses", "install", "tour")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Inputs as small as those of the tests lose more time in handing work to threads than these save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def empty_folder(tmp_path_factory):
    """Tests, and the processes that they start, neither find nor leave anything in the checkout, where users train."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("empty"))
    yield
    os.chdir(before)
