"""A cluster of two hosts for the tests of a module, and the training that they run on it."""

import contextlib
from collections.abc import Iterator

import pytest

from tests.cluster.hosts import ClusterUnavailable, VirtualCluster, virtual_cluster
from tests.cluster.training import Training, prepare


@pytest.fixture(scope="module")
def cluster() -> Iterator[VirtualCluster]:
    """host1 and host2, with two slots each."""
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(virtual_cluster(num_hosts=2, slots=2))
        except ClusterUnavailable as error:
            pytest.skip(str(error))
        yield made  # what goes wrong with it from now on is a failure


@pytest.fixture(scope="module")
def training(cluster: VirtualCluster) -> Training:
    """A short training in the cluster's folder, whose text is tokenized already."""
    return prepare(cluster)


@pytest.fixture
def idle(cluster: VirtualCluster) -> Iterator[None]:
    """All hosts up and idle before and after a test."""
    cluster.mend()
    yield
    cluster.mend()
