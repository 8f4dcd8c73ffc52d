"""Which rows train, which validate, which test: the source's own splits, or a seeded draw.

Invariant: a patient's images stay together, and so do the frames of a file of no known patient. The
draw depends on the rows, the shares and the seed, not on the rows' order.
"""

from __future__ import annotations

from collections.abc import Sequence

from client.data.manifest import split_patients
from client.data.rows import Row

# What people call the three splits, in any case.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def split_named(word: str) -> str:
    """Return the split that a word stands for; empty when it stands for none.

    >>> split_named(" Validation ")
    'val'
    """
    return SPLIT_WORDS.get(word.strip().casefold(), "")


def assign_splits(
    rows: Sequence[Row], fractions: tuple[float, float, float], seed: int
) -> tuple[str, ...]:
    """Return the split of each row, in the order given.

    A split that the source gives stays. Rows without one are drawn by patient, stratified by label,
    into train and the splits that the source does not give. Where every row has a split and none is
    val, val is drawn out of train. Nothing that the source calls train ever becomes test: something
    may have been fitted to it.

    Args:
        rows: As a reader lists them.
        fractions: Shares of patients in train, val and test. Where a split is given, the others
            keep their proportion to each other.
        seed: Root of the draw.

    Raises:
        DataError: The fractions are no shares.
    """
    units = [_unit(row) for row in rows]
    # A row without a split belongs to its patient's, if another row of the patient says one.
    given = {unit: row.split for unit, row in zip(units, rows, strict=True) if row.split}
    splits = [row.split or given.get(unit, "") for unit, row in zip(units, rows, strict=True)]
    pool = [place for place, split in enumerate(splits) if not split]
    lacking = {"val", "test"} - set(given.values())
    if not pool:
        pool = [place for place, split in enumerate(splits) if split == "train"]
        lacking.discard("test")
    shares = [
        share if name in lacking else 0.0
        for name, share in zip(("val", "test"), fractions[1:], strict=True)
    ]
    total = fractions[0] + sum(shares)
    if pool and total > 0:
        val, test = (share / total for share in shares)
        names = sorted({row.label for row in rows})
        drawn = split_patients(
            [units[place] for place in pool],
            [names.index(rows[place].label) for place in pool],
            (1 - val - test, val, test),
            seed,
        )
        for place, split in zip(pool, drawn, strict=True):
            splits[place] = split
    return tuple(splits)


def _unit(row: Row) -> str:
    """Name what must stay in one split."""
    return f"patient {row.patient}" if row.patient else f"file {row.file}"
