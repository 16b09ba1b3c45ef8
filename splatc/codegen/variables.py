"""Arrays in registers as variables, in generated CUDA: so that compilers need not find out that they are."""

from __future__ import annotations

import re

_FUNCTION = re.compile(r'^(?=extern "C" __global__)', re.MULTILINE)
_DECLARATION = re.compile(r"alignas\(\d+\) (\w+(?: \w+)*) (\w+)\[(\d+)\];")
_ELEMENT = re.compile(r"\b(\w+)\[(\d+)\]")
_WHOLE = re.compile(r"\b([A-Za-z_]\w*)\b(?!\[\d+\])")


def arrays_to_variables(source: str) -> str:
    """Local arrays whose elements are only ever named by number become a variable for each element.

    ``alignas(64) float top_ptr[2]; top_ptr[1] = x;`` -> ``float top_ptr_at0, top_ptr_at1; top_ptr_at1 = x;``

    The machine code has the same instructions. NVVM takes arrays apart slowly: with the 64 scores and 64 outputs of a
    thread, that is half of its time. Arrays that are indexed by anything else, or passed on whole, stay.
    """
    return "".join(map(_in_function, _FUNCTION.split(source)))


def _in_function(text: str) -> str:
    """The same for a text of at most one function, in which an array has one name."""
    declared = {match[2] for match in _DECLARATION.finditer(text)}
    arrays = declared.difference(match[1] for match in _WHOLE.finditer(text))

    def declaration(match: re.Match[str]) -> str:
        kind, name, count = match[1], match[2], int(match[3])
        return f"{kind} {', '.join(f'{name}_at{i}' for i in range(count))};" if name in arrays else match[0]

    def element(match: re.Match[str]) -> str:
        return f"{match[1]}_at{match[2]}" if match[1] in arrays else match[0]

    return _ELEMENT.sub(element, _DECLARATION.sub(declaration, text))
