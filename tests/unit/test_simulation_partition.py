"""Dealing data out: whole patients, every image once, even splits, skew by alpha, by seed."""

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.data.manifest import SPLITS, Example, ImageDataset, Manifest
from simulation.partition import describe, partition, site_names
from simulation.scenario import FederationSection
from strategies.errors import ConfigError, DataError

CLASSES = ("a", "b", "c")


def make_dataset(patients: Sequence[tuple[int, int, str]]) -> ImageDataset:
    """Make one patient of (images, label, split) each; the pixel tells which row it was."""
    examples = [
        Example(f"p{p}-{i}", "made", i, label, f"p{p}", "", split)
        for p, (count, label, split) in enumerate(patients)
        for i in range(count)
    ]
    images = (np.arange(len(examples)) % 256).astype(np.uint8).reshape(-1, 1, 1)
    return ImageDataset(Manifest("made", CLASSES, tuple(examples)), images)


def even_dataset(per_class: int = 60, num_classes: int = 3) -> ImageDataset:
    """One image per patient; 60/20/20 of each class."""
    splits = ["train"] * 3 + ["val", "test"]
    return make_dataset(
        [(1, label, splits[i % 5]) for label in range(num_classes) for i in range(per_class)]
    )


def federation(**values) -> FederationSection:
    named = {name.replace("_", "-"): value for name, value in values.items()}
    return FederationSection.model_validate({"min-examples": 1, **named})


def patient_labels(dataset: ImageDataset) -> dict[str, int]:
    """The most frequent label of each patient; of equal ones the lower."""
    labels: dict[str, Counter[int]] = {}
    for example in dataset.manifest.examples:
        labels.setdefault(example.patient, Counter())[example.label] += 1
    return {p: min(c, key=lambda label: (-c[label], label)) for p, c in labels.items()}


# Enough training patients of each class that hardly any draw leaves a site without one.
ENOUGH = [(1, label, "train") for label in range(3) for _ in range(8)]

datasets = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 2), st.sampled_from(SPLITS)), max_size=40
).map(lambda patients: make_dataset([*ENOUGH, *patients]))

schemes = st.sampled_from(
    [{"partition": "iid"}, *({"partition": "dirichlet", "dirichlet_alpha": a} for a in (0.3, 5.0))]
)


@settings(deadline=None, max_examples=40)
@given(
    dataset=datasets, num_sites=st.integers(1, 3), scheme=schemes, seed=st.integers(0, 2**63 - 1)
)
def test_every_image_goes_to_one_site_and_patients_stay_whole(dataset, num_sites, scheme, seed):
    parts = partition(dataset, federation(num_sites=num_sites, **scheme), seed)
    assert list(parts) == site_names(num_sites)
    dealt = [example for part in parts.values() for example in part.manifest.examples]
    assert sorted(dealt) == sorted(dataset.manifest.examples)
    owners = [{e.patient for e in part.manifest.examples} for part in parts.values()]
    assert all(not first & second for first, second in itertools.combinations(owners, 2))
    pixel = {
        e.example_id: image
        for e, image in zip(dataset.manifest.examples, dataset.images, strict=True)
    }
    for part in parts.values():
        for example, image in zip(part.manifest.examples, part.images, strict=True):
            assert (pixel[example.example_id] == image).all()


@pytest.mark.parametrize("scheme", ["iid", "dirichlet"])
@pytest.mark.parametrize("seed", range(5))
def test_a_sites_share_of_a_class_is_the_same_in_every_split_up_to_one_patient(scheme, seed):
    generator = np.random.default_rng(seed)
    dataset = make_dataset(
        [
            (int(generator.integers(1, 4)), int(label), SPLITS[split])
            for label in range(3)
            for split, count in enumerate(generator.integers(5, 40, size=3))
            for _ in range(count)
        ]
    )
    label_of = patient_labels(dataset)
    split_of = {e.patient: e.split for e in dataset.manifest.examples}
    parts = partition(dataset, federation(num_sites=4, partition=scheme), seed)

    def count(patients) -> Counter[tuple[int, str]]:
        return Counter((label_of[p], split_of[p]) for p in patients)

    total = count(label_of)
    for part in parts.values():
        own = count(part.manifest.patients)
        for label in range(3):
            # Some share s of the class fits all its splits: |own - s * total| <= 1 patient.
            low = max((own[label, split] - 1) / total[label, split] for split in SPLITS)
            high = min((own[label, split] + 1) / total[label, split] for split in SPLITS)
            assert low <= high + 1e-9


def test_iid_gives_every_site_the_same_share_of_everything():
    parts = partition(even_dataset(), federation(num_sites=4, partition="iid"), 3)
    for part in parts.values():
        for split, expected in zip(SPLITS, (9, 3, 3), strict=True):
            assert np.abs(part.manifest.class_counts(split) - expected).max() <= 1


def mean_entropy(alpha: float) -> float:
    """Mean entropy of the sites' labels, in nats, over many seeds."""
    dataset = even_dataset()
    entropies = []
    for seed in range(20):
        section = federation(num_sites=4, dirichlet_alpha=alpha)
        for part in partition(dataset, section, seed).values():
            share = part.manifest.class_counts() / len(part.manifest)
            entropies.append(-(share[share > 0] * np.log(share[share > 0])).sum())
    return float(np.mean(entropies))


