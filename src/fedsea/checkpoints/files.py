"""Where the files of a checkpoint come from: a folder, or a repository of the Hugging Face hub fetched file by file."""

from pathlib import Path
from typing import Protocol

from fedsea.errors import ModelNotFoundError
from fedsea.text import first_line

HUB_TIMEOUT = 10.0  # seconds


class ModelFiles(Protocol):
    """The files of one checkpoint."""

    where: str  # what to call the place in a message

    def has(self, filename: str) -> bool:
        """Whether the checkpoint has such a file, here or at the hub."""

    def on_disk(self, filename: str) -> bool:
        """Whether the file is on this machine."""

    def path(self, filename: str) -> Path | None:
        """The file on this machine, fetched if need be; None if the checkpoint has no such file.

        A ModelNotFoundError if it has to be fetched and cannot be.
        """


class FolderFiles:
    """The files of a folder."""

    def __init__(self, folder: Path, where: str | None = None) -> None:
        self.where = where or str(folder)
        self._folder = folder

    def has(self, filename: str) -> bool:
        return (self._folder / filename).is_file()

    def on_disk(self, filename: str) -> bool:
        return self.has(filename)

    def path(self, filename: str) -> Path | None:
        return self._folder / filename if self.has(filename) else None


class HubFiles:
    """The files of a repository of the Hugging Face hub, all of one commit; what is needed is fetched."""

    def __init__(self, repository: str, where: str, revision: str | None, names: frozenset[str]) -> None:
        self.where = where
        self._repository, self._revision, self._names = repository, revision, names

    def has(self, filename: str) -> bool:
        return filename in self._names

    def on_disk(self, filename: str) -> bool:
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(self._repository, filename, revision=self._revision), str)

    def path(self, filename: str) -> Path | None:
        if filename not in self._names:
            return None
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self._repository, filename, revision=self._revision))
        except (_http_error(), OSError) as error:
            raise ModelNotFoundError(f"{filename} of {self.where} could not be fetched: {first_line(error)}") from None


def hub_files(repository: str) -> ModelFiles:
    """The files of a repository of the hub, of its newest commit; without a connection, of what the hub's cache has.

    A ModelNotFoundError if there is no such repository, it may not be read, or the hub is out of reach and nothing is
    cached.
    """
    # Imported here: a folder or a packaged model needs nothing of the hub.
    from huggingface_hub import HfApi, errors, try_to_load_from_cache

    where = f"hub repository {repository}"
    try:
        # One request without retries; a download of a missing file would retry for half a minute when offline.
        info = HfApi().model_info(repository, timeout=HUB_TIMEOUT)
    except errors.GatedRepoError:
        raise ModelNotFoundError(
            f"{where} is gated: accept its terms on its page, then log in with `hf auth login`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ModelNotFoundError(f"there is no {where}, or it is private: log in with `hf auth login`") from None
    except (_http_error(), OSError) as error:
        cached = try_to_load_from_cache(repository, "config.json")
        if not isinstance(cached, str):
            raise ModelNotFoundError(
                f"the Hugging Face hub could not be reached for {repository} ({type(error).__name__}), and nothing of "
                "it is cached here: check the connection, or give a folder that holds the model"
            ) from None
        return FolderFiles(Path(cached).parent, where)
    return HubFiles(repository, where, info.sha, frozenset(file.rfilename for file in info.siblings or ()))


def _http_error() -> type[Exception]:
    """The base error of the HTTP library that the installed hub client was built on, which changes with its version."""
    from huggingface_hub import errors

    kind: type[Exception] = vars(errors)["HTTPError"]
    return kind
