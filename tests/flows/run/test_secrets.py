"""Keys and tokens of the environment are in nothing that a run writes, and none can be written into a configuration."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_DATABASE_CONNECTION_URL

from lmq.errors import InputError
from lmq_flows.config.run import parse_run_config
from tests.flows.conftest import tiny_config
from tests.flows.processes import forking_runner, write_config
from tests.storage.conftest import s3_environment
from tests.storage.s3_faults import s3_with_faults

pytestmark = pytest.mark.slow

SECRETS = {
    "HF_TOKEN": "hf_pLaNtEdToKeN0123456789",
    "AWS_SECRET_ACCESS_KEY": "pLaNtEdSeCrEt/0123456789",
    "AWS_SESSION_TOKEN": "pLaNtEdSeSsIoN0123456789",
    "FSSPEC_S3_SECRET": "pLaNtEdOpTiOn0123456789",
}


def holds_secret(content: bytes) -> bool:
    return any(secret.encode() in content for secret in SECRETS.values())


def test_a_run_on_s3_is_cached_looked_after_and_writes_no_secret(server, tiny_llama, tmp_path, monkeypatch):
    """A whole run with its store in a bucket: once, again, planned, listed, verified and swept."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with s3_with_faults() as s3:
        environment = {**s3_environment(s3.endpoint), **SECRETS, "FSSPEC_S3_KEY": "test-key"}
        environment |= {"PREFECT_API_URL": PREFECT_API_URL.value(), "PREFECT_LOGGING_LEVEL": "DEBUG"}
        s3.add("slow down", "PUT", "/blobs/", times=3)
        s3.add("drop upload", "PUT", "/blobs/", times=2)
        with forking_runner(**environment) as runner:
            url = "s3://bucket/lmq"
            config = write_config(tiny_llama, tmp_path, "night", store=url, strategies=["uniform"], **SHORT)
            printed = [runner.run(config).finish(), runner.run(config).finish()]
            for command in (
                ["plan", str(config)],
                *(["store", what, "--store", url] for what in ("ls", "verify", "gc")),
            ):
                printed.append(runner.start(*command, place=tmp_path).finish())
        plan, ls, verify, gc = printed[2:]
        assert re.search(r"evaluate +1/1 .*\(1 cached\)", printed[1])
        assert "never made" not in plan
        assert "night" in ls
        assert "finished" in ls
        assert "every artifact is sound" in verify
        assert "removed 0 artifacts" in gc
        results = tmp_path / "runs" / "night"
        assert (results / "report.html").is_file()
        assert list((results / "checkpoints").rglob("*.safetensors"))
        bucket = _objects_of(s3.endpoint)
        assert len(bucket) > 20
        assert {key for key, content in bucket.items() if holds_secret(content)} == set()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    files += [path for path in _servers_home().rglob("*") if path.is_file()]
    assert any(path.suffix == ".db" for path in files), "the server's database was not looked at"
    assert [path for path in files if holds_secret(path.read_bytes())] == []
    assert not holds_secret("".join(printed).encode())


SHORT = {
    "calibration__sequences": 3,
    "calibration__sequence_length": 32,
    "evaluation__tokens": 256,
    "evaluation__window": 64,
    "evaluation__stride": 32,
}


def _objects_of(endpoint: str) -> dict[str, bytes]:
    import boto3

    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
    )
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="bucket")
    keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
    return {key: client.get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys}


def _servers_home() -> Path:
    """Where the test's server keeps its database."""
    value = PREFECT_SERVER_DATABASE_CONNECTION_URL.value()
    return Path((value if isinstance(value, str) else value.get_secret_value()).partition("///")[2]).parent


@pytest.mark.parametrize("url", ["s3://key:sEcReT@bucket/lmq", "s3://bucket/lmq?secret=sEcReT"])
def test_a_secret_in_the_stores_url_is_refused_without_being_repeated(tiny_llama, tmp_path, url):
    data = tiny_config(tiny_llama, tmp_path).model_dump(mode="json")
    with pytest.raises(InputError, match="put keys where the file system looks for them") as caught:
        parse_run_config({**data, "store": url})
    assert "sEcReT" not in str(caught.value)


def test_a_configuration_has_no_place_for_storage_options(tiny_llama, tmp_path):
    data = tiny_config(tiny_llama, tmp_path).model_dump(mode="json")
    with pytest.raises(InputError, match="unknown key 'storage_options'") as caught:
        parse_run_config({**data, "storage_options": {"secret": "sEcReT"}})
    assert "sEcReT" not in str(caught.value)
    assert os.environ.get("AWS_SECRET_ACCESS_KEY") != "sEcReT"
