"""The entry of a model's architecture, listed or derived, and its proof: from the configuration."""

from pathlib import Path

from absorb.errors import AbsorbError, Say
from absorb.load import checks, download, wrapped
from absorb.load.architecture.classes import proved_family, stock_of
from absorb.load.files import read_json
from absorb.models.family import UnsupportedFamilyError
from absorb.prove.prove import proved, shown
from absorb.schema.places import expanded
from absorb.schema.proof import Proof
from absorb.schema.settings import ModelRef


def family_proof(ref: ModelRef, say: Say) -> Proof:
    """What is known of a model's architecture, and shown of it now. No weight is read."""
    config = read_json(_folder(ref) / "config.json", ref.name)
    if ref.text_only:
        config = wrapped.inside(config, ref.name)
    say(f"proving the entry of {ref.name} on tiny random models")
    try:
        listed = checks.family_of_config(config, ref.name)
    except UnsupportedFamilyError:
        if not checks.is_of_text(config):
            raise
        return proved_family(config, ref, proved)[1]
    return shown(*stock_of(config, ref.name), listed)


def _folder(ref: ModelRef) -> Path:
    """Where the config.json of a model is, fetched if need be."""
    path = expanded(ref.name)
    if path.is_dir():
        return path
    if not path.exists() and download.is_repository(ref.name):
        return download.description(ref)
    raise AbsorbError(f"{ref.name} has no config.json; name a folder or a Hub repository")
