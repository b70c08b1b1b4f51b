"""What passes did to a graph, as text files that can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.program import Program

SUMMARY = "summary.txt"


class Dump:
    """A folder of NN-pass.before.txt and NN-pass.after.txt, and a summary with a line for each pass and for each
    operator whose number it changed.

    A run calls several lists of passes: numbers go on where those in the folder end. Raises SparseForgeError if nothing
    can be written there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SUMMARY).open("a").close()
        except OSError as error:
            told = f"no graphs can be dumped into {folder} ({error.strerror}): name another folder"
            raise SparseForgeError(told) from error
        self.number = max((_number(path) for path in folder.glob("*-*.before.txt")), default=0)
        self.name = ""

    def before(self, name: str, program: Program) -> None:
        """The graph that the next pass gets."""
        self.number += 1
        self.name = f"{self.number:02d}-{name}"
        self._write("before", program)

    def after(self, program: Program, modified: int, changes: Mapping[str, int]) -> None:
        """What that pass made of it: things that it changed, operators whose number changed by how much."""
        self._write("after", program)
        with (self.folder / SUMMARY).open("a", encoding="utf-8") as file:
            file.write(f"{self.name}: {modified} changed\n")
            file.writelines(f"    {change:+5d}  {op}\n" for op, change in changes.items())

    def _write(self, when: str, program: Program) -> None:
        text = program.graph_module.print_readable(print_output=False)
        (self.folder / f"{self.name}.{when}.txt").write_text(text + "\n", encoding="utf-8")


def _number(path: Path) -> int:
    head = path.name.partition("-")[0]
    return int(head) if head.isdecimal() else 0
