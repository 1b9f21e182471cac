"""The index on a Qdrant server: one collection a version, one alias that says which is published.

In: an opened index directory. Out: the collection ``ratchet-<content id>`` with the same points,
its metadata holding the manifest (set last: a collection without one is no index) and the documents
that must not be shown. The alias ``ratchet`` moves in one step. Whatever dies half-way leaves a
collection without manifest, which the next run completes: it asks which points are there and sends
the rest. Errors that pass (429, 5xx, no connection) are waited out with growing pauses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from contracts.errors import InputError, ServiceError
from contracts.records import Chunk, Filter
from contracts.settings import Settings
from resources.index.edge import EdgeIndex
from resources.index.filters import FIELDS, clauses
from resources.index.search import DENSE, OVERSAMPLING, WORDS, Lookup, Point, PointIndex

ALIAS = "ratchet"
BATCH = 500  # points a request: 500 x 384 float32 are about 4 MB of JSON
IN_FLIGHT = 4  # batches sent and not yet confirmed; more are not even read from the directory
TRIES = 8  # pauses of 0.2, 0.4 … 12.8 s: a server may take 25 s to come back
SETTLE_SECONDS = 600.0  # for the server's optimizer after an upload


def connect(settings: Settings) -> Any:
    """A client of QDRANT_URL; the key comes from QDRANT_API_KEY."""
    from qdrant_client import QdrantClient

    return QdrantClient(url=settings.qdrant_url, api_key=settings.qdrant_api_key, timeout=60)


def collection_of(content: str) -> str:
    """The name of the collection that holds the index of this content id."""
    return f"ratchet-{content[:32]}"


def retrying(call: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """``call(...)``, again after an error that passes. Raises ServiceError when it does not."""
    for number in range(TRIES):
        try:
            return call(*args, **named)
        except Exception as error:
            pause = _pause(error, number)
            if pause is None:
                raise
            if number == TRIES - 1:
                raise ServiceError(
                    f"The Qdrant server did not answer {TRIES} times: {error}",
                    where="QDRANT_URL",
                    next="look at the server; then run the same command again, it goes on",
                ) from None
            time.sleep(pause)
    raise AssertionError("unreachable")


def _pause(error: Exception, number: int) -> float | None:
    """Seconds to wait before the next try; None for errors that would come again."""
    import httpx
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    if isinstance(error, ResourceExhaustedResponse):
        return float(error.retry_after_s)
    status = error.status_code if isinstance(error, UnexpectedResponse) else None
    lost = isinstance(error, ResponseHandlingException) and isinstance(
        error.source, httpx.TransportError
    )
    passes = lost or status in (408, 429, 500, 502, 503, 504)
    return 0.2 * 2**number if passes else None


class ServerIndex(PointIndex):
    """A :class:`VectorIndex` over a collection. Raises InputError when its upload is unfinished."""

    def __init__(self, client: Any, collection: str) -> None:
        self._client, self.collection = client, collection
        held = describe(client, collection) or {}
        if "manifest" not in held:
            raise InputError(
                "There is no whole index in this collection.",
                where=f"QDRANT_URL, collection {collection}",
                next="publish again: `ratchet index publish`",
            )
        self.manifest = held["manifest"]

    def _find(self, lookup: Lookup) -> list[Point]:
        from qdrant_client import models

        if lookup.words is not None:
            indices, values = lookup.words
            query: Any = models.SparseVector(indices=indices, values=values)
            using, params = WORDS, None
        else:
            again = models.QuantizationSearchParams(rescore=True, oversampling=OVERSAMPLING)
            query, using = lookup.vector, DENSE
            params = models.SearchParams(exact=lookup.exact, hnsw_ef=lookup.ef, quantization=again)
        if lookup.ids is None:
            only = _filter(lookup.only)
        else:
            only = models.Filter(must=[models.HasIdCondition(has_id=list(lookup.ids))])
        found = retrying(
            self._client.query_points,
            self.collection,
            query=query,
            using=using,
            limit=lookup.limit,
            query_filter=only,
            search_params=params,
            with_payload=lookup.payload,
        )
        return [Point(int(item.id), float(item.score), item.payload) for item in found.points]

    def chunks(self, documents: Collection[str] | None = None) -> Iterator[Chunk]:
        if documents is not None:
            yield from self._of(documents)
            return
        for start in range(0, self.count, 1000):
            ids = list(range(start, min(start + 1000, self.count)))
            found = retrying(self._client.retrieve, self.collection, ids)
            for point in sorted(found, key=lambda item: int(item.id)):
                yield Chunk.model_validate(point.payload)

    def _of(self, documents: Collection[str]) -> list[Chunk]:
        from qdrant_client import models

        theirs = models.MatchAny(any=sorted(documents))
        only = models.Filter(must=[models.FieldCondition(key="doc_id", match=theirs)])
        points: list[Any] = []
        offset: Any = None
        while not points or offset is not None:
            found, offset = retrying(
                self._client.scroll, self.collection, only, limit=1000, offset=offset
            )
            if not found:
                break
            points += found
        points.sort(key=lambda point: int(point.id))
        return [Chunk.model_validate(point.payload) for point in points]

    def close(self) -> None:
        """The client belongs to whoever made it."""


def _filter(only: Filter | None) -> Any:
    from qdrant_client import models

    if only is None:
        return None
    must, must_not = (
        [models.FieldCondition(key=key, match=models.MatchAny(any=values)) for key, values in part]
        for part in clauses(only)
    )
    return models.Filter(must=[*must], must_not=[*must_not])


def describe(client: Any, name: str) -> dict[str, Any] | None:
    """The metadata of a collection (or of what an alias points at); None when there is none."""
    from qdrant_client.http.exceptions import UnexpectedResponse

    try:
        return dict(retrying(client.get_collection, name).config.metadata or {})
    except UnexpectedResponse as error:
        if error.status_code == 404:
            return None
        raise
    except ValueError:  # the client's local mode says it so
        return None


def is_whole(client: Any, name: str) -> bool:
    """Whether this collection's upload was finished and counted."""
    return "manifest" in (describe(client, name) or {})