def test_a_small_alpha_skews_labels_and_a_large_one_does_not():
    skewed, middle, even = mean_entropy(0.2), mean_entropy(1.0), mean_entropy(1000.0)
    assert skewed + 0.2 < middle
    assert middle + 0.1 < even
    assert even > 0.98 * np.log(3)


def test_the_seed_decides_and_another_seed_deals_anew():
    dataset = even_dataset()
    for section in (federation(num_sites=3), federation(num_sites=3, partition="iid")):
        first, again, other = (
            {site: part.manifest.examples for site, part in partition(dataset, section, s).items()}
            for s in (5, 5, 6)
        )
        assert first == again
        assert first != other


def test_the_order_of_the_rows_does_not_matter():
    dataset = even_dataset(20)
    rows = np.random.default_rng(0).permutation(len(dataset))
    section = federation(num_sites=3, dirichlet_alpha=1.0)
    first, shuffled = (partition(d, section, 1) for d in (dataset, dataset.subset(rows)))
    for site in first:
        assert first[site].manifest.fingerprint() == shuffled[site].manifest.fingerprint()


def test_min_examples_is_honoured():
    # A draw at this alpha leaves somebody nearly empty; draws are repeated until none is.
    section = federation(num_sites=4, dirichlet_alpha=0.3, min_examples=12)
    for seed in range(10):
        parts = partition(even_dataset(), section, seed)
        assert min(len(part.manifest.rows(split="train")) for part in parts.values()) >= 12


@pytest.mark.parametrize("scheme", ["dirichlet", "iid"])
def test_min_examples_that_cannot_be_had_are_refused_in_one_line(scheme):
    section = federation(num_sites=3, partition=scheme, min_examples=1000)
    with pytest.raises(ConfigError) as error:
        partition(even_dataset(), section, 0)
    assert "federation.min-examples=1000: the best of" in str(error.value)
    assert "leaves a site with" in str(error.value)
    assert "\n" not in str(error.value)
    assert "lower federation.min-examples" in error.value.hint


@pytest.mark.parametrize("scheme", ["dirichlet", "iid"])
def test_more_sites_than_patients_are_refused(scheme):
    dataset = make_dataset([(5, 0, "train"), (5, 1, "train")])
    with pytest.raises(ConfigError, match=r"num-sites=3: more sites than patients \(2\)") as error:
        partition(dataset, federation(num_sites=3, partition=scheme), 0)
    assert error.value.hint == "lower federation.num-sites"


# --- natural


def natural_dataset(sites=("ulm", "bonn")) -> ImageDataset:
    examples = tuple(
        Example(f"{site}-{i}", "made", i, i % 3, f"{site}-{i}", site, SPLITS[i % 3])
        for site in sites
        for i in range(9)
    )
    return ImageDataset(
        Manifest("made", CLASSES, examples), np.zeros((len(examples), 1, 1), np.uint8)
    )


def test_a_natural_partition_is_the_datasets_own():
    parts = partition(natural_dataset(), federation(num_sites=2, partition="natural"), 0)
    assert list(parts) == ["bonn", "ulm"]
    for site, part in parts.items():
        assert {e.site for e in part.manifest.examples} == {site}
        assert len(part) == 9


def test_a_natural_partition_has_the_sites_it_has():
    with pytest.raises(ConfigError, match=r"federation\.num-sites=3: the dataset has 2 sites"):
        partition(natural_dataset(), federation(num_sites=3, partition="natural"), 0)


def test_a_dataset_that_names_no_sites_has_no_natural_partition():
    with pytest.raises(DataError, match="dataset=made names no sites") as error:
        partition(even_dataset(), federation(partition="natural"), 0)
    assert 'partition = "dirichlet"' in error.value.hint


def test_a_natural_partition_honours_min_examples_too():
    section = federation(num_sites=2, partition="natural", min_examples=4)
    with pytest.raises(ConfigError, match=r"federation\.min-examples=4"):
        partition(natural_dataset(), section, 0)


# --- description


def test_the_description_counts_every_site_split_and_class():
    dataset = make_dataset([(2, 0, "train"), (3, 1, "val"), (1, 2, "test"), (4, 2, "train")])
    section = federation(num_sites=1, partition="iid")
    assert describe(partition(dataset, section, 0), section) == {
        "scheme": "iid",
        "alpha": None,
        "classes": ["a", "b", "c"],
        "sites": {
            "A": {"train": [2, 0, 4], "val": [0, 3, 0], "test": [0, 0, 1], "num_patients": 4}
        },
    }
    section = federation(num_sites=1, dirichlet_alpha=0.7)
    assert describe(partition(dataset, section, 0), section)["alpha"] == 0.7


def test_sites_have_names_beyond_the_alphabet():
    names = site_names(30)
    assert names[:2] + names[25:28] == ["A", "B", "Z", "S27", "S28"]
    assert len(set(names)) == 30
