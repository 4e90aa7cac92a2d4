"""Whether there is a web to download from: TFDS would retry for minutes before it gave up."""

import http.client
import threading
import urllib.request

_SECONDS = 8.0


def cannot_reach(url: str) -> str | None:
    """Why a web address does not answer within seconds, looking up its name included; else None."""
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=_SECONDS).close()
            outcome.append(None)
        except (OSError, http.client.HTTPException) as error:  # urllib's own are OSErrors too
            outcome.append(str(error))

    thread = threading.Thread(target=ask, daemon=True)  # a look-up cannot be stopped, only left
    thread.start()
    thread.join(_SECONDS)
    return outcome[0] if outcome else f"no answer in {_SECONDS:.0f} s"
