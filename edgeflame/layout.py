"""What the names of folders say about the images in them; in any case of letters, ``Train/Good`` as ``train/good``.

A folder of images is one of

- a data set in the MVTec layout: it has ``train/good``, or ``test`` with a folder for each kind of part;
- a folder of classes: it has ``good`` (or ``ok``, ``normal``), and what lies beside that is not good;
- a plain folder of good parts.

An image whose folders say that it is no good part, or do not say what it is, is never counted among the good ones. It
is left out, by the folder that says so, and the reader tells.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgeflame.errors import DataError

GOOD = "good"
"""The label of good parts, and the name of their folder in the MVTec layout."""
GOOD_NAMES = frozenset({GOOD, "ok", "normal"})

TRAIN, TEST, TRUTH = "train", "test", "ground_truth"

NOT_GOOD = frozenset(
    (
        *("bad", "defect", "defects", "defective", "anomaly", "anomalies", "anomalous", "abnormal", "ng", "nok", "ko"),
        *("reject", "rejects", "rejected", "fail", "failed", "fault", "faults", "faulty", "scrap", "unknown"),
    )
)
"""Names of folders of parts that are not good, or perhaps not."""

MASKS = frozenset({"truth", "groundtruth", "mask", "masks"})
"""Words in the names of folders of masks."""

NOT_TRAINING = NOT_GOOD | MASKS | {TEST, "val", "valid", "validation"}
"""The same, and words in the names of folders that hold no good parts to learn from."""


@dataclass(frozen=True, kw_only=True)
class FolderLayout:
    """The images of a data set by what their folders say; paths are those that were found.

    Attributes:
        train: good images to learn from.
        test: images to measure with, and their labels.
        left_out: number of images by the folder, relative to the root, for which they were left out.
        truth: folders of masks by the name of the defect, in small letters.
    """

    train: list[Path] = field(default_factory=list)
    test: list[tuple[Path, str]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    truth: dict[str, Path] = field(default_factory=dict)


def is_good_name(name: str) -> bool:
    """Whether a folder's name says that its parts are good."""
    return name.casefold() in GOOD_NAMES


def child_folder(folder: Path, name: str) -> Path | None:
    """The subfolder of a name in any case of letters, as it is written there; None if there is none.

    Raises:
        DataError: there are several, ``Good`` beside ``good``.
    """
    found = [path for path in sorted(folder.iterdir()) if path.name.casefold() == name and path.is_dir()]
    if len(found) > 1:
        raise DataError(f"{folder}: {found[0].name} and {found[1].name} are there; put into one what belongs together")
    return found[0] if found else None


def data_sets_in(root: Path, files: Iterable[Path]) -> dict[Path, set[str]]:
    """Folders in the MVTec layout at or below ``root``, and which of train, test and ground_truth they have.

    Args:
        root: the folder that was given.
        files: all images below it.
    """
    found: dict[Path, set[str]] = {}
    for folders in {path.relative_to(root).parent.parts for path in files}:
        for depth, (name, below) in enumerate(itertools.pairwise(folders)):
            kind = name.casefold()
            if kind in (TEST, TRUTH) or (kind == TRAIN and is_good_name(below)):
                found.setdefault(root.joinpath(*folders[:depth]), set()).add(kind)
                break
    return found


def read_layout(root: Path, files: Sequence[Path]) -> FolderLayout:
    """Sort the images of a folder by what their folders say.

    Args:
        root: the folder that was given.
        files: all images below it, sorted.

    Raises:
        DataError: the folder is one of defective parts or of masks, or data sets lie below it.
    """
    if _is_data_set(root, files):
        return _read_mvtec(root, files)
    _refuse_other_parts(root, files)
    layout = FolderLayout()
    with_good = {
        root.joinpath(*folders[:depth])
        for folders in {path.relative_to(root).parent.parts for path in files}
        for depth, name in enumerate(folders)
        if is_good_name(name)
    }
    for path in files:
        folder = _speaking_folder(root, path, with_good)
        if folder is None:
            layout.train.append(path)
        else:
            layout.left_out[folder] += 1
    return layout


