"""The health check: one real question through index, prompt and engine of a release."""

from __future__ import annotations

import threading
from collections.abc import Callable

from contracts.errors import RatchetError, ServiceError
from resources import releases
from resources.rag import Rag
from serving.engines import probe
from serving.engines.record import EngineRecord

#: Any question will do: passages are taken whatever their score, and a token must come out.
QUESTION = "What is a release and how is it made?"
OpenRag = Callable[[releases.Installed], Rag]


class Prepared:
    """The question, retrieved and rendered in a thread while the engine starts."""

    def __init__(self, installed: releases.Installed, open_rag: OpenRag) -> None:
        self._installed, self._open_rag = installed, open_rag
        self._messages: list[dict[str, str]] = []
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def ask(self, engine: EngineRecord) -> None:
        """Ask the engine. Raises what went wrong on the way, and ServiceError without a token."""
        self._thread.join()
        if self._problem is not None:
            raise self._problem
        answer = probe.chat(
            engine.url,
            engine.model,
            self._messages,
            max_tokens=self._installed.answers.max_tokens,
            timeout=60.0,
        )
        if not (answer.get("usage") or {}).get("completion_tokens"):
            raise ServiceError("The engine gives no token to a real prompt.", where=engine.url)

    def _work(self) -> None:
        rag: Rag | None = None
        try:
            rag = self._open_rag(self._installed)
            passages = rag.retrieve(QUESTION)
            if not passages:
                raise ServiceError(
                    "The release's index finds nothing.",
                    where=str(self._installed.index),
                    next="rebuild it: `dvc repro index`",
                )
            self._messages = rag.messages(QUESTION, passages)
        except RatchetError as error:
            self._problem = error
        except Exception as error:  # the index library has errors of its own
            self._problem = ServiceError(
                f"The release's index cannot be searched: {type(error).__name__}: {error}",
                where=str(self._installed.index),
                next="rebuild it: `dvc repro index`",
            )
        finally:
            if rag is not None:
                rag.close()


def open_real_rag(installed: releases.Installed) -> Rag:
    """The release's retrieval and prompt, with no floor on the score."""
    from resources.embedding import open_embedder
    from resources.index import open_index

    embedder = open_embedder(installed.vectors, None, threads=1, device="cpu")
    return Rag(
        open_index(installed.index),
        embedder,
        installed.prompt(),
        top_k=installed.answers.top_k,
        min_score=-1.0,
        sentences=installed.answers.sentences,
    )
