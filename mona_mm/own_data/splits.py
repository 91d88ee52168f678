"""Splits: completed where the folder has only some, drawn by a seed where it has none; no image on both sides."""

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping

from mona_mm.own_data.findings import Findings
from mona_mm.own_data.images import equal_files
from mona_mm.own_data.samples import SPLITS, OwnData, Sample


def complete_splits(data: OwnData, seed: int = 0, val: float = 0.2, test: float = 0.0) -> None:
    """Give the data a training and a validation split, and a test split if ``test`` asks for one; in place.

    Splits that the folder has stay. What is missing is drawn from the training images by the seed, so that every class
    has its share on each side; images of equal content stay together.

    Args:
        data: the samples, those of no split under ``''``.
        seed: of the draw.
        val: the share of the images that validate, where the folder has no validation split.
        test: the share that are kept for the test, where the folder has no test split.
    """
    loose = data.splits.pop('', [])
    if loose:
        held_out = {str(s.image) for split, samples in data.splits.items() if split != 'train' for s in samples}
        again = [sample for sample in loose if str(sample.image) in held_out]
        if again:
            text = 'annotations in no split are of images that validate or test'
            data.findings.warn(text, again[0].image.name, 'not used', len(again))
            loose = [sample for sample in loose if str(sample.image) not in held_out]
        if loose and 'train' in data.splits:
            text = 'annotations are in no split, as others are'
            data.findings.warn(text, loose[0].image.name, 'they join the training images', len(loose))
        data.splits['train'] = data.splits.get('train', []) + loose
    if 'train' not in data.splits and data.splits:
        only = next(iter(data.splits))
        data.notes.append(f'the folder has no training split: it is drawn from {only}')
        data.splits['train'] = data.splits.pop(only)
    _join_listed_twice(data)
    shares = {}
    if not data.splits.get('val') and val > 0:
        shares['val'] = val
    if not data.splits.get('test') and test > 0:
        shares['test'] = test
    if shares:
        _draw(data, shares, seed)
    note_duplicates(_splits_of(data), data.findings)
    _note_contradictions(data)


def _splits_of(data: OwnData) -> dict[str, set[str]]:
    splits_of = defaultdict(set)
    for split, samples in data.splits.items():
        for sample in samples:
            splits_of[str(sample.image)].add(split)
    return splits_of


def _draw(data: OwnData, shares: dict[str, float], seed: int) -> None:
    samples = data.splits['train']
    groups, equal = _groups(samples)
    if equal:
        example = ' = '.join('/'.join(sample.image.parts[-3:]) for sample in equal[0][:2])
        data.findings.warn('groups of images have equal content', example, 'each kept in one split', len(equal))
    if len(groups) <= len(shares):
        text = f'training images of different content are too few to draw {" and ".join(shares)} from them'
        data.findings.error(text, '', 'add images', len(groups))
        return
    chosen = stratify([_labels(group) for group in groups], [len(group) for group in groups], shares, seed)
    parts: dict[str, list[Sample]] = {'train': [], **{split: [] for split in shares}}
    for group, split in zip(groups, chosen, strict=True):
        parts[split] += group
    data.splits.update(parts)
    percent = ', '.join(f'{share:.0%} {split}' for split, share in shares.items())
    data.notes.append(f'split drawn from {len(samples)} images: {percent}, every class in proportion, seed {seed}')


def _groups(samples: list[Sample]) -> tuple[list[list[Sample]], list[list[Sample]]]:
    """The samples in groups of equal content, and those groups that have more than one."""
    by_path = {str(sample.image): sample for sample in samples}
    equal = [[by_path[path] for path in group] for group in equal_files(by_path)]
    together = {id(sample) for group in equal for sample in group}
    return [*equal, *([sample] for sample in samples if id(sample) not in together)], equal


def _labels(group: list[Sample]) -> set[int]:
    labels = {instance.label for sample in group for instance in sample.instances}
    labels |= {label for sample in group for label in sample.present if label != 255}
    return labels | {sample.label for sample in group if sample.label is not None}


