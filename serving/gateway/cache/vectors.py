"""Where questions' vectors are: Qdrant's engine in this process, or a Qdrant server by QDRANT_URL.

qdrant-client's own local mode takes 48 ms for a filtered query over 2,000 points and holds the
interpreter for all of it (measured; FACTS has 30 ms over 10,000 unfiltered), so in this process it
is qdrant-edge. Both ask the same filter; all calls come from one thread.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from contracts.settings import Settings
from serving.gateway.cache.config import Semantic
from serving.gateway.cache.purges import Purge

NAME = "question"
COLLECTION = "ratchet-cache-"
#: What a query is filtered by and what a purge names: keywords with an index.
KEYWORDS = ("tenant", "scope", "same", "release", "model")
#: Seconds between two removals of what has ended; until then the filter hides it.
SWEEP_SECONDS = 60.0


class Wanted(NamedTuple):
    """What a point must have to be found."""

    tenant: str
    scope: str  # hash of everything but the question
    same: str  # hash of what may not differ between two questions


@dataclass(frozen=True, slots=True)
class Found:
    score: float  # cosine
    payload: dict[str, Any]


class VectorStore(Protocol):
    """Vectors of length 1 with their payload. Any exception is an outage."""

    def find(self, vector: list[float], want: Wanted, now: float, threshold: float) -> Found | None:
        """The nearest point that has what is wanted, ends after ``now`` (Unix seconds) and is as
        near as ``threshold``."""
        ...

    def add(
        self, identity: str, vector: list[float], want: Wanted, payload: dict[str, Any]
    ) -> None: ...

    def purge(self, what: Purge) -> int:
        """Remove what is meant; how many points that were."""
        ...

    def close(self) -> None: ...


def open_vectors(settings: Settings, config: Semantic, digest: str) -> VectorStore:
    """The store that the environment asks for.

    Args:
        digest: names the embedding model: vectors of two models never stand in one collection.
    """
    if settings.qdrant_url:
        client = _client(settings, max(1, config.budget_ms // 1000))
        return ServerVectors(client, f"{COLLECTION}{digest}")
    return EdgeVectors(config.max_entries)


def every_collection(settings: Settings) -> Iterator[ServerVectors]:
    """What the caches of all embedding models have on the server at QDRANT_URL."""
    client = _client(settings, 10)
    try:
        for found in client.get_collections().collections:
            if found.name.startswith(COLLECTION):
                yield ServerVectors(client, found.name)
    finally:
        client.close()


def _client(settings: Settings, seconds: int) -> Any:
    from qdrant_client import QdrantClient

    return QdrantClient(
        url=settings.qdrant_url,
        api_key=settings.qdrant_api_key,
        timeout=seconds,
        check_compatibility=False,  # a request more at every start
    )


class EdgeVectors:
    """In this process, in a folder that goes with it. At most ``max_entries`` points.

    Two shards: points go into the young one, and when it is full the old one is thrown away whole
    and the young one becomes old. Removing points one by one would need the engine's optimizer now
    and then, which takes 5 s at 10,000 points, in which nothing is found.
    """

    def __init__(self, max_entries: int) -> None:
        self._room = max(1, max_entries // 2)  # of one shard
        self._shards: list[tuple[str, Any]] = []  # folder and shard, young first
        self._added = 0  # to the young one

    def find(self, vector: list[float], want: Wanted, now: float, threshold: float) -> Found | None:
        if not self._shards:
            return None
        import qdrant_edge as edge

        must: list[Any] = [
            edge.FieldCondition(key=key, match=edge.MatchValue(value))
            for key, value in want._asdict().items()
        ]
        must.append(edge.FieldCondition(key="expires", range=edge.RangeFloat(gt=now)))
        request = edge.QueryRequest(
            limit=1,
            query=edge.Query.Nearest(vector, using=NAME),
            filter=edge.Filter(must=must),
            score_threshold=threshold,
            with_payload=True,
        )
        points = [point for _, shard in self._shards for point in shard.query(request)]
        if not points:
            return None
        best = max(points, key=lambda point: point.score)  # of equal ones the first: the young
        return Found(best.score, best.payload)

    def add(
        self, identity: str, vector: list[float], want: Wanted, payload: dict[str, Any]
    ) -> None:
        import qdrant_edge as edge

        if not self._shards or self._added >= self._room:
            self._shards.insert(0, self._made(len(vector)))
            self._added = 0
            for folder, shard in self._shards[2:]:
                _removed(folder, shard)
            del self._shards[2:]
        point = edge.Point(identity, {NAME: vector}, {**payload, **want._asdict()})
        self._shards[0][1].update(edge.UpdateOperation.upsert_points([point]))
        self._added += 1

    def purge(self, what: Purge) -> int:
        import qdrant_edge as edge

        meant = edge.Filter(
            must=[
                edge.FieldCondition(key=key, match=edge.MatchValue(value))
                for key, value in what._asdict().items()
                if value is not None
            ]
        )
        count = 0
        for _, shard in self._shards:
            count += shard.count(edge.CountRequest(exact=True, filter=meant))
            shard.update(edge.UpdateOperation.delete_points_by_filter(meant))
        return count

    def close(self) -> None:
        for folder, shard in self._shards:
            _removed(folder, shard)
        self._shards.clear()

    def _made(self, dimension: int) -> tuple[str, Any]:
        import qdrant_edge as edge

        config = edge.EdgeConfig(
            vectors={NAME: edge.EdgeVectorParams(size=dimension, distance=edge.Distance.Cosine)},
            max_search_threads=1,
            wal_enabled=False,
        )
        folder = tempfile.mkdtemp(prefix="ratchet-semantic-")
        shard = edge.EdgeShard.create(folder, config)
        for key in KEYWORDS:
            keyword = edge.PayloadSchemaType.Keyword
            shard.update(edge.UpdateOperation.create_field_index(key, keyword))
        return folder, shard


def _removed(folder: str, shard: Any) -> None:
    shard.close()
    shutil.rmtree(folder, ignore_errors=True)


class ServerVectors:
    """A collection on a Qdrant server, shared by all workers that use the same model.

    Args:
        client: a QdrantClient.
        collection: made when it is not there.
    """

    def __init__(self, client: Any, collection: str) -> None:
        self._client, self.collection = client, collection
        self._made = False
        self._swept = time.monotonic()

    def find(self, vector: list[float], want: Wanted, now: float, threshold: float) -> Found | None:
        self._ready(len(vector))
        from qdrant_client import models

        must: list[Any] = [
            models.FieldCondition(key=key, match=models.MatchValue(value=value))
            for key, value in want._asdict().items()
        ]
        must.append(models.FieldCondition(key="expires", range=models.Range(gt=now)))
        points = self._client.query_points(
            self.collection,
            query=vector,
            limit=1,
            query_filter=models.Filter(must=must),
            score_threshold=threshold,
        ).points
        return Found(points[0].score, points[0].payload or {}) if points else None

    def add(
        self, identity: str, vector: list[float], want: Wanted, payload: dict[str, Any]
    ) -> None:
        self._ready(len(vector))
        from qdrant_client import models

        point = models.PointStruct(
            id=identity, vector=vector, payload={**payload, **want._asdict()}
        )
        self._client.upsert(self.collection, [point], wait=False)
        if time.monotonic() - self._swept > SWEEP_SECONDS:
            self._swept = time.monotonic()
            ended = models.FieldCondition(key="expires", range=models.Range(lte=time.time()))
            self._client.delete(
                self.collection,
                models.FilterSelector(filter=models.Filter(must=[ended])),
                wait=False,
            )

    def purge(self, what: Purge) -> int:
        from qdrant_client import models

        if not self._client.collection_exists(self.collection):
            return 0
        meant = models.Filter(
            must=[
                models.FieldCondition(key=key, match=models.MatchValue(value=value))
                for key, value in what._asdict().items()
                if value is not None
            ]
        )
        count: int = self._client.count(self.collection, meant, exact=True).count
        self._client.delete(self.collection, models.FilterSelector(filter=meant), wait=True)
        return count

    def close(self) -> None:
        self._client.close()

    def _ready(self, dimension: int) -> None:
        """Make the collection once; another worker may be faster."""
        if self._made:
            return
        from qdrant_client import models

        if not self._client.collection_exists(self.collection):
            try:
                self._client.create_collection(
                    self.collection,
                    vectors_config=models.VectorParams(
                        size=dimension, distance=models.Distance.COSINE
                    ),
                )
            except Exception:
                if not self._client.collection_exists(self.collection):
                    raise
            for key in KEYWORDS:
                schema = models.KeywordIndexParams(
                    type=models.KeywordIndexType.KEYWORD, is_tenant=key == "tenant"
                )
                self._client.create_payload_index(self.collection, key, schema)
        self._made = True
