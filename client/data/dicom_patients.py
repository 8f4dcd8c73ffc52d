"""Which images of a hospital's DICOM are of one person, as far as table and headers tell.

A person has several names: the table's, PatientID with its issuer, the study. Files lack some of
them, so names that meet in one file or one study are of one patient, whom the smallest stands for.
A missing issuer is the only one that the PatientID has. Where the table names the patient of every
image under a PatientID or a study, it decides alone: then the header's names link nothing, as in an
archive whose PatientIDs were all made the same.

Invariant: two images that the headers link are of one patient unless the table tells them apart,
and names follow from what is said, not from the order of the files. Flags count images and name
nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

NO_PATIENT = "no PatientID: the study counts as the patient"
NO_STUDY = "neither PatientID nor study: the image counts as a patient"
TWO_ISSUERS = "PatientID with several issuers: counted as several patients"
ONE_PATIENT = "one PatientID in all studies: was it removed?"
JOINED = (
    "several PatientIDs in one study, or several of the table's patients under one: "
    "counted as one patient"
)
NEARLY_SAME = "patient whose number differs from another's by case, spaces or leading zeros alone"

# ("name", what the table or the header says) or ("study", its UID).
_Name = tuple[str, str]


class Claim(NamedTuple):
    """What one image says of its patient; empty where it does not.

    Attributes:
        table: The table's patient.
        patient_id: PatientID.
        issuer: IssuerOfPatientID.
        study: StudyInstanceUID.
        used: It has a label. The others' headers may still link two that have one.
    """

    table: str
    patient_id: str
    issuer: str
    study: str
    used: bool = True


class _Groups:
    """Names that are linked, in groups; the smallest name stands for its group."""

    def __init__(self) -> None:
        self._parents: dict[_Name, _Name] = {}

    def find(self, name: _Name) -> _Name:
        while (parent := self._parents.get(name, name)) != name:
            self._parents[name] = self._parents.get(parent, parent)  # shortens the way
            name = parent
        return name

    def link(self, one: _Name, other: _Name) -> None:
        # "name" comes before "study", so a study stands for a patient only without a name.
        low, high = sorted((self.find(one), self.find(other)))
        self._parents[high] = low


def name_patients(claims: Sequence[Claim], flagged: Counter[str]) -> list[str]:
    """Names each image's patient.

    Args:
        claims: One an image.
        flagged: Takes the counts of used images whose patient is doubtful.

    Returns:
        A name for each, equal where the patient is; empty where nothing is said.
    """
    numbers = _numbers(claims)
    header = _Groups()
    for number, claim in zip(numbers, claims, strict=True):
        if number and claim.study:
            header.link(("name", number), ("study", claim.study))
    groups = [
        header.find(("name", number) if number else ("study", claim.study))
        if number or claim.study
        else None
        for number, claim in zip(numbers, claims, strict=True)
    ]
    # Where the table leaves an image of a group open, the header has to tell.
    open_groups = {
        group
        for group, claim in zip(groups, claims, strict=True)
        if group and claim.used and not claim.table
    }
    people = _Groups()
    for number, group, claim in zip(numbers, groups, claims, strict=True):
        if group in open_groups and group:
            for name in (("name", number), ("name", claim.table), ("study", claim.study)):
                if name[1]:
                    people.link(group, name)
    names: list[str] = []
    for group, claim in zip(groups, claims, strict=True):
        name = ("name", claim.table) if claim.table else group
        names.append(people.find(name)[1] if name else "")
        if claim.used and not claim.table and (not name or people.find(name)[0] == "study"):
            flagged[NO_PATIENT if name else NO_STUDY] += 1
    _flag_joined(claims, [group if group in open_groups else None for group in groups], flagged)
    _flag_numbers(claims, numbers, names, flagged)
    return names


def _numbers(claims: Sequence[Claim]) -> list[str]:
    """Returns PatientIDs with their issuers, where an ID has several."""
    issuers: dict[str, set[str]] = {}
    for claim in claims:
        issuers.setdefault(claim.patient_id, set()).update({claim.issuer} - {""})
    numbers: list[str] = []
    for claim in claims:
        issuer = claim.issuer
        if not issuer and len(known := issuers[claim.patient_id]) == 1:
            issuer = next(iter(known))
        # No value of the standard holds a backslash, so no two patients meet in one name.
        number = claim.patient_id + (f"\\{issuer}" if issuer else "")
        numbers.append(number if claim.patient_id else "")
    return numbers


def _flag_joined(
    claims: Sequence[Claim], groups: Sequence[_Name | None], flagged: Counter[str]
) -> None:
    said: dict[_Name, tuple[set[str], set[str]]] = {}
    for group, claim in zip(groups, claims, strict=True):
        if group:
            ids, tables = said.setdefault(group, (set(), set()))
            ids.update({claim.patient_id} - {""})
            tables.update({claim.table} - {""})
    several = {group for group, kinds in said.items() if any(len(kind) > 1 for kind in kinds)}
    pairs = zip(groups, claims, strict=True)
    flagged[JOINED] += sum(claim.used and group in several for group, claim in pairs)


def _flag_numbers(
    claims: Sequence[Claim], numbers: Sequence[str], names: Sequence[str], flagged: Counter[str]
) -> None:
    issuers: dict[str, set[str]] = {}
    patients: dict[str, set[str]] = {}
    spellings: dict[str, set[str]] = {}
    used = [claim for claim in claims if claim.used]
    for claim, number, name in zip(claims, numbers, names, strict=True):
        if not claim.used:
            continue
        if claim.patient_id:
            issuers.setdefault(claim.patient_id, set()).add(number)
        for said in {claim.table or claim.patient_id} - {""}:
            patients.setdefault(plain_number(said), set()).add(name)
            spellings.setdefault(plain_number(said), set()).add(said)
    flagged[TWO_ISSUERS] += sum(len(issuers.get(claim.patient_id, ())) > 1 for claim in used)
    doubtful = {
        said
        for plain, spelt in spellings.items()
        if len(spelt) > 1 and len(patients[plain]) > 1
        for said in spelt
    }
    flagged[NEARLY_SAME] += sum((claim.table or claim.patient_id) in doubtful for claim in used)
    studies = {claim.study for claim in used}
    if len(issuers) == 1 and len(studies) > 1 and all(claim.patient_id for claim in used):
        flagged[ONE_PATIENT] += len(used)


def plain_number(number: str) -> str:
    """Return what two spellings of one patient's number share."""
    return number.strip().casefold().lstrip("0")
