"""What pytest-benchmark leaves unsaid of a run of the operations: that the machine was busy, in the saved file as well; and that
it was slower kernels that made a comparison fail."""

import pytest
from pytest_benchmark.session import PerformanceRegression

from roberta_fast.benchmarks import measure

_busy = pytest.StashKey[str | None]()  # when the run began, as its own load is no neighbour's


def pytest_configure(config):
    config.stash[_busy] = measure.busy()


def pytest_benchmark_update_json(config, output_json):
    output_json["busy"] = config.stash[_busy]


def pytest_collection_modifyitems(config, items):
    """Where slower kernels are to fail a run, none but ours are compared, with a saved run that exists."""
    compared = config.getoption("benchmark_compare")
    if not config.getoption("benchmark_compare_fail"):
        return
    if isinstance(compared, str) and not (storage := config._benchmarksession.storage).query(compared):
        saved = ", ".join(path.stem for path in storage.query()) or "none"
        raise pytest.UsageError(f"no saved run is called {compared!r}; there are: {saved}")
    config.hook.pytest_deselected(items=[item for item in items if "roberta_fast" not in item.name])
    items[:] = [item for item in items if "roberta_fast" in item.name]


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter, config):
    busy = config.stash[_busy]
    noise = f"These times are noisy: when they began {busy}." if busy else ""
    try:
        yield
    except PerformanceRegression:
        pytest.exit(f"the kernels named above are slower than the saved run's. {noise}", returncode=1)
    if noise and config.getoption("benchmark_enable"):
        terminalreporter.write_line(noise, yellow=True)
