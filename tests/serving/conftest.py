"""The quickstart's model behind a server, once for all tests of this folder."""

import pytest

from tests.serving.running import load_tiny, serving


@pytest.fixture(scope="package")
def tiny():
    """The pipeline; tests leave it as they found it."""
    return load_tiny()


@pytest.fixture(scope="package")
def server(tiny):
    from echo4o.serving.served_model import ServedModel

    with serving(ServedModel(tiny)) as running:
        yield running


@pytest.fixture
def client(server):
    return server.client()
