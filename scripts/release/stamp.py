"""Name the present modeling_absorb.py as that of the present version, in released.json."""

import hashlib
import json
from pathlib import Path

from absorb import __version__

PACKAGE = Path(__file__).resolve().parents[2] / "absorb"
RELEASED = PACKAGE / "ship" / "released.json"

if __name__ == "__main__":
    released = json.loads(RELEASED.read_text())
    code = (PACKAGE / "models" / "modeling_absorb.py").read_bytes()
    released[__version__] = hashlib.sha256(code).hexdigest()
    RELEASED.write_text(json.dumps(released, indent=1) + "\n")
