"""Checks of the places that an entry names: edits of a tiny model that its logits must survive."""

from collections.abc import Iterator
from dataclasses import replace

from absorb.prove import edits
from absorb.prove.subject import Subject, shows, still, without_each, without_each_fed
from absorb.schema.proof import Check


def stream(subject: Subject) -> Iterator[Check]:
    """The stream is written and read at these places, and nowhere else."""
    yield still(
        "rescaling the stream at these places leaves the logits as they are",
        subject.drift(edits.rescale_stream),
    )
    for field in ("reads", "writes"):
        for name, wrong in without_each(subject.family, field):
            moved = replace(subject, family=wrong).drift(edits.rescale_stream)
            yield shows(f"leaving {name} out of {field} breaks them", moved)
    if subject.family.positions is not None:
        moved = subject.with_entry(positions=None).drift(edits.rescale_stream)
        yield shows("leaving out the table of positions breaks them", moved)


def values(subject: Subject) -> Iterator[Check]:
    """Values come from these rows, and are read by these columns."""
    yield still("a constant value folds into the output's bias", subject.drift(edits.fold_values))
    yield still("smoothing values is exact", subject.drift(edits.smooth_values))


def feeds(subject: Subject) -> Iterator[Check]:
    """A norm feeds these matrices and nothing else."""
    [(norm, _)] = subject.family.feeds
    yield still(f"smoothing what {norm} gives is exact", subject.drift(edits.smooth_norms))
    for name, wrong in without_each_fed(subject.family):
        moved = replace(subject, family=wrong).drift(edits.smooth_norms)
        yield shows(f"leaving {name} out of what {norm} feeds breaks it", moved)


def neurons(subject: Subject) -> Iterator[Check]:
    """Rows of `up` are factors of the neurons that `down` reads."""
    pairs = " and ".join(f"{up} to {down}" for up, down in subject.family.neurons.items())
    yield still(f"smoothing from {pairs} is exact", subject.drift(edits.smooth_neurons))
