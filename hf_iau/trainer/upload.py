"""What went wrong when a model was to be uploaded, in words that say what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from hf_iau.errors import PublishError

# The base of every error of huggingface_hub's HTTP client, whichever client its version uses.
_HTTP_ERROR: type[BaseException] = HfHubHTTPError.__bases__[0]


@contextlib.contextmanager
def hub_errors_explained(repository: str) -> Iterator[None]:
    """Turn what huggingface_hub raises, after its own retries, into `PublishError`s that say what to do."""
    try:
        yield
    except PublishError:
        raise
    except Exception as error:
        sentence = _explanation(error, repository)
        if sentence is None:
            raise
        raise PublishError(f"{sentence} Nothing local was changed; push again when it is mended.") from error


def _explanation(error: BaseException, repository: str) -> str | None:
    """What an exception (or what caused it) means, or None for one that has nothing to do with the Hub."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LocalTokenNotFoundError):
            return f"There is no token to push to {repository} with: run `hf auth login`, set HF_TOKEN, or pass token=."
        if isinstance(cause, OfflineModeIsEnabled):
            return f"The Hub is switched off (HF_HUB_OFFLINE), so nothing can be pushed to {repository}: unset it."
        if isinstance(cause, HfHubHTTPError):
            return _of_status(cause, repository)
        if isinstance(cause, HFValidationError):
            return f"{repository!r} is no name of a repository ({cause}): set hub_model_id=."
        if isinstance(cause, (_HTTP_ERROR, ConnectionError, TimeoutError)):
            return (
                f"The connection to the Hub broke while pushing to {repository} ({type(cause).__name__}: {cause}). "
                "What was uploaded is not in force without its commit."
            )
        cause = cause.__cause__
    return None


def _of_status(error: HfHubHTTPError, repository: str) -> str:
    status = error.response.status_code if error.response is not None else None
    if status == 401:
        return (
            f"The Hub refused the token, or there was none, for {repository} (401): run `hf auth login`, set HF_TOKEN, "
            "or pass token= with one that can write."
        )
    if status == 403:
        return f"The token may not write to {repository} (403): use one with write access, or another hub_model_id."
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return f"{repository} was not found on the Hub ({status}): check hub_model_id and that the token can see it."
    return f"The Hub answered {status} to the push to {repository}: {error}."
