from __future__ import annotations

import pytest

from tests.storage.s3_faults import s3_with_faults


@pytest.fixture(scope="session")
def s3_server():
    with s3_with_faults() as faults:
        yield faults


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The proxied S3 server, without faults at first, set as a user would: in the environment."""
    s3_server.clear()
    for name, value in s3_environment(s3_server.endpoint).items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield s3_server
    s3_server.clear()


def s3_environment(endpoint):
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