def upload(client: Any, index: EdgeIndex) -> str:
    """Bring the collection of this index to the server, or complete it. Returns its name.

    Raises ServiceError when the server does not answer, or holds another number of points at the
    end.
    """
    manifest = index.manifest
    name = collection_of(manifest["content"])
    if is_whole(client, name):
        return name
    if describe(client, name) is None:
        _create(client, name, manifest)
    for field in FIELDS.values():  # also those that a killed upload did not come to
        retrying(client.create_payload_index, name, field, "keyword")
    there = _present(client, name)
    _send(client, name, _missing(index, there))
    count = retrying(client.count, name, exact=True).count
    if count != manifest["count"]:
        raise ServiceError(
            f"The collection holds {count} points, the index {manifest['count']}.",
            where=f"QDRANT_URL, collection {name}",
            next="delete the collection and publish again",
        )
    _settled(client, name)
    kept = {key: value for key, value in manifest.items() if key != "files"}
    retrying(client.update_collection, name, metadata={"manifest": kept})
    return name


def _create(client: Any, name: str, manifest: dict[str, Any]) -> None:
    from qdrant_client import models
    from qdrant_client.http.exceptions import UnexpectedResponse

    hnsw = manifest["hnsw"] or {"m": 0}  # everything is scanned: no graph
    int8 = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
    graph = models.HnswConfigDiff(m=hnsw["m"], ef_construct=hnsw.get("ef_construct"))
    dense = models.VectorParams(
        size=manifest["dimension"],
        distance=models.Distance.DOT,
        hnsw_config=graph,
        quantization_config=models.ScalarQuantization(scalar=int8)
        if manifest["kind"] == "int8"
        else None,
    )
    words = models.SparseVectorParams(modifier=models.Modifier.IDF)
    try:
        retrying(
            client.create_collection,
            name,
            vectors_config={DENSE: dense},
            sparse_vectors_config={WORDS: words},
        )
    except UnexpectedResponse as error:
        if error.status_code != 409:  # there already: the first answer got lost on its way
            raise


def _present(client: Any, name: str) -> set[int]:
    """Ids of the points that an earlier, unfinished upload left."""
    ids: set[int] = set()
    offset: Any = None
    while True:
        found, offset = retrying(
            client.scroll,
            name,
            limit=10_000,
            offset=offset,
            with_payload=False,
            with_vectors=False,
        )
        ids.update(int(point.id) for point in found)
        if offset is None:
            return ids


def _missing(index: EdgeIndex, there: set[int]) -> Iterator[list[Any]]:
    """Batches of points that are not on the server yet."""
    from qdrant_client import models

    for batch in index.points(BATCH):
        left = [item for item in batch if item[0] not in there]
        if left:
            yield [
                models.PointStruct(
                    id=id,
                    payload=payload,
                    vector={
                        DENSE: vectors[DENSE],
                        WORDS: models.SparseVector(
                            indices=vectors[WORDS].indices, values=vectors[WORDS].values
                        ),
                    },
                )
                for id, payload, vectors in left
            ]


def _send(client: Any, name: str, batches: Iterable[list[Any]]) -> None:
    """Upsert with at most IN_FLIGHT batches unconfirmed; the first error ends it."""

    def send(points: list[Any]) -> None:
        retrying(client.upsert, name, points=points, wait=True)

    flying: set[Future[None]] = set()
    with ThreadPoolExecutor(IN_FLIGHT, "qdrant-upload") as pool:
        for batch in batches:
            flying.add(pool.submit(send, batch))
            if len(flying) >= IN_FLIGHT:
                done, flying = wait(flying, return_when=FIRST_COMPLETED)
                for item in done:
                    item.result()
        for item in flying:
            item.result()


def _settled(client: Any, name: str) -> None:
    """Wait until the server has built its segments: before that its search is slow."""
    from qdrant_client import models

    end = time.monotonic() + SETTLE_SECONDS
    while retrying(client.get_collection, name).status != models.CollectionStatus.GREEN:
        if time.monotonic() > end:
            raise ServiceError(
                f"The collection is not ready after {SETTLE_SECONDS:.0f} s.",
                where=f"QDRANT_URL, collection {name}",
                next="publish again: nothing is sent twice",
            )
        time.sleep(0.5)


def promote(client: Any, name: str, tombstones: list[str]) -> None:
    """Point the alias at the collection; which documents it must not show is set before."""
    from qdrant_client import models

    retrying(client.update_collection, name, metadata={"tombstones": tombstones})
    if current(client) == name:
        return
    create = models.CreateAliasOperation(
        create_alias=models.CreateAlias(collection_name=name, alias_name=ALIAS)
    )
    delete = models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=ALIAS))
    steps = [delete, create] if current(client) else [create]
    retrying(client.update_collection_aliases, steps)


def current(client: Any) -> str | None:
    """The collection that the alias points at."""
    found = retrying(client.get_aliases).aliases
    return next((item.collection_name for item in found if item.alias_name == ALIAS), None)


def drop(client: Any, name: str) -> None:
    """Delete a collection, unless it is the published one or not there."""
    if current(client) != name and describe(client, name) is not None:
        retrying(client.delete_collection, name)
