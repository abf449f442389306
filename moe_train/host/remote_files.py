"""Remote file systems by fsspec (s3://, gs://, hf:// and others), with one message where something fails."""

import contextlib
from collections.abc import Iterator
from typing import Any

from moe_train.config.errors import UsageError

# Packages of the protocols that are used most; what fsspec says of others is passed on.
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_PACKAGES |= {"http": "aiohttp", "https": "aiohttp", "sftp": "paramiko", "ssh": "paramiko", "hf": "huggingface_hub"}


def open_remote(url: str, field: str) -> tuple[Any, str]:
    """Open the file system of a URL.

    Args:
        url: URL, or a chain of them.
        field: Name of the field or option, for messages.

    Returns:
        The file system, an `fsspec.AbstractFileSystem`, and the path in it.

    Raises:
        UsageError: If nothing knows the protocol, its package is missing, or the file system cannot be opened.
    """
    import fsspec

    protocol = url.partition("://")[0].partition("::")[0]
    try:
        opened, path = fsspec.url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        cure = f"pip install {package}" if package else str(error)
        raise UsageError(f"{field} ({url!r}): {protocol}:// needs a package that is not installed: {cure}") from error
    except ValueError as error:
        if "not known" not in str(error):
            raise UsageError(f"{field} ({url!r}): cannot be opened: {error}") from error
        known = ", ".join(f"{name}://" for name in ("s3", "gs", "hf", "abfs", "https"))
        raise UsageError(f"{field} ({url!r}): {protocol}:// is no protocol that fsspec knows, as {known}") from error
    except Exception as error:  # what a file system raises is its own: credentials, network, settings
        raise UsageError(f"{field} ({url!r}): cannot be opened: {_reason(error)}") from error
    return opened, path


@contextlib.contextmanager
def remote_errors(url: str, field: str, what: str) -> Iterator[None]:
    """Turn whatever a remote file system raises into one message.

    Args:
        url: URL that is used.
        field: Name of the field or option.
        what: What cannot be done, such as "cannot be read".

    Raises:
        UsageError: If the block raises an error of another kind.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # each file system has errors of its own, most without a common base
        raise UsageError(f"{field} ({url!r}): {what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
