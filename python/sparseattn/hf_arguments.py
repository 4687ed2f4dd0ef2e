"""Arguments that transformers 5 names differently from version to version."""

from __future__ import annotations

import inspect
from typing import Any


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument by which the model takes a cache, in a call or in ``generate``.

    ``cache``, or in transformers before 5.24 ``past_key_values``, of which later ones warn.
    """
    forward = getattr(model, "forward", None)
    names = {} if forward is None else inspect.signature(forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}
