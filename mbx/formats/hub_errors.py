"""What the hub client raises, in words that say what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from converters.errors import DeviceError, StorageError
from mbx.text import redacted

_TOWARDS = {"download": "from", "upload": "to"}


@contextmanager
def hub_errors(repo_id: str, revision: str | None, *, what: str = "download") -> Iterator[None]:
    """Turn what the hub client raises into one StorageError that says what to do; `what` was under way."""
    from huggingface_hub import constants, errors, get_token
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    def failed(fact: str, hint: str, error: Exception) -> StorageError:
        details = [redacted(line) for line in str(error).splitlines() if line.strip()]
        return StorageError(redacted(fact), hint=redacted(hint), details=details)

    where = constants.ENDPOINT
    at = f"`{repo_id}`" + (f" at revision `{revision}`" if revision else "")
    try:
        yield
    except errors.HFValidationError as error:
        raise failed(f"`{repo_id}` is not a valid model name", "name a hub model as `org/name`", error) from error
    except errors.GatedRepoError as error:
        hint = f"accept its terms at {where}/{repo_id}, then run `hf auth login` or set HF_TOKEN"
        raise failed(f"access to `{repo_id}` is gated", hint, error) from error
    except errors.RevisionNotFoundError as error:
        raise failed(f"`{repo_id}` has no revision `{revision}`", f"see {where}/{repo_id}/tree/main", error) from error
    except errors.RepositoryNotFoundError as error:
        hint = "check the spelling; for a private model run `hf auth login` or set HF_TOKEN"
        raise failed(f"no model `{repo_id}` on {where} that this user may read", hint, error) from error
    except (errors.RevisionResolutionError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            hint = "unset HF_HUB_OFFLINE, or download it on a connected machine and copy the cache folder"
            raise failed(f"{at} is not in the cache, and HF_HUB_OFFLINE is set", hint, error) from error
        hint = "check the network and HF_ENDPOINT, or name a local folder"
        raise failed(f"{where} cannot be reached, and {at} is not in the cache", hint, error) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            had = "the token" if get_token() else "to go on without a token"
            raise failed(
                f"{where} refused {had} for `{repo_id}` (HTTP {status})", _login(repo_id, what), error
            ) from error
        raise failed(f"{where} answered HTTP {status} for {at}", "try again later", error) from error
    except (HTTPError, errors.XetDownloadError, errors.FileMetadataError) as error:
        hint = "check the network and HF_ENDPOINT, then run again: finished files are kept"
        raise failed(f"the {what} of {at} {_TOWARDS[what]} {where} failed", hint, error) from error
    except ConnectionError as error:
        hint = "check the network, then run again: finished files are kept"
        raise failed(f"the connection to {where} broke off for {at}", hint, error) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free space, or set HF_HOME to a larger disk"
            raise DeviceError(f"no space left for {at} in {constants.HF_HUB_CACHE}", hint=hint) from error
        hint = "check the cache folder's rights, or set HF_HOME"
        raise failed(f"{at} could not be stored: {error}", hint, error) from error


def _login(repo_id: str, what: str) -> str:
    if what == "upload":
        return f"log in with a token that may write to {repo_id.partition('/')[0]}: `hf auth login`, or set HF_TOKEN"
    return "renew the token: `hf auth login`, or set HF_TOKEN"
