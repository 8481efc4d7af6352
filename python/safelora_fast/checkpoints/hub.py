"""Files of a model on the Hugging Face Hub, from the cache or over the network, all from one commit."""

from __future__ import annotations

import contextlib
import math
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS_TO_ANSWER = 5
SECONDS_BETWEEN_TRIES = 1
SECONDS_MISSED = 60
_missed: dict[str, float] = {}  # when an endpoint was unreachable, so that the next repository does not retry


class Repository:
    """One repository at one revision. The first downloaded file fixes the commit, and all others come from that commit.

    Args:
        name: the id of the repository.
        revision: a branch, tag or commit; None for the main branch.
        what: the name in messages, e.g. "the aligned model".
        hint: the end of messages about a name that is neither a path nor a repository.

    Attributes:
        commit: the commit of the downloaded files; None before the first.
    """

    def __init__(self, name: str, revision: str | None, what: str, hint: str = "") -> None:
        self.name = name
        self.revision = revision
        self.commit: str | None = None
        self._what = what
        self._hint = hint

    def fetch(self, file: str) -> Path:
        """Return the path of a file in the Hub's cache, and download the file if necessary.

        Raises:
            CheckpointError: the repository lacks the file, or the download failed.
        """
        found = self.fetch_if_there(file)
        if found is None:
            raise CheckpointError(f"{self.name}: {self._what}'s repository does not hold {file}")
        return found

    def fetch_if_there(self, file: str, *, or_in_cache: bool = False) -> Path | None:
        """Return the path of a file in the Hub's cache; None if the repository lacks the file.

        Args:
            file: its path in the repository.
            or_in_cache: also return None if the file is not cached and the Hub is unreachable.

        Raises:
            CheckpointError: the download failed.
        """
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        revision = self.commit or self.revision
        try:
            path = Path(hf_hub_download(self.name, file, revision=revision, local_files_only=not self.within_reach))
        except LocalEntryNotFoundError as error:
            if or_in_cache or try_to_load_from_cache(self.name, file, revision=revision) is _CACHED_NO_EXIST:
                return None
            raise CheckpointError(
                f"{self.name}: there is no such path here, and {file} is neither in the Hub's cache nor within reach; go "
                f"online, or give {self._what} as a path{self._hint}"
            ) from error
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise CheckpointError(f"{self.name}: {self._reason(error, file)}") from error
        self.commit = self.commit or _commit_of(path)
        return path

    def _reason(self, error: Exception, file: str) -> str:
        from huggingface_hub import constants, errors

        match error:
            case errors.HFValidationError():
                return f"{self._what} is neither a local path nor a name that the Hub allows{self._hint}"
            case errors.GatedRepoError():
                page = f"{constants.ENDPOINT}/{self.name}"
                return f"{self._what} is gated: accept its terms on {page}, then log in with `hf auth login` or set HF_TOKEN"
            case errors.RepositoryNotFoundError():
                return (
                    f"{self._what} is neither a local path nor a repository that you may read; check the name and your token"
                    f"{self._hint}"
                )
            case errors.RevisionNotFoundError():
                return f"has no revision {self.revision!r}; check what follows the @ of {self._what}"
        return f"cannot fetch {file}: {str(error).splitlines()[0]}"

    @cached_property
    def within_reach(self) -> bool:
        """Whether the Hub answers."""
        from huggingface_hub import hf_hub_url

        return is_within_reach(hf_hub_url(self.name, "config.json"))


def is_within_reach(url: str) -> bool:
    """Return whether the Hub answers a HEAD request for one of its URLs.

    Without this check, `hf_hub_download` and `load_dataset` warn and retry for half a minute.
    """
    from huggingface_hub import constants, get_hf_file_metadata
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.HF_HUB_OFFLINE or time.monotonic() - _missed.get(constants.ENDPOINT, -math.inf) < SECONDS_MISSED:
        return False
    for pause in (SECONDS_BETWEEN_TRIES, 0):
        try:
            get_hf_file_metadata(url, timeout=SECONDS_TO_ANSWER)
        except (HfHubHTTPError, HFValidationError):
            return True
        except Exception as error:
            # Connect… is the error of requests and httpx (huggingface_hub uses either) for an unreachable host.
            if not type(error).__name__.startswith("Connect"):
                return True
            time.sleep(pause)
        else:
            return True
    _missed[constants.ENDPOINT] = time.monotonic()
    return False


@contextlib.contextmanager
def offline_unless(within_reach: bool, *settings: Any) -> Iterator[None]:
    """Make libraries use only the Hub's cache while the Hub is unreachable.

    Args:
        within_reach: whether the Hub answers.
        settings: modules whose `HF_HUB_OFFLINE` the libraries read.
    """
    former = [module.HF_HUB_OFFLINE for module in settings]
    try:
        for module in settings:
            module.HF_HUB_OFFLINE = module.HF_HUB_OFFLINE or not within_reach
        yield
    finally:
        for module, value in zip(settings, former, strict=True):
            module.HF_HUB_OFFLINE = value


def _commit_of(path: Path) -> str | None:
    """Return the commit of a file in the cache: the name of its folder under `snapshots`."""
    return next((inner.name for inner in path.parents if inner.parent.name == "snapshots"), None)
