"""What a path means that a user writes, decided in one place for files of configuration and for options.

~/x, ~name/x     in a home folder, as in a shell
runs/x           relative to the folder in which the command was started, also if it stands in a configuration file
file:///data/x   the same as /data/x
s3://bucket/x    a remote file, by fsspec, for data and exports; also hf://, gs://, https://, and chains (zip::...)
$NAME/x          not replaced: on a command line the shell does it
"""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from moe_train.config.errors import UsageError

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
_LOCAL = re.compile(r"(file|local)://(localhost(?=/))?", re.IGNORECASE)
_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


def expand_user(text: str) -> str:
    """Replace ~ or ~name at the start by a home folder, and file:// by nothing; everything else stays as it is.

    Raises:
        ValueError: If the home folder is not known.
    """
    text = _LOCAL.sub("", text, count=1) if _LOCAL.match(text) else text
    if not text.startswith("~"):
        return text
    user, slash, rest = text[1:].partition("/")
    home = home_folder(user)
    if home is None:
        of = f"of {user!r} " if user else ""
        raise ValueError(
            f"the home folder {of}is not known here ({text!r}): write the whole path, or ./{text} for a name with ~"
        )
    return f"{home.rstrip('/')}{slash}{rest}" or "/"


def _check_path(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty: write a path")
    return expand_user(text)


UserPath = Annotated[str, AfterValidator(_check_path)]


def home_folder(user: str = "") -> str | None:
    """Find a home folder, from HOME or the list of users.

    Args:
        user: Name of the user; empty: the user of this process.

    Returns:
        The folder; None: it is not known, as for a container's user without an entry.
    """
    if not user and os.path.expandvars("${HOME}") == "":  # set, but empty: expanduser would take /
        return None
    found = os.path.expanduser(f"~{user}")
    return None if found.startswith("~") else found


def is_remote(text: str) -> bool:
    """Return whether a path is a URL or a chain of them, for fsspec. A file of this name is local all the same."""
    return _REMOTE.match(text) is not None and not os.path.exists(text)


def local_path(text: str, field: str) -> Path:
    """Return the path of what must be on a file system of this host, such as a run's folder.

    Args:
        text: Path as the user wrote it.
        field: Name of the field or option, for messages.

    Raises:
        UsageError: If it is remote, has a variable that nobody replaced, or a home folder that is not known.
    """
    try:
        expanded = expand_user(text)
    except ValueError as error:
        raise UsageError(f"{field}: {error}") from error
    if is_remote(expanded):
        raise UsageError(
            f"{field} ({text!r}) is remote: it must be on a mounted file system of every host; data.paths and "
            "`moe-train checkpoint export` take remote paths"
        )
    if variable := unreplaced_variable(expanded):
        raise UsageError(f"{field} ({text!r}): {variable}")
    return Path(expanded)


def unreplaced_variable(text: str) -> str:
    """Describe a variable in a path that does not exist; empty: there is none."""
    found = _VARIABLE.search(text)
    if found is None:
        return ""
    end = text.find("/", found.start())
    if os.path.lexists(text if end < 0 else text[:end]):  # a file or folder of this very name
        return ""
    return f"{found[0]} is not replaced here: write its value, or give the path as an option, where the shell does it"
