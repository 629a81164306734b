"""The hub of models: whether it can be reached, and whether it has a model.

Its own downloads ask again and again for half a minute when nobody answers; so it is asked once,
and shortly, before anything is fetched.
"""

from __future__ import annotations

import os

from captum_attn._checks import shown_error
from captum_attn.errors import InputError

__all__ = ["only_kept"]

SECONDS = 5.0  # that the hub has for its answer


def only_kept(name: str, file: str) -> bool:
    """Whether a model is read from the cache alone, because the hub does not answer.

    Args:
        name (str): the hub's id, "owner/model" or "model".
        file (str): one of the model's, which the cache has if it has the model.

    Returns:
        bool: True where the hub is not to be asked, or cannot be, and the cache has the file.

    Raises:
        InputError: where the hub has no such model; or cannot be reached, and the cache has
            nothing either.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        kept = isinstance(try_to_load_from_cache(name, file), str)
    except HFValidationError as problem:
        raise InputError(f"'{name}' is no folder, and no id that the hub could have") from problem
    asked = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if asked or constants.HF_HUB_OFFLINE:
        if not kept:
            raise InputError(
                f"'{name}' is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; unset "
                "it, or give a folder"
            )
        return True
    try:
        HfApi().model_info(name, timeout=SECONDS)
    except RepositoryNotFoundError as problem:  # one that needs a login, too
        raise InputError(
            f"the hub has no model '{name}', or it is not for everybody (hf auth login)"
        ) from problem
    except HfHubHTTPError as problem:
        if kept:
            return True
        raise InputError(f"the hub refuses '{name}': {shown_error(problem)}") from problem
    except Exception as problem:  # of sockets, proxies, certificates and whatever speaks HTTP
        if kept:
            return True
        raise InputError(
            f"the hub cannot be reached, so '{name}' cannot be fetched ({shown_error(problem)}); "
            "give a folder, or look at the network"
        ) from problem
    return False