def stratify(labels: list[Collection[int]], sizes: list[int], shares: dict[str, float], seed: int) -> list[str]:
    """Choose ``'train'`` or a split of ``shares`` for each group of images.

    The rarest class is dealt out first; each group goes to the split that lacks most of that class, and of images. A
    class of a single group stays in training.

    Args:
        labels: the classes in each group.
        sizes: the number of images in each group.
        shares: the share of the images that each split but the training is to have.
        seed: of the order.
    """
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    weights = {'train': 1.0 - sum(shares.values()), **shares}
    groups_of = defaultdict(list)
    for i in order:
        for label in labels[i] or (-1,):
            groups_of[label].append(i)
    wanted = {(split, None): weight * sum(sizes) for split, weight in weights.items()}
    for label, groups in groups_of.items():
        for split, weight in weights.items():
            wanted[split, label] = weight * len(groups)
    chosen: dict[int, str] = {}
    for label in sorted(groups_of, key=lambda label: (len(groups_of[label]), label)):
        for i in groups_of[label]:
            if i not in chosen:
                lacking = max(weights, key=lambda split: (wanted[split, label], wanted[split, None]))
                split = lacking if len(groups_of[label]) > 1 else 'train'
                chosen[i] = split
                wanted[split, None] -= sizes[i]
                for each in labels[i] or (-1,):
                    wanted[split, each] -= 1
    for split, share in shares.items():
        _fill(split, share * sum(sizes), labels, sizes, order, chosen)
    for split in weights:  # none may be empty, however few images there are
        sides = list(chosen.values())
        if split not in sides and len(sides) >= len(weights):
            fullest = max(weights, key=sides.count)
            chosen[next(i for i in order if chosen[i] == fullest)] = split
    return [chosen[i] for i in range(len(labels))]


def _fill(
    split: str, wanted: float, labels: list[Collection[int]], sizes: list[int], order: list[int], chosen: dict[int, str]
) -> None:
    """Give a split more of the training groups, in place, if less than three quarters of what it is to have are in it.

    Where a class has few images, its share of them is less than one, and all of it would train. Each class keeps at
    least one group for training.
    """
    left = wanted - sum(sizes[i] for i, side in chosen.items() if side == split)
    if left < 0.25 * wanted:
        return
    training = Counter(label for i, side in chosen.items() if side == 'train' for label in labels[i])
    here = Counter(label for i, side in chosen.items() if side == split for label in labels[i])
    for i in sorted(order, key=lambda i: (not labels[i], sum(here[label] for label in labels[i]))):
        if chosen[i] == 'train' and sizes[i] <= left and all(training[label] > 1 for label in labels[i]):
            chosen[i] = split
            left -= sizes[i]
            training.subtract(labels[i])


def _note_contradictions(data: OwnData) -> None:
    """Warn of images of equal content that are in different classes."""
    labels = {str(s.image): s.label for samples in data.splits.values() for s in samples if s.label is not None}
    for group in equal_files(labels, labels.get):
        example = ' = '.join('/'.join(path.split('/')[-3:]) for path in group[:2])
        data.findings.warn('groups of images of equal content are in different classes', example)


def _join_listed_twice(data: OwnData) -> None:
    """Make one sample of an image that several files annotate, in place."""
    for split, samples in data.splits.items():
        first: dict[str, Sample] = {}
        for sample in samples:
            known = first.setdefault(str(sample.image), sample)
            if known is not sample:
                new = [instance for instance in sample.instances if instance not in known.instances]
                if len(new) < len(sample.instances):
                    text = 'objects are in several files alike, with the same class and box'
                    data.findings.warn(text, sample.image.name, 'kept once', len(sample.instances) - len(new))
                known.instances += new
        data.splits[split] = list(first.values())


def note_duplicates(splits_of: Mapping[str, Collection[str]], findings: Findings) -> None:
    """Warn of images that are in more than one split, themselves or by their content.

    Args:
        splits_of: the splits that each image file is in. The validation images may be the test images, too.
        findings: where the warnings are noted.
    """
    for path, splits in splits_of.items():
        if len(splits) > 1 and 'train' in splits:
            _warn(findings, splits, [path])
    side = {path: next(split for split in SPLITS if split in splits) for path, splits in splits_of.items()}
    for group in equal_files(side, side.get):
        splits = sorted({side[path] for path in group})
        _warn(findings, splits, [next(path for path in group if side[path] == split) for split in splits[:2]])


def _warn(findings: Findings, splits: Collection[str], paths: list[str]) -> None:
    example = ' = '.join('/'.join(path.split('/')[-3:]) for path in paths)
    findings.warn(f'images are in {" and ".join(sorted(splits))} alike', example, 'scores will be too good')
