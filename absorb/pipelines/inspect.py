"""What convert would find and do, as data, a page and pictures."""

from contextlib import ExitStack
from pathlib import Path

import torch

from absorb.errors import Say
from absorb.fold.graft import graft
from absorb.measure.outliers import measure
from absorb.pipelines.prepare import completed, prepare
from absorb.schema.codec import to_json
from absorb.schema.report import Inspection
from absorb.schema.settings import Job
from absorb.ship.files import atomic_file
from absorb.show.before_after import BeforeAfter, before_after_of


def inspect(job: Job, say: Say) -> Inspection:
    """Everything that convert finds out before the fine-tune; writes nothing."""
    return prepare(job, say, None).inspection


def exhibit(job: Job, say: Say) -> BeforeAfter:
    """The same, with how the model looks before and after what convert does before a fine-tune."""
    draft = prepare(job, say, None)
    before = draft.measurement
    assert before is not None  # no plan is read to inspect
    draft = completed(draft)
    student = graft(draft.source.decoder, draft.plan)
    tokens, nothing = draft.texts.calibration, torch.tensor([], dtype=torch.long)
    after = measure(student, tokens, nothing)
    return before_after_of(draft.inspection, draft.source, before, after)


def picture(job: Job, html: Path | None, png: Path | None, say: Say) -> Inspection:
    """Inspect a model and write a page of it, a folder of pictures, or both."""
    from absorb.show.page import drawn, inspection_page  # matplotlib, which nothing else needs
    from absorb.show.sections import sections

    with ExitStack() as files:  # places that cannot be written to are refused now
        page = None if html is None else files.enter_context(atomic_file(html))
        data = None if png is None else files.enter_context(atomic_file(png / "figures.json"))
        shown = exhibit(job, say)
        pictures = drawn(sections(shown))
        if page is not None:
            page.write(inspection_page(shown.inspection, pictures).encode())
        if data is not None and png is not None:
            data.write(to_json(shown).encode())
            for section, picture in pictures:
                files.enter_context(atomic_file(png / f"{section.name}.png")).write(picture)
    return shown.inspection
