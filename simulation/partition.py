"""Dealing one dataset out to sites: by patient, by ``flwr-datasets`` partitioners.

Invariant: a patient's images all go to one site, every image goes to exactly one site, and a site's
share of a class is the same in train, val and test (up to one patient), because the patients of
each (class, split) are spread evenly over the order that the partitioner cuts.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, Partitioner
from numpy.typing import NDArray

from client.data.manifest import SPLITS, ImageDataset, Manifest
from simulation.scenario import FederationSection
from strategies.errors import ConfigError, DataError
from strategies.seeds import derive_seed

ATTEMPTS = 100


def site_names(count: int) -> list[str]:
    """Return A, B, C, ...; S27, S28, ... beyond the alphabet.

    >>> site_names(3)
    ['A', 'B', 'C']
    """
    return [chr(ord("A") + i) if i < 26 else f"S{i + 1}" for i in range(count)]


def partition(
    dataset: ImageDataset, federation: FederationSection, seed: int
) -> dict[str, ImageDataset]:
    """Deal a dataset out to sites.

    Args:
        dataset: All images.
        federation: Number of sites, scheme and its parameters.
        seed: The run's seed.

    Returns:
        Site name to its images, in name order.

    Raises:
        ConfigError: More sites than patients, or no draw gives every site enough training
            examples.
    """
    manifest = dataset.manifest
    if federation.partition == "natural":
        parts = _natural(dataset, federation)
        smallest = min(len(part.manifest.rows(split="train")) for part in parts.values())
        if smallest < federation.min_examples:
            raise ConfigError(
                f"federation.min-examples={federation.min_examples}: a site of the dataset has "
                f"{smallest} training examples",
                hint="lower federation.min-examples",
            )
        return parts
    patients, labels, splits = _patients(manifest)
    if federation.num_sites > len(patients):
        raise ConfigError(
            f"federation.num-sites={federation.num_sites}: more sites than patients "
            f"({len(patients)})",
            hint="lower federation.num-sites",
        )
    attempts = ATTEMPTS if federation.partition == "dirichlet" else 1
    smallest = 0
    for attempt in range(attempts):
        draw = derive_seed(seed, "partition", attempt)
        order = _even_order(labels, splits, np.random.default_rng(draw))
        table = Dataset.from_dict({"row": order.tolist(), "label": labels[order].tolist()})
        partitioner = _partitioner(federation, draw)
        partitioner.dataset = table
        parts = {
            site: _rows_of(
                manifest, {patients[row] for row in partitioner.load_partition(i)["row"]}
            )
            for i, site in enumerate(site_names(federation.num_sites))
        }
        sizes = [len(manifest.subset(rows).rows(split="train")) for rows in parts.values()]
        smallest = max(smallest, min(sizes))
        if min(sizes) >= federation.min_examples:
            return {site: dataset.subset(rows) for site, rows in parts.items()}
    raise ConfigError(
        f"federation.min-examples={federation.min_examples}: the best of {attempts} draws leaves "
        f"a site with {smallest} training examples",
        hint="lower federation.min-examples or federation.num-sites, or raise "
        "federation.dirichlet-alpha",
    )


def describe(parts: dict[str, ImageDataset], federation: FederationSection) -> dict[str, Any]:
    """Return ``partition.json``: examples of each class at each site and split."""
    first = next(iter(parts.values()))
    return {
        "scheme": federation.partition,
        "alpha": federation.dirichlet_alpha if federation.partition == "dirichlet" else None,
        "classes": list(first.manifest.classes),
        "sites": {
            site: {
                **{split: part.manifest.class_counts(split).tolist() for split in SPLITS},
                "num_patients": len(part.manifest.patients),
            }
            for site, part in parts.items()
        },
    }


def _natural(dataset: ImageDataset, federation: FederationSection) -> dict[str, ImageDataset]:
    names = sorted({example.site for example in dataset.manifest.examples})
    if names == [""]:
        raise DataError(
            f"federation.partition=natural: dataset={dataset.manifest.dataset} names no sites",
            hint='use partition = "dirichlet" or "iid"',
        )
    if len(names) != federation.num_sites:
        raise ConfigError(
            f"federation.num-sites={federation.num_sites}: the dataset has {len(names)} sites"
        )
    return {site: dataset.subset(dataset.manifest.rows(site=site)) for site in names}


def _partitioner(federation: FederationSection, seed: int) -> Partitioner:
    if federation.partition == "iid":
        return IidPartitioner(federation.num_sites)
    return DirichletPartitioner(
        num_partitions=federation.num_sites,
        partition_by="label",
        alpha=federation.dirichlet_alpha,
        min_partition_size=0,
        shuffle=False,
        seed=seed,
    )


def _patients(manifest: Manifest) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """Return every patient with its most frequent label and its split."""
    labels: dict[str, Counter[int]] = {}
    splits: dict[str, int] = {}
    for example in manifest.examples:
        labels.setdefault(example.patient, Counter())[example.label] += 1
        splits[example.patient] = SPLITS.index(example.split)
    patients = sorted(labels)
    majority = [min(labels[p], key=lambda label: (-labels[p][label], label)) for p in patients]
    return (
        patients,
        np.array(majority, dtype=np.int64),
        np.array([splits[p] for p in patients], dtype=np.int64),
    )


def _even_order(
    labels: NDArray[np.int64], splits: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.int64]:
    """Order patients so that any run of them holds each (class, split) in proportion.

    The shuffled members of a group of m get the places (i + u) / m in [0, 1), u in [0, 1) drawn
    per group; sorting by place interleaves the groups evenly. Cutting a class's own sequence, as
    the Dirichlet partitioner does, then cuts its train, val and test alike.
    """
    place = np.empty(len(labels))
    for group in {(int(a), int(b)) for a, b in zip(labels, splits, strict=True)}:
        members = np.flatnonzero((labels == group[0]) & (splits == group[1]))
        place[generator.permutation(members)] = (
            np.arange(len(members)) + generator.random()
        ) / len(members)
    return np.argsort(place, kind="stable")


def _rows_of(manifest: Manifest, patients: set[str]) -> NDArray[np.int64]:
    return np.array(
        [row for row, example in enumerate(manifest.examples) if example.patient in patients],
        dtype=np.int64,
    )
