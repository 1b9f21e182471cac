"""Forget answers: in every worker that runs, in Redis and in Qdrant.

    python -m serving.gateway.cache.purge --release ID | --tenant NAME | --model NAME | --all

Workers are told, see purges.py. What Redis and Qdrant hold is deleted from here, so it goes also
while no gateway runs. With such a store it is done twice: until a worker has heard, it may still
put an answer from before into Redis, and another one may fetch it from there. After the first time
nobody writes such answers any more, and the second time removes what was written in between.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence

from contracts import offline
from contracts.errors import RatchetError, ServiceError
from contracts.settings import Settings
from serving.gateway.cache.purges import Purge, PurgeFile

#: In which every worker that runs hears of a purge, with a wide margin: they look once a second.
HEARD_SECONDS = 2.5


async def purge(settings: Settings, what: Purge, pause: float = HEARD_SECONDS) -> int:
    """See the module. Returns how many answers went out of Redis and Qdrant, when every worker has
    heard. Raises ServiceError when a store does not answer; what it holds is then still there.

    Args:
        pause: seconds in which they hear.
    """
    shared = settings.redis_url or settings.qdrant_url
    count = 0
    for _ in range(2 if shared else 1):
        count += await _once(settings, what)
        await asyncio.sleep(pause)
    return count


async def _once(settings: Settings, what: Purge) -> int:
    told = what.announcement()
    PurgeFile(settings).add(told)
    count = await _redis(settings, what, told) if settings.redis_url else 0
    if settings.qdrant_url:
        count += await asyncio.to_thread(_qdrant, settings, what)
    return count


async def _redis(settings: Settings, what: Purge, told: bytes) -> int:
    from redis.exceptions import RedisError

    from serving.gateway.cache.redis import RedisTier

    assert settings.redis_url is not None
    tier = RedisTier(settings.redis_url, 5_000)
    try:
        return await tier.purge(what, told)
    except (RedisError, OSError) as error:
        raise _away("Redis", "REDIS_URL", error) from None
    finally:
        await tier.close()


def _qdrant(settings: Settings, what: Purge) -> int:
    from serving.gateway.cache.vectors import every_collection

    try:
        return sum(vectors.purge(what) for vectors in every_collection(settings))
    except Exception as error:  # the client raises what its transports raise
        raise _away("Qdrant", "QDRANT_URL", error) from None


def _away(store: str, variable: str, error: Exception) -> ServiceError:
    return ServiceError(
        f"{store} does not answer: {str(error) or type(error).__name__}. Workers that were told "
        "forget their own answers; those in the store are still there.",
        where=variable,
        next="start it and purge again; entries end by themselves after ttl_seconds",
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--release", help="id of a release")
    parser.add_argument("--tenant", help="whose answers")
    parser.add_argument("--model", help="logical model, or channel")
    parser.add_argument("--all", action="store_true", help="every answer")
    arguments = parser.parse_args(argv)
    named = (arguments.release, arguments.model, arguments.tenant)
    what = Purge(*(name or None for name in named))
    if arguments.all == any(what):
        parser.error("give --all, or what to forget: --release, --tenant, --model")
    offline.apply()
    settings = Settings.from_env()
    try:
        count = asyncio.run(purge(settings, what))
    except RatchetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    shared = [
        name
        for name, url in (("Redis", settings.redis_url), ("Qdrant", settings.qdrant_url))
        if url
    ]
    print(json.dumps({**what._asdict(), "told": str(PurgeFile(settings).path),
                      "deleted": {"from": shared, "answers": count}}))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
