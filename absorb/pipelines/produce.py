"""A job → what it asks for, in the architecture that it asks for."""

from absorb.errors import MisuseError, Say
from absorb.pipelines import export, rescale
from absorb.pipelines.convert import convert
from absorb.runtime import ranks
from absorb.schema.exported import Exported, Rescaled
from absorb.schema.report import Report
from absorb.schema.settings import Job

Produced = Report | Exported | Rescaled


def produce(job: Job, say: Say, resume: bool = False) -> Produced:
    """Write what a job asks for to job.out; with `resume` go on from OUT.progress."""
    if job.to != "absorbed" and ranks.started() > 1:
        raise MisuseError(
            f"--to {job.to} is written by one process; start it without torchrun, or convert by "
            "several without --to"
        )
    if job.to == "stock":
        if resume:
            raise MisuseError("--to stock takes no long work; drop --resume")
        return rescale.rescaled(job, say)
    return (export.converted if job.to == "native" else convert)(job, say, resume)
