"""Class names: a source's own, and how they become the classes of a run.

A run declares its classes in label order. A site's names are matched to them by the site's label
map, else by being the same but for case, spaces, hyphens and underscores.

Invariant: nothing is guessed. A name that is not matched is refused wherever it has images. Names
stay in the site's log: what the coordinator is told holds counts alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from client.data.manifest import ImageDataset, Manifest
from strategies.errors import DataError

# In a label map: images of this class are not used.
LEAVE_OUT = ""
# In place of a run's label.
LEFT_OUT, UNMAPPED = -1, -2


def class_finder(classes: Sequence[str]) -> Callable[[str], str | None]:
    """Return a function from a name to the class that it spells, or None.

    >>> class_finder(["COVID", "Soft tissue"])("soft_tissue ")
    'Soft tissue'
    """
    exact = set(classes)
    plain: dict[str, str | None] = {}
    for name in classes:
        # Two classes that differ by no more than this are told apart by their exact names alone.
        plain[_plain(name)] = None if _plain(name) in plain else name
    return lambda name: name if name in exact else plain.get(_plain(name))


class ClassMap(NamedTuple):
    """How a site's classes become a run's.

    Attributes:
        labels: The run's label of each own class, or LEFT_OUT, or UNMAPPED.
        unmapped: Own names that match no class of the run.
        missing: Classes of the run that no own name stands for.
        unknown: Names in the label map that the data does not have.
    """

    labels: tuple[int, ...]
    unmapped: tuple[str, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]


def map_classes(
    own: Sequence[str], classes: Sequence[str], label_map: Mapping[str, str]
) -> ClassMap:
    """Match a site's class names to a run's.

    Args:
        own: The site's names, in its label order.
        classes: The run's names, in its label order.
        label_map: Own name to the run's; an empty text leaves the class's images out.
    """
    find, find_own = class_finder(classes), class_finder(own)
    # The map's own names too are found whatever their case; an exact one comes first.
    targets = {find_own(name): target for name, target in label_map.items() if name not in own}
    targets |= {name: target for name, target in label_map.items() if name in own}
    labels: list[int] = []
    for name in own:
        target = targets.get(name, name)
        found = find(target)
        if name in targets and target.strip() == LEAVE_OUT:
            labels.append(LEFT_OUT)
        else:
            labels.append(UNMAPPED if found is None else classes.index(found))
    return ClassMap(
        labels=tuple(labels),
        unmapped=tuple(n for n, label in zip(own, labels, strict=True) if label == UNMAPPED),
        missing=tuple(name for label, name in enumerate(classes) if label not in labels),
        unknown=tuple(name for name in label_map if find_own(name) is None),
    )


class Match(NamedTuple):
    """A site's images with a run's labels.

    Attributes:
        dataset: In the run's class order.
        unmapped: Own classes that match none of the run's and have images, which are not in
            `dataset`: the caller refuses.
        absent: Classes of the run without training images.
        unknown: Names in the label map that the data does not have.
    """

    dataset: ImageDataset
    unmapped: tuple[str, ...]
    absent: tuple[str, ...]
    unknown: tuple[str, ...]


def match(dataset: ImageDataset, classes: Sequence[str], label_map: Mapping[str, str]) -> Match:
    """Give a site's images a run's labels.

    Args:
        dataset: With the site's own labels.
        classes: The run's names, in its label order.
        label_map: As in `map_classes`.
    """
    own = dataset.manifest
    mapping = map_classes(own.classes, classes, label_map)
    matched = harmonise(dataset, classes, mapping.labels)
    with_images = dict(zip(own.classes, own.class_counts(), strict=True))
    in_training = dict(zip(classes, matched.manifest.class_counts("train"), strict=True))
    return Match(
        dataset=matched,
        unmapped=tuple(name for name in mapping.unmapped if with_images[name]),
        absent=tuple(name for name in classes if not in_training[name]),
        unknown=mapping.unknown,
    )


def describe_match(found: Match) -> str:
    """Return one line for the site's own log or screen."""
    text = f"classes={', '.join(found.dataset.manifest.classes)}"
    if found.absent:
        text += f"; without training images: {', '.join(found.absent)}"
    if found.unknown:
        text += f"; in label-map and not in the data: {', '.join(found.unknown)}"
    return text


def unmapped_error(names: Sequence[str], classes: Sequence[str]) -> DataError:
    """Return the error that tells a site's own people what to add to their file."""
    return DataError(
        f"classes not mapped: {', '.join(names)}; the run has {', '.join(classes)}",
        f'under [data.label-map] add "{names[0]}" = "{classes[0]}", or the class that it is; '
        f'"{names[0]}" = "" leaves its images out',
    )


def mapped_names(own: Sequence[str], label_map: Mapping[str, str]) -> tuple[str, ...]:
    """Return the classes of a run that nobody declared: the own names, mapped, each once.

    >>> mapped_names(["B", "M", "n"], {"B": "benign", "n": "benign"})
    ('benign', 'M')
    """
    return tuple(dict.fromkeys(name for n in own if (name := label_map.get(n, n).strip())))


def harmonise(dataset: ImageDataset, classes: Sequence[str], labels: Sequence[int]) -> ImageDataset:
    """Return the images with other labels, without those of a class that gets none.

    Args:
        dataset: With the site's own labels.
        classes: The run's names, in its label order.
        labels: The run's label of each own class; LEFT_OUT and UNMAPPED are none.
    """
    manifest, provenance = dataset.manifest, dataset.provenance
    relabelled = np.asarray(labels, dtype=np.int64)[manifest.labels]
    if (relabelled < 0).any():
        kept = np.flatnonzero(relabelled >= 0)
        dataset, relabelled = dataset.subset(kept), relabelled[kept]
    examples = tuple(
        example._replace(label=label)
        for example, label in zip(dataset.manifest.examples, relabelled.tolist(), strict=True)
    )
    manifest = Manifest(manifest.dataset, tuple(classes), examples)
    return ImageDataset(manifest, dataset.images, provenance)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
