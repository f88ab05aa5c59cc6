"""What the rows of ``collogue bench`` are called."""

from __future__ import annotations

from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]


def label(row: Row) -> str:
    """What a row is of, in a few words."""
    if row["what"] != "collogue":
        return f"{row['what']}, {row['format']}" if "format" in row else str(row["what"])
    if not row["norm"] and row["format"] == "none":
        return "residual" if row["residual"] else "sum"
    operation = [str(row["operation"])] if "operation" in row else []
    parts = {"norm kept": row["keep_norm"], "no norm": not row["norm"], "no residual": not row["residual"]}
    weight = row.get("weight_dtype")
    return ", ".join(
        [*operation, str(row["format"]), *(name for name, so in parts.items() if so), *([f"{weight} weight"] if weight else [])]
    )


def call_name(row: Row) -> str:
    """What a row of ``collogue bench`` is called in tables and plots."""
    if row["what"] != "collogue":
        return label(row)
    return "Collogue, " + ("norm" if label(row) == "none" else label(row))
