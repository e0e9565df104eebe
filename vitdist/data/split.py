"""Which pictures are held out for validation: each class's share, groups kept whole. Pure.

    train, val = split.hold_out(pictures, 0.1, grouped=True)

The result depends on the set of pictures only, not on their order: ties and draws are by hash of the names.
"""

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from vitdist.data.files import Picture

# What a class without training pictures and one without validation pictures cost, beside squared deviations
# of shares that are at most 1 a class: a group is moved for them whatever that does to the shares.
_NO_TRAINING, _NO_VALIDATION = 1e6, 1e3
# Bounds for time: passes over the groups, and pairs tried in one.
_PASSES = 20
_PAIRS = 100_000


def draw(name: bytes) -> bytes:
    """What pictures and groups are shuffled by: 16 bytes."""
    return hashlib.blake2b(name, digest_size=16).digest()


def shuffled(pictures: Iterable[Picture]) -> list[Picture]:
    return sorted(pictures, key=lambda picture: draw(picture.source))


def hold_out(pictures: Sequence[Picture], fraction: float, grouped: bool) -> tuple[list[Picture], list[Picture]]:
    """Training and validation, in the order given. Raises ValueError if nothing can be held out."""
    if grouped:
        counts: dict[str, Counter[int]] = defaultdict(Counter)
        for picture in pictures:
            counts[picture.group][picture.label] += 1
        groups = _grouped(counts, fraction)
        held = [picture.group in groups for picture in pictures]
    else:
        sources = _ungrouped(pictures, fraction)
        held = [picture.source in sources for picture in pictures]
    if not any(held):
        raise ValueError(f"no class has two {'groups' if grouped else 'pictures'}: none can be held out for validation")
    train = [picture for picture, out in zip(pictures, held, strict=True) if not out]
    return train, [picture for picture, out in zip(pictures, held, strict=True) if out]


def _ungrouped(pictures: Iterable[Picture], fraction: float) -> set[bytes]:
    """Of each class `fraction`, at least one picture, if it has two."""
    by_class: dict[int, list[Picture]] = defaultdict(list)
    for picture in pictures:
        by_class[picture.label].append(picture)
    return {
        picture.source
        for members in by_class.values()
        for picture in shuffled(members)[: min(len(members) - 1, max(1, round(fraction * len(members))))]
    }


def _grouped(counts: dict[str, Counter[int]], fraction: float) -> set[str]:
    """The groups to hold out, so that each class's share of pictures comes near `fraction`.

    Greedy as scikit-learn's StratifiedGroupKFold: groups that hold most of a class first, each to the side
    that keeps the shares of what was dealt so far nearer to `fraction`, so that large and small groups go to
    both sides. Then single groups, and pairs where a class is missing on a side, change sides while that
    brings the shares nearer. Where groups hold several classes, covering all of them on both sides is the
    colouring of a hypergraph: it can be impossible (A+B, B+C, C+A), and then validation lacks a class,
    never training.
    """
    totals, owners = Counter[int](), Counter[int]()
    for members in counts.values():
        totals.update(members)
        owners.update(members.keys())
    order = sorted(
        counts, key=lambda g: (-max(n / totals[k] for k, n in counts[g].items()), draw(g.encode(errors="replace")), g)
    )
    held, taken, dealt = set[str](), Counter[int](), Counter[int]()
    for group in order:
        members = counts[group]
        dealt.update(members)
        # (x + n)^2 < x^2 for the surplus x that each class has now, weighted by the class's size
        surplus = ((taken[k] - fraction * dealt[k], n, totals[k]) for k, n in members.items())
        if sum(n * (2 * x + n) / total**2 for x, n, total in surplus) < 0:
            held.add(group)
            taken.update(members)

    def cost(label: int, count: int) -> float:
        missing = _NO_TRAINING * (count == totals[label]) + _NO_VALIDATION * (count == 0 and owners[label] > 1)
        return (count / totals[label] - fraction) ** 2 + missing

    def change(groups: Sequence[str]) -> float:
        moved = Counter[int]()
        for group in groups:
            for k, n in counts[group].items():
                moved[k] += -n if group in held else n
        return sum(cost(k, taken[k] + n) - cost(k, taken[k]) for k, n in moved.items())

    def improve(candidates: Iterable[tuple[str, ...]]) -> bool:
        improved = False
        for groups in candidates:
            if change(groups) < -1e-12:
                improved = True
                for group in groups:
                    taken.update({k: -n if group in held else n for k, n in counts[group].items()})
                held.symmetric_difference_update(groups)
        return improved

    for _ in range(_PASSES):
        if improve((group,) for group in order):
            continue
        lacking = {k for k in totals if owners[k] > 1 and not taken[k]}
        first = [group for group in order if lacking & counts[group].keys()]
        pairs = ((a, b) for a in first for b in order if a != b and counts[a].keys() & counts[b].keys())
        if not improve(itertools.islice(pairs, _PAIRS)):
            break
    return held
