"""Files of a model on the Hugging Face Hub, from the cache or over the network, all of one commit."""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path

from safelora_fast.errors import CheckpointError

SECONDS_TO_ANSWER = 5
SECONDS_BETWEEN_TRIES = 1


class Repository:
    """One repository at one revision; the first file settles the commit, and the others are of that commit.

    Args:
        name: the repository's id.
        revision: a branch, tag or commit; None for the main branch.
        role: "aligned" or "base", for messages.
    """

    def __init__(self, name: str, revision: str | None, role: str) -> None:
        self.name = name
        self.commit: str | None = None
        self._revision = revision
        self._role = role

    def fetch(self, file: str) -> Path:
        """Where the file lies, after fetching it if need be.

        Raises:
            CheckpointError: when the repository does not hold it, or it cannot be fetched.
        """
        found = self.fetch_if_there(file)
        if found is None:
            raise CheckpointError(f"{self.name}: the {self._role} model's repository does not hold {file}")
        return found

    def fetch_if_there(self, file: str, *, or_in_cache: bool = False) -> Path | None:
        """Where the file lies, or None when the repository does not hold it.

        Args:
            file: its path in the repository.
            or_in_cache: answer None too when it is not in the cache and the Hub is out of reach.

        Raises:
            CheckpointError: when it cannot be fetched.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        model = f"the {self._role} model"
        try:
            revision = self.commit or self._revision
            path = Path(hf_hub_download(self.name, file, revision=revision, local_files_only=not self._within_reach))
        except LocalEntryNotFoundError as error:
            if or_in_cache:
                return None
            raise CheckpointError(
                f"{self.name}: there is no such path here, and {file} is neither in the Hub's cache nor within reach; go "
                f"online, or give {model} as a path"
            ) from error
        except EntryNotFoundError:
            return None
        except HFValidationError as error:
            raise CheckpointError(
                f"{self.name}: {model} is neither a local path nor a name that the Hub allows"
            ) from error
        except RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{self.name}: {model} is neither a local path nor a repository that you may read; check the name and "
                "your token"
            ) from error
        except RevisionNotFoundError as error:
            raise CheckpointError(
                f"{self.name}: has no revision {self._revision!r}; check what follows the @ of {model}"
            ) from error
        except (HfHubHTTPError, OSError) as error:
            raise CheckpointError(f"{self.name}: cannot fetch {file}: {str(error).splitlines()[0]}") from error
        self.commit = self.commit or _commit_of(path)
        return path

    @cached_property
    def _within_reach(self) -> bool:
        """Whether the Hub can be connected to, found out once and without noise.

        Left to itself, `hf_hub_download` warns and tries again for 23 seconds for every file that is not in the cache.
        """
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        if constants.HF_HUB_OFFLINE:
            return False
        for pause in (SECONDS_BETWEEN_TRIES, 0):
            try:
                get_hf_file_metadata(hf_hub_url(self.name, "config.json"), timeout=SECONDS_TO_ANSWER)
            except (HfHubHTTPError, HFValidationError):
                return True
            except Exception as error:
                # requests or httpx, by the version of huggingface_hub: both call it Connect… when nobody is there.
                if not type(error).__name__.startswith("Connect"):
                    return True
                time.sleep(pause)
            else:
                return True
        return False


def _commit_of(path: Path) -> str | None:
    """The commit that a file of the cache belongs to: the folder under `snapshots`."""
    return next((inner.name for inner in path.parents if inner.parent.name == "snapshots"), None)
