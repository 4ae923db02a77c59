"""Finished runs that the tests of the scripts share."""

import shutil

import pytest
from tiny_runs import GROUPS, run


@pytest.fixture(scope="session", params=GROUPS, ids=lambda group: group.baseline.__name__)
def group(request):
    """A group of methods."""
    return request.param


@pytest.fixture(scope="session")
def finished(group, tmp_path_factory):
    """Directory of a DARE run that nothing interrupted, with a runs_dir and cache of its own."""
    return run(group.dare, tmp_path_factory.mktemp("finished"), curve=True)


@pytest.fixture(scope="session")
def baseline(group, tmp_path_factory):
    """Directory of a finished run of the baseline, in a runs_dir of its own."""
    return run(group.baseline, tmp_path_factory.mktemp("baseline"))


@pytest.fixture
def cached_runs(finished, tmp_path):
    """A runs_dir that holds the cache of `finished` and no run."""
    shutil.copytree(finished.parents[2] / "cache", tmp_path / "cache")
    return tmp_path