def read_defects(root: Path, files: Sequence[Path]) -> FolderLayout:
    """Find the labelled defects of a folder, as the layout's ``test``: those of a data set, or all that is not good.

    A defect is called by the folder of its image, or by the root.

    Args:
        root: the folder that was given.
        files: all images below it, sorted.

    Raises:
        DataError: the folder is one of good parts, or data sets lie below it.
    """
    if _is_data_set(root, files):
        layout = _read_mvtec(root, files)
        return replace(layout, train=[], test=[(path, label) for path, label in layout.test if label != GOOD])
    if is_good_name(root.resolve().name):
        raise DataError(f"{root}: labelled defects are expected, and this folder's name says that its parts are good")
    layout = FolderLayout()
    for path in files:
        folders = path.relative_to(root).parent.parts
        other = next((n for n, name in enumerate(folders) if is_good_name(name) or _words(name) & MASKS), None)
        if other is None:
            layout.test.append((path, folders[-1] if folders else root.resolve().name))
        elif not is_good_name(folders[other]):
            layout.left_out["/".join(folders[: other + 1])] += 1
    return layout


def _is_data_set(root: Path, files: Sequence[Path]) -> bool:
    data_sets = {path: kinds for path, kinds in data_sets_in(root, files).items() if kinds & {TRAIN, TEST}}
    below = sorted(path for path in data_sets if path != root)
    if below:
        first = ", ".join(str(path) for path in below[:3])
        raise DataError(f"{root}: a whole data set lies below it; give the one that is meant: {first}")
    return root in data_sets


def _read_mvtec(root: Path, files: Sequence[Path]) -> FolderLayout:
    layout = FolderLayout()
    for path in files:
        folders = path.relative_to(root).parent.parts
        split, kind = (*(name.casefold() for name in folders), "", "")[:2]
        if split == TRUTH:
            if kind:
                layout.truth.setdefault(kind, root.joinpath(*folders[:2]))
            continue
        good = is_good_name(kind)
        doubtful = next((depth for depth in range(2, len(folders)) if good and _says_not(folders[depth])), None)
        if doubtful is not None:
            layout.left_out["/".join(folders[: doubtful + 1])] += 1
        elif split == TRAIN and good:
            layout.train.append(path)
        elif split == TEST and kind:
            layout.test.append((path, GOOD if good else folders[1]))
        else:
            layout.left_out["/".join(folders[:2]) or "."] += 1
    return layout


def _refuse_other_parts(root: Path, files: Sequence[Path]) -> None:
    """Refuse a folder that itself says that its parts are not good, unless folders in it say which of them are."""
    here = root.resolve()
    if any(is_good_name(name) for path in files for name in path.relative_to(root).parent.parts):
        return
    parent = here.parent.name.casefold()
    beside: list[str] = []
    with contextlib.suppress(OSError):
        beside = [path.name for path in here.parent.iterdir()]
    if here.name.casefold() in NOT_GOOD or TRUTH in (here.name.casefold(), parent):
        raise DataError(f"{root}: good parts are expected, and the name of this folder says that these are not")
    if parent == TEST and not is_good_name(here.name) and any(map(is_good_name, beside)):
        raise DataError(
            f"{root}: good parts are expected, and this is the folder of a defect, beside that of good ones"
        )


def _speaking_folder(root: Path, path: Path, with_good: set[Path]) -> str | None:
    """The folder, relative to the root, that says that this is no good part to learn from; None if there is none."""
    folders = path.relative_to(root).parent.parts
    known_good = False
    for depth, name in enumerate((*folders, "")):
        known_good = known_good or is_good_name(name)
        beside_good = not known_good and root.joinpath(*folders[:depth]) in with_good
        if beside_good or _says_not(name):
            return "/".join(folders[: depth + 1]) or "."
    return None


def _says_not(name: str) -> bool:
    words = _words(name)
    return bool(words & NOT_TRAINING) or ("not" in words and bool(words & GOOD_NAMES))


def _words(name: str) -> set[str]:
    return set(re.split(r"[\W\d_]+", name.casefold()))
