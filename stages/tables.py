"""Parquet tables between stages: written whole or not at all, the same rows as the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write rows in the given order and with exactly the schema's columns."""
    import pyarrow as pa

    write_table(path, pa.Table.from_pylist([dict(row) for row in rows], schema=schema))


def write_table(path: Path, table: pa.Table, *, raw: Sequence[str] = ()) -> None:
    """Write a table; its bytes depend on nothing but its content and pyarrow's version.

    ``raw`` columns are neither compressed nor looked through for repetitions: of embeddings that
    saves 8 % of the bytes and costs five times the seconds.
    """
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    rest = [name for name in table.column_names if name not in raw]
    pq.write_table(
        table,
        part,
        compression={name: "none" if name in raw else "zstd" for name in table.column_names},
        use_dictionary=rest if raw else True,
        write_statistics=False,
    )
    part.replace(path)


def read_table(path: Path, columns: Sequence[str]) -> pa.Table:
    """Those columns of a Parquet file. Raises InputError naming what is missing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
        lacking = [name for name in columns if name not in schema.names]
        if not lacking:
            # read_table() would import pyarrow.dataset and pandas: 0.3 CPU seconds a stage.
            with pq.ParquetFile(path) as file:
                return file.read(columns=list(columns))
    except FileNotFoundError:
        raise InputError(
            "An input of this stage does not exist.", where=str(path), next="dvc repro"
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"An input of this stage is not a Parquet file: {error}",
            where=str(path),
            next="delete it and run: dvc repro",
        ) from None
    raise InputError(
        "An input of this stage lacks columns.",
        offenders=lacking,
        where=str(path),
        next="run the stage that writes it again",
    )
