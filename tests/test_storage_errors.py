"""What is found out of the errors of Google Cloud Storage's clients and array_record; see also cli/test_bad_input."""

import errno

import pytest

from fdm_jax.storage_errors import disk_full, file_trouble, refusal, system_fails

TENSORSTORE = (
    'ABORTED: Error opening "zarr" driver: Error reading ".zarray" in OCDBT database at gs://bucket/run/: Error reading '
    "gs://bucket/run/manifest.ocdbt: All 32 retry attempts failed: CURL error Couldn't connect to server [curl_code='7']"
)


def clients():
    """(error, what is said of it) where the service or the network fails."""
    aiohttp, gcsfs = pytest.importorskip("aiohttp"), pytest.importorskip("gcsfs")
    import fsspec.exceptions
    import requests
    from google.api_core import exceptions as api
    from google.auth import exceptions as auth

    return [
        (ValueError(TENSORSTORE), "Couldn't connect to server"),
        (gcsfs.retry.HttpError({"code": 503, "message": "unavailable"}), "unavailable, 503"),
        (gcsfs.retry.HttpError({"code": 429, "message": "slow down"}), "slow down, 429"),
        (aiohttp.ServerDisconnectedError(), "Server disconnected"),
        (fsspec.exceptions.FSTimeoutError(), "FSTimeoutError"),
        (api.ServiceUnavailable("try later"), "503 try later"),
        (api.RetryError("Timeout of 120.0s exceeded", api.ServiceUnavailable("try later")), "Timeout of 120.0s"),
        (auth.TransportError("no metadata server"), "no metadata server"),
        (requests.ConnectionError("Connection aborted."), "Connection aborted."),
    ]


def test_outage_of_google_cloud_storage():
    for error, said in clients():
        behind = RuntimeError("async save failed")
        behind.__cause__ = error
        trouble = file_trouble(behind)
        assert trouble is not None and trouble.may_pass and not trouble.damage, error
        assert said in trouble.sentence and trouble.sentence.startswith("Google Cloud Storage cannot be reached (")
        assert refusal(error) is None and not disk_full(error), error


def test_refusals_are_no_outage():
    gcsfs = pytest.importorskip("gcsfs")
    from google.api_core import exceptions as api
    from google.auth import exceptions as auth

    for error, said in [
        (auth.DefaultCredentialsError("none found"), "does not know who asks (none found)"),
        (gcsfs.retry.HttpError({"code": 401, "message": "Invalid Credentials"}), "does not know who asks"),
        (api.Forbidden("no"), "does not allow it (403 no)"),
        (OSError("Forbidden: https://storage.googleapis.com/"), "does not allow it"),
        (ValueError("PERMISSION_DENIED: Error reading gs://bucket/run/"), "does not allow it"),
    ]:
        assert said in refusal(error) and file_trouble(error) is None, error


@pytest.mark.parametrize("error", [None, KeyError("x"), OSError("x"), FileNotFoundError(errno.ENOENT, "none", "/a/x")])
def test_other_errors_are_neither(error):
    assert file_trouble(error) is None and refusal(error) is None and not disk_full(error)


def test_what_array_record_says():
    said = "reading /a/x y.array_record; at byte 0; Could not read from the underlying reader"
    trouble = file_trouble(ValueError(f"read() failed: Stale file handle; {said}"))
    assert trouble.sentence.startswith("/a/x y.array_record cannot be used (Stale file handle): wait until")
    assert trouble.may_pass and not trouble.damage
    assert file_trouble(ValueError(f"Corrupted; {said}")) is None


def test_damage():
    """A disk says of a block that it cannot read what a file server says of one that it does not get."""
    assert file_trouble(OSError(errno.EIO, "Input/output error", "/a/x")).damage
    assert not file_trouble(OSError(errno.ESTALE, "Stale file handle", "/a/x")).damage


@pytest.mark.parametrize("number, damage", [(errno.EISDIR, True), (errno.EIO, True), (errno.EACCES, False)])
def test_what_may_be_the_damage_of_one_file(number, damage):
    """A checkpoint of which a file has become a folder is passed over, as one that is damaged is."""
    assert file_trouble(OSError(number, "?", "/a/x")).damage == damage
    assert system_fails(OSError(number, "?", "/a/x")) != damage
