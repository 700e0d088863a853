"""The communication in a compiled program."""

import re

#: Bytes of one number.
_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}

_KINDS = "all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|reduce-scatter|send|recv"


def collectives(compiled):
    """(kind, bytes a device hands over) of each collective operation in it."""
    found = []
    for line in compiled.as_text().splitlines():
        operation = re.search(rf"= (\(?[^=]*?) (ragged-)?({_KINDS})(-start)?\(", line)
        if operation:
            dtype, sizes = re.match(r"\(*(\w+)\[([\d,]*)\]", operation[1]).groups()
            count = 1
            for size in filter(None, sizes.split(",")):
                count *= int(size)
            found.append((operation[3], count * _WIDTHS[dtype]))
    return found


def kinds(compiled):
    return {kind for kind, _ in collectives(compiled)}
