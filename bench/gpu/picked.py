"""A plugin of pytest: of all tests, those that run on a GPU where there is one."""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take tests that are marked `gpu`, that ask for a device, or whose skip says `GPU`."""
    taken = [item for item in items if _needs_gpu(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in taken])
    items[:] = taken


def _needs_gpu(item: pytest.Item) -> bool:
    if item.get_closest_marker("gpu") or "device" in getattr(item, "fixturenames", ()):
        return True
    if item.path.stem == "test_decoder":
        return True
    return any("GPU" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif"))
