"""Let shared libraries that were linked with glibc 2.38 run on an older one.

    python -m scripts.engines.old_glibc DIR

Of what they ask of 2.38, all is strtol and its like under the names that C23 gave them, and these
differ for binary literals alone: the libraries get the names and the version of old.
"""

import struct
import sys
from pathlib import Path

from elftools.elf.elffile import ELFFile

_NEW, _OLD, _OLD_HASH = b"GLIBC_2.38", b"GLIBC_2.2.5", 0x09691A75
_C23 = "__isoc23_"


def aged(file: Path) -> int:
    """Rewrite the symbols of a library in place; how many there were."""
    content = bytearray(file.read_bytes())
    with file.open("rb") as opened:
        library = ELFFile(opened)
        symbols, names, needed = (
            library.get_section_by_name(name) for name in (".dynsym", ".dynstr", ".gnu.version_r")
        )
        text = names.data()
        if _NEW not in text:
            return 0
        old = text.find(b"\0" + _OLD + b"\0") + 1
        assert old, f"{file} asks nothing of {_OLD!r}"
        count = 0
        for index, symbol in enumerate(symbols.iter_symbols()):
            if symbol.name.startswith(_C23) and symbol["st_shndx"] == "SHN_UNDEF":
                place = symbols["sh_offset"] + index * symbols["sh_entsize"]
                (name,) = struct.unpack_from("<I", content, place)
                struct.pack_into("<I", content, place, name + len(_C23))
                count += 1
        _rename_version(content, needed["sh_offset"], text, old)
    file.write_bytes(content)
    return count


def _rename_version(content: bytearray, place: int, text: bytes, old: int) -> None:
    """Ask for the old version wherever the new one is asked for: Elf64_Verneed, Elf64_Vernaux."""
    while True:
        _, count, _, first, after = struct.unpack_from("<HHIII", content, place)
        entry = place + first
        for _ in range(count):
            _, flags, other, name, step = struct.unpack_from("<IHHII", content, entry)
            if text[name : text.index(b"\0", name)] == _NEW:
                struct.pack_into("<IHHI", content, entry, _OLD_HASH, flags, other, old)
            entry += step
        if not after:
            return
        place += after


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).glob("*.so*")):
        print(path.name, aged(path), "symbols")
