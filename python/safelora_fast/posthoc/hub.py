"""Files of a model on the Hugging Face Hub, from the cache or over the network, all of one commit."""

from __future__ import annotations

from pathlib import Path

from safelora_fast.errors import CheckpointError


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
            path = Path(hf_hub_download(self.name, file, revision=self.commit or self._revision))
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


def _commit_of(path: Path) -> str | None:
    """The commit that a file of the cache belongs to: the folder under `snapshots`."""
    return next((inner.name for inner in path.parents if inner.parent.name == "snapshots"), None)
